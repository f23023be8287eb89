"""Whole blocks of the pool: out to a staging array, in from one, and from one place to another."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcept_kernels.layout import KVLayout, KVPool


def gather_blocks(
    pool: KVPool,
    layout: KVLayout,
    block_ids: jax.Array,  # [blocks] int32
) -> KVPool:
    """A copy of all layers of some blocks, each part [blocks, layers, kv_heads, block_size, head_dim].

    Ids out of range (padding) give zeros.
    """
    rows = layer_rows(layout, block_ids)
    shape = (block_ids.shape[0], layout.num_layers, *layout.shape[1:])

    def take(part: jax.Array) -> jax.Array:
        return part.at[rows].get(mode="fill", fill_value=0).reshape(shape)

    return KVPool(take(pool.k), take(pool.v))


def scatter_blocks(
    pool: KVPool,
    layout: KVLayout,
    block_ids: jax.Array,  # [blocks] int32, no id twice
    staging: KVPool,  # [blocks, layers, kv_heads, block_size, head_dim] each
) -> KVPool:
    """The pool with the staged blocks in their places; ids out of range (padding) are dropped. In place if donated."""
    rows = layer_rows(layout, block_ids)

    def put(part: jax.Array, staged: jax.Array) -> jax.Array:
        return part.at[rows].set(staged.reshape(-1, *layout.shape[1:]), mode="drop")

    return KVPool(put(pool.k, staging.k), put(pool.v, staging.v))


def copy_blocks(
    pool: KVPool,
    layout: KVLayout,
    src_ids: jax.Array,  # [blocks] int32
    dst_ids: jax.Array,  # [blocks] int32, no id twice
) -> KVPool:
    """The pool with blocks copied, all read before any is written. A pair with an id out of range is dropped."""
    in_range = (src_ids >= 0) & (src_ids < layout.num_blocks)
    dst_ids = jnp.where(in_range, dst_ids, layout.num_blocks)
    return scatter_blocks(pool, layout, dst_ids, gather_blocks(pool, layout, src_ids))


def layer_rows(layout: KVLayout, block_ids: jax.Array) -> jax.Array:
    """Pool rows of blocks in every layer, block by block: [blocks * layers]; past the pool for an id out of range."""
    layers = jnp.arange(layout.num_layers, dtype=jnp.int32) * layout.num_blocks
    rows = block_ids[:, None] + layers[None, :]
    in_range = (block_ids >= 0) & (block_ids < layout.num_blocks)
    return jnp.where(in_range[:, None], rows, layout.shape[0]).reshape(-1)
