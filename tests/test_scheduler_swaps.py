"""Contexts that leave for the host and come back: each way it can go, on a device of token ids."""

from __future__ import annotations

from collections.abc import Sequence

from jaxcept.scheduler.events import FinishReason, Resumed
from jaxcept.scheduler.interception import Residency
from jaxcept.scheduler.plan import ChunkKind, MoveKind, StepPlan
from jaxcept.scheduler.policies.discard import Discard
from jaxcept.scheduler.policies.preserve import Preserve
from jaxcept.scheduler.policy import BatchView, HostUse, InterceptedView, Placement, Traits
from tests.fakes import Rig, scripted


class Swapping(Preserve):
    """Swaps `count` blocks of every context, within `budget` blocks a step."""

    def __init__(
        self, count: int = 10**6, budget: int | None = None, keep: int | None = None, partial: bool = True
    ) -> None:
        super().__init__()
        self.traits = Traits(swaps_partial_blocks=partial)
        self.count, self.budget, self.keep = count, budget, keep

    def swap_budget(self, batch: BatchView) -> int | None:
        return self.budget

    def place(self, intercepted: Sequence[InterceptedView], batch: BatchView) -> Sequence[Placement]:
        placements = []
        for view in intercepted:
            swap = min(self.count, view.num_blocks)
            kept = view.num_blocks - swap
            placements.append(Placement(kept if self.keep is None else min(kept, self.keep), swap))
        return placements


def make_rig(policy: Preserve | Discard, **config: int | bool) -> Rig:
    return Rig(policy, **{"num_host_blocks": 32, "enable_prefix_caching": False, **config})


def kinds(rig: Rig) -> list[str]:
    """The swaps that were planned, in order."""
    return [move.kind.value for plan in rig.runner.plans for move in plan.moves]


def uninterrupted(prompt: Sequence[int], after: int, returned: Sequence[int], max_tokens: int) -> tuple[int, ...]:
    """What the sequence holds in the end where its context never leaves the device."""
    rig = Rig(Preserve())
    seq_id = rig.add("r", prompt, scripted(after), max_tokens=max_tokens)
    rig.run()
    rig.engine.resume(seq_id, returned)
    rig.run()
    return finished(rig)


def finished(rig: Rig) -> tuple[int, ...]:
    (event,) = [event for event in rig.events if type(event).__name__ == "Finished"]
    return event.token_ids  # type: ignore[attr-defined, no-any-return]


def test_a_swapped_context_comes_back_and_nothing_is_computed_twice():
    rig = make_rig(Swapping())
    seq_id = rig.add("r", range(10), scripted(3), max_tokens=6)
    rig.run()
    assert rig.scheduler.num_held_blocks == 0 and kinds(rig) == ["swap_out"] * 3
    rig.engine.resume(seq_id, [5, 6])
    rig.run()
    assert kinds(rig) == ["swap_out"] * 3 + ["swap_in"] * 3 + ["land"] * 3
    assert rig.scheduler.counters.recomputed_tokens == 0
    (resumed,) = rig.told(Resumed)
    assert resumed.interception.residency is Residency.SWAPPED and resumed.interception.num_swapped == 12
    assert finished(rig) == uninterrupted(range(10), 3, [5, 6], 6)
    assert rig.scheduler.swaps.host.pool.num_available == 32


def test_the_budget_spreads_a_swap_over_steps():
    rig = make_rig(Swapping(budget=1))
    rig.add("busy", [1], max_tokens=20)
    rig.add("r", range(10), scripted(2), max_tokens=4)
    rig.run()
    outs = [sum(move.kind is MoveKind.SWAP_OUT for move in plan.moves) for plan in rig.runner.plans]
    assert max(outs) == 1 and sum(outs) == 3


def test_what_lies_in_front_of_the_host_part_is_recomputed_while_it_comes_back():
    rig = make_rig(Swapping(count=1, keep=0))
    seq_id = rig.add("r", range(10), scripted(3), max_tokens=6)
    rig.run()
    assert rig.scheduler.num_held_blocks == 0
    rig.engine.resume(seq_id, [5, 6])
    rig.run()
    recomputed = [chunk for plan in rig.runner.plans for chunk in plan.chunks if chunk.kind is ChunkKind.RECOMPUTE]
    assert [(chunk.start, len(chunk.token_ids)) for chunk in recomputed] == [(0, 8)]
    (resumed,) = rig.told(Resumed)
    assert resumed.interception.residency is Residency.MIXED
    assert resumed.interception.num_recomputed == 8 and resumed.interception.num_swapped == 4
    assert finished(rig) == uninterrupted(range(10), 3, [5, 6], 6)


def test_what_the_host_has_no_room_for_stays_on_the_device():
    rig = make_rig(Swapping(), num_host_blocks=2)
    seq_id = rig.add("r", range(10), scripted(3), max_tokens=6)
    rig.run()
    assert rig.scheduler.num_held_blocks == 1 and kinds(rig) == ["swap_out"] * 2
    rig.engine.resume(seq_id, [5])
    rig.run()
    assert rig.scheduler.counters.recomputed_tokens == 0
    assert finished(rig) == uninterrupted(range(10), 3, [5], 6)


