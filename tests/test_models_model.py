"""What the compiled step looks like: one trace for all layers, the pool in place, logits in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxcept_kernels.attention import Implementation
from jaxcept_kernels.layout import AttentionMetadata, KVLayout, KVPool
from jaxcept_models.gptj import GPTJLayer
from jaxcept_models.llama import LlamaLayer
from jaxcept_models.model import Model, load_model

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
GPTJ = {
    "architectures": ["GPTJForCausalLM"],
    "n_embd": 32,
    "n_head": 4,
    "n_layer": 6,
    "rotary_dim": 4,
    "vocab_size": 128,
}
CASES = [(LLAMA, LlamaLayer), (GPTJ, GPTJLayer)]


def dummy(folder: Path, config: dict[str, Any], **options: Any) -> Model:
    (folder / "config.json").write_text(json.dumps(config))
    return load_model(folder, load_format="dummy", **options)


def specs(model: Model, layout: KVLayout, tokens: int = 8, entries: int = 4) -> tuple[Any, ...]:
    """Arguments of `forward` without their contents."""

    def int32(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    weights = tuple(jax.ShapeDtypeStruct(weight.shape, weight.dtype) for weight in model.weights)
    meta = AttentionMetadata(int32(tokens), int32(tokens), int32(entries + 1), int32(entries), int32(entries, 16))
    pool = KVPool(*(jax.ShapeDtypeStruct(layout.shape, layout.dtype) for _ in range(2)))
    return weights, int32(tokens), meta, pool


@pytest.mark.parametrize(("config", "layer"), CASES, ids=["llama", "gptj"])
def test_layers_share_one_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], layer: type
) -> None:
    traced = []
    original = layer.__call__
    monkeypatch.setattr(layer, "__call__", lambda self, *args: traced.append(self) or original(self, *args))
    model = dummy(tmp_path, config)
    layout = model.kv_layout(num_blocks=64, block_size=16)
    jax.jit(model.forward, static_argnames="layout").trace(*specs(model, layout), layout=layout)
    assert len(traced) == 1


@pytest.mark.parametrize("implementation", list(Implementation))
def test_the_pool_is_updated_in_place(tmp_path: Path, implementation: Implementation) -> None:
    model = dummy(tmp_path, LLAMA, implementation=implementation)
    layout = model.kv_layout(num_blocks=4096, block_size=16)
    step = jax.jit(model.forward, static_argnames="layout", donate_argnames="pool")
    memory = step.lower(*specs(model, layout), layout=layout).compile().memory_analysis()
    pool_bytes = layout.num_blocks * layout.block_bytes
    assert memory.alias_size_in_bytes == pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes / layout.num_layers / 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hidden_keeps_the_dtype_and_logits_are_float32(tmp_path: Path, dtype: str) -> None:
    model = dummy(tmp_path, LLAMA, dtype=dtype)
    layout = model.kv_layout(num_blocks=4, block_size=16)
    assert layout.dtype == dtype
    hidden, pool = jax.eval_shape(lambda *args: model.forward(*args, layout), *specs(model, layout))
    assert (hidden.shape, hidden.dtype, pool.k.shape) == ((8, 32), dtype, layout.shape)
    logits = jax.eval_shape(model.logits, model.weights, hidden)
    assert (logits.shape, logits.dtype) == ((8, 128), jnp.float32)
