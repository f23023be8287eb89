"""How a compiled program is judged, and what is compiled; nothing is compiled here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import pytest
from checkpoints import build_checkpoint
from jax.sharding import SingleDeviceSharding

from benchmarks.gpu_offline_kernels import CASES, HEAD_DIMS, POOL_BYTES, kernels
from benchmarks.gpu_offline_report import (
    Kernel,
    Program,
    count_all_reduces,
    count_launches,
    faults,
    loads_ahead,
    pool_copies,
    read_kernels,
    read_target,
    table,
)
from jaxcept.runner.runner import DeviceRunner, RunnerConfig
from jaxcept_kernels.attention import Implementation
from jaxcept_models.model import load_model

TARGETS = Path(__file__).parent.parent / "targets"
POOL = "bf16[64,2,16,8]"
ELEMENTS = 64 * 2 * 16 * 8

PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'attention' for 'sm_80'
ptxas info    : Function properties for attention
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 126 registers, used 1 barriers, 16 bytes stack, 256 bytes smem, 424 bytes cmem[0]
ptxas info    : Compiling entry function 'loop_add' for 'sm_80'
ptxas info    : Function properties for loop_add
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers, 368 bytes cmem[0]
"""
LAUNCHES = """003: kCustomKernel [source] loop_add grid: [1, 1, 1] threads: [64, 1, 1]  shared_memory: 0 bytes
004: kCustomKernel [source] attention grid: [9, 1, 1] threads: [64, 1, 1]  shared_memory: 4096 bytes
005: kCustomKernel [source] attention_1 grid: [9, 1, 1] threads: [64, 1, 1]  shared_memory: 8192 bytes
"""
SOUND = Program(
    jax="0.10.2",
    target="a100",
    model="small",
    what="step 1",
    num_layers=2,
    num_devices=1,
    compile_s=1.0,
    memory_bytes=1000,
    shared_limit=4352,
    argument_bytes=700,
    output_bytes=600,
    alias_bytes=500,
    temp_bytes=200,
    pool_bytes=500,
    all_reduces=0,
    pool_copies=(),
    kernels=(Kernel("attention", 126, 0, 4352),),
)


@pytest.mark.parametrize(
    "instruction",
    [
        f"%copy.1 = {POOL}{{3,2,1,0}} copy(%p)",
        f"%copy-start.2 = ({POOL}{{3,2,1,0:S(5)}}, {POOL}{{3,2,1,0}}, u32[]) copy-start(%p)",
        f"ROOT %flat.3 = bf16[{ELEMENTS}]{{0}} select(%mask, %new, %old)",
        f"%wide.4 = f32[64,2,16,8]{{3,2,1,0}} convert({POOL} %p)",
    ],
)
def test_what_writes_the_whole_pool_is_a_copy(instruction: str):
    assert len(pool_copies(f"ENTRY %main {{\n  {instruction}\n}}", ELEMENTS)) == 1


@pytest.mark.parametrize(
    "instruction",
    [
        f"%p.0 = {POOL}{{3,2,1,0}} parameter(0)",
        f"%put = {POOL}{{3,2,1,0}} scatter(%p, %slots, %rows), to_apply=%copy_of",
        f"%write = ({POOL}{{3,2,1,0}}, {POOL}{{3,2,1,0}}) fusion(%p, %k), kind=kInput, calls=%copy",
        f"%layer = {POOL}{{3,2,1,0}} custom-call(%p, %k), output_to_operand_aliasing={{{{}}: (0, {{}})}}",
        "%copy.5 = bf16[64,2,16,4]{3,2,1,0} copy(%part)",
        "// copy(%p) = nothing",
    ],
)
def test_what_writes_in_place_is_none(instruction: str):
    assert not pool_copies(f"ENTRY %main {{\n  {instruction}\n}}", ELEMENTS)


def test_an_all_reduce_counts_once():
    hlo = "%a = f32[8] all-reduce-start(%x)\n%b = f32[8] all-reduce-done(%a)\n%c = f32[8] all-reduce(%y)\n"
    assert count_all_reduces(hlo) == 2


def test_loads_ahead_are_what_a_loop_leaves_under_way():
    ptx = """.visible .entry first(
    cp.async.wait_group 0;
$L__BB0_1:
    cp.async.wait_group 3;
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {};
    cp.async.commit_group;
    cp.async.wait_group 2;
    @%p1 bra $L__BB0_1;
    cp.async.wait_group 0;
.visible .entry second(
    @%p1 bra $L__BB1_2;
    cp.async.wait_group 0;
$L__BB1_2:
    ret;
.visible .entry third(
$L__BB2_1:
    cp.async.wait_group 0;
    bra.uni $L__BB2_1;
.visible .entry unrolled(
    cp.async.wait_group 2;
    cp.async.wait_group 1;
    cp.async.wait_group 0;
"""
    assert loads_ahead(ptx) == {"first": 2, "third": 0, "unrolled": 1}


