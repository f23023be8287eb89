"""The two operations that a model's layer needs of the pool, and the switch between their implementations."""

from __future__ import annotations

from enum import StrEnum

import jax

from jaxcept_kernels.layout import AttentionMetadata, KVLayout, KVPool


class Implementation(StrEnum):
    """Who computes. XLA runs everywhere and is the reference; NATIVE is the CPU's own code."""

    XLA = "xla"
    NATIVE = "native"


def write_kv(
    pool: KVPool,
    k: jax.Array,  # [tokens, kv_heads, head_dim]
    v: jax.Array,  # [tokens, kv_heads, head_dim]
    meta: AttentionMetadata,
    layout: KVLayout,
    layer: int,
    *,
    implementation: Implementation = Implementation.XLA,
) -> KVPool:
    """The pool with this step's keys and values of one layer in their slots; slots out of range are dropped."""
    block = meta.slots // layout.block_size
    row = jax.numpy.where(block < layout.num_blocks, layer * layout.num_blocks + block, layout.shape[0])
    offset = meta.slots % layout.block_size
    return KVPool(
        pool.k.at[row, :, offset, :].set(k.astype(pool.k.dtype), mode="drop"),
        pool.v.at[row, :, offset, :].set(v.astype(pool.v.dtype), mode="drop"),
    )


def paged_attention(
    q: jax.Array,  # [tokens, heads, head_dim]
    pool: KVPool,
    meta: AttentionMetadata,
    layout: KVLayout,
    layer: int,
    *,
    scale: float,
    implementation: Implementation = Implementation.XLA,
) -> jax.Array:
    """Causal attention of each token over its sequence's context in the pool: [tokens, heads, head_dim], q's dtype."""
    jnp = jax.numpy
    tokens, heads, dim = q.shape
    row = jnp.clip(jnp.searchsorted(meta.query_start, jnp.arange(tokens), side="right") - 1, 0, None)
    row = jnp.minimum(row, meta.context_len.shape[0] - 1)
    blocks = meta.block_tables[row] + layer * layout.num_blocks  # [tokens, max_blocks]
    group = heads // layout.num_kv_heads

    def gather(part: jax.Array) -> jax.Array:  # [tokens, kv_heads, context, head_dim]
        return jnp.moveaxis(part[blocks], 1, 2).reshape(tokens, layout.num_kv_heads, -1, dim)

    keys, values = gather(pool.k), gather(pool.v)
    grouped = q.reshape(tokens, layout.num_kv_heads, group, dim)
    scores = jnp.einsum("thgd,thkd->thgk", grouped, keys, preferred_element_type=jnp.float32) * scale
    visible = jnp.arange(keys.shape[2])[None, :] <= meta.positions[:, None]
    scores = jnp.where(visible[:, None, None, :], scores, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    out = jnp.einsum("thgk,thkd->thgd", weights, values, preferred_element_type=jnp.float32)
    return out.reshape(tokens, heads, dim).astype(q.dtype)
