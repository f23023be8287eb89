"""Attention of a ragged batch over the paged pool: one kernel, launched for decodes and for prefill chunks.

A program takes a tile of one sequence's queries for one KV head, and one split of the keys in their reach. It walks
over the keys with an online softmax in base 2 (Milakov & Gimelshein 2018, "Online normalizer calculation for
softmax"). Splits are merged by the logarithms of their sums of exponentials (Dao et al. 2023, "Flash-Decoding").
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from jaxcept_kernels.layout import AttentionMetadata, KVLayout, KVPool
from jaxcept_kernels.pallas.common import Launch, device_kind, power_of_two
from jaxcept_kernels.pallas.tiles import AttentionTiles, Tile, tiles_for
from jaxcept_kernels.quantized import scale_of
from jaxcept_kernels.scoring import Scoring

NEVER = -1e30  # a score that no key has; finite, so that differences of it stay numbers
LEAST = -1e20  # what a row's highest score counts as where it has seen no key: the exponentials of NEVER are 0 then
LOG2_E = math.log2(math.e)
MIN_SPLIT = 256  # keys that are worth a program of their own
MATRIX_ROWS = 16  # of a tensor core's product
HEAD_BYTES = 256  # of a head's keys, for which tiles are given; those of `wide_prefill` are for twice as many


class Work(NamedTuple):
    """The tiles of one launch; a tile without queries does nothing."""

    entry: jax.Array  # [tiles] int32
    first: jax.Array  # [tiles] int32, token row of the first query
    queries: jax.Array  # [tiles] int32, how many
    position: jax.Array  # [tiles] int32, of the first query in its sequence
    target: jax.Array  # [tiles] int32, result row of the first query


class Shape(NamedTuple):
    """Static sizes of one launch."""

    name: str
    tiles: int
    results: int  # result rows
    splits: int
    group: int  # query heads per KV head
    columns: int  # of the block tables
    layout: KVLayout
    scoring: Scoring
    tile: Tile  # that fits the layout


def ragged_paged_attention(
    q: jax.Array,  # [tokens, heads, head_dim]
    pool: KVPool,
    meta: AttentionMetadata,
    layout: KVLayout,
    layer: int | jax.Array,
    *,
    scoring: Scoring,
    tiles: AttentionTiles | None = None,
) -> jax.Array:
    """Causal attention of each token over its sequence's context: [tokens, heads, head_dim], q's dtype.

    Padding tokens give zeros. Nothing is read of a block but the slots of the context.
    """
    tiles = tiles or tiles_for(device_kind())
    tokens, heads, _ = q.shape
    entries, columns = meta.block_tables.shape
    group = heads // layout.num_kv_heads
    dtype = layout.compute_dtype(q.dtype)
    longest = columns * layout.block_size

    def run(name: str, tile: Tile, work: Work, results: int) -> jax.Array:
        count = work.first.shape[0]
        spare = tiles.programs // (count * layout.num_kv_heads)
        splits = max(1, min(tiles.max_splits, spare, min(longest, scoring.window or longest) // MIN_SPLIT))
        shape = Shape(name, count, results, splits, group, columns, layout, scoring, tile)
        return attend(q, pool, meta, layer, work, shape)

    small, large = (fit(tiles, is_decode, group, layout, dtype, scoring) for is_decode in (True, False))
    if tokens == entries:  # decodes and short chunks: small tiles serve both in one launch
        return run("decode_attention", small, every_work(meta, tokens, small.rows // group), tokens)
    token = jnp.arange(tokens, dtype=jnp.int32)
    entry = find_entry(meta.query_start[1:], token)
    length = jnp.where(token < meta.query_start[-1], jnp.diff(meta.query_start)[entry], 0)[:, None, None]
    decoded = run("decode_attention", small, decode_work(meta), entries)[entry]
    prefilled = run("prefill_attention", large, chunk_work(meta, tokens, large.rows // group, 2), tokens)
    # Rows that a launch does not compute hold anything, so they are chosen away and not multiplied by zero.
    return jnp.where(length == 1, decoded, jnp.where(length > 1, prefilled, jnp.zeros((), q.dtype)))


def fit(
    tiles: AttentionTiles, is_decode: bool, group: int, layout: KVLayout, dtype: jnp.dtype, scoring: Scoring
) -> Tile:
    """The tile of a launch: a wider head or element takes fewer keys.

    Products in float32 are summed in registers, not by tensor cores, and elements of one byte are widened there: with
    fewer warps or more keys those spill. What is masked beside, columns or keys before a window, takes registers too.
    """
    width, bytes_each = power_of_two(layout.head_dim), jnp.dtype(dtype).itemsize
    is_wide = width * bytes_each > HEAD_BYTES and not is_decode
    tile = tiles.decode if is_decode else tiles.wide_prefill if is_wide else tiles.prefill
    rows, keys, warps = tile.rows, tile.keys, tile.warps
    keys //= max(1, width * bytes_each // (2 * HEAD_BYTES if is_wide else HEAD_BYTES))
    if bytes_each == 4:
        most_keys = (4096 if scoring.window is None else 2048) // width
        rows, keys, warps = min(rows, 2048 // width), min(keys, most_keys), max(8, warps)
    else:
        warps = min(warps, max(4, rows // MATRIX_ROWS))
    if layout.is_quantized:
        is_masked = layout.head_dim < width or scoring.window is not None
        keys //= 4 if is_masked and is_decode else 2
        warps = max(warps, width // 32)
    return Tile(max(MATRIX_ROWS, rows, power_of_two(group)), max(16, keys), warps, tile.stages)


def decode_work(meta: AttentionMetadata) -> Work:
    """A tile for each entry, empty but for those of one query; results by entry."""
    entry = jnp.arange(meta.context_len.shape[0], dtype=jnp.int32)
    count = jnp.where(jnp.diff(meta.query_start) == 1, 1, 0)
    return Work(entry, meta.query_start[:-1], count, meta.context_len - 1, entry)


def chunk_work(meta: AttentionMetadata, tokens: int, queries: int, least: int) -> Work:
    """Tiles of the entries with so many queries at least, as many as any batch of this size may need; results by token.

    Last queries first: they see most keys, and what starts last should end soon.
    """
    lengths = jnp.diff(meta.query_start)
    per_entry = jnp.where(lengths >= least, (lengths + queries - 1) // queries, 0)
    tile_end = jnp.cumsum(per_entry, dtype=jnp.int32)
    # Each entry has one tile that may be short of all but one of its queries, and more tokens than tiles.
    most = min(tokens, tokens // queries + min(lengths.shape[0], -(-tokens // least)))
    index = jnp.arange(most, dtype=jnp.int32)[::-1]
    entry = find_entry(tile_end, index)
    is_used = index < tile_end[-1]
    skipped = (index - (tile_end[entry] - per_entry[entry])) * queries
    count = jnp.where(is_used, jnp.minimum(queries, lengths[entry] - skipped), 0)
    first = meta.query_start[entry] + skipped
    return Work(entry, first, count, meta.context_len[entry] - lengths[entry] + skipped, first)


def every_work(meta: AttentionMetadata, tokens: int, queries: int) -> Work:
    """Tiles of all entries, results by token. Tiles that none needs give the padding tokens zeros.

    There are enough of them: each tile of an entry has a token at least.
    """
    work = chunk_work(meta, tokens, queries, 1)
    num_used = jnp.sum(work.queries > 0, dtype=jnp.int32)
    padding = meta.query_start[-1] + jnp.arange(tokens, dtype=jnp.int32)[::-1] - num_used
    is_padding = (work.queries == 0) & (padding < tokens)
    first = jnp.where(is_padding, padding, work.first)
    # From position -1 on one query sees no key.
    return Work(
        work.entry, first, jnp.where(is_padding, 1, work.queries), jnp.where(is_padding, -1, work.position), first
    )


def find_entry(ends: jax.Array, index: jax.Array) -> jax.Array:
    """The entry that each index falls into, by where the entries end; the last one for those behind all."""
    # All compared at once: a search by halves is a loop of small kernels in every step, on a GPU.
    found = jnp.searchsorted(ends, index, side="right", method="compare_all").astype(jnp.int32)
    return jnp.minimum(found, ends.shape[0] - 1)


def attend(
    q: jax.Array,  # [tokens, heads, head_dim]
    pool: KVPool,
    meta: AttentionMetadata,
    layer: int | jax.Array,
    work: Work,
    shape: Shape,
) -> jax.Array:
    """One launch: [results, heads, head_dim] in q's dtype; rows of no tile hold anything."""
    layout, splits = shape.layout, shape.splits
    heads, dim = q.shape[1:]
    dtype = layout.compute_dtype(q.dtype)
    lines = splits * shape.results * heads
    launch = Launch(
        name=shape.name,
        kernel=make_kernel(shape, dtype),
        grid=(shape.tiles, layout.num_kv_heads, splits),
        results=[
            jax.ShapeDtypeStruct((lines, dim), q.dtype if splits == 1 else jnp.float32),
            jax.ShapeDtypeStruct((lines,), jnp.float32),
        ],
        warps=shape.tile.warps,
        # Triton divides stages among the loads that wait for one another: block ids, then what lies in the blocks.
        stages=2 * shape.tile.stages + 1,
    )
    first_row = jnp.asarray(layer * layout.num_blocks, jnp.int32).reshape(1)
    flat = (part.reshape(-1, dim) for part in pool)
    operands = (first_row, meta.block_tables.reshape(-1), q.astype(dtype).reshape(-1, dim), *flat)
    out, log_sum = launch(*work, *operands)
    if splits == 1:
        return out.reshape(shape.results, heads, dim)
    out = out.reshape(splits, shape.results, heads, dim)
    log_sum = log_sum.reshape(splits, shape.results, heads, 1)
    weight = jnp.exp2(log_sum - jnp.max(log_sum, axis=0, keepdims=True))
    return (jnp.sum(out * weight, axis=0) / jnp.sum(weight, axis=0)).astype(q.dtype)


