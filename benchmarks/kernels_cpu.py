"""The CPU's own kernels beside XLA's, in one run: products with the weights of a small Llama, attention, argmax.

    python benchmarks/kernels_cpu.py [--repeats 15] [--transposed]

Weights and pools are so many that each call finds its operands in memory, not in a cache, as a decode step does.
Implementations take turns; times are medians. GB/s counts the weights (or the keys and values in reach), GFLOP/s the
multiplications and additions. `--transposed` gives XLA weights of [out, in].
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np

from jaxcept_kernels.attention import Implementation, paged_attention, write_kv
from jaxcept_kernels.layout import AttentionMetadata, KVLayout, KVPool
from jaxcept_kernels.library import native_available
from jaxcept_kernels.linear import linear, pack_weight
from jaxcept_kernels.rows import argmax_rows
from jaxcept_kernels.scoring import Scoring

MEMORY_BYTES = 120_000_000  # of operands, so that they do not stay in a cache
SHAPES = {"qkv": (512, 1024), "output": (512, 512), "gate_up": (512, 2752), "down": (1376, 512), "head": (512, 32_000)}
BATCHES = (1, 2, 4, 8, 16, 64, 256)
CONTEXTS = (64, 128, 256, 512, 1024)
HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 8, 4, 64, 16
Call = Callable[[], object]


def median_times(calls: Sequence[Call], repeats: int) -> list[float]:
    """Median seconds of each call; they take turns, so that all see the same machine."""
    for call in calls:
        jax.block_until_ready(call())
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for spent, call in zip(times, calls, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(call())
            spent.append(time.perf_counter() - start)
    return [median(spent) for spent in times]


def all_products(
    product: Callable[[jax.Array, jax.Array], jax.Array],
) -> Callable[[jax.Array, list[jax.Array]], jax.Array]:
    """One compiled call that makes the product with each weight and keeps a value of every result."""
    return jax.jit(lambda x, weights: sum(product(x, weight)[0, 0] for weight in weights))


def bench_linear(repeats: int, transposed: bool) -> None:
    """Products of every batch size with every weight of the model."""
    rates = f"{'us':>8} {'GFLOP/s':>8} {'GB/s':>6}"
    print(f"{'product':>22} {'rows':>5} | XLA {rates} | native {rates} | times")
    rng = np.random.default_rng(0)

    def xla(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jax.lax.dot_general(x, weight, (((1,), (1 if transposed else 0,)), ((), ())))

    for name, (features, out) in SHAPES.items():
        copies = max(1, MEMORY_BYTES // (4 * features * out))
        drawn = [jnp.asarray(rng.standard_normal((features, out), np.float32)) for _ in range(copies)]
        plain = [weight.T + 0 for weight in drawn] if transposed else drawn
        packed = [pack_weight(weight) for weight in drawn]
        for tokens in BATCHES:
            used = copies if tokens <= 16 else min(copies, 4)
            x = jnp.asarray(rng.standard_normal((tokens, features), np.float32))
            calls = [partial(all_products(xla), x, plain[:used])]
            calls.append(partial(all_products(partial(linear, out_features=out)), x, packed[:used]))
            theirs, ours = (seconds / used for seconds in median_times(calls, repeats))
            flops, size = 2e-9 * tokens * features * out, 4e-9 * features * out
            both = [f"{t * 1e6:8.0f} {flops / t:8.0f} {size / t:6.1f}" for t in (theirs, ours)]
            label = f"{name} {features}x{out}"
            print(f"{label:>22} {tokens:>5} | XLA {both[0]} | native {both[1]} | {theirs / ours:.2f}")


def make_step(
    layout: KVLayout, implementation: Implementation
) -> Callable[[KVPool, jax.Array, AttentionMetadata], tuple[KVPool, jax.Array]]:
    """Write and attention in every layer of the pool, compiled; the pool is donated."""
    scoring = Scoring(HEAD_DIM**-0.5)

    def step(pool: KVPool, q: jax.Array, meta: AttentionMetadata) -> tuple[KVPool, jax.Array]:
        for layer in range(layout.num_layers):
            kv = q[:, :KV_HEADS]
            pool = write_kv(pool, kv, kv, meta, layout, layer, implementation=implementation)
            q = paged_attention(q, pool, meta, layout, layer, scoring=scoring, implementation=implementation)
        return pool, q

    return jax.jit(step, donate_argnums=0)


def make_batch(sequences: int, context: int, count: int) -> tuple[KVLayout, jax.Array, AttentionMetadata]:
    """`count` last tokens of each of some sequences, whose blocks lie scattered over the pool."""
    rng = np.random.default_rng(1)
    columns = -(-context // BLOCK_SIZE)
    blocks = sequences * columns
    layers = min(16, max(2, MEMORY_BYTES // (8 * blocks * BLOCK_SIZE * KV_HEADS * HEAD_DIM)))  # 16: compile time
    layout = KVLayout(layers, blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM, jnp.dtype(jnp.float32))
    tables = rng.permutation(blocks).reshape(sequences, columns)
    positions = np.tile(np.arange(context - count, context), (sequences, 1))
    slots = np.take_along_axis(tables, positions // BLOCK_SIZE, axis=1) * BLOCK_SIZE + positions % BLOCK_SIZE
    starts = np.arange(sequences + 1) * count
    columns_of_meta = (positions.reshape(-1), slots.reshape(-1), starts, np.full(sequences, context), tables)
    meta = AttentionMetadata(*(jnp.asarray(column, jnp.int32) for column in columns_of_meta))
    q = jnp.asarray(rng.standard_normal((sequences * count, HEADS, HEAD_DIM), np.float32))
    return layout, q, meta


def bench_attention(repeats: int) -> None:
    """Write and attention per layer: decodes at several contexts, and a prefill chunk."""
    print(f"{'attention, a layer':>28} | {'XLA us':>8} | {'native us':>9} {'GB/s':>6} | x")
    cases = [(16, context, 1) for context in CONTEXTS] + [(1, 256, 1), (1, 1024, 1), (1, 512, 256)]
    for sequences, context, count in cases:
        layout, q, meta = make_batch(sequences, context, count)
        pools = {kind: KVPool(*(jnp.full(layout.shape, 0.1) for _ in range(2))) for kind in Implementation}

        def run(
            kind: Implementation,
            step: Callable[..., tuple[KVPool, jax.Array]],
            pools: dict[Implementation, KVPool],
            operands: tuple[jax.Array, AttentionMetadata],
        ) -> jax.Array:
            pools[kind], out = step(pools[kind], *operands)
            return out

        calls = [partial(run, kind, make_step(layout, kind), pools, (q, meta)) for kind in Implementation]
        theirs, ours = (seconds / layout.num_layers for seconds in median_times(calls, repeats))
        size = 8e-9 * sequences * context * KV_HEADS * HEAD_DIM
        label = f"{sequences} x {context} context, {count} new"
        print(f"{label:>28} | {theirs * 1e6:8.0f} | {ours * 1e6:9.0f} {size / ours:6.1f} | {theirs / ours:.2f}")


def bench_argmax(repeats: int) -> None:
    """The largest of 32,000 logits per row."""
    print(f"{'argmax of 32,000, rows':>28} | {'XLA us':>8} | {'ours us':>9} | x")
    for rows in (1, 16, 64):
        logits = jnp.asarray(np.random.default_rng(2).standard_normal((rows, 32_000), np.float32))
        plain = jax.jit(lambda x: jnp.argmax(x, axis=-1))
        theirs, ours = median_times([partial(plain, logits), partial(jax.jit(argmax_rows), logits)], repeats)
        print(f"{rows:>28} | {theirs * 1e6:8.0f} | {ours * 1e6:9.0f} | {theirs / ours:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--transposed", action="store_true", help="XLA's weights lie as [out, in]")
    args = parser.parse_args()
    if not native_available():
        raise SystemExit("the native kernels are not available here; the log says why")
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, medians of {args.repeats}")
    bench_linear(args.repeats, args.transposed)
    bench_attention(args.repeats)
    bench_argmax(args.repeats)


if __name__ == "__main__":
    main()
