"""What an architecture needs to know of a model, read from a Hugging Face config.json of any vintage."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from jaxcept_models.errors import CheckpointError
from jaxcept_models.fields import Fields, read_json
from jaxcept_models.rope import LinearScaling, Llama3Scaling, RopeConfig, Scaling, YarnScaling, yarn_attention_factor

logger = logging.getLogger(__name__)

SUPPORTED = (
    *("GPTJForCausalLM", "LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM"),
    *("Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
)
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_BY_MODEL_TYPE = {
    "gptj": "GPTJForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a model and the ids that begin and end a text."""

    architecture: str  # one of SUPPORTED
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int  # of the MLP; of each expert where there are several
    vocab_size: int
    max_position_embeddings: int  # the longest context that the model computes as it was trained
    norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    num_experts: int = 0  # MLPs in each layer, of which a token takes some; 0 for a layer that has one
    num_experts_per_token: int = 0
    norm_topk_prob: bool = False  # a token's shares of its experts sum to one
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()  # any of them ends a text

    def __post_init__(self) -> None:
        sizes = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size")
        for name in (*sizes, "vocab_size", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected 1 or more")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads}: expected a multiple of num_kv_heads={self.num_kv_heads}")
        if self.rope.rotary_dim > self.head_dim:
            raise ValueError(f"rotary_dim={self.rope.rotary_dim}: expected at most head_dim={self.head_dim}")
        if self.num_experts and not 1 <= self.num_experts_per_token <= self.num_experts:
            raise ValueError(
                f"num_experts_per_token={self.num_experts_per_token}: expected 1 to num_experts={self.num_experts}"
            )


