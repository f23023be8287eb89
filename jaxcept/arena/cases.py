"""What the arena runs: one case is one policy on one workload at one rate, in simulated time or on the device."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import product

from jaxcept.arena.parts import make_parts
from jaxcept.simulator.deployment import Deployment, load_deployment, with_sizes
from jaxcept.simulator.mixes import make_workload
from jaxcept.simulator.report import Report, Slo
from jaxcept.simulator.simulate import SimOptions, simulate
from jaxcept.simulator.workload import Workload


@dataclass(frozen=True, slots=True)
class Traffic:
    """The requests of a case, but for their rate. Equal traffic gives every policy the same requests."""

    workload: str
    num_requests: int
    seed: int = 0
    time_scale: float = 1.0
    length_scale: float = 1.0

    def at(self, rate: float) -> Workload:
        """The requests at a rate, per second."""
        return make_workload(self.workload, self.num_requests, rate, self.seed, self.time_scale, self.length_scale)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Limits of a scheduler; None leaves the deployment's own."""

    num_blocks: int | None = None
    num_host_blocks: int | None = None
    block_size: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_model_len: int | None = None

    def of(self, deployment: Deployment) -> Deployment:
        """The deployment with these sizes."""
        return with_sizes(deployment, **{name: getattr(self, name) for name in self.__slots__})


@dataclass(frozen=True, slots=True)
class Case:
    """One simulated run. `deployment` is a name or the path of a cost model."""

    deployment: str
    traffic: Traffic
    rate: float
    policy: str
    order: str = "fcfs"
    estimator: str = "elapsed"
    sizes: Sizes = field(default_factory=Sizes)
    options: SimOptions = field(default_factory=SimOptions)

    @property
    def label(self) -> str:
        """The policy, and its order and estimator where they are not the usual ones."""
        return label(self.policy, self.order, self.estimator)


def label(policy: str, order: str, estimator: str) -> str:
    """How a line of a table is called."""
    others = [name for name, usual in ((order, "fcfs"), (estimator, "elapsed")) if name != usual]
    return " ".join([policy, *[f"+{name}" for name in others]])


def grid(
    deployment: str,
    traffic: Traffic,
    rates: Iterable[float],
    policies: Iterable[str],
    orders: Iterable[str] = ("fcfs",),
    estimators: Iterable[str] = ("elapsed",),
    sizes: Sizes | None = None,
    slo: Slo | None = None,
) -> list[Case]:
    """All combinations. ValueError for the name of a policy, an order or an estimator that there is not."""
    chosen = sizes or Sizes()
    costs = load_deployment(deployment).costs
    cases = []
    for policy, order, estimator, rate in product(policies, orders, estimators, rates):
        make_parts(policy, order, estimator, costs, chosen.block_size or 16)
        options = SimOptions(slo=slo or Slo())
        cases.append(Case(deployment, traffic, rate, policy, order, estimator, chosen, options))
    return cases


def run_case(case: Case) -> Report:
    """Simulates one case."""
    deployment = case.sizes.of(load_deployment(case.deployment))
    workload = case.traffic.at(case.rate)
    costs, size = deployment.costs, deployment.block_size
    parts = make_parts(case.policy, case.order, case.estimator, costs, size, workload.tool_means)
    return simulate(workload, deployment, parts.policy, parts.order, parts.estimator, case.options)


def run_cases(
    cases: Sequence[Case], jobs: int = 1, on_done: Callable[[Report], None] = lambda report: None
) -> list[Report]:
    """Simulates all of them in `jobs` processes; reports in the order of the cases."""
    reports: dict[int, Report] = {}
    for index, report in _runs(cases, jobs):
        reports[index] = report
        on_done(report)
    return [reports[index] for index in range(len(cases))]


def _runs(cases: Sequence[Case], jobs: int) -> Iterator[tuple[int, Report]]:
    if jobs <= 1:
        for index, case in enumerate(cases):
            yield index, run_case(case)
        return
    # A fresh interpreter each: a fork of a process that runs JAX's threads may hang.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        # The highest rates run longest: first, so that they do not run alone at the end.
        order = sorted(range(len(cases)), key=lambda index: -cases[index].rate)
        futures = {pool.submit(run_case, cases[index]): index for index in order}
        for future in as_completed(futures):
            yield futures[future], future.result()
