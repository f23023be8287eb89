"""The same cases on the real engine: tools that really take their time, tokens that are really computed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from jaxcept.arena.cases import Sizes, Traffic
from jaxcept.arena.parts import Parts, make_parts
from jaxcept.build import choose_sizes, load_configured
from jaxcept.clock import MonotonicClock
from jaxcept.config import EngineConfig, use_compilation_cache
from jaxcept.engine import Engine
from jaxcept.metrics import Ledger
from jaxcept.runner.runner import DeviceRunner, RunnerConfig
from jaxcept.scheduler.costs import CostModel
from jaxcept.scheduler.request import Request
from jaxcept.scheduler.scheduler import Scheduler
from jaxcept.simulator.deployment import Deployment
from jaxcept.simulator.replay import Replay
from jaxcept.simulator.report import Report, Slo, SwapSeconds, make_report
from jaxcept.simulator.simulate import SimOptions, check_lengths, describe_run, simulate
from jaxcept.simulator.workload import Job, Workload, make_request

Progress = Callable[[int, int, str], None]
START_DELAY_S = 0.05


@dataclass(frozen=True, slots=True)
class DeviceCase:
    """One run on the device at hand, with the profile that its policies decide by."""

    traffic: Traffic
    rate: float
    policy: str
    order: str = "fcfs"
    estimator: str = "elapsed"
    slo: Slo = field(default_factory=Slo)


class Bench:
    """A model loaded once; every case gets a runner and a scheduler of its own."""

    def __init__(self, config: EngineConfig, sizes: Sizes, costs: CostModel, progress: Progress) -> None:
        use_compilation_cache(config.compilation_cache)
        self.costs = costs
        self._progress = progress
        self._model = load_configured(config, progress)
        given = {name: getattr(sizes, name) for name in sizes.__slots__ if getattr(sizes, name) is not None}
        num_host_blocks = given.pop("num_host_blocks", None)
        chosen = choose_sizes(replace(config, **given), self._model)
        if num_host_blocks is None:
            num_host_blocks = 2 * chosen.num_blocks
        self.sizes: RunnerConfig = replace(chosen, num_host_blocks=num_host_blocks)
        self.name = str(config.model) if config.model is not None else "shipped"

    @property
    def deployment(self) -> Deployment:
        """What the simulator needs to predict the runs."""
        return Deployment(
            name=self.name,
            costs=self.costs,
            num_blocks=self.sizes.num_blocks,
            num_host_blocks=self.sizes.num_host_blocks,
            block_size=self.sizes.block_size,
            max_num_seqs=self.sizes.max_num_seqs,
            max_num_batched_tokens=self.sizes.max_num_batched_tokens,
            max_model_len=self.sizes.max_model_len,
            memory="as built",
        )

    def run(self, case: DeviceCase) -> Report:
        """Compiles, replays in real time, reports."""
        workload = case.traffic.at(case.rate)
        deployment = self.deployment
        check_lengths(workload, min(deployment.max_model_len, deployment.num_blocks * deployment.block_size))
        parts = self._parts(case, workload)
        runner = DeviceRunner(self._model, self.sizes)
        runner.warm_up(self._progress)
        config = replace(deployment.scheduler_config(), vocab_size=self._model.config.vocab_size)
        scheduler = Scheduler(config, parts.policy, parts.estimator, parts.order)
        clock, ledger = MonotonicClock(), Ledger(runner.layout.block_bytes)
        engine = Engine(scheduler, runner, clock, ledger)
        rng = random.Random(workload.seed)
        prompts = [self._ids(rng, job.num_prompt) for job in workload.jobs]
        start = clock.now() + START_DELAY_S
        replay = Replay(
            engine,
            clock,
            lambda moment: time.sleep(max(0.0, moment - clock.now())),
            _requests(workload, prompts, start),
            lambda seq_id, count: self._ids(random.Random(seq_id), count),
            parts.estimator,
        )
        record = replay.run()
        times = runner.swapper.times if runner.swapper is not None else None
        info = describe_run(workload, deployment, case.policy, case.order, case.estimator)
        return make_report(
            info=replace(info, is_simulated=False, block_bytes=runner.layout.block_bytes),
            record=record,
            counters=scheduler.counters,
            waste=ledger.waste,
            busy_s=ledger.busy_s,
            use=None,
            swaps=SwapSeconds(times.busy_s, times.hidden_s, times.waited_s) if times is not None else None,
            slo=case.slo,
            start=start,
            last_arrival=start + workload.jobs[-1].arrival_s,
            wanted=[job.num_generated for job in workload.jobs],
            wall_s=clock.now() - start,
        )

    def predict(self, case: DeviceCase) -> Report:
        """The same case in simulated time, by the profile."""
        workload, options = case.traffic.at(case.rate), SimOptions(slo=case.slo)
        parts = self._parts(case, workload)
        return simulate(workload, self.deployment, parts.policy, parts.order, parts.estimator, options)

    def _parts(self, case: DeviceCase, workload: Workload) -> Parts:
        size = self.sizes.block_size
        return make_parts(case.policy, case.order, case.estimator, self.costs, size, workload.tool_means)

    def _ids(self, rng: random.Random, count: int) -> tuple[int, ...]:
        return tuple(rng.choices(range(self._model.config.vocab_size), k=count))


def _requests(workload: Workload, prompts: list[tuple[int, ...]], start: float) -> Iterator[tuple[Job, Request]]:
    for number, (job, prompt) in enumerate(zip(workload.jobs, prompts, strict=True)):
        yield job, make_request(f"r{number}", job, prompt, start)
