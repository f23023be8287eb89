"""Eight-bit keys and values: what is stored, bit for bit, and attention over it, held to NumPy."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_batches import Batch, attention_in_float64, make_batch

from jaxcept_kernels.attention import Implementation, paged_attention, write_kv
from jaxcept_kernels.layout import KVLayout, KVPool
from jaxcept_kernels.pallas.common import Launch
from jaxcept_kernels.quantized import quantize, scale_of
from jaxcept_kernels.scoring import Scoring

SCORING = Scoring(0.2)
MIXED = [(40, 1), (0, 37), (3, 1), (16, 16), (100, 20), (0, 1), (31, 1), (15, 2)]
SIZES = [(16, 128, 2), (16, 64, 4), (64, 32, 2), (3, 20, 2), (32, 80, 6)]  # block size, head dim, heads
TOLERANCE = {"float32": 2e-5, "bfloat16": 1.6e-2}
IMPLEMENTATIONS = [Implementation.XLA, Implementation.PALLAS]  # the latter interpreted


def make_layout(block_size: int, head_dim: int, dtype: str = "int8") -> KVLayout:
    return KVLayout(2, -(-400 // block_size) + 8, block_size, 2, head_dim, jnp.dtype(dtype))


def quantized(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integers and bfloat16 scales of vectors, written down once more in NumPy."""
    x = np.asarray(x, np.float32)
    scale = (np.abs(x).max(axis=-1) * np.float32(1 / 127)).astype(ml_dtypes.bfloat16)
    reciprocal = np.float32(1) / np.where(scale == 0, np.float32(1), scale.astype(np.float32))
    return np.clip(np.rint(x * reciprocal[..., None]), -127, 127).astype(np.int8), scale


def restored(x: np.ndarray) -> np.ndarray:
    values, scale = quantized(x)
    return values.astype(np.float32) * scale.astype(np.float32)[..., None]


def put(part: np.ndarray, layout: KVLayout, row: int, offset: int, vectors: np.ndarray) -> None:
    """One slot of all heads: the values, and the bytes of the scales behind the slots."""
    values, scale = quantized(vectors)  # [kv_heads, head_dim]
    part[row, :, offset] = values
    flat = part[row].reshape(layout.num_kv_heads, -1)[:, layout.block_size * layout.head_dim :]
    scale_bytes = scale.view(np.int8).reshape(-1, 2)  # little end first
    flat[:, offset], flat[:, layout.block_size + offset] = scale_bytes[:, 0], scale_bytes[:, 1]


def quantized_batch(batch: Batch, layout: KVLayout, seed: int) -> tuple[Batch, Batch, KVPool]:
    """The batch over an int8 pool, what it means in floats, and the pool once layer 1 is written.

    Any bytes lie where no token does, those of a scale that is not a number included.
    """
    rng = np.random.default_rng(seed)
    pools, written, meant = [], [], []
    for part, fresh in ((batch.pool.k, batch.k), (batch.pool.v, batch.v)):
        old = np.asarray(part, np.float32)
        pool = rng.integers(-128, 127, layout.shape, np.int8, endpoint=True)
        pool[rng.random(layout.shape[0]) < 0.2] = 127  # 0x7F7F, a scale beyond all others
        pool[rng.random(layout.shape[0]) < 0.2] = -1  # 0xFFFF, no number
        for row, offset in np.argwhere(~np.isnan(old).any(axis=(1, 3))):
            put(pool, layout, row, offset, old[row, :, offset])
        after = pool.copy()
        for token, slot in enumerate(np.asarray(batch.meta.slots)):
            if slot < layout.num_blocks * layout.block_size:
                row = layout.num_blocks + slot // layout.block_size
                put(after, layout, row, slot % layout.block_size, np.asarray(fresh, np.float32)[token])
        pools.append(pool)
        written.append(after)
        meant.append(restored(np.where(np.isnan(old), 0, old)))
    floats = batch._replace(
        pool=KVPool(*(jnp.asarray(part) for part in meant)),
        k=jnp.asarray(restored(np.asarray(batch.k, np.float32))),
        v=jnp.asarray(restored(np.asarray(batch.v, np.float32))),
    )
    return batch._replace(pool=KVPool(*map(jnp.asarray, pools))), floats, KVPool(*map(jnp.asarray, written))


@cache
def compiled(layout: KVLayout, implementation: Implementation) -> Any:
    @jax.jit
    def step(batch: Batch) -> tuple[jax.Array, KVPool]:
        pool = write_kv(batch.pool, batch.k, batch.v, batch.meta, layout, 1, implementation=implementation)
        out = paged_attention(batch.q, pool, batch.meta, layout, 1, scoring=SCORING, implementation=implementation)
        return out, pool

    return step


