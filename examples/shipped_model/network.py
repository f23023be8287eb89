"""The shipped model's forward pass as it is trained: a plain causal Llama on padded rows, in one page.

The engine has a paged forward pass of its own; this one shares nothing with it but the weights' names and layout,
those of Hugging Face's LlamaForCausalLM.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

Weights = dict[str, jax.Array]
# Sizes with which `lay_induction` starts: the embedding's constant direction, and the gains of the laid projections.
CONSTANT = 0.4
BACK_GAIN = 2.5
EMBEDDING = 0.1
INTO_RESIDUAL = 0.005
MATCH_GAIN = 3.0
BACK_WRITE_GAIN = 0.15
COPY_WRITE_GAIN = 1.0
# Pairs of a head's dimensions that turn too fast with distance to compare tokens hundreds of positions apart.
NUM_FAST = 12


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the model; the names are those of a Hugging Face config.json."""

    vocab_size: int = 768
    hidden_size: int = 256
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 2048
    rope_theta: float = 100000.0
    rms_norm_eps: float = 1e-5


def initial_weights(shape: Shape, seed: int) -> Weights:
    """Normal with deviation 0.02, as usual, and smaller by sqrt(2 layers) where a layer writes to the residual."""
    d, ff = shape.hidden_size, shape.intermediate_size
    q, kv = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    sizes = {
        "self_attn.q_proj": (q, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, q),
        "mlp.gate_proj": (ff, d),
        "mlp.up_proj": (ff, d),
        "mlp.down_proj": (d, ff),
    }
    rng = np.random.default_rng(seed)
    weights = {
        "model.embed_tokens.weight": rng.normal(0, EMBEDDING, (shape.vocab_size, d)),
        "model.norm.weight": np.ones(d),
    }
    for layer in range(shape.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}.{name}.weight"] = np.ones(d)
        for name, size in sizes.items():
            into_residual = name.endswith(("o_proj", "down_proj"))
            deviation = INTO_RESIDUAL if into_residual else d**-0.5 / 2
            weights[f"{prefix}.{name}.weight"] = rng.normal(0, deviation, size)
    return {name: jnp.asarray(weight, jnp.float32) for name, weight in weights.items()}


