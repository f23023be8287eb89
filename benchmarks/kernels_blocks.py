"""Section `blocks`: write_kv, gather_blocks, scatter_blocks and copy_blocks, checked to the bit and timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernels_cases import Preset, Shape, Work, move_work, write_work
from benchmarks.kernels_report import INTERPRETED, Row, reason
from benchmarks.kernels_timing import (
    Chain,
    Contender,
    Deadline,
    Judged,
    Step,
    compare,
    compile_all,
    judge,
    memory_limit,
    noise,
    parts_of,
)
from jaxcept_kernels.attention import Implementation, write_kv
from jaxcept_kernels.blocks import copy_blocks, gather_blocks, scatter_blocks
from jaxcept_kernels.layout import AttentionMetadata, KVLayout, KVPool
from jaxcept_kernels.library import native_available
from jaxcept_kernels.pallas.blocks import copy_blocks_pallas, gather_blocks_pallas, scatter_blocks_pallas
from jaxcept_kernels.pallas.write_kv import write_kv_pallas

MOVED_POOL_SHARE = 1 / 8  # of the device's memory; a check holds the pool three times

Function = Callable[..., KVPool]


class Case(NamedTuple):
    """One call: what it works on, and the implementations of it, the reference first."""

    kernel: str
    shape: Shape
    size: int  # tokens or blocks
    work: Work
    layout: KVLayout
    state: KVPool  # what a call takes and returns
    operands: Any
    functions: dict[str, Function]
    step: Callable[..., KVPool]  # (layout, function, state, index, operands) → state


def run_blocks(preset: Preset, deadline: Deadline, interpret_check: bool = False) -> Iterator[Row]:
    """Rows as they come, shape by shape, each shape within its part of the time."""
    for shape, until in parts_of(deadline, preset.shapes):
        layout = make_layout(shape, preset, memory_limit(jax.devices()[0]))
        pool = make_pool(layout)
        for make in makers(shape, preset, layout):
            case = make(pool)
            if until.left_s <= 0:
                yield Row(case.kernel, shape.name, case_name(case), "", note="out of time")
                continue
            if interpret_check:
                yield check_interpreted(case)
            try:
                rows, pool = run_case(case, pool, preset)
                yield from rows
            except Exception as error:  # the pool may be gone with it
                yield Row(case.kernel, shape.name, case_name(case), "", note=reason(error))
                del case, pool
                pool = make_pool(layout)
        del pool


def make_pool(layout: KVLayout) -> KVPool:
    """A pool of random numbers."""
    return KVPool(*(noise(layout.shape, layout.dtype, i) for i in (1, 2)))


def make_layout(shape: Shape, preset: Preset, limit: int | None) -> KVLayout:
    """A pool with all layers of the model and as many blocks as preset and device allow."""
    dtype = jnp.dtype(preset.dtype)
    room = preset.moved_pool_bytes if limit is None else min(preset.moved_pool_bytes, int(limit * MOVED_POOL_SHARE))
    one = KVLayout(shape.layers, 1, preset.block_size, shape.kv_heads, shape.head_dim, dtype)
    blocks = max(room // one.block_bytes, 2)
    return KVLayout(shape.layers, blocks, preset.block_size, shape.kv_heads, shape.head_dim, dtype)


def makers(shape: Shape, preset: Preset, layout: KVLayout) -> Iterator[Callable[[KVPool], Case]]:
    """What makes each case from the pool at hand."""
    for tokens in preset.writes:
        if tokens <= layout.num_blocks * layout.block_size:
            yield partial(write_case, shape, layout, tokens)
    for kernel in ("gather_blocks", "scatter_blocks", "copy_blocks"):
        for blocks in preset.moves:
            if 2 * blocks <= layout.num_blocks:
                yield partial(move_case, kernel, shape, layout, blocks)


def run_case(case: Case, pool: KVPool, preset: Preset) -> tuple[list[Row], KVPool]:
    """A row for each implementation, and the pool, which the case may have taken over."""
    # A gather's result is not what the next one works on: only a loop keeps them all.
    chain = {"write_kv": Chain.FIXED, "gather_blocks": Chain.LOOP}.get(case.kernel, Chain.LAYERS)
    compiled = compile_all(steps_of(case, case.functions), dict.fromkeys(case.functions, chain))
    judged = judge_case(case, compiled)
    state, seconds = compare(judged.right, case.state, preset.rounds, preset.round_s)
    is_in_place = case.kernel != "gather_blocks"
    rows = []
    for name, contender in compiled.items():
        error, note = judged.errors.get(name), judged.faults.get(name, "")
        if is_in_place and not note and isinstance(contender, Contender):
            note = pool_copied(contender, pool_bytes=2 * math.prod(case.layout.shape) * case.layout.dtype.itemsize)
        rows.append(
            Row(case.kernel, case.shape.name, case_name(case), name, seconds.get(name), *case.work, error, note)
        )
    return rows, state if is_in_place else pool


def steps_of(case: Case, functions: dict[str, Function]) -> dict[str, tuple[Step, Any, Any]]:
    """What is compiled for each implementation."""
    return {
        name: (partial(case.step, case.layout, each), case.state, case.operands) for name, each in functions.items()
    }


def judge_case(case: Case, compiled: dict[str, Contender | Exception]) -> Judged:
    """Every bit counts. Calls are chained at any length: only with a donated state do they work in place."""
    operands, index = dict.fromkeys(compiled, case.operands), dict.fromkeys(compiled, 1)
    return judge(compiled, case.state, operands, index, differing, 0.0, math.inf)


def pool_copied(contender: Contender, pool_bytes: int) -> str:
    """A note where the chain holds a second copy of what should stay in place."""
    compiled: Any = contender.chain
    memory = compiled.memory_analysis()
    return "copies the pool" if memory is not None and memory.temp_size_in_bytes >= pool_bytes // 2 else ""


@jax.jit
def differing(got: KVPool, want: KVPool) -> jax.Array:
    """How many elements differ in their bits."""
    bits = jnp.uint32 if got.k.dtype.itemsize == 4 else jnp.uint16
    pairs = zip(got, want, strict=True)
    counts = [
        jnp.sum(jax.lax.bitcast_convert_type(a, bits) != jax.lax.bitcast_convert_type(b, bits), dtype=jnp.float32)
        for a, b in pairs
    ]
    return sum(counts, start=jnp.float32(0))


# Writes: the step's new keys and values, layer after layer.


def write_case(shape: Shape, layout: KVLayout, tokens: int, pool: KVPool) -> Case:
    """New tokens in slots that lie scattered over a layer."""
    rng = np.random.default_rng(tokens)
    slots = jnp.asarray(rng.permutation(layout.num_blocks * layout.block_size)[:tokens], jnp.int32)
    none = jnp.zeros(1, jnp.int32)
    meta = AttentionMetadata(slots, slots, none, none, none.reshape(1, 1))
    fresh = [noise((tokens, shape.kv_heads, shape.head_dim), layout.dtype, i) for i in (4, 5)]
    functions: dict[str, Function] = {"xla": partial(write_kv, implementation=Implementation.XLA)}
    if jax.default_backend() == "gpu":
        functions["pallas"] = write_kv_pallas
    elif layout.dtype == jnp.float32 and native_available():
        functions["native"] = partial(write_kv, implementation=Implementation.NATIVE)
    work = write_work(shape, tokens, layout.dtype.itemsize)
    return Case("write_kv", shape, tokens, work, layout, pool, (*fresh, meta), functions, write_step)


def write_step(layout: KVLayout, function: Function, pool: KVPool, index: jax.Array, operands: Any) -> KVPool:
    """One layer's write."""
    k, v, meta = operands
    return function(pool, k, v, meta, layout, index % jnp.int32(layout.num_layers))


