"""The CPU's own kernels: compiled for this machine at first use, kept in the user's cache, registered with XLA."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
from jaxlib import version as jaxlib_version

logger = logging.getLogger(__name__)

SOURCE_FOLDER = Path(__file__).parent / "native"
COMPILERS = ("c++", "g++", "clang++")
# Contraction makes a * b + c one rounding in every variant of a loop, which the kernels' bitwise promises stand on.
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread")
TUNING = ("-march=native", "-mcpu=native")  # the first that the compiler takes; arm compilers may know the second alone
TARGETS = (
    *("jaxcept_linear", "jaxcept_linear_bias", "jaxcept_grouped_linear"),
    *("jaxcept_paged_attention", "jaxcept_write_kv"),
)
COMPILE_LIMIT_S = 300.0


class BuildError(RuntimeError):
    """The kernels cannot be compiled here, and why."""


@functools.cache
def native_available() -> bool:
    """Whether the CPU's own kernels can be used; the first call compiles them. Says once in the log why not."""
    if jax.default_backend() != "cpu":
        return False
    try:
        register(build(cache_folder()))
    except (BuildError, OSError) as error:
        logger.warning("Native CPU kernels are off, XLA computes instead: %s", error)
        return False
    return True


def register(library: Path) -> None:
    """Makes the kernels of a compiled library known to XLA's CPU backend."""
    symbols = ctypes.CDLL(str(library))
    for name in TARGETS:
        capsule = jax.ffi.pycapsule(getattr(symbols, name))
        jax.ffi.register_ffi_target(name, capsule, platform="cpu")


def cache_folder() -> Path:
    """Where compiled kernels are kept: $XDG_CACHE_HOME/jaxcept/native or ~/.cache/jaxcept/native."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "jaxcept" / "native"


def build(folder: Path) -> Path:
    """The kernels compiled for this machine, from `folder` if they are there. Raises BuildError.

    The name holds a hash of the sources, the compiler, the machine's instruction sets, the flags and jaxlib's version.
    Two processes may compile at once: each writes a file of its own and renames it.
    """
    compiler = find_compiler()
    sources = sorted(path for path in SOURCE_FOLDER.iterdir() if path.suffix in (".cc", ".h"))
    flags, macros = tuned_flags(compiler)
    digest = hashlib.sha256(repr((jaxlib_version.__version__, flags)).encode() + macros)
    for source in sources:
        digest.update(source.read_bytes())
    library = folder / f"kernels-{digest.hexdigest()[:24]}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, scratch = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(descriptor)
    try:
        units = [str(source) for source in sources if source.suffix == ".cc"]
        run_compiler([compiler, *flags, "-isystem", jax.ffi.include_dir(), *units, "-o", scratch])
        os.replace(scratch, library)
    finally:
        Path(scratch).unlink(missing_ok=True)
    return library


def find_compiler() -> str:
    """$CXX, or the first C++ compiler on the path. Raises BuildError."""
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else COMPILERS:
        found = shutil.which(name)
        if found:
            return found
    raise BuildError(f"no C++ compiler: looked for {wanted or ', '.join(COMPILERS)}")


def tuned_flags(compiler: str) -> tuple[tuple[str, ...], bytes]:
    """The flags to compile with, and the macros they predefine: compiler version and instruction sets in one text."""
    reasons = []
    for tuning in TUNING:
        try:
            return (*FLAGS, tuning), run_compiler([compiler, *FLAGS, tuning, "-dM", "-E", "-x", "c++", os.devnull])
        except BuildError as error:
            reasons.append(str(error))
    raise BuildError("; ".join(reasons))


def run_compiler(command: Sequence[str]) -> bytes:
    """Standard output of the compiler. Raises BuildError with the end of what it complained about."""
    try:
        done = subprocess.run(command, capture_output=True, check=False, timeout=COMPILE_LIMIT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]}: {error}") from error
    if done.returncode != 0:
        raise BuildError(f"{command[0]} failed: {done.stderr.decode(errors='replace')[-2000:]}")
    return done.stdout
