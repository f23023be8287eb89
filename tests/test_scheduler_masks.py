"""Sequences of which not any token may come next: drawn under a mask, waited for, or taken back and drawn again."""

from __future__ import annotations

import pytest

from jaxcept.scheduler.events import Finished, FinishReason, Tokens
from jaxcept.scheduler.watcher import REJECT
from tests.fakes import FakeWatcher, Rig, allowed_after, next_masked, scripted

PROMPT = (5, 7, 11)


def expected(prompt, count, masks, seed=0):
    """The ids of a sequence that waits for every token before it draws the next."""
    ids, last = list(prompt), None
    for _ in range(count):
        last = next_masked(ids, seed, allowed_after(last, masks))
        ids.append(last)
    return tuple(ids)


def add(rig, name, masks, **params):
    """A request under masks; its watcher and the seed of its draws."""
    watcher = FakeWatcher(masks=masks)
    seq_id = rig.add(name, PROMPT, watcher=lambda _: watcher, **{"max_tokens": 12} | params)
    return watcher, rig.scheduler.sequences[seq_id].seed


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_mask_from_the_first_token_on_is_in_every_plan_that_draws(depth):
    rig = Rig(depth=depth)
    watcher, seed = add(rig, "a", (1, 1))
    rig.run()
    assert rig.told(Finished)[0].token_ids == expected(PROMPT, 12, (1, 1), seed)
    plans = [plan for plan in rig.runner.plans if plan.sampling_seq_ids]
    assert len(plans) == 12 and all(len(plan.masks) == 1 for plan in plans)
    assert watcher.rejected == 0 and rig.scheduler.counters.stale_tokens == 0


def test_without_masks_plans_hold_none_and_the_pipeline_stays_full():
    rig = Rig(depth=1)
    watcher, _ = add(rig, "a", None)
    rig.run()
    assert all(plan.masks == () for plan in rig.runner.plans) and len(watcher.pushed) == 12


@pytest.mark.parametrize("depth", [1, 2])
def test_a_batch_with_a_masked_sequence_is_never_split_in_two_that_take_turns(depth):
    rig = Rig(depth=depth)
    add(rig, "masked", (1, 1))
    for name in "abc":
        rig.add(name, PROMPT, max_tokens=12)
    rig.run()
    batches = [len(plan.decodes.rows) for plan in rig.runner.plans if plan.decodes.rows]
    assert batches == [4] * 11, "every decode step holds all four sequences"


@pytest.mark.parametrize("depth", [1, 2])
def test_a_token_in_flight_that_the_mask_forbids_is_drawn_again_and_nobody_hears_of_it(depth):
    masks = (3, 0)
    rig = Rig(depth=depth)
    watcher, seed = add(rig, "a", masks, logprobs=1, max_tokens=40)
    rig.run()
    finished = rig.told(Finished)[0]
    assert finished.token_ids == expected(PROMPT, 40, masks, seed) and finished.reason is FinishReason.LENGTH
    streamed = [token_id for event in rig.told(Tokens) for token_id in event.token_ids]
    assert tuple(streamed) == finished.token_ids[3:] and watcher.pushed == streamed
    assert [entry.rank - 1 for event in rig.told(Tokens) for entry in event.logprobs.values()] == streamed
    counters = rig.scheduler.counters
    assert counters.rejected_tokens == watcher.rejected > 3
    assert counters.generated_tokens == 40 and counters.recomputed_tokens == watcher.rejected
    assert finished.num_preemptions == 0


def test_a_rejected_token_is_in_no_block_that_others_find():
    masks = (2, 0)
    first, second = Rig(depth=1, block_size=1, num_blocks=60), Rig(depth=0, block_size=1, num_blocks=60)
    for rig in (first, second):
        add(rig, "a", masks, max_tokens=30, seed=1)
        rig.run()
        whole = rig.told(Finished)[0].token_ids
        rig.add("b", whole, max_tokens=4, seed=2)
        rig.run()
    assert first.scheduler.counters.rejected_tokens and not second.scheduler.counters.rejected_tokens
    ends = [[event.token_ids for event in rig.told(Finished)] for rig in (first, second)]
    assert ends[0] == ends[1]
    assert first.told(Finished)[1].num_cached == second.told(Finished)[1].num_cached > 20


def test_a_turn_begins_anew_after_a_return():
    rig = Rig(depth=1)
    watcher, seed = FakeWatcher(masks=(1, 1)), None
    seq_id = rig.add("a", PROMPT, scripted(4), watcher=lambda _: watcher, max_tokens=9)
    seed = rig.scheduler.sequences[seq_id].seed
    rig.run()
    before = expected(PROMPT, 4, (1, 1), seed)
    rig.engine.resume(seq_id, (1, 2))
    rig.run()
    assert rig.told(Finished)[0].token_ids == expected((*before, 1, 2), 5, (1, 1), seed)


class Stubborn(FakeWatcher):
    """Rejects everything, whatever its mask says."""

    def push(self, token_id):
        super().push(token_id)
        return REJECT


def test_a_watcher_that_rejects_what_its_mask_allows_ends_its_own_sequence_alone(caplog):
    rig = Rig(depth=1)
    rig.add("bad", PROMPT, watcher=lambda _: Stubborn(masks=(1, 1)), max_tokens=5)
    rig.add("good", PROMPT, max_tokens=5)
    rig.run()
    assert {event.request_id: event.reason for event in rig.told(Finished)} == {
        "bad": FinishReason.ERROR,
        "good": FinishReason.LENGTH,
    }
    assert "forbids" in caplog.text


class Failing(FakeWatcher):
    """Has no mask to give."""

    def mask(self):
        raise RuntimeError("no mask")


def test_a_watcher_without_a_mask_to_give_ends_its_own_sequence_alone(caplog):
    rig = Rig(depth=1)
    rig.add("bad", PROMPT, watcher=lambda _: Failing(), max_tokens=5)
    rig.add("good", PROMPT, max_tokens=5)
    rig.run()
    assert {event.reason for event in rig.told(Finished) if event.request_id == "bad"} == {FinishReason.ERROR}
    assert rig.scheduler.num_unfinished == 0 and "no mask" in caplog.text
