"""How many blocks the KV pool gets."""

from __future__ import annotations

import os
from collections.abc import Sequence

import jax

from jaxcept.runner.swapper import ARITIES
from jaxcept_models.footprint import Footprint
from jaxcept_models.model import Model
from jaxcept_models.sharding import ALONE

CPU_POOL_BYTES = 4 << 30
CPU_MEMORY_SHARE = 0.25
DEVICE_SHARE = 0.95  # of a GPU's memory that JAX takes for an engine which has the GPU to itself; 0.75 otherwise
STAGED_BLOCKS = 4 * max(ARITIES)  # the largest call each way, as one array and block by block


def claim_device() -> None:
    """Lets this process have DEVICE_SHARE of each GPU, unless the user's environment says otherwise. Before JAX's
    backend starts."""
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # the older name; JAX refuses both together
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", str(DEVICE_SHARE))


def choose_num_blocks(
    model: Model, block_size: int, max_num_seqs: int, max_model_len: int, step_tokens: int, memory_utilization: float
) -> int:
    """Blocks of a pool that fits the devices and is of use.

    On a GPU: `memory_utilization` of its memory, less what is in use, what the largest programs need, and the blocks on
    their way to and from the host. On a CPU: a quarter of the machine's memory, at most 4 GiB. Never more than what
    twice the longest batch could hold (the other half keeps cached prefixes and waiting contexts). ValueError if not
    one sequence fits.
    """
    per_sequence = -(-max_model_len // block_size)
    placement = model.placement
    devices = [jax.devices()[0]] if placement is None else list(placement.mesh.local_devices)
    parallel = ALONE if placement is None else placement.parallel
    footprint = Footprint(model.config, parallel, model.dtype, model.implementation, model.kv_cache_dtype)
    block_bytes = footprint.block_bytes(block_size)  # on each device
    free = _free_bytes(devices, footprint.workspace_bytes(step_tokens, max_num_seqs), memory_utilization)
    affordable = free // block_bytes
    if devices[0].platform != "cpu":
        affordable -= STAGED_BLOCKS
    if affordable < per_sequence:
        raise ValueError(
            f"max_model_len={max_model_len} needs {per_sequence} blocks of {block_bytes:,} bytes, and memory has room "
            f"for {affordable}; lower max_model_len, or raise memory_utilization={memory_utilization}"
        )
    return footprint.addressable_blocks(int(min(affordable, 2 * max_num_seqs * per_sequence)), block_size)


def _free_bytes(devices: Sequence[jax.Device], workspace_bytes: int, memory_utilization: float) -> int:
    """Bytes of the fullest device. Devices of a CPU share the machine's memory."""
    stats = [device.memory_stats() for device in devices]
    if devices[0].platform == "cpu" or not all(stats):
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return min(CPU_POOL_BYTES, int(physical * CPU_MEMORY_SHARE)) // len(devices)
    free = min(int(each["bytes_limit"] * memory_utilization) - int(each["bytes_in_use"]) for each in stats)
    return free - workspace_bytes
