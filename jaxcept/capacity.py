"""A model on devices that need not be there, on paper: bytes, tokens of context that fit, seconds of a step at best.

Bytes follow from the model's shape (`jaxcept_models.footprint`); seconds from data sheets and named assumptions
(`jaxcept.simulator.rooflines`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp

from jaxcept.build import DEFAULT_MAX_MODEL_LEN
from jaxcept.runner.memory import DEVICE_SHARE, STAGED_BLOCKS
from jaxcept.scheduler.costs import CostModel, StepLoad, chunk_pairs
from jaxcept.simulator.rooflines import A100_40GB, A100_80GB, DeviceSheet, ExpertShape, ModelShape, from_roofline
from jaxcept_kernels.attention import Implementation
from jaxcept_models.config import ModelConfig, read_config
from jaxcept_models.footprint import Footprint, num_params
from jaxcept_models.model import find_kv_dtype
from jaxcept_models.shapes import SHAPES
from jaxcept_models.sharding import share

SHEETS = {
    "a100-40gb": A100_40GB,
    "a100-80gb": A100_80GB,
    "h100-80gb": DeviceSheet("H100-SXM5-80GB", 80e9, 989e12, 3350e9, 450e9),
    "h200-141gb": DeviceSheet("H200-SXM-141GB", 141e9, 989e12, 4800e9, 450e9),
}
BATCHES = (1, 8, 32, 64, 128, 256)
KNOWN_MODELS = tuple(SHAPES)
GB = 1e9


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the user decides; the names are the engine's."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int = 16
    memory_utilization: float = 0.9
    context: int = 1024  # tokens of each sequence in the table of steps

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "block_size", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected 1 or more")
        if not 0 < self.memory_utilization <= 1:
            raise ValueError(f"memory_utilization={self.memory_utilization}: expected above 0, at most 1")


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one device, and what the KV pool holds over all of them."""

    device_bytes: int
    usable_bytes: int  # what the engine may take of JAX's share
    weight_bytes: int
    workspace_bytes: int
    staging_bytes: int  # blocks on their way to and from the host
    block_bytes: int
    num_blocks: int
    num_tokens: int

    @property
    def pool_bytes(self) -> int:
        """The KV pool."""
        return self.num_blocks * self.block_bytes


@dataclass(frozen=True, slots=True)
class Step:
    """A step on the roofline."""

    what: str
    tokens: int
    context_tokens: int
    seconds: float
    tokens_per_s: float
    fits: bool  # its contexts are in the pool all at once


@dataclass(frozen=True, slots=True)
class Plan:
    """The whole answer."""

    model: str
    num_params: int
    num_active_params: int  # that a token meets
    device: str
    tensor: int
    data: int
    memory: Memory
    steps: tuple[Step, ...]
    saturation_tokens: int
    swap_tokens_per_step: int  # each way, hidden behind a step at the saturation point
    swap_context_s: float  # one context of Sizes.context, one way


