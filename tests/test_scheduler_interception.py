"""Interceptions by hand: what is kept, what is computed again, who yields, and every way in which one ends."""

from collections.abc import Sequence

import pytest

from jaxcept.scheduler.events import Finished, Intercepted, Resumed, Returned, Tokens
from jaxcept.scheduler.interception import Outcome, Residency
from jaxcept.scheduler.params import InterceptParams, OnToolFailure
from jaxcept.scheduler.plan import ChunkKind
from jaxcept.scheduler.policies.catalog import make_policy
from jaxcept.scheduler.policies.discard import Discard
from jaxcept.scheduler.policies.preserve import Preserve
from jaxcept.scheduler.policy import BatchView, InterceptedView, Placement
from jaxcept.scheduler.request import Request
from jaxcept.scheduler.scheduler import StateError
from tests.costs import HAND
from tests.fakes import FakeWatcher, Rig, next_token, scripted

PROMPT = tuple(range(10, 16))
ANSWER = (100, 101, 102)


class Recorder(Preserve):
    """Keeps `keep` blocks and remembers what it was shown."""

    def __init__(self, keep: int) -> None:
        super().__init__()
        self.keep = keep
        self.views: list[InterceptedView] = []
        self.batches: list[BatchView] = []

    def place(self, intercepted: Sequence[InterceptedView], batch: BatchView) -> Sequence[Placement]:
        self.views += intercepted
        self.batches.append(batch)
        return [Placement(self.keep) for _ in intercepted]


def until_intercepted(rig: Rig, count: int = 1) -> Intercepted:
    """Steps until this many interceptions have begun; the last one."""
    while len(rig.told(Intercepted)) < count:
        rig.step()
    return rig.told(Intercepted)[-1]


def test_a_preserved_context_goes_on_with_the_returned_tokens_alone():
    rig = Rig(depth=1)
    seq = rig.add("r", PROMPT, scripted(2), max_tokens=5)
    event = until_intercepted(rig)
    assert (event.seq_id, event.request_id, event.tool, event.interception) == (seq, "r", "scripted", 0)
    rig.step()
    assert rig.scheduler.num_intercepted == 1 and rig.scheduler.num_held_blocks == 2
    rig.engine.resume(seq, ANSWER)
    plan = rig.step()
    (chunk,) = plan.chunks
    # With a script the engine knows that the trigger comes: nothing ran ahead, so its own KV is still to be computed.
    assert (chunk.kind, chunk.start, chunk.token_ids[1:]) == (ChunkKind.RETURNED, 7, ANSWER)
    assert plan.rows[0].output_spans == ((6, 8),) and plan.rows[0].num_prompt == 6
    assert plan.tables[0].block_ids == (0, 1, 2)
    rig.run()
    (end,) = rig.told(Finished)
    (record,) = end.interceptions
    assert (record.residency, record.num_recomputed, record.num_returned) == (Residency.PRESERVED, 0, 3)
    assert (record.context_tokens, record.outcome, record.num_cached_on_return) == (8, Outcome.RETURNED, 0)
    assert end.output_spans == ((6, 8), (11, 14)) and end.num_returned == 3 and end.num_generated == 5
    assert rig.told(Resumed)[0].interception == record and rig.told(Returned)[0].num_returned == 3
    assert end.timing.intercepted_s == record.duration_s > 0


def test_a_discarded_context_is_computed_again():
    rig = Rig(Discard(), enable_prefix_caching=False)
    seq = rig.add("r", PROMPT, scripted(2), max_tokens=5)
    until_intercepted(rig)
    rig.step()
    assert rig.scheduler.num_held_blocks == 0
    rig.engine.resume(seq, ANSWER)
    (chunk,) = rig.step().chunks
    assert (chunk.kind, chunk.start, len(chunk.token_ids), chunk.num_recomputed) == (ChunkKind.RECOMPUTE, 0, 11, 7)
    rig.run()
    (record,) = rig.told(Finished)[0].interceptions
    assert (record.residency, record.num_recomputed) == (Residency.DISCARDED, 7)
    counters = rig.scheduler.counters
    # 7 tokens before the trigger, of which one was decoded; then 7 again; then the trigger and 3 returned ones.
    assert (counters.prefill_tokens, counters.recomputed_tokens, counters.returned_tokens) == (6, 7, 4)