def test_an_abort_with_copies_in_flight_leaves_nothing_behind():
    for steps in range(1, 7):
        rig = make_rig(Swapping(budget=1))
        rig.runner.swap_delay = 3
        rig.add("busy", [1], max_tokens=30)
        seq_id = rig.add("r", range(10), scripted(2), max_tokens=4)
        for _ in range(8):
            rig.step()
        rig.engine.resume(seq_id, [5])
        for _ in range(steps):
            rig.step()
        rig.engine.abort("r")
        rig.run()
        host = rig.scheduler.swaps.host.pool
        assert host.num_available == host.num_blocks and not rig.scheduler.swaps.loading
        assert rig.scheduler.num_held_blocks == 0


def test_a_tool_may_return_while_its_context_is_halfway_out():
    rig = make_rig(Swapping(budget=1), depth=1)
    rig.runner.swap_delay = 2
    rig.add("busy", [1], max_tokens=30)
    seq_id = rig.add("r", range(14), scripted(2), max_tokens=4)
    while "swap_out" not in kinds(rig):
        rig.step()
    rig.engine.resume(seq_id, [5])
    rig.run()
    assert 0 < kinds(rig).count("swap_out") < 4 and kinds(rig).count("land") == kinds(rig).count("swap_out")
    assert rig.scheduler.counters.recomputed_tokens == 0


def test_a_lost_block_is_recomputed_with_all_that_follows():
    for failures in (1, 2, 3, 5, 7):
        rig = make_rig(Swapping())
        rig.runner.swap_failures = failures
        seq_id = rig.add("r", range(20), scripted(3), max_tokens=6)
        rig.run()
        rig.engine.resume(seq_id, [5, 6])
        rig.run()
        assert rig.scheduler.counters.failed_swaps > 0 and rig.scheduler.counters.recomputed_tokens > 0
        assert finished(rig) == uninterrupted(range(20), 3, [5, 6], 6)


def test_a_prefix_that_two_contexts_share_is_moved_once():
    rig = make_rig(Swapping(), enable_prefix_caching=True)
    prompt = list(range(12))
    rig.add("a", [*prompt, 90], scripted(2), max_tokens=4)
    rig.run()
    rig.add("b", [*prompt, 91], scripted(2), max_tokens=4)
    rig.run()
    outs = [move for plan in rig.runner.plans for move in plan.moves if move.kind is MoveKind.SWAP_OUT]
    assert len(outs) == 4 + 1, "three blocks of the prefix and each one's own tail"


def test_blocks_that_the_host_still_has_are_not_sent_again():
    rig = make_rig(Swapping(), enable_prefix_caching=True, num_blocks=16)
    seq_id = rig.add("r", range(12), scripted(2, 2), max_tokens=8)
    rig.run()
    rig.engine.resume(seq_id, [5])
    rig.run()
    first, second = split_by_resume(rig.runner.plans)
    assert first == 4 and second == 1


def test_a_partly_filled_block_may_be_computed_again_rather_than_sent():
    rig = make_rig(Swapping(partial=False), enable_prefix_caching=True)
    seq_id = rig.add("r", range(12), scripted(3), max_tokens=6)
    rig.run()
    assert kinds(rig) == ["swap_out"] * 3 and rig.scheduler.num_held_blocks == 0
    rig.engine.resume(seq_id, [5])
    rig.run()
    (resumed,) = rig.told(Resumed)
    assert resumed.interception.num_recomputed == 2 and resumed.interception.residency is Residency.CACHED
    assert finished(rig) == uninterrupted(range(12), 3, [5], 6)


def split_by_resume(plans: list[StepPlan]) -> tuple[int, int]:
    """Swap-outs before and after the second prefill of the sequence."""
    admissions = [i for i, plan in enumerate(plans) if plan.rows]
    outs = [sum(move.kind is MoveKind.SWAP_OUT for move in plan.moves) for plan in plans]
    return sum(outs[: admissions[1]]), sum(outs[admissions[1] :])


def test_the_second_tier_serves_what_the_device_evicted():
    rig = make_rig(
        Discard("offload", Traits(host=HostUse.CACHE)), enable_prefix_caching=True, num_blocks=5, max_model_len=20
    )
    rig.add("a", range(12), max_tokens=2)
    rig.run()
    rig.add("other", range(100, 116), max_tokens=2)
    rig.run()
    rig.add("a again", range(12), max_tokens=2)
    rig.run()
    assert kinds(rig).count("land") == 2, "all full blocks of the prompt but the one that holds its last token"
    finished_events = [event for event in rig.events if type(event).__name__ == "Finished"]
    assert finished_events[0].token_ids == finished_events[2].token_ids  # type: ignore[attr-defined]


def test_ending_while_swapped_out_frees_the_host():
    rig = make_rig(Swapping())
    seq_id = rig.add("r", range(10), scripted(3, timeout_s=5.0, on_failure="fail"), max_tokens=6)
    rig.run()
    rig.clock.advance(10.0)
    rig.step()
    assert [event.reason for event in rig.events if hasattr(event, "reason")] == [FinishReason.TOOL_TIMEOUT]
    assert seq_id == 0 and rig.scheduler.swaps.host.pool.num_available == 32
