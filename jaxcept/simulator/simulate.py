"""One workload, one policy, in simulated time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from jaxcept.clock import VirtualClock
from jaxcept.engine import Engine
from jaxcept.metrics import Ledger
from jaxcept.scheduler.durations import DurationEstimator, Elapsed
from jaxcept.scheduler.orders import QueueOrder
from jaxcept.scheduler.policy import Policy
from jaxcept.scheduler.request import Request
from jaxcept.scheduler.scheduler import Scheduler
from jaxcept.simulator.deployment import Deployment
from jaxcept.simulator.replay import Replay
from jaxcept.simulator.report import Report, RunInfo, Slo, make_report
from jaxcept.simulator.runner import SimRunner
from jaxcept.simulator.workload import Job, Workload, make_request


@dataclass(frozen=True, slots=True)
class SimOptions:
    """What else a simulation depends on."""

    host_s: float = 0.0  # planning and launching of a step, seconds
    pipeline_depth: int = 1
    slo: Slo = field(default_factory=Slo)


def simulate(
    workload: Workload,
    deployment: Deployment,
    policy: Policy,
    order: QueueOrder | None = None,
    estimator: DurationEstimator | None = None,
    options: SimOptions | None = None,
) -> Report:
    """Runs the shipped Engine and Scheduler on a virtual clock until every request is finished.

    ValueError where a prompt is longer than the deployment's max_model_len allows.
    """
    options = options or SimOptions()
    estimator = estimator or Elapsed()
    began = time.perf_counter()
    check_lengths(workload, min(deployment.max_model_len, deployment.num_blocks * deployment.block_size))
    clock = VirtualClock()
    scheduler = Scheduler(deployment.scheduler_config(), policy, estimator, order)
    runner = SimRunner(deployment.costs, clock, deployment.block_size, options.host_s)
    ledger = Ledger(deployment.block_bytes)
    engine = Engine(scheduler, runner, clock, ledger, options.pipeline_depth)
    replay = Replay(
        engine,
        clock,
        clock.advance_to,
        _requests(workload),
        lambda seq_id, count: _ids(1, count),
        estimator,
        stall_s=lambda: runner.use.stall_s + runner.use.swap_wait_s,
    )
    record = replay.run()
    return make_report(
        info=describe_run(
            workload, deployment, policy.name, order.name if order is not None else "fcfs", estimator.name
        ),
        record=record,
        counters=scheduler.counters,
        waste=ledger.waste,
        busy_s=ledger.busy_s,
        use=runner.use,
        slo=options.slo,
        start=0.0,
        last_arrival=workload.jobs[-1].arrival_s,
        wanted=[job.num_generated for job in workload.jobs],
        wall_s=time.perf_counter() - began,
    )


def describe_run(workload: Workload, deployment: Deployment, policy: str, order: str, estimator: str) -> RunInfo:
    """What is run, for its report."""
    return RunInfo(
        policy=policy,
        order=order,
        estimator=estimator,
        workload=workload.name,
        rate=workload.rate,
        num_requests=len(workload.jobs),
        seed=workload.seed,
        deployment=deployment.name,
        is_simulated=True,
        num_blocks=deployment.num_blocks,
        block_size=deployment.block_size,
        block_bytes=deployment.block_bytes,
        num_host_blocks=deployment.num_host_blocks,
        max_num_seqs=deployment.max_num_seqs,
        max_num_batched_tokens=deployment.max_num_batched_tokens,
        max_model_len=deployment.max_model_len,
        time_scale=workload.time_scale,
        length_scale=workload.length_scale,
    )


def check_lengths(workload: Workload, max_len: int) -> None:
    """ValueError where a prompt cannot be served at all; a conversation that grows too long is ended at the limit."""
    longest = max((job.num_prompt for job in workload.jobs), default=0)
    if longest >= max_len:
        raise ValueError(
            f"workload {workload.name!r} has a prompt of {longest} tokens: expected fewer than {max_len}, which the"
            " model's length and the pool allow; shorten it with a length scale, or raise max_model_len"
        )


def _requests(workload: Workload) -> Iterator[tuple[Job, Request]]:
    """Prompts that share nothing: each repeats an id of its own."""
    for number, job in enumerate(workload.jobs):
        yield job, make_request(f"r{number}", job, _ids(number + 2, job.num_prompt), 0.0)


@lru_cache(maxsize=4096)
def _ids(token_id: int, count: int) -> tuple[int, ...]:
    return (token_id,) * count
