"""Bytes that a model takes on each of its devices, from its shape alone.

Weights and KV cache are exact. What programs need besides is an estimate by the widest arrays that live at once, held
to what XLA's buffer assignment says of the compiled programs (`memory_analysis`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx

from jaxcept_kernels.attention import Implementation
from jaxcept_kernels.layout import KVLayout
from jaxcept_kernels.pallas.common import MOST_SIGNED, can_address
from jaxcept_models.config import ModelConfig
from jaxcept_models.model import ARCHITECTURES
from jaxcept_models.sharding import Parallel, part_of

_FLOAT32 = 4
_LOGITS_AT_ONCE = 5  # float32 copies that filters, penalties and log-probabilities of one draw keep


@dataclass(frozen=True, slots=True)
class Footprint:
    """A model on devices that share it. All bytes are those of one device."""

    config: ModelConfig
    parallel: Parallel
    dtype: jnp.dtype
    implementation: Implementation
    kv_cache_dtype: jnp.dtype | None = None  # None is `dtype`

    @property
    def part(self) -> ModelConfig:
        """What one device computes."""
        return part_of(self.config, self.parallel)

    @property
    def weight_bytes(self) -> int:
        """This device's part of the weights."""
        return _num_params(self.part, self.parallel) * self.dtype.itemsize

    def block_bytes(self, block_size: int) -> int:
        """This device's heads of one block of the KV pool, all layers."""
        return self._block(block_size).block_bytes

    def addressable_blocks(self, num_blocks: int, block_size: int) -> int:
        """As many of these blocks as the kernels find their way in."""
        block = self._block(block_size)
        elements = math.prod(block.shape)
        can = self.implementation is not Implementation.PALLAS or can_address(
            num_blocks * elements, block.dtype.itemsize
        )
        return num_blocks if can else MOST_SIGNED // elements

    def _block(self, block_size: int) -> KVLayout:
        part, dtype = self.part, jnp.dtype(self.kv_cache_dtype or self.dtype)
        return KVLayout(part.num_layers, 1, block_size, part.num_kv_heads, part.head_dim, dtype)

    def kv_element_bytes(self, block_size: int) -> float:
        """Bytes that one number of a key or a value takes, scales included."""
        part = self.part
        return self.block_bytes(block_size) / (2 * part.num_layers * block_size * part.num_kv_heads * part.head_dim)

    def step_bytes(self, tokens: int) -> int:
        """Temporaries of a step of so many tokens."""
        part, here = self.part, -(-tokens // self.parallel.data)
        qkv = (part.num_heads + 2 * part.num_kv_heads) * part.head_dim
        if part.architecture == "GPTJForCausalLM":  # attention and MLP side by side
            width = part.intermediate_size + qkv + 3 * part.hidden_size
        elif part.num_experts:  # the same as below, and the input, for each expert of a token
            width = part.num_experts_per_token * (3 * part.intermediate_size + part.hidden_size) + 4 * part.hidden_size
        else:  # gate and up, and their product
            width = 3 * part.intermediate_size + qkv + 4 * part.hidden_size
        num_bytes = here * width * self.dtype.itemsize
        if self.implementation is Implementation.XLA:
            # The loop of every layer has its accumulator, and XLA keeps them all.
            num_bytes += 2 * _FLOAT32 * part.num_layers * here * part.num_heads * part.head_dim
        return num_bytes

    def result_bytes(self, tokens: int, max_num_seqs: int) -> int:
        """What a step hands to the programs behind it: the tokens' hidden vectors, and those that draw."""
        return (tokens + max_num_seqs) * self.config.hidden_size * self.dtype.itemsize

    def draw_bytes(self, max_num_seqs: int) -> int:
        """Temporaries of the largest draw."""
        gathered = self.dtype.itemsize if self.parallel.splits_vocabulary else 0
        masked = 1 if self.config.logits_soft_cap is not None else 0  # a byte each beside them, as XLA fuses the cap
        return max_num_seqs * self.config.vocab_size * (_LOGITS_AT_ONCE * _FLOAT32 + gathered + masked)

    def workspace_bytes(self, tokens: int, max_num_seqs: int) -> int:
        """All of them: a step and a draw may be under way at once."""
        return self.step_bytes(tokens) + self.result_bytes(tokens, max_num_seqs) + self.draw_bytes(max_num_seqs)


def num_params(config: ModelConfig) -> int:
    """Parameters of the whole model."""
    return _num_params(config, Parallel())


def _num_params(part: ModelConfig, parallel: Parallel) -> int:
    one, two = (_count(replace(part, num_layers=layers), parallel) for layers in (1, 2))
    return one + (part.num_layers - 1) * (two - one)  # layers are alike


def _count(part: ModelConfig, parallel: Parallel) -> int:
    module = ARCHITECTURES[part.architecture].module
    made = nnx.eval_shape(lambda: module(part, jnp.dtype(jnp.bfloat16), Implementation.XLA, parallel))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(made)))
