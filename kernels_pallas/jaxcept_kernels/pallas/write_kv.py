"""A step's keys and values into their slots of the pool, in place."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from jaxcept_kernels.layout import AttentionMetadata, KVLayout, KVPool
from jaxcept_kernels.pallas.common import Launch, power_of_two
from jaxcept_kernels.quantized import quantize

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
    fresh = [quantize(x) if layout.is_quantized else (x.astype(layout.dtype),) for x in (k, v)]
    parts = len(fresh[0])  # operands of each: the values, and the bytes of their scales if they have any
    at_once = min(HEADS, power_of_two(heads))
    width = power_of_two(dim)

    def kernel(
        slots: jax.Ref,
        first_row: jax.Ref,
        *refs: jax.Ref,
    ) -> None:
        k_out, v_out = refs[-2:]
        token = pl.program_id(0)
        head = (pl.program_id(1) * at_once + jnp.arange(at_once, dtype=jnp.int32))[:, None]
        column = jnp.arange(width, dtype=jnp.int32)[None, :]
        slot = slots[token]
        is_live = (slot >= 0) & (slot < num_blocks * size)
        slot = jnp.where(is_live, slot, 0)
        mask = (head < heads) & (column < dim) & is_live
        first = ((first_row[0] + slot // size) * heads + head) * layout.block_rows
        for (source, *scale_bytes), target in ((refs[:parts], k_out), (refs[parts : 2 * parts], v_out)):
            values = pltriton.load(source.at[token * heads + head, column], mask=mask, other=0)
            pltriton.store(target.at[first + slot % size, column], values, mask=mask)
            for i, scale_byte in enumerate(scale_bytes):
                row, byte_column = layout.scale_place(slot % size, i)
                is_there = (head < heads) & is_live
                byte = pltriton.load(scale_byte.at[token * heads + head], mask=is_there, other=0)
                pltriton.store(target.at[first + row, byte_column + 0 * head], byte, mask=is_there)

    flat = tuple(part.reshape(-1, dim) for part in pool)
    operands = [x.reshape(-1, dim) if x.ndim == 3 else x.reshape(-1) for part in fresh for x in part]
    launch = Launch(
        name="write_kv",
        kernel=kernel,
        grid=(tokens, -(-heads // at_once)),
        results=[jax.ShapeDtypeStruct(part.shape, part.dtype) for part in flat],
        aliases={2 + 2 * parts: 0, 3 + 2 * parts: 1},
    )
    first_row = jnp.asarray(layer * num_blocks, jnp.int32).reshape(1)
    written = launch(meta.slots, first_row, *operands, *flat)
    return KVPool(*(part.reshape(layout.shape) for part in written))
