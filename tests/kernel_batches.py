"""Random ragged batches for the kernel tests, and attention over them in NumPy, float64, one token at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcept_kernels.layout import AttentionMetadata, KVLayout, KVPool


class Batch(NamedTuple):
    """A step's inputs."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    meta: AttentionMetadata
    pool: KVPool
    tables: list[np.ndarray]


def make_batch(
    rng: np.random.Generator,
    layout: KVLayout,
    heads: int,
    spans: Sequence[tuple[int, int]],
    *,
    pad_tokens: int = 0,
    pad_entries: int = 0,
    columns: int | None = None,
    poison: bool = True,
) -> Batch:
    """A batch whose sequences hold random blocks. Slots that no token fills hold NaN where `poison` says so."""
    size, layers = layout.block_size, layout.num_layers
    lengths = [before + count for before, count in spans]
    needed = [-(-length // size) for length in lengths]
    ids = rng.permutation(layout.num_blocks)
    assert sum(needed) <= layout.num_blocks, "the pool is too small for the batch"
    tables = [ids[sum(needed[:i]) : sum(needed[: i + 1])] for i in range(len(needed))]
    columns = max([*needed, 1]) + 2 if columns is None else columns
    table = rng.integers(
        -(2**31), 2**31 - 1, (len(spans) + pad_entries, columns), dtype=np.int64
    )  # garbage past the end
    for i, blocks in enumerate(tables):
        table[i, : len(blocks)] = blocks
    fill = np.nan if poison else 0.0
    parts = [np.full(layout.shape, fill, np.float32) for _ in range(2)]
    for part in parts:
        for blocks, (before, _) in zip(tables, spans, strict=True):
            for layer in range(layers):
                for position in range(before):
                    row = layer * layout.num_blocks + blocks[position // size]
                    part[row, :, position % size] = rng.standard_normal((layout.num_kv_heads, layout.head_dim))
    total = sum(count for _, count in spans)
    positions = np.zeros(total + pad_tokens, np.int32)
    slots = np.full(total + pad_tokens, layout.num_blocks * size, np.int32)
    starts = np.full(len(spans) + pad_entries + 1, total, np.int32)
    row = 0
    for i, (before, count) in enumerate(spans):
        starts[i] = row
        at = np.arange(before, before + count)
        positions[row : row + count] = at
        slots[row : row + count] = tables[i][at // size] * size + at % size
        row += count
    meta = AttentionMetadata(
        jnp.asarray(positions),
        jnp.asarray(slots),
        jnp.asarray(starts),
        jnp.asarray([*lengths, *([0] * pad_entries)], jnp.int32),
        jnp.asarray(table.astype(np.int32)),
    )
    shape = (total + pad_tokens, layout.num_kv_heads, layout.head_dim)
    q = rng.standard_normal((total + pad_tokens, heads, layout.head_dim))
    k, v = rng.standard_normal(shape), rng.standard_normal(shape)
    dtype = layout.dtype
    pool = KVPool(*(jnp.asarray(part, dtype) for part in parts))
    return Batch(jnp.asarray(q, dtype), jnp.asarray(k, dtype), jnp.asarray(v, dtype), meta, pool, tables)


def written_pool(batch: Batch, layout: KVLayout, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """K and V of the pool after the step's tokens are written to one layer."""
    out = []
    for part, fresh in ((batch.pool.k, batch.k), (batch.pool.v, batch.v)):
        pool = np.array(part)
        for token, slot in enumerate(np.asarray(batch.meta.slots)):
            if slot < layout.num_blocks * layout.block_size:
                row = layer * layout.num_blocks + slot // layout.block_size
                pool[row, :, slot % layout.block_size] = np.asarray(fresh)[token]
        out.append(pool)
    return out[0], out[1]


def attention_in_float64(
    batch: Batch, layout: KVLayout, layer: int, spans: Sequence[tuple[int, int]], scale: float
) -> np.ndarray:
    """[tokens, heads, head_dim], zeros for padding tokens."""
    keys, values = (np.asarray(part, np.float64) for part in written_pool(batch, layout, layer))
    q = np.asarray(batch.q, np.float64)
    out = np.zeros(q.shape)
    group = q.shape[1] // layout.num_kv_heads
    row = 0
    for blocks, (before, count) in zip(batch.tables, spans, strict=True):
        rows = layer * layout.num_blocks + blocks
        length = before + count

        def context(part: np.ndarray, rows: np.ndarray = rows, length: int = length) -> np.ndarray:
            gathered: np.ndarray = part[rows].swapaxes(1, 2)
            return gathered.reshape(-1, part.shape[1], part.shape[3])[:length]

        k, v = context(keys), context(values)  # [context, kv_heads, head_dim]
        for i in range(count):
            visible = before + i + 1
            for head in range(q.shape[1]):
                scores = k[:visible, head // group] @ q[row, head] * scale
                weights = np.exp(scores - scores.max())
                out[row, head] = weights @ v[:visible, head // group] / weights.sum()
            row += 1
    return out
