"""The Pallas kernels: tiles of several sizes, and lowered for CUDA without a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import use_abstract_mesh
from kernel_batches import Batch, attention_in_float64, make_batch, written_pool
from lowering import A100, lowered

from jaxcept_kernels.layout import KVLayout, KVPool, make_pool
from jaxcept_kernels.pallas.blocks import copy_blocks_pallas, gather_each_pallas, scatter_each_pallas
from jaxcept_kernels.pallas.common import device_kind
from jaxcept_kernels.pallas.ragged_attention import ragged_paged_attention
from jaxcept_kernels.pallas.tiles import AttentionTiles, Tile
from jaxcept_kernels.pallas.write_kv import write_kv_pallas
from jaxcept_kernels.scoring import Scoring

SCORING = Scoring(0.2)
MIXED = [(40, 1), (0, 37), (3, 1), (16, 16), (300, 20), (0, 1), (31, 1), (15, 2)]
NUM_MIXED = sum(count for _, count in MIXED)
SMALL = AttentionTiles(Tile(16, 32, 4, 2), Tile(16, 32, 4, 2), Tile(16, 32, 4, 2), programs=1)
SPLIT = AttentionTiles(Tile(16, 32, 4, 2), Tile(16, 32, 4, 2), Tile(16, 32, 4, 2), programs=1000, max_splits=3)


def make_layout(dtype: str = "float32", **sizes: int) -> KVLayout:
    defaults = {"num_layers": 2, "num_blocks": 64, "block_size": 16, "num_kv_heads": 2, "head_dim": 32}
    return KVLayout(**{**defaults, **sizes}, dtype=jnp.dtype(dtype))


def run(batch: Batch, layout: KVLayout, **options: object) -> tuple[np.ndarray, KVPool]:
    @jax.jit
    def step(batch: Batch) -> tuple[jax.Array, KVPool]:
        pool = write_kv_pallas(batch.pool, batch.k, batch.v, batch.meta, layout, 1)
        return ragged_paged_attention(batch.q, pool, batch.meta, layout, 1, scoring=SCORING, **options), pool

    out, pool = step(batch._replace(tables=[]))
    return np.asarray(out, np.float64), pool


def check(batch: Batch, layout: KVLayout, tolerance: float, **options: object) -> None:
    out, pool = run(batch, layout, **options)
    want = attention_in_float64(batch, layout, 1, MIXED, SCORING)
    assert np.abs(out - want).max() <= tolerance * np.abs(want).max()
    for got, part in zip(pool, written_pool(batch, layout, 1), strict=True):
        np.testing.assert_array_equal(np.asarray(got, np.float64), np.asarray(part, np.float64))


@pytest.mark.parametrize("tiles", [SMALL, SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize("pad_entries", [3, NUM_MIXED + 5 - len(MIXED)], ids=["two launches", "one launch"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(2, 2, 64), (14, 2, 80), (20, 1, 96)])
def test_mixed_batches_in_float32(
    heads: int, kv_heads: int, head_dim: int, pad_entries: int, tiles: AttentionTiles
) -> None:
    layout = make_layout(num_kv_heads=kv_heads, head_dim=head_dim)
    rng = np.random.default_rng(0)
    batch = make_batch(rng, layout, heads, MIXED, pad_tokens=5, pad_entries=pad_entries, columns=64)
    check(batch, layout, 2e-6, tiles=tiles)


def test_a_step_of_as_many_tokens_as_sequences_has_one_launch() -> None:
    layout = make_layout("bfloat16", head_dim=64)
    names = []
    for pad_entries in (0, 2):
        batch = make_batch(np.random.default_rng(4), layout, 6, [(3, 1), (0, 3)], pad_entries=pad_entries, columns=64)
        text = lowered(
            lambda b: ragged_paged_attention(b.q, b.pool, b.meta, layout, 1, scoring=SCORING), batch._replace(tables=[])
        )
        names.append([name for name in ("decode_attention", "prefill_attention") if name in text])
    assert names == [["decode_attention", "prefill_attention"], ["decode_attention"]]


def test_tiles_are_those_of_the_device_that_is_traced_for() -> None:
    assert device_kind() == jax.devices()[0].device_kind
    with use_abstract_mesh(A100):
        assert device_kind() == "NVIDIA A100-SXM4-80GB"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_every_kernel_lowers_for_cuda(dtype: str, head_dim: int) -> None:
    layout = make_layout(dtype, head_dim=head_dim)
    drawn = make_layout("bfloat16" if layout.is_quantized else dtype, head_dim=head_dim)
    batch = make_batch(np.random.default_rng(4), drawn, 6, [(3, 1), (0, 4)], columns=64)._replace(tables=[])
    batch = batch._replace(pool=make_pool(layout))
    ids = jnp.asarray([1, 2], jnp.int32)

    def step(batch: Batch) -> object:
        pool = write_kv_pallas(batch.pool, batch.k, batch.v, batch.meta, layout, 1)
        out = ragged_paged_attention(batch.q, pool, batch.meta, layout, 1, scoring=Scoring(0.2, 9, 2.0))
        pool = copy_blocks_pallas(pool, layout, ids, ids)
        return out, scatter_each_pallas(pool, layout, ids, gather_each_pallas(pool, layout, ids))

    text = lowered(step, batch)
    assert "triton" in text
    for name in ("write_kv", "decode_attention", "prefill_attention", "gather_blocks", "scatter_each"):
        assert name in text
