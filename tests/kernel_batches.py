"""Random ragged batches for the kernel tests, and attention over them in NumPy, float64, one token at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcept_kernels.layout import AttentionMetadata, KVLayout, KVPool
from jaxcept_kernels.scoring import Scoring


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
    shared: int = 0,
) -> Batch:
    """A batch whose sequences hold random blocks, given as (tokens in the pool, tokens of this step).

    Slots that no token fills hold NaN where `poison` says so. `shared`: so many first blocks, as far as both have
    them full, are those of the first sequence.
    """
    size = layout.block_size
    lengths = [before + count for before, count in spans]
    tables = make_tables(rng, layout, spans, shared)
    longest = max([len(blocks) for blocks in tables], default=1)
    columns = max(longest, 1) + 2 if columns is None else columns
    table = rng.integers(
        -(2**31), 2**31 - 1, (len(spans) + pad_entries, columns), dtype=np.int64
    )  # garbage past the end
    for i, blocks in enumerate(tables):
        table[i, : len(blocks)] = blocks
    by_layer = (layout.num_layers, layout.num_blocks, *layout.shape[1:])
    parts = [np.full(by_layer, np.nan if poison else 0.0, np.float32) for _ in range(2)]
    for part in parts:
        for blocks, (before, _) in zip(tables, spans, strict=True):
            at = np.arange(before)
            drawn = rng.standard_normal((before, layout.num_layers, layout.num_kv_heads, layout.head_dim))
            part[:, blocks[at // size], :, at % size] = drawn
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
    pool = KVPool(*(jnp.asarray(part.reshape(layout.shape), dtype) for part in parts))
    return Batch(jnp.asarray(q, dtype), jnp.asarray(k, dtype), jnp.asarray(v, dtype), meta, pool, tables)


def make_tables(
    rng: np.random.Generator, layout: KVLayout, spans: Sequence[tuple[int, int]], shared: int
) -> list[np.ndarray]:
    """Each sequence's blocks, scattered over the pool; see `make_batch`."""
    size = layout.block_size
    ids = rng.permutation(layout.num_blocks)
    tables: list[np.ndarray] = []
    for before, count in spans:
        common = min(shared, before // size, spans[0][0] // size) if tables else 0
        fresh = -(-(before + count) // size) - common
        assert fresh <= len(ids), "the pool is too small for the batch"
        tables.append(np.concatenate([tables[0][:common] if tables else ids[:0], ids[:fresh]]))
        ids = ids[fresh:]
    return tables


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
    batch: Batch,
    layout: KVLayout,
    layer: int,
    spans: Sequence[tuple[int, int]],
    scoring: Scoring,
) -> np.ndarray:
    """[tokens, heads, head_dim], zeros for padding tokens."""
    keys, values = (np.asarray(part, np.float64) for part in written_pool(batch, layout, layer))
    q = np.asarray(batch.q, np.float64)
    out = np.zeros(q.shape)
    row = 0
    for blocks, (before, count) in zip(batch.tables, spans, strict=True):
        context = layer * layout.num_blocks + blocks
        # [context, kv_heads, head_dim]
        k, v = (
            part[context].swapaxes(1, 2).reshape(-1, *part.shape[1::2])[: before + count] for part in (keys, values)
        )
        at, key = np.arange(before, before + count)[:, None], np.arange(before + count)[None, :]
        seen = key <= at if scoring.window is None else (key <= at) & (key > at - scoring.window)
        for head in range(q.shape[1]):
            of = head // (q.shape[1] // layout.num_kv_heads)
            scores = q[row : row + count, head] @ k[:, of].T * scoring.scale
            if scoring.soft_cap is not None:
                scores = scoring.soft_cap * np.tanh(scores / scoring.soft_cap)
            for i in range(count):  # by the row, so that a NaN reaches who sees it and nobody else
                reach = scores[i, seen[i]]
                weights = np.exp(reach - reach.max())
                out[row + i, head] = weights @ v[seen[i], of] / weights.sum()
        row += count
    return out
