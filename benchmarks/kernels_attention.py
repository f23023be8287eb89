"""Sections `decode` and `prefill`: one layer's attention over a paged pool, of every implementation, checked and timed.

All cases of a shape share one pool that fills most of the device. Its rows are seen as many layers of the blocks that a
batch needs; calls go from layer to layer, so that no cache holds what they read. Block tables have room for the longest
context, as an engine's have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernels_cases import Prefill, Preset, Shape, attention_work
from benchmarks.kernels_report import INTERPRETED, Row, reason
from benchmarks.kernels_timing import (
    CACHE_BYTES,
    Chain,
    Contender,
    Deadline,
    Step,
    compare,
    compile_all,
    judge,
    memory_limit,
    noise,
    parts_of,
    relative_error,
)
from jaxcept_kernels.attention import Implementation, paged_attention
from jaxcept_kernels.layout import AttentionMetadata, KVLayout, KVPool
from jaxcept_kernels.library import native_available
from jaxcept_kernels.pallas.ragged_attention import ragged_paged_attention
from jaxcept_kernels.pallas.tiles import AttentionTiles
from jaxcept_kernels.scoring import Scoring

POOL_SHARE = 0.7  # of the device's memory
PEER_BYTES = 8 << 30  # of the copy of the pool that the peer's own layout needs
PEER_CONTEXT = 2048  # tokens from which on the peer, whose sizes are compiled in, is compiled
PEER = "jax"
PEER_SPLITS, PEER_PROGRAMS = 16, 256  # splits of a context where there are fewer programs without
# Both sides of a comparison are rounded, so it allows twice what each of them may be off.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1.6e-2, "float16": 4e-3}

Attention = Callable[..., jax.Array]


class Group(NamedTuple):
    """Cases that share executables: so many new tokens of so many sequences, in contexts of any length."""

    shape: Shape
    sequences: int
    chunk: int
    contexts: tuple[int, ...]
    layout: KVLayout
    columns: int  # of the block tables

    @property
    def kernel(self) -> str:
        """Name of the launch that computes."""
        return "decode" if self.chunk == 1 else "prefill"

    @property
    def scale(self) -> float:
        """Of the scores."""
        return float(self.shape.head_dim**-0.5)


def run_attention(
    preset: Preset, steps: tuple[Prefill, ...], deadline: Deadline, interpret_check: bool = False
) -> Iterator[Row]:
    """Rows as they come, shape by shape, each shape within its part of the time."""
    dtype = jnp.dtype(preset.dtype)
    for shape, until in parts_of(deadline, preset.shapes):
        rows = pool_rows(shape, preset, memory_limit(jax.devices()[0]))
        pool = KVPool(*(noise((rows, shape.kv_heads, preset.block_size, shape.head_dim), dtype, i) for i in (1, 2)))
        for group in make_groups(shape, preset, steps, rows):
            if until.left_s <= 0:
                yield from (skipped(group, context, "out of time") for context in group.contexts)
                continue
            yield from run_group(group, pool, preset, until, interpret_check)
        yield from too_large(shape, preset, steps, rows)
        del pool


def pool_rows(shape: Shape, preset: Preset, limit: int | None) -> int:
    """The largest power of two of blocks (of one layer) that preset and device allow."""
    room = preset.pool_bytes if limit is None else min(preset.pool_bytes, int(limit * POOL_SHARE))
    block = preset.block_size * shape.token_bytes * jnp.dtype(preset.dtype).itemsize
    return 1 << max(0, (room // block).bit_length() - 1)


def make_groups(shape: Shape, preset: Preset, steps: tuple[Prefill, ...], rows: int) -> Iterator[Group]:
    """The steps by what they share, in their order. The pool's rows are a whole number of layers of each group."""
    longest = max(step.context for step in steps)
    for sequences, chunk in dict.fromkeys((step.sequences, step.chunk) for step in steps):
        columns = 1 << (min(-(-longest // preset.block_size), rows // sequences)).bit_length() - 1
        contexts = tuple(
            step.context
            for step in steps
            if step[:2] == (sequences, chunk) and step.context <= columns * preset.block_size
        )
        if columns and contexts:
            blocks = columns * sequences
            sizes = (rows // blocks, blocks, preset.block_size, shape.kv_heads, shape.head_dim)
            yield Group(shape, sequences, chunk, contexts, KVLayout(*sizes, jnp.dtype(preset.dtype)), columns)


def too_large(shape: Shape, preset: Preset, steps: tuple[Prefill, ...], rows: int) -> Iterator[Row]:
    """Rows of the cases that no group has."""
    held = {(g.sequences, g.chunk, c) for g in make_groups(shape, preset, steps, rows) for c in g.contexts}
    for step in steps:
        if tuple(step) not in held:
            kernel = "decode" if step.chunk == 1 else "prefill"
            yield Row(kernel, shape.name, case_name(*step), "", note="does not fit the pool")


def run_group(
    group: Group, pool: KVPool, preset: Preset, until: Deadline, interpret_check: bool = False
) -> Iterator[Row]:
    """Compiles the group's implementations, then checks and times each of its contexts."""
    rng = np.random.default_rng(0)
    tables = rng.permutation(group.layout.num_blocks).reshape(group.sequences, group.columns)
    q = queries(group)
    meta = {context: make_meta(group, context, tables) for context in group.contexts}
    first = meta[group.contexts[0]]
    ours = {name: partial(step, group, attend) for name, attend in attentions(group.layout).items()}
    steps: dict[str, tuple[Step, Any, Any]] = {name: (each, q, (pool, first)) for name, each in ours.items()}
    if jax.default_backend() == "gpu":
        for context in filter(partial(takes_peer, group), group.contexts):
            steps[f"{PEER} {context}"] = (
                partial(peer_step, group, peer_layers(group, context)),
                q,
                page_shapes(group, context),
            )
    # Loops compile many times faster; what they add to these two's time is little.
    loops = {name: Chain.LOOP for name in steps if name == "xla" or name.startswith(PEER)}
    compiled = compile_all(steps, loops)
    for context in group.contexts:
        if until.left_s <= 0:
            yield skipped(group, context, "out of time")
            continue
        contenders = {name: compiled[name] for name in ours}
        operands: dict[str, Any] = dict.fromkeys(ours, (pool, meta[context]))
        try:
            if f"{PEER} {context}" in compiled:
                contenders[PEER] = compiled[f"{PEER} {context}"]
                operands[PEER] = make_pages(group, pool, meta[context], context)
            yield from run_case(group, context, q, contenders, operands, preset)
        except Exception as error:  # no memory, for one; other cases may need less
            yield skipped(group, context, reason(error))
        if interpret_check:
            yield check_interpreted(group, context, q, (pool, meta[context]))


def run_case(
    group: Group,
    context: int,
    q: jax.Array,
    contenders: dict[str, Contender | Exception],
    operands: dict[str, Any],
    preset: Preset,
) -> Iterator[Row]:
    """A row for each implementation, the reference first. What is wrong is not timed."""
    # The last layer lies furthest from the pool's begin; the peer's pages hold it as their first.
    index = {name: 0 if name == PEER else group.layout.num_layers - 1 for name in contenders}
    judged = judge(contenders, q, operands, index, relative_error, TOLERANCE[preset.dtype])
    _, seconds = compare(judged.right, jnp.array(q, copy=True), preset.rounds, preset.round_s)
    work = attention_work(group.shape, Prefill(group.sequences, group.chunk, context), group.layout.dtype.itemsize)
    case = case_name(group.sequences, group.chunk, context)
    for name in contenders:
        error, note = judged.errors.get(name), judged.faults.get(name, "")
        yield Row(group.kernel, group.shape.name, case, name, seconds.get(name), *work, error, note)


def attentions(layout: KVLayout, tiles: AttentionTiles | None = None) -> dict[str, Attention]:
    """What can run here, the reference first. Interpreted kernels are not among them."""
    found: dict[str, Attention] = {"xla": partial(paged_attention, implementation=Implementation.XLA)}
    if jax.default_backend() == "gpu":
        found["pallas"] = partial(ragged_paged_attention, tiles=tiles)
    elif layout.dtype == jnp.float32 and native_available():
        found["native"] = partial(paged_attention, implementation=Implementation.NATIVE)
    return found


def step(group: Group, attend: Attention, q: jax.Array, index: jax.Array, operands: Any) -> jax.Array:
    """One layer's attention; its result is the next one's queries."""
    pool, meta = operands
    layer = index % jnp.int32(group.layout.num_layers)
    return attend(q, pool, meta, group.layout, layer, scoring=Scoring(group.scale))


def queries(group: Group) -> jax.Array:
    """Large enough that some keys weigh much more than others."""
    q = noise((group.sequences * group.chunk, group.shape.heads, group.shape.head_dim), group.layout.dtype, 3)
    return q * jnp.asarray(6, q.dtype)


def make_meta(group: Group, context: int, tables: np.ndarray) -> AttentionMetadata:
    """The last `chunk` tokens of contexts of one length."""
    size = group.layout.block_size
    positions = np.tile(np.arange(context - group.chunk, context), (group.sequences, 1))
    slots = np.take_along_axis(tables, positions // size, axis=1) * size + positions % size
    starts = np.arange(group.sequences + 1) * group.chunk
    lengths = np.full(group.sequences, context)
    columns = (positions.reshape(-1), slots.reshape(-1), starts, lengths, tables)
    return AttentionMetadata(*(jnp.asarray(column, jnp.int32) for column in columns))


# The peer: jax.experimental.pallas.ops.gpu.paged_attention, for decodes alone.


class Pages(NamedTuple):
    """A part of the pool in the peer's layout."""

    k: jax.Array  # [kv_heads, pages, block_size, head_dim]
    v: jax.Array
    tables: jax.Array  # [sequences, pages of a context] int32
    lengths: jax.Array  # [sequences] int32


def takes_peer(group: Group, context: int) -> bool:
    """Whether the peer is compared on this case."""
    case_bytes = group.sequences * context * group.shape.token_bytes * group.layout.dtype.itemsize
    return group.chunk == 1 and context >= PEER_CONTEXT and case_bytes <= PEER_BYTES


def peer_layers(group: Group, context: int) -> int:
    """How many layers its pages hold, so that no cache holds them."""
    case_bytes = group.sequences * context * group.shape.token_bytes * group.layout.dtype.itemsize
    return max(1, min(16, group.layout.num_layers, PEER_BYTES // case_bytes, 4 * CACHE_BYTES // case_bytes))


def page_shapes(group: Group, context: int) -> Pages:
    """What `make_pages` returns, without its contents."""
    used = -(-context // group.layout.block_size)
    count = peer_layers(group, context) * group.sequences * used
    size = (group.layout.num_kv_heads, count, group.layout.block_size, group.layout.head_dim)
    part: Any = jax.ShapeDtypeStruct(size, group.layout.dtype)
    tables: Any = jax.ShapeDtypeStruct((group.sequences, used), jnp.int32)
    lengths: Any = jax.ShapeDtypeStruct((group.sequences,), jnp.int32)
    return Pages(part, part, tables, lengths)


def make_pages(group: Group, pool: KVPool, meta: AttentionMetadata, context: int) -> Pages:
    """Some layers' blocks in random order, the last layer of the pool first."""
    layout, layers = group.layout, peer_layers(group, context)
    used = -(-context // layout.block_size)
    which = layout.num_layers - 1 - np.arange(layers)
    rows = np.asarray(meta.block_tables)[None, :, :used] + which[:, None, None] * layout.num_blocks
    count = group.sequences * used
    order = np.random.default_rng(1).permutation(
        count
    )  # the same in each layer, whose tables differ by their first page
    places = np.argsort(order).reshape(group.sequences, used)

    @jax.jit
    def pages_of(part: jax.Array, rows: jax.Array) -> jax.Array:
        return jnp.swapaxes(part[rows], 0, 1)

    chosen = jnp.asarray(rows.reshape(layers, count)[:, order].reshape(-1), jnp.int32)
    parts = [pages_of(part, chosen) for part in pool]
    return Pages(parts[0], parts[1], jnp.asarray(places, jnp.int32), meta.context_len)


def peer_step(group: Group, layers: int, q: jax.Array, index: jax.Array, pages: Pages) -> jax.Array:
    """One layer's attention by the peer, which takes queries that are scaled already."""
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention as peer

    first = (index % jnp.int32(layers)) * jnp.int32(pages.tables.size)
    scaled = q * jnp.asarray(group.scale, q.dtype)
    splits = PEER_SPLITS if group.sequences * group.shape.kv_heads < PEER_PROGRAMS else 1
    keys = max(16, 128 * 128 // group.shape.head_dim)  # of an iteration, so that a wide head's fit shared memory
    out: jax.Array = peer(
        scaled,
        pages.k,
        pages.v,
        pages.tables + first,
        pages.lengths,
        pages_per_compute_block=max(1, keys // group.layout.block_size),
        k_splits=splits,
    )
    return out


def check_interpreted(group: Group, context: int, q: jax.Array, operands: Any) -> Row:
    """The Pallas kernel, interpreted, against the reference; not timed."""
    steps: dict[str, Attention] = {
        "xla": partial(paged_attention, implementation=Implementation.XLA),
        INTERPRETED: ragged_paged_attention,
    }
    compiled = compile_all(
        {name: (partial(step, group, attend), q, operands) for name, attend in steps.items()}, is_timed=False
    )
    judged = judge(
        compiled,
        q,
        dict.fromkeys(compiled, operands),
        dict.fromkeys(compiled, group.layout.num_layers - 1),
        relative_error,
        TOLERANCE[str(group.layout.dtype)],
    )
    note = judged.faults.get(INTERPRETED, "checked only")
    case = case_name(group.sequences, group.chunk, context)
    return Row(group.kernel, group.shape.name, case, INTERPRETED, error=judged.errors.get(INTERPRETED), note=note)


def skipped(group: Group, context: int, why: str) -> Row:
    """A case that was not run."""
    return Row(group.kernel, group.shape.name, case_name(group.sequences, group.chunk, context), "", note=why)


def case_name(sequences: int, chunk: int, context: int) -> str:
    """How tables name a case."""
    return f"{sequences} x {context}" if chunk == 1 else f"{sequences} x {chunk} of {context}"
