"""The two operations that a model's layer needs of the pool, and the switch between their implementations."""

from __future__ import annotations

from enum import StrEnum

import jax
import jax.numpy as jnp
import numpy as np

from jaxcept_kernels.layout import AttentionMetadata, KVLayout, KVPool
from jaxcept_kernels.library import native_available
from jaxcept_kernels.pallas.ragged_attention import ragged_paged_attention
from jaxcept_kernels.pallas.write_kv import write_kv_pallas
from jaxcept_kernels.reference import TileConfig, paged_attention_xla, write_kv_xla
from jaxcept_kernels.scoring import Scoring


class Implementation(StrEnum):
    """Who computes. XLA runs everywhere and is the reference; NATIVE is the CPU's own code, PALLAS that of NVIDIA GPUs.

    A CPU interprets PALLAS: exact, and slow.
    """

    XLA = "xla"
    NATIVE = "native"
    PALLAS = "pallas"


def write_kv(
    pool: KVPool,
    k: jax.Array,  # [tokens, kv_heads, head_dim]
    v: jax.Array,  # [tokens, kv_heads, head_dim]
    meta: AttentionMetadata,
    layout: KVLayout,
    layer: int | jax.Array,
    *,
    implementation: Implementation = Implementation.XLA,
) -> KVPool:
    """The pool with this step's keys and values of one layer in their slots; slots out of range are dropped.

    In place where the pool is donated to the jitted step. `layer` is an int or an int32 scalar. NATIVE takes float32
    on a CPU that has a C++ compiler, and leaves the rest to XLA.
    """
    if implementation is Implementation.PALLAS:
        return write_kv_pallas(pool, k, v, meta, layout, layer)
    if implementation is Implementation.XLA or not can_run_native(pool.k, k, v):
        return write_kv_xla(pool, k, v, meta, layout, layer)
    shapes = [like(part) for part in pool]
    call = jax.ffi.ffi_call("jaxcept_write_kv", shapes, input_output_aliases={0: 0, 1: 1})
    parts = call(*pool, k, v, meta.slots, first_row(layout, layer), num_blocks=np.int64(layout.num_blocks))
    return KVPool(*parts)


def paged_attention(
    q: jax.Array,  # [tokens, heads, head_dim]
    pool: KVPool,
    meta: AttentionMetadata,
    layout: KVLayout,
    layer: int | jax.Array,
    *,
    scoring: Scoring,
    implementation: Implementation = Implementation.XLA,
    tiles: TileConfig = TileConfig(),  # noqa: B008 (a frozen value)
) -> jax.Array:
    """Causal attention of each token over its sequence's context in the pool: [tokens, heads, head_dim], q's dtype.

    Padding tokens give zeros. `layer` is an int or an int32 scalar; `tiles` is XLA's, and PALLAS has the sizes that
    are kept for the kind of device. NATIVE takes float32 on a CPU that has a C++ compiler, and leaves the rest to XLA;
    a token's result there is the same bits whatever shares the batch, as a decode and as part of a prefill.
    """
    if implementation is Implementation.PALLAS:
        return ragged_paged_attention(q, pool, meta, layout, layer, scoring=scoring)
    if implementation is Implementation.XLA or not can_run_native(pool.k, q):
        return paged_attention_xla(q, pool, meta, layout, layer, scoring=scoring, tiles=tiles)
    call = jax.ffi.ffi_call("jaxcept_paged_attention", like(q))
    batch = (meta.query_start, meta.context_len, meta.block_tables)
    sizes = {"num_blocks": np.int64(layout.num_blocks), "window": np.int64(scoring.window or 0)}  # 0 is none
    factors = {"scale": np.float32(scoring.scale), "soft_cap": np.float32(scoring.soft_cap or 0)}
    return call(q, *pool, *batch, first_row(layout, layer), **sizes, **factors)


def can_run_native(*arrays: jax.Array) -> bool:
    """Whether the native kernels take these operands."""
    return all(x.dtype == jnp.float32 for x in arrays) and native_available()


def first_row(layout: KVLayout, layer: int | jax.Array) -> jax.Array:
    """Where a layer's blocks begin in the pool: an int32 scalar."""
    return jnp.asarray(layer * layout.num_blocks, jnp.int32)


def like(x: jax.Array) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an array."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
