# mypy: allow-subclassing-any
"""GPT-J: rotary embedding of a part of each head, attention and MLP side by side on one normed input."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxcept_kernels.attention import Implementation
from jaxcept_kernels.layout import AttentionMetadata, KVLayout, KVPool
from jaxcept_models.config import ModelConfig
from jaxcept_models.layers import MLP, Attention, Embedding, LayerNorm, Linear, Step, make_step, run_layers
from jaxcept_models.sharding import ALONE, Parallel
from jaxcept_models.weight_map import Part, WeightMap, fused_rows


class GPTJLayer(nnx.Module):
    """Attention and MLP of the same normed input, both added to the residual."""

    def __init__(
        self, config: ModelConfig, dtype: jnp.dtype, implementation: Implementation, parallel: Parallel, layer: int
    ) -> None:
        self.norm = LayerNorm(config.hidden_size, config.norm_eps, dtype, implementation)
        self.attention = Attention(config, dtype, implementation, parallel, layer)
        self.mlp = MLP(config, dtype, parallel)

    def __call__(
        self,
        hidden: jax.Array,  # [tokens, hidden]
        pool: KVPool,
        layer: jax.Array,  # int32 scalar
        step: Step,
        layout: KVLayout,
    ) -> tuple[jax.Array, KVPool]:
        """[tokens, hidden], and the pool with this layer's part of the batch."""
        normed = self.norm(hidden)
        attended, pool = self.attention(normed, pool, layer, step, layout)
        return hidden + attended + self.mlp(normed), pool


class GPTJ(nnx.Module):
    """Embedding, layers, norm, and the projection to the vocabulary with its bias."""

    def __init__(
        self, config: ModelConfig, dtype: jnp.dtype, implementation: Implementation, parallel: Parallel = ALONE
    ) -> None:
        self.ropes = config.ropes
        self.parallel = parallel
        self.embedding = Embedding(config, dtype, parallel, tied=False)
        layers = [GPTJLayer(config, dtype, implementation, parallel, i) for i in range(config.num_layers)]
        self.layers = nnx.List(layers)
        self.norm = LayerNorm(config.hidden_size, config.norm_eps, dtype, implementation)
        self.head = Linear(config.hidden_size, config.vocab_size, dtype, bias=True)

    def __call__(
        self,
        token_ids: jax.Array,  # [tokens] int32
        meta: AttentionMetadata,
        pool: KVPool,
        layout: KVLayout,
    ) -> tuple[jax.Array, KVPool]:
        """[tokens, hidden] after the final norm, and the pool with this batch's keys and values."""
        step = make_step(meta, self.ropes, self.parallel)
        hidden = self.embedding(self.parallel.own(token_ids))
        hidden, pool = run_layers(self.layers, hidden, pool, step, layout)
        return self.parallel.gather(self.norm(hidden)), pool

    def logits(
        self,
        hidden: jax.Array,  # [rows, hidden]
    ) -> jax.Array:
        """[rows, vocab] in hidden's dtype."""
        return self.parallel.whole_vocabulary(self.head(hidden))


def gptj_weights(config: ModelConfig, tensor: int = 1) -> WeightMap:
    """Tensor names of GPT-J checkpoints."""
    embedding = Part("transformer.wte.weight")
    weights: dict[str, tuple[Part, ...]] = {
        "embedding.weight": (embedding,),
        "norm.scale": (Part("transformer.ln_f.weight"),),
        "norm.bias": (Part("transformer.ln_f.bias"),),
        "head.weight": (embedding if config.tie_word_embeddings else Part("lm_head.weight"),),
        "head.bias": (Part("lm_head.bias"),),
    }
    rows = fused_rows(config, tensor)
    for i in range(config.num_layers):
        theirs, ours = f"transformer.h.{i}", f"layers.{i}"
        weights[f"{ours}.norm.scale"] = (Part(f"{theirs}.ln_1.weight"),)
        weights[f"{ours}.norm.bias"] = (Part(f"{theirs}.ln_1.bias"),)
        weights[f"{ours}.attention.qkv.weight"] = rows.qkv(f"{theirs}.attn", ("q_proj", "k_proj", "v_proj"), "weight")
        weights[f"{ours}.attention.output.weight"] = (Part(f"{theirs}.attn.out_proj.weight"),)
        for kind in ("weight", "bias"):
            weights[f"{ours}.mlp.up.{kind}"] = (Part(f"{theirs}.mlp.fc_in.{kind}"),)
            weights[f"{ours}.mlp.down.{kind}"] = (Part(f"{theirs}.mlp.fc_out.{kind}"),)
    return weights
