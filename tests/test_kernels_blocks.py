"""Whole blocks move between the pool and staging arrays, and inside the pool, without a copy of the pool."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcept_kernels.attention import Implementation
from jaxcept_kernels.blocks import (
    block_checksums,
    copy_blocks,
    gather_blocks,
    gather_each,
    scatter_blocks,
    scatter_each,
)
from jaxcept_kernels.layout import KVLayout, KVPool

LAYOUT = KVLayout(3, 40, 4, 2, 8, jnp.dtype(jnp.float32))
over_both = pytest.mark.parametrize("implementation", [Implementation.XLA, Implementation.PALLAS])


def random_pool() -> KVPool:
    rng = np.random.default_rng(0)
    return KVPool(*(jnp.asarray(rng.standard_normal(LAYOUT.shape), jnp.float32) for _ in range(2)))


def by_layer(part: jax.Array) -> np.ndarray:
    """[layers, blocks, kv_heads, block_size, head_dim]"""
    return np.array(part).reshape(LAYOUT.num_layers, LAYOUT.num_blocks, *LAYOUT.shape[1:])


def ids(*values: int) -> jax.Array:
    return jnp.asarray(values, jnp.int32)


@over_both
def test_gather_takes_every_layer_of_a_block_and_zeros_for_padding(implementation: Implementation) -> None:
    pool = random_pool()
    staging = gather_blocks(pool, LAYOUT, ids(7, 0, 39, 40, -1), implementation=implementation)
    for part, staged in zip(pool, staging, strict=True):
        assert staged.shape == (5, 3, 2, 4, 8)
        np.testing.assert_array_equal(staged[:3], np.moveaxis(by_layer(part)[:, [7, 0, 39]], 0, 1))
        assert not np.asarray(staged[3:]).any()


@over_both
def test_scatter_puts_blocks_back_and_drops_padding(implementation: Implementation) -> None:
    pool = random_pool()
    staging = KVPool(*(jnp.full((4, 3, 2, 4, 8), i + 1.0) for i in range(2)))
    got = scatter_blocks(pool, LAYOUT, ids(5, 40, 2, -1), staging, implementation=implementation)
    for i, (part, before) in enumerate(zip(got, pool, strict=True)):
        want = by_layer(before)
        want[:, [5, 2]] = i + 1.0
        np.testing.assert_array_equal(by_layer(part), want)


@over_both
def test_a_round_trip_restores_a_block_elsewhere(implementation: Implementation) -> None:
    pool = random_pool()
    staging = gather_blocks(pool, LAYOUT, ids(3, 4), implementation=implementation)
    moved = scatter_blocks(pool, LAYOUT, ids(11, 30), staging, implementation=implementation)
    np.testing.assert_array_equal(by_layer(moved.v)[:, [11, 30]], by_layer(pool.v)[:, [3, 4]])


@over_both
def test_copies_read_before_they_write_and_padding_is_dropped(implementation: Implementation) -> None:
    pool = random_pool()
    got = copy_blocks(pool, LAYOUT, ids(1, 2, 40, 9, -1), ids(2, 3, 5, 40, 6), implementation=implementation)
    for part, before in zip(got, pool, strict=True):
        want = by_layer(before)
        want[:, [2, 3]] = by_layer(before)[:, [1, 2]]
        np.testing.assert_array_equal(by_layer(part), want)


@over_both
def test_blocks_travel_one_by_one_with_their_checksums(implementation: Implementation) -> None:
    pool = random_pool()
    blocks, checksums = gather_each(pool, LAYOUT, ids(7, 39, 40), implementation=implementation)
    for block, index in zip(blocks[:2], (7, 39), strict=True):
        np.testing.assert_array_equal(block, [by_layer(part)[:, index] for part in pool])
    assert not np.asarray(blocks[2]).any()
    np.testing.assert_array_equal(checksums, block_checksums(jnp.stack(blocks)))
    got = scatter_each(pool, LAYOUT, ids(40, 5, -1), blocks, implementation=implementation)
    for part, before in zip(got, pool, strict=True):
        want = by_layer(before)
        want[:, 5] = by_layer(before)[:, 39]
        np.testing.assert_array_equal(by_layer(part), want)


def test_the_checksum_is_the_sum_of_mixed_words() -> None:
    block = np.random.default_rng(3).standard_normal((2, 3, 2, 4, 8)).astype(np.float32)
    for head, got in enumerate(np.asarray(block_checksums(jnp.asarray(block)[None]))[0].tolist()):
        want = 0
        for place, word in enumerate(block[:, :, head].reshape(-1).view(np.uint32).tolist()):
            mixed = (word + place * 0x9E3779B9) % 2**32
            mixed = (mixed ^ mixed >> 16) * 0x85EBCA6B % 2**32
            mixed = (mixed ^ mixed >> 13) * 0xC2B2AE35 % 2**32
            want = (want + (mixed ^ mixed >> 16)) % 2**32
        assert got == want


def assert_in_place(function: Callable[..., KVPool], pool: KVPool, *arguments: object) -> None:
    memory = jax.jit(function, donate_argnums=0).lower(pool, *arguments).compile().memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= 2 * pool.k.nbytes
    assert memory.temp_size_in_bytes < pool.k.nbytes // 2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])  # XLA's CPU scatters bfloat16 by way of float32
def test_a_donated_pool_stays_in_place(dtype: jnp.dtype) -> None:
    pool = KVPool(*(part.astype(dtype) for part in random_pool()))
    staging = gather_blocks(pool, LAYOUT, ids(1, 2))
    assert_in_place(lambda pool, at, staged: scatter_blocks(pool, LAYOUT, at, staged), pool, ids(3, 4), staging)
    blocks, _ = gather_each(pool, LAYOUT, ids(1, 2))
    assert_in_place(lambda pool, at, blocks: scatter_each(pool, LAYOUT, at, blocks), pool, ids(3, 4), blocks)
    assert_in_place(lambda pool, src, dst: copy_blocks(pool, LAYOUT, src, dst), pool, ids(1, 2), ids(3, 4))
