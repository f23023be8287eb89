"""What an architecture needs to know of a model, read from a Hugging Face config.json of any vintage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from jaxcept_kernels.scoring import Scoring
from jaxcept_models.errors import CheckpointError
from jaxcept_models.fields import Fields, read_json
from jaxcept_models.rope import RopeConfig
from jaxcept_models.rope_fields import read_rope, read_scaled_rope

SUPPORTED = (
    *("GPTJForCausalLM", "LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM"),
    *("Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
    *("Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
)
_BY_MODEL_TYPE = {
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForConditionalGeneration",
    "gemma3_text": "Gemma3ForCausalLM",
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
    activation: Literal["silu", "gelu_tanh"] = "silu"  # of a gate
    norms_above_one: bool = False  # norms scale by 1 + their weight
    embedding_scale: float = 1.0
    attention_scale: float | None = None  # of the products of queries and keys; None is head_dim**-0.5
    attention_soft_cap: float | None = None
    logits_soft_cap: float | None = None
    windows: tuple[int | None, ...] = ()  # by layer, keys that a token sees at most; None is all, as is no entry
    local_rope: RopeConfig | None = None  # of layers with a window, where it is another
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
        if self.windows and len(self.windows) < self.num_layers:
            raise ValueError(f"{len(self.windows)} layers have a type: expected {self.num_layers}")
        if self.rope.rotary_dim > self.head_dim:
            raise ValueError(f"rotary_dim={self.rope.rotary_dim}: expected at most head_dim={self.head_dim}")
        if self.num_experts and not 1 <= self.num_experts_per_token <= self.num_experts:
            raise ValueError(
                f"num_experts_per_token={self.num_experts_per_token}: expected 1 to num_experts={self.num_experts}"
            )

    def scoring(self, layer: int) -> Scoring:
        """How a layer's attention weighs keys."""
        scale = self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale
        return Scoring(scale, self.windows[layer] if self.windows else None, self.attention_soft_cap)

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """The rotations of its layers: that of all, or of those without a window and of those with one."""
        return (self.rope,) if self.local_rope is None else (self.rope, self.local_rope)


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
        return _READERS.get(architecture, _llama)(fields, architecture)
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


def _gptj(fields: Fields, architecture: str) -> ModelConfig:
    _expect_activation(fields, "activation_function", "gelu_new")
    hidden, heads = fields.integer("n_embd", 4096), fields.integer("n_head", 16)
    if fields.null("rotary_dim"):
        raise CheckpointError(f"{fields.path}: rotary_dim is null; expected the number of rotated entries per head")
    return ModelConfig(
        architecture=architecture,
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
    rope, max_positions = read_rope(fields, head_dim, max_positions)
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
        max_position_embeddings=max_positions,
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
        windows=_windows(fields, architecture, max_positions),
        initializer_range=fields.number("initializer_range", 0.02),
        bos_token_id=_bos(fields),
        eos_token_ids=_eos(fields),
    )


def _gemma(top: Fields, architecture: str) -> ModelConfig:
    """Gemma 2 (arXiv:2408.00118) and Gemma 3 (arXiv:2503.19786); of a model that sees, the part that reads and writes.

    Published configs leave out what transformers takes for granted.
    """
    is_second = architecture == "Gemma2ForCausalLM"
    fields = top.section("text_config") if architecture == "Gemma3ForConditionalGeneration" else top
    if fields is None:
        raise CheckpointError(f"{top.path}: text_config is missing")
    _expect_activation(fields, "hidden_activation", "gelu_pytorch_tanh")
    if fields.flag("use_bidirectional_attention", False):
        raise CheckpointError(f"{fields.path}: use_bidirectional_attention is not supported")
    layers, hidden = fields.integer("num_hidden_layers", 26), fields.integer("hidden_size", 2304)
    head_dim = fields.integer("head_dim", 256)
    scalar = fields.number("query_pre_attn_scalar", 256)
    if scalar <= 0:
        raise CheckpointError(f"{fields.path}: query_pre_attn_scalar is {scalar}, expected more than 0")
    bias = fields.flag("attention_bias", False)
    rope, local_rope = _gemma_ropes(fields, head_dim, is_second)
    return ModelConfig(
        architecture=architecture,
        num_layers=layers,
        hidden_size=hidden,
        num_heads=fields.integer("num_attention_heads", 8),
        num_kv_heads=fields.integer("num_key_value_heads", 4),
        head_dim=head_dim,
        intermediate_size=fields.integer("intermediate_size", 9216),
        vocab_size=fields.integer("vocab_size", 256000 if is_second else 262208),
        max_position_embeddings=fields.integer("max_position_embeddings", 8192 if is_second else 131072),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=rope,
        tie_word_embeddings=top.flag("tie_word_embeddings", True),
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=not is_second,
        activation="gelu_tanh",
        norms_above_one=True,
        embedding_scale=hidden**0.5,
        attention_scale=scalar**-0.5,
        attention_soft_cap=_soft_cap(fields, "attn_logit_softcapping", 50.0 if is_second else None),
        logits_soft_cap=_soft_cap(fields, "final_logit_softcapping", 30.0 if is_second else None),
        windows=_gemma_windows(fields, layers, 2 if is_second else fields.integer("sliding_window_pattern", 6)),
        local_rope=local_rope,
        initializer_range=fields.number("initializer_range", 0.02),
        bos_token_id=_bos(top) or _bos(fields),
        eos_token_ids=_eos(top) or _eos(fields),
    )


