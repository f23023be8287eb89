"""Section `overlap`: blocks on their way to pinned host memory and back, while the device computes.

The question is whether either waits for the other: a step's time with and without a transfer, and the link's bandwidth
with and without steps. Blocks are gathered first, each an array of its own, as a swap sends them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from benchmarks.kernels_cases import Preset
from benchmarks.kernels_timing import Deadline, noise, run_often, timed
from jaxcept_kernels.blocks import gather_blocks
from jaxcept_kernels.layout import KVLayout, KVPool

POLL_S = 50e-6
BESIDE = 1.5  # steps are queued for so many times the transfer's own time

Load = tuple[Callable[[jax.Array], jax.Array], jax.Array]


class Beside(NamedTuple):
    """Seconds of one round in which a transfer and steps were under way at once."""

    dispatch_s: float  # until device_put returned
    link_s: float  # until the blocks were there
    total_s: float  # until the steps were over too


def run_overlap(preset: Preset, deadline: Deadline) -> Iterator[dict[str, Any]]:
    """A record for each way and each kind of step."""
    device = jax.devices()[0]
    # Named, as a sharding that names no memory leaves arrays where they are.
    on_device = jax.sharding.SingleDeviceSharding(device, memory_kind=device.default_memory().kind)
    on_host = on_device.with_memory_kind("pinned_host")
    blocks = gathered(preset)
    sent = jax.block_until_ready(jax.device_put(blocks, on_host))  # pins the memory, which takes long
    ways = {"out": (blocks, on_host), "in": (sent, on_device)}
    for name, load in loads(preset).items():
        for way, (arrays, to) in ways.items():
            if deadline.left_s <= 0:
                yield {"what": f"{way} beside {name}", "note": "out of time"}
            else:
                yield {"what": f"{way} beside {name}", **measure(arrays, to, load, preset)}


def gathered(preset: Preset) -> list[jax.Array]:
    """Blocks of all layers out of a pool, each an array of its own: [2, layers, kv_heads, block_size, head_dim]."""
    shape, dtype = preset.shapes[0], jnp.dtype(preset.dtype)
    one = KVLayout(shape.layers, 1, preset.block_size, shape.kv_heads, shape.head_dim, dtype)
    count = max(1, preset.transfer_bytes // one.block_bytes)
    layout = KVLayout(shape.layers, 2 * count, preset.block_size, shape.kv_heads, shape.head_dim, dtype)

    @jax.jit
    def gather(pool: KVPool, ids: jax.Array) -> list[jax.Array]:
        staging = gather_blocks(pool, layout, ids)
        return [jnp.stack([staging.k[i], staging.v[i]]) for i in range(count)]

    pool = KVPool(*(noise(layout.shape, dtype, i) for i in (1, 2)))
    blocks: list[jax.Array] = jax.block_until_ready(gather(pool, jnp.arange(0, 2 * count, 2, dtype=jnp.int32)))
    return blocks


def loads(preset: Preset) -> dict[str, Load]:
    """A step that computes, and one that reads and writes memory as fast as it can."""
    square = noise((preset.matrix, preset.matrix), preset.dtype)
    words = noise((preset.copy_bytes // 4096, 1024), jnp.float32)
    return {
        "matrix products": (lambda x: jnp.dot(x, x, preferred_element_type=x.dtype), square),
        "copies": (lambda x: x + jnp.float32(1), words),
    }


def measure(blocks: Sequence[jax.Array], to: Sharding, load: Load, preset: Preset) -> dict[str, Any]:
    """Medians over rounds: steps alone, the transfer alone, both at once."""
    function, x = load
    compiled = jax.jit(function).lower(x).compile()

    def steps(count: int) -> jax.Array:
        last: jax.Array = run_often(compiled, x, count)
        return last

    timed(lambda: steps(1))
    timed(lambda: jax.device_put(list(blocks), to))
    link_s = median(timed(lambda: jax.device_put(list(blocks), to))[0] for _ in range(preset.rounds))
    step_s = timed(lambda: steps(8))[0] / 8
    count = max(4, math.ceil(BESIDE * link_s / step_s))
    alone_s = median(timed(lambda: steps(count))[0] for _ in range(preset.rounds))
    rounds = [both(blocks, to, lambda: steps(count)) for _ in range(preset.rounds)]
    beside = Beside(*(median(column) for column in zip(*rounds, strict=True)))
    size = sum(block.nbytes for block in blocks)
    hidden = (alone_s + link_s - beside.total_s) / min(alone_s, link_s)
    return {
        "blocks": len(blocks),
        "MB": size / 1e6,
        "steps": count,
        "step ms alone": alone_s / count * 1e3,
        "step ms beside": beside.total_s / count * 1e3,
        "GB/s alone": size / link_s / 1e9,
        "GB/s beside": size / beside.link_s / 1e9,
        "share hidden": min(1.0, max(0.0, hidden)),
        "dispatch ms": beside.dispatch_s * 1e3,
    }


def both(blocks: Sequence[jax.Array], to: Sharding, queue: Callable[[], Any]) -> Beside:
    """One round: steps are queued, then the transfer."""
    start = time.perf_counter()
    running = queue()
    begin = time.perf_counter()
    moved = jax.device_put(list(blocks), to)
    dispatched = time.perf_counter()
    while not all(block.is_ready() for block in reversed(moved)):
        time.sleep(POLL_S)
    there = time.perf_counter()
    jax.block_until_ready(running)
    return Beside(dispatched - begin, there - begin, time.perf_counter() - start)
