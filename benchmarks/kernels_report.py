"""What benchmarks/kernels.py found, as JSON, as Markdown and as a roofline. matplotlib is an extra."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

WRONG = "WRONG"  # begins the note of a row whose result is
BUSY = 1.5  # processes a core from which on a report says so
INTERPRETED = "pallas interpreted"
HEADER = (
    "kernel",
    "shape",
    "case",
    "by",
    "us",
    "GB/s",
    "of copy",
    "TFLOP/s",
    "of matrix",
    "max error",
    "xla /",
    "note",
)


@dataclass(frozen=True, slots=True)
class Row:
    """One implementation's time for one case; bytes and operations are the least that the case needs."""

    kernel: str
    shape: str
    case: str
    implementation: str
    seconds: float | None = None  # of a call; None: not timed, the note says why
    bytes: int = 0
    flops: int = 0
    error: float | None = None  # largest difference from the reference over its largest number
    note: str = ""

    @property
    def is_wrong(self) -> bool:
        """Whether it gave a wrong result."""
        return self.note.startswith(WRONG)


@dataclass(slots=True)
class Results:
    """One run, section by section."""

    command: str
    preset: str
    date: str
    device: str
    versions: dict[str, str]
    ceilings: dict[str, Any] = field(default_factory=dict)  # of Ceilings, by section: each measures its own
    rows: list[Row] = field(default_factory=list)
    overlap: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)  # of whole sections
    seconds: dict[str, float] = field(default_factory=dict)  # that sections took
    load: float = 0.0  # runnable processes per core when the last section ended, its own among them

    def merge(self, other: Results) -> None:
        """Takes over what another process measured."""
        for name in ("ceilings", "failures", "seconds"):
            getattr(self, name).update(getattr(other, name))
        for name in ("rows", "overlap", "steps"):
            getattr(self, name).extend(getattr(other, name))
        self.device, self.versions = other.device or self.device, other.versions or self.versions
        self.load = max(self.load, other.load)

    def to_json(self) -> str:
        """One row a line."""
        fields = asdict(self)
        parts = []
        for name, value in fields.items():
            if isinstance(value, list):
                lines = ",\n".join("  " + json.dumps(_rounded(item)) for item in value)
                parts.append(f' "{name}": [\n{lines}\n ]' if lines else f' "{name}": []')
            else:
                parts.append(f' "{name}": {json.dumps(_rounded(value))}')
        return "{\n" + ",\n".join(parts) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> Results:
        """What `to_json` wrote."""
        fields = json.loads(text)
        return cls(**fields | {"rows": [Row(**row) for row in fields["rows"]]})


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return value


def reason(error: BaseException) -> str:
    """An error in one line of a table."""
    text = " ".join(str(error).split())
    known = isinstance(error, ValueError) and text.startswith(WRONG)
    text = text if known else f"{type(error).__name__}: {text}"
    return (text if len(text) <= 100 else text[:99] + "…").replace("|", "/")


def kernel_table(results: Results) -> str:
    """Every row, with its shares of the section's ceilings, and the reference's time over its own."""
    reference = {(r.kernel, r.shape, r.case): r.seconds for r in results.rows if r.implementation == "xla"}
    lines = []
    for row in results.rows:
        ceilings = results.ceilings.get(section_of(row.kernel))
        cells = [row.kernel, row.shape, row.case, row.implementation or "-"]
        cells += _measures(row, ceilings) if row.seconds else ["", "", "", "", ""]
        cells.append("" if row.error is None else f"{row.error:.1e}" if row.error else "0")
        base = reference.get((row.kernel, row.shape, row.case))
        cells.append(f"{base / row.seconds:.2f}" if base and row.seconds and row.implementation != "xla" else "")
        lines.append([*cells, row.note])
    return markdown(HEADER, lines)


