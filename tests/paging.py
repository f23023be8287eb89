"""A model over a paged pool without an engine: ragged batches built by hand, block ids scattered on purpose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from jaxcept_kernels.layout import AttentionMetadata, KVLayout, KVPool, make_pool
from jaxcept_models.model import Model


@cache
def _compiled(model: Model) -> Callable[..., tuple[jax.Array, KVPool]]:
    def step(
        weights: tuple[jax.Array, ...], ids: jax.Array, meta: AttentionMetadata, pool: KVPool, layout: KVLayout
    ) -> tuple[jax.Array, KVPool]:
        hidden, pool = model.forward(weights, ids, meta, pool, layout)
        return model.logits(weights, hidden), pool

    return jax.jit(step, static_argnames="layout", donate_argnames="pool")


class PagedRun:
    """Holds the pool and the contexts of some sequences; `step` appends tokens to any of them in one batch.

    Every batch is padded to `tokens` rows and all `sequences` entries, so runs of one model share a compilation.
    """

    def __init__(self, model: Model, *, sequences: int = 4, max_len: int = 96, tokens: int = 96, block_size: int = 8):
        self.model = model
        self._tokens, self._block_size = tokens, block_size
        per_sequence = -(-max_len // block_size)
        self._layout = model.kv_layout(sequences * per_sequence, block_size)
        blocks = np.random.default_rng(0).permutation(sequences * per_sequence)
        self._tables = blocks.reshape(sequences, per_sequence).astype(np.int32)
        self._lengths = [0] * sequences
        self._pool = make_pool(self._layout)
        if model.placement is not None:
            self._pool = jax.device_put(self._pool, model.placement.pool)
        self._step = _compiled(model)

    def step(self, added: Mapping[int, Sequence[int]]) -> dict[int, np.ndarray]:
        """Logits after each added token, by sequence: [tokens added, vocab] float32."""
        ids = np.zeros(self._tokens, np.int32)
        positions = np.zeros(self._tokens, np.int32)
        slots = np.full(self._tokens, self._layout.num_blocks * self._block_size, np.int32)
        starts, row = [0], 0
        for seq, table in enumerate(self._tables):
            for token in added.get(seq, ()):
                position = self._lengths[seq]
                block, offset = divmod(position, self._block_size)
                ids[row], positions[row], slots[row] = token, position, table[block] * self._block_size + offset
                self._lengths[seq] += 1
                row += 1
            starts.append(row)
        context = [length if added.get(seq) else 0 for seq, length in enumerate(self._lengths)]
        meta = AttentionMetadata(*map(self._int32, (positions, slots, starts, context, self._tables)))
        weights, ids = self.model.weights, self._int32(ids)
        padded, self._pool = self._step(weights, ids, meta, self._pool, layout=self._layout)
        logits = np.asarray(padded)
        return {seq: logits[starts[seq] : starts[seq + 1]] for seq in added}

    def greedy(self, first: int, count: int, seq: int = 0) -> list[int]:
        """`first` and the tokens that follow it greedily, `count` in all."""
        tokens = [first]
        while len(tokens) < count:
            tokens.append(int(self.step({seq: tokens[-1:]})[seq][-1].argmax()))
        return tokens

    @staticmethod
    def _int32(values: np.ndarray | Sequence[int]) -> jax.Array:
        return jnp.asarray(np.array(values, np.int32))


def run_prompt(model: Model, ids: Sequence[int]) -> np.ndarray:
    """Logits after each token of one prompt of at most 96: [tokens, vocab] float32."""
    return PagedRun(model).step({0: ids})[0]