def test_the_prefix_cache_saves_what_was_discarded_and_not_evicted():
    rig = Rig(Discard())
    seq = rig.add("r", PROMPT, scripted(3), max_tokens=5)
    until_intercepted(rig)
    rig.step()
    rig.engine.resume("r", ANSWER)
    (chunk,) = rig.step().chunks
    assert (chunk.start, chunk.num_recomputed) == (8, 0)
    rig.run()
    (record,) = rig.told(Finished)[0].interceptions
    assert (record.residency, record.num_recomputed, record.num_cached_on_return) == (Residency.CACHED, 0, 8)
    assert seq == rig.told(Finished)[0].seq_id


def test_a_policy_may_keep_the_head_and_drop_the_tail():
    policy = Recorder(keep=1)
    rig = Rig(policy, enable_prefix_caching=False)
    rig.add("other", (1, 2), max_tokens=20)
    seq = rig.add("r", PROMPT, scripted(4), max_tokens=6)
    until_intercepted(rig)
    rig.step()
    view, batch = policy.views[0], policy.batches[0]
    assert (view.seq_id, view.tool, view.num_tokens, view.num_computed) == (seq, "scripted", 10, 9)
    assert (view.num_blocks, view.num_exclusive_blocks, view.elapsed) == (3, 3, 1.0)
    assert (batch.num_running, batch.running_tokens, batch.num_waiting) == (1, 5, 0)
    assert (batch.num_blocks, batch.block_size, batch.num_available_blocks) == (32, 4, 32 - 3 - 2)
    rig.engine.resume("r", ())
    chunk = rig.step().chunks[0]
    assert (chunk.start, chunk.num_recomputed, len(chunk.token_ids)) == (4, 5, 6)
    rig.run()
    (record,) = next(event for event in rig.told(Finished) if event.seq_id == seq).interceptions
    assert (record.residency, record.num_recomputed) == (Residency.MIXED, 5)


def test_an_answer_that_comes_before_the_stale_step_is_collected():
    """The trigger is a token id: step k + 1 computes its KV and draws a token that nobody wants."""
    token = next_token(PROMPT, Request("r", PROMPT).seed(0))
    rig = Rig(depth=1)
    seq = rig.add("r", PROMPT, InterceptParams(token_ids=(token,)), max_tokens=4)
    event = until_intercepted(rig)
    assert event.tool == f"token:{token}" and rig.engine.num_in_flight == 1
    rig.engine.resume(seq, ANSWER)
    plan = rig.step()
    assert (plan.chunks[0].start, plan.chunks[0].token_ids) == (7, ANSWER), "the trigger's KV counts as computed"
    rig.run()
    (end,) = rig.told(Finished)
    assert end.token_ids[:10] == (*PROMPT, token, *ANSWER) and end.num_generated == 4
    assert rig.scheduler.counters.stale_tokens == 1
    assert sum(len(event.token_ids) for event in rig.told(Tokens)) == 4


def test_no_ids_at_all_just_go_on():
    token = next_token(PROMPT, Request("r", PROMPT).seed(0))
    rig = Rig(depth=1)
    rig.add("r", PROMPT, InterceptParams(token_ids=(token,)), max_tokens=4)
    until_intercepted(rig)
    rig.engine.resume("r", [])
    assert rig.step().chunks[0].token_ids == (token,)
    rig.run()
    (end,) = rig.told(Finished)
    assert end.interceptions[0].residency is Residency.PRESERVED and end.interceptions[0].num_recomputed == 1


def test_who_returns_queues_by_the_original_arrival():
    rig = Rig(Discard(), max_num_seqs=1)
    first = rig.add("first", PROMPT, scripted(1), max_tokens=2)
    second = rig.add("second", PROMPT, scripted(1), max_tokens=2)
    third = rig.add("third", PROMPT, max_tokens=9)
    until_intercepted(rig, 2)
    rig.engine.resume(second, ANSWER)
    rig.engine.resume(first, ANSWER)
    rig.run()
    assert [event.seq_id for event in rig.told(Finished)] == [first, second, third]


