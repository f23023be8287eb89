"""Reports as plots against the rate. matplotlib is an extra: `pip install jaxcept[bench]`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxcept.arena.curves import by_label
from jaxcept.simulator.report import Report

CURVES: dict[str, tuple[str, bool, Callable[[Report], float]]] = {  # file name → (axis, logarithmic, value)
    "latency": ("median normalized latency, s/token", True, lambda report: report.normalized_latency.p50),
    "latency-mean": ("mean normalized latency, s/token", True, lambda report: report.normalized_latency.mean),
    "ttft": ("TTFT p99, s", True, lambda report: report.ttft.p99),
    "completed": ("completed requests/s", False, lambda report: report.completed_rps),
    "goodput": ("requests/s within the SLO", False, lambda report: report.goodput_rps),
    "recompute": ("share of forward time spent on recompute", False, lambda report: report.recompute_share),
    "return": ("mean time from a tool's return to a token, s", True, lambda report: report.token_after_return.mean),
}
FORMATS = ("png", "svg")


def save_plots(reports: Sequence[Report], folder: Path) -> list[Path]:
    """Writes one figure per curve and one of the waste, as PNG and SVG. ModuleNotFoundError without matplotlib."""
    from matplotlib.figure import Figure  # noqa: PLC0415  an extra, and slow to import

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, (axis, is_log, value) in CURVES.items():
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        _plot_curves(figure.subplots(), reports, axis, is_log, value)
        paths += _save(figure, folder / name)
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    _plot_waste(figure.subplots(), reports)
    return paths + _save(figure, folder / "waste")


def _plot_curves(
    axes: Any, reports: Sequence[Report], axis: str, is_log: bool, value: Callable[[Report], float]
) -> None:
    for index, (name, curve) in enumerate(by_label(reports).items()):
        points = [(report.info.rate, value(report)) for report in curve]
        marker = "osD^v<>Pp*hX"[index % 12]
        style = "-" if index < 10 else "--"  # there are ten colors
        axes.plot(*zip(*points, strict=True), style, marker=marker, markersize=4, linewidth=1.2, label=name)
    if is_log and any(value(report) > 0 for report in reports):
        axes.set_yscale("log")
    axes.set_xlabel("requests/s")
    axes.set_ylabel(axis)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _plot_waste(axes: Any, reports: Sequence[Report]) -> None:
    """Waste by cause, one bar a run."""
    ordered = [report for curve in by_label(reports).values() for report in curve]
    names = [f"{name} {report.info.rate:g}" for name, curve in by_label(reports).items() for report in curve]
    bottom = [0.0] * len(ordered)
    causes: dict[str, Callable[[Report], float]] = {
        "held": lambda report: report.window_waste.held_share,
        "recompute": lambda report: report.window_waste.recompute_share,
        "stalled": lambda report: report.window_waste.stalled_share,
    }
    for cause, value in causes.items():
        heights = [value(report) * 100 for report in ordered]
        axes.bar(range(len(ordered)), heights, bottom=bottom, label=cause)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.set_xticks(range(len(ordered)), names, rotation=90, fontsize="x-small")
    axes.set_ylabel("waste while requests arrive, % of the pool")
    axes.legend(fontsize="small")


def _save(figure: Any, stem: Path) -> list[Path]:
    paths = [stem.with_suffix(f".{kind}") for kind in FORMATS]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths
