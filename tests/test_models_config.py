"""Configs as they were written over the years, and those that are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jaxcept_models.config import ModelConfig, read_config
from jaxcept_models.errors import CheckpointError
from jaxcept_models.rope import LinearScaling, Llama3Scaling, RopeConfig, YarnScaling

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "torch_dtype": "float16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 8}
QWEN3_MOE = LLAMA | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_key_value_heads": 4,
    "head_dim": 128,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
MIXTRAL = LLAMA | {"architectures": ["MixtralForCausalLM"], "num_local_experts": 8, "num_experts_per_tok": 2}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "num_key_value_heads": 8, "max_position_embeddings": 32768}

WINDOW = {"use_sliding_window": True, "sliding_window": 64}
GEMMA2 = {"architectures": ["Gemma2ForCausalLM"], "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4096}
GEMMA3 = GEMMA2 | {"architectures": ["Gemma3ForCausalLM"], "sliding_window": 512}


def read(folder: Path, values: dict[str, Any] | str) -> ModelConfig:
    (folder / "config.json").write_text(values if isinstance(values, str) else json.dumps(values))
    return read_config(folder)


def test_llama2_as_written_before_gqa_and_rope_fields(tmp_path: Path) -> None:
    config = read(tmp_path, LLAMA)
    assert (config.num_kv_heads, config.head_dim, config.rope) == (32, 128, RopeConfig(10000.0, 128))
    assert (config.bos_token_id, config.eos_token_ids, config.norm_eps) == (1, (2,), 1e-5)
    assert not (
        config.qkv_bias or config.output_bias or config.mlp_bias or config.qk_norm or config.tie_word_embeddings
    )


def test_rope_reads_alike_from_old_and_new_fields(tmp_path: Path) -> None:
    old = read(tmp_path, LLAMA | {"rope_theta": 500000.0, "rope_scaling": LLAMA3_SCALING})
    new = read(tmp_path, LLAMA | {"rope_parameters": LLAMA3_SCALING | {"rope_theta": 500000.0}})
    assert old == new
    assert old.rope == RopeConfig(500000.0, 128, scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192))


def test_scaled_positions_reach_further(tmp_path: Path) -> None:
    linear = read(tmp_path, LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}})
    assert (linear.rope.scaling, linear.max_position_embeddings) == (LinearScaling(4.0), 16384)
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = read(tmp_path, QWEN2 | {"max_position_embeddings": 32768, "rope_scaling": yarn})
    assert isinstance(config.rope.scaling, YarnScaling)
    assert config.max_position_embeddings == 131072


def test_gptj(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        {
            "architectures": ["GPTJForCausalLM"],
            "n_embd": 4096,
            "n_head": 16,
            "n_inner": None,
            "n_layer": 28,
            "n_positions": 2048,
            "rotary_dim": 64,
            "vocab_size": 50400,
            "activation_function": "gelu_new",
            "eos_token_id": 50256,
        },
    )
    assert (config.head_dim, config.intermediate_size, config.mlp_bias) == (256, 16384, True)
    assert config.rope == RopeConfig(10000.0, 64, interleaved=True)


def test_qwen_biases_and_norms(tmp_path: Path) -> None:
    qwen2 = read(tmp_path, QWEN2)
    assert (qwen2.qkv_bias, qwen2.output_bias, qwen2.qk_norm, qwen2.head_dim) == (True, False, False, 128)
    qwen3 = read(tmp_path, QWEN2 | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 64})
    assert (qwen3.qkv_bias, qwen3.output_bias, qwen3.qk_norm, qwen3.head_dim) == (False, False, True, 64)


def test_experts(tmp_path: Path) -> None:
    qwen = read(tmp_path, QWEN3_MOE)
    assert (qwen.intermediate_size, qwen.num_experts, qwen.num_experts_per_token) == (768, 128, 8)
    assert qwen.norm_topk_prob and qwen.qk_norm and not qwen.qkv_bias
    renamed = {name: value for name, value in QWEN3_MOE.items() if name != "num_experts"} | {"num_local_experts": 128}
    assert read(tmp_path, renamed) == qwen
    assert not read(tmp_path, QWEN3_MOE | {"norm_topk_prob": False}).norm_topk_prob
    mixtral = read(tmp_path, MIXTRAL)
    assert (mixtral.intermediate_size, mixtral.num_experts, mixtral.num_experts_per_token) == (11008, 8, 2)
    assert mixtral.norm_topk_prob and not mixtral.qk_norm
    assert read(tmp_path, LLAMA).num_experts == 0


def test_model_type_stands_in_for_absent_architectures(tmp_path: Path) -> None:
    assert read(tmp_path, LLAMA | {"architectures": None}).architecture == "LlamaForCausalLM"


def test_generation_config_knows_more_ends(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [128001, 128008, 128009]}')
    assert read(tmp_path, LLAMA).eos_token_ids == (128001, 128008, 128009)


@pytest.mark.parametrize(
    ("values", "windows"),
    [
        (MISTRAL | {"sliding_window": 4096}, [4096] * 32),
        (MISTRAL | {"sliding_window": None}, []),
        (MISTRAL | {"sliding_window": 65536}, []),  # no context is longer
        (MISTRAL, [4096] * 32),  # absent: transformers takes 4096
        (LLAMA | {"sliding_window": 64}, []),  # Llama has none
        (MIXTRAL | {"sliding_window": 64}, [64] * 32),
        (MIXTRAL | {"sliding_window": None}, []),
        (MIXTRAL, []),  # absent: none
        (QWEN3_MOE | {"use_sliding_window": False, "sliding_window": 64}, []),
        (QWEN3_MOE | {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 32}, [64] * 32),
        (QWEN2 | {"use_sliding_window": False, "sliding_window": 64}, []),
        (QWEN2 | WINDOW | {"max_window_layers": 32}, []),
        (QWEN2 | WINDOW | {"max_window_layers": 28}, [None] * 28 + [64] * 4),
        (QWEN2 | WINDOW | {"layer_types": ["full_attention"] * 32}, []),
        (QWEN2 | WINDOW | {"layer_types": ["full_attention", "sliding_attention"] * 16}, [None, 64] * 16),
        (GEMMA2, [4096, None] * 13),
        (GEMMA2 | {"sliding_window": 64, "num_hidden_layers": 3}, [64, None, 64]),
        (GEMMA3 | {"num_hidden_layers": 8}, [512] * 5 + [None] + [512] * 2),
        (GEMMA3 | {"num_hidden_layers": 4, "sliding_window_pattern": 2}, [512, None] * 2),
        (GEMMA3 | {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]}, [None, 512]),
    ],
)
def test_sliding_windows(tmp_path: Path, values: dict[str, Any], windows: list[int | None]) -> None:
    config = read(tmp_path, values)
    assert list(config.windows) == windows
    assert config.max_position_embeddings == values.get("max_position_embeddings", config.max_position_embeddings)


def test_gemma_2_as_published(tmp_path: Path) -> None:
    config = read(tmp_path, GEMMA2)
    assert (config.num_layers, config.head_dim, config.vocab_size, config.max_position_embeddings) == (
        *(26, 256, 256000),
        8192,
    )
    assert (config.attention_soft_cap, config.logits_soft_cap, config.attention_scale) == (50.0, 30.0, 1 / 16)
    assert config.ropes == (RopeConfig(1e4, 256),) and not config.qk_norm and config.tie_word_embeddings
    uncapped = read(tmp_path, GEMMA2 | {"attn_logit_softcapping": None, "final_logit_softcapping": 5})
    assert (uncapped.attention_soft_cap, uncapped.logits_soft_cap) == (None, 5.0)


def test_gemma_3_reads_alike_from_old_and_new_fields(tmp_path: Path) -> None:
    old = read(tmp_path, GEMMA3 | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}})
    each = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert read(tmp_path, GEMMA3 | {"rope_parameters": each}) == old
    assert old.ropes == (RopeConfig(1e6, 256, scaling=LinearScaling(8.0)), RopeConfig(1e4, 256))
    assert (old.attention_soft_cap, old.logits_soft_cap, old.qk_norm) == (None, None, True)
    assert old.max_position_embeddings == 131072


def test_gemma_3_that_sees_has_its_text_part_below(tmp_path: Path) -> None:
    """As published: what transformers takes for granted is left out."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    top = {"architectures": ["Gemma3ForConditionalGeneration"], "eos_token_id": [1, 106], "text_config": text}
    config = read(tmp_path, top | {"vision_config": {"hidden_size": 1152}})
    assert (config.num_heads, config.num_kv_heads, config.vocab_size, config.eos_token_ids) == (8, 4, 262208, (1, 106))
    assert config.windows[:6] == (1024,) * 5 + (None,) and config.embedding_scale == 2560**0.5
    with pytest.raises(CheckpointError, match="text_config is missing"):
        read(tmp_path, {"architectures": ["Gemma3ForConditionalGeneration"]})


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (LLAMA | {"architectures": ["FalconForCausalLM"]}, "FalconForCausalLM is not supported.*Qwen3ForCausalLM"),
        ({"model_type": "t5"}, "t5 is not supported"),
        ({}, "none named is not supported"),
        (LLAMA | {"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported is 'silu'"),
        (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not supported.*llama3"),
        (LLAMA | {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "differ by layer"),
        (LLAMA | {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (LLAMA | {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        (LLAMA | {"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor 0.5: expected 1 or more"),
        (LLAMA | {"rope_scaling": "linear"}, "rope_scaling is 'linear', expected an object"),
        (LLAMA | {"quantization_config": {"bits": 4}}, "quantized checkpoints are not supported"),
        (QWEN3_MOE | {"decoder_sparse_step": 2}, "decoder_sparse_step: layers without experts are not supported"),
        (QWEN3_MOE | {"mlp_only_layers": [0, 3]}, "mlp_only_layers: layers without experts are not supported"),
        (QWEN3_MOE | {"num_experts_per_tok": 129}, "num_experts_per_token=129: expected 1 to num_experts=128"),
        (MIXTRAL | {"num_experts_per_tok": 0}, "num_experts_per_token=0: expected 1 to num_experts=8"),
        (LLAMA | {"hidden_size": None}, "hidden_size is missing"),
        (LLAMA | {"hidden_size": "4096"}, "hidden_size is '4096', expected an integer"),
        (LLAMA | {"hidden_size": 4097}, "4097 is not a multiple of its 32 attention heads"),
        (LLAMA | {"num_key_value_heads": 5}, "num_heads=32: expected a multiple of num_kv_heads=5"),
        (LLAMA | {"num_hidden_layers": True}, "num_hidden_layers is True, expected an integer"),
        (LLAMA | {"vocab_size": -1}, "vocab_size=-1: expected 1 or more"),
        (LLAMA | {"rms_norm_eps": "tiny"}, "rms_norm_eps is 'tiny', expected a finite number"),
        (LLAMA | {"tie_word_embeddings": 1}, "tie_word_embeddings is 1, expected true or false"),
        (LLAMA | {"eos_token_id": [2.5]}, "eos_token_id"),
        (QWEN2 | WINDOW | {"layer_types": ["sliding_attention"] * 31}, "31 layers have a type: expected 32"),
        (QWEN2 | WINDOW | {"layer_types": ["linear_attention"] * 32}, "layer_types names linear_attention"),
        (GEMMA2 | {"hidden_activation": "relu"}, "supported is 'gelu_pytorch_tanh'"),
        (GEMMA2 | {"sliding_window": None}, "sliding_window is missing, and layers have one"),
        (GEMMA2 | {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0.0, expected more than 0"),
        (GEMMA2 | {"final_logit_softcapping": -1}, "final_logit_softcapping is -1.0, expected more than 0"),
        (GEMMA3 | {"use_bidirectional_attention": True}, "use_bidirectional_attention is not supported"),
        (GEMMA3 | {"sliding_window_pattern": 0}, "sliding_window_pattern is 0, expected 1 or more"),
        ({"architectures": ["GPTJForCausalLM"], "rotary_dim": None}, "rotary_dim is null"),
        ({"architectures": ["GPTJForCausalLM"], "rotary_dim": 512}, "rotary_dim=512: expected at most head_dim=256"),
        ({"architectures": ["GPTJForCausalLM"], "activation_function": "relu"}, "supported is 'gelu_new'"),
        ("[]", "holds a JSON list, expected an object"),
        ("{", "not readable as JSON"),
        ("[" * 100000, "not readable as JSON"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(tmp_path: Path, values: dict[str, Any] | str, says: str) -> None:
    with pytest.raises(CheckpointError, match=says) as error:
        read(tmp_path, values)
    assert str(tmp_path / "config.json") in str(error.value)


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file; expected a folder in the Hugging Face layout"):
        read_config(tmp_path / "absent")