@pytest.mark.parametrize(
    ("policy", "head_start_s", "order"),
    [
        ("discard-ordered", None, ["busy", "old", "new"]),
        ("discard-ordered", 6.0, ["busy", "old", "new"]),
        ("discard-ordered", 4.0, ["busy", "new", "old"]),
        ("discard-ordered", 0.0, ["busy", "new", "old"]),
        ("prefix-lru", 60.0, ["busy", "new", "old"]),  # whose returns are newcomers, whatever the configuration says
    ],
)
def test_a_return_is_ahead_of_newcomers_by_its_head_start_at_most(
    policy: str, head_start_s: float | None, order: list[str]
):
    rig = Rig(make_policy(policy, HAND), max_num_seqs=1, return_head_start_s=head_start_s)
    old = rig.add("old", PROMPT, scripted(1), max_tokens=2)
    until_intercepted(rig)
    rig.add("busy", PROMPT, max_tokens=9)
    rig.step()
    rig.clock.advance(100.0)
    rig.add("new", PROMPT, max_tokens=2)
    rig.clock.advance(5.0)
    rig.engine.resume(old, ANSWER)
    rig.run()
    assert [event.request_id for event in rig.told(Finished)] == order


@pytest.mark.parametrize("policy", ["preserve", "min-waste", "swap"])
def test_a_context_that_waits_behind_the_queues_head_gives_it_its_blocks(policy: str):
    """Else its blocks are nobody's while others run: the pool fills with such contexts, and one sequence runs."""
    rig = Rig(make_policy(policy, HAND), num_blocks=8, return_head_start_s=0.0)
    busy = rig.add("busy", PROMPT, max_tokens=12)
    old = rig.add("old", tuple(range(1, 17)), scripted(1), max_tokens=2)
    until_intercepted(rig)
    rig.clock.advance(1.0)
    new = rig.add("new", tuple(range(101, 113)), max_tokens=2)
    rig.clock.advance(1.0)
    rig.engine.resume(old, ANSWER)
    plan = rig.step()
    assert plan is not None and [chunk.seq_id for chunk in plan.chunks] == [new] and plan.decodes.seq_ids == (busy,)
    rig.run()
    assert [event.request_id for event in rig.told(Finished)] == ["new", "busy", "old"]
    assert rig.scheduler.counters.preemptions == 0


@pytest.mark.parametrize("depth", [0, 1])
def test_a_timeout_tells_the_model(depth: int):
    rig = Rig(depth=depth)
    rig.add("r", PROMPT, scripted(1, timeout_s=5.0, failure_ids=(7, 8)), max_tokens=3)
    event = until_intercepted(rig)
    rig.run()
    assert rig.engine.next_deadline() == event.at + 5.0 and not rig.engine.has_work
    rig.clock.advance_to(event.at + 5.0)
    rig.step()
    rig.run()
    (end,) = rig.told(Finished)
    assert end.token_ids[7:9] == (7, 8) and end.reason == "length"
    record = end.interceptions[0]
    assert (record.outcome, record.duration_s) == (Outcome.TIMEOUT, 5.0)
    assert rig.told(Returned)[0].outcome is Outcome.TIMEOUT
    with pytest.raises(StateError, match=r"finished \(length\)"):
        rig.engine.resume("r", ANSWER)


def test_a_timeout_fails_the_sequence():
    rig = Rig()
    rig.add("r", PROMPT, scripted(1, timeout_s=5.0, on_failure=OnToolFailure.FAIL), max_tokens=3)
    until_intercepted(rig)
    rig.clock.advance(5.0)
    rig.step()
    (end,) = rig.told(Finished)
    assert end.reason == "tool_timeout" and end.interceptions[0].outcome is Outcome.TIMEOUT
    assert rig.scheduler.num_held_blocks == 0 and rig.engine.next_deadline() is None


def test_a_failure_tells_the_model_what_the_caller_says():
    rig = Rig()
    seq = rig.add("r", PROMPT, scripted(1, failure_ids=(7, 8)), max_tokens=3)
    until_intercepted(rig)
    rig.engine.fail(seq, (50,))
    rig.run()
    (end,) = rig.told(Finished)
    assert end.token_ids[7:8] == (50,) and end.interceptions[0].outcome is Outcome.FAILED


def test_a_failure_may_end_the_sequence():
    rig = Rig()
    rig.add("r", PROMPT, scripted(1, on_failure=OnToolFailure.FAIL), max_tokens=3)
    until_intercepted(rig)
    rig.engine.fail("r", (50,))
    rig.run()
    assert rig.told(Finished)[0].reason == "tool_failed"


def test_failure_ids_that_do_not_fit_end_the_sequence():
    rig = Rig()
    rig.add("r", PROMPT, scripted(1, failure_ids=(7,) * 9, max_returned_tokens=8), max_tokens=3)
    until_intercepted(rig)
    rig.engine.fail("r")
    rig.run()
    (end,) = rig.told(Finished)
    assert end.reason == "length" and end.num_returned == 0


