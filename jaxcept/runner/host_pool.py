"""The host's blocks: pinned memory, one array for each block, so that every block lives and dies by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxcept_kernels.layout import KVLayout

HEADS_OF_POOL = 1  # axis of KVLayout.shape
_SENT_AT_ONCE = 64


class Link:
    """The way between device memory and host memory. Tests hand in one that is slow, fails or corrupts."""

    def send(self, blocks: Sequence[jax.Array], to: Sharding) -> list[jax.Array]:
        """Starts the copies and returns at once. Raises RuntimeError, here or in `is_over`, where one fails."""
        return copy(blocks, to)

    def is_over(self, block: jax.Array) -> bool:
        """Whether a copy that `send` returned is there. RuntimeError where it failed."""
        if not is_ready(block):
            return False
        block.block_until_ready()
        return True


def copy(blocks: Sequence[jax.Array], to: Sharding) -> list[jax.Array]:
    """Starts copies to the same devices' other memory. Nothing is compiled, on several hosts either."""
    if to.is_fully_addressable:
        copies: list[jax.Array] = jax.device_put(list(blocks), to)
        return copies
    return copy_parts(blocks, to)


def copy_parts(blocks: Sequence[jax.Array], to: Sharding) -> list[jax.Array]:
    """The same, device by device: an array that lies on other hosts as well goes through a program otherwise."""
    shards = [block.addressable_shards for block in blocks]
    places = [[SingleDeviceSharding(part.device, memory_kind=to.memory_kind) for part in each] for each in shards]
    parts = jax.device_put([[part.data for part in each] for each in shards], places)
    return [
        jax.make_array_from_single_device_arrays(block.shape, to, each)
        for block, each in zip(blocks, parts, strict=True)
    ]


def is_ready(array: jax.Array) -> bool:
    """Whether an array is computed, or copied; never waits."""
    ready: bool = array.is_ready()  # type: ignore[attr-defined]  # public, and missing in JAX's annotations
    return ready


def block_sharding(pool: Sharding) -> Sharding:
    """Where a block [2, layers, kv_heads, block_size, head_dim] of a pool with this sharding lies on the device."""
    if not isinstance(pool, NamedSharding):
        return pool
    return NamedSharding(pool.mesh, PartitionSpec(None, None, _axis_of_heads(pool)))


def checksum_sharding(pool: Sharding) -> Sharding:
    """Where the checksums [blocks, kv_heads] of a pool with this sharding lie."""
    if not isinstance(pool, NamedSharding):
        return pool
    return NamedSharding(pool.mesh, PartitionSpec(None, _axis_of_heads(pool)))


def local_columns(
    array: jax.Array,  # [rows, columns], sharded over its columns if at all
) -> np.ndarray:
    """[rows, columns that lie on devices of this host]"""
    if array.is_fully_addressable:
        return np.asarray(array)
    parts = {shard.index[1].start or 0: shard.data for shard in array.addressable_shards}  # copies count once
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)], axis=1)


class HeadParts:
    """The heads of a pool as its devices share them: what each of them does to its own part.

    `sharding` is that of the pool's arrays; None for one device. ValueError where it shards anything but the heads.
    """

    def __init__(self, layout: KVLayout, sharding: Sharding | None) -> None:
        axis = _axis_of_heads(sharding) if isinstance(sharding, NamedSharding) else None
        self._mesh = sharding.mesh if isinstance(sharding, NamedSharding) and axis is not None else None
        parts = 1
        if self._mesh is not None:
            axes = axis if isinstance(axis, tuple) else (axis,)
            parts = math.prod(self._mesh.shape[name] for name in axes)
        self.layout = replace(layout, num_kv_heads=layout.num_kv_heads // parts)  # of one device's part
        self.pool_spec = PartitionSpec(None, axis)
        self.block_spec = PartitionSpec(None, None, axis)
        self.checksum_spec = PartitionSpec(None, axis)

    def on_each(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """The function, run by every device on its own heads."""
        if self._mesh is None:
            return function
        return jax.shard_map(function, mesh=self._mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _axis_of_heads(pool: NamedSharding) -> str | tuple[str, ...] | None:
    axes = tuple(pool.spec)
    others = axes[:HEADS_OF_POOL] + axes[HEADS_OF_POOL + 1 :]
    if any(axis is not None for axis in others):
        raise ValueError(f"a KV pool sharded as {pool.spec}: expected its heads (axis {HEADS_OF_POOL}) alone")
    return axes[HEADS_OF_POOL] if len(axes) > HEADS_OF_POOL else None


@dataclass(eq=False, slots=True)
class HostBlock:
    """What one swap out brings, or brought, to the host."""

    content: jax.Array  # [2, layers, kv_heads, block_size, head_dim], pinned; each device's heads in its own memory
    checksums: np.ndarray | None = None  # [kv_heads] uint32 of what was sent, once it has arrived


class HostPool:
    """Which content each host block has. Who overwrites a block leaves the old content to whoever still reads it."""

    def __init__(self, layout: KVLayout, num_blocks: int, device: Sharding) -> None:
        """`device` is a block's sharding there, of `block_sharding`."""
        if num_blocks < 1:
            raise ValueError(f"num_blocks={num_blocks}: expected 1 or more host blocks")
        self.layout = layout
        self.num_blocks = num_blocks
        self.device = device
        self.sharding = device.with_memory_kind("pinned_host")
        self._blocks: list[HostBlock | None] = [None] * num_blocks

    @property
    def num_bytes(self) -> int:
        """Pinned memory of the whole pool."""
        return self.num_blocks * self.layout.block_bytes

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        """[2, layers, kv_heads, block_size, head_dim]"""
        _, heads, block_size, head_dim = self.layout.shape
        return (2, self.layout.num_layers, heads, block_size, head_dim)

    def warm_up(self) -> None:
        """Allocates every block once: pinning takes seconds, and the memory stays pinned for later blocks.

        ValueError where the memory does not suffice.
        """
        zeros = jnp.zeros(self.block_shape, self.layout.dtype, device=self.device)
        try:
            blocks: list[jax.Array] = []
            for start in range(0, self.num_blocks, _SENT_AT_ONCE):
                count = min(_SENT_AT_ONCE, self.num_blocks - start)
                blocks += jax.block_until_ready(copy([zeros] * count, self.sharding))
        except (RuntimeError, MemoryError) as error:
            raise ValueError(
                f"num_host_blocks={self.num_blocks}: {self.num_bytes:,} bytes of pinned host memory are not to be had "
                f"({error}); choose fewer, or raise XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
            ) from error

    def __getitem__(self, host_block: int) -> HostBlock | None:
        return self._blocks[host_block]

    def put(self, host_block: int, block: HostBlock) -> None:
        """The host block has this content from here on."""
        self._blocks[host_block] = block

    def drop(self, host_block: int, block: HostBlock) -> None:
        """The host block loses this content, unless it has another already."""
        if self._blocks[host_block] is block:
            self._blocks[host_block] = None

    def clear(self) -> None:
        """All host blocks lose their contents."""
        self._blocks = [None] * self.num_blocks
