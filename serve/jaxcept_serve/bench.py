"""`jaxcept simulate`, `jaxcept bench intercept`, `jaxcept bench kernels`; `jaxcept bench serve` is next door."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

import jaxcept
from jaxcept.arena.cases import Sizes, Traffic, grid, run_case, run_cases
from jaxcept.arena.curves import compare
from jaxcept.arena.device import Bench, DeviceCase
from jaxcept.arena.plots import save_plots
from jaxcept.arena.tables import rich_sustained, rich_table, save
from jaxcept.config import EngineConfig
from jaxcept.scheduler.costs import CostModel
from jaxcept.scheduler.durations import ESTIMATORS
from jaxcept.scheduler.orders import ORDERS
from jaxcept.scheduler.policies.catalog import POLICIES
from jaxcept.simulator.deployment import DEPLOYMENTS, load_deployment
from jaxcept.simulator.mixes import WORKLOADS
from jaxcept.simulator.report import Report, Slo
from jaxcept_serve import bench_serve

DEFAULT_POLICIES = "discard,discard-ordered,preserve,swap,heuristic,prefix-lru,prefix-lru-offload,ttl,min-waste"


def add_commands(commands: Any) -> None:
    """Adds them to the command line's subparsers."""
    one = commands.add_parser(
        "simulate",
        help="one policy in simulated time",
        description="Runs the shipped engine and scheduler on a virtual clock; the device charges a cost model.",
    )
    one.add_argument("deployment", metavar="MODEL@DEVICE", help=f"{', '.join(DEPLOYMENTS)}, or a cost model's file")
    one.add_argument("--policy", default="min-waste", choices=POLICIES)
    one.add_argument("--order", default="fcfs", choices=ORDERS)
    one.add_argument("--estimator", default="elapsed", choices=ESTIMATORS)
    one.add_argument("--rate", type=float, default=2.0, help="requests per second (default: 2)")
    one.add_argument("--json", action="store_true", help="the whole report")
    one.set_defaults(run=run_simulate)
    bench = commands.add_parser("bench", help="benchmarks", description="Benchmarks.")
    kinds = bench.add_subparsers(dest="kind", required=True)
    bench_serve.add_command(kinds)
    many = kinds.add_parser(
        "intercept",
        help="every policy on the same requests",
        description="Runs every policy on the same requests, in simulated time or on a model; saves tables and plots.",
    )
    many.add_argument("--policies", type=_names, default=_names(DEFAULT_POLICIES), help=f"of {', '.join(POLICIES)}")
    many.add_argument("--orders", type=_names, default=["fcfs"], help=f"of {', '.join(ORDERS)} (default: fcfs)")
    many.add_argument(
        "--estimators", type=_names, default=["elapsed"], help=f"of {', '.join(ESTIMATORS)} (default: elapsed)"
    )
    many.add_argument("--rates", type=_rates, default=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], help="requests per second")
    where = many.add_mutually_exclusive_group()
    where.add_argument("--simulate", metavar="MODEL@DEVICE", help="(default: gptj-6b@a100)")
    where.add_argument("--model", help="folder of a model to run on the device at hand, or 'shipped'")
    many.add_argument("--profile", help="cost model's file for --model, from `jaxcept profile`; runs are predicted too")
    many.add_argument("--load-format", default="auto", choices=["auto", "dummy"])
    many.add_argument("--jobs", type=int, default=1, help="processes that simulate (default: 1)")
    many.add_argument("--out", type=Path, help="folder for reports.json, table.md and plots")
    many.set_defaults(run=run_intercept)
    for command in (one, many):
        add_traffic_flags(command)
    kernels = kinds.add_parser(
        "kernels",
        help="the kernels beside what the device can do",
        description="Checks and times the kernels of the device at hand: benchmarks/kernels.py of the repository.",
    )
    kernels.add_argument("--preset", choices=["tiny", "cpu", "quick", "full"], help="(default: by the device)")
    kernels.add_argument("--section", help="of decode, prefill, blocks, overlap, step; with commas (default: all)")
    kernels.add_argument("--budget", type=float, help="seconds for everything (default: the preset's)")
    kernels.add_argument("--out", type=Path, help="folder for kernels.json, kernels.md and a plot")
    kernels.set_defaults(run=run_kernels)


