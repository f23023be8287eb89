"""A loaded model: pure functions over a flat tuple of arrays, for the runner to compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxcept_kernels.attention import Implementation
from jaxcept_kernels.layout import AttentionMetadata, KVLayout, KVPool
from jaxcept_kernels.linear import pack_weight, unpack_weight
from jaxcept_models.checkpoint import is_checkpoint, restore_arrays
from jaxcept_models.config import ModelConfig, read_config
from jaxcept_models.gemma import Gemma, gemma_weights
from jaxcept_models.gptj import GPTJ, gptj_weights
from jaxcept_models.layers import Bias, Matrix, Scale, ScaleAboveOne, TiedTable
from jaxcept_models.llama import Llama, llama_weights
from jaxcept_models.loading import Draw, Leaf, Progress, load_safetensors, random_arrays
from jaxcept_models.sharding import (
    ALONE,
    EXPERTS_RULES,
    GEMMA_RULES,
    GPTJ_RULES,
    LLAMA_RULES,
    Parallel,
    Placement,
    Rules,
    part_of,
    place,
    spread_kv_heads,
)
from jaxcept_models.weight_map import WeightMap

DType = Literal["auto", "float32", "bfloat16", "float16"]
KVDType = Literal["auto", "int8"]
LoadFormat = Literal["auto", "dummy"]
Touch = Literal["none", "transpose", "pack"]


class Architecture(NamedTuple):
    """A module, where its arrays come from, and where they lie."""

    module: Callable[[ModelConfig, jnp.dtype, Implementation, Parallel], nnx.Module]
    weights: Callable[[ModelConfig, int], WeightMap]
    rules: Rules


_LLAMA = Architecture(Llama, llama_weights, LLAMA_RULES)
_EXPERTS = Architecture(Llama, llama_weights, EXPERTS_RULES)
_GEMMA = Architecture(Gemma, gemma_weights, GEMMA_RULES)
ARCHITECTURES = {
    "Gemma2ForCausalLM": _GEMMA,
    "Gemma3ForCausalLM": _GEMMA,
    "Gemma3ForConditionalGeneration": _GEMMA,
    "GPTJForCausalLM": Architecture(GPTJ, gptj_weights, GPTJ_RULES),
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "MixtralForCausalLM": _EXPERTS,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _LLAMA,
    "Qwen3MoeForCausalLM": _EXPERTS,
}


@dataclass(frozen=True, eq=False)
class Model:
    """What the runner needs of a model. `forward` and `logits` are pure: jit them over `weights`.

    With a `placement` the weights lie on its mesh, each cut by its entry of `specs`; `graph` and `tree` are of the part
    that one device computes.
    """

    config: ModelConfig
    weights: tuple[jax.Array, ...]
    dtype: jnp.dtype
    implementation: Implementation
    graph: nnx.GraphDef[Any]
    tree: jax.tree_util.PyTreeDef
    placement: Placement | None = None
    specs: tuple[PartitionSpec, ...] = ()
    kv_cache_dtype: jnp.dtype | None = None  # of the pool; None is `dtype`

    def kv_layout(self, num_blocks: int, block_size: int) -> KVLayout:
        """The pool of this model with so many blocks in each layer, over all devices that share the heads."""
        config = spread_kv_heads(self.config, self._parallel.tensor)
        dtype = jnp.dtype(self.kv_cache_dtype or self.dtype)
        return KVLayout(config.num_layers, num_blocks, block_size, config.num_kv_heads, config.head_dim, dtype)

    def forward(
        self,
        weights: tuple[jax.Array, ...],
        token_ids: jax.Array,  # [tokens] int32
        meta: AttentionMetadata,
        pool: KVPool,
        layout: KVLayout,
    ) -> tuple[jax.Array, KVPool]:
        """[tokens, hidden] after the final norm, and the pool with the batch's keys and values written.

        Groups that share a batch's tokens need as many for each: a number of tokens that `data` divides.
        """
        if self.placement is None:
            hidden, pool = self._module(weights)(token_ids, meta, pool, layout)
            return hidden, pool
        part = replace(layout, num_kv_heads=layout.num_kv_heads // self._parallel.tensor)

        def compute(weights: tuple[jax.Array, ...], ids: jax.Array, meta: AttentionMetadata, pool: KVPool) -> Any:
            return self._module(weights)(ids, meta, pool, part)

        pool_spec, batch = self.placement.spec("pool"), self.placement.spec("batch")
        on_each = self.placement.on_each(compute, (self.specs, batch, batch, pool_spec), (batch, pool_spec))
        hidden, pool = on_each(weights, token_ids, meta, pool)
        return hidden, pool

    def logits(
        self,
        weights: tuple[jax.Array, ...],
        hidden: jax.Array,  # [rows, hidden]
    ) -> jax.Array:
        """[rows, vocab] float32"""

        def compute(weights: tuple[jax.Array, ...], hidden: jax.Array) -> jax.Array:
            logits: jax.Array = self._module(weights).logits(hidden)
            return logits

        if self.placement is not None:
            batch = self.placement.spec("batch")
            compute = self.placement.on_each(compute, (self.specs, batch), batch)
        return compute(weights, hidden).astype(jnp.float32)

    @property
    def _parallel(self) -> Parallel:
        return ALONE if self.placement is None else self.placement.parallel

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
    mesh: Mesh | None = None,
    kv_cache_dtype: KVDType = "auto",
) -> Model:
    """The model of a Hugging Face folder (config.json, safetensors in one file or several), or of a checkpoint of ours.

    It lies on the default device, or on the devices of a mesh (`sharding.make_mesh`), whose parts are read one array at
    a time. `dtype` "auto" is float32 on the CPU, where narrower types are slower, and bfloat16 elsewhere. `load_format`
    "dummy" draws the weights from `seed` and needs config.json alone; on more devices than there are KV heads it draws
    other ones. `kv_cache_dtype` "auto" is `dtype`; "int8" stores keys and values in eight bits (`quantized.py` of the
    kernels). `progress(bytes done, bytes in all)`. Raises CheckpointError for whatever is wrong with the folder,
    ValueError for an unknown dtype or load format, and for a mesh that the model's heads do not fit.
    """
    if load_format not in ("auto", "dummy"):
        raise ValueError(f"load_format={load_format!r}: expected 'auto' or 'dummy'")
    kv_dtype = find_kv_dtype(kv_cache_dtype)
    chosen, config = _dtype(dtype), read_config(folder)
    model, variables = _outline(config, chosen, implementation, mesh)
    leaves = _leaves(model, variables)
    if load_format == "dummy":
        draws = [_draw(variable, config) for variable in variables.values()]
        arrays = random_arrays(leaves, draws, seed, progress)
    elif is_checkpoint(folder):
        arrays = restore_arrays(folder, leaves, stored_parts(config), progress)
    else:
        arrays = load_safetensors(folder, leaves, progress)
    return replace(model, weights=arrays, kv_cache_dtype=kv_dtype)


def find_kv_dtype(name: str) -> jnp.dtype | None:
    """A KV pool's dtype by its name, one of KVDType; None is that of the weights. ValueError for other names."""
    if name not in get_args(KVDType):
        raise ValueError(f"kv_cache_dtype={name!r}: expected one of {', '.join(get_args(KVDType))}")
    return None if name == "auto" else jnp.dtype(name)


