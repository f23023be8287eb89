"""The simulated device: its timing by hand, its memory, and that a seed decides everything."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from jaxcept.clock import VirtualClock
from jaxcept.engine import Engine
from jaxcept.metrics import Ledger
from jaxcept.scheduler.costs import CostModel
from jaxcept.scheduler.durations import Elapsed
from jaxcept.scheduler.plan import BlockMove, Chunk, ChunkKind, Decodes, MoveKind, StepPlan
from jaxcept.scheduler.policies.discard import Discard
from jaxcept.scheduler.policies.preserve import Preserve
from jaxcept.scheduler.scheduler import Scheduler
from jaxcept.simulator.deployment import DEPLOYMENTS, Deployment, load_deployment, pool_blocks, with_sizes
from jaxcept.simulator.mixes import make_workload
from jaxcept.simulator.replay import Replay
from jaxcept.simulator.report import Quantiles, Report
from jaxcept.simulator.rooflines import A100_40GB, FOLDER, LLAMA_3_70B, cost_models
from jaxcept.simulator.runner import SimRunner
from jaxcept.simulator.simulate import SimOptions, simulate
from jaxcept.simulator.workload import Job, Segment, Workload, make_request
from tests.workloads import SwapAll

# A step takes 1 s and 1 s a token; a block of 4 tokens takes 0.5 + 4 * 0.5 = 2.5 s out and 0.5 + 4 * 0.25 = 1.5 s in.
COSTS = CostModel(
    name="by hand",
    device="none",
    model="none",
    dtype="none",
    overhead_s=1.0,
    floor_s=0.0,
    token_s=1.0,
    context_token_s=0.0,
    pair_s=0.0,
    saturation_tokens=8,
    kv_token_bytes=10,
    swap_out_latency_s=0.5,
    swap_out_token_s=0.5,
    swap_in_latency_s=0.5,
    swap_in_token_s=0.25,
)
SMALL = Deployment("small", COSTS, num_blocks=24, num_host_blocks=16, block_size=4, max_num_seqs=4, max_model_len=64)


def out(block: int) -> BlockMove:
    return BlockMove(MoveKind.SWAP_OUT, block, block)


def back(block: int) -> BlockMove:
    return BlockMove(MoveKind.SWAP_IN, block, block)


def plan(
    step_id: int, num_decodes: int, *moves: BlockMove, chunks: tuple[Chunk, ...] = (), waits: bool = False
) -> StepPlan:
    ids = tuple(range(num_decodes))
    return StepPlan(step_id, Decodes(ids, ids, ids), chunks, (), (), moves, waits)


def make_runner(**options: Any) -> tuple[SimRunner, VirtualClock]:
    clock = VirtualClock()
    return SimRunner(COSTS, clock, 4, **options), clock


def test_steps_follow_each_other_and_a_swap_runs_beside_them():
    runner, clock = make_runner()
    runner.submit(plan(0, 1))  # 0 to 2
    runner.submit(plan(1, 2, out(0)))  # 2 to 5; the block leaves from 2 to 4.5
    first = runner.collect()
    assert (clock.now(), first.token_ids, first.outs_through, first.ins_through) == (2.0, (0,), None, None)
    runner.submit(plan(2, 1))  # 5 to 7
    second = runner.collect()
    assert (clock.now(), second.token_ids, second.outs_through) == (5.0, (0, 0), 1)
    assert runner.collect().outs_through == 1 and clock.now() == 7.0
    assert runner.use.swap_s == runner.use.hidden_s == 2.5
    assert (runner.use.decode_s, runner.use.stall_s, runner.use.swap_wait_s) == (7.0, 0.0, 0.0)
    assert (runner.use.swapped_out_tokens, runner.use.swapped_in_tokens) == (4, 0)


def test_each_direction_has_a_link_of_its_own_first_come_first_served():
    runner, clock = make_runner()
    runner.submit(plan(0, 1, out(0), back(1)))  # step 0 to 2; out 0 to 2.5; in 0 to 1.5
    runner.submit(plan(1, 1, out(2)))  # step 2 to 4; out 2.5 to 5
    result = runner.collect()
    assert (clock.now(), result.outs_through, result.ins_through) == (2.0, None, 0)
    result = runner.collect()
    assert (clock.now(), result.outs_through) == (4.0, 0)
    runner.submit(plan(2, 0))  # nothing to compute: until the second block is out, at 5
    result = runner.collect()
    assert (clock.now(), result.outs_through, result.token_ids) == (5.0, 1, ())
    assert runner.use.swap_wait_s == 1.0
    assert runner.use.swap_s == 6.5 and runner.use.hidden_s == 5.5
    runner.submit(plan(3, 0))  # nothing to wait for
    assert runner.collect().outs_through == 1 and clock.now() == 5.0


def test_a_plan_that_waits_for_its_swaps_stalls_the_device():
    runner, clock = make_runner()
    runner.submit(plan(0, 1, out(0), out(1), waits=True))  # 8 tokens: 4.5 s, then the step
    assert runner.collect().outs_through == 0
    assert clock.now() == 6.5 and runner.use.stall_s == 4.5 and runner.use.hidden_s == 0.0


def test_the_hosts_time_passes_before_each_step():
    runner, clock = make_runner(host_s=0.25)
    runner.submit(plan(0, 1))  # 0.25 to 2.25
    runner.submit(plan(1, 1))  # launched at 0.5, 2.25 to 4.25
    runner.collect()
    assert clock.now() == 2.25
    runner.collect()
    assert clock.now() == 4.25
    with pytest.raises(ValueError, match="host_s=-1"):
        make_runner(host_s=-1)


def test_a_steps_time_is_shared_out_by_tokens():
    runner, _ = make_runner()
    chunks = (
        Chunk(7, 1, ChunkKind.PREFILL, 0, (0,) * 3, False),
        Chunk(8, 2, ChunkKind.RECOMPUTE, 4, (0,) * 4, True, 2),
    )
    runner.submit(plan(0, 2, chunks=chunks))  # 9 tokens in 10 s
    result = runner.collect()
    assert len(result.token_ids) == 3
    use = runner.use
    assert [use.decode_s, use.prefill_s, use.recompute_s, use.returned_s] == pytest.approx(
        [20 / 9, 30 / 9, 20 / 9, 20 / 9]
    )
    assert use.compute_s == pytest.approx(10.0)


def one_job(*segments: Segment, num_prompt: int = 3) -> Workload:
    return Workload("one", (Job("one", 1.0, num_prompt, segments),), 1.0, 0)


def test_one_request_by_hand():
    """Prompt 3, two tokens, a tool of 10 s that returns 2 tokens, one token; arrival at 1."""
    report = simulate(one_job(Segment(2, "tool", 10.0, 2), Segment(1)), SMALL, Preserve())
    # Prefill 1 to 5 draws the first token, the decode 5 to 7 the second and the interception; the KV of the second
    # token is computed with what came back: 3 tokens, from 17 to 21.
    assert report.ttft.max == 4.0
    assert report.makespan_s == 21.0
    assert report.normalized_latency.max == pytest.approx((21 - 1 - 10) / 3)
    assert report.queue_after_return.max == 0.0
    assert report.token_after_return.max == 4.0  # from 17 to 21
    assert report.waste.held == 10.0 * 1 * 40  # 4 computed tokens are one block
    assert report.num_clipped == 0 and report.recompute_share == 0.0
    given_up = simulate(one_job(Segment(2, "tool", 10.0, 2), Segment(1)), SMALL, Discard(), options=SimOptions())
    assert given_up.waste.held == 0.0
    assert given_up.makespan_s == 21.0  # its one block was in the prefix cache still


def test_a_request_may_end_on_an_interception():
    report = simulate(one_job(Segment(2, "tool", 5.0, 2)), SMALL, Preserve())
    assert report.num_finished == 1 and report.num_clipped == 0
    assert report.makespan_s == 12.0  # 7 and the tool's time
    assert report.normalized_latency.max == pytest.approx((12 - 1 - 5) / 2)


def mixed(rate: float = 0.02, seed: int = 0) -> Workload:
    return make_workload("mix", 30, rate, seed, length_scale=0.02)


def small_run(policy: Any, **options: Any) -> Report:
    return simulate(mixed(), SMALL, policy, options=SimOptions(**options))


@pytest.mark.parametrize("policy", [Preserve, Discard, SwapAll])
def test_the_same_seed_gives_the_same_report(policy: Any):
    first, second = small_run(policy()), small_run(policy())
    assert first == second and first.num_finished == 30
    assert replace(first, wall_s=1.0) == second
    assert Report.from_dict(json.loads(first.to_json())) == first


def test_the_same_workload_gives_the_same_plans():
    class Watched(SimRunner):
        def submit(self, step: StepPlan) -> None:
            plans.append(step)
            super().submit(step)

    def run() -> list[StepPlan]:
        clock = VirtualClock()
        runner = Watched(COSTS, clock, 4)
        estimator = Elapsed()
        scheduler = Scheduler(SMALL.scheduler_config(), SwapAll(), estimator)
        engine = Engine(scheduler, runner, clock, Ledger(40))
        requests = [(job, make_request(f"r{i}", job, [i] * job.num_prompt, 0.0)) for i, job in enumerate(mixed().jobs)]
        replay = Replay(engine, clock, clock.advance_to, requests, lambda _, count: (1,) * count, estimator)
        replay.run()
        scheduler.check()
        assert scheduler.num_unfinished == 0
        return list(plans)

    plans: list[StepPlan] = []
    first = run()
    plans.clear()
    assert run() == first and len(first) > 100


def test_swapping_shows_in_the_report():
    report = small_run(SwapAll())
    assert report.swap.out_bytes >= report.swap.in_bytes > 0
    assert 0.0 < report.swap.hidden_share < 1.0
    assert report.waste.stalled > 0.0
    assert small_run(Preserve()).swap.out_bytes == 0


def test_a_prompt_that_never_fits_is_refused():
    with pytest.raises(ValueError, match="a prompt of 64 tokens: expected fewer than 64"):
        simulate(one_job(Segment(1), num_prompt=64), SMALL, Preserve())


def test_a_conversation_that_grows_too_long_is_clipped():
    report = simulate(one_job(Segment(5, "tool", 1.0, 100), Segment(50)), SMALL, Preserve())
    assert report.num_finished == report.num_clipped == 1


@pytest.mark.parametrize("name", cost_models())
def test_the_files_hold_what_the_constants_give(name: str):
    assert CostModel.load(FOLDER / f"{name}.json") == cost_models()[name]
    unsourced = [key for key in COSTS.__slots__ if key.endswith(("_s", "_tokens", "_bytes"))]
    assert set(cost_models()[name].sources) == set(unsourced)


def test_the_published_profiles_give_the_published_budgets():
    for name, budget in (("gptj-6b@a100", 605), ("vicuna-13b@2xa100", 319)):
        costs = load_deployment(name).costs
        assert costs.hidden_tokens(costs.forward_s(384)) == budget
        assert costs.kv_token_bytes / costs.swap_out_token_s == pytest.approx(10e9, rel=0.01)


def test_the_pool_is_what_the_memory_leaves():
    deployment = load_deployment("gptj-6b@a100")
    left = 80e9 * 0.9 - 2e9 - 2 * 6_050_882_784
    assert deployment.num_blocks == left // (16 * 458_752)
    assert "7888 blocks" in deployment.memory
    assert {load_deployment(name).name for name in DEPLOYMENTS} == set(DEPLOYMENTS)
    with pytest.raises(ValueError, match="does not fit on 4"):
        pool_blocks(LLAMA_3_70B, A100_40GB, 4)
    with pytest.raises(ValueError, match="no deployment and no file"):
        load_deployment("gpt-5@abacus")


def test_a_cost_models_file_is_a_deployment(tmp_path: Any):
    COSTS.save(tmp_path / "mine.json")
    deployment = with_sizes(load_deployment(str(tmp_path / "mine.json")), num_blocks=12, block_size=None)
    assert deployment.costs == COSTS and deployment.num_blocks == 12 and deployment.block_size == 16


def test_quantiles_are_by_nearest_rank():
    assert Quantiles.of([4.0, 1.0, 2.0, 3.0]) == Quantiles(2.5, 3.0, 4.0, 4.0, 4.0)
    assert Quantiles.of([]) == Quantiles()
