"""The two operations that a model's layer needs of the pool, and the switch between their implementations."""

from __future__ import annotations

from enum import StrEnum

import jax

from jaxcept_kernels.layout import AttentionMetadata, KVLayout, KVPool
from jaxcept_kernels.reference import TileConfig, paged_attention_xla, write_kv_xla


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
    layer: int | jax.Array,
    *,
    implementation: Implementation = Implementation.XLA,
) -> KVPool:
    """The pool with this step's keys and values of one layer in their slots; slots out of range are dropped.

    In place where the pool is donated to the jitted step. `layer` is an int or an int32 scalar.
    """
    return write_kv_xla(pool, k, v, meta, layout, layer)


def paged_attention(
    q: jax.Array,  # [tokens, heads, head_dim]
    pool: KVPool,
    meta: AttentionMetadata,
    layout: KVLayout,
    layer: int | jax.Array,
    *,
    scale: float,
    implementation: Implementation = Implementation.XLA,
    tiles: TileConfig = TileConfig(),  # noqa: B008 (a frozen value)
) -> jax.Array:
    """Causal attention of each token over its sequence's context in the pool: [tokens, heads, head_dim], q's dtype.

    Padding tokens give zeros. `layer` is an int or an int32 scalar; `tiles` matters to the XLA implementation alone.
    """
    return paged_attention_xla(q, pool, meta, layout, layer, scale=scale, tiles=tiles)
