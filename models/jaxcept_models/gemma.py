# mypy: allow-subclassing-any
"""Gemma 2 and 3: Llama with norms before and behind each part of a layer, and windows on most layers.

Gemma 2 (arXiv:2408.00118) keeps scores and logits between caps; Gemma 3 (arXiv:2503.19786) has norms on q and k
instead, and two rotations.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxcept_kernels.attention import Implementation
from jaxcept_kernels.layout import KVLayout, KVPool
from jaxcept_models.config import ModelConfig
from jaxcept_models.layers import Attention, GatedMLP, RMSNorm, Step
from jaxcept_models.llama import Llama, llama_weights
from jaxcept_models.sharding import ALONE, Parallel
from jaxcept_models.weight_map import Part, WeightMap


class GemmaLayer(nnx.Module):
    """Attention, then the gated MLP: each of a normed input, normed once more, and added to the residual."""

    def __init__(
        self, config: ModelConfig, dtype: jnp.dtype, implementation: Implementation, parallel: Parallel, layer: int
    ) -> None:
        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, config, dtype, implementation)

        self.attention_norm, self.attention_out_norm = norm(), norm()
        self.attention = Attention(config, dtype, implementation, parallel, layer)
        self.mlp_norm, self.mlp_out_norm = norm(), norm()
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
        hidden = hidden + self.attention_out_norm(attended)
        return hidden + self.mlp_out_norm(self.mlp(self.mlp_norm(hidden))), pool


class Gemma(Llama):
    """Scaled embedding, layers, norm, and logits between caps."""

    layer = GemmaLayer

    def __init__(
        self, config: ModelConfig, dtype: jnp.dtype, implementation: Implementation, parallel: Parallel = ALONE
    ) -> None:
        super().__init__(config, dtype, implementation, parallel)
        self.embedding_scale = config.embedding_scale
        self.logits_soft_cap = config.logits_soft_cap

    def embed(
        self,
        token_ids: jax.Array,  # [tokens] int32
    ) -> jax.Array:
        """[tokens, hidden], what the first layer takes."""
        hidden = super().embed(token_ids)
        return hidden * jnp.asarray(self.embedding_scale, hidden.dtype)  # rounded, as it was in training

    def logits(
        self,
        hidden: jax.Array,  # [rows, hidden]
    ) -> jax.Array:
        """[rows, vocab], float32 where they are capped."""
        logits = super().logits(hidden)
        if self.logits_soft_cap is None:
            return logits
        return self.logits_soft_cap * jnp.tanh(logits.astype(jnp.float32) / self.logits_soft_cap)


def gemma_weights(config: ModelConfig, tensor: int = 1) -> WeightMap:
    """Tensor names of Gemma checkpoints; those of a model that sees have its text part one level down."""
    prefix = "language_model." if config.architecture == "Gemma3ForConditionalGeneration" else ""
    weights = dict(llama_weights(config, tensor, prefix))
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"{prefix}model.layers.{i}"
        weights |= {
            f"{ours}.attention_out_norm.scale": (Part(f"{theirs}.post_attention_layernorm.weight"),),
            f"{ours}.mlp_norm.scale": (Part(f"{theirs}.pre_feedforward_layernorm.weight"),),
            f"{ours}.mlp_out_norm.scale": (Part(f"{theirs}.post_feedforward_layernorm.weight"),),
        }
    return weights