def test_more_interceptions_than_allowed_end_the_sequence():
    rig = Rig()
    rig.add("r", PROMPT, scripted(1, 1, max_interceptions=1), max_tokens=9)
    until_intercepted(rig)
    rig.engine.resume("r", ANSWER)
    rig.run()
    (end,) = rig.told(Finished)
    assert end.reason == "tool_limit" and len(end.interceptions) == 1


def test_returned_ids_are_bounded_by_the_request_and_by_the_model():
    rig = Rig(max_model_len=16)
    rig.add("r", PROMPT, scripted(1, 1, max_returned_tokens=5), max_tokens=9)
    until_intercepted(rig)
    assert rig.engine.room("r") == 5
    with pytest.raises(ValueError, match="token_ids has 6 ids: expected at most 5"):
        rig.engine.resume("r", (1,) * 6)
    rig.engine.resume("r", (1,) * 3)
    until_intercepted(rig, 2)
    assert rig.engine.room("r") == 2
    with pytest.raises(ValueError, match="max_returned_tokens=5"):
        rig.engine.resume("r", (1,) * 3)
    with pytest.raises(ValueError, match="id 251: expected 0 to 250"):
        rig.engine.resume("r", (251,))
    rig.engine.resume("r", (1, 1))
    rig.run()
    (end,) = rig.told(Finished)
    assert end.reason == "length" and len(end.token_ids) == 16


def test_an_answer_after_max_tokens_ends_the_sequence():
    rig = Rig()
    rig.add("r", PROMPT, scripted(2), max_tokens=2)
    until_intercepted(rig)
    rig.engine.resume("r", ANSWER)
    rig.run()
    (end,) = rig.told(Finished)
    assert end.reason == "length" and end.num_generated == 2 and end.token_ids[-3:] == ANSWER


def test_resuming_what_is_not_intercepted_says_in_which_state_it_is():
    rig = Rig(max_num_seqs=1)
    running = rig.add("running", PROMPT, max_tokens=5)
    rig.add("waiting", PROMPT, max_tokens=5)
    rig.step()
    with pytest.raises(StateError, match=f"sequence {running} is running"):
        rig.engine.resume(running, ANSWER)
    with pytest.raises(StateError, match="is waiting"):
        rig.engine.resume("waiting", ANSWER)
    with pytest.raises(StateError, match="'nobody' is unknown"):
        rig.engine.resume("nobody", ANSWER)
    rig.engine.abort("running")
    with pytest.raises(StateError, match=r"finished \(abort\)"):
        rig.engine.fail(running)


def test_a_late_answer_is_not_taken_for_the_next_one():
    rig = Rig()
    seq = rig.add("r", PROMPT, scripted(1, 1, timeout_s=2.0), max_tokens=9)
    first = until_intercepted(rig)
    rig.clock.advance(2.0)
    second = until_intercepted(rig, 2)
    with pytest.raises(StateError, match="at interception 1: 0 is over"):
        rig.engine.resume(seq, ANSWER, interception=first.interception)
    rig.engine.resume(seq, ANSWER, interception=second.interception)
    rig.run()
    assert [record.outcome for record in rig.told(Finished)[0].interceptions] == ["timeout", "returned"]


def test_several_intercepted_completions_are_told_apart_by_seq_id():
    rig = Rig()
    first = rig.add("r", PROMPT, scripted(1), max_tokens=2, n=2)
    until_intercepted(rig, 2)
    with pytest.raises(StateError, match="name it by its seq_id"):
        rig.engine.resume("r", ANSWER)
    rig.engine.resume(first + 1, ANSWER)
    rig.engine.resume("r", ANSWER)
    rig.run()
    assert len(rig.told(Finished)) == 2


@pytest.mark.parametrize("moment", ["waiting", "running", "intercepted", "returned", "stale"])
def test_an_abort_at_any_moment_leaves_nothing_behind(moment: str):
    watcher = FakeWatcher()
    rig = Rig(depth=1)
    token = next_token(PROMPT, Request("r", PROMPT).seed(0))
    trigger = InterceptParams(token_ids=(token,)) if moment == "stale" else scripted(2)
    rig.add("r", PROMPT, trigger, max_tokens=5, watcher=lambda _: watcher)
    if moment == "running":
        rig.step()
    elif moment != "waiting":
        until_intercepted(rig)
    if moment == "returned":
        rig.engine.resume("r", ANSWER)
    assert rig.engine.abort("r") and not rig.engine.abort("r")
    assert rig.scheduler.num_held_blocks == 0
    rig.run()
    (end,) = rig.told(Finished)
    assert end.reason == "abort" and watcher.finished == 1
    assert end.num_generated == sum(len(event.token_ids) for event in rig.told(Tokens))
    outcome = {"intercepted": ["aborted"], "returned": ["returned"], "stale": ["aborted"]}.get(moment, [])
    assert [record.outcome for record in end.interceptions] == outcome


def test_a_later_intercepted_context_yields_before_an_earlier_running_one_is_preempted():
    rig = Rig(num_blocks=7, block_size=4, enable_prefix_caching=False)
    rig.add("early", range(7), max_tokens=9)
    rig.add("later", range(30, 37), max_tokens=4)
    late = rig.add("late", range(50, 58), scripted(1), max_tokens=5)
    until_intercepted(rig)
    assert rig.scheduler.num_held_blocks == 6
    while rig.scheduler.counters.generated_tokens < 10:
        rig.step()
    assert rig.scheduler.counters.preemptions == 0 and rig.scheduler.num_running == 1
    rig.engine.resume(late, ())
    rig.run()
    assert rig.scheduler.counters.preemptions == 0
    (record,) = next(event for event in rig.told(Finished) if event.seq_id == late).interceptions
    assert (record.residency, record.num_recomputed) == (Residency.MIXED, 4)


def test_the_only_one_that_runs_takes_from_an_earlier_idle_context_rather_than_yield_itself():
    rig = Rig(num_blocks=5, block_size=4, enable_prefix_caching=False)
    early = rig.add("early", range(12), scripted(1), max_tokens=5)
    until_intercepted(rig)
    rig.add("late", range(50, 57), max_tokens=4)
    rig.run()
    assert rig.scheduler.counters.preemptions == 0 and rig.scheduler.num_held_blocks == 2
    rig.engine.resume(early, ())
    rig.run()
    (record,) = rig.told(Finished)[1].interceptions
    assert (record.residency, record.num_recomputed) == (Residency.MIXED, 4)


def test_an_idle_context_yields_to_one_that_waits_where_nothing_runs():
    rig = Rig(num_blocks=4, block_size=4)
    held = rig.add("held", range(12), scripted(1), max_tokens=5)
    until_intercepted(rig)
    other = rig.add("other", range(50, 60), max_tokens=2)
    rig.run()
    assert [event.seq_id for event in rig.told(Finished)] == [other]
    rig.engine.resume(held, ())
    rig.run()
    (record,) = rig.told(Finished)[1].interceptions
    assert record.residency is not Residency.PRESERVED


def test_a_context_waits_for_those_that_run_and_takes_nothing_from_idle_ones_meanwhile():
    rig = Rig(num_blocks=8, block_size=4)
    rig.add("held", range(12), scripted(1), max_tokens=5)
    until_intercepted(rig)
    rig.add("running", range(100, 107), max_tokens=5)
    rig.step()
    rig.add("waiting", range(200, 212), max_tokens=2)
    rig.step()
    assert (rig.scheduler.num_running, rig.scheduler.num_waiting) == (1, 1)
    assert rig.scheduler.num_idle_blocks == 3
    rig.run()
    assert len(rig.told(Finished)) == 2


def test_a_watcher_intercepts_with_its_payload_and_sees_every_token_once():
    token = next_token(PROMPT, Request("r", PROMPT).seed(0))
    watcher = FakeWatcher(calls=frozenset([token]))
    rig = Rig(depth=1)
    rig.add("r", PROMPT, max_tokens=3, watcher=lambda _: watcher)
    event = until_intercepted(rig)
    assert (event.tool, event.payload) == ("lookup", {"id": token})
    rig.engine.resume("r", ANSWER)
    rig.run()
    end = rig.told(Finished)[0]
    assert watcher.pushed == [token, *end.token_ids[10:]] and watcher.given == [ANSWER] and watcher.finished == 1


def test_a_watcher_that_raises_ends_its_own_sequence_alone(caplog: pytest.LogCaptureFixture):
    token = next_token(PROMPT, Request("bad", PROMPT).seed(0))
    rig = Rig()
    rig.add("bad", PROMPT, max_tokens=3, watcher=lambda _: FakeWatcher(raises_on=frozenset([token])))
    rig.add("good", PROMPT, max_tokens=3, watcher=lambda _: FakeWatcher())
    rig.run()
    assert {event.request_id: event.reason for event in rig.told(Finished)} == {"bad": "error", "good": "length"}
    assert "(bad) failed" in caplog.text
