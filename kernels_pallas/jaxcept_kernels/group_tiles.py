"""Rows that are sorted by their group, cut into tiles of one group each."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class GroupTiles(NamedTuple):
    """Runs of rows of one group each, in the order of the rows; a tile without rows does nothing."""

    group: jax.Array  # [tiles] int32
    first: jax.Array  # [tiles] int32, its first row
    rows: jax.Array  # [tiles] int32, how many
    num_used: jax.Array  # int32 scalar; the tiles behind these have no rows


def cut_groups(
    group_sizes: jax.Array,  # [groups] int32
    num_rows: int,
    tile_rows: int,
) -> GroupTiles:
    """The tiles of so many rows at most, as many as any sizes may need whose sum is `num_rows` at most."""
    groups = group_sizes.shape[0]
    per_group = (group_sizes + tile_rows - 1) // tile_rows
    tile_end = jnp.cumsum(per_group, dtype=jnp.int32)
    start = jnp.cumsum(group_sizes, dtype=jnp.int32) - group_sizes
    # Each group with rows has one tile that may be short of all but one of them.
    most = (num_rows + min(groups, num_rows) * (tile_rows - 1)) // tile_rows
    index = jnp.arange(most, dtype=jnp.int32)
    # All compared at once: a search by halves is a loop of small kernels in every layer of a step.
    group = jnp.searchsorted(tile_end, index, side="right", method="compare_all").astype(jnp.int32)
    is_used = group < groups
    group = jnp.minimum(group, groups - 1)
    skipped = (index - (tile_end[group] - per_group[group])) * tile_rows
    rows = jnp.where(is_used, jnp.minimum(tile_rows, group_sizes[group] - skipped), 0)
    return GroupTiles(group, jnp.where(is_used, start[group] + skipped, 0), rows, tile_end[-1])