def _measures(row: Row, ceilings: dict[str, Any] | None) -> list[str]:
    """Time, bandwidth and rate, and their shares of the ceilings."""
    assert row.seconds is not None
    bandwidth, rate = row.bytes / row.seconds, row.flops / row.seconds
    of_copy = f"{bandwidth / ceilings['copy']:.0%}" if ceilings else ""
    of_matrix = f"{rate / ceilings['matrix']:.0%}" if ceilings and row.flops else ""
    return [
        f"{row.seconds * 1e6:.1f}",
        f"{bandwidth / 1e9:.1f}",
        of_copy,
        f"{rate / 1e12:.2f}" if row.flops else "",
        of_matrix,
    ]


def section_of(kernel: str) -> str:
    """The section that measures a kernel."""
    return kernel if kernel in ("decode", "prefill") else "blocks"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the first columns are text, numbers stand to the right."""
    rule = ["---" if name in ("kernel", "shape", "case", "by", "note", "load", "what") else "---:" for name in header]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


class Aim(NamedTuple):
    """What a kernel is meant to reach."""

    kernel: str
    least: float  # share of the ceiling
    ceiling: str  # name in Ceilings
    at: str  # the cases that it is for
    takes: Callable[[Sequence[int]], bool]  # of the numbers in a case's name


AIMS = (
    Aim("decode", 0.8, "copy", "batch 32 and context 2048 or more", lambda n: n[0] >= 32 and n[1] >= 2048),
    Aim("prefill", 0.45, "matrix", "chunks of 2048", lambda n: n[1] >= 2048),
    Aim("gather_blocks", 0.85, "copy", "8 blocks or more", lambda n: n[0] >= 8),
    Aim("scatter_blocks", 0.85, "copy", "8 blocks or more", lambda n: n[0] >= 8),
)


def aims_met(results: Results, implementation: str = "pallas") -> list[str]:
    """For each aim, how many of its cases reach it, and which is furthest from it."""
    lines = []
    for aim in AIMS:
        ceiling = results.ceilings.get(section_of(aim.kernel), {}).get(aim.ceiling)
        shares = [
            ((row.flops if aim.ceiling == "matrix" else row.bytes) / row.seconds / ceiling, f"{row.shape}, {row.case}")
            for row in results.rows
            if row.kernel == aim.kernel
            and row.implementation == implementation
            and row.seconds
            and ceiling
            and aim.takes([int(number) for number in re.findall(r"\d+", row.case)])
        ]
        if shares:
            reached, (worst, where) = sum(share >= aim.least for share, _ in shares), min(shares)
            lines.append(
                f"- {aim.kernel}, {aim.at}: {reached} of {len(shares)} cases reach {aim.least:.0%} of the measured "
                f"{aim.ceiling} rate; the least is {worst:.0%} ({where})"
            )
    return lines


def report(results: Results) -> str:
    """The whole run as Markdown."""
    versions = ", ".join(f"{name} {number}" for name, number in results.versions.items())
    parts = [
        f"# Kernels on {results.device}",
        f"`{results.command}`, {results.date}, preset {results.preset}; {versions}.",
        "Times are medians of calls chained on the device. Bytes and operations are the least that a case needs, so "
        "that what a kernel reads twice counts against it. Shares are of what the same process measured:",
    ]
    for section, c in results.ceilings.items():
        parts.append(
            f"- {section}: copy {c['copy'] / 1e9:.1f} GB/s (read and written), read {c['read'] / 1e9:.1f} GB/s, "
            f"matrix product {c['matrix'] / 1e12:.2f} TFLOP/s ({c['dtype']})"
        )
    if results.load > BUSY:
        parts += ["", f"The machine was busy with other work, {results.load:.1f} processes a core: times scatter."]
    if results.rows:
        aims = aims_met(results)
        parts += ["", "## Kernels", "", *aims, *([""] if aims else []), kernel_table(results)]
    for title, rows in (("Transfers beside steps", results.overlap), ("The engine's step", results.steps)):
        if rows:
            parts += ["", f"## {title}", "", records(rows)]
    if results.failures:
        parts += ["", "## Failed", ""] + [f"- {section}: {why}" for section, why in results.failures.items()]
    spent = ", ".join(f"{section} {seconds:.0f} s" for section, seconds in results.seconds.items())
    return "\n".join([*parts, "", f"Sections took {spent}." if spent else ""]).rstrip() + "\n"


def records(rows: Sequence[dict[str, Any]]) -> str:
    """Records of equal fields as a table; what is a table itself follows it."""
    names = list(dict.fromkeys(name for row in rows for name, value in row.items() if not isinstance(value, list)))
    table = markdown(names, [[_cell(name, row.get(name)) for name in names] for row in rows])
    notes = [
        f"- {row.get('what', '')}: " + "; ".join(str(item) for item in value)
        for row in rows
        for value in row.values()
        if isinstance(value, list) and value
    ]
    return "\n".join([table, *([""] if notes else []), *notes])


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0%}" if name.startswith("share") else f"{value:.4g}"
    return str(value)


def save(results: Results, folder: Path, stem: str = "kernels") -> list[Path]:
    """Writes stem.json, stem.md and, where matplotlib is installed, stem.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{stem}.json", folder / f"{stem}.md"]
    paths[0].write_text(results.to_json(), encoding="utf-8")
    paths[1].write_text(report(results), encoding="utf-8")
    try:
        paths += save_roofline(results, folder / f"{stem}.svg")
    except ModuleNotFoundError as error:
        with paths[1].open("a", encoding="utf-8") as file:
            file.write(f"\nNo plot: {error.name} is not installed.\n")
    return paths


