"""One model on several devices: which part of every array each device has, and what the parts tell each other.

A table per architecture names the axis of the mesh along which an array is cut. The model runs inside `jax.shard_map`
as a smaller one with the heads, hidden columns and vocabulary of its device; what it needs of the others passes through
`Parallel`: two sums a layer (after the attention's output and after the MLP's), one for the embedding and one gather of
the logits. As in Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxcept_kernels.layout import AttentionMetadata
from jaxcept_models.config import ModelConfig

DATA, TENSOR = "data", "tensor"
GATE_BLOCK = 32
MOST_EVEN = 8  # every model is laid out so that so many devices can share its MLP, if its size is a multiple

Rules = Mapping[str, PartitionSpec]

_WHOLE = PartitionSpec()
_ROWS, _COLUMNS, _ENTRIES = PartitionSpec(TENSOR, None), PartitionSpec(None, TENSOR), PartitionSpec(TENSOR)
_SHARED: Rules = {
    "embedding.weight": _ROWS,
    "head.weight": _COLUMNS,
    "head.bias": _ENTRIES,
    "norm.scale": _WHOLE,
    "norm.bias": _WHOLE,
    "layers.*.attention.qkv.weight": _COLUMNS,  # by kv head, with its queries
    "layers.*.attention.qkv.bias": _ENTRIES,
    "layers.*.attention.output.weight": _ROWS,  # its product is summed over the devices
    "layers.*.attention.output.bias": _WHOLE,  # added to the sum
    "layers.*.mlp.down.weight": _ROWS,
    "layers.*.mlp.down.bias": _WHOLE,
    "pool": PartitionSpec(None, TENSOR),  # [layers * blocks, kv_heads, block_size, head_dim]; blocks on hosts as well
    "batch": _WHOLE,  # a step's metadata, the rows' sampling state, hidden vectors and logits between programs
}
LLAMA_RULES: Rules = {
    **_SHARED,
    "layers.*.attention_norm.scale": _WHOLE,
    "layers.*.attention.q_norm.scale": _WHOLE,
    "layers.*.attention.k_norm.scale": _WHOLE,
    "layers.*.mlp_norm.scale": _WHOLE,
    "layers.*.mlp.gate_up.weight": _COLUMNS,
    "layers.*.mlp.gate_up.bias": _ENTRIES,
}
GEMMA_RULES: Rules = {
    **LLAMA_RULES,
    "layers.*.attention_out_norm.scale": _WHOLE,
    "layers.*.mlp_out_norm.scale": _WHOLE,
}
EXPERTS_RULES: Rules = {
    **LLAMA_RULES,
    "layers.*.mlp.router.weight": _WHOLE,
    "layers.*.mlp.gate_up.weight": PartitionSpec(None, None, TENSOR),  # each device has its part of every expert
    "layers.*.mlp.down.weight": PartitionSpec(None, TENSOR, None),
}
GPTJ_RULES: Rules = {
    **_SHARED,
    "layers.*.norm.scale": _WHOLE,
    "layers.*.norm.bias": _WHOLE,
    "layers.*.mlp.up.weight": _COLUMNS,
    "layers.*.mlp.up.bias": _ENTRIES,
}
_VOCABULARY = ("embedding.weight", "head.weight", "head.bias")


@dataclass(frozen=True, slots=True)
class Parallel:
    """How many devices share one model's work, and how their parts meet. Its methods run inside `jax.shard_map`.

    `tensor` devices share every layer, `data` such groups share the tokens of a step.
    """

    tensor: int = 1
    data: int = 1
    splits_vocabulary: bool = False

    def sum_parts(self, x: jax.Array) -> jax.Array:
        """The sum over the devices that share a layer."""
        return jax.lax.psum(x, TENSOR) if self.tensor > 1 else x

    def whole_vocabulary(
        self,
        logits: jax.Array,  # [rows, this device's part of the vocabulary]
    ) -> jax.Array:
        """[rows, vocab]"""
        if not self.splits_vocabulary:
            return logits
        whole: jax.Array = jax.lax.all_gather(logits, TENSOR, axis=1, tiled=True)
        return whole

    def first_of(self, part: int) -> jax.Array:
        """Where this device's part begins, of parts of so many entries: an int32 scalar."""
        first: jax.Array = jax.lax.axis_index(TENSOR) * part
        return first

    def own(
        self,
        tokens: jax.Array,  # [tokens, ...]
    ) -> jax.Array:
        """This group's tokens: [tokens / data, ...]"""
        if self.data == 1:
            return tokens
        count = tokens.shape[0] // self.data
        return jax.lax.dynamic_slice_in_dim(tokens, jax.lax.axis_index(DATA) * count, count)

    def gather(
        self,
        tokens: jax.Array,  # [tokens / data, ...]
    ) -> jax.Array:
        """Every group's tokens: [tokens, ...]"""
        return tokens if self.data == 1 else jax.lax.all_gather(tokens, DATA, axis=0, tiled=True)

    def own_batch(self, meta: AttentionMetadata) -> AttentionMetadata:
        """The batch of this group's tokens; contexts of entries end with their last token here."""
        if self.data == 1:
            return meta
        positions, slots = self.own(meta.positions), self.own(meta.slots)
        count = positions.shape[0]
        start = meta.query_start - jax.lax.axis_index(DATA) * count
        inside = jnp.clip(start, 0, count)
        context = meta.context_len - (start - inside)[1:]
        context = jnp.where(jnp.diff(inside) > 0, context, 0)
        return AttentionMetadata(positions, slots, inside, context, meta.block_tables)


