"""A model on devices, as far as a simulation sees it: what a step costs, and what memory it has."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from jaxcept.scheduler.config import SchedulerConfig
from jaxcept.scheduler.costs import CostModel
from jaxcept.simulator.rooflines import (
    A100_40GB,
    A100_80GB,
    FOLDER,
    GPTJ_6B,
    LLAMA_3_70B,
    LLAMA_31_8B,
    VICUNA_13B,
    DeviceSheet,
    ModelShape,
)

# Assumptions: the share of a device's memory that is used, what activations and buffers take of it, and the host's
# memory for swapped contexts, of which there is enough.
MEMORY_UTILIZATION = 0.9
WORKSPACE_BYTES = 2e9
HOST_BYTES = 128e9
BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Deployment:
    """A cost model with the sizes of a scheduler. Bytes and counts are over all devices together."""

    name: str
    costs: CostModel
    num_blocks: int
    num_host_blocks: int
    block_size: int = BLOCK_SIZE
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_model_len: int = 2048
    memory: str = ""  # where num_blocks is from

    @property
    def block_bytes(self) -> int:
        """KV cache of one block."""
        return self.costs.kv_token_bytes * self.block_size

    @property
    def pool_bytes(self) -> int:
        """The whole KV pool."""
        return self.block_bytes * self.num_blocks

    def scheduler_config(self) -> SchedulerConfig:
        """The sizes for a scheduler."""
        return SchedulerConfig(
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            num_host_blocks=self.num_host_blocks,
        )


@dataclass(frozen=True, slots=True)
class _Entry:
    model: ModelShape
    device: DeviceSheet
    num_devices: int
    max_model_len: int
    costs: str | None = None  # name of the cost model, where it is not the deployment's


# The evaluation names A100s without their memory. 70B weights fit into four only with 80 GB each.
_ENTRIES = {
    "gptj-6b@a100": _Entry(GPTJ_6B, A100_80GB, 1, 2048),
    "gptj-6b@a100-40gb": _Entry(GPTJ_6B, A100_40GB, 1, 2048, "gptj-6b@a100"),
    "gptj-6b@a100-roofline": _Entry(GPTJ_6B, A100_80GB, 1, 2048),
    "vicuna-13b@a100": _Entry(VICUNA_13B, A100_80GB, 1, 2048),
    "vicuna-13b@2xa100": _Entry(VICUNA_13B, A100_80GB, 2, 2048),
    "vicuna-13b@2xa100-roofline": _Entry(VICUNA_13B, A100_80GB, 2, 2048),
    "llama-3-70b@4xa100": _Entry(LLAMA_3_70B, A100_80GB, 4, 8192),
    "llama-3.1-8b@a100": _Entry(LLAMA_31_8B, A100_80GB, 1, 131_072),
}
DEPLOYMENTS = tuple(_ENTRIES)


def pool_blocks(model: ModelShape, device: DeviceSheet, num_devices: int) -> tuple[int, str]:
    """Blocks that fit beside weights and workspace, and how that was computed. ValueError where none does."""
    left = num_devices * (device.memory_bytes * MEMORY_UTILIZATION - WORKSPACE_BYTES) - model.weight_bytes
    num_blocks = int(left // (model.kv_token_bytes * BLOCK_SIZE))
    if num_blocks < 1:
        raise ValueError(f"{model.name} does not fit on {num_devices} x {device.name}")
    text = (
        f"{num_devices} x ({device.memory_bytes / 1e9:g} GB x {MEMORY_UTILIZATION:g} - {WORKSPACE_BYTES / 1e9:g} GB"
        f" workspace) - {model.weight_bytes / 1e9:.1f} GB weights = {left / 1e9:.1f} GB ="
        f" {num_blocks} blocks of {BLOCK_SIZE} tokens of {model.kv_token_bytes} bytes"
    )
    return num_blocks, text


def load_deployment(name: str) -> Deployment:
    """A deployment of DEPLOYMENTS, or the path of a cost model's JSON file. ValueError for anything else.

    A file says nothing of memory: its pool has as many blocks as 4 GB hold, until `with_sizes` says otherwise.
    """
    entry = _ENTRIES.get(name)
    if entry is not None:
        costs = CostModel.load(FOLDER / f"{entry.costs or name}.json")
        num_blocks, memory = pool_blocks(entry.model, entry.device, entry.num_devices)
        num_host_blocks = int(HOST_BYTES // (costs.kv_token_bytes * BLOCK_SIZE))
        return Deployment(name, costs, num_blocks, num_host_blocks, max_model_len=entry.max_model_len, memory=memory)
    if not Path(name).is_file():
        raise ValueError(f"{name!r} is no deployment and no file: expected one of {', '.join(DEPLOYMENTS)}, or a path")
    costs = CostModel.load(name)
    num_blocks = max(1, int(4e9 // (costs.kv_token_bytes * BLOCK_SIZE)))
    return Deployment(name, costs, num_blocks, num_blocks, memory="4 GB, assumed")


def with_sizes(deployment: Deployment, **sizes: int | None) -> Deployment:
    """The deployment with other sizes (fields of Deployment); None leaves one as it is."""
    given = {name: value for name, value in sizes.items() if value is not None}
    if "num_blocks" in given:
        return replace(deployment, **given, memory="as asked for")  # type: ignore[arg-type]  # sizes are ints
    return replace(deployment, **given)  # type: ignore[arg-type]