def outline_model(
    config: ModelConfig, dtype: jnp.dtype, implementation: Implementation, mesh: Mesh | None = None
) -> Model:
    """A model with shapes for weights, for devices that need not be there. ValueError where its heads do not fit."""
    return _outline(config, dtype, implementation, mesh)[0]


def _outline(
    config: ModelConfig, dtype: jnp.dtype, implementation: Implementation, mesh: Mesh | None
) -> tuple[Model, dict[str, nnx.Variable[Any]]]:
    """The model, and its variables by path."""
    module, _, rules = ARCHITECTURES[config.architecture]
    placement = None if mesh is None else place(config, rules, mesh)
    if placement is not None and implementation is Implementation.NATIVE:
        raise ValueError("implementation 'native' computes on one device; expected 'xla' or 'pallas' on several")
    parallel = ALONE if placement is None else placement.parallel
    whole, part = spread_kv_heads(config, parallel.tensor), part_of(config, parallel)
    state = nnx.state(nnx.eval_shape(lambda: module(whole, dtype, implementation, ALONE)))
    graph, part_state = nnx.split(nnx.eval_shape(lambda: module(part, dtype, implementation, parallel)))
    paths, _ = jax.tree.flatten_with_path(state, is_leaf=_is_variable)
    variables = {".".join(str(key.key) for key in path): variable for path, variable in paths}
    shapes = [variable.get_value() for variable in variables.values()]
    specs: tuple[PartitionSpec, ...] = ()
    if placement is not None:
        specs = tuple(placement.spec(path) for path in variables)
        shardings = [NamedSharding(placement.mesh, spec) for spec in specs]
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s) for x, s in zip(shapes, shardings, strict=True)]
    tree = jax.tree.structure(part_state)
    return Model(config, tuple(shapes), dtype, implementation, graph, tree, placement, specs), variables