def add_traffic_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of Traffic, Sizes and Slo."""
    traffic = parser.add_argument_group("requests")
    traffic.add_argument("--workload", default="mix", choices=WORKLOADS)
    traffic.add_argument("--num-requests", type=int, default=2000)
    traffic.add_argument("--seed", type=int, default=0)
    traffic.add_argument("--time-scale", type=float, default=1.0, help="of tool times")
    traffic.add_argument("--length-scale", type=float, default=1.0, help="of token counts")
    sizes = parser.add_argument_group("sizes (default: the deployment's)")
    for name in Sizes.__slots__:
        sizes.add_argument(f"--{name.replace('_', '-')}", type=int)
    slo = parser.add_argument_group("what counts as goodput")
    slo.add_argument("--slo-ttft", type=float, default=Slo().ttft_s, help="seconds (default: %(default)s)")
    slo.add_argument(
        "--slo-latency", type=float, default=Slo().normalized_latency_s, help="seconds per token (default: %(default)s)"
    )


def run_simulate(args: argparse.Namespace) -> int:
    """`jaxcept simulate`."""
    (case,) = grid(
        args.deployment,
        _traffic(args),
        [args.rate],
        [args.policy],
        [args.order],
        [args.estimator],
        _sizes(args),
        _slo(args),
    )
    report = run_case(case)
    if args.json:
        print(report.to_json())
    else:
        Console().print(_summary(report), highlight=False, soft_wrap=True)
    return 0


def run_intercept(args: argparse.Namespace) -> int:
    """`jaxcept bench intercept`."""
    console = Console()
    reports, notes, title = _on_device(args, console) if args.model is not None else _simulated(args, console)
    console.print(rich_table(reports, title))
    table = rich_sustained(reports)
    if table is not None:
        console.print(table)
    for note in notes:
        console.print(note, markup=False, highlight=False)
    if args.out is not None:
        paths = save(reports, args.out, title, notes)
        try:
            paths += save_plots(reports, args.out)
        except ModuleNotFoundError as error:
            print(f"no plots: {error.name} is not installed; pip install 'jaxcept[bench]'", file=sys.stderr)
        console.print(f"{len(paths)} files in {args.out}", highlight=False)
    return 0


def run_kernels(args: argparse.Namespace) -> int:
    """`jaxcept bench kernels`: the repository's script, in a process of its own."""
    script = Path(jaxcept.__file__).parent.parent / "benchmarks" / "kernels.py"
    if not script.is_file():
        raise FileNotFoundError(f"{script}: `jaxcept bench kernels` needs a checkout of the repository")
    command = [sys.executable, str(script)]
    for name in ("preset", "section", "budget", "out"):
        value = getattr(args, name)
        if value is not None:
            command.append(f"--{name}={value}")
    return subprocess.run(command, check=False).returncode


def _simulated(args: argparse.Namespace, console: Console) -> tuple[list[Report], list[str], str]:
    name = args.simulate or "gptj-6b@a100"
    cases = grid(
        name, _traffic(args), args.rates, args.policies, args.orders, args.estimators, _sizes(args), _slo(args)
    )
    deployment = _sizes(args).of(load_deployment(name))
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("simulating", total=len(cases))

        def done(report: Report) -> None:
            progress.advance(task)
            _keep(report, args.out)

        reports = run_cases(cases, args.jobs, done)
    notes = [f"KV pool: {deployment.memory}.", _traffic_note(args)]
    return reports, notes, f"{args.workload} on {name}, simulated"