def test_launches_are_counted_and_loops():
    thunks = """000: kCommandBuffer [source | sink]
    001: kCopy         [source | sink] kCopy
    002: kCustomKernel [source | sink] loop_add grid: [1, 1, 1] threads: [1, 1, 1]  shared_memory: 0 bytes
003: kWhile        [source | sink]
condition:
    004: kCustomKernel [source | sink] compare grid: [1, 1, 1] threads: [1, 1, 1]  shared_memory: 0 bytes
"""
    assert count_launches(thunks) == (3, 1)
    assert not faults(replace(SOUND, loops=1)), "XLA's steps may loop"
    assert "1 loops" in faults(replace(SOUND, loops=1, what="step 1 pallas"))[0]


def test_kernels_are_read_from_both_texts():
    kernels = read_kernels(PTXAS, LAUNCHES, {"attention": 3})
    assert kernels == (
        Kernel("attention", 126, 20, 4352, 3),
        Kernel("loop_add", 12, 0, 0),
        Kernel("attention_1", 0, 0, 8192),
    )


def test_a_kernel_without_figures_is_an_error():
    with pytest.raises(ValueError, match="attention"):
        read_kernels("ptxas info : Compiling entry function 'attention' for 'sm_80'\n", "", {})


def test_a_sound_program_has_no_faults():
    assert SOUND.peak_bytes == 1000
    assert faults(SOUND) == []


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"pool_copies": ("copy copy.1",)}, "copy.1"),
        ({"alias_bytes": 499, "output_bytes": 599}, "1 of the KV pool's 500 bytes"),
        ({"kernels": (Kernel("attention", 0, 0, 64),)}, "no kernel's registers"),
        ({"kernels": (Kernel("attention", 255, 4, 0),)}, "attention spills 4 bytes"),
        ({"kernels": (Kernel("sort_1", 40, 12, 0),)}, "sort_1 spills 12 bytes"),
        ({"kernels": (Kernel("attention", 126, 0, 4353),)}, "4,353 bytes of shared memory"),
        ({"kernels": (Kernel("decode_attention", 126, 0, 0, 0),)}, "decode_attention waits for all its loads"),
        ({"kernels": (Kernel("grouped_linear", 126, 0, 0),)}, "grouped_linear waits for all its loads"),
        ({"num_devices": 4, "all_reduces": 6}, "6 all-reduces"),
        ({"temp_bytes": 201}, "takes 1,001 bytes"),
    ],
)
def test_each_fault_fails_and_is_named(change: dict[str, object], names: str):
    found = faults(replace(SOUND, **change))  # type: ignore[arg-type]
    assert len(found) == 1 and names in found[0]
    assert found[0].startswith("jax 0.10.2, a100")


def test_what_is_allowed_is_no_fault():
    assert not faults(replace(SOUND, num_devices=4, all_reduces=5))
    assert not faults(replace(SOUND, kernels=(Kernel("sort_1", 40, 8, 0),)))
    assert not faults(replace(SOUND, kernels=(Kernel("decode_attention", 126, 0, 0, 3),)))


def test_the_shipped_targets_are_read():
    a100 = read_target("a100", (TARGETS / "a100.txtpb").read_text())
    assert (a100.architecture, a100.shared_limit) == ("sm_80", 166_912)
    assert read_target("h200", (TARGETS / "h200.txtpb").read_text()).architecture == "sm_90"
    with pytest.raises(ValueError, match="device_memory_size"):
        read_target("empty", "major: 8 minor: 0")


def test_the_table_has_a_line_for_each_program():
    lines = table([SOUND, replace(SOUND, num_devices=4)]).splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert "126 (attention)" in lines[2] and "4 x a100" in lines[3]


def test_the_kernels_cover_what_they_are_made_for():
    """Head sizes, block sizes and dtypes, each with a pool of its own that is large enough for a copy of it to show."""
    programs = list(kernels(SingleDeviceSharding(jax.devices()[0])))
    assert len({program.what for program in programs}) == len(programs)
    for dtype, block_sizes in (("bfloat16", {16, 32, 64}), ("float16", {16}), ("float32", {16})):
        found = {(case.head_dim, case.block_size) for case in CASES if case.dtype == dtype}
        assert found == {(head_dim, size) for head_dim in HEAD_DIMS for size in block_sizes}
    for program in programs:
        size = program.layout.num_blocks * program.layout.block_bytes
        assert 0.99 * POOL_BYTES < size <= POOL_BYTES


def test_a_runner_of_shapes_lowers_everything_and_holds_no_pool(tmp_path: Path):
    model = load_model(build_checkpoint("llama31", tmp_path), dtype="float32", implementation=Implementation.PALLAS)
    config = RunnerConfig(1 << 24, 16, 2, 2, 32, num_host_blocks=1)  # a pool of 256 GiB
    runner = DeviceRunner(model, config, shapes_on=SingleDeviceSharding(jax.devices()[0]))
    jobs = {what: lower for what, _, lower in runner.lowerings()}
    assert {"step 2", "copy", "swap out 8", "swap in 8", "sample 2 greedy"} <= set(jobs)
    for what in ("step 2", "copy"):
        assert f"{runner.layout.shape[0]}x2x16x16xf32" in jobs[what]().as_text()
