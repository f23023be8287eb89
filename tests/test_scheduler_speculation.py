"""Drafts by hand: what is guessed, who computes it, and that the tokens are those of a run without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from jaxcept.config import read_speculation
from jaxcept.scheduler.costs import CostModel
from jaxcept.scheduler.events import Finished, Intercepted
from jaxcept.scheduler.lookup import Lookup
from jaxcept.scheduler.plan import ChunkKind
from jaxcept.scheduler.speculation import Speculation, SpeculationConfig
from jaxcept.scheduler.watcher import WatcherError
from tests.costs import HAND
from tests.fakes import FakeWatcher, Rig, scripted
from tests.workloads import Guesses

PROMPT = (5, 7, 11)


@pytest.mark.parametrize(
    ("token_ids", "found"),
    [
        ([1, 2, 3, 4], ()),
        ([1, 2, 3, 9, 8, 1, 2, 3], (9, 8, 1)),
        ([1, 2, 5, 1, 2, 6, 1, 2], (6, 1, 2)),  # where it stood last
        ([7, 1, 2, 5, 1, 2, 6, 7, 1, 2], (5, 1, 2)),  # the longer run counts more than the later one
        ([1, 2, 1, 2], (1, 2)),
        ([4, 4, 4], (4,)),  # the run may overlap what follows it
        ([9, 3, 3], ()),  # one token is too few
        ([256, 256, 0, 1, 1], ()),  # 256 and 1 look alike where bytes are not told apart from ids
        ([], ()),
    ],
)
def test_what_followed_the_last_tokens_before(token_ids: list[int], found: tuple[int, ...]) -> None:
    assert Lookup().guess(token_ids, 4, 2, 3) == found


def test_a_lookup_grows_with_its_sequence() -> None:
    lookup, token_ids = Lookup(), [1, 2, 3]
    assert lookup.guess(token_ids, 4, 2, 9) == ()
    token_ids += [8, 1, 2]
    assert lookup.guess(token_ids, 4, 2, 9) == (3, 8, 1, 2)


def test_guesses_are_as_wide_as_they_were_right() -> None:
    lookup, token_ids = Lookup(), [*range(20), 0, 1]
    widths = []
    for num_right in (4, 16, 1, 0):
        widths.append(len(lookup.guess(token_ids, 4, 2, 99)))
        lookup.learn(num_right, most=12)
    assert widths == [4, 10, 12, 4] and lookup.width == 2


def run(speculation: Speculation | None, watcher: FakeWatcher | None = None, depth: int = 1, **params: Any) -> Rig:
    """One request of twenty tokens with an interception."""
    rig = Rig(depth=depth, speculation=speculation, max_model_len=64)
    own = {} if watcher is None else {"watcher": lambda _: watcher}
    rig.add("a", PROMPT, scripted(9), **{"max_tokens": 20} | params, **own)
    for _ in range(200):
        rig.step()
        for event in rig.told(Intercepted)[len(rig.resumed) :]:
            rig.engine.resume(event.seq_id, (1, 2, 3))
            rig.resumed.append(event.seq_id)
        if rig.told(Finished):
            return rig
    raise AssertionError("it does not end")


@pytest.mark.parametrize("wrong", [1, 2, 3, 1000])
@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_are_the_same_however_many_guesses_are_right(wrong: int, depth: int, temperature: float) -> None:
    plain, guessed = (run(speculation, depth=depth, temperature=temperature) for speculation in (None, Guesses(wrong)))
    assert [event.token_ids for event in guessed.told(Finished)] == [event.token_ids for event in plain.told(Finished)]
    counters = guessed.scheduler.counters
    assert counters.generated_tokens == plain.scheduler.counters.generated_tokens == 20
    assert (counters.accepted_draft_tokens > 0) == (wrong > 1) and counters.draft_tokens > 0
    if wrong == 1000:  # all are right: four tokens a step, as a block has, but at the interception and its return
        assert counters.steps <= 9 < plain.scheduler.counters.steps


def test_drafts_stay_in_the_block_and_draws_in_their_number() -> None:
    rig = Rig(speculation=Guesses(1000), block_size=8, max_num_seqs=3, max_model_len=64)
    for name in "ab":
        rig.add(name, PROMPT, max_tokens=30)
    rig.run()
    chunks = [chunk for plan in rig.runner.plans for chunk in plan.chunks if chunk.kind is ChunkKind.DRAFT]
    assert any(chunk.num_drafts for chunk in chunks)
    assert all((chunk.start % 8) + len(chunk.token_ids) <= 8 for chunk in chunks)
    assert all(len(plan.sampling_seq_ids) <= 3 for plan in rig.runner.plans)


@pytest.mark.parametrize(
    "params",
    [{"logprobs": 1}, {"presence_penalty": 0.5}, {"repetition_penalty": 1.1}, {"min_tokens": 2}, {"max_tokens": 1}],
)
def test_who_gets_no_drafts(params: dict[str, Any]) -> None:
    rig = run(Guesses(1000), **params)
    assert rig.scheduler.counters.draft_tokens == 0


def test_nobody_gets_drafts_while_somebody_waits_or_prefills() -> None:
    rig = Rig(speculation=Guesses(1000), max_num_seqs=2, max_num_batched_tokens=4)
    rig.add("a", PROMPT, max_tokens=40)
    rig.step()
    rig.add("b", tuple(range(30)), max_tokens=2)
    rig.add("c", PROMPT, max_tokens=2)
    while rig.scheduler.num_waiting or rig.scheduler.num_running > 1:
        plan = rig.step()
        assert plan is None or not any(chunk.num_drafts for chunk in plan.chunks) or not rig.scheduler.num_waiting
    rig.run()
    assert rig.scheduler.counters.accepted_draft_tokens > 0


def test_drafts_under_a_mask_are_those_that_it_allows() -> None:
    plain, guessed = run(None, FakeWatcher(masks=(1, 1))), run(Guesses(1000), FakeWatcher(masks=(1, 1)))
    assert [event.token_ids for event in guessed.told(Finished)] == [event.token_ids for event in plain.told(Finished)]
    assert guessed.scheduler.counters.accepted_draft_tokens > 5
    masks = [mask.draw for plan in guessed.runner.plans for mask in plan.masks]
    assert max(masks) > 0 and guessed.scheduler.counters.rejected_tokens == 0


class Blind(FakeWatcher):
    """Cannot look ahead."""

    def masks_behind(self, token_ids: Sequence[int]) -> Sequence[bytes | None]:
        raise WatcherError("too deep")


def test_a_watcher_that_cannot_look_ahead_gets_no_drafts_and_goes_on() -> None:
    plain, blind = run(None, FakeWatcher(masks=(1, 1))), run(Guesses(1000), Blind(masks=(1, 1)))
    assert [event.token_ids for event in blind.told(Finished)] == [event.token_ids for event in plain.told(Finished)]
    assert blind.scheduler.counters.draft_tokens == 0


def test_where_nothing_stood_before_the_grammar_guesses() -> None:
    """The fake grammar's forced token is the least of those that it allows, which the fake model rarely draws."""
    rig = run(Speculation(SpeculationConfig(), HAND), FakeWatcher(masks=(1, 1)))
    assert rig.told(Finished)[0].token_ids == run(None, FakeWatcher(masks=(1, 1))).told(Finished)[0].token_ids
    assert rig.scheduler.counters.draft_tokens > 0


