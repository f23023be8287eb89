"""benchmarks/kernels.py: formulas by hand, tables and plots, a small run, and what only a GPU runs lowered for one."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowering import lowered

from benchmarks import kernels, kernels_attention, kernels_blocks, kernels_step, kernels_timing, tune_tiles
from benchmarks.kernels_attention import Group, make_groups, make_meta, queries
from benchmarks.kernels_cases import (
    GPT_J,
    LLAMA_70B,
    PRESETS,
    SMALL,
    VICUNA,
    Prefill,
    Shape,
    attention_work,
    move_work,
    write_work,
)
from benchmarks.kernels_report import Results, Row, aims_met, kernel_table, report, save
from benchmarks.kernels_timing import (
    Ceilings,
    Chain,
    Contender,
    Deadline,
    Stopwatch,
    compile_all,
    judge,
    noise,
    relative_error,
    repeat,
)
from jaxcept.runner.runner import DeviceRunner
from jaxcept_kernels.attention import write_kv
from jaxcept_kernels.layout import KVLayout, KVPool
from jaxcept_kernels.pallas import ragged_attention
from jaxcept_kernels.pallas.ragged_attention import ragged_paged_attention
from jaxcept_kernels.pallas.tiles import ENTRIES, AttentionTiles, Tile, TileEntry, read_tiles, tiles_for, write_tiles
from jaxcept_kernels.pallas.write_kv import write_kv_pallas
from jaxcept_kernels.scoring import Scoring
from jaxcept_serve import cli

TINY = PRESETS["tiny"]
SOON = Deadline.after(3600)


def test_attention_work_by_hand() -> None:
    # One query of 16 heads of 256 values over 8 keys: 8 keys and 8 values of 4096 elements, a query and a result.
    decode = attention_work(GPT_J, Prefill(1, 1, 8), 2)
    assert decode == ((8 * 2 * 4096 + 2 * 4096) * 2, 4 * 8 * 4096)
    # Two sequences of three queries behind four tokens see 5 + 6 + 7 keys each.
    chunk = attention_work(LLAMA_70B, Prefill(2, 3, 7), 2)
    assert chunk.flops == 4 * 2 * (5 + 6 + 7) * 16 * 128
    assert chunk.bytes == (2 * 7 * 2 * 2 * 128 + 2 * 6 * 16 * 128) * 2
    assert decode.floor_s(1e9, 1e12) == pytest.approx(decode.bytes / 1e9)
    assert chunk.floor_s(1e12, 1e6) == pytest.approx(chunk.flops / 1e6)


def test_work_of_moves_by_hand() -> None:
    assert write_work(VICUNA, 3, 2).bytes == 2 * 3 * 2 * 40 * 128 * 2
    # A block of 16 tokens of GPT-J in bfloat16 is 7.3 MB over its 28 layers; it is read and written.
    assert move_work(GPT_J, 1, 16, 2).bytes == 2 * 28 * 2 * 16 * 16 * 256 * 2


def test_work_of_a_step_counts_the_weights_that_the_model_has() -> None:
    step = TINY.step
    model = kernels_step.make_model(step, TINY, kernels_step.implementations("float32")[-1])
    table = step.vocab * step.hidden
    assert sum(x.size for x in model.weights) - table == step.weight_bytes(1)
    kept = 4 * 32 * 2 * 4 * 32 * 2 * 4  # batch, context, K and V, heads, values, layers, bytes
    assert step.work(4, 32, 4).bytes == step.weight_bytes(4) + kept
    full = PRESETS["full"].step
    assert 5.6e9 < full.weight_bytes(1) < 6.1e9  # six billion, less the embedding's table


def test_every_case_of_the_full_preset_has_its_place() -> None:
    preset = PRESETS["full"]
    for shape in preset.shapes:
        rows = kernels_attention.pool_rows(shape, preset, 129 << 30)
        assert rows * preset.block_size * shape.token_bytes * 2 <= 0.7 * (129 << 30)
        groups = list(make_groups(shape, preset, preset.steps("decode"), rows))
        for group in groups:
            assert group.layout.num_layers * group.layout.num_blocks == rows
            assert max(group.contexts) <= group.columns * preset.block_size
        left_out = list(kernels_attention.too_large(shape, preset, preset.steps("decode"), rows))
        assert sum(len(group.contexts) for group in groups) + len(left_out) == len(preset.steps("decode"))
        assert {(g.sequences, c) for g in groups for c in g.contexts} >= {(32, 2048), (128, 2048), (1, 32768)}
    small = kernels_attention.pool_rows(GPT_J, preset, 30 << 30)
    assert small == 1 << 16  # blocks, for batch times context up to 2**20 tokens
    assert [row.case for row in kernels_attention.too_large(GPT_J, preset, preset.steps("decode"), small)] == [
        "128 x 32768",
        "256 x 8192",
        "256 x 32768",
        "64 x 32768",
    ]


def test_noise_differs_from_place_to_place() -> None:
    drawn = np.asarray(noise((64, 2, 128), jnp.float32))
    assert np.unique(drawn).size > 0.99 * drawn.size
    assert abs(drawn.mean()) < 0.02 and -1 <= drawn.min() < -0.99 and 0.99 < drawn.max() < 1
    assert not np.array_equal(drawn, noise((64, 2, 128), jnp.float32, 1))


def test_of_two_looks_at_the_ceilings_the_better_counts() -> None:
    assert Ceilings(1, 9, 3, "float32").best(Ceilings(2, 8, 3, "float32")) == Ceilings(2, 9, 3, "float32")


@pytest.fixture
def short_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_timing, "CHAIN", 2)


@pytest.mark.parametrize("kind", Chain)
def test_a_chain_goes_on_where_the_last_one_ended(kind: Chain) -> None:
    def step(state: jax.Array, index: jax.Array, operand: jax.Array) -> jax.Array:
        return state * operand + index.astype(jnp.float32)

    chain = jax.jit(repeat(step, 3, kind))
    carry = (jnp.int32(0), jnp.float32(1))
    for _ in range(2):
        carry = chain(carry, jnp.float32(2))
    want = 1.0
    for index in range(6):
        want = want * 2 + (index % 3 if kind is Chain.FIXED else index)
    assert int(carry[0]) == 6 and float(carry[1]) == want


def test_every_gather_of_a_chain_is_made() -> None:
    layout = kernels_blocks.make_layout(SMALL, TINY, None)
    pool = KVPool(*(noise(layout.shape, layout.dtype, i) for i in (1, 2)))
    case = kernels_blocks.move_case("gather_blocks", SMALL, layout, 2, pool)
    seen: list[int] = []

    def gather(pool: KVPool, layout: KVLayout, ids: jax.Array) -> KVPool:
        jax.debug.callback(lambda ids: seen.append(int(ids[0])), ids)
        return case.functions["xla"](pool, layout, ids)

    functions = {"xla": gather}
    compiled = compile_all(kernels_blocks.steps_of(case, functions), {"xla": Chain.LOOP})
    _, staging = compiled["xla"].chain((jnp.int32(0), KVPool(*map(jnp.array, case.state))), case.operands)
    jax.block_until_ready(staging)
    jax.effects_barrier()
    ids = np.asarray(case.operands[1])
    assert sorted(seen) == sorted(int(ids[2 * i % layout.num_blocks]) for i in range(16))
    last = ids[np.arange(30, 32) % layout.num_blocks]
    wanted = np.asarray(pool.k).reshape(layout.num_layers, -1, *layout.shape[1:])[:, last].swapaxes(0, 1)
    np.testing.assert_array_equal(staging.k, wanted)


@pytest.mark.usefixtures("short_chains")
def test_what_is_wrong_or_does_not_run_is_not_timed() -> None:
    def refuse(state: jax.Array, index: jax.Array, operand: jax.Array) -> jax.Array:
        raise TypeError("no such shape")

    steps = {
        "xla": (lambda x, i, y: x + y, jnp.ones(4), jnp.ones(4)),
        "close": (lambda x, i, y: x + y * jnp.float32(1.001), jnp.ones(4), jnp.ones(4)),
        "nan": (lambda x, i, y: x + y * jnp.float32(np.nan), jnp.ones(4), jnp.ones(4)),
        "refuse": (refuse, jnp.ones(4), jnp.ones(4)),
    }
    compiled = compile_all(steps)
    judged = judge(
        compiled, jnp.ones(4), dict.fromkeys(steps, jnp.ones(4)), dict.fromkeys(steps, 0), relative_error, 0.01
    )
    assert set(judged.right) == {"xla", "close"}
    assert judged.errors["close"] == pytest.approx(0.0005, rel=0.01)
    assert judged.faults["nan"].startswith("WRONG") and judged.faults["refuse"] == "TypeError: no such shape"


def test_a_long_call_is_not_chained() -> None:
    def call(*_: Any) -> jax.Array:
        raise AssertionError("chained")

    slow = Contender(lambda state, index, operands: state, call)
    stopwatch = Stopwatch(slow, None, long_s=0.0)
    state = stopwatch.settle(jnp.ones(2), 0.01)
    assert not stopwatch.is_chained and stopwatch.round(state)[1] == pytest.approx(stopwatch.single_s, abs=0.1)


CEILINGS = {"copy": 2e12, "read": 2.1e12, "matrix": 3e14, "dtype": "bfloat16"}
RESULTS = Results(
    command="python benchmarks/kernels.py",
    preset="full",
    date="2026-01-02",
    device="NVIDIA X",
    versions={"jax": "0.10.2"},
    ceilings={"decode": CEILINGS, "prefill": CEILINGS, "blocks": CEILINGS},
    rows=[
        Row("decode", "gpt-j-6b", "32 x 2048", "xla", 4e-3, 10**9, 10**10),
        Row("decode", "gpt-j-6b", "32 x 2048", "pallas", 6.25e-4, 10**9, 10**10, 2e-3),
        Row("prefill", "gpt-j-6b", "1 x 2048 of 2048", "pallas", 1e-3, 10**8, 15 * 10**10, 2e-3),
        Row("copy_blocks", "gpt-j-6b", "8 blocks", "pallas", note="WRONG: 3"),
    ],
    overlap=[{"what": "out beside copies", "share hidden": 0.75, "GB/s alone": 55.5}],
    steps=[{"what": "gpt-j-6b, pallas, 1 x 1024", "share of roofline": 0.7, "kernels": ["gemm 3.000 ms"]}],
    failures={"step": "ValueError: no"},
    load=5.5,
)


def test_the_table_tells_shares_and_ratios() -> None:
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in kernel_table(RESULTS).splitlines()[2:]]
    assert lines[1] == ["decode", "gpt-j-6b", "32 x 2048", "pallas", "625.0", "1600.0", "80%", "16.00", "5%",
                        "2.0e-03", "6.40", ""]  # fmt: skip
    assert lines[2][7:9] == ["150.00", "50%"]
    assert lines[3][4:] == ["", "", "", "", "", "", "", "WRONG: 3"] and RESULTS.rows[3].is_wrong


def test_aims_are_judged_by_their_worst_case() -> None:
    slow = Row("decode", "llama-3-8b", "64 x 8192", "pallas", 1e-3, 10**9, 10**10)
    small = Row("decode", "llama-3-8b", "1 x 8192", "pallas", 1.0, 10**9, 10**10)
    lines = aims_met(replace(RESULTS, rows=[*RESULTS.rows, slow, small]))
    assert lines == [
        "- decode, batch 32 and context 2048 or more: 1 of 2 cases reach 80% of the measured copy rate; "
        "the least is 50% (llama-3-8b, 64 x 8192)",
        "- prefill, chunks of 2048: 1 of 1 cases reach 45% of the measured matrix rate; the least is 50% "
        "(gpt-j-6b, 1 x 2048 of 2048)",
    ]


def test_results_are_saved_and_read_again(tmp_path: Path) -> None:
    paths = save(RESULTS, tmp_path)
    assert [path.name for path in paths] == ["kernels.json", "kernels.md", "kernels.svg"]
    assert Results.from_json(paths[0].read_text()) == RESULTS
    text = paths[1].read_text()
    assert "busy with other work, 5.5 processes a core" in text and "## Kernels\n\n- decode, batch 32" in text
    assert "| out beside copies | 75% | 55.5 |" in text and "gemm 3.000 ms" in text and "- step: ValueError: no" in text
    svg = paths[2].read_text()
    assert svg.startswith("<?xml") and svg.count("<use") > 4
    merged = replace(RESULTS, rows=[], overlap=[], steps=[], ceilings={}, failures={}, seconds={}, load=0.0)
    merged.merge(RESULTS)
    assert merged == RESULTS


@pytest.mark.usefixtures("short_chains")
def test_a_small_run_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = replace(TINY, batches=(2,), contexts=(32, 4096), prefills=(Prefill(1, 8, 16),), rounds=1)
    monkeypatch.setitem(PRESETS, "tiny", replace(preset, step=preset.step._replace(batches=(2,))))

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(kernels_blocks, "make_layout", fail)
    flags = ["--preset", "tiny", "--in-process", "--out", str(tmp_path), "--quiet"]
    assert kernels.main(flags) == 1  # for the section that fails
    results = Results.from_json((tmp_path / "kernels.json").read_text())
    assert results.failures == {"blocks": "RuntimeError: out of memory"}
    assert set(results.ceilings) == set(kernels.SECTIONS) == set(results.seconds)
    timed = [(row.kernel, row.case, row.implementation) for row in results.rows if row.seconds]
    assert ("decode", "2 x 32", "xla") in timed and ("prefill", "1 x 8 of 16", "xla") in timed
    assert all(row.seconds for row in results.rows if row.implementation)
    assert [(row.case, row.note) for row in results.rows if not row.implementation] == [
        ("2 x 4096", "does not fit the pool")
    ]
    assert len(results.overlap) == 4 and all(record["GB/s alone"] > 0 for record in results.overlap)
    assert results.steps and all(record["step ms"] > 0 for record in results.steps)
    assert "copy" in report(results) and (tmp_path / "kernels.svg").is_file()


@pytest.mark.usefixtures("short_chains")
def test_interpreted_kernels_are_checked_and_not_timed() -> None:
    preset = replace(TINY, batches=(2,), contexts=(32,), writes=(4,), moves=(), rounds=1)
    rows = list(kernels_attention.run_attention(preset, preset.steps("decode"), SOON, interpret_check=True))
    rows += list(kernels_blocks.run_blocks(preset, SOON, interpret_check=True))
    checked = [row for row in rows if row.implementation == "pallas interpreted"]
    assert [(row.kernel, row.seconds, row.note) for row in checked] == [
        ("decode", None, "checked only"),
        ("write_kv", None, "checked only"),
    ]
    assert 0 < checked[0].error < 1e-5 and checked[1].error == 0


def test_out_of_time_is_told() -> None:
    rows = list(kernels_attention.run_attention(TINY, TINY.steps("decode"), Deadline.after(0)))
    rows += list(kernels_blocks.run_blocks(TINY, Deadline.after(0)))
    assert len(rows) == 8 and {row.note for row in rows} == {"out of time"}


@pytest.mark.usefixtures("short_chains")
def test_moves_are_measured() -> None:
    preset = replace(TINY, writes=(), rounds=1)
    rows = [row for row in kernels_blocks.run_blocks(preset, SOON) if row.implementation == "xla"]
    assert [row.kernel for row in rows] == ["gather_blocks", "scatter_blocks", "copy_blocks"]
    assert all(row.seconds and row.bytes == 2 * 2 * 16 * 2 * 128 * 4 and not row.note for row in rows)


def test_sections_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.sections("step, decode") == ["step", "decode"]
    with pytest.raises(SystemExit):
        kernels.make_parser().parse_args(["--section", "decode,nothing"])
    assert "expected some of decode, prefill" in capsys.readouterr().err


def test_sections_run_apart_and_fail_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, float]] = []

    def run(command: list[str], *, check: bool, timeout: float) -> subprocess.CompletedProcess[str]:
        flags = dict(pairwise(command))
        section = flags["--section"]
        asked.append((section, float(flags["--budget"])))
        row = Row(section, "small", "1 x 16", "xla", 1e-3, 10, 10)
        found = replace(kernels.empty_results("tiny"), rows=[row], ceilings={section: CEILINGS}, device="NVIDIA X")
        if section != "blocks":
            (Path(flags["--out"]) / "kernels.json").write_text(found.to_json())
        if section == "prefill":
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, -11 if section == "blocks" else 0)

    monkeypatch.setattr(subprocess, "run", run)
    flags = ["--preset", "tiny", "--section", "decode,prefill,blocks", "--budget", "140", "--out", str(tmp_path)]
    assert kernels.main(flags) == 1
    results = Results.from_json((tmp_path / "kernels.json").read_text())
    assert [row.kernel for row in results.rows] == ["decode", "prefill"] and results.device == "NVIDIA X"
    assert results.failures == {
        "prefill": "out of time; what it had is in the table",
        "blocks": "the process ended with -11",
    }
    # Sections that take no time leave theirs to the others.
    assert asked == [
        (name, pytest.approx(want, abs=6)) for name, want in (("decode", 65), ("prefill", 75), ("blocks", 135))
    ]


def test_the_command_line_hands_its_flags_on(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], *, check: bool) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", run)
    assert cli.main(["bench", "kernels", "--preset", "quick", "--section", "decode", "--out", "x"]) == 1
    assert commands == [[sys.executable, kernels.__file__, "--preset=quick", "--section=decode", "--out=x"]]


# What only a GPU runs.


@pytest.mark.usefixtures("short_chains")
@pytest.mark.filterwarnings("ignore:.*paged_attention is deprecated:DeprecationWarning")
def test_a_kernel_that_the_device_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # what interprets here stands for the GPU's kernel
    monkeypatch.setattr(kernels_attention, "PEER_CONTEXT", 64)  # which the peer takes in 16 splits
    preset = replace(TINY, batches=(1,), contexts=(64,), writes=(4,), moves=(), rounds=1)
    decoded = {row.implementation: row for row in kernels_attention.run_attention(preset, preset.steps("decode"), SOON)}
    assert list(decoded) == ["xla", "pallas", "jax"]
    assert decoded["pallas"].seconds and 0 < decoded["pallas"].error < 1e-5 and not decoded["pallas"].note
    assert decoded["jax"].seconds is None and "divisible" in decoded["jax"].note
    written = {row.implementation: row for row in kernels_blocks.run_blocks(preset, SOON)}
    assert list(written) == ["xla", "pallas"] and written["pallas"].seconds and written["pallas"].error == 0


def make_group(contexts: tuple[int, ...] = (4096,), shape: Shape = LLAMA_70B, chunk: int = 1) -> Group:
    preset = replace(PRESETS["quick"], pool_bytes=32 << 20)
    steps = tuple(Prefill(2, chunk, context) for context in contexts)
    (group,) = make_groups(shape, preset, steps, kernels_attention.pool_rows(shape, preset, None))
    return group


@pytest.mark.parametrize("chunk", [1, 64])
def test_chains_of_pallas_attention_lower_for_cuda(chunk: int) -> None:
    group = make_group(chunk=chunk)
    pool = KVPool(*[jax.ShapeDtypeStruct(group.layout.shape, group.layout.dtype)] * 2)
    tables = np.arange(group.layout.num_blocks).reshape(2, -1)
    step = partial(kernels_attention.step, group, partial(ragged_paged_attention, tiles=None))
    text = lowered(repeat(step, 4), (jnp.int32(0), queries(group)), (pool, make_meta(group, 4096, tables)))
    assert ("decode_attention" if chunk == 1 else "prefill_attention") in text


@pytest.mark.filterwarnings("ignore:.*[Tt]riton.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*paged_attention is deprecated:DeprecationWarning")
def test_the_peer_gets_the_same_keys_and_lowers_for_cuda() -> None:
    group = make_group((2048,))
    pool = KVPool(*(noise(group.layout.shape, group.layout.dtype, i) for i in (1, 2)))
    tables = np.random.default_rng(0).permutation(group.layout.num_blocks).reshape(2, -1)
    meta = make_meta(group, 2048, tables)
    assert kernels_attention.takes_peer(group, 2048) and not kernels_attention.takes_peer(group, 512)
    pages = kernels_attention.make_pages(group, pool, meta, 2048)
    layers = kernels_attention.peer_layers(group, 2048)
    assert layers > 1
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), kernels_attention.page_shapes(group, 2048))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), pages) == shapes
    last = np.asarray(pool.k)[(group.layout.num_layers - 1) * group.layout.num_blocks + tables[1, 5]]
    np.testing.assert_array_equal(np.asarray(pages.k)[:, int(pages.tables[1, 5])], last)
    one_before = np.asarray(pool.v)[(group.layout.num_layers - 2) * group.layout.num_blocks + tables[0, 3]]
    np.testing.assert_array_equal(np.asarray(pages.v)[:, int(pages.tables[0, 3]) + 256], one_before)
    text = lowered(partial(kernels_attention.peer_step, group, layers), queries(group), jnp.int32(1), pages)
    assert "paged_attention" in text


def test_chains_of_pallas_moves_lower_for_cuda() -> None:
    layout = kernels_blocks.make_layout(SMALL, TINY, None)
    pool = KVPool(*(noise(layout.shape, layout.dtype, i) for i in (1, 2)))
    write = kernels_blocks.write_case(SMALL, layout, 4, pool)
    cases = [(write, write_kv_pallas)]
    for kernel, (_, pallas, _) in kernels_blocks.MOVES.items():
        cases.append((kernels_blocks.move_case(kernel, SMALL, layout, 2, pool), pallas))
    for case, function in cases:
        step = partial(case.step, case.layout, function)
        text = lowered(repeat(step, 4), (jnp.int32(0), case.state), case.operands)
        assert (case.kernel if case.kernel != "copy_blocks" else "scatter_blocks") in text
    assert write.functions["xla"].func is write_kv


def test_the_trace_of_a_device_is_summed_by_kernel(tmp_path: Path) -> None:
    events = [
        {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "/device:GPU:0"}},
        {"ph": "M", "pid": 2, "name": "process_name", "args": {"name": "/host:CPU"}},
        {"ph": "M", "pid": 1, "tid": 7, "name": "thread_name", "args": {"name": "Stream #13(Compute)"}},
        {"ph": "M", "pid": 1, "tid": 8, "name": "thread_name", "args": {"name": "XLA Modules"}},
        {"ph": "X", "pid": 1, "tid": 7, "name": "gemm_12", "dur": 30.0},
        {"ph": "X", "pid": 1, "tid": 7, "name": "gemm_3", "dur": 10.0},
        {"ph": "X", "pid": 1, "tid": 7, "name": "decode_attention", "dur": 50.0},
        {"ph": "X", "pid": 1, "tid": 8, "name": "jit_step", "dur": 99.0},
        {"ph": "X", "pid": 2, "tid": 7, "name": "python", "dur": 99.0},
        {},
    ]
    path = tmp_path / "host.trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    times = kernels_step.device_times(kernels_step.read_trace(path))
    assert times == [("decode_attention", pytest.approx(50e-6)), ("gemm", pytest.approx(40e-6))]


def test_a_runner_whose_executables_have_other_names_is_warmed_up_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    warmed: list[DeviceRunner] = []

    def warm_up(runner: DeviceRunner) -> None:
        warmed.append(runner)

    monkeypatch.setattr(DeviceRunner, "lowerings", lambda self: [])
    monkeypatch.setattr(DeviceRunner, "warm_up", warm_up)
    model = kernels_step.make_model(TINY.step, TINY, kernels_step.implementations("float32")[-1])
    runner = kernels_step.make_runner(model, TINY.step, 32, 16)
    assert warmed == [runner] and runner.config.max_model_len == 48


def test_a_context_that_does_not_fit_is_halved() -> None:
    step = PRESETS["full"].step
    assert kernels_step.fitting_context(step, 16, 2, 129 << 30) == 1024
    assert kernels_step.fitting_context(step, 16, 2, 72 << 30) == 512
    assert kernels_step.fitting_context(step, 16, 2, None) == 1024


# Tiles.


def test_tiles_are_found_by_family() -> None:
    assert tiles_for("NVIDIA A100-PCIE-40GB") == ENTRIES["NVIDIA A100"].tiles
    assert tiles_for("NVIDIA H200").programs == 264
    assert tiles_for("cpu") == tiles_for("NVIDIA A10G") == ENTRIES["default"].tiles
    assert all(entry.source for entry in ENTRIES.values())


def test_tiles_are_written_as_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    mine = TileEntry(
        AttentionTiles(Tile(16, 32, 2, 3), Tile(32, 64, 8, 1), Tile(128, 32, 8, 1), 99, 4), 'measured "here"'
    )
    write_tiles({**ENTRIES, "NVIDIA X": mine}, path)
    assert read_tiles(path) == {**ENTRIES, "NVIDIA X": mine}
    path.write_text(path.read_text().replace('"rows": 32', '"rows": 100'))
    with pytest.raises(ValueError, match=r"tiles.json: 'NVIDIA X': rows=100: expected a power of two"):
        read_tiles(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="expected sizes for 'default'"):
        read_tiles(path)


def test_tuning_takes_the_fastest_that_runs_everywhere() -> None:
    start, log = ENTRIES["default"].tiles, []
    asked: list[tuple[Prefill, list[int]]] = []

    def measure(
        case: Prefill, heads: tune_tiles.Wanted, wanted: Sequence[AttentionTiles], deadline: Deadline
    ) -> list[dict[AttentionTiles, float]]:
        asked.append((case, [dim for dim in (64, 128, 256) if heads(dim)]))

        def seconds(tiles: AttentionTiles) -> float:
            tile = tiles.decode if case.chunk == 1 else tiles.prefill if heads(128) else tiles.wide_prefill
            return 1e-6 * (tile.keys + tile.warps + tile.stages + abs(tiles.programs - 100) + tiles.max_splits)

        first = {tiles: seconds(tiles) for tiles in wanted}
        return [first, {tiles: spent for tiles, spent in first.items() if tiles.decode.stages > 1}]

    best = tune_tiles.choose(start, 100, measure, SOON, log)
    assert best.decode == Tile(16, 32, 2, 2) and best.prefill.keys == 32 and best.prefill.stages == 1
    assert (best.programs, best.max_splits) == (100, 8)
    assert best.wide_prefill.keys == 16 and best.wide_prefill.warps == 4
    every = [64, 128, 256]
    chunk = Prefill(1, 2048, 4096)
    assert asked == [(Prefill(32, 1, 2048), every), (chunk, [64, 128]), (chunk, [256]),
                     (Prefill(1, 1, 8192), every), (Prefill(8, 1, 4096), every)]  # fmt: skip
    assert sum(line.startswith("- chosen for") for line in log) == 4
    assert "chosen for decode" in tune_tiles.make_entry(best, "0.11.2", log).source
    assert tune_tiles.choose(start, 100, measure, Deadline.after(0), []) == start


@pytest.mark.usefixtures("short_chains")
def test_candidates_that_fail_or_differ_are_out(monkeypatch: pytest.MonkeyPatch) -> None:
    preset = replace(TINY, rounds=1)
    (group,) = make_groups(SMALL, preset, (Prefill(2, 1, 32),), 64)
    pool = KVPool(*(noise((64, 2, 16, 32), jnp.float32, i) for i in (1, 2)))
    default = ENTRIES["default"].tiles
    wanted = [default, *(replace(default, decode=Tile(16, keys, 2, 1)) for keys in (16, 32, 64))]

    def attend(q: jax.Array, *_: object, tiles: AttentionTiles, scoring: Scoring) -> jax.Array:
        if tiles == wanted[1]:
            raise ValueError("too much shared memory")
        return q * jnp.float32(scoring.scale * (1.1 if tiles == wanted[2] else 1))

    monkeypatch.setattr(ragged_attention, "ragged_paged_attention", attend)
    monkeypatch.setattr(tune_tiles, "AT_ONCE", 2)
    found = tune_tiles.measure_group(group, 32, pool, wanted, preset, SOON)
    assert list(found) == [wanted[0], wanted[3]] and all(spent > 0 for spent in found.values())
