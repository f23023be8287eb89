# mypy: allow-subclassing-any
"""The parts that the architectures share. Modules hold arrays and settings; they pass through `jax.jit` as they are.

The class of a parameter says how it lies in a checkpoint and what a random model draws for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from jaxcept_kernels.attention import Implementation, paged_attention, write_kv
from jaxcept_kernels.layout import AttentionMetadata, KVLayout, KVPool
from jaxcept_kernels.linear import linear, lookup_rows
from jaxcept_models.config import ModelConfig
from jaxcept_models.rope import RopeConfig, RotaryTables, rotary_tables, rotate
from jaxcept_models.sharding import ALONE, Parallel, gate_block


class Matrix(nnx.Param[jax.Array]):
    """[in, out], or packed; a checkpoint holds it as [out, in]. Several of them have one more axis before these."""


class Table(nnx.Param[jax.Array]):
    """[rows, width], looked up by row; a checkpoint holds it as it is."""


class TiedTable(Table):
    """A table that is the matrix of the logits as well: [rows, width], or packed as a matrix of [width, rows]."""


class Scale(nnx.Param[jax.Array]):
    """[width], one in a random model."""


class ScaleAboveOne(Scale):
    """[width], what a scale has above one; zero in a random model."""


class Bias(nnx.Param[jax.Array]):
    """[width], zero in a random model."""


class Step(NamedTuple):
    """What the layers of one forward pass have in common."""

    meta: AttentionMetadata  # of the tokens that are computed here
    slots: AttentionMetadata  # of all tokens, whose keys and values are written here
    rotary: tuple[RotaryTables, ...]  # of each rotation that the model has


def make_step(meta: AttentionMetadata, ropes: Iterable[RopeConfig], parallel: Parallel) -> Step:
    """What the layers need of a batch."""
    own = parallel.own_batch(meta)
    return Step(own, meta, tuple(rotary_tables(own.positions, rope) for rope in ropes))


class Linear(nnx.Module):
    """x @ weight, plus a bias where the architecture has one.

    With `sums` the devices share the input's features, and their products are added up.
    """

    def __init__(
        self, num_in: int, num_out: int, dtype: jnp.dtype, *, bias: bool = False, sums: Parallel = ALONE
    ) -> None:
        self.weight = Matrix(jnp.zeros((num_in, num_out), dtype))
        self.bias = Bias(jnp.zeros(num_out, dtype)) if bias else None
        self.num_out = num_out
        self.sums = sums

    def __call__(
        self,
        x: jax.Array,  # [tokens, in]
    ) -> jax.Array:
        """[tokens, out] in x's dtype."""
        bias = None if self.bias is None else self.bias[...]
        if self.sums.tensor == 1:
            return linear(x, self.weight[...], bias=bias, out_features=self.num_out)
        product = self.sums.sum_parts(linear(x, self.weight[...], out_features=self.num_out))
        return product if bias is None else product + bias[None, :]


class Embedding(nnx.Module):
    """Token id → hidden vector, and back to logits where the two are tied. Devices may share the rows."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, parallel: Parallel, *, tied: bool) -> None:
        kind = TiedTable if tied else Table
        self.weight = kind(jnp.zeros((config.vocab_size, config.hidden_size), dtype))
        self.vocab_size = config.vocab_size
        self.parallel = parallel

    def __call__(
        self,
        token_ids: jax.Array,  # [tokens] int32
    ) -> jax.Array:
        """[tokens, hidden]"""
        table = self.weight[...]
        if self.parallel.splits_vocabulary:
            local = token_ids - self.parallel.first_of(self.vocab_size)
            is_here = (local >= 0) & (local < self.vocab_size)
            rows = table.at[jnp.where(is_here, local, self.vocab_size)].get(mode="fill", fill_value=0)
            return self.parallel.sum_parts(rows)
        return table.at[token_ids].get(mode="clip") if table.ndim == 2 else lookup_rows(table, token_ids)

    def logits(
        self,
        hidden: jax.Array,  # [rows, hidden]
    ) -> jax.Array:
        """[rows, vocab] in hidden's dtype."""
        table = self.weight[...]
        return linear(hidden, table.T if table.ndim == 2 else table, out_features=self.vocab_size)