def check(
    sizes: tuple[int, int, int],
    dtype: str,
    spans: list[tuple[int, int]],
    implementation: Implementation,
    seed: int = 0,
    **padding: int,
) -> None:
    block_size, head_dim, heads = sizes
    floats_layout = make_layout(block_size, head_dim, "float32")
    drawn = make_batch(np.random.default_rng(seed), floats_layout, heads, spans, **padding)
    drawn = drawn._replace(**{name: getattr(drawn, name).astype(dtype) for name in ("q", "k", "v")})
    layout = make_layout(block_size, head_dim)
    with jax.default_matmul_precision("highest"):
        batch, floats, written = quantized_batch(drawn, layout, seed)
        out, pool = compiled(layout, implementation)(batch._replace(tables=[]))
    assert out.dtype == dtype
    want = attention_in_float64(floats, floats_layout, 1, spans, SCORING)
    got = np.asarray(out, np.float64)
    assert np.abs(got - want).max() <= TOLERANCE[dtype] * np.abs(want).max()
    for part, expected in zip(pool, written, strict=True):
        np.testing.assert_array_equal(np.asarray(part), np.asarray(expected))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_mixed_batches(sizes: tuple[int, int, int], dtype: str, implementation: Implementation) -> None:
    check(sizes, dtype, MIXED, implementation, pad_tokens=5, pad_entries=3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=20)
@given(data=st.data())
def test_any_batch(implementation: Implementation, data: st.DataObject) -> None:
    span = st.tuples(st.sampled_from([0, 1, 15, 16, 17, 60]), st.sampled_from([1, 1, 2, 17]))
    spans = data.draw(st.lists(span, min_size=1, max_size=4))
    padding = {"pad_tokens": 68 - sum(count for _, count in spans), "pad_entries": 4 - len(spans), "columns": 8}
    check((16, 64, 4), "float32", spans, implementation, data.draw(st.integers(0, 99)), **padding)


def test_what_comes_back_is_within_half_a_step() -> None:
    x = np.random.default_rng(0).standard_normal((200, 3, 64)).astype(np.float32) * np.float32(40)
    stored = quantize(jnp.asarray(x))
    scale = np.asarray(scale_of(stored.low, stored.high))
    error = np.abs(np.asarray(stored.values, np.float32) * scale[..., None] - x)
    # bfloat16 rounds the scale by one part in 256 at most, which the largest value may feel.
    largest = np.abs(x).max(axis=-1, keepdims=True)
    assert (error <= np.maximum(scale[..., None] / 2, largest / 256)).all()
    assert np.linalg.norm(error) / np.linalg.norm(x) < 8e-3


def test_zeros_stay_zeros_and_what_is_no_number_stays_none() -> None:
    x = jnp.asarray([[0.0, 0.0], [1.0, jnp.nan], [jnp.inf, 1.0], [3e38, -1.0]], jnp.float32)[:, None]
    stored = quantize(x)
    with np.errstate(invalid="ignore"):
        back = np.asarray(stored.values, np.float32) * np.asarray(scale_of(stored.low, stored.high))[..., None]
    assert (back[0] == 0).all()
    assert np.isnan(back[1]).all() and np.isnan(back[2]).any()
    np.testing.assert_allclose(back[3, 0, 0], 3e38, rtol=1e-2)


def test_a_block_has_room_for_its_scales() -> None:
    for block_size, head_dim, rows in [(16, 128, 17), (64, 128, 65), (64, 64, 66), (16, 256, 17), (128, 64, 132)]:
        layout = KVLayout(3, 5, block_size, 2, head_dim, jnp.dtype(jnp.int8))
        assert layout.shape == (15, 2, rows, head_dim)
        assert layout.block_bytes == 2 * 3 * 2 * rows * head_dim
        assert layout.compute_dtype(jnp.dtype(jnp.bfloat16)) == jnp.bfloat16
    floats = KVLayout(3, 5, 16, 2, 128, jnp.dtype(jnp.bfloat16))
    assert floats.shape == (15, 2, 16, 128) and floats.compute_dtype(jnp.dtype(jnp.float32)) == jnp.bfloat16


def test_bytes_that_a_kernel_cannot_address_are_refused() -> None:
    """Triton's 32-bit offsets have a sign, and Pallas takes them up to 2**32 bytes: too far where an element is one."""
    launch = Launch("copy", lambda *_: None, (1,), [jax.ShapeDtypeStruct((3, 1 << 30), jnp.int8)])
    with pytest.raises(ValueError, match=r"3,221,225,472 .*fewer blocks"):
        jax.eval_shape(launch, jax.ShapeDtypeStruct((3, 1 << 30), jnp.int8))
