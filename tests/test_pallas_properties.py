"""The Pallas kernels, interpreted, on whatever batches hypothesis thinks of, against NumPy in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_batches import Batch, attention_in_float64, make_batch, written_pool

from jaxcept_kernels.layout import KVLayout, KVPool
from jaxcept_kernels.pallas.blocks import (
    copy_blocks_pallas,
    gather_blocks_pallas,
    gather_each_pallas,
    scatter_blocks_pallas,
    scatter_each_pallas,
)
from jaxcept_kernels.pallas.ragged_attention import ragged_paged_attention
from jaxcept_kernels.pallas.tiles import AttentionTiles, Tile
from jaxcept_kernels.pallas.write_kv import write_kv_pallas
from jaxcept_kernels.scoring import Scoring

TOLERANCE = {"float32": 2e-6, "bfloat16": 8e-3, "float16": 2e-3}
LONGEST = 4096
POOL_TOKENS = LONGEST + 3072
WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32}  # by bytes
WHOLE = AttentionTiles(Tile(16, 64, 4, 2), Tile(32, 64, 8, 2), Tile(64, 32, 4, 2), programs=1)
SPLIT = AttentionTiles(Tile(16, 64, 4, 2), Tile(16, 128, 8, 2), Tile(16, 128, 8, 2), programs=1000, max_splits=4)


@dataclass(frozen=True)
class Case:
    """What is compiled in; the sizes that hypothesis draws share a compilation of each."""

    dtype: str
    head_dim: int
    group: int
    kv_heads: int
    block_size: int
    tiles: AttentionTiles = WHOLE
    window: int | None = None
    soft_cap: float | None = None
    tokens: int = 40
    entries: int = 6

    @property
    def layout(self) -> KVLayout:
        return KVLayout(
            2, POOL_TOKENS // self.block_size, self.block_size, self.kv_heads, self.head_dim, jnp.dtype(self.dtype)
        )

    @property
    def scoring(self) -> Scoring:
        return Scoring(float(self.head_dim**-0.5), self.window, self.soft_cap)


CASES = [
    Case("float32", 64, 1, 2, 16, SPLIT, tokens=24, entries=24),
    Case("float32", 80, 3, 2, 32, WHOLE, window=50),
    Case("float32", 96, 5, 1, 64, SPLIT, soft_cap=1.5),
    Case("float32", 256, 7, 1, 16, SPLIT, window=700, soft_cap=4.0),
    Case("bfloat16", 128, 4, 1, 16, SPLIT),
    Case("bfloat16", 80, 8, 1, 32, WHOLE, window=1, tokens=8, entries=8),
    Case("float16", 256, 1, 2, 64, WHOLE, soft_cap=30.0),
    Case("float16", 64, 6, 1, 16, SPLIT, window=300, tokens=8, entries=8),
]


@st.composite
def spans_of(draw: st.DrawFn, case: Case) -> list[tuple[int, int]]:
    """(tokens in the pool, tokens of this step) by sequence: at most one of them longer than 300."""
    before = st.one_of(st.sampled_from([0, 1, 15, 16, 17, 63, 64, 65]), st.integers(0, 300))
    longest = st.one_of(before, st.integers(256, LONGEST - case.tokens), st.just(LONGEST - 1))
    spans: list[tuple[int, int]] = []
    left = case.tokens
    for i in range(draw(st.integers(1, case.entries))):
        count = draw(st.one_of(st.sampled_from([1, 1, 2]), st.integers(0, max(0, left))))
        count = min(count, left)
        past = draw(longest if i == 0 else before)
        spans.append((min(past, LONGEST - count), count))
        left -= count
    return draw(st.permutations(spans))


@cache
def compiled(case: Case) -> Callable[[Batch], tuple[jax.Array, KVPool]]:
    @jax.jit
    def step(batch: Batch) -> tuple[jax.Array, KVPool]:
        pool = write_kv_pallas(batch.pool, batch.k, batch.v, batch.meta, case.layout, jnp.int32(1))
        attention = partial(ragged_paged_attention, scoring=case.scoring, tiles=case.tiles)
        return attention(batch.q, pool, batch.meta, case.layout, 1), pool

    return step


def bits(array: jax.Array | np.ndarray) -> np.ndarray:
    part = np.asarray(array)
    return part.view(WORDS[part.itemsize])


def check(case: Case, spans: list[tuple[int, int]], shared: int = 0, broken: Iterable[int] = (), seed: int = 0) -> None:
    """One batch. NaN lies in every slot that no token fills, and in all that the `broken` sequences had."""
    layout = case.layout
    batch = make_batch(
        np.random.default_rng(seed),
        layout,
        case.group * case.kv_heads,
        spans,
        pad_tokens=case.tokens - sum(count for _, count in spans),
        pad_entries=case.entries - len(spans),
        columns=LONGEST // case.block_size,
        shared=shared,
    )
    for entry in broken:
        rows = layout.num_blocks + batch.tables[entry]
        batch = batch._replace(pool=KVPool(*(part.at[rows].set(jnp.nan) for part in batch.pool)))
    out, pool = compiled(case)(batch._replace(tables=[]))
    want, got = attention_in_float64(batch, layout, 1, spans, case.scoring), np.asarray(out, np.float64)
    assert np.isnan(got[np.isnan(want)]).all()
    is_sound = np.ones(case.tokens, bool)
    total = sum(count for _, count in spans)
    is_sound[:total] = np.repeat([entry not in broken for entry in range(len(spans))], [count for _, count in spans])
    error, most = (np.abs(x[is_sound]).max(axis=(1, 2), initial=0) for x in (got - want, want))
    assert (error <= TOLERANCE[case.dtype] * most).all()  # by token
    for part, expected in zip(pool, written_pool(batch, layout, 1), strict=True):
        np.testing.assert_array_equal(bits(part), bits(expected))


over_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.dtype}-{case.head_dim}")


@over_cases
@settings(max_examples=18)
@given(data=st.data())
def test_any_batch(case: Case, data: st.DataObject) -> None:
    spans, shared = data.draw(spans_of(case)), data.draw(st.sampled_from([0, 0, 1, 3]))
    broken = data.draw(st.sets(st.integers(0, len(spans) - 1), max_size=2)) if not shared else ()
    check(case, spans, shared, broken, data.draw(st.integers(0, 99)))


@over_cases
def test_the_longest_context_beside_a_single_token(case: Case) -> None:
    check(case, [(LONGEST - 1, 1), (0, 1), (16, 2), (64, 3)], shared=1)


LAYOUTS = [
    KVLayout(3, 12, 16, 2, 80, jnp.dtype(jnp.float32)),
    KVLayout(1, 12, 64, 1, 96, jnp.dtype(jnp.bfloat16)),
    KVLayout(2, 12, 32, 3, 20, jnp.dtype(jnp.float16)),
    KVLayout(2, 12, 16, 2, 64, jnp.dtype(jnp.int8)),
]


@cache
def compiled_moves(layout: KVLayout) -> tuple[Callable[..., Any], ...]:
    def out(pool: KVPool, ids: jax.Array) -> Any:
        return gather_blocks_pallas(pool, layout, ids), gather_each_pallas(pool, layout, ids)

    def back(pool: KVPool, ids: jax.Array, staging: KVPool, others: jax.Array) -> Any:
        each = tuple(jnp.stack([staging.k[i], staging.v[i]]) for i in range(ids.shape[0]))
        whole = scatter_blocks_pallas(pool, layout, ids, staging)
        return whole, scatter_each_pallas(pool, layout, ids, each), copy_blocks_pallas(pool, layout, others, ids)

    return jax.jit(out), jax.jit(back)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: str(layout.dtype))
@settings(max_examples=12)
@given(data=st.data())
def test_blocks_keep_every_bit(layout: KVLayout, data: st.DataObject) -> None:
    """Any bits at all, those of NaNs included; ids out of range are padding."""
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    shape = (layout.num_layers, layout.num_blocks, *layout.shape[1:])
    word = WORDS[layout.dtype.itemsize]

    def draw(*shape: int) -> np.ndarray:
        words = rng.integers(0, np.iinfo(word).max, shape, word, endpoint=True)
        if layout.dtype == jnp.bfloat16:  # XLA's CPU, which interprets, knows one NaN of them
            words[words & 0x7FFF > 0x7F80] = 0x7FC0
        return words

    parts, staged = [draw(*shape) for _ in range(2)], [draw(5, layout.num_layers, *shape[2:]) for _ in range(2)]
    pool = KVPool(*(jnp.asarray(part.reshape(layout.shape).view(layout.dtype)) for part in parts))
    staging = KVPool(*(jnp.asarray(part.view(layout.dtype)) for part in staged))
    ids = np.asarray(data.draw(st.lists(st.integers(-2, 14), min_size=5, max_size=5, unique=True)), np.int32)
    sources = np.asarray(data.draw(st.lists(st.integers(-2, 14), min_size=5, max_size=5)), np.int32)
    gathered, each = compiled_moves(layout)[0](pool, ids)
    whole, scattered, copied = compiled_moves(layout)[1](pool, ids, staging, sources)
    live = (ids >= 0) & (ids < layout.num_blocks)
    pairs = live & (sources >= 0) & (sources < layout.num_blocks)
    for part in range(2):
        want = np.where(live[:, None, None, None, None], np.moveaxis(parts[part][:, ids * live], 0, 1), word(0))
        np.testing.assert_array_equal(bits(gathered[part]), want)
        np.testing.assert_array_equal([bits(block)[part] for block in each], want)
        put, moved = parts[part].copy(), parts[part].copy()
        put[:, ids[live]] = np.moveaxis(staged[part][live], 0, 1)
        moved[:, ids[pairs]] = parts[part][:, sources[pairs]]
        for got, expected in ((whole, put), (scattered, put), (copied, moved)):
            np.testing.assert_array_equal(bits(got[part]).reshape(shape), expected)
