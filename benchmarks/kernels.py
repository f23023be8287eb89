"""The kernels' time, bytes and bandwidth, beside the ceilings that the same device reaches in the same run.

    python benchmarks/kernels.py [--preset full] [--section decode,prefill,blocks,overlap,step] [--out DIR]

`decode` and `prefill` are attention, `blocks` the KV write and the block moves, `overlap` swaps beside steps, `step`
the engine's step as a share of its roofline. Every case is checked against the XLA reference before it is timed.
Sections run in processes of their own, so that one that fails takes none with it; cases for which the time does not
suffice are named. On a CPU the Pallas kernels are left out: what interprets them is not timed; `--interpret-check`
checks them there.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # in a checkout that is not installed too
    sys.path[:0] = [str(ROOT / part) for part in (".", "kernels_pallas", "models", "serve")]

if TYPE_CHECKING:
    from benchmarks.kernels_cases import Preset
    from benchmarks.kernels_report import Results, Row
    from benchmarks.kernels_timing import Ceilings, Deadline

SECTIONS = {"decode": 7.0, "prefill": 4.0, "blocks": 3.0, "overlap": 2.0, "step": 5.0}  # parts of the time
PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "numpy")
START_S = 5.0  # that a process takes to begin
GRACE_S = 20.0  # that a section gets to end the case it is at


def main(argv: Sequence[str] | None = None) -> int:
    """0 where every section ran and every result was right."""
    args = make_parser().parse_args(argv)
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    from benchmarks.kernels_report import report, save

    results = run_here(args) if args.in_process else run_apart(args)
    paths = save(results, args.out, args.name) if args.out is not None else []
    if not args.quiet:
        print(report(results))
        for path in paths:
            print(path, file=sys.stderr)
    return 1 if results.failures or any(row.is_wrong for row in results.rows) else 0


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=["tiny", "cpu", "quick", "full"], help="(default: quick, on a CPU cpu)")
    parser.add_argument("--section", type=sections, default=list(SECTIONS), help="some of the above, with commas")
    parser.add_argument("--budget", type=float, help="seconds for everything (default: the preset's)")
    parser.add_argument("--interpret-check", action="store_true", help="check the Pallas kernels, interpreted")
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--name", default="kernels", help="of the files in it, without suffix")
    parser.add_argument("--in-process", action="store_true", help="all sections in this process")
    parser.add_argument("--quiet", action="store_true", help="no table on the standard output")
    return parser


def sections(text: str) -> list[str]:
    """Names of sections in a list with commas."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in SECTIONS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"{text!r}: expected some of {', '.join(SECTIONS)}")
    return names


def run_apart(args: argparse.Namespace) -> Results:
    """Each section in a process of its own, with its part of the time that is left."""
    import tempfile

    from benchmarks.kernels_cases import PRESETS
    from benchmarks.kernels_report import Results, save

    preset = args.preset or default_preset()
    results = empty_results(preset)
    end = time.monotonic() + (args.budget or PRESETS[preset].budget_s)
    for place, section in enumerate(args.section):
        left = end - time.monotonic()
        parts = [SECTIONS[name] for name in args.section[place:]]
        budget = left * parts[0] / sum(parts)
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(Path(__file__).resolve()), "--in-process", "--quiet", "--preset", preset]
            command += ["--section", section, "--budget", str(max(1.0, budget - START_S)), "--out", folder]
            command += ["--interpret-check"] if args.interpret_check else []
            begin, why = time.monotonic(), ""
            try:
                done = subprocess.run(command, check=False, timeout=max(5.0, min(budget + GRACE_S, left + GRACE_S)))
                why = "" if done.returncode in (0, 1) else f"the process ended with {done.returncode}"
            except subprocess.TimeoutExpired:
                why = "out of time; what it had is in the table"
            written = Path(folder) / "kernels.json"
            if written.is_file():
                results.merge(Results.from_json(written.read_text(encoding="utf-8")))
            elif not why:
                why = "no results"
        results.seconds[section] = time.monotonic() - begin
        if why:
            results.failures[section] = why
        if args.out is not None:
            save(results, args.out, args.name)
    return results


def default_preset() -> str:
    """By what a process of its own sees, so that this one holds no device."""
    ask = "import jax; print(jax.default_backend())"
    told = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    return "quick" if told.stdout.strip() == "gpu" else "cpu"


def run_here(args: argparse.Namespace) -> Results:
    """The sections one after the other in this process; what there is is saved as it comes."""
    from benchmarks.kernels_cases import PRESETS
    from benchmarks.kernels_report import reason
    from benchmarks.kernels_timing import Deadline

    name = args.preset or default_preset()
    preset, results = PRESETS[name], empty_results(name)
    results.device = describe_device()
    end = Deadline.after(args.budget or preset.budget_s)
    for place, section in enumerate(args.section):
        parts = [SECTIONS[name] for name in args.section[place:]]
        begin = time.monotonic()
        try:
            deadline = Deadline.after(end.left_s * parts[0] / sum(parts))
            run_section(section, preset, results, deadline, args)
        except Exception as error:  # told in the report; the other sections run all the same
            results.failures[section] = reason(error)
        results.seconds[section] = time.monotonic() - begin
        results.load = max(results.load, os.getloadavg()[0] / (os.cpu_count() or 1))
    return results


def run_section(section: str, preset: Preset, results: Results, deadline: Deadline, args: argparse.Namespace) -> None:
    """Adds a section's results, and saves them as they come."""
    from benchmarks.kernels_report import Row
    from benchmarks.kernels_timing import measure_ceilings

    ceilings = measure_ceilings(preset)
    results.ceilings[section] = ceilings._asdict()
    for item in measured(section, preset, ceilings, deadline, args.interpret_check):
        if isinstance(item, Row):
            results.rows.append(item)
        else:
            (results.overlap if section == "overlap" else results.steps).append(item)
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / f"{args.name}.json").write_text(results.to_json(), encoding="utf-8")
    results.ceilings[section] = ceilings.best(measure_ceilings(preset))._asdict()


def measured(
    section: str, preset: Preset, ceilings: Ceilings, deadline: Deadline, interpret_check: bool
) -> Iterable[Row | dict[str, Any]]:
    """A section's rows, or its records, as they come."""
    if section == "overlap":
        from benchmarks.kernels_overlap import run_overlap

        return run_overlap(preset, deadline)
    if section == "step":
        from benchmarks.kernels_step import run_step

        return run_step(preset, ceilings, deadline)
    if section == "blocks":
        from benchmarks.kernels_blocks import run_blocks

        return run_blocks(preset, deadline, interpret_check)
    from benchmarks.kernels_attention import run_attention

    return run_attention(preset, preset.steps(section), deadline, interpret_check)


def empty_results(preset: str) -> Results:
    """Results of this command, before anything is measured."""
    from benchmarks.kernels_report import Results

    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    command = " ".join(["python", *sys.argv]).replace(f"{ROOT}/", "")
    return Results(command, preset, time.strftime("%Y-%m-%d"), "", versions)


def describe_device() -> str:
    """The device that cases run on."""
    import jax

    device = jax.devices()[0]
    if device.platform == "cpu":
        return f"cpu {platform.machine()}, {os.cpu_count()} cores"
    return str(device.device_kind)


if __name__ == "__main__":
    sys.exit(main())