def _dtype(name: str) -> jnp.dtype:
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={name!r}: expected 'auto', 'float32', 'bfloat16' or 'float16'")
    chosen: jnp.dtype = jnp.dtype(name)
    return chosen


def _is_variable(node: object) -> bool:
    return isinstance(node, nnx.Variable)


def model_leaves(model: Model) -> list[Leaf]:
    """How each of the model's arrays comes from a checkpoint."""
    mesh = None if model.placement is None else model.placement.mesh
    return _leaves(model, _outline(model.config, model.dtype, model.implementation, mesh)[1])


def stored_parts(config: ModelConfig) -> WeightMap:
    """What the arrays of a checkpoint of ours are made of: the same whatever mesh it comes from."""
    return ARCHITECTURES[config.architecture].weights(config, 1)


def stored_rows(model: Model) -> Iterator[tuple[Leaf, jax.Array]]:
    """The model's arrays with their rows as a checkpoint has them."""
    mesh = None if model.placement is None else model.placement.mesh
    _, variables = _outline(model.config, model.dtype, model.implementation, mesh)
    leaves = _leaves(model, variables)
    for leaf, variable, array in zip(leaves, variables.values(), model.weights, strict=True):
        yield leaf, _unfinish(array, touch=_touch(variable, model), rows=leaf.shape[-2:][0], sharding=leaf.sharding)


def _leaves(model: Model, variables: dict[str, nnx.Variable[Any]]) -> list[Leaf]:
    sources = ARCHITECTURES[model.config.architecture].weights(model.config, model._parallel.tensor)
    return [_leaf(path, variable, sources, model) for path, variable in variables.items()]


def _touch(variable: nnx.Variable[Any], model: Model) -> Touch:
    # The native product computes in float32 alone.
    packed = model.implementation is Implementation.NATIVE and model.dtype == jnp.float32
    if isinstance(variable, Matrix):
        return "pack" if packed else "transpose"
    return "pack" if isinstance(variable, TiedTable) and packed else "none"


def _leaf(path: str, variable: nnx.Variable[Any], sources: WeightMap, model: Model) -> Leaf:
    shape = tuple(variable.get_value().shape)
    is_matrix = isinstance(variable, Matrix)
    stored = computed = None
    if model.placement is not None:
        computed = model.placement.sharding(path)
        axes = (*computed.spec, *[None] * (len(shape) - len(computed.spec)))
        stored = NamedSharding(computed.mesh, PartitionSpec(*(_transposed(axes) if is_matrix else axes)))
    finish = partial(_finish, touch=_touch(variable, model), dtype=model.dtype, sharding=computed)
    return Leaf(path, _transposed(shape) if is_matrix else shape, sources[path], finish, stored)


def _transposed(axes: tuple[Any, ...]) -> tuple[Any, ...]:
    """The axes of a matrix, or of several, with rows and columns exchanged."""
    return (*axes[:-2], axes[-1], axes[-2])


@partial(jax.jit, static_argnames=("touch", "dtype", "sharding"))
def _finish(rows: jax.Array, *, touch: Touch, dtype: jnp.dtype, sharding: NamedSharding | None) -> jax.Array:
    if touch != "none":
        rows = rows.swapaxes(-1, -2)
    finished = rows.astype(dtype)
    if touch == "pack":
        finished = pack_weight(finished)
    return finished if sharding is None else jax.lax.with_sharding_constraint(finished, sharding)


@partial(jax.jit, static_argnames=("touch", "rows", "sharding"))
def _unfinish(array: jax.Array, *, touch: Touch, rows: int, sharding: NamedSharding | None) -> jax.Array:
    if touch == "pack":
        array = unpack_weight(array, rows)
    stored = array if touch == "none" else array.swapaxes(-1, -2)
    return stored if sharding is None else jax.lax.with_sharding_constraint(stored, sharding)


def _draw(variable: nnx.Variable[Any], config: ModelConfig) -> Draw:
    if isinstance(variable, Scale):
        return Draw(0.0 if isinstance(variable, ScaleAboveOne) else 1.0, 0.0)
    return Draw(0.0, 0.0 if isinstance(variable, Bias) else config.initializer_range)
