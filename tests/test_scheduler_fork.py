"""Completions of one prompt share its blocks and never write into each other's."""

import pytest

from jaxcept.scheduler.events import Finished, PromptLogprobs
from jaxcept.scheduler.plan import BlockMove, MoveKind
from jaxcept.scheduler.policies.discard import Discard
from jaxcept.scheduler.request import Request
from tests.fakes import Rig, next_token, scripted


def completions(rig: Rig) -> list[tuple[int, ...]]:
    """The generated ids, in order of the index."""
    ends = sorted(rig.told(Finished), key=lambda event: event.index)
    return [event.token_ids[event.num_prompt :] for event in ends]


def expected(prompt: tuple[int, ...], index: int, count: int, **params: int) -> tuple[int, ...]:
    """What the fake model generates."""
    seed = Request("r", prompt, **params).seed(index)
    ids = list(prompt)
    for _ in range(count):
        ids.append(next_token(ids, seed))
    return tuple(ids[len(prompt) :])


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("caching", [False, True])
def test_the_first_computes_the_prompt_and_the_others_its_last_token(depth: int, caching: bool):
    prompt = tuple(range(6))
    rig = Rig(depth=depth, enable_prefix_caching=caching)
    rig.add("r", prompt, n=3, max_tokens=4)
    first, second = rig.step(), rig.step()
    assert [(chunk.seq_id, chunk.start, len(chunk.token_ids)) for chunk in first.chunks] == [(0, 0, 6)]
    assert [(chunk.seq_id, chunk.start, chunk.token_ids) for chunk in second.chunks] == [(1, 5, (5,)), (2, 5, (5,))]
    # Block 0 is full and shared; block 1 is partly filled: each takes a copy of it.
    assert second.moves == (BlockMove(MoveKind.COPY, 1, 2), BlockMove(MoveKind.COPY, 1, 3))
    assert [table.block_ids for table in second.tables if table.offset == 0] == [(0, 2), (0, 3)]
    rig.run()
    assert completions(rig) == [expected(prompt, index, 4) for index in range(3)]
    assert rig.scheduler.counters.prefill_tokens == 8


def test_where_the_last_token_begins_a_block_nothing_is_copied():
    prompt = tuple(range(5))
    rig = Rig()
    rig.add("r", prompt, n=2, max_tokens=3)
    rig.step()
    second = rig.step()
    assert not second.moves and second.chunks[0].start == 4
    rig.run()
    assert completions(rig) == [expected(prompt, index, 3) for index in range(2)]


def test_a_full_last_block_is_copied_though_it_is_in_the_prefix_cache():
    prompt = tuple(range(8))
    rig = Rig()
    rig.add("r", prompt, n=2, max_tokens=3)
    rig.step()
    second = rig.step()
    assert second.moves == (BlockMove(MoveKind.COPY, 1, 3),) and second.chunks[0].start == 7
    rig.run()
    assert completions(rig) == [expected(prompt, index, 3) for index in range(2)]


def test_a_prompt_of_one_token_is_computed_by_each():
    rig = Rig()
    rig.add("r", (9,), n=3, max_tokens=2)
    assert [chunk.token_ids for chunk in rig.step().chunks] == [(9,)] * 3
    rig.run()
    assert completions(rig) == [expected((9,), index, 2) for index in range(3)]


def test_a_sibling_waits_for_a_prompt_in_chunks_and_lets_others_by():
    prompt = tuple(range(10))
    rig = Rig(max_num_batched_tokens=7)
    rig.add("r", prompt, n=2, max_tokens=2)
    rig.add("other", (1, 2), max_tokens=2)
    plans = [rig.step() for _ in range(3)]
    assert [[(chunk.seq_id, len(chunk.token_ids)) for chunk in plan.chunks] for plan in plans] == [
        [(0, 7)],
        [(0, 3), (2, 2)],
        [(1, 1)],
    ]


def test_an_intercepted_sibling_lends_its_prompt():
    rig = Rig(max_num_seqs=1, enable_prefix_caching=False)
    rig.add("r", tuple(range(9)), scripted(1), n=2, max_tokens=2)
    rig.step()
    plan = rig.step()
    assert [(chunk.seq_id, chunk.start) for chunk in plan.chunks] == [(1, 8)]


def test_without_a_sibling_that_holds_it_the_prompt_is_computed_again():
    rig = Rig(Discard(), max_num_seqs=1, enable_prefix_caching=False)
    rig.add("r", tuple(range(9)), scripted(1), n=2, max_tokens=2)
    rig.step()
    plan = rig.step()
    assert [(chunk.seq_id, chunk.start) for chunk in plan.chunks] == [(1, 0)]


def test_seeds_depend_on_the_request_and_the_index_alone():
    request = Request("r", (1,), seed_base=5)
    seeds = [request.seed(index) for index in range(4)]
    assert len(set(seeds)) == 4 and all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [Request("other", (2, 3), seed_base=5).seed(index) for index in range(4)]
    assert seeds[0] != Request("r", (1,), seed_base=6).seed(0)
    assert seeds[0] == 0 or seeds[0].bit_length() <= 63


def test_prompt_logprobs_come_once_for_all_completions():
    prompt = tuple(range(20, 29))
    rig = Rig(max_num_batched_tokens=4)
    rig.add("r", prompt, n=2, max_tokens=2, prompt_logprobs=1)
    rig.run()
    (event,) = rig.told(PromptLogprobs)
    assert [entry.rank - 1 for entry in event.entries] == list(prompt[1:])
