"""Whole blocks, all layers in one launch: out to a staging array, in from one, and from one place to another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from jaxcept_kernels.layout import KVLayout, KVPool
from jaxcept_kernels.pallas.common import Launch, power_of_two

ELEMENTS = 2048  # most elements that one program moves of K, and of V


def gather_blocks_pallas(
    pool: KVPool,
    layout: KVLayout,
    block_ids: jax.Array,  # [blocks] int32
) -> KVPool:
    """A copy of all layers of some blocks, each part [blocks, layers, kv_heads, block_rows, head_dim].

    Ids out of range (padding) give zeros.
    """
    count, layers, num_blocks = block_ids.shape[0], layout.num_layers, layout.num_blocks
    length, chunk = chunking(layout)

    def kernel(ids: jax.Ref, k_in: jax.Ref, v_in: jax.Ref, k_out: jax.Ref, v_out: jax.Ref) -> None:
        which, layer = pl.program_id(0), pl.program_id(1)
        column = pl.program_id(2) * chunk + jnp.arange(chunk, dtype=jnp.int32)
        block = ids[which]
        is_live = (block >= 0) & (block < num_blocks)
        row = layer * num_blocks + jnp.where(is_live, block, 0)
        inside = column < length
        for source, target in ((k_in, k_out), (v_in, v_out)):
            values = pltriton.load(source.at[row, column], mask=inside & is_live, other=0)
            pltriton.store(target.at[which * layers + layer, column], values, mask=inside)

    staged = jax.ShapeDtypeStruct((count * layers, length), layout.dtype)
    launch = Launch("gather_blocks", kernel, (count, layers, -(-length // chunk)), [staged, staged])
    parts = launch(block_ids, *(part.reshape(-1, length) for part in pool))
    return KVPool(*(part.reshape(count, layers, *layout.shape[1:]) for part in parts))


def scatter_blocks_pallas(
    pool: KVPool,
    layout: KVLayout,
    block_ids: jax.Array,  # [blocks] int32, no id twice
    staging: KVPool,  # [blocks, layers, kv_heads, block_rows, head_dim] each
) -> KVPool:
    """The pool with the staged blocks in their places; ids out of range (padding) are dropped. In place if donated."""
    count, layers, num_blocks = block_ids.shape[0], layout.num_layers, layout.num_blocks
    length, chunk = chunking(layout)

    def kernel(
        ids: jax.Ref,
        k_in: jax.Ref,
        v_in: jax.Ref,
        _k_old: jax.Ref,
        _v_old: jax.Ref,
        k_out: jax.Ref,
        v_out: jax.Ref,
    ) -> None:
        which, layer = pl.program_id(0), pl.program_id(1)
        column = pl.program_id(2) * chunk + jnp.arange(chunk, dtype=jnp.int32)
        block = ids[which]
        is_live = (block >= 0) & (block < num_blocks)
        row = layer * num_blocks + jnp.where(is_live, block, 0)
        mask = (column < length) & is_live
        for source, target in ((k_in, k_out), (v_in, v_out)):
            values = pltriton.load(source.at[which * layers + layer, column], mask=mask, other=0)
            pltriton.store(target.at[row, column], values, mask=mask)

    flat = tuple(part.reshape(-1, length) for part in pool)
    launch = Launch(
        name="scatter_blocks",
        kernel=kernel,
        grid=(count, layers, -(-length // chunk)),
        results=[jax.ShapeDtypeStruct(part.shape, part.dtype) for part in flat],
        aliases={3: 0, 4: 1},
    )
    parts = launch(block_ids, *(part.reshape(-1, length) for part in staging), *flat)
    return KVPool(*(part.reshape(layout.shape) for part in parts))


def gather_each_pallas(
    pool: KVPool,
    layout: KVLayout,
    block_ids: jax.Array,  # [blocks] int32
) -> tuple[jax.Array, ...]:
    """A copy of all layers of each block, K before V: an array [2, layers, kv_heads, block_rows, head_dim] for each.

    Ids out of range (padding) give zeros.
    """
    count, layers, num_blocks = block_ids.shape[0], layout.num_layers, layout.num_blocks
    length, chunk = chunking(layout)

    def kernel(ids: jax.Ref, k_in: jax.Ref, v_in: jax.Ref, *out: jax.Ref) -> None:
        which, layer = pl.program_id(0), pl.program_id(1)
        column = pl.program_id(2) * chunk + jnp.arange(chunk, dtype=jnp.int32)
        block = ids[which]
        is_live = (block >= 0) & (block < num_blocks)
        row = layer * num_blocks + jnp.where(is_live, block, 0)
        inside = column < length
        k, v = (pltriton.load(part.at[row, column], mask=inside & is_live, other=0) for part in (k_in, v_in))

        def store(target: jax.Ref) -> None:
            pltriton.store(target.at[layer, column], k, mask=inside)
            pltriton.store(target.at[layers + layer, column], v, mask=inside)

        for i, target in enumerate(out):
            pl.when(which == i)(partial(store, target))

    block = jax.ShapeDtypeStruct((2 * layers, length), layout.dtype)
    launch = Launch("gather_each", kernel, (count, layers, -(-length // chunk)), [block] * count)
    parts = launch(block_ids, *(part.reshape(-1, length) for part in pool))
    return tuple(part.reshape(2, layers, *layout.shape[1:]) for part in parts)


def scatter_each_pallas(
    pool: KVPool,
    layout: KVLayout,
    block_ids: jax.Array,  # [blocks] int32, no id twice
    blocks: Sequence[jax.Array],  # of `gather_each_pallas`
) -> KVPool:
    """The pool with the blocks in their places; ids out of range (padding) are dropped. In place if donated."""
    count, layers, num_blocks = len(blocks), layout.num_layers, layout.num_blocks
    length, chunk = chunking(layout)

    def kernel(ids: jax.Ref, *refs: jax.Ref) -> None:
        sources, (k_out, v_out) = refs[:count], refs[-2:]
        which, layer = pl.program_id(0), pl.program_id(1)
        column = pl.program_id(2) * chunk + jnp.arange(chunk, dtype=jnp.int32)
        block = ids[which]
        is_live = (block >= 0) & (block < num_blocks)
        row = layer * num_blocks + jnp.where(is_live, block, 0)
        mask = (column < length) & is_live

        def move(source: jax.Ref) -> None:
            for first, target in ((0, k_out), (layers, v_out)):
                values = pltriton.load(source.at[first + layer, column], mask=mask, other=0)
                pltriton.store(target.at[row, column], values, mask=mask)

        for i, source in enumerate(sources):
            pl.when(which == i)(partial(move, source))

    flat = tuple(part.reshape(-1, length) for part in pool)
    launch = Launch(
        name="scatter_each",
        kernel=kernel,
        grid=(count, layers, -(-length // chunk)),
        results=[jax.ShapeDtypeStruct(part.shape, part.dtype) for part in flat],
        aliases={1 + count: 0, 2 + count: 1},
    )
    parts = launch(block_ids, *(block.reshape(-1, length) for block in blocks), *flat)
    return KVPool(*(part.reshape(layout.shape) for part in parts))


def copy_blocks_pallas(
    pool: KVPool,
    layout: KVLayout,
    src_ids: jax.Array,  # [blocks] int32
    dst_ids: jax.Array,  # [blocks] int32, no id twice
) -> KVPool:
    """The pool with blocks copied, all read before any is written. A pair with an id out of range is dropped.

    Two launches: programs of one launch have no order, and a block may be read by one pair and written by another.
    """
    in_range = (src_ids >= 0) & (src_ids < layout.num_blocks)
    dst_ids = jnp.where(in_range, dst_ids, layout.num_blocks)
    return scatter_blocks_pallas(pool, layout, dst_ids, gather_blocks_pallas(pool, layout, src_ids))


def chunking(layout: KVLayout) -> tuple[int, int]:
    """Elements of one layer of a block, and of one program's part of it."""
    length = math.prod(layout.shape[1:])
    return length, min(ELEMENTS, power_of_two(length))
