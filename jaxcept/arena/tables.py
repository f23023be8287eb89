"""Reports as tables: for a terminal, for a reader, for a program."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.table import Table

from jaxcept.arena.curves import LATENCY_BOUNDS_S, by_label, label_of, sustained
from jaxcept.simulator.report import Report

Cell = Callable[[Report], str]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"


COLUMNS: tuple[tuple[str, Cell], ...] = (
    ("policy", label_of),
    ("req/s", lambda r: f"{r.info.rate:g}"),
    ("latency p50, ms/token", lambda r: _ms(r.normalized_latency.p50)),
    ("mean", lambda r: _ms(r.normalized_latency.mean)),
    ("p99", lambda r: _ms(r.normalized_latency.p99)),
    ("TTFT p50, s", lambda r: f"{r.ttft.p50:.2f}"),
    ("p99, s", lambda r: f"{r.ttft.p99:.2f}"),
    ("done/s", lambda r: f"{r.completed_rps:.2f}"),
    ("goodput/s", lambda r: f"{r.goodput_rps:.2f}"),
    ("waste: held", lambda r: f"{r.window_waste.held_share:.1%}"),
    ("recompute", lambda r: f"{r.window_waste.recompute_share:.1%}"),
    ("stalled", lambda r: f"{r.window_waste.stalled_share:.1%}"),
    ("recompute time", lambda r: f"{r.recompute_share:.1%}"),
    ("swapped, GB", lambda r: f"{(r.swap.out_bytes + r.swap.in_bytes) / 1e9:.1f}"),
    ("hidden", lambda r: f"{r.swap.hidden_share:.0%}" if r.swap.seconds else "–"),
    ("after a return: queued, s", lambda r: f"{r.queue_after_return.mean:.2f}"),
    ("token p50, s", lambda r: f"{r.token_after_return.p50:.2f}"),
    ("p99, s", lambda r: f"{r.token_after_return.p99:.2f}"),
    ("estimate off by, s", lambda r: f"{r.estimator_mae_s:.1f}"),
    ("preemptions", lambda r: str(r.preemptions)),
)


def rich_table(reports: Sequence[Report], title: str) -> Table:
    """For a terminal."""
    table = Table(title=title)
    for index, (name, _) in enumerate(COLUMNS):
        table.add_column(name, justify="left" if index == 0 else "right")
    for report in reports:
        table.add_row(*[cell(report) for _, cell in COLUMNS])
    return table


def markdown_table(reports: Sequence[Report]) -> str:
    """One line a run."""
    lines = ["| " + " | ".join(name for name, _ in COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(cell(report) for _, cell in COLUMNS) + " |" for report in reports]
    return "\n".join(lines)


def sustained_rows(reports: Sequence[Report], baseline: str = "discard") -> list[list[str]]:
    """A row a line: its name, then the sustained rate for each of LATENCY_BOUNDS_S, with the ratio to the baseline's.

    Empty where there is one rate only.
    """
    curves = by_label(reports)
    if len({report.info.rate for report in reports}) < 2:
        return []
    base = curves.get(baseline)
    rows = []
    for name, curve in curves.items():
        cells = [name]
        for bound in LATENCY_BOUNDS_S:
            mine = sustained(curve, bound)
            ratio = mine.over(sustained(base, bound)) if base is not None else None
            cells.append(str(mine) if ratio is None else f"{mine} ({ratio:.2f}×)")
        rows.append(cells)
    return rows


def sustained_header(baseline: str = "discard") -> list[str]:
    """The columns of `sustained_rows`."""
    return [f"sustained req/s (over {baseline})", *[f"p50 ≤ {bound * 1e3:g} ms/token" for bound in LATENCY_BOUNDS_S]]


def rich_sustained(reports: Sequence[Report]) -> Table | None:
    """For a terminal; None where there is nothing to tell."""
    rows = sustained_rows(reports)
    if not rows:
        return None
    table = Table(*sustained_header())
    for row in rows:
        table.add_row(*row)
    return table


def markdown(reports: Sequence[Report], title: str, notes: Sequence[str] = ()) -> str:
    """The whole result for a reader."""
    parts = [f"# {title}", "", *notes, "", markdown_table(reports)]
    rows = sustained_rows(reports)
    if rows:
        header = sustained_header()
        parts += ["", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        parts += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(parts) + "\n"


def save(reports: Sequence[Report], folder: Path, title: str, notes: Sequence[str] = ()) -> list[Path]:
    """Writes reports.json and table.md; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    records, table = folder / "reports.json", folder / "table.md"
    data = {"title": title, "notes": list(notes), "reports": [report.to_dict() for report in reports]}
    records.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    table.write_text(markdown(reports, title, notes), encoding="utf-8")
    return [records, table]


def load(path: Path) -> list[Report]:
    """The reports that `save` wrote."""
    return [Report.from_dict(record) for record in json.loads(path.read_text(encoding="utf-8"))["reports"]]
