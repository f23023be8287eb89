"""The two operations a model's layer needs of the pool, and the switch between their implementations."""

from __future__ import annotations

from enum import StrEnum

import jax
import jax.numpy as jnp

from jaxcept_kernels.layout import AttentionMetadata, KVLayout, KVPool


class Implementation(StrEnum):
    """Who computes. XLA runs everywhere and is the reference."""

    XLA = "xla"


def attend(
    q: jax.Array,  # [tokens, heads, head_dim]
    k: jax.Array,  # [tokens, kv_heads, head_dim]
    v: jax.Array,  # [tokens, kv_heads, head_dim]
    pool: KVPool,
    meta: AttentionMetadata,
    layout: KVLayout,
    layer: int | jax.Array,
    *,
    scale: float,
    implementation: Implementation = Implementation.XLA,
) -> tuple[jax.Array, KVPool]:
    """Writes k and v of this step into the pool and attends causally over each sequence's whole context.

    Returns [tokens, heads, head_dim] and the pool with the tokens written.
    """
    raise NotImplementedError


def _dense_reference() -> jax.Array:
    return jnp.zeros(())
