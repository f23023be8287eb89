"""Matrix products of activations with weights: a plain weight goes to XLA, a packed one to the CPU's own code."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def linear(
    x: jax.Array,  # [tokens, in]
    weight: jax.Array,  # [in, out], or packed
) -> jax.Array:
    """x @ weight in x's dtype: [tokens, out]."""
    return jnp.dot(x, weight)
