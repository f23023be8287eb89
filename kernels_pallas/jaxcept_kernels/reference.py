"""Attention over the paged pool in plain JAX, for every backend; the reference that other implementations are held to.

The batch is cut into items, each a tile of queries of one sequence against a chunk of that sequence's keys. How many
there are depends on the contexts at hand and not on the longest one that the tables allow: a loop takes a group of
items at a time, gathers their blocks, and merges the partial results of each tile by the online softmax
(Milakov & Gimelshein 2018, "Online normalizer calculation for softmax").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcept_kernels.layout import AttentionMetadata, KVLayout, KVPool
from jaxcept_kernels.quantized import quantize, scale_of
from jaxcept_kernels.scoring import Scoring

NEVER = -1e30  # a score that no key has; finite, so that differences of it stay numbers


@dataclass(frozen=True, slots=True)
class TileConfig:
    """Sizes of the reference's work items."""

    queries: int = 16  # most queries of a tile
    keys: int = 128  # keys of a chunk, rounded up to whole blocks
    items: int = 16  # items computed at once

    def __post_init__(self) -> None:
        for name in ("queries", "keys", "items"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected 1 or more")


class Tiles(NamedTuple):
    """Runs of queries of one batch entry each, in the order of their token rows."""

    entry: jax.Array  # [tiles] int32
    first: jax.Array  # [tiles] int32, token row of the first query
    end: jax.Array  # [tiles] int32, token row past the last query
    first_key: jax.Array  # [tiles] int32, the first that any query sees
    item_start: jax.Array  # [tiles + 1] int32, running count of items


class Accumulator(NamedTuple):
    """What the online softmax knows of each query so far."""

    highest: jax.Array  # [tiles, kv_heads, rows] float32, highest score
    total: jax.Array  # [tiles, kv_heads, rows] float32, sum of exponentials
    values: jax.Array  # [tiles, kv_heads, rows, head_dim] float32, sum of values weighted by exponentials


class Operands(NamedTuple):
    """The arrays of one call."""

    q: jax.Array  # [tokens, heads, head_dim]
    pool: KVPool
    meta: AttentionMetadata
    layer: int | jax.Array


class Geometry(NamedTuple):
    """Static sizes of one call."""

    layout: KVLayout
    queries: int  # per tile
    group: int  # query heads per KV head
    chunk_blocks: int
    items: int
    scoring: Scoring

    @property
    def chunk(self) -> int:
        """Keys of a chunk."""
        return self.chunk_blocks * self.layout.block_size


def write_kv_xla(
    pool: KVPool,
    k: jax.Array,  # [tokens, kv_heads, head_dim]
    v: jax.Array,  # [tokens, kv_heads, head_dim]
    meta: AttentionMetadata,
    layout: KVLayout,
    layer: int | jax.Array,
) -> KVPool:
    """The pool with keys and values of one layer in their slots; slots out of range are dropped."""
    block = meta.slots // layout.block_size
    in_range = (meta.slots >= 0) & (block < layout.num_blocks)
    row = jnp.where(in_range, layer * layout.num_blocks + block, layout.shape[0])
    offset = meta.slots % layout.block_size

    def put(part: jax.Array, fresh: jax.Array) -> jax.Array:
        values, *scale_bytes = quantize(fresh) if layout.is_quantized else (fresh.astype(part.dtype),)
        part = part.at[row, :, offset, :].set(values, mode="drop")
        for i, scale_byte in enumerate(scale_bytes):
            place, column = layout.scale_place(offset, i)
            part = part.at[row, :, place, column].set(scale_byte, mode="drop")
        return part

    return KVPool(put(pool.k, k), put(pool.v, v))


def paged_attention_xla(
    q: jax.Array,  # [tokens, heads, head_dim]
    pool: KVPool,
    meta: AttentionMetadata,
    layout: KVLayout,
    layer: int | jax.Array,
    *,
    scoring: Scoring,
    tiles: TileConfig,
) -> jax.Array:
    """Causal attention of each token over its sequence's context: [tokens, heads, head_dim]; zeros for padding."""
    num_tokens, heads, _ = q.shape
    entries = meta.context_len.shape[0]
    geometry = Geometry(
        layout=layout,
        queries=min(tiles.queries, max(1, num_tokens // entries)),
        group=heads // layout.num_kv_heads,
        chunk_blocks=min(-(-tiles.keys // layout.block_size), meta.block_tables.shape[1]),
        items=tiles.items,
        scoring=scoring,
    )
    cut = cut_tiles(meta, num_tokens, geometry)
    rows = geometry.queries * geometry.group
    # A slice of `items` tiles must fit behind the last tile that has an item.
    shape = (cut.entry.shape[0] + geometry.items, layout.num_kv_heads, rows)
    start = Accumulator(
        jnp.full(shape, NEVER, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, layout.head_dim), jnp.float32),
    )
    num_items, operands = cut.item_start[-1], Operands(q, pool, meta, layer)

    def body(i: jax.Array, done: Accumulator) -> Accumulator:
        return merge_group(i * geometry.items, done, operands, cut, geometry)

    done = jax.lax.fori_loop(jnp.int32(0), (num_items + geometry.items - 1) // geometry.items, body, start)
    return untile(done, q, meta, cut, geometry)


def cut_tiles(meta: AttentionMetadata, num_tokens: int, geometry: Geometry) -> Tiles:
    """The batch's tiles and how many chunks of keys each one sees."""
    queries = geometry.queries
    lengths = jnp.diff(meta.query_start)
    per_entry = (lengths + queries - 1) // queries
    tile_end = jnp.cumsum(per_entry, dtype=jnp.int32)
    count = num_tokens if queries == 1 else num_tokens // queries + lengths.shape[0]
    index = jnp.arange(count, dtype=jnp.int32)
    entry = jnp.searchsorted(tile_end, index, side="right").astype(jnp.int32)
    used = entry < lengths.shape[0]
    entry = jnp.minimum(entry, lengths.shape[0] - 1)
    first = meta.query_start[entry] + (index - (tile_end[entry] - per_entry[entry])) * queries
    end = jnp.minimum(first + queries, meta.query_start[entry + 1])
    visible = meta.context_len[entry] - (meta.query_start[entry + 1] - end)  # keys that the last query of the tile sees
    window = geometry.scoring.window
    first_key = jnp.zeros_like(visible) if window is None else jnp.maximum(visible - (end - first) + 1 - window, 0)
    chunks = (visible + geometry.chunk - 1) // geometry.chunk - first_key // geometry.chunk
    chunks = jnp.where(used, chunks, 0)
    item_start = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(chunks, dtype=jnp.int32)])
    return Tiles(entry, first, end, first_key, item_start)


def merge_group(
    first_item: jax.Array,  # int32 scalar
    done: Accumulator,
    operands: Operands,
    cut: Tiles,
    geometry: Geometry,
) -> Accumulator:
    """The accumulator with one group of items merged in."""
    item = first_item + jnp.arange(geometry.items, dtype=jnp.int32)
    tile = jnp.searchsorted(cut.item_start, item, side="right").astype(jnp.int32) - 1
    live = tile < cut.entry.shape[0]
    tile = jnp.minimum(tile, cut.entry.shape[0] - 1)
    chunk = cut.first_key[tile] // geometry.chunk + item - cut.item_start[tile]
    part = attend(tile, jnp.where(live, chunk, 0), operands, cut, geometry)

    # Items come in the order of their tiles, so the group's tiles lie in one run of at most `items`.
    run = tile[0]
    same = (tile - run)[None, :] == jnp.arange(geometry.items, dtype=jnp.int32)[:, None]  # [run, items]
    same = same & live[None, :]
    old = Accumulator(*(jax.lax.dynamic_slice_in_dim(x, run, geometry.items) for x in done))
    reached = jnp.where(same[:, :, None, None], part.highest[None], NEVER).max(axis=1)
    highest = jnp.maximum(old.highest, reached)
    keep = jnp.exp(old.highest - highest)  # [run, kv_heads, rows]
    local = jnp.minimum(tile - run, geometry.items - 1)
    weight = jnp.exp(part.highest - highest[local])  # [items, kv_heads, rows]
    weight = jnp.where(live[:, None, None], weight, 0.0)
    select = same.astype(jnp.float32)
    total = old.total * keep + fold(select, part.total * weight)
    values = old.values * keep[..., None] + fold(select, part.values * weight[..., None])
    merged = (highest, total, values)
    return Accumulator(*(jax.lax.dynamic_update_slice_in_dim(x, y, run, 0) for x, y in zip(done, merged, strict=True)))


def fold(
    select: jax.Array,  # [run, items] float32, one where the item belongs to the tile
    parts: jax.Array,  # [items, ...] float32
) -> jax.Array:
    """Sums over each tile's items: [run, ...]. What is not finite spoils its own tile and, unlike 0 · NaN, no other."""
    finite = jnp.isfinite(parts)
    summed = jnp.tensordot(select, jnp.where(finite, parts, 0.0), 1)
    spoiled = jnp.tensordot(select, (~finite).astype(jnp.float32), 1) > 0
    return jnp.where(spoiled, jnp.nan, summed)


def attend(
    tile: jax.Array,  # [items] int32
    chunk: jax.Array,  # [items] int32
    operands: Operands,
    cut: Tiles,
    geometry: Geometry,
) -> Accumulator:
    """Each item's own attention: its tile's queries over its chunk's keys."""
    q, pool, meta, layer = operands
    layout, items, group = geometry.layout, geometry.items, geometry.group
    heads, size, dim = layout.num_kv_heads, layout.block_size, layout.head_dim
    entry = cut.entry[tile]
    token = cut.first[tile][:, None] + jnp.arange(geometry.queries, dtype=jnp.int32)[None, :]  # [items, queries]
    token = jnp.minimum(token, q.shape[0] - 1)
    position = jnp.where(token < cut.end[tile][:, None], meta.positions[token], -1)

    column = chunk[:, None] * geometry.chunk_blocks + jnp.arange(geometry.chunk_blocks, dtype=jnp.int32)[None, :]
    block = meta.block_tables[entry[:, None], jnp.minimum(column, meta.block_tables.shape[1] - 1)]
    row = layer * layout.num_blocks + jnp.clip(block, 0, layout.num_blocks - 1)  # [items, chunk_blocks]
    key = (column[:, :, None] * size + jnp.arange(size, dtype=jnp.int32)[None, None, :]).reshape(items, -1)
    # Elsewhere the pool holds anything, NaN included.
    written = (key >= cut.first_key[tile][:, None]) & (key < meta.context_len[entry][:, None])

    dtype = layout.compute_dtype(q.dtype)

    def gather(part: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """[items, chunk_blocks, kv_heads, block_size, head_dim], and the scales without the last axis."""
        flat = part.reshape(part.shape[0], -1)
        found = flat.at[row].get(mode="promise_in_bounds").reshape(items, -1, heads, layout.block_rows * dim)
        slots = found[..., : size * dim].reshape(items, -1, heads, size, dim).astype(dtype)
        if not layout.is_quantized:
            return slots, None
        low, high = (found[..., size * (dim + i) : size * (dim + i + 1)] for i in range(2))
        return slots, scale_of(low, high)

    keys, key_scales = gather(pool.k)
    values, value_scales = gather(pool.v)
    mask = written.reshape(items, -1, 1, size, 1)
    values = jnp.where(mask, values, jnp.zeros((), dtype))
    tiled = q[token].reshape(items, geometry.queries, heads, group, dim).astype(dtype)
    tiled = tiled.transpose(0, 2, 1, 3, 4).reshape(items, heads, -1, dim)
    scores = jnp.einsum("ihqd,ibhsd->ihqbs", tiled, keys, preferred_element_type=jnp.float32)
    if key_scales is not None:
        scores = scores * key_scales.transpose(0, 2, 1, 3)[:, :, None]
    scores = score(scores.reshape(*scores.shape[:3], -1), geometry.scoring)  # [items, kv_heads, rows, chunk]
    seen = written[:, None, :] & (key[:, None, :] <= position[:, :, None])  # [items, queries, chunk]
    if geometry.scoring.window is not None:
        seen = seen & (key[:, None, :] > position[:, :, None] - geometry.scoring.window)
    seen = jnp.repeat(seen, group, axis=1)[:, None]
    scores = jnp.where(seen, scores, NEVER)
    highest = scores.max(axis=-1)
    exponentials = jnp.where(seen, jnp.exp(scores - highest[..., None]), 0.0)
    weights = exponentials.reshape(*exponentials.shape[:3], -1, size)
    if value_scales is not None:
        value_scales = jnp.where(mask[..., 0], value_scales, 0.0)
        weights = weights * value_scales.transpose(0, 2, 1, 3)[:, :, None]
    summed = jnp.einsum("ihqbs,ibhsd->ihqd", weights.astype(dtype), values, preferred_element_type=jnp.float32)
    return Accumulator(highest, exponentials.sum(axis=-1), summed)


def score(products: jax.Array, scoring: Scoring) -> jax.Array:
    """The scores that products of queries and keys make."""
    scores = products * scoring.scale
    return scores if scoring.soft_cap is None else scoring.soft_cap * jnp.tanh(scores / scoring.soft_cap)


def untile(done: Accumulator, q: jax.Array, meta: AttentionMetadata, cut: Tiles, geometry: Geometry) -> jax.Array:
    """Each token's result out of its tile: [tokens, heads, head_dim] in q's dtype."""
    num_tokens, heads, dim = q.shape
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    # Tiles without queries start at or past the end of the batch's tokens, so `first` never falls.
    tile = jnp.searchsorted(cut.first, token, side="right").astype(jnp.int32) - 1
    inside = token < cut.end[tile]
    offset = jnp.where(inside, token - cut.first[tile], 0)
    result = done.values / jnp.where(done.total > 0, done.total, 1.0)[..., None]
    result = result.reshape(-1, geometry.layout.num_kv_heads, geometry.queries, geometry.group, dim)
    out = result[tile, :, offset].reshape(num_tokens, heads, dim)
    return jnp.where(inside[:, None, None], out, 0.0).astype(q.dtype)
