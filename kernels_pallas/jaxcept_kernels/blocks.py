"""Whole blocks of the pool: out to a staging array, in from one, and from one place to another.

PALLAS moves them by kernels of its own, everything else by XLA; the results are the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxcept_kernels.attention import Implementation
from jaxcept_kernels.layout import KVLayout, KVPool
from jaxcept_kernels.pallas.blocks import (
    copy_blocks_pallas,
    gather_blocks_pallas,
    gather_each_pallas,
    scatter_blocks_pallas,
    scatter_each_pallas,
)


def gather_blocks(
    pool: KVPool,
    layout: KVLayout,
    block_ids: jax.Array,  # [blocks] int32
    *,
    implementation: Implementation = Implementation.XLA,
) -> KVPool:
    """A copy of all layers of some blocks, each part [blocks, layers, kv_heads, block_rows, head_dim].

    Ids out of range (padding) give zeros.
    """
    if implementation is Implementation.PALLAS:
        return gather_blocks_pallas(pool, layout, block_ids)
    rows = layer_rows(layout, block_ids)
    shape = (block_ids.shape[0], layout.num_layers, *layout.shape[1:])

    def take(part: jax.Array) -> jax.Array:
        return part.at[rows].get(mode="fill", fill_value=0).reshape(shape)

    return KVPool(take(pool.k), take(pool.v))


def scatter_blocks(
    pool: KVPool,
    layout: KVLayout,
    block_ids: jax.Array,  # [blocks] int32, no id twice
    staging: KVPool,  # [blocks, layers, kv_heads, block_rows, head_dim] each
    *,
    implementation: Implementation = Implementation.XLA,
) -> KVPool:
    """The pool with the staged blocks in their places; ids out of range (padding) are dropped. In place if donated."""
    if implementation is Implementation.PALLAS:
        return scatter_blocks_pallas(pool, layout, block_ids, staging)
    rows = layer_rows(layout, block_ids)

    def put(part: jax.Array, staged: jax.Array) -> jax.Array:
        return part.at[rows].set(staged.reshape(-1, *layout.shape[1:]), mode="drop")

    return KVPool(put(pool.k, staging.k), put(pool.v, staging.v))


def gather_each(
    pool: KVPool,
    layout: KVLayout,
    block_ids: jax.Array,  # [blocks] int32
    *,
    implementation: Implementation = Implementation.XLA,
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Every block as an array of its own, K before V: [2, layers, kv_heads, block_rows, head_dim]; and their checksums.

    The checksums are those of `block_checksums`. Ids out of range (padding) give zeros.
    """
    if implementation is Implementation.PALLAS:
        each = gather_each_pallas(pool, layout, block_ids)
        return each, block_checksums(jnp.stack(each))
    staging = gather_blocks(pool, layout, block_ids)
    blocks = jnp.stack([staging.k, staging.v], axis=1)
    return tuple(blocks[i] for i in range(block_ids.shape[0])), block_checksums(blocks)


def scatter_each(
    pool: KVPool,
    layout: KVLayout,
    block_ids: jax.Array,  # [blocks] int32, no id twice
    blocks: Sequence[jax.Array],  # of `gather_each`
    *,
    implementation: Implementation = Implementation.XLA,
) -> KVPool:
    """The pool with the blocks in their places; ids out of range (padding) are dropped. In place if donated."""
    if implementation is Implementation.PALLAS:
        return scatter_each_pallas(pool, layout, block_ids, blocks)
    staging = jnp.stack(blocks)
    return scatter_blocks(pool, layout, block_ids, KVPool(staging[:, 0], staging[:, 1]))


def block_checksums(
    blocks: jax.Array,  # [blocks, 2, layers, kv_heads, block_rows, head_dim]
) -> jax.Array:
    """[blocks, kv_heads] uint32 over the bits of each block. Per head, so that sharded heads need not be gathered.

    Every element is mixed with its place before the sum: a change of one element always shows, elements in each other's
    places show but for one chance in 2**32. The mix is the finalizer of MurmurHash3.
    """
    _, parts, layers, _, rows, head_dim = blocks.shape
    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[blocks.dtype.itemsize]
    words = jax.lax.bitcast_convert_type(blocks, bits).astype(jnp.uint32)
    places = jnp.arange(parts * layers * rows * head_dim, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
    mixed = words + places.reshape(1, parts, layers, 1, rows, head_dim)
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> 16), axis=(1, 2, 4, 5), dtype=jnp.uint32)


def copy_blocks(
    pool: KVPool,
    layout: KVLayout,
    src_ids: jax.Array,  # [blocks] int32
    dst_ids: jax.Array,  # [blocks] int32, no id twice
    *,
    implementation: Implementation = Implementation.XLA,
) -> KVPool:
    """The pool with blocks copied, all read before any is written. A pair with an id out of range is dropped."""
    if implementation is Implementation.PALLAS:
        return copy_blocks_pallas(pool, layout, src_ids, dst_ids)
    in_range = (src_ids >= 0) & (src_ids < layout.num_blocks)
    dst_ids = jnp.where(in_range, dst_ids, layout.num_blocks)
    return scatter_blocks(pool, layout, dst_ids, gather_blocks(pool, layout, src_ids))


def layer_rows(layout: KVLayout, block_ids: jax.Array) -> jax.Array:
    """Pool rows of blocks in every layer, block by block: [blocks * layers]; past the pool for an id out of range."""
    layers = jnp.arange(layout.num_layers, dtype=jnp.int32) * layout.num_blocks
    rows = block_ids[:, None] + layers[None, :]
    in_range = (block_ids >= 0) & (block_ids < layout.num_blocks)
    return jnp.where(in_range[:, None], rows, layout.shape[0]).reshape(-1)
