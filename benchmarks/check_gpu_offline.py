"""Compiles the engine's programs for GPUs on a machine without one, and fails on what should not be served.

    python benchmarks/check_gpu_offline.py [--jax 0.10.2 0.11.2] [--targets a100 h200] [--models gpt-j-6b] [--layers 2]

Makes an environment for each jax version under .cache, with XLA's CUDA compiler and ptxas but no driver (1.5 GB each).
Fails, naming what, on: KV pool bytes that are copied or not aliased, registers spilled, shared memory over the device's
limit, more memory than the device has, and under tensor parallelism more than two all-reduces a layer.
"""

from __future__ import annotations

import argparse
import glob
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
ENVIRONMENTS = ROOT / ".cache" / "gpu-offline"
OLDEST_PYTHON = {"0.10": (3, 11), "0.11": (3, 12), "0.12": (3, 12)}
COMPILER = ("jax-cuda12-plugin=={jax}", "jax-cuda12-pjrt=={jax}", "nvidia-cuda-nvcc-cu12")


def find_python(jax: str) -> str:
    """An interpreter that this jax version has wheels for. FileNotFoundError where there is none."""
    oldest = OLDEST_PYTHON[jax.rpartition(".")[0]]
    names = [f"python3.{minor}" for minor in range(oldest[1], 14)]
    pyenv = os.environ.get("PYENV_ROOT", str(Path.home() / ".pyenv"))
    candidates = [sys.executable, *(shutil.which(name) or "" for name in names)]
    candidates += [path for name in names for path in glob.glob(f"{pyenv}/versions/*/bin/{name}")]
    for candidate in filter(None, candidates):
        if oldest <= (_version(candidate) or (0, 0)) < (3, 14):
            return candidate
    raise FileNotFoundError(f"jax {jax} needs Python {oldest[0]}.{oldest[1]} to 3.13; none was found")


def _version(python: str) -> tuple[int, int] | None:
    """None where it does not run: pyenv leaves such names for versions that are not chosen."""
    asked = [python, "-c", "import sys; print(*sys.version_info[:2])"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    if done.returncode:
        return None
    major, minor = map(int, done.stdout.split())
    return major, minor


def make_environment(jax: str) -> Path:
    """The interpreter of an environment with this jax, its CUDA compiler and this project."""
    folder = ENVIRONMENTS / f"jax-{jax}"
    python, stamp = folder / "bin" / "python", folder / ".installed"
    if stamp.is_file() and stamp.stat().st_mtime > (ROOT / "pyproject.toml").stat().st_mtime:
        return python
    base = find_python(jax)
    print(f"{folder}: installing jax {jax} and its CUDA compiler (about 1.5 GB)", flush=True)
    subprocess.run([base, "-m", "venv", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    # Without dependencies: cuDNN, cuBLAS and the rest are for running.
    subprocess.run([*pip, "--no-deps", *(name.format(jax=jax) for name in COMPILER)], check=True)
    subprocess.run([*pip, f"jax=={jax}", "--editable", str(ROOT)], check=True)
    stamp.touch()
    return python


def main() -> int:
    """0 where every version passes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jax", nargs="+", default=["0.10.2"], help="versions of jax")
    args, rest = parser.parse_known_args()
    # XLA's notes that no driver was found are the point here. From 0.11 on it takes stack traces while it dumps, and
    # LLVM would have each symbolized: minutes for every kernel.
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "LLVM_DISABLE_SYMBOLIZATION": "1"}
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | quiet
    worst = 0
    for jax in args.jax:
        command = [str(make_environment(jax)), "-m", "benchmarks.gpu_offline_compile", *rest]
        worst = max(worst, subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode)
    return worst


if __name__ == "__main__":
    sys.exit(main())
