"""Attention of a ragged batch over the paged pool: one kernel, launched for decodes and for prefill chunks.

A program takes a tile of one sequence's queries for one KV head, and one split of the keys in their reach. It walks
over the keys with an online softmax in base 2 (Milakov & Gimelshein 2018, "Online normalizer calculation for
softmax"). Splits are merged by the logarithms of their sums of exponentials (Dao et al. 2023, "Flash-Decoding").
"""

from __future__ import annotations

import math
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

NEVER = -1e30  # a score that no key has; finite, so that differences of it stay numbers
LOG2_E = math.log2(math.e)
MIN_SPLIT = 256  # keys that are worth a program of their own


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
    rows: int  # of a matrix tile, queries times group
    keys: int  # of an iteration
    splits: int
    group: int  # query heads per KV head
    columns: int  # of the block tables
    layout: KVLayout
    scale: float
    window: int | None
    soft_cap: float | None
    tile: Tile


def ragged_paged_attention(
    q: jax.Array,  # [tokens, heads, head_dim]
    pool: KVPool,
    meta: AttentionMetadata,
    layout: KVLayout,
    layer: int | jax.Array,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    tiles: AttentionTiles | None = None,
) -> jax.Array:
    """Causal attention of each token over its sequence's context: [tokens, heads, head_dim], q's dtype.

    `window`: a token sees that many keys, itself included. `soft_cap`: scores s become soft_cap · tanh(s / soft_cap).
    Padding tokens give zeros. Nothing is read of a block but the slots of the context.
    """
    if window is not None and window < 1:
        raise ValueError(f"window={window}: expected 1 or more keys, or None for no window")
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"soft_cap={soft_cap}: expected more than 0, or None for no cap")
    tiles = tiles or tiles_for(device_kind())
    tokens, heads, _ = q.shape
    entries, columns = meta.block_tables.shape
    group = heads // layout.num_kv_heads
    dtype = layout.compute_dtype(q.dtype)

    def run(name: str, tile: Tile, max_programs: int) -> jax.Array:
        rows, keys = fit(tile, group, layout.head_dim, dtype)
        is_decode = name == "decode_attention"
        queries = 1 if is_decode else rows // group
        work = decode_work(meta) if is_decode else prefill_work(meta, tokens, queries)
        count = work.first.shape[0]
        spare = max_programs // (count * layout.num_kv_heads)
        wanted = min(tiles.max_splits, spare, columns * layout.block_size // MIN_SPLIT)
        results = entries if is_decode else tokens
        splits = max(1, wanted)
        shape = Shape(
            name, count, results, rows, keys, splits, group, columns, layout, scale, window, soft_cap, tile
        )  # fmt: skip
        return attend(q, pool, meta, layer, work, shape)

    token = jnp.arange(tokens, dtype=jnp.int32)
    entry = jnp.searchsorted(meta.query_start, token, side="right").astype(jnp.int32) - 1
    entry = jnp.minimum(entry, entries - 1)
    length = jnp.where(token < meta.query_start[-1], jnp.diff(meta.query_start)[entry], 0)[:, None, None]
    decoded = run("decode_attention", tiles.decode, tiles.programs)[entry]
    prefilled = run("prefill_attention", tiles.prefill, tiles.programs)
    # Rows that a launch does not compute hold anything, so they are chosen away and not multiplied by zero.
    return jnp.where(length == 1, decoded, jnp.where(length > 1, prefilled, jnp.zeros((), q.dtype)))


def fit(tile: Tile, group: int, head_dim: int, dtype: jnp.dtype) -> tuple[int, int]:
    """Rows and keys of a tile for the bytes of a head's keys: a wider head or element takes fewer of them.

    Products in float32 are summed in registers, not by tensor cores: larger tiles of them spill on sm_90.
    """
    width, bytes_each = power_of_two(head_dim), jnp.dtype(dtype).itemsize
    wider = max(1, width * bytes_each // 256)
    rows, keys = tile.rows // wider, tile.keys // wider
    if bytes_each == 4:
        rows, keys = min(rows, 2048 // width), min(keys, 4096 // width)
    return max(16, rows, power_of_two(group)), max(16, keys)


def decode_work(meta: AttentionMetadata) -> Work:
    """A tile for each entry, empty but for those of one query; results by entry."""
    entry = jnp.arange(meta.context_len.shape[0], dtype=jnp.int32)
    count = jnp.where(jnp.diff(meta.query_start) == 1, 1, 0)
    return Work(entry, meta.query_start[:-1], count, meta.context_len - 1, entry)


def prefill_work(meta: AttentionMetadata, tokens: int, queries: int) -> Work:
    """Tiles of the entries with two queries or more, as many as any batch of this size may need; results by token."""
    lengths = jnp.diff(meta.query_start)
    per_entry = jnp.where(lengths > 1, (lengths + queries - 1) // queries, 0)
    tile_end = jnp.cumsum(per_entry, dtype=jnp.int32)
    most = min(tokens, tokens // queries + min(lengths.shape[0], -(-tokens // 2)))
    index = jnp.arange(most, dtype=jnp.int32)
    entry = jnp.searchsorted(tile_end, index, side="right").astype(jnp.int32)
    is_used = entry < lengths.shape[0]
    entry = jnp.minimum(entry, lengths.shape[0] - 1)
    skipped = (index - (tile_end[entry] - per_entry[entry])) * queries
    count = jnp.where(is_used, jnp.minimum(queries, lengths[entry] - skipped), 0)
    first = meta.query_start[entry] + skipped
    return Work(entry, first, count, meta.context_len[entry] - lengths[entry] + skipped, first)


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
        stages=shape.tile.stages,
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
    layout, group, rows, keys = shape.layout, shape.group, shape.rows, shape.keys
    kv_heads, size, dim = layout.num_kv_heads, layout.block_size, layout.head_dim
    heads, width = kv_heads * group, power_of_two(dim, 16)
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
        count, position, table = count_ref[tile], position_ref[tile], entry_ref[tile] * shape.columns
        row = jnp.arange(rows, dtype=jnp.int32)
        query, member = row // group, row % group
        column = jnp.arange(width, dtype=jnp.int32)[None, :]
        is_row = query < count
        mask = is_row[:, None] & (column < dim)
        line = (first_ref[tile] + query) * heads + head * group + member
        q = pltriton.load(q_ref.at[line[:, None], column], mask=mask, other=0)

        end = jnp.where(count > 0, position + count, 0)  # keys that the tile's last query sees
        first = 0 if shape.window is None else jnp.maximum(position - shape.window + 1, 0)  # that its first query sees
        per_split = (pl.cdiv(end, keys) - first // keys + shape.splits - 1) // shape.splits
        start = first // keys + split * per_split
        stop = jnp.minimum(start + per_split, pl.cdiv(end, keys))

        def body(i, carry):  # type: ignore[no-untyped-def]
            summed, highest, total = carry
            key = i * keys + jnp.arange(keys, dtype=jnp.int32)
            # Elsewhere the pool holds anything, NaN included.
            is_needed = key < end if shape.window is None else (key >= first) & (key < end)
            block = pltriton.load(tables.at[table + key // size], mask=is_needed, other=0)
            block = jnp.clip(block, 0, layout.num_blocks - 1)
            slots = Slots(((row_ref[0] + block) * kv_heads + head) * layout.block_rows, key % size, is_needed)
            k, k_scale = load_slots(k_ref, slots, layout, dtype)
            v, v_scale = load_slots(v_ref, slots, layout, dtype)
            scores = pltriton.dot(q, k, trans_b=True, precision=precision) * (shape.scale * k_scale)
            if shape.soft_cap is not None:
                scores = shape.soft_cap * jnp.tanh(scores / shape.soft_cap)
            at = (position + query)[:, None]
            seen = key[None, :] <= at  # by rows without a query too, of which nothing is stored
            if shape.window is not None:
                seen = seen & (key[None, :] > at - shape.window)
            scores = jnp.where(seen, scores * LOG2_E, NEVER)
            reached = jnp.maximum(highest, jnp.max(scores, axis=1))
            keep = jnp.exp2(highest - reached)
            weights = jnp.where(seen, jnp.exp2(scores - reached[:, None]), 0.0)
            total = total * keep + jnp.sum(weights, axis=1)
            weights = (weights * v_scale).astype(dtype)
            summed = summed * keep[:, None] + pltriton.dot(weights, v, precision=precision)
            return summed, reached, total

        carry = (
            jnp.zeros((rows, width), jnp.float32),
            jnp.full((rows,), NEVER, jnp.float32),
            jnp.zeros((rows,), jnp.float32),
        )
        summed, highest, total = lax.fori_loop(start, stop, body, carry)
        divisor = jnp.where(total == 0, 1.0, total)
        line = ((split * shape.results + target_ref[tile] + query) * kv_heads + head) * group + member
        summed = (summed / divisor[:, None]).astype(out_ref.dtype)
        pltriton.store(out_ref.at[line[:, None], column], summed, mask=mask)
        pltriton.store(sum_ref.at[line], jnp.where(total == 0, NEVER, highest + jnp.log2(divisor)), mask=is_row)

    return kernel


class Slots(NamedTuple):
    """Where an iteration's keys lie in the pool."""

    first: jax.Array  # [keys] int32, first row of the key's head in its block
    offset: jax.Array  # [keys] int32, slot in the block
    is_needed: jax.Array  # [keys] bool


def load_slots(
    part: jax.Ref,  # [rows, head_dim], K or V of the pool
    slots: Slots,
    layout: KVLayout,
    dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array | float]:
    """The slots as [keys, width] of `dtype`, and their scales [1, keys]; zeros where none is needed."""
    first, offset, is_needed = slots
    column = jnp.arange(power_of_two(layout.head_dim, 16), dtype=jnp.int32)[None, :]
    there = is_needed[:, None] & (column < layout.head_dim)
    values = pltriton.load(part.at[(first + offset)[:, None], column], mask=there, other=0).astype(dtype)
    if not layout.is_quantized:
        return values, 1.0

    def scale_byte(i: int) -> jax.Array:
        row, scale_column = layout.scale_place(offset, i)
        return pltriton.load(part.at[first + row, scale_column], mask=is_needed, other=0)

    return values, scale_of(scale_byte(0), scale_byte(1))[None, :]
