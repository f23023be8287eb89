"""The native library is compiled once, found again, safe in a race, and its absence only costs speed."""

import logging
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxcept_kernels import library
from jaxcept_kernels.library import BuildError, build, cache_folder, find_compiler, native_available
from jaxcept_kernels.linear import linear, pack_weight

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, library.COMPILERS)), reason="needs a C++ compiler")


@pytest.fixture
def small_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources that compile in no time."""
    folder = tmp_path / "native"
    folder.mkdir()
    (folder / "one.cc").write_text('extern "C" int one() { return 1; }\n')
    monkeypatch.setattr(library, "SOURCE_FOLDER", folder)
    return folder


@needs_compiler
def test_a_library_is_compiled_once_and_again_when_a_source_changes(small_source: Path, tmp_path: Path) -> None:
    first = build(tmp_path / "cache")
    stamp = first.stat().st_mtime_ns
    assert build(tmp_path / "cache") == first
    assert first.stat().st_mtime_ns == stamp
    (small_source / "one.cc").write_text('extern "C" int one() { return 2; }\n')
    assert build(tmp_path / "cache") != first
    assert len(list((tmp_path / "cache").iterdir())) == 2  # no scratch file stays


@needs_compiler
def test_compilers_that_race_leave_one_whole_library(small_source: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        paths = set(threads.map(build, [tmp_path / "cache"] * 4))
    assert len(paths) == 1
    assert list((tmp_path / "cache").iterdir()) == list(paths)


@needs_compiler
def test_a_broken_source_says_what_the_compiler_said(small_source: Path, tmp_path: Path) -> None:
    (small_source / "one.cc").write_text("int one() { return nothing_of_that_name; }\n")
    with pytest.raises(BuildError, match="nothing_of_that_name"):
        build(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match="no-such-compiler"):
        find_compiler()


def test_the_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "jaxcept" / "native"


def test_without_a_compiler_xla_computes_and_the_log_says_why_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    native_available.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger=library.__name__):
            assert not native_available()
            assert not native_available()
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "no-such-compiler" in caplog.text
        packed = pack_weight(jnp.eye(20, dtype=jnp.float32))
        assert jnp.array_equal(linear(jnp.ones((2, 20)), packed, out_features=20), jnp.ones((2, 20)))
    finally:
        native_available.cache_clear()


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="asks for an instruction set by an x86 flag")
def test_narrower_vectors_give_the_same_answers(tmp_path: Path) -> None:
    """The kernels built without wide vectors, in a process of their own, against the same tests."""
    wrapper = tmp_path / "narrow"
    wrapper.write_text(f'#!/bin/sh\nexec {find_compiler()} "$@" {narrow_flags()}\n')
    wrapper.chmod(0o755)
    tests = Path(__file__).parent
    files = [str(tests / name) for name in ("test_kernels_attention.py", "test_kernels_linear.py")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "native or product or bits", *files],
        env={**os.environ, "CXX": str(wrapper), "XDG_CACHE_HOME": str(tmp_path)},
        cwd=tests.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout


def narrow_flags() -> str:
    """Flags that take the widest instruction set of an x86 machine away."""
    if not Path("/proc/cpuinfo").exists():
        return ""
    flags = Path("/proc/cpuinfo").read_text()
    return "-mno-avx512f" if "avx512f" in flags else "-mno-avx2 -mno-fma" if "avx2" in flags else ""
