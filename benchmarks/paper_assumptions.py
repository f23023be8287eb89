"""How far min-waste's sustained load over discard's depends on what a decode token costs.

    python benchmarks/paper_assumptions.py [--num-requests 2000] [--out FILE.json]

InferCept (arXiv 2402.01869) reports 1.6 times the load for GPT-J-6B on one A100, and publishes a step time that is
linear in the step's tokens alone. Each line changes one assumption of that model and finds, by bisection, the rates
at which the median normalized latency reaches the bound under both policies.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jaxcept.arena.cases import Traffic
from jaxcept.arena.parts import make_parts
from jaxcept.simulator.deployment import Deployment, load_deployment
from jaxcept.simulator.report import Report
from jaxcept.simulator.simulate import SimOptions, simulate

A100_BANDWIDTH = 2.039e12  # bytes per second, A100-SXM4-80GB, data sheet
POLICIES = ("discard", "min-waste-paper")
LOWEST, HIGHEST, ROUNDS = 0.4, 16.0, 7


@dataclass(frozen=True, slots=True)
class Assumption:
    """The published deployment with one thing changed."""

    name: str
    deployment: Deployment
    options: SimOptions


@dataclass(frozen=True, slots=True)
class Line:
    """What one assumption gives. Rates in requests per second, `recompute_share` of discard's forward time there."""

    name: str
    discard: float
    min_waste: float
    ratio: float
    recompute_share: float


def assumptions() -> Iterator[Assumption]:
    """The published model first."""
    base = load_deployment("gptj-6b@a100")
    costs, plain = base.costs, SimOptions()
    yield Assumption("published: 10 ms + 0.0463 ms a token", base, plain)
    for share in (0.8, 0.4, 0.2):
        read_s = costs.kv_token_bytes / (A100_BANDWIDTH * share)
        changed = replace(base, costs=replace(costs, context_token_s=read_s))
        yield Assumption(f"and the context is read at {share:.0%} of the memory's bandwidth", changed, plain)
    for host_s in (0.01, 0.02):
        yield Assumption(
            f"and the host takes {host_s * 1e3:g} ms a step", base, SimOptions(host_s=host_s, pipeline_depth=0)
        )
    yield Assumption("and 40 GB of device memory", load_deployment("gptj-6b@a100-40gb"), plain)
    yield Assumption("and at most 32 sequences", replace(base, max_num_seqs=32), plain)


def run(assumption: Assumption, policy: str, traffic: Traffic, rate: float) -> Report:
    """One simulation."""
    deployment = assumption.deployment
    parts = make_parts(policy, "fcfs", "elapsed", deployment.costs, deployment.block_size)
    return simulate(traffic.at(rate), deployment, parts.policy, parts.order, parts.estimator, assumption.options)


def sustained(assumption: Assumption, policy: str, traffic: Traffic, bound_s: float) -> tuple[float, Report]:
    """The rate at which the median reaches the bound, within 6 %, and the last run within it."""
    low, high = LOWEST, HIGHEST
    best = run(assumption, policy, traffic, low)
    for _ in range(ROUNDS):
        middle = math.sqrt(low * high)
        report = run(assumption, policy, traffic, middle)
        if report.normalized_latency.p50 <= bound_s:
            low, best = middle, report
        else:
            high = middle
    return math.sqrt(low * high), best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-requests", type=int, default=2000)
    parser.add_argument("--bound", type=float, default=0.05, help="median normalized latency, seconds per token")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    console, lines = Console(width=120), []
    traffic = Traffic("mix", args.num_requests)
    for assumption in assumptions():
        (discard, report), (min_waste, _) = (sustained(assumption, policy, traffic, args.bound) for policy in POLICIES)
        lines.append(Line(assumption.name, discard, min_waste, min_waste / discard, report.recompute_share))
        console.log(lines[-1])
    table = Table(
        "assumption", "discard, req/s", "min-waste-paper, req/s", "ratio", "recompute, share of discard's time"
    )
    for line in lines:
        table.add_row(
            line.name,
            f"{line.discard:.2f}",
            f"{line.min_waste:.2f}",
            f"{line.ratio:.2f}",
            f"{line.recompute_share:.0%}",
        )
    console.print(table)
    if args.out is not None:
        args.out.write_text(json.dumps([asdict(line) for line in lines], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
