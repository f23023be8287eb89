"""Everything that only a GPU can tell, what must be right before what is fast.

    python benchmarks/check_gpu.py [--stages tests tokens kernels tiles] [--out benchmarks/results/gpu]

`tests`    the kernels' own tests, on the chip instead of interpreted.
`tokens`   greedy tokens of conversations with tools, in float32, under policies that hold, swap and recompute, against
           the same conversations on the CPU (benchmarks/greedy_tokens.py).
`kernels`  benchmarks/kernels.py: time and bandwidth of every kernel beside its ceiling, swaps beside steps, the
           engine's step as a share of its roofline.
`tiles`    benchmarks/tune_tiles.py: tile sizes for this device.

Every stage is a process of its own; check-gpu.json says how each ended. `--rehearse` runs the first three in small
sizes on whatever device there is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (".", "kernels_pallas", "models", "serve")
TESTS = (
    "test_kernels_attention.py", "test_kernels_blocks.py", "test_kernels_quantized.py",
    "test_pallas_kernels.py", "test_pallas_properties.py", "test_pallas_engine.py",
    "test_kernels_grouped.py", "test_models_experts.py",
)  # fmt: skip
REHEARSED_TESTS = ("test_kernels_blocks.py",)
ASK = """
import json, platform, jax
device = jax.devices()[0]
print(json.dumps({"platform": device.platform, "device": device.device_kind, "jax": jax.__version__,
                  "python": platform.python_version()}))
"""
ON_CPU = {"JAX_PLATFORMS": "cpu"}
EXACT = {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}  # a GPU would round the operands of float32 products


@dataclass(frozen=True, slots=True)
class Run:
    """One command of a stage."""

    stage: str
    command: str
    status: int
    seconds: float


def run(stage: str, command: Sequence[str], extra: dict[str, str]) -> Run:
    """Runs a command of this Python in the checkout, whether or not it is installed."""
    paths = [str(ROOT / part) for part in SOURCES] + [os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | extra
    begin = time.monotonic()
    status = subprocess.run([sys.executable, *command], env=environment, cwd=ROOT, check=False).returncode
    return Run(stage, " ".join(["python", *command]), status, round(time.monotonic() - begin, 1))


def run_tests(out: Path, small: bool) -> list[Run]:
    """The kernels' suite. The CPU stands beside the GPU: references are computed there."""
    names = REHEARSED_TESTS if small else TESTS
    files = [f"tests/{name}" for name in names]
    return [run("tests", ["-m", "pytest", *files], {} if small else {"JAX_PLATFORMS": "cuda,cpu"})]


def run_tokens(out: Path, small: bool) -> list[Run]:
    """The CPU's tokens by XLA, then the device's by its own kernels."""
    reference, script = str(out / "tokens.json"), "benchmarks/greedy_tokens.py"
    count = ["--count", "6" if small else "100"]
    policies = ["--policies", "swap"] if small else []
    first = run(
        "tokens",
        [script, *count, "--implementation", "xla", "--policies", "preserve", "--save", reference],
        ON_CPU | EXACT,
    )
    if first.status:
        return [first]
    return [first, run("tokens", [script, *count, *policies, "--against", reference], EXACT)]


def run_kernels(out: Path, small: bool) -> list[Run]:
    """All sections."""
    preset = ["--preset", "tiny"] if small else ["--preset", "full"]
    return [run("kernels", ["benchmarks/kernels.py", *preset, "--quiet", "--out", str(out)], {})]


def run_tiles(out: Path, small: bool) -> list[Run]:
    """A sweep; nothing where it would be interpreted."""
    return [] if small else [run("tiles", ["benchmarks/tune_tiles.py", "--out", str(out)], {})]


STAGES: dict[str, Callable[[Path, bool], list[Run]]] = {
    "tests": run_tests,
    "tokens": run_tokens,
    "kernels": run_kernels,
    "tiles": run_tiles,
}


def main(argv: Sequence[str] | None = None) -> int:
    """0 where every command ended with 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu")
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args(argv)
    # Asked in a process of its own, so that this one holds no device.
    told = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True).stdout
    about = json.loads(told.splitlines()[-1])
    if about["platform"] != "gpu" and not args.rehearse:
        raise SystemExit(f"check_gpu: JAX finds no GPU, only {about['device']}; install jax[cuda12], or --rehearse")
    out: Path = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    runs: list[Run] = []
    for stage in args.stages:
        runs += STAGES[stage](out, args.rehearse)
        report = about | {"date": time.strftime("%Y-%m-%d"), "runs": [asdict(each) for each in runs]}
        (out / "check-gpu.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for each in runs:
        print(
            f"{'passed' if each.status == 0 else f'FAILED ({each.status})':>12}  {each.seconds:6.1f} s  {each.command}"
        )
    return 1 if any(each.status for each in runs) else 0


if __name__ == "__main__":
    sys.exit(main())