def _on_device(args: argparse.Namespace, console: Console) -> tuple[list[Report], list[str], str]:
    """Runs, and where a profile is given predicts the same runs with it."""
    if args.profile is None:
        raise ValueError("--model needs --profile FILE, written by `jaxcept profile`: policies decide by it")
    config = EngineConfig(model=None if args.model == "shipped" else args.model, load_format=args.load_format)
    bench = Bench(config, _sizes(args), CostModel.load(args.profile), _progress(console))
    cases = [
        DeviceCase(_traffic(args), rate, policy, order, estimator, _slo(args))
        for policy in args.policies
        for order in args.orders
        for estimator in args.estimators
        for rate in args.rates
    ]
    reports, predicted = [], []
    for case in cases:
        console.print(f"{case.policy} at {case.rate:g} requests/s", style="dim", highlight=False)
        reports.append(bench.run(case))
        _keep(reports[-1], args.out)
        predicted.append(bench.predict(case))
    agreement = compare(predicted, reports)
    return reports, [_traffic_note(args), "", agreement.markdown()], f"{args.workload} on {bench.name}"


def _keep(report: Report, folder: Path | None) -> None:
    """Appends the run to runs.jsonl, so that a long bench that is interrupted leaves what it has."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "runs.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(report.to_dict()) + "\n")


def _progress(console: Console) -> Callable[[int, int, str], None]:
    def show(done: int, total: int, what: str) -> None:
        if console.is_terminal and done == total:
            console.print(f"compiled {total} executables", style="dim")

    return show


def _summary(report: Report) -> str:
    """The report for a person to read."""
    info, waste, swap = report.info, report.window_waste, report.swap
    latency, queue, token = report.normalized_latency, report.queue_after_return, report.token_after_return
    causes = ", ".join(f"{cause} {seconds:.1f}" for cause, seconds in report.compute_s.items())
    return "\n".join(
        [
            f"{info.policy} ({info.order}, {info.estimator}) on {info.deployment}: {info.workload}, {info.rate:g}"
            f" requests/s, {report.num_finished} requests, seed {info.seed}",
            f"normalized latency  p50 {latency.p50 * 1e3:.1f}, mean {latency.mean * 1e3:.1f}, p99"
            f" {latency.p99 * 1e3:.1f} ms/token",
            f"TTFT                p50 {report.ttft.p50:.3f}, p99 {report.ttft.p99:.3f} s",
            f"after a return      mean {queue.mean:.3f}, p99 {queue.p99:.3f} s in the queue; a token after p50"
            f" {token.p50:.3f}, p99 {token.p99:.3f} s",
            f"completed           {report.completed_rps:.3f} requests/s over {report.makespan_s:.1f} s; within the SLO"
            f" {report.goodput_rps:.3f}",
            f"waste               {waste.total_share:.2%} of the pool while requests arrive: held"
            f" {waste.held_share:.2%}, recompute {waste.recompute_share:.2%}, stalled {waste.stalled_share:.2%}",
            f"forward seconds     {causes}; {report.recompute_share:.1%} recompute",
            f"swaps               {swap.out_bytes / 1e9:.2f} GB out, {swap.in_bytes / 1e9:.2f} GB in,"
            f" {swap.hidden_share:.1%} hidden, {swap.waited_s:.2f} s waited",
            f"estimates           off by {report.estimator_mae_s:.2f} s on average; preemptions {report.preemptions}",
            f"{report.steps} steps in {report.wall_s:.1f} s of real time",
        ]
    )


def _traffic(args: argparse.Namespace) -> Traffic:
    return Traffic(args.workload, args.num_requests, args.seed, args.time_scale, args.length_scale)


def _traffic_note(args: argparse.Namespace) -> str:
    return (
        f"{args.num_requests} requests a run, seed {args.seed}, tool times x {args.time_scale:g}, lengths x"
        f" {args.length_scale:g}; within the SLO: TTFT <= {args.slo_ttft:g} s and normalized latency <="
        f" {args.slo_latency:g} s/token."
    )


def _sizes(args: argparse.Namespace) -> Sizes:
    return Sizes(**{name: getattr(args, name) for name in Sizes.__slots__})


def _slo(args: argparse.Namespace) -> Slo:
    return Slo(args.slo_ttft, args.slo_latency)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _rates(text: str) -> list[float]:
    return [float(name) for name in _names(text)]