ALONE = Parallel()


@dataclass(frozen=True, eq=False)
class Placement:
    """A model's mesh and table."""

    mesh: Mesh  # axes DATA and TENSOR
    parallel: Parallel
    rules: Rules

    def spec(self, path: str) -> PartitionSpec:
        """How the array at this path is cut. ValueError where the table does not know it."""
        name = re.sub(r"\.\d+\.", ".*.", path)
        if name not in self.rules:
            raise ValueError(f"{path}: the sharding table has no rule for it")
        return self.rules[name]

    def sharding(self, path: str) -> NamedSharding:
        """Where the array at this path lies."""
        return NamedSharding(self.mesh, self.spec(path))

    @property
    def pool(self) -> NamedSharding:
        """Where the KV pool's arrays lie."""
        return self.sharding("pool")

    @property
    def batch(self) -> NamedSharding:
        """Where what belongs to a step lies: whole on every device."""
        return self.sharding("batch")

    def on_each(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """The function, run by every device on its parts."""
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def make_mesh(tensor: int, data: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of data x tensor devices, the first ones. ValueError where there are too few."""
    if tensor < 1 or data < 1:
        raise ValueError(f"tensor={tensor}, data={data}: expected 1 or more of each")
    given = jax.devices() if devices is None else list(devices)
    if len(given) < tensor * data:
        raise ValueError(f"tensor={tensor}, data={data}: needs {tensor * data} devices, and there are {len(given)}")
    return jax.make_mesh(
        (data, tensor), (DATA, TENSOR), axis_types=(AxisType.Auto, AxisType.Auto), devices=given[: tensor * data]
    )


def place(config: ModelConfig, rules: Rules, mesh: Mesh) -> Placement:
    """The placement of a model on a mesh with the axes DATA and TENSOR.

    A vocabulary that the devices cannot share evenly is whole on each. ValueError where they cannot share the heads or
    the MLP.
    """
    parallel = share(config, mesh.shape[TENSOR], mesh.shape[DATA])
    if not parallel.splits_vocabulary:
        rules = {**rules, **dict.fromkeys(_VOCABULARY, _WHOLE)}
    return Placement(mesh, parallel, rules)


def share(config: ModelConfig, tensor: int, data: int = 1) -> Parallel:
    """How so many devices share a model. ValueError where they cannot."""
    check_tensor_size(config, tensor)
    return Parallel(tensor, data, tensor > 1 and config.vocab_size % tensor == 0)


def check_tensor_size(config: ModelConfig, tensor: int) -> None:
    """ValueError, with the sizes that work, where so many devices cannot share the model's layers."""
    if not _can_share(config, tensor):
        sizes = ", ".join(str(size) for size in tensor_sizes(config))
        raise ValueError(
            f"tensor={tensor}: {config.num_heads} heads, {config.num_kv_heads} KV heads and an MLP of "
            f"{config.intermediate_size} cannot be shared by so many devices; sizes that work: {sizes}"
        )


def tensor_sizes(config: ModelConfig) -> tuple[int, ...]:
    """All numbers of devices that can share the model's layers."""
    return tuple(size for size in range(1, config.num_heads + 1) if _can_share(config, size))


def _can_share(config: ModelConfig, tensor: int) -> bool:
    blocks = config.intermediate_size // gate_block(config.intermediate_size)
    kv_heads = config.num_kv_heads
    # With more devices than KV heads each head is on several, as many for every head.
    has_heads = kv_heads % tensor == 0 or tensor % kv_heads == 0
    return config.num_heads % tensor == 0 and has_heads and blocks % tensor == 0


def gate_block(intermediate_size: int) -> int:
    """Columns of gate, then as many of up, and so on: a split of the columns keeps each gate with its up.

    The same for every mesh, so that a stored model fits all of them.
    """
    return math.gcd(intermediate_size // math.gcd(intermediate_size, MOST_EVEN), GATE_BLOCK)


def spread_kv_heads(config: ModelConfig, tensor: int) -> ModelConfig:
    """The model with its KV heads repeated until every device has one."""
    return replace(config, num_kv_heads=max(config.num_kv_heads, tensor))


def part_of(config: ModelConfig, parallel: Parallel) -> ModelConfig:
    """The model that one device computes."""
    tensor = parallel.tensor
    return replace(
        config,
        num_heads=config.num_heads // tensor,
        num_kv_heads=max(1, config.num_kv_heads // tensor),
        intermediate_size=config.intermediate_size // tensor,
        vocab_size=config.vocab_size // tensor if parallel.splits_vocabulary else config.vocab_size,
    )
