"""Small random Hugging Face checkpoints of every family, written by transformers itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

SEES = "gemma3-sees"  # a model with a vision part, of which the text part is loaded
_LLAMA: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_LLAMA31_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_GPTJ: dict[str, Any] = {
    "vocab_size": 160,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "rotary_dim": 8,
    "n_positions": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_GEMMA: dict[str, Any] = _LLAMA | {
    "head_dim": 24,
    "sliding_window": 20,
    "query_pre_attn_scalar": 20,
    "layer_types": ["sliding_attention", "full_attention"],
}
_GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48}
_BUILDERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "gemma2": (transformers.Gemma2Config, _GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": (transformers.Gemma3TextConfig, _GEMMA | {"rope_parameters": _GEMMA3_ROPE}),
    SEES: (lambda **text: transformers.Gemma3Config(text_config=text, vision_config=_VISION), _GEMMA),
    "gptj": (transformers.GPTJConfig, _GPTJ),
    "llama2": (transformers.LlamaConfig, _LLAMA | {"num_key_value_heads": 4}),
    "llama31": (transformers.LlamaConfig, _LLAMA | {"rope_parameters": _LLAMA31_ROPE}),
    "mistral": (transformers.MistralConfig, _LLAMA | {"head_dim": 32, "sliding_window": None}),
    "qwen25": (transformers.Qwen2Config, _LLAMA | {"tie_word_embeddings": True}),
    "qwen3": (transformers.Qwen3Config, _LLAMA | {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3moe": (transformers.Qwen3MoeConfig, _LLAMA | _EXPERTS | {"head_dim": 32, "norm_topk_prob": True}),
    "mixtral": (transformers.MixtralConfig, _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
FAMILIES = tuple(family for family in _BUILDERS if family != SEES)


def build_checkpoint(family: str, folder: Path, **overrides: Any) -> Path:
    """Writes config.json and model.safetensors of a seeded random model to `folder` and returns it.

    `overrides` go to the transformers config; `max_shard_size` to save_pretrained and `dtype` to the weights on disk.
    Weights are large enough for sharp attention and distinct logits; biases and norms differ from 0 and 1.
    """
    shard_size = overrides.pop("max_shard_size", "5GB")
    dtype = overrides.pop("dtype", torch.float32)
    make_config, defaults = _BUILDERS[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(make_config(**(defaults | overrides)))
        for name, parameter in model.named_parameters():
            spread = torch.randn_like(parameter)
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.data = 1 + 0.1 * spread if is_norm else 0.2 * spread
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    return folder


def reference_model(folder: Path) -> Any:
    """The same checkpoint in transformers: PyTorch, CPU, float32, plain attention."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
