"""Well-known models, as far as their config.json tells: to plan for one that is not at hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxcept_models.config import ModelConfig
from jaxcept_models.rope import LinearScaling, RopeConfig

_GEMMA: Any = {"tie_word_embeddings": True, "activation": "gelu_tanh", "norms_above_one": True}
SHAPES: Mapping[str, ModelConfig] = {
    "gpt-j-6b": ModelConfig(
        "GPTJForCausalLM", 28, 4096, 16, 16, 256, 16384, 50400, 2048, 1e-5, RopeConfig(1e4, 64), mlp_bias=True
    ),
    "vicuna-13b": ModelConfig(
        "LlamaForCausalLM", 40, 5120, 40, 40, 128, 13824, 32000, 4096, 1e-5, RopeConfig(1e4, 128)
    ),
    "llama-3-8b": ModelConfig(
        "LlamaForCausalLM", 32, 4096, 32, 8, 128, 14336, 128256, 8192, 1e-5, RopeConfig(5e5, 128)
    ),
    "llama-3-70b": ModelConfig(
        "LlamaForCausalLM", 80, 8192, 64, 8, 128, 28672, 128256, 8192, 1e-5, RopeConfig(5e5, 128)
    ),
    "gemma-2-9b": ModelConfig(
        "Gemma2ForCausalLM",
        42,
        3584,
        16,
        8,
        256,
        14336,
        256000,
        8192,
        1e-6,
        RopeConfig(1e4, 256),
        **_GEMMA,
        embedding_scale=3584**0.5,
        attention_scale=256**-0.5,
        attention_soft_cap=50.0,
        logits_soft_cap=30.0,
        windows=(4096, None) * 21,
    ),
    "gemma-3-27b": ModelConfig(
        "Gemma3ForConditionalGeneration",
        62,
        5376,
        32,
        16,
        128,
        21504,
        262208,
        131072,
        1e-6,
        RopeConfig(1e6, 128, scaling=LinearScaling(8.0)),
        **_GEMMA,
        qk_norm=True,
        embedding_scale=5376**0.5,
        attention_scale=168**-0.5,
        windows=(*((*[1024] * 5, None) * 10), 1024, 1024),
        local_rope=RopeConfig(1e4, 128),
    ),
    "mixtral-8x7b": ModelConfig(
        "MixtralForCausalLM",
        32,
        4096,
        32,
        8,
        128,
        14336,
        32000,
        32768,
        1e-5,
        RopeConfig(1e6, 128),
        num_experts=8,
        num_experts_per_token=2,
        norm_topk_prob=True,
    ),
    "qwen3-30b-a3b": ModelConfig(
        "Qwen3MoeForCausalLM",
        48,
        2048,
        32,
        4,
        128,
        768,
        151936,
        40960,
        1e-6,
        RopeConfig(1e6, 128),
        qk_norm=True,
        num_experts=128,
        num_experts_per_token=8,
        norm_topk_prob=True,
    ),
}
