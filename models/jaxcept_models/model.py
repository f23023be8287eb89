"""A loaded model: pure functions over a flat tuple of arrays, for the runner to compile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxcept_kernels.attention import Implementation
from jaxcept_kernels.layout import AttentionMetadata, KVLayout, KVPool
from jaxcept_kernels.linear import pack_weight
from jaxcept_models.config import ModelConfig, read_config
from jaxcept_models.gptj import GPTJ, gptj_weights
from jaxcept_models.layers import Bias, Matrix, Scale, TiedTable
from jaxcept_models.llama import Llama, llama_weights
from jaxcept_models.loading import Draw, Leaf, Progress, load_safetensors, random_arrays
from jaxcept_models.weight_map import WeightMap

DType = Literal["auto", "float32", "bfloat16", "float16"]
LoadFormat = Literal["auto", "dummy"]
Touch = Literal["none", "transpose", "pack"]


class Architecture(NamedTuple):
    """A module, and where its arrays come from."""

    module: Callable[[ModelConfig, jnp.dtype, Implementation], nnx.Module]
    weights: Callable[[ModelConfig], WeightMap]


_LLAMA = Architecture(Llama, llama_weights)
ARCHITECTURES = {
    "GPTJForCausalLM": Architecture(GPTJ, gptj_weights),
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _LLAMA,
}


@dataclass(frozen=True, eq=False)
class Model:
    """What the runner needs of a model. `forward` and `logits` are pure: jit them over `weights`."""

    config: ModelConfig
    weights: tuple[jax.Array, ...]
    dtype: jnp.dtype
    implementation: Implementation
    graph: nnx.GraphDef[Any]
    tree: jax.tree_util.PyTreeDef

    def kv_layout(self, num_blocks: int, block_size: int) -> KVLayout:
        """The pool of this model with so many blocks in each layer."""
        config = self.config
        return KVLayout(
            config.num_layers, num_blocks, block_size, config.num_kv_heads, config.head_dim, jnp.dtype(self.dtype)
        )

    def forward(
        self,
        weights: tuple[jax.Array, ...],
        token_ids: jax.Array,  # [tokens] int32
        meta: AttentionMetadata,
        pool: KVPool,
        layout: KVLayout,
    ) -> tuple[jax.Array, KVPool]:
        """[tokens, hidden] after the final norm, and the pool with the batch's keys and values written."""
        hidden, pool = self._module(weights)(token_ids, meta, pool, layout)
        return hidden, pool

    def logits(
        self,
        weights: tuple[jax.Array, ...],
        hidden: jax.Array,  # [rows, hidden]
    ) -> jax.Array:
        """[rows, vocab] float32"""
        logits: jax.Array = self._module(weights).logits(hidden)
        return logits.astype(jnp.float32)

    def _module(self, weights: tuple[jax.Array, ...]) -> Any:
        return nnx.merge(self.graph, jax.tree.unflatten(self.tree, weights))


def load_model(
    folder: str | Path,
    *,
    dtype: DType = "auto",
    load_format: LoadFormat = "auto",
    implementation: Implementation = Implementation.XLA,
    seed: int = 0,
    progress: Progress | None = None,
) -> Model:
    """The model of a Hugging Face folder (config.json, safetensors in one file or several), on the default device.

    `dtype` "auto" is float32 on the CPU, where narrower types are slower, and bfloat16 elsewhere. `load_format`
    "dummy" draws the weights from `seed` and needs config.json alone. `progress(bytes done, bytes in all)`.
    Raises CheckpointError for whatever is wrong with the folder, ValueError for an unknown dtype or load format.
    """
    if load_format not in ("auto", "dummy"):
        raise ValueError(f"load_format={load_format!r}: expected 'auto' or 'dummy'")
    chosen = _dtype(dtype)
    config = read_config(folder)
    architecture = ARCHITECTURES[config.architecture]
    graph, state = nnx.split(nnx.eval_shape(lambda: architecture.module(config, chosen, implementation)))
    paths, _ = jax.tree.flatten_with_path(state, is_leaf=_is_variable)
    variables = [variable for _, variable in paths]
    sources = architecture.weights(config)
    names = [".".join(str(key.key) for key in path) for path, _ in paths]
    leaves = [_leaf(n, v, sources, chosen, implementation) for n, v in zip(names, variables, strict=True)]
    if load_format == "dummy":
        draws = [_draw(variable, config) for variable in variables]
        arrays = random_arrays(leaves, draws, seed, progress)
    else:
        arrays = load_safetensors(folder, leaves, progress)
    return Model(config, arrays, chosen, implementation, graph, jax.tree.structure(state))


def _dtype(name: str) -> jnp.dtype:
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={name!r}: expected 'auto', 'float32', 'bfloat16' or 'float16'")
    chosen: jnp.dtype = jnp.dtype(name)
    return chosen


def _is_variable(node: object) -> bool:
    return isinstance(node, nnx.Variable)


def _leaf(
    path: str,
    variable: nnx.Variable[Any],
    sources: WeightMap,
    dtype: jnp.dtype,
    implementation: Implementation,
) -> Leaf:
    shape = tuple(variable.get_value().shape)
    stored = shape[::-1] if isinstance(variable, Matrix) else shape
    # The native product computes in float32 alone.
    packed = implementation is Implementation.NATIVE and dtype == jnp.float32
    touch: Touch = "none"
    if isinstance(variable, Matrix):
        touch = "pack" if packed else "transpose"
    elif isinstance(variable, TiedTable) and packed:
        touch = "pack"
    return Leaf(path, stored, sources[path], partial(_finish, touch=touch, dtype=dtype))


@partial(jax.jit, static_argnames=("touch", "dtype"))
def _finish(rows: jax.Array, *, touch: Touch, dtype: jnp.dtype) -> jax.Array:
    match touch:
        case "none":
            return rows.astype(dtype)
        case "transpose":
            return rows.T.astype(dtype)
        case "pack":
            return pack_weight(rows.T.astype(dtype))


def _draw(variable: nnx.Variable[Any], config: ModelConfig) -> Draw:
    if isinstance(variable, Scale):
        return Draw(1.0, 0.0)
    return Draw(0.0, 0.0 if isinstance(variable, Bias) else config.initializer_range)
