"""A step's keys and values into their slots of the pool, in place."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from jaxcept_kernels.layout import AttentionMetadata, KVLayout, KVPool
from jaxcept_kernels.pallas.common import Launch, power_of_two

HEADS = 8  # most KV heads that one program writes


def write_kv_pallas(
    pool: KVPool,
    k: jax.Array,  # [tokens, kv_heads, head_dim]
    v: jax.Array,  # [tokens, kv_heads, head_dim]
    meta: AttentionMetadata,
    layout: KVLayout,
    layer: int | jax.Array,
) -> KVPool:
    """The pool with keys and values of one layer in their slots; slots out of range are dropped."""
    tokens, heads, dim = k.shape
    size, num_blocks = layout.block_size, layout.num_blocks
    at_once = min(HEADS, power_of_two(heads))
    width = power_of_two(dim)

    def kernel(
        slots: jax.Ref,
        first_row: jax.Ref,
        k_in: jax.Ref,
        v_in: jax.Ref,
        _k_old: jax.Ref,
        _v_old: jax.Ref,
        k_out: jax.Ref,
        v_out: jax.Ref,
    ) -> None:
        token = pl.program_id(0)
        head = (pl.program_id(1) * at_once + jnp.arange(at_once, dtype=jnp.int32))[:, None]
        column = jnp.arange(width, dtype=jnp.int32)[None, :]
        slot = slots[token]
        is_live = (slot >= 0) & (slot < num_blocks * size)
        slot = jnp.where(is_live, slot, 0)
        mask = (head < heads) & (column < dim) & is_live
        row = ((first_row[0] + slot // size) * heads + head) * size + slot % size
        for source, target in ((k_in, k_out), (v_in, v_out)):
            values = pltriton.load(source.at[token * heads + head, column], mask=mask, other=0)
            pltriton.store(target.at[row, column], values, mask=mask)

    flat = tuple(part.reshape(-1, dim) for part in pool)
    fresh = tuple(x.astype(layout.dtype).reshape(-1, dim) for x in (k, v))
    launch = Launch(
        name="write_kv",
        kernel=kernel,
        grid=(tokens, -(-heads // at_once)),
        results=[jax.ShapeDtypeStruct(part.shape, part.dtype) for part in flat],
        aliases={4: 0, 5: 1},
    )
    first_row = jnp.asarray(layer * num_blocks, jnp.int32).reshape(1)
    parts = launch(meta.slots, first_row, *fresh, *flat)
    return KVPool(*(part.reshape(layout.shape) for part in parts))