def save_roofline(results: Results, path: Path) -> list[Path]:
    """Rate over intensity for the attention, bandwidth over bytes beside it. Nothing where nothing is timed."""
    from matplotlib.figure import Figure

    timed = [row for row in results.rows if row.seconds]
    if not timed or not results.ceilings:
        return []
    ceilings = {name: max(each[name] for each in results.ceilings.values()) for name in ("copy", "matrix")}
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    computing = [row for row in timed if row.flops]
    low = min([0.25, *(row.flops / row.bytes / 2 for row in computing)])
    high = max([4 * ceilings["matrix"] / ceilings["copy"], *(2 * row.flops / row.bytes for row in computing)])
    ridge = ceilings["matrix"] / ceilings["copy"]
    left.plot([low, ridge, high], [low * ceilings["copy"] / 1e12, *[ceilings["matrix"] / 1e12] * 2], "k-", linewidth=1)
    _scatter(left, computing, lambda row: (row.flops / row.bytes, row.flops / row.seconds / 1e12))
    left.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s", title="Attention")
    right.axhline(ceilings["copy"] / 1e9, color="k", linewidth=1, label="measured copy")
    _scatter(
        right, [row for row in timed if row.kernel != "prefill"], lambda row: (row.bytes, row.bytes / row.seconds / 1e9)
    )
    right.set(xscale="log", yscale="log", xlabel="bytes of a call", ylabel="GB/s", title="Bytes moved")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize="x-small")
    figure.suptitle(f"{results.device}, {results.date}")
    figure.savefig(path)
    return [path]


def _scatter(axes: Any, rows: Sequence[Row], place: Any) -> None:
    """One color per kernel, one marker per implementation."""
    kernels = list(dict.fromkeys(row.kernel for row in rows))
    makers = list(dict.fromkeys(row.implementation.partition(" ")[0] for row in rows))
    for kernel in kernels:
        for maker in makers:
            points = [place(r) for r in rows if (r.kernel, r.implementation.partition(" ")[0]) == (kernel, maker)]
            if points:
                style = {"color": f"C{kernels.index(kernel)}", "marker": "osD^v<>P"[makers.index(maker) % 8]}
                axes.plot(*zip(*points, strict=True), linestyle="", markersize=4, label=f"{kernel}, {maker}", **style)