def lay_induction(weights: Weights, shape: Shape, seed: int) -> Weights:
    """The weights with an induction circuit (arXiv:2209.11895) laid in, for training to refine.

    Copying a number from the tool's answer takes two layers that work together: heads that look one and two tokens
    back, and a head in the next layer that looks for the place after an equal pair of tokens. Gradient descent finds
    them after many thousand steps; a run of an hour on a CPU has fewer. So the first two heads of each even layer start
    out looking back, and the first head of each odd layer starts out comparing what they brought along with its own.
    """
    d, head, half = shape.hidden_size, shape.head_dim, shape.head_dim // 2
    rng = np.random.default_rng(seed)
    laid = {name: np.array(weight) for name, weight in weights.items()}
    # One direction of the embedding is the same for all tokens: from it a head makes a query that depends on position.
    laid["model.embed_tokens.weight"][:, 0] = CONSTANT
    fast = np.arange(half // 2)
    frequencies = (shape.rope_theta ** -(np.arange(half) / half))[fast]
    slow = np.r_[NUM_FAST:half, half + NUM_FAST : head]
    first, second = slow[: 3 * len(slow) // 5], slow[3 * len(slow) // 5 :]
    for layer in range(0, shape.num_hidden_layers - 1, 2):
        back, match = (f"model.layers.{i}.self_attn" for i in (layer, layer + 1))
        basis = np.linalg.qr(rng.normal(size=(d - 1, d - 1)))[0]
        read, one_back, two_back = (np.pad(basis[i * head : (i + 1) * head], ((0, 0), (1, 0))) for i in range(3))
        q, k, v, o = (laid[f"{back}.{name}_proj.weight"] for name in "qkvo")
        q[: 2 * head], k[:head], v[:head] = 0, 0, read
        k[fast, 0] = BACK_GAIN
        for i, write in enumerate((one_back, two_back)):
            q[i * head + fast, 0] = BACK_GAIN * np.cos((i + 1) * frequencies)
            q[i * head + half + fast, 0] = -BACK_GAIN * np.sin((i + 1) * frequencies)
            o[:, i * head : (i + 1) * head] = BACK_WRITE_GAIN * write.T
        q, k, v, o = (laid[f"{match}.{name}_proj.weight"] for name in "qkvo")
        q[:head], k[:head] = 0, 0
        q[first], k[first] = MATCH_GAIN * read[: len(first)], MATCH_GAIN * one_back[: len(first)]
        q[second], k[second] = MATCH_GAIN * one_back[: len(second)], MATCH_GAIN * two_back[: len(second)]
        v[:head], o[:, :head] = read, COPY_WRITE_GAIN * read.T
    return {name: jnp.asarray(weight, jnp.float32) for name, weight in laid.items()}


def forward(
    weights: Weights,
    token_ids: jax.Array,  # [rows, length]
    shape: Shape,
) -> jax.Array:  # [rows, length, vocab_size]
    """Next-token logits of every position."""
    rotation = _rotation(token_ids.shape[1], shape)
    x = weights["model.embed_tokens.weight"][token_ids]
    for layer in range(shape.num_hidden_layers):
        part = {name.split(".", 3)[3]: w for name, w in weights.items() if name.startswith(f"model.layers.{layer}.")}
        x = x + _attend(part, _norm(x, part["input_layernorm.weight"], shape), rotation, shape)
        h = _norm(x, part["post_attention_layernorm.weight"], shape)
        gate = jax.nn.silu(h @ part["mlp.gate_proj.weight"].T)
        x = x + (gate * (h @ part["mlp.up_proj.weight"].T)) @ part["mlp.down_proj.weight"].T
    return _norm(x, weights["model.norm.weight"], shape) @ weights["model.embed_tokens.weight"].T


def save_model(weights: Weights, shape: Shape, eos_id: int, pad_id: int, folder: Path) -> None:
    """config.json, generation_config.json and model.safetensors, as transformers reads them."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(shape),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "torch_dtype": "float32",
    }
    generation = {"eos_token_id": eos_id, "pad_token_id": pad_id, "do_sample": False}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    arrays = {name: np.asarray(weight) for name, weight in weights.items()}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})


def _attend(part: Weights, h: jax.Array, rotation: tuple[jax.Array, jax.Array], shape: Shape) -> jax.Array:
    rows, length, _ = h.shape
    groups = shape.num_attention_heads // shape.num_key_value_heads
    q = (h @ part["self_attn.q_proj.weight"].T).reshape(rows, length, shape.num_key_value_heads, groups, shape.head_dim)
    k = (h @ part["self_attn.k_proj.weight"].T).reshape(rows, length, shape.num_key_value_heads, 1, shape.head_dim)
    v = (h @ part["self_attn.v_proj.weight"].T).reshape(rows, length, shape.num_key_value_heads, shape.head_dim)
    q, k = _rotate(q, rotation), _rotate(k, rotation)[:, :, :, 0]
    scores = jnp.einsum("bqhgd,bkhd->bhgqk", q, k) * shape.head_dim**-0.5
    causal = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(causal[None, None, None], scores, -1e9), axis=-1)
    mixed = jnp.einsum("bhgqk,bkhd->bqhgd", weights, v)
    return mixed.reshape(rows, length, -1) @ part["self_attn.o_proj.weight"].T


def _norm(x: jax.Array, weight: jax.Array, shape: Shape) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + shape.rms_norm_eps) * weight[None, None, :]


def _rotation(length: int, shape: Shape) -> tuple[jax.Array, jax.Array]:
    """cos and sin, each [1, length, 1, 1, head_dim / 2]; rotary embedding (arXiv:2104.09864), halves apart."""
    half = shape.head_dim // 2
    frequencies = shape.rope_theta ** -(np.arange(half) / half)
    angles = np.arange(length)[:, None] * frequencies
    return tuple(jnp.asarray(f(angles)[None, :, None, None, :], jnp.float32) for f in (np.cos, np.sin))  # type: ignore[return-value]


def _rotate(x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    cos, sin = rotation
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
