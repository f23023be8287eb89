"""Reductions over the rows of a wide matrix, in forms that XLA computes fast on every backend."""

from __future__ import annotations

import jax
import jax.numpy as jnp

RUN = 64  # columns of the first pass's maxima


def argmax_rows(
    logits: jax.Array,  # [rows, columns]
) -> jax.Array:
    """Column of each row's largest value, the first one among equals: [rows] int32. A NaN counts as the largest.

    XLA's argmax on the CPU walks the columns one by one. Maxima of runs of columns come vectorised, and leave two
    short rows to walk: the maxima, and the columns of the run that has the largest.
    """
    rows, columns = logits.shape
    padded = jnp.pad(logits, ((0, 0), (0, -columns % RUN)), constant_values=-jnp.inf)
    runs = padded.reshape(rows, -1, RUN)
    best = jnp.argmax(jnp.max(runs, axis=-1), axis=-1).astype(jnp.int32)
    within = jnp.argmax(runs[jnp.arange(rows), best], axis=-1).astype(jnp.int32)
    return best * RUN + within
