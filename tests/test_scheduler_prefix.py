"""The prefix cache: what is found, by whom, and what it saves."""

import pytest

from jaxcept.scheduler.events import Finished, PromptLogprobs
from jaxcept.scheduler.prefix import block_digest, root_digest
from tests.fakes import Rig

PROMPT = tuple(range(10, 22))  # three blocks of four


def test_digests_are_the_same_in_every_process():
    first = block_digest(root_digest(""), (1, 2, 3, 4))
    assert first.hex() == "e20c9d46c307990d0ea9ecbbe6a4463b"
    assert block_digest(first, (1, 2, 3, 4)) != first
    assert block_digest(root_digest("tenant"), (1, 2, 3, 4)) != first
    assert block_digest(root_digest(""), (1, 2, 4, 3)) != first


def test_a_prompt_seen_before_is_computed_from_its_last_block_on():
    rig = Rig()
    rig.add("first", PROMPT, max_tokens=1)
    rig.run()
    rig.add("second", PROMPT, max_tokens=1)
    plan = rig.step()
    assert [(chunk.start, chunk.token_ids) for chunk in plan.chunks] == [(8, PROMPT[8:])]
    assert [event.num_cached for event in rig.told(Finished)] == [0, 8]
    assert (rig.scheduler.counters.cache_query_tokens, rig.scheduler.counters.cache_hit_tokens) == (24, 8)


def test_a_longer_prompt_finds_all_of_a_shorter_one():
    rig = Rig()
    rig.add("first", PROMPT, max_tokens=1)
    rig.run()
    rig.add("second", (*PROMPT, 99), max_tokens=1)
    assert rig.step().chunks[0].start == 12


def test_generated_tokens_are_found_by_the_next_turn():
    rig = Rig()
    rig.add("first", PROMPT, max_tokens=6)
    rig.run()
    ids = rig.told(Finished)[0].token_ids
    assert len(ids) == 18  # the KV of 17 tokens was computed: four full blocks
    rig.add("second", (*ids, 5), max_tokens=1)
    assert rig.step().chunks[0].start == 16


@pytest.mark.parametrize("depth", [0, 1])
def test_blocks_that_the_same_step_computes_are_not_found(depth: int):
    rig = Rig(depth=depth, max_num_batched_tokens=64)
    rig.add("first", PROMPT, max_tokens=1)
    rig.add("second", PROMPT, max_tokens=1)
    assert [chunk.start for chunk in rig.step().chunks] == [0, 0]


def test_a_prompt_is_found_as_soon_as_a_submitted_step_computes_it():
    rig = Rig(depth=1)
    rig.add("first", (*PROMPT, 98), max_tokens=9)
    rig.step()
    rig.add("second", (*PROMPT, 99), max_tokens=1)
    plan = rig.step()
    assert plan.decodes.positions == (13,) and plan.chunks[0].start == 12


def test_salts_keep_tenants_apart():
    rig = Rig()
    for name, salt in (("a", "red"), ("b", "blue"), ("c", "red")):
        rig.add(name, PROMPT, max_tokens=1, cache_salt=salt)
        rig.run()
    assert [event.num_cached for event in rig.told(Finished)] == [0, 0, 8]


def test_without_the_cache_nothing_is_found():
    rig = Rig(enable_prefix_caching=False)
    for name in ("a", "b"):
        rig.add(name, PROMPT, max_tokens=1)
        rig.run()
    assert [event.num_cached for event in rig.told(Finished)] == [0, 0]
    assert rig.scheduler.counters.cache_query_tokens == 0


def test_prompt_logprobs_need_every_position():
    rig = Rig(max_num_batched_tokens=5)
    rig.add("first", PROMPT, max_tokens=1)
    rig.run()
    rig.add("second", PROMPT, max_tokens=1, prompt_logprobs=2)
    rig.run()
    assert rig.told(Finished)[1].num_cached == 0
    (event,) = rig.told(PromptLogprobs)
    assert [entry.rank - 1 for entry in event.entries] == list(PROMPT[1:])


def test_the_least_recently_used_context_is_evicted_first():
    rig = Rig(num_blocks=9, block_size=4)
    for name, first in (("a", 0), ("b", 100), ("a again", 0), ("c", 200), ("a once more", 0), ("b again", 100)):
        rig.add(name, tuple(range(first, first + 13)), max_tokens=1)
        rig.run()
    cached = {event.request_id: event.num_cached for event in rig.told(Finished)}
    assert cached == {"a": 0, "b": 0, "a again": 12, "c": 0, "a once more": 12, "b again": 8}  # b lost its tail
