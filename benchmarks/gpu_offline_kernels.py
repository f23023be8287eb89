"""The Pallas kernels by themselves, for check_gpu_offline.py: head sizes, block sizes and dtypes that matter.

One program holds a step's kernels of one layer: the write, and the launches for decodes and for prefill chunks.
Another holds the block moves. These write to a donated pool of 2 GiB, so a copy of it shows. The products of experts
have no pool.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from jaxcept_kernels.attention import Implementation, paged_attention, write_kv
from jaxcept_kernels.blocks import copy_blocks, gather_each, scatter_each
from jaxcept_kernels.grouped import grouped_linear
from jaxcept_kernels.layout import AttentionMetadata, KVLayout, KVPool
from jaxcept_kernels.scoring import Scoring

POOL_BYTES = 2 << 30
NUM_LAYERS = 2
NUM_KV_HEADS = 8
TOKENS, ENTRIES, COLUMNS = 1024, 128, 512
MOVED_BLOCKS = 8
PALLAS = Implementation.PALLAS


class Case(NamedTuple):
    """One kernel launch's static sizes."""

    dtype: str  # of the pool; int8 goes with bfloat16 queries
    head_dim: int
    block_size: int
    group: int = 4
    window: int | None = None
    soft_cap: float | None = None

    @property
    def name(self) -> str:
        """Such as `bfloat16 D128 B16 G4`."""
        extras = f"{' window' if self.window else ''}{' cap' if self.soft_cap else ''}"
        return f"{self.dtype} D{self.head_dim} B{self.block_size} G{self.group}{extras}"


class Kernels(NamedTuple):
    """A program of kernels to compile."""

    what: str
    layout: KVLayout
    lower: Callable[[], Any]
    writes: bool = True  # to the pool


class Product(NamedTuple):
    """Rows by the matrices of their experts."""

    dtype: str
    rows: int
    experts: int
    num_in: int
    num_out: int

    @property
    def name(self) -> str:
        """Such as `bfloat16 8192 rows, 128 x 2048 x 1536`."""
        return f"{self.dtype} {self.rows} rows, {self.experts} x {self.num_in} x {self.num_out}"


HEAD_DIMS = (64, 80, 96, 128, 256)
CASES = (
    *(Case("bfloat16", head_dim, block_size) for head_dim in HEAD_DIMS for block_size in (16, 32, 64)),
    *(Case("bfloat16", head_dim, 16, group) for head_dim in (128, 256) for group in (1, 5, 8, 16)),
    *(Case(dtype, 128, 16, 4, 4096, 50.0) for dtype in ("bfloat16", "int8", "float32")),
    *(Case(dtype, 256, 16, 2, 4096, 50.0) for dtype in ("bfloat16", "int8", "float32")),
    *(Case(dtype, 128, 16, 8, 4096) for dtype in ("bfloat16", "int8")),
    *(Case("float32", head_dim, 16, group, 4096) for head_dim, group in ((64, 1), (80, 8))),
    *(Case(dtype, head_dim, 16) for dtype in ("float16", "float32") for head_dim in HEAD_DIMS),
    *(Case("int8", head_dim, block_size) for head_dim in HEAD_DIMS for block_size in (16, 64)),
    *(Case("int8", 128, 16, group) for group in (1, 8)),
)
PRODUCTS = (  # of steps of 1,024 and 128 tokens, of all columns and of a fourth
    *(Product("bfloat16", rows, 128, *sizes) for rows in (8192, 1024) for sizes in ((2048, 1536), (768, 2048))),
    *(Product("bfloat16", rows, 128, *sizes) for rows in (8192, 1024) for sizes in ((2048, 384), (192, 2048))),
    *(Product("bfloat16", rows, 8, 4096, 28672) for rows in (2048, 256)),
    *(Product(dtype, rows, 128, 2048, 1536) for dtype in ("float16", "float32") for rows in (8192, 1024)),
)
MOVES = (("bfloat16", 128), ("bfloat16", 80), ("float32", 256), ("int8", 128))


def layout_of(dtype: str, head_dim: int, block_size: int) -> KVLayout:
    """A pool of POOL_BYTES."""
    one = KVLayout(NUM_LAYERS, 1, block_size, NUM_KV_HEADS, head_dim, jnp.dtype(dtype))
    return KVLayout(NUM_LAYERS, POOL_BYTES // one.block_bytes, block_size, NUM_KV_HEADS, head_dim, one.dtype)


def kernels(sharding: Sharding) -> Iterator[Kernels]:
    """Every program, to be lowered for the device of the sharding."""

    def shape(dtype: Any, *sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    def pool_of(layout: KVLayout) -> Any:
        part = shape(layout.dtype, *layout.shape)
        return (part, part)

    for case in CASES:
        layout = layout_of(case.dtype, case.head_dim, case.block_size)
        tables = shape(jnp.int32, ENTRIES, COLUMNS)
        meta = (*(shape(jnp.int32, n) for n in (TOKENS, TOKENS, ENTRIES + 1, ENTRIES)), tables)
        computed = layout.compute_dtype(jnp.dtype(jnp.bfloat16))
        q = shape(computed, TOKENS, NUM_KV_HEADS * case.group, case.head_dim)
        kv = shape(computed, TOKENS, NUM_KV_HEADS, case.head_dim)
        step = jax.jit(layer_step(case, layout), donate_argnums=0)
        lower = _lowering(step, pool_of(layout), q, kv, kv, meta)
        yield Kernels(f"attention {case.name}", layout, lower)
    for dtype, head_dim in MOVES:
        layout = layout_of(dtype, head_dim, 16)
        ids = shape(jnp.int32, MOVED_BLOCKS)
        move = jax.jit(block_moves(layout), donate_argnums=0)
        lower = _lowering(move, pool_of(layout), ids, ids)
        yield Kernels(f"moves {dtype} D{head_dim} B16", layout, lower)
    for product in PRODUCTS:
        operands = (
            shape(product.dtype, product.rows, product.num_in),
            shape(product.dtype, product.experts, product.num_in, product.num_out),
            shape(jnp.int32, product.experts),
        )
        lower = _lowering(jax.jit(partial(grouped_linear, implementation=PALLAS)), *operands)
        yield Kernels(f"experts {product.name}", layout_of(product.dtype, 128, 16), lower, writes=False)


def _lowering(program: Any, *shapes: Any) -> Callable[[], Any]:
    return lambda: program.lower(*shapes)


def layer_step(case: Case, layout: KVLayout) -> Callable[..., Any]:
    """Writes one layer's keys and values, and attends."""

    def step(pool: Any, q: jax.Array, k: jax.Array, v: jax.Array, meta: Any) -> tuple[KVPool, jax.Array]:
        batch = AttentionMetadata(*meta)
        pool = write_kv(KVPool(*pool), k, v, batch, layout, 1, implementation=PALLAS)
        scoring = Scoring(case.head_dim**-0.5, case.window, case.soft_cap)
        return pool, paged_attention(q, pool, batch, layout, 1, scoring=scoring, implementation=PALLAS)

    return step


def block_moves(layout: KVLayout) -> Callable[..., Any]:
    """Copies blocks within the pool, then takes some out and puts them elsewhere."""

    def move(pool: Any, sources: jax.Array, targets: jax.Array) -> KVPool:
        pool = copy_blocks(KVPool(*pool), layout, sources, targets, implementation=PALLAS)
        each, _ = gather_each(pool, layout, sources, implementation=PALLAS)
        return scatter_each(pool, layout, targets, each, implementation=PALLAS)

    return move