def plan_capacity(
    model: str,
    devices: str,
    data: int,
    sizes: Sizes,
    dtype: str = "bfloat16",
    implementation: str = "pallas",
    kv_cache_dtype: str = "auto",
) -> Plan:
    """The plan for a folder with config.json, or one of KNOWN_MODELS, on devices such as 4xA100-80GB.

    ValueError for devices or sizes that cannot be, or where not one sequence fits; FileNotFoundError, CheckpointError
    for the model.
    """
    count, sheet = parse_devices(devices)
    if data < 1 or count % data:
        raise ValueError(f"data={data}: expected a divisor of the {count} devices")
    config = find_shape(model)
    parallel = share(config, count // data, data)
    kv_dtype = find_kv_dtype(kv_cache_dtype)
    footprint = Footprint(config, parallel, jnp.dtype(dtype), Implementation(implementation), kv_dtype)
    return make_plan(Path(model).name, footprint, sheet, sizes)


def parse_devices(text: str) -> tuple[int, DeviceSheet]:
    """(4, A100_80GB) of 4xA100-80GB; without a number one. ValueError for anything else."""
    match = re.fullmatch(r"(?:(\d+)x)?([a-z0-9-]+)", text.strip().lower())
    count = int(match[1] or 1) if match else 0
    if match is None or match[2] not in SHEETS or count < 1:
        raise ValueError(f"devices={text}: expected a number, x and one of {', '.join(SHEETS)}, such as 4xA100-80GB")
    return count, SHEETS[match[2]]


def find_shape(model: str) -> ModelConfig:
    """A well-known model's shape, or that of a folder. FileNotFoundError where it is neither."""
    if model.lower() in SHAPES:
        return SHAPES[model.lower()]
    if not Path(model).is_dir():
        raise FileNotFoundError(f"{model}: neither a folder with config.json nor one of {', '.join(SHAPES)}")
    return read_config(model)


def default_max_model_len(model: str) -> int:
    """Tokens of the longest sequence where the user is silent, as an engine chooses them."""
    return min(find_shape(model).max_position_embeddings, DEFAULT_MAX_MODEL_LEN)


def make_plan(name: str, footprint: Footprint, sheet: DeviceSheet, sizes: Sizes) -> Plan:
    """The plan. ValueError where the weights leave no room for one sequence."""
    memory = plan_memory(name, footprint, sheet, sizes)
    shape, parallel = model_shape(name, footprint, sizes.block_size, sizes.context), footprint.parallel

    def costs_of(tokens: int) -> CostModel:
        return from_roofline(name, shape, sheet, parallel.tensor, -(-tokens // parallel.data))

    steps = [decode(costs_of(batch), batch, sizes.context, parallel.data, memory) for batch in BATCHES]
    tokens = sizes.max_num_batched_tokens
    steps.append(prefill(costs_of(tokens), tokens, parallel.data))
    costs = from_roofline(name, shape, sheet, parallel.tensor)
    saturated = costs.step_s(StepLoad(costs.saturation_tokens, 0, 0, 0))
    return Plan(
        name, shape.num_params, shape.active_params, sheet.name, parallel.tensor, parallel.data, memory, tuple(steps),
        costs.saturation_tokens, costs.hidden_tokens(saturated), costs.swap_out_s(sizes.context),
    )  # fmt: skip


def model_shape(name: str, footprint: Footprint, block_size: int, context: int) -> ModelShape:
    """What the roofline needs of a model whose contexts are so many tokens long."""
    config = footprint.config
    windows = config.windows or (None,)
    attended_share = sum(min(window or context, context) for window in windows) / (context * len(windows))
    experts = None
    if config.num_experts:
        each = 3 * config.hidden_size * config.intermediate_size * config.num_layers  # gate, up and down
        experts = ExpertShape(config.num_experts, config.num_experts_per_token, each)
    return ModelShape(
        name, num_params(config), config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads,
        config.head_dim, footprint.dtype.itemsize, footprint.kv_element_bytes(block_size), experts,
        attended_share,
    )  # fmt: skip


def plan_memory(name: str, footprint: Footprint, sheet: DeviceSheet, sizes: Sizes) -> Memory:
    """What each device holds, the KV pool as large as it can be. ValueError where not one sequence fits."""
    block_bytes = footprint.block_bytes(sizes.block_size)
    workspace = footprint.workspace_bytes(sizes.max_num_batched_tokens, sizes.max_num_seqs)
    usable = int(sheet.memory_bytes * DEVICE_SHARE * sizes.memory_utilization)
    staging = STAGED_BLOCKS * block_bytes
    room = usable - footprint.weight_bytes - workspace - staging
    blocks = footprint.addressable_blocks(max(0, room // block_bytes), sizes.block_size)
    if blocks * sizes.block_size < sizes.max_model_len:
        raise ValueError(
            f"{name} does not fit {footprint.parallel.tensor} x {sheet.name}: weights take "
            f"{footprint.weight_bytes / GB:.1f} GB of the {usable / GB:.1f} GB of each, workspace and staging "
            f"{(workspace + staging) / GB:.1f} GB, and a sequence of {sizes.max_model_len} tokens does not fit the rest"
        )
    return Memory(
        int(sheet.memory_bytes), usable, footprint.weight_bytes, workspace, staging, block_bytes, blocks,
        blocks * sizes.block_size,
    )  # fmt: skip


def decode(costs: CostModel, batch: int, context: int, data: int, memory: Memory) -> Step:
    """A step in which so many sequences at `context` tokens draw one each."""
    here = -(-batch // data)
    seconds = costs.step_s(StepLoad(here, here * context, here * context, here))
    return Step("decode", batch, batch * context, seconds, batch / seconds, batch * context <= memory.num_tokens)


def prefill(costs: CostModel, tokens: int, data: int) -> Step:
    """A step that computes so many tokens of one prompt."""
    here = -(-tokens // data)
    seconds = costs.step_s(StepLoad(here, tokens, chunk_pairs(0, tokens) // data, 1))
    return Step("prefill", tokens, 0, seconds, tokens / seconds, True)
