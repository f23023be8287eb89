# mypy: allow-subclassing-any
"""Several MLPs in place of one: a router picks a few for each token, and adds up what they make of it.

Tokens are sorted by expert, so that each expert's matrices are read once, and those of experts that no token takes not
at all (Gale et al. 2022, "MegaBlocks", arXiv:2211.15841). No token is dropped.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxcept_kernels.attention import Implementation
from jaxcept_kernels.grouped import grouped_linear
from jaxcept_kernels.linear import linear
from jaxcept_models.config import ModelConfig
from jaxcept_models.layers import Matrix, total
from jaxcept_models.sharding import Parallel, gate_block


class Routes(NamedTuple):
    """The experts of each token, and how much each of them counts."""

    expert: jax.Array  # [tokens, experts per token] int32
    share: jax.Array  # [tokens, experts per token] float32


class Router(nnx.Module):
    """The experts with the largest logits, the first ones among equals; shares by softmax, in float32.

    Shares are of all experts' exponentials, or with `norm_topk_prob` of those that were picked.
    """

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, implementation: Implementation) -> None:
        self.weight = Matrix(jnp.zeros((config.hidden_size, config.num_experts), dtype))
        self.num_experts, self.per_token = config.num_experts, config.num_experts_per_token
        self.norm_topk_prob = config.norm_topk_prob
        self.implementation = implementation

    def __call__(
        self,
        x: jax.Array,  # [tokens, hidden]
    ) -> Routes:
        wide = x.astype(jnp.float32), self.weight[...].astype(jnp.float32)
        logits = linear(*wide, out_features=self.num_experts)
        picked, expert = jax.lax.top_k(logits, self.per_token)
        highest = picked[:, :1]
        exponentials = jnp.exp(picked - highest)
        counted = exponentials if self.norm_topk_prob else jnp.exp(logits - highest)
        return Routes(expert, exponentials / total(counted, self.implementation))


class Sorted(NamedTuple):
    """A token's rows, one for each of its experts, in the order of the experts; those of padding come last."""

    token: jax.Array  # [rows] int32, by row
    row: jax.Array  # [tokens, experts per token] int32
    sizes: jax.Array  # [experts] int32, rows of each


def sort_rows(
    expert: jax.Array,  # [tokens, experts per token] int32
    num_tokens: jax.Array,  # int32 scalar, those that are no padding
    num_experts: int,
) -> Sorted:
    """The rows by expert, and by token within one."""
    tokens, per_token = expert.shape
    is_live = jnp.arange(tokens, dtype=jnp.int32) < num_tokens
    wanted = jnp.where(is_live[:, None], expert, num_experts).reshape(-1)  # padding takes no expert
    order = jnp.argsort(wanted, stable=True).astype(jnp.int32)
    row = jnp.zeros_like(order).at[order].set(jnp.arange(tokens * per_token, dtype=jnp.int32), unique_indices=True)
    sizes = jnp.zeros(num_experts, jnp.int32).at[wanted].add(1, mode="drop")
    return Sorted(order // per_token, row.reshape(tokens, per_token), sizes)


class GroupedLinear(nnx.Module):
    """x @ weight[expert], for rows that are sorted by expert."""

    def __init__(
        self, num_experts: int, num_in: int, num_out: int, dtype: jnp.dtype, implementation: Implementation
    ) -> None:
        self.weight = Matrix(jnp.zeros((num_experts, num_in, num_out), dtype))
        self.num_out = num_out
        self.implementation = implementation

    def __call__(
        self,
        x: jax.Array,  # [rows, in]
        sizes: jax.Array,  # [experts] int32
    ) -> jax.Array:
        """[rows, out] in x's dtype; rows that no expert has hold anything."""
        return grouped_linear(x, self.weight[...], sizes, out_features=self.num_out, implementation=self.implementation)


class Experts(nnx.Module):
    """Gated MLPs (layers.GatedMLP) of which each token takes some. Each device has its columns of every expert."""

    def __init__(
        self, config: ModelConfig, dtype: jnp.dtype, implementation: Implementation, parallel: Parallel
    ) -> None:
        count, size, hidden = config.num_experts, config.intermediate_size, config.hidden_size
        self.router = Router(config, dtype, implementation)
        self.gate_up = GroupedLinear(count, hidden, 2 * size, dtype, implementation)
        self.down = GroupedLinear(count, size, hidden, dtype, implementation)
        self.block = gate_block(size * parallel.tensor)
        self.num_experts = count
        self.parallel = parallel

    def __call__(
        self,
        x: jax.Array,  # [tokens, hidden]
        num_tokens: jax.Array,  # int32 scalar: those behind them are padding
    ) -> jax.Array:
        """[tokens, hidden], zeros for padding."""
        routes = self.router(x)
        rows = sort_rows(routes.expert, num_tokens, self.num_experts)
        parts = self.gate_up(x.at[rows.token].get(mode="promise_in_bounds"), rows.sizes)
        parts = parts.reshape(parts.shape[0], -1, 2, self.block)
        made = self.down((jax.nn.silu(parts[:, :, 0]) * parts[:, :, 1]).reshape(parts.shape[0], -1), rows.sizes)
        mixed = jnp.zeros(x.shape, jnp.float32)
        for i in range(rows.row.shape[1]):  # in one order, whatever the batch
            mine = made.at[rows.row[:, i]].get(mode="promise_in_bounds").astype(jnp.float32)
            mixed = mixed + routes.share[:, i : i + 1] * mine
        is_live = jnp.arange(x.shape[0], dtype=jnp.int32) < num_tokens
        # What padding rows hold was not computed, so it is chosen away and not multiplied by zero.
        return self.parallel.sum_parts(jnp.where(is_live[:, None], mixed, 0.0).astype(x.dtype))