def make_kernel(shape: Shape, dtype: jnp.dtype):  # type: ignore[no-untyped-def]
    """The kernel of a launch with these sizes; products are of elements of `dtype`."""
    layout, group, rows, scoring = shape.layout, shape.group, shape.tile.rows, shape.scoring
    kv_heads, dim = layout.num_kv_heads, layout.head_dim
    heads, width = kv_heads * group, power_of_two(dim, 16)
    # Where each warp has rows of its own it needs no other's sums. Triton deals a product out by rows if it is no wider
    # than high, and the other product of the chain alike.
    part = min(width, rows) if rows >= MATRIX_ROWS * shape.tile.warps else width
    parts = tuple(range(0, width, part))  # of the values' columns, by their first
    factor = LOG2_E if scoring.soft_cap is not None else scoring.scale * LOG2_E
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None

    def kernel(  # type: ignore[no-untyped-def]
        entry_ref,
        first_ref,
        count_ref,
        position_ref,
        target_ref,
        row_ref,
        tables,
        q_ref,
        k_ref,
        v_ref,
        out_ref,
        sum_ref,
    ):
        tile, head, split = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        count, position = count_ref[tile], position_ref[tile]
        row = jnp.arange(rows, dtype=jnp.int32)
        query, member = row // group, row % group
        column, is_row = jnp.arange(width, dtype=jnp.int32)[None, :], query < count
        line = (first_ref[tile] + query) * heads + head * group + member
        q = pltriton.load(q_ref.at[line[:, None], column], mask=is_row[:, None] & (column < dim), other=0)
        reach = find_reach(position, count, split, shape)

        find = partial(find_slots, tables, entry_ref[tile], row_ref[0], head, reach, shape)

        def scales_at(i: jax.Array) -> tuple[jax.Array, jax.Array]:
            slots = find(i)
            return load_scales(k_ref, slots, layout), load_scales(v_ref, slots, layout)

        def body(i, carry):  # type: ignore[no-untyped-def]
            summed, highest, total, scales = carry
            slots = find(i)
            scores = pltriton.dot(
                q, load_slots(k_ref, slots, layout, dtype, 0, width), trans_b=True, precision=precision
            )
            if layout.is_quantized:
                scores = scores * scales[0][None, :]
            if scoring.soft_cap is not None:
                scores = scoring.soft_cap * jnp.tanh(scores * (scoring.scale / scoring.soft_cap))
            seen = is_seen(slots.key[None, :], (position + query)[:, None], scoring.window)
            scores = jnp.where(seen, scores * factor, NEVER)
            reached = jnp.maximum(highest, jnp.max(scores, axis=1))
            keep = jnp.exp2(highest - reached)
            weights = jnp.exp2(scores - jnp.maximum(reached, LEAST)[:, None])
            total = total * keep + jnp.sum(weights, axis=1)
            if layout.is_quantized:  # scales are loaded an iteration ahead, for none waits in shared memory
                weights, scales = weights * scales[1][None, :], scales_at(i + 1)
            weights = weights.astype(dtype)

            def add(before: jax.Array, first_column: int) -> jax.Array:
                v = load_slots(v_ref, slots, layout, dtype, first_column, part)
                product: jax.Array = pltriton.dot(weights, v, precision=precision)
                return before * keep[:, None] + product

            return tuple(map(add, summed, parts)), reached, total, scales

        zeros = tuple(jnp.zeros((rows, part), jnp.float32) for _ in parts)
        scales = scales_at(reach.start) if layout.is_quantized else ()
        carry = (zeros, jnp.full((rows,), NEVER, jnp.float32), jnp.zeros((rows,), jnp.float32), scales)
        summed, highest, total, _ = lax.fori_loop(reach.start, reach.stop, body, carry)
        divisor = jnp.where(total == 0, 1.0, total)
        line = ((split * shape.results + target_ref[tile] + query) * kv_heads + head) * group + member
        for first_column, each in zip(parts, summed, strict=True):
            column = first_column + jnp.arange(part, dtype=jnp.int32)[None, :]
            mask = is_row[:, None] & (column < dim)
            pltriton.store(
                out_ref.at[line[:, None], column], (each / divisor[:, None]).astype(out_ref.dtype), mask=mask
            )
        pltriton.store(sum_ref.at[line], jnp.where(total == 0, NEVER, highest + jnp.log2(divisor)), mask=is_row)

    return kernel