def _mean(
    x: jax.Array,  # [..., width] float32
    implementation: Implementation,
) -> jax.Array:
    """The mean over the last axis, which stays: [..., 1]."""
    return total(x, implementation) / x.shape[-1]


def total(
    x: jax.Array,  # [..., width] float32
    implementation: Implementation,
) -> jax.Array:
    """The sum over the last axis, which stays: [..., 1].

    XLA's reduction on the CPU picks its order by the size of the batch. The native kernels keep a token's bits free of
    who shares its batch, so beside them the order is spelled out: halves added to halves.
    """
    if implementation is not Implementation.NATIVE:
        return jnp.sum(x, axis=-1, keepdims=True)
    while x.shape[-1] % 2 == 0:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    summed = x[..., :1]
    for i in range(1, x.shape[-1]):
        summed = summed + x[..., i : i + 1]
    return summed


class RMSNorm(nnx.Module):
    """x / rms(x) · scale over the last axis, in float32 (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, width: int, config: ModelConfig, dtype: jnp.dtype, implementation: Implementation) -> None:
        kind = ScaleAboveOne if config.norms_above_one else Scale
        self.scale = kind(jnp.ones(width, dtype))
        self.eps = config.norm_eps
        self.above_one = config.norms_above_one
        self.implementation = implementation

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(_mean(jnp.square(wide), self.implementation) + self.eps)
        scale = self.scale[...].astype(jnp.float32)
        if self.above_one:
            scale = scale + 1
        result: jax.Array = (normed * jnp.expand_dims(scale, range(x.ndim - 1))).astype(x.dtype)
        return result


class LayerNorm(nnx.Module):
    """(x - mean) / deviation · scale + bias over the last axis, in float32."""

    def __init__(self, width: int, eps: float, dtype: jnp.dtype, implementation: Implementation) -> None:
        self.scale = Scale(jnp.ones(width, dtype))
        self.bias = Bias(jnp.zeros(width, dtype))
        self.eps = eps
        self.implementation = implementation

    def __call__(
        self,
        x: jax.Array,  # [tokens, width]
    ) -> jax.Array:
        wide = x.astype(jnp.float32)
        centred = wide - _mean(wide, self.implementation)
        normed = centred * jax.lax.rsqrt(_mean(jnp.square(centred), self.implementation) + self.eps)
        scale, bias = self.scale[...].astype(jnp.float32), self.bias[...].astype(jnp.float32)
        result: jax.Array = (normed * scale[None, :] + bias[None, :]).astype(x.dtype)
        return result


class Attention(nnx.Module):
    """Rotary grouped-query attention over the paged pool, its four projections in two matrices.

    The columns of `qkv` come by kv head: its query heads, its key, its value, so that a split by kv heads is a split
    by columns.
    """

    def __init__(
        self, config: ModelConfig, dtype: jnp.dtype, implementation: Implementation, parallel: Parallel, layer: int
    ) -> None:
        dim = config.head_dim
        self.scoring = config.scoring(layer)
        self.rotation = 0 if self.scoring.window is None else len(config.ropes) - 1
        self.parallel = parallel
        self.heads, self.kv_heads, self.dim = config.num_heads, config.num_kv_heads, dim
        self.implementation = implementation
        self.qkv = Linear(
            config.hidden_size, (config.num_heads + 2 * config.num_kv_heads) * dim, dtype, bias=config.qkv_bias
        )
        self.output = Linear(config.num_heads * dim, config.hidden_size, dtype, bias=config.output_bias, sums=parallel)
        self.q_norm = RMSNorm(dim, config, dtype, implementation) if config.qk_norm else None
        self.k_norm = RMSNorm(dim, config, dtype, implementation) if config.qk_norm else None

    def __call__(
        self,
        x: jax.Array,  # [tokens, hidden]
        pool: KVPool,
        layer: jax.Array,  # int32 scalar
        step: Step,
        layout: KVLayout,
    ) -> tuple[jax.Array, KVPool]:
        """[tokens, hidden], and the pool with this layer's keys and values of the batch."""
        tokens = x.shape[0]
        group = self.heads // self.kv_heads
        parts = self.qkv(x).reshape(tokens, self.kv_heads, group + 2, self.dim)
        q = parts[:, :, :group].reshape(tokens, self.heads, self.dim)
        k, v = parts[:, :, group], parts[:, :, group + 1]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        rotary = step.rotary[self.rotation]
        q, k = rotate(q, rotary), rotate(k, rotary)
        k, v = self.parallel.gather(k), self.parallel.gather(v)
        pool = write_kv(pool, k, v, step.slots, layout, layer, implementation=self.implementation)
        mixed = paged_attention(
            q, pool, step.meta, layout, layer, scoring=self.scoring, implementation=self.implementation
        )
        return self.output(mixed.reshape(tokens, self.heads * self.dim)), pool