def read_config(folder: str | Path) -> ModelConfig:
    """The config of a model folder.

    Raises CheckpointError for a folder without config.json, for a field that is absent or of the wrong type (by name),
    and for what this package does not compute: another architecture, activation, rope type, a quantized checkpoint.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected a folder in the Hugging Face layout, with config.json")
    fields = Fields(path, read_json(path))
    if fields.present("quantization_config"):
        raise CheckpointError(f"{path}: quantization_config is set; quantized checkpoints are not supported")
    architecture = _architecture(fields)
    try:
        return _gptj(fields) if architecture == "GPTJForCausalLM" else _llama(fields, architecture)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _architecture(fields: Fields) -> str:
    named = fields.texts("architectures")
    known = [name for name in named if name in SUPPORTED]
    model_type = fields.text("model_type", "")
    if known:
        return known[0]
    if not named and model_type in _BY_MODEL_TYPE:
        return _BY_MODEL_TYPE[model_type]
    what = ", ".join(named) or model_type or "none named"
    raise CheckpointError(f"{fields.path}: architecture {what} is not supported; supported are {', '.join(SUPPORTED)}")


def _gptj(fields: Fields) -> ModelConfig:
    _expect_activation(fields, "activation_function", "gelu_new")
    hidden, heads = fields.integer("n_embd", 4096), fields.integer("n_head", 16)
    if fields.null("rotary_dim"):
        raise CheckpointError(f"{fields.path}: rotary_dim is null; expected the number of rotated entries per head")
    return ModelConfig(
        architecture="GPTJForCausalLM",
        num_layers=fields.integer("n_layer", 28),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=_exact_head_dim(fields, hidden, heads),
        intermediate_size=fields.integer("n_inner", 4 * hidden),
        vocab_size=fields.integer("vocab_size", 50400),
        max_position_embeddings=fields.integer("n_positions", 2048),
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        rope=RopeConfig(theta=10000.0, rotary_dim=fields.integer("rotary_dim", 64), interleaved=True),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        mlp_bias=True,
        initializer_range=fields.number("initializer_range", 0.02),
        bos_token_id=_bos(fields),
        eos_token_ids=_eos(fields),
    )


def _llama(fields: Fields, architecture: str) -> ModelConfig:
    _expect_activation(fields, "hidden_act", "silu")
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if fields.present("head_dim") or architecture == "Qwen3ForCausalLM":
        head_dim = fields.integer("head_dim", 128)
    else:
        head_dim = _exact_head_dim(fields, hidden, heads)
    max_positions = fields.integer("max_position_embeddings", 2048)
    rope, max_positions = _rope(fields, head_dim, max_positions)
    # Qwen2 has its biases by definition; the others follow the config.
    can_have_bias = architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
    bias = can_have_bias and fields.flag("attention_bias", False)
    experts = _experts(fields, architecture)
    return ModelConfig(
        architecture=architecture,
        num_layers=fields.integer("num_hidden_layers"),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        intermediate_size=experts.size,
        vocab_size=fields.integer("vocab_size"),
        max_position_embeddings=_within_window(fields, architecture, max_positions),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=rope,
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        qkv_bias=bias or architecture == "Qwen2ForCausalLM",
        output_bias=bias,
        mlp_bias=architecture == "LlamaForCausalLM" and fields.flag("mlp_bias", False),
        qk_norm=architecture in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
        num_experts=experts.num_experts,
        num_experts_per_token=experts.num_per_token,
        norm_topk_prob=experts.norm_topk_prob,
        initializer_range=fields.number("initializer_range", 0.02),
        bos_token_id=_bos(fields),
        eos_token_ids=_eos(fields),
    )


class _Experts(NamedTuple):
    """What the fields say of the MLPs of a layer."""

    size: int  # of each MLP
    num_experts: int = 0
    num_per_token: int = 0
    norm_topk_prob: bool = False


def _experts(fields: Fields, architecture: str) -> _Experts:
    if architecture == "MixtralForCausalLM":
        count, per_token = fields.integer("num_local_experts", 8), fields.integer("num_experts_per_tok", 2)
        return _Experts(fields.integer("intermediate_size"), count, per_token, norm_topk_prob=True)
    if architecture != "Qwen3MoeForCausalLM":
        return _Experts(fields.integer("intermediate_size"))
    if fields.integer("decoder_sparse_step", 1) != 1:
        raise CheckpointError(f"{fields.path}: decoder_sparse_step: layers without experts are not supported")
    if fields.integers("mlp_only_layers"):
        raise CheckpointError(f"{fields.path}: mlp_only_layers: layers without experts are not supported")
    return _Experts(
        fields.integer("moe_intermediate_size", 768),
        fields.integer("num_experts", fields.integer("num_local_experts", 128)),  # as published; as transformers 5 says
        fields.integer("num_experts_per_tok", 8),
        fields.flag("norm_topk_prob", False),
    )


def _expect_activation(fields: Fields, name: str, supported: str) -> None:
    given = fields.text(name, supported)
    if given != supported:
        raise CheckpointError(f"{fields.path}: {name} is {given!r}; supported is {supported!r}")


def _exact_head_dim(fields: Fields, hidden: int, heads: int) -> int:
    if heads < 1 or hidden % heads:
        raise CheckpointError(f"{fields.path}: hidden size {hidden} is not a multiple of its {heads} attention heads")
    return hidden // heads


def _rope(fields: Fields, head_dim: int, max_positions: int) -> tuple[RopeConfig, int]:
    """The rotation, and how many positions it reaches. transformers 5 writes rope_parameters, older ones two fields."""
    theta = fields.number("rope_theta", 10000.0)
    scaling = fields.section("rope_parameters") or fields.section("rope_scaling")
    if scaling is None:
        return RopeConfig(theta, head_dim), max_positions
    if scaling.is_nested:
        raise CheckpointError(f"{fields.path}: rope parameters that differ by layer are not supported")
    theta = scaling.number("rope_theta", theta)
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    if kind not in ROPE_TYPES:
        raise CheckpointError(f"{fields.path}: rope type {kind!r} is not supported; supported are {ROPE_TYPES}")
    if scaling.number("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(f"{fields.path}: partial_rotary_factor is not supported for this architecture")
    if kind == "default":
        return RopeConfig(theta, head_dim), max_positions
    factor = scaling.number("factor")
    if factor < 1:
        raise CheckpointError(f"{fields.path}: rope factor {factor}: expected 1 or more")
    original = scaling.integer("original_max_position_embeddings", max_positions)
    spec: Scaling
    if kind == "linear":
        spec, reach = LinearScaling(factor), int(max_positions * factor)
    elif kind == "llama3":
        low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
        spec, reach = Llama3Scaling(factor, low, high, original), max_positions
    else:
        spec, reach = _yarn(scaling, factor, original), max(max_positions, int(original * factor))
    return RopeConfig(theta, head_dim, scaling=spec), reach


def _yarn(scaling: Fields, factor: float, original: int) -> YarnScaling:
    mscale, mscale_all_dim = scaling.number("mscale", 0.0), scaling.number("mscale_all_dim", 0.0)
    return YarnScaling(
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=scaling.number("attention_factor", yarn_attention_factor(factor, mscale, mscale_all_dim)),
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        truncate=scaling.flag("truncate", True),
    )


def _within_window(fields: Fields, architecture: str, max_positions: int) -> int:
    """Contexts no longer than a sliding window are computed alike with and without it; longer ones are not offered."""
    window = _sliding_window(fields, architecture)
    if window is None or window >= max_positions:
        return max_positions
    logger.warning(
        "%s: sliding_window is %d; contexts are limited to that, of %d positions", fields.path, window, max_positions
    )
    return window


def _sliding_window(fields: Fields, architecture: str) -> int | None:
    if architecture == "MistralForCausalLM":
        return None if fields.null("sliding_window") else fields.integer("sliding_window", 4096)
    if architecture == "MixtralForCausalLM":
        return fields.integer("sliding_window") if fields.present("sliding_window") else None
    if architecture == "LlamaForCausalLM" or not fields.flag("use_sliding_window", False):
        return None
    if architecture == "Qwen3MoeForCausalLM":  # all layers
        return None if fields.null("sliding_window") else fields.integer("sliding_window", 4096)
    layers = fields.integer("num_hidden_layers")
    full = fields.texts("layer_types").count("full_attention")
    if full == layers or (not full and fields.integer("max_window_layers", 28) >= layers):
        return None
    return None if fields.null("sliding_window") else fields.integer("sliding_window", 4096)


def _bos(fields: Fields) -> int | None:
    ids = fields.integers("bos_token_id")
    return ids[0] if ids else None


def _eos(fields: Fields) -> tuple[int, ...]:
    """generation_config.json knows more ends than config.json where a chat model has several."""
    path = fields.path.with_name("generation_config.json")
    if path.is_file():
        ids = Fields(path, read_json(path)).integers("eos_token_id")
        if ids:
            return ids
    return fields.integers("eos_token_id")
