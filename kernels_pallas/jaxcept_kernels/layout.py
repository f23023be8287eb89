"""How keys and values lie in the pool, and what one step tells the kernels about its batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcept_kernels.quantized import SCALE_BYTES


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The shape of the KV pool: one flat array for K and one for V, the layers one after the other.

    Block b of layer l is row `l * num_blocks + b`. In int8 the scales of a head's slots lie behind them
    (`quantized.py`); they take rows of their own.
    """

    num_layers: int
    num_blocks: int
    block_size: int  # slots per block
    num_kv_heads: int
    head_dim: int
    dtype: jnp.dtype

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_blocks", "block_size", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected 1 or more")

    @property
    def is_quantized(self) -> bool:
        """Whether slots hold integers with a scale."""
        return bool(self.dtype == jnp.int8)

    @property
    def block_rows(self) -> int:
        """Rows of one head of a block: its slots, and what their scales take."""
        scales = -(-SCALE_BYTES * self.block_size // self.head_dim) if self.is_quantized else 0
        return self.block_size + scales

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[layers * blocks, kv heads, block rows, head dim]"""
        return (self.num_layers * self.num_blocks, self.num_kv_heads, self.block_rows, self.head_dim)

    @property
    def block_bytes(self) -> int:
        """Bytes of K and V of one block over all layers."""
        per_layer = self.num_kv_heads * self.block_rows * self.head_dim * jnp.dtype(self.dtype).itemsize
        return 2 * self.num_layers * per_layer

    def scale_place(self, offset: jax.Array, i: int) -> tuple[jax.Array, jax.Array]:
        """Row and column, among a head's rows of a block, of byte i of the scale of the slot at this offset."""
        element = (self.head_dim + i) * self.block_size + offset
        return element // self.head_dim, element % self.head_dim

    def compute_dtype(self, dtype: jnp.dtype) -> jnp.dtype:
        """What attention multiplies in, for queries of this dtype."""
        return jnp.dtype(dtype) if self.is_quantized else self.dtype


class KVPool(NamedTuple):
    """Keys and values of every layer, each of shape KVLayout.shape."""

    k: jax.Array  # [layers * blocks, kv_heads, block_rows, head_dim]
    v: jax.Array  # [layers * blocks, kv_heads, block_rows, head_dim]


def make_pool(layout: KVLayout) -> KVPool:
    """A zeroed pool on the default device."""
    return KVPool(jnp.zeros(layout.shape, layout.dtype), jnp.zeros(layout.shape, layout.dtype))


class AttentionMetadata(NamedTuple):
    """One ragged batch: token rows of several sequences, one sequence after the other.

    The tokens of batch entry s are rows query_start[s] .. query_start[s + 1] - 1 and are the LAST of its
    context_len[s] tokens. Padding tokens have slot == num_blocks * block_size (dropped on write) and belong to no
    entry; padding entries have query_start[s] == query_start[s + 1] and context_len 0.
    """

    positions: jax.Array  # [tokens] int32, position of each token in its sequence
    slots: jax.Array  # [tokens] int32, block * block_size + offset within one layer
    query_start: jax.Array  # [entries + 1] int32
    context_len: jax.Array  # [entries] int32, tokens in the KV cache once this step's are written
    block_tables: jax.Array  # [entries, max_blocks] int32