# Moves: each call takes blocks next to those of the one before, so that no cache holds them.


def move_case(kernel: str, shape: Shape, layout: KVLayout, blocks: int, pool: KVPool) -> Case:
    """Whole blocks, scattered over the pool."""
    ids = jnp.asarray(np.random.default_rng(blocks).permutation(layout.num_blocks), jnp.int32)
    work = move_work(shape, blocks, layout.block_size, layout.dtype.itemsize)
    staged_shape = (blocks, layout.num_layers, *layout.shape[1:])
    staging = KVPool(*(noise(staged_shape, layout.dtype, i) for i in (6, 7)))
    plain, pallas, step = MOVES[kernel]
    functions: dict[str, Function] = {"xla": plain}
    if jax.default_backend() == "gpu":
        functions["pallas"] = pallas
    if kernel == "gather_blocks":
        return Case(kernel, shape, blocks, work, layout, staging, (pool, ids), functions, step)
    operands = (staging, ids) if kernel == "scatter_blocks" else (ids[:blocks], ids)
    return Case(kernel, shape, blocks, work, layout, pool, operands, functions, step)


def chosen(layout: KVLayout, ids: jax.Array, count: int, index: jax.Array) -> jax.Array:
    """The call's blocks: a run of the shuffled ids that begins further on with each call."""
    places = (index * jnp.int32(count) + jnp.arange(count, dtype=jnp.int32)) % jnp.int32(layout.num_blocks)
    return ids[places]


def gather_step(layout: KVLayout, function: Function, staging: KVPool, index: jax.Array, operands: Any) -> KVPool:
    """Blocks out of the pool; what was staged before is given up."""
    pool, ids = operands
    return function(pool, layout, chosen(layout, ids, staging.k.shape[0], index))


def scatter_step(layout: KVLayout, function: Function, pool: KVPool, index: jax.Array, operands: Any) -> KVPool:
    """The staged blocks into the pool."""
    staging, ids = operands
    return function(pool, layout, chosen(layout, ids, staging.k.shape[0], index), staging)


def copy_step(layout: KVLayout, function: Function, pool: KVPool, index: jax.Array, operands: Any) -> KVPool:
    """Blocks to the places of others."""
    sized, ids = operands
    count = sized.shape[0]
    source = chosen(layout, ids, count, index * jnp.int32(2))
    target = chosen(layout, ids, count, index * jnp.int32(2) + jnp.int32(1))
    return function(pool, layout, source, target)


MOVES: dict[str, tuple[Function, Function, Callable[..., KVPool]]] = {
    "gather_blocks": (gather_blocks, gather_blocks_pallas, gather_step),
    "scatter_blocks": (scatter_blocks, scatter_blocks_pallas, scatter_step),
    "copy_blocks": (copy_blocks, copy_blocks_pallas, copy_step),
}


def check_interpreted(case: Case) -> Row:
    """The Pallas kernel, interpreted, against the reference; not timed."""
    function = write_kv_pallas if case.kernel == "write_kv" else MOVES[case.kernel][1]
    functions = {"xla": case.functions["xla"], INTERPRETED: function}
    judged = judge_case(case, compile_all(steps_of(case, functions), is_timed=False))
    note = judged.faults.get(INTERPRETED, "checked only")
    error = judged.errors.get(INTERPRETED)
    return Row(case.kernel, case.shape.name, case_name(case), INTERPRETED, error=error, note=note)


def case_name(case: Case) -> str:
    """How tables name a case."""
    return f"{case.size} {'tokens' if case.kernel == 'write_kv' else 'blocks'}"
