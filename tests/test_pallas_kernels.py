"""The Pallas kernels: interpreted against NumPy in float64, and lowered for CUDA without a GPU."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_batches import Batch, attention_in_float64, make_batch, written_pool

from jaxcept_kernels.blocks import copy_blocks, gather_blocks, scatter_blocks
from jaxcept_kernels.layout import KVLayout, KVPool
from jaxcept_kernels.pallas.blocks import copy_blocks_pallas, gather_blocks_pallas, scatter_blocks_pallas
from jaxcept_kernels.pallas.ragged_attention import ragged_paged_attention
from jaxcept_kernels.pallas.tiles import AttentionTiles, Tile
from jaxcept_kernels.pallas.write_kv import write_kv_pallas

SCALE = 0.2
MIXED = [(40, 1), (0, 37), (3, 1), (16, 16), (300, 20), (0, 1), (31, 1), (15, 2)]
SMALL = AttentionTiles(Tile(16, 32, 4, 2), Tile(16, 32, 4, 2), programs=1)
SPLIT = AttentionTiles(Tile(16, 32, 4, 2), Tile(16, 32, 4, 2), programs=1000, max_splits=3)


def make_layout(dtype: str = "float32", **sizes: int) -> KVLayout:
    defaults = {"num_layers": 2, "num_blocks": 64, "block_size": 16, "num_kv_heads": 2, "head_dim": 32}
    return KVLayout(**{**defaults, **sizes}, dtype=jnp.dtype(dtype))


def run(batch: Batch, layout: KVLayout, **options: object) -> tuple[np.ndarray, KVPool]:
    @jax.jit
    def step(batch: Batch) -> tuple[jax.Array, KVPool]:
        pool = write_kv_pallas(batch.pool, batch.k, batch.v, batch.meta, layout, 1)
        return ragged_paged_attention(batch.q, pool, batch.meta, layout, 1, scale=SCALE, **options), pool

    out, pool = step(batch._replace(tables=[]))
    return np.asarray(out, np.float64), pool


def check(batch: Batch, layout: KVLayout, tolerance: float, **options: object) -> None:
    out, pool = run(batch, layout, **options)
    want = attention_in_float64(batch, layout, 1, MIXED, SCALE)
    assert np.abs(out - want).max() <= tolerance * np.abs(want).max()
    for got, part in zip(pool, written_pool(batch, layout, 1), strict=True):
        np.testing.assert_array_equal(np.asarray(got, np.float64), np.asarray(part, np.float64))


@pytest.mark.parametrize("tiles", [SMALL, SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(2, 2, 64), (14, 2, 80), (20, 1, 96)])
def test_mixed_batches_in_float32(heads: int, kv_heads: int, head_dim: int, tiles: AttentionTiles) -> None:
    layout = make_layout(num_kv_heads=kv_heads, head_dim=head_dim)
    batch = make_batch(np.random.default_rng(0), layout, heads, MIXED, pad_tokens=5, pad_entries=3, columns=64)
    check(batch, layout, 2e-6, tiles=tiles)


@pytest.mark.parametrize(("dtype", "block_size"), [("bfloat16", 32), ("float16", 64)])
def test_half_precision(dtype: str, block_size: int) -> None:
    layout = make_layout(dtype, block_size=block_size)
    check(make_batch(np.random.default_rng(1), layout, 8, MIXED), layout, 8e-3)


def test_a_window_and_a_soft_cap() -> None:
    layout = make_layout()
    batch = make_batch(np.random.default_rng(2), layout, 4, MIXED, pad_tokens=2)
    out, _ = run(batch, layout, window=40, soft_cap=1.5, tiles=SMALL)
    keys, values = (part.astype(np.float64) for part in written_pool(batch, layout, 1))
    row = 0
    for blocks, (before, count) in zip(batch.tables, MIXED, strict=True):
        k, v = (part[64 + blocks].swapaxes(1, 2).reshape(-1, 2, 32) for part in (keys, values))
        for i in range(before, before + count):
            reach = slice(max(0, i - 39), i + 1)
            for head in range(4):
                scores = 1.5 * np.tanh(k[reach, head // 2] @ np.asarray(batch.q, np.float64)[row, head] * SCALE / 1.5)
                weights = np.exp(scores - scores.max())
                want = weights @ v[reach, head // 2] / weights.sum()
                np.testing.assert_allclose(out[row, head], want, rtol=0, atol=5e-6)
            row += 1
    assert not out[row:].any()


def test_blocks_move_to_the_bit() -> None:
    layout = make_layout(num_layers=3, num_kv_heads=3, head_dim=20, num_blocks=12)
    rng = np.random.default_rng(3)
    pool = KVPool(*(jnp.asarray(rng.standard_normal(layout.shape), jnp.float32) for _ in range(2)))
    ids, others = jnp.asarray([7, 0, 11, 12, -1], jnp.int32), jnp.asarray([0, 5, 2, 3, 4], jnp.int32)
    staging = gather_blocks(pool, layout, ids)
    pairs = [
        (gather_blocks_pallas(pool, layout, ids), staging),
        (scatter_blocks_pallas(pool, layout, ids, staging), scatter_blocks(pool, layout, ids, staging)),
        (copy_blocks_pallas(pool, layout, ids, others), copy_blocks(pool, layout, ids, others)),
    ]
    for got, want in pairs:
        for part, expected in zip(got, want, strict=True):
            np.testing.assert_array_equal(part, expected)


def lowered(function: Callable[..., object], *args: object) -> str:
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_every_kernel_lowers_for_cuda(dtype: str, head_dim: int) -> None:
    layout = make_layout(dtype, head_dim=head_dim)
    batch = make_batch(np.random.default_rng(4), layout, 6, [(3, 1), (0, 4)], columns=64)._replace(tables=[])
    ids = jnp.asarray([1, 2], jnp.int32)

    def step(batch: Batch) -> object:
        pool = write_kv_pallas(batch.pool, batch.k, batch.v, batch.meta, layout, 1)
        out = ragged_paged_attention(batch.q, pool, batch.meta, layout, 1, scale=SCALE, window=9, soft_cap=2.0)
        return out, copy_blocks_pallas(pool, layout, ids, ids)

    text = lowered(step, batch)
    assert "triton" in text
    for name in ("write_kv", "decode_attention", "prefill_attention", "gather_blocks", "scatter_blocks"):
        assert name in text
