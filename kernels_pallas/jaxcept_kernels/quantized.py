"""Keys and values in eight bits: a token's vector of one head as integers of -127 to 127, and one scale.

The scale is the token's own and not its block's. What a token becomes then depends on nothing but the token: it is the
same bits whether it was decoded alone or computed again in a chunk, and a block that fills up is never touched again.

The two bytes of a scale (bfloat16) lie behind the slots of the same head of the same block, first the low bytes of all
slots, then the high ones. A block stays one run of bytes, and whoever moves blocks need not know.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

LARGEST = 127.0
SCALE_BYTES = 2


class Quantized(NamedTuple):
    """Vectors and their scales, by token and head."""

    values: jax.Array  # [tokens, kv_heads, head_dim] int8
    low: jax.Array  # [tokens, kv_heads] int8, of the scale's bits
    high: jax.Array  # [tokens, kv_heads] int8


def quantize(
    x: jax.Array,  # [tokens, kv_heads, head_dim]
) -> Quantized:
    """The nearest integers under the scale |largest| / 127, rounded to bfloat16. What is not finite stays so: NaN."""
    x = x.astype(jnp.float32)
    scale = (jnp.max(jnp.abs(x), axis=-1) * jnp.float32(1 / LARGEST)).astype(jnp.bfloat16)
    # Multiplied by the reciprocal: XLA does that to some divisions and not to others.
    reciprocal = 1.0 / jnp.where(scale == 0, 1.0, scale.astype(jnp.float32))
    # The scale may have been rounded down: its largest value is a little over 127 then.
    values = jnp.clip(jnp.round(x * reciprocal[..., None]), -LARGEST, LARGEST)
    bits = jax.lax.bitcast_convert_type(scale, jnp.uint16)
    low, high = bits.astype(jnp.uint8), (bits >> 8).astype(jnp.uint8)
    return Quantized(values.astype(jnp.int8), *(jax.lax.bitcast_convert_type(x, jnp.int8) for x in (low, high)))


def scale_of(
    low: jax.Array,  # int8
    high: jax.Array,  # int8, of the same shape
) -> jax.Array:
    """The scales of these bytes, float32."""
    bits = ((high.astype(jnp.int32) & 255) << 24) | ((low.astype(jnp.int32) & 255) << 16)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