_READERS = {
    "GPTJForCausalLM": _gptj,
    "Gemma2ForCausalLM": _gemma,
    "Gemma3ForCausalLM": _gemma,
    "Gemma3ForConditionalGeneration": _gemma,
}


def _soft_cap(fields: Fields, name: str, default: float | None) -> float | None:
    """A cap of scores or logits. Null is none, absent is the architecture's own."""
    if fields.null(name) or (default is None and not fields.present(name)):
        return None
    cap = fields.number(name, default)
    if cap <= 0:
        raise CheckpointError(f"{fields.path}: {name} is {cap}, expected more than 0")
    return cap


def _gemma_windows(fields: Fields, layers: int, pattern: int) -> tuple[int | None, ...]:
    """All layers have a window but the last of each `pattern`, unless the config says which."""
    if pattern < 1:
        raise CheckpointError(f"{fields.path}: sliding_window_pattern is {pattern}, expected 1 or more")
    every = ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(layers)]
    window = None if fields.null("sliding_window") else fields.integer("sliding_window", 4096)
    return _typed_windows(fields, fields.texts("layer_types") or tuple(every), window)


def _gemma_ropes(fields: Fields, head_dim: int, is_second: bool) -> tuple[RopeConfig, RopeConfig | None]:
    """The rotation, and that of layers with a window; max_position_embeddings counts what scaling adds."""
    if is_second:
        return read_rope(fields, head_dim, 1)[0], None
    each = fields.section("rope_parameters")
    full = fields.section("rope_scaling") if each is None else each.section("full_attention")
    local = None if each is None else each.section("sliding_attention")
    thetas = fields.number("rope_theta", 1e6), fields.number("rope_local_base_freq", 1e4)
    return read_scaled_rope(full, thetas[0], head_dim, 1)[0], read_scaled_rope(local, thetas[1], head_dim, 1)[0]


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


def _windows(fields: Fields, architecture: str, max_positions: int) -> tuple[int | None, ...]:
    """The window of each layer; nothing where none is narrower than the longest context."""
    window, layers = _sliding_window(fields, architecture), fields.integer("num_hidden_layers")
    if window is None or window >= max_positions:
        return ()
    if architecture in ("Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        first = fields.integer("max_window_layers", 28)
        after = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
        return _typed_windows(fields, fields.texts("layer_types") or tuple(after), window)
    return (window,) * layers


def _sliding_window(fields: Fields, architecture: str) -> int | None:
    """The window of the layers that have one."""
    if architecture == "MistralForCausalLM":
        return None if fields.null("sliding_window") else fields.integer("sliding_window", 4096)
    if architecture == "MixtralForCausalLM":
        return fields.integer("sliding_window") if fields.present("sliding_window") else None
    if architecture == "LlamaForCausalLM" or not fields.flag("use_sliding_window", False):
        return None
    return None if fields.null("sliding_window") else fields.integer("sliding_window", 4096)


def _typed_windows(fields: Fields, types: tuple[str, ...], window: int | None) -> tuple[int | None, ...]:
    """The window of each layer by its type."""
    unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
    if unknown:
        raise CheckpointError(f"{fields.path}: layer_types names {', '.join(unknown)}, which is not supported")
    if window is None and "sliding_attention" in types:
        raise CheckpointError(f"{fields.path}: sliding_window is missing, and layers have one")
    windows = tuple(window if each == "sliding_attention" else None for each in types)
    return windows if any(windows) else ()


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