class Reach(NamedTuple):
    """The keys that a tile's queries see, and the iterations over those of one split."""

    first: jax.Array | int  # key that the first query sees
    end: jax.Array  # behind the last key that the last query sees
    start: jax.Array
    stop: jax.Array


def find_reach(position: jax.Array, count: jax.Array, split: jax.Array, shape: Shape) -> Reach:
    """What `count` queries from a position on see."""
    keys, window = shape.tile.keys, shape.scoring.window
    end = jnp.where(count > 0, position + count, 0)
    first = 0 if window is None else jnp.maximum(position - window + 1, 0)
    per_split = (pl.cdiv(end, keys) - first // keys + shape.splits - 1) // shape.splits
    start = first // keys + split * per_split
    return Reach(first, end, start, jnp.minimum(start + per_split, pl.cdiv(end, keys)))


def is_seen(key: jax.Array, at: jax.Array, window: int | None) -> jax.Array:
    """Whether the query at this position sees the key. Rows without a query see some too; nothing of them is stored."""
    seen: jax.Array = key <= at
    return seen if window is None else seen & (key > at - window)


class Slots(NamedTuple):
    """Where an iteration's keys lie in the pool."""

    key: jax.Array  # [keys] int32, position in the sequence
    first: jax.Array  # [keys] int32, first row of the key's head in its block
    offset: jax.Array  # [keys] int32, slot in the block
    is_needed: jax.Array  # [keys] bool; elsewhere the pool holds anything, NaN included


def find_slots(
    tables: jax.Ref,  # [entries * columns] int32
    entry: jax.Array,
    first_row: jax.Array,  # of the layer in the pool
    head: jax.Array,  # KV head
    reach: Reach,
    shape: Shape,
    i: jax.Array,  # iteration
) -> Slots:
    """The slots of one iteration's keys of an entry."""
    layout = shape.layout
    key = i * shape.tile.keys + jnp.arange(shape.tile.keys, dtype=jnp.int32)
    is_needed = key < reach.end if shape.scoring.window is None else (key >= reach.first) & (key < reach.end)
    block = pltriton.load(tables.at[entry * shape.columns + key // layout.block_size], mask=is_needed, other=0)
    row = first_row + jnp.clip(block, 0, layout.num_blocks - 1)
    return Slots(key, (row * layout.num_kv_heads + head) * layout.block_rows, key % layout.block_size, is_needed)


def load_slots(
    source: jax.Ref,  # [rows, head_dim], K or V of the pool
    slots: Slots,
    layout: KVLayout,
    dtype: jnp.dtype,
    first_column: int,
    columns: int,
) -> jax.Array:
    """Some columns of the slots: [keys, columns] of `dtype`, zeros where none is needed."""
    column = first_column + jnp.arange(columns, dtype=jnp.int32)[None, :]
    there = slots.is_needed[:, None] & (column < layout.head_dim)
    values: jax.Array = pltriton.load(source.at[(slots.first + slots.offset)[:, None], column], mask=there, other=0)
    return values.astype(dtype)


def load_scales(source: jax.Ref, slots: Slots, layout: KVLayout) -> jax.Array:
    """The slots' scales in a quantized pool: [keys] float32, zeros where none is needed."""

    def scale_byte(i: int) -> jax.Array:
        row, column = layout.scale_place(slots.offset, i)
        return pltriton.load(source.at[slots.first + row, column], mask=slots.is_needed, other=0)

    scales: jax.Array = scale_of(scale_byte(0), scale_byte(1))
    return scales