class GatedMLP(nnx.Module):
    """f(x @ gate) · (x @ up) @ down, gate and up in one matrix (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, parallel: Parallel) -> None:
        size = config.intermediate_size
        self.gate_up = Linear(config.hidden_size, 2 * size, dtype, bias=config.mlp_bias)
        self.down = Linear(size, config.hidden_size, dtype, bias=config.mlp_bias, sums=parallel)
        self.block = gate_block(size * parallel.tensor)
        self.activation = config.activation

    def __call__(
        self,
        x: jax.Array,  # [tokens, hidden]
    ) -> jax.Array:
        """[tokens, hidden]"""
        tokens = x.shape[0]
        parts = self.gate_up(x).reshape(tokens, -1, 2, self.block)
        gate = jax.nn.silu if self.activation == "silu" else partial(jax.nn.gelu, approximate=True)
        return self.down((gate(parts[:, :, 0]) * parts[:, :, 1]).reshape(tokens, -1))


class MLP(nnx.Module):
    """gelu(x @ up) @ down with biases, gelu in its tanh form."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, parallel: Parallel) -> None:
        size = config.intermediate_size
        self.up = Linear(config.hidden_size, size, dtype, bias=config.mlp_bias)
        self.down = Linear(size, config.hidden_size, dtype, bias=config.mlp_bias, sums=parallel)

    def __call__(
        self,
        x: jax.Array,  # [tokens, hidden]
    ) -> jax.Array:
        """[tokens, hidden]"""
        return self.down(jax.nn.gelu(self.up(x), approximate=True))


class Layer(Protocol):
    """One layer of a model: an nnx module, so a tree of arrays that `jax.jit` takes as an argument."""

    def __call__(
        self, hidden: jax.Array, pool: KVPool, layer: jax.Array, step: Step, layout: KVLayout
    ) -> tuple[jax.Array, KVPool]: ...


@partial(jax.jit, static_argnames="layout")
def _run_layer(
    module: Layer, hidden: jax.Array, pool: KVPool, layer: jax.Array, step: Step, *, layout: KVLayout
) -> tuple[jax.Array, KVPool]:
    return module(hidden, pool, layer, step, layout)


def run_layers(
    layers: Iterable[Layer],
    hidden: jax.Array,  # [tokens, hidden]
    pool: KVPool,
    step: Step,
    layout: KVLayout,
) -> tuple[jax.Array, KVPool]:
    """All layers in turn: [tokens, hidden], and the pool. Unrolled, traced once: the layer's number is an argument."""
    for i, module in enumerate(layers):
        hidden, pool = _run_layer(module, hidden, pool, jnp.int32(i), step, layout=layout)
    return hidden, pool