@pytest.mark.parametrize(
    ("costs", "num_decoding", "count"),
    [
        (HAND, 1, 8),  # 10.05 ms a step, 0.05 ms more for each draft
        (HAND, 4, 15),  # 16 draws are the limit of this call
        (replace(HAND, token_s=0.01), 1, 8),  # 20 ms and 10 ms: as much as it is worth
        (replace(HAND, token_s=0.02), 1, 0),  # 30 ms and 20 ms
        (replace(HAND, floor_s=0.1, token_s=0.02), 4, 3),  # three hide behind the floor, or nearly
        (HAND, 0, 0),
    ],
)
def test_drafts_are_computed_where_they_pay(costs: CostModel, num_decoding: int, count: int) -> None:
    speculation = Speculation(SpeculationConfig(), costs)
    assert speculation.room(num_decoding, 100 * num_decoding, 16 if num_decoding < 4 else 15) == count


@pytest.mark.parametrize(
    ("value", "config"),
    [
        (None, None),
        ('{"method": "ngram"}', SpeculationConfig()),
        (
            {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 3, "prompt_lookup_min": 1},
            SpeculationConfig(5, 3, 1),
        ),
    ],
)
def test_options_have_the_names_of_vllm(value: Any, config: SpeculationConfig | None) -> None:
    assert read_speculation(value) == config


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("ngram", "expected JSON"),
        ("[]", "expected JSON"),
        ("{}", "method 'ngram'"),
        ({"method": "eagle"}, "method 'ngram'"),
        ({"method": "ngram", "model": "x"}, "model: expected only num_speculative_tokens"),
        ({"method": "ngram", "num_speculative_tokens": 0}, "max_tokens=0: expected an integer of 1 or more"),
        ({"method": "ngram", "prompt_lookup_max": True}, "longest=True"),
        ({"method": "ngram", "prompt_lookup_min": 9}, "shortest=9: expected at most longest=4"),
    ],
)
def test_options_that_are_not_understood(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_speculation(value)
