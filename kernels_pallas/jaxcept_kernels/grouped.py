"""Products of rows with the matrix of their group, such as those of tokens with the experts that they are routed to.

The rows lie sorted by group. `jax.lax.ragged_dot` would say the same, but XLA multiplies every row with every matrix
there, on the CPU and for sm_80, and lets what is not finite in one row or matrix into others.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcept_kernels.attention import Implementation
from jaxcept_kernels.group_tiles import cut_groups
from jaxcept_kernels.library import native_available
from jaxcept_kernels.linear import PANEL, linear
from jaxcept_kernels.pallas.grouped_linear import grouped_linear_pallas


def grouped_linear(
    x: jax.Array,  # [rows, in], sorted by group
    weight: jax.Array,  # [groups, in, out], or each packed: [groups, ceil(out / 16), in, 16]
    group_sizes: jax.Array,  # [groups] int32, rows of each; their sum is `rows` at most
    *,
    out_features: int | None = None,
    implementation: Implementation = Implementation.XLA,
) -> jax.Array:
    """x @ weight[group] in x's dtype: [rows, out]. Rows behind the last group hold anything, and disturb no others.

    Only matrices of groups that have rows are read. `out_features` matters for packed weights alone, as in `linear`.
    Those are multiplied by the CPU's own code, where a row's result is the same bits whatever the other rows are.
    Raises ValueError on shapes that do not fit.
    """
    check_shapes(x, weight, group_sizes)
    if weight.ndim == 3:
        if implementation is Implementation.PALLAS:
            return grouped_linear_pallas(x, weight, group_sizes)
        return grouped_linear_xla(x, weight, group_sizes, weight.shape[2])
    out = weight.shape[1] * PANEL if out_features is None else out_features
    if x.dtype == weight.dtype == jnp.float32 and native_available():
        result = jax.ShapeDtypeStruct((x.shape[0], out), x.dtype)
        return jax.ffi.ffi_call("jaxcept_grouped_linear", result)(x, weight, group_sizes)
    return grouped_linear_xla(x, weight, group_sizes, out)


def grouped_linear_xla(
    x: jax.Array,  # [rows, in]
    weight: jax.Array,  # [groups, in, out], or packed
    group_sizes: jax.Array,  # [groups] int32
    out_features: int,
) -> jax.Array:
    """The reference: a loop over tiles of one group's rows. Rows behind the last group are zero."""
    rows = x.shape[0]
    size = tile_rows(rows, weight.shape[0])
    tiles = cut_groups(group_sizes, rows, size)
    x = jnp.pad(x, ((0, size), (0, 0)))  # so that every tile's slice is within
    row = jnp.arange(size, dtype=jnp.int32)[:, None]

    def body(i: jax.Array, done: jax.Array) -> jax.Array:
        first = tiles.first[i]
        matrix = jax.lax.dynamic_index_in_dim(weight, tiles.group[i], keepdims=False)
        product = linear(jax.lax.dynamic_slice_in_dim(x, first, size), matrix, out_features=out_features)
        kept = jax.lax.dynamic_slice_in_dim(done, first, size)
        return jax.lax.dynamic_update_slice_in_dim(done, jnp.where(row < tiles.rows[i], product, kept), first, 0)

    done: jax.Array = jax.lax.fori_loop(0, tiles.num_used, body, jnp.zeros((rows + size, out_features), x.dtype))
    return done[:rows]


def tile_rows(num_rows: int, groups: int) -> int:
    """About the rows that a group has on average: 16 to 128, a power of two."""
    rows = 16
    while rows < 128 and rows * groups < num_rows:
        rows *= 2
    return rows


def check_shapes(x: jax.Array, weight: jax.Array, group_sizes: jax.Array) -> None:
    """Raises ValueError where the operands of `grouped_linear` do not fit."""
    if weight.ndim not in (3, 4) or (weight.ndim == 4 and weight.shape[3] != PANEL):
        raise ValueError(
            f"grouped_linear: weight of shape {weight.shape}: expected [groups, in, out] or [groups, panels, in, "
            f"{PANEL}]"
        )
    features = weight.shape[-2]
    if x.ndim != 2 or x.shape[1] != features:
        raise ValueError(f"grouped_linear: x of shape {x.shape}: expected [rows, {features}]")
    if group_sizes.shape != weight.shape[:1]:
        raise ValueError(f"grouped_linear: group_sizes of shape {group_sizes.shape}: expected [{weight.shape[0]}]")
