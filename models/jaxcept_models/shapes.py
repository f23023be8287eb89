"""Well-known models, as far as their config.json tells: to plan for one that is not at hand."""

from __future__ import annotations

from collections.abc import Mapping

from jaxcept_models.config import ModelConfig
from jaxcept_models.rope import RopeConfig

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
}
