"""Products of rows with the matrix of their group: a program has a tile of one group's rows and a block of columns."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from jaxcept_kernels.group_tiles import cut_groups
from jaxcept_kernels.pallas.common import Launch
from jaxcept_kernels.pallas.tiles import check_tile


@dataclass(frozen=True, slots=True)
class ProductTile:
    """Sizes of one launch, for two-byte elements."""

    rows: int
    columns: int
    depth: int  # input features of an iteration
    warps: int
    stages: int  # iterations whose loads are under way at once

    def __post_init__(self) -> None:
        check_tile(self, ("rows", "columns", "depth"))


# By the rows that a group has on average. Chosen by registers and shared memory; not measured.
FEW = ProductTile(rows=16, columns=64, depth=128, warps=4, stages=3)
MANY = ProductTile(rows=64, columns=128, depth=64, warps=8, stages=3)
FLOAT32 = ProductTile(rows=16, columns=32, depth=32, warps=4, stages=3)  # summed in registers, not by tensor cores


def grouped_linear_pallas(
    x: jax.Array,  # [rows, in]
    weight: jax.Array,  # [groups, in, out]
    group_sizes: jax.Array,  # [groups] int32
    *,
    tile: ProductTile | None = None,
) -> jax.Array:
    """x @ weight[group] in x's dtype, added up in float32: [rows, out]. Rows behind the last group hold anything."""
    rows, features = x.shape
    groups, _, out = weight.shape
    tile = tile or tile_for(rows, groups, x.dtype)
    tiles = cut_groups(group_sizes, rows, tile.rows)
    launch = Launch(
        name="grouped_linear",
        kernel=make_kernel(tile, features, out, x.dtype),
        # Blocks of columns come first: those of one group's matrix run side by side and share its rows.
        grid=(pl.cdiv(out, tile.columns), tiles.group.shape[0]),
        results=[jax.ShapeDtypeStruct((rows, out), x.dtype)],
        warps=tile.warps,
        stages=tile.stages,
    )
    (product,) = launch(tiles.group, tiles.first, tiles.rows, x, weight.reshape(-1, out))
    return product


def tile_for(rows: int, groups: int, dtype: jnp.dtype) -> ProductTile:
    """The sizes for so many rows of so many groups."""
    if dtype == jnp.float32:
        return FLOAT32
    return FEW if rows <= groups * MANY.rows // 2 else MANY


def make_kernel(tile: ProductTile, features: int, out: int, dtype: jnp.dtype):  # type: ignore[no-untyped-def]
    """The kernel of a launch with these sizes."""
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None

    def kernel(group_ref, first_ref, rows_ref, x_ref, weight_ref, out_ref):  # type: ignore[no-untyped-def]
        block, here = pl.program_id(0), pl.program_id(1)
        count, base = rows_ref[here], group_ref[here] * features
        row = jnp.arange(tile.rows, dtype=jnp.int32)
        column = block * tile.columns + jnp.arange(tile.columns, dtype=jnp.int32)[None, :]
        is_row, is_column = (row < count)[:, None], column < out
        line = (first_ref[here] + row)[:, None]

        def body(i, summed):  # type: ignore[no-untyped-def]
            k = i * tile.depth + jnp.arange(tile.depth, dtype=jnp.int32)
            is_k = k < features
            part = pltriton.load(x_ref.at[line, k[None, :]], mask=is_row & is_k[None, :], other=0)
            matrix = pltriton.load(weight_ref.at[(base + k)[:, None], column], mask=is_k[:, None] & is_column, other=0)
            return summed + pltriton.dot(part, matrix, precision=precision)

        # Bounds of one type: Triton's compiler wants them, and lowering alone does not tell.
        num_parts = jnp.where(count > 0, jnp.int32(pl.cdiv(features, tile.depth)), 0)
        summed = lax.fori_loop(jnp.int32(0), num_parts, body, jnp.zeros((tile.rows, tile.columns), jnp.float32))
        pltriton.store(out_ref.at[line, column], summed.astype(out_ref.dtype), mask=is_row & is_column)

    return kernel
