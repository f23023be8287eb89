# mypy: allow-subclassing-any
"""Llama and the models of its shape: Mistral (no biases), Qwen2 (biases on q, k, v), Qwen3 (norms on q and k).

Mixtral and Qwen3-MoE are Mistral and Qwen3 with experts in place of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxcept_kernels.attention import Implementation
from jaxcept_kernels.layout import AttentionMetadata, KVLayout, KVPool
from jaxcept_models.config import ModelConfig
from jaxcept_models.experts import Experts
from jaxcept_models.layers import Attention, Embedding, GatedMLP, Layer, Linear, RMSNorm, Step, make_step, run_layers
from jaxcept_models.sharding import ALONE, Parallel
from jaxcept_models.weight_map import ExpertNames, FusedRows, Part, WeightMap, fused_rows

# Where the experts of a layer are, and what their matrices are called.
_EXPERTS = {
    "MixtralForCausalLM": ("block_sparse_moe", ExpertNames("w1", "w3", "w2")),
    "Qwen3MoeForCausalLM": ("mlp", ExpertNames("gate_proj", "up_proj", "down_proj")),
}


class LlamaLayer(nnx.Module):
    """Attention, then the gated MLP or the experts, each on a normed input and added to the residual."""

    def __init__(
        self, config: ModelConfig, dtype: jnp.dtype, implementation: Implementation, parallel: Parallel, layer: int
    ) -> None:
        self.attention_norm = RMSNorm(config.hidden_size, config, dtype, implementation)
        self.attention = Attention(config, dtype, implementation, parallel, layer)
        self.mlp_norm = RMSNorm(config.hidden_size, config, dtype, implementation)
        if config.num_experts:
            self.mlp: Experts | GatedMLP = Experts(config, dtype, implementation, parallel)
        else:
            self.mlp = GatedMLP(config, dtype, parallel)

    def __call__(
        self,
        hidden: jax.Array,  # [tokens, hidden]
        pool: KVPool,
        layer: jax.Array,  # int32 scalar
        step: Step,
        layout: KVLayout,
    ) -> tuple[jax.Array, KVPool]:
        """[tokens, hidden], and the pool with this layer's part of the batch."""
        attended, pool = self.attention(self.attention_norm(hidden), pool, layer, step, layout)
        hidden = hidden + attended
        normed = self.mlp_norm(hidden)
        if isinstance(self.mlp, Experts):
            return hidden + self.mlp(normed, step.meta.query_start[-1]), pool
        return hidden + self.mlp(normed), pool


class Llama(nnx.Module):
    """Embedding, layers, norm, and the projection to the vocabulary."""

    layer: ClassVar[Callable[..., Layer]] = LlamaLayer

    def __init__(
        self, config: ModelConfig, dtype: jnp.dtype, implementation: Implementation, parallel: Parallel = ALONE
    ) -> None:
        self.ropes = config.ropes
        self.parallel = parallel
        tied = config.tie_word_embeddings
        self.embedding = Embedding(config, dtype, parallel, tied=tied)
        layers = [self.layer(config, dtype, implementation, parallel, i) for i in range(config.num_layers)]
        self.layers = nnx.List(layers)
        self.norm = RMSNorm(config.hidden_size, config, dtype, implementation)
        self.head = None if tied else Linear(config.hidden_size, config.vocab_size, dtype)

    def __call__(
        self,
        token_ids: jax.Array,  # [tokens] int32
        meta: AttentionMetadata,
        pool: KVPool,
        layout: KVLayout,
    ) -> tuple[jax.Array, KVPool]:
        """[tokens, hidden] after the final norm, and the pool with this batch's keys and values."""
        step = make_step(meta, self.ropes, self.parallel)
        hidden = self.embed(self.parallel.own(token_ids))
        hidden, pool = run_layers(self.layers, hidden, pool, step, layout)
        return self.parallel.gather(self.norm(hidden)), pool

    def embed(
        self,
        token_ids: jax.Array,  # [tokens] int32
    ) -> jax.Array:
        """[tokens, hidden], what the first layer takes."""
        return self.embedding(token_ids)

    def logits(
        self,
        hidden: jax.Array,  # [rows, hidden]
    ) -> jax.Array:
        """[rows, vocab] in hidden's dtype."""
        logits = self.embedding.logits(hidden) if self.head is None else self.head(hidden)
        return self.parallel.whole_vocabulary(logits)


def llama_weights(config: ModelConfig, tensor: int = 1, prefix: str = "") -> WeightMap:
    """Tensor names of Llama, Mistral, Mixtral, Qwen2, Qwen3 and Qwen3-MoE checkpoints."""
    weights: dict[str, tuple[Part, ...]] = {
        "embedding.weight": (Part(f"{prefix}model.embed_tokens.weight"),),
        "norm.scale": (Part(f"{prefix}model.norm.weight"),),
        "head.weight": (Part(f"{prefix}lm_head.weight"),),
    }
    rows = fused_rows(config, tensor)
    for i in range(config.num_layers):
        theirs = f"{prefix}model.layers.{i}"
        layer = _layer_weights(theirs, rows) | _expert_weights(theirs, rows, config)
        weights |= {f"layers.{i}.{path}": parts for path, parts in layer.items()}
    return weights


def _layer_weights(prefix: str, rows: FusedRows) -> dict[str, tuple[Part, ...]]:
    weights: dict[str, tuple[Part, ...]] = {
        "attention_norm.scale": (Part(f"{prefix}.input_layernorm.weight"),),
        "attention.q_norm.scale": (Part(f"{prefix}.self_attn.q_norm.weight"),),
        "attention.k_norm.scale": (Part(f"{prefix}.self_attn.k_norm.weight"),),
        "mlp_norm.scale": (Part(f"{prefix}.post_attention_layernorm.weight"),),
    }
    for kind in ("weight", "bias"):
        weights |= {
            f"attention.qkv.{kind}": rows.qkv(f"{prefix}.self_attn", ("q_proj", "k_proj", "v_proj"), kind),
            f"attention.output.{kind}": (Part(f"{prefix}.self_attn.o_proj.{kind}"),),
            f"mlp.gate_up.{kind}": rows.gate_up(f"{prefix}.mlp", kind),
            f"mlp.down.{kind}": (Part(f"{prefix}.mlp.down_proj.{kind}"),),
        }
    return weights


def _expert_weights(prefix: str, rows: FusedRows, config: ModelConfig) -> dict[str, tuple[Part, ...]]:
    if not config.num_experts:
        return {}
    place, names = _EXPERTS[config.architecture]
    experts = rows.experts(f"{prefix}.{place}", config.num_experts, names)
    return {f"mlp.{path}": parts for path, parts in experts.items()}
