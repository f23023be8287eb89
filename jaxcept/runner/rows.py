"""The runner's rows: what it remembers of each running sequence, as host columns and as device state."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxcept.runner.sampling import RowParams, RowState, Variant
from jaxcept.scheduler.params import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS
from jaxcept.scheduler.plan import Mask, RowSetup

MAX_BANNED_IDS = MAX_STOP_TOKEN_IDS + 16  # that min_tokens keeps from being drawn: a request's and the tokenizer's
BIAS_ENTRIES = MAX_LOGIT_BIAS + MAX_BANNED_IDS
ALWAYS = np.iinfo(np.int32).max
BANNED = -1e30

_INT_COLUMNS = ("rows", "positions", "seed_low", "seed_high", "top_k")
_FLOAT_COLUMNS = ("temperature", "top_p", "min_p", "presence", "frequency", "repetition")
NUM_COLUMNS = len(_INT_COLUMNS) + len(_FLOAT_COLUMNS)


def unpack_params(packed: jax.Array) -> RowParams:
    """[n, NUM_COLUMNS] int32, floats as their bits → RowParams."""
    ints = packed[:, : len(_INT_COLUMNS)]
    floats = jax.lax.bitcast_convert_type(packed[:, len(_INT_COLUMNS) :], jnp.float32)
    seeds = jax.lax.bitcast_convert_type(ints[:, 2:4], jnp.uint32)
    temperature, top_p, min_p, presence, frequency, repetition = (floats[:, i] for i in range(len(_FLOAT_COLUMNS)))
    return RowParams(
        ints[:, 0], ints[:, 1], seeds, temperature, top_p, ints[:, 4], min_p, presence, frequency, repetition
    )


def mask_words(vocab_size: int) -> int:
    """Words of 32 bits that hold one bit for each token."""
    return -(-vocab_size // 32)


def make_row_state(max_num_seqs: int, max_model_len: int, vocab_size: int) -> RowState:
    """Empty device state with one scratch row at the end."""
    rows = max_num_seqs + 1
    return RowState(
        last_tokens=jnp.zeros(rows, jnp.int32),
        history=jnp.zeros((rows, max_model_len), jnp.int32),
        bias_ids=jnp.full((rows, BIAS_ENTRIES), vocab_size, jnp.int32),
        bias_values=jnp.zeros((rows, BIAS_ENTRIES), jnp.float32),
        bias_until=jnp.zeros((rows, BIAS_ENTRIES), jnp.int32),
    )


def set_row(state: RowState, row: jax.Array, history: jax.Array, bias: jax.Array) -> RowState:
    """Replaces one row. row: [] int32; history: [max_model_len] int32; bias: [3, BIAS_ENTRIES] int32 (ids, value
    bits, until)."""
    return RowState(
        last_tokens=state.last_tokens,
        history=state.history.at[row].set(history),
        bias_ids=state.bias_ids.at[row].set(bias[0]),
        bias_values=state.bias_values.at[row].set(jax.lax.bitcast_convert_type(bias[1], jnp.float32)),
        bias_until=state.bias_until.at[row].set(bias[2]),
    )


class HostRows:
    """Sampling parameters of the rows, as columns that a step picks from."""

    def __init__(self, max_num_seqs: int, max_model_len: int, vocab_size: int) -> None:
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._columns = np.zeros((max_num_seqs + 1, NUM_COLUMNS), np.int32)
        self._columns[:, 0] = np.arange(max_num_seqs + 1)
        self._floats = self._columns[:, len(_INT_COLUMNS) :].view(np.float32)
        self._variants = np.zeros(max_num_seqs + 1, np.int8)
        self._has_state = np.zeros(max_num_seqs + 1, bool)  # whether the device's part of the row says anything
        self._words = mask_words(vocab_size)
        self._setups: list[RowSetup | None] = [None] * (max_num_seqs + 1)
        self._scratch = max_num_seqs

    def setup(self, row: int) -> RowSetup:
        """What the row's sequence came with."""
        setup = self._setups[row]
        assert setup is not None, f"row {row} is used before a RowSetup"
        return setup

    def set(self, setup: RowSetup) -> bool:
        """Takes a row over; whether the device's part of it must be replaced (set_row) too."""
        params, row = setup.params, setup.row
        self._setups[row] = setup
        self._columns[row, 2:5] = np.array(
            [setup.seed & 0xFFFFFFFF, setup.seed >> 32 & 0xFFFFFFFF, params.top_k], np.uint64
        ).astype(np.uint32).view(np.int32)  # fmt: skip
        self._floats[row] = (
            params.temperature,
            params.top_p,
            params.min_p,
            params.presence_penalty,
            params.frequency_penalty,
            params.repetition_penalty,
        )
        needs_state = params.uses_history or bool(params.logit_bias) or params.min_tokens > 0
        if needs_state or params.logprobs is not None:
            variant = Variant.FULL
        else:
            variant = Variant.RANDOM if params.temperature > 0 else Variant.GREEDY
        self._variants[row] = list(Variant).index(variant)
        had_state, self._has_state[row] = bool(self._has_state[row]), variant is Variant.FULL
        return variant is Variant.FULL or had_state

    def variant(self, rows: np.ndarray) -> Variant:
        """The cheapest variant that serves all of these rows."""
        return list(Variant)[int(self._variants[rows].max())]

    def params(self, rows: np.ndarray, positions: np.ndarray, padded: int) -> np.ndarray:
        """[padded, NUM_COLUMNS] int32 for unpack_params; padding draws into the scratch row."""
        packed = np.empty((padded, NUM_COLUMNS), np.int32)
        packed[: len(rows)] = self._columns[rows]
        packed[: len(rows), 1] = positions
        packed[len(rows) :] = self._columns[self._scratch]
        return packed

    def masks(self, rows: np.ndarray, masks: Sequence[Mask], padded: int) -> np.ndarray:
        """[padded, words] uint32 for apply_mask: all bits set for draws without a mask."""
        packed = np.full((padded, self._words), 0xFFFFFFFF, np.uint32)
        first = {row: i for i, row in reversed(list(enumerate(rows.tolist())))}
        for row, bits, draw in masks:
            words = np.frombuffer(bits, "<u4")[: self._words]
            packed[first[row] + draw, : len(words)] = words
            packed[first[row] + draw, len(words) :] = 0
        return packed

    def history(self, setup: RowSetup) -> np.ndarray:
        """[max_model_len] int32 for set_row."""
        ids = np.asarray(setup.token_ids, np.int32)
        history = np.zeros(self._max_model_len, np.int32)
        history[: len(ids)] = ~ids
        for start, stop in setup.output_spans:
            history[start:stop] = ids[start:stop]
        return history

    def bias(self, setup: RowSetup) -> np.ndarray:
        """[3, BIAS_ENTRIES] int32 for set_row: the request's logit bias, and its stop ids banned up to min_tokens."""
        entries: list[tuple[int, float, int]] = [
            (token_id, value, ALWAYS) for token_id, value in (setup.params.logit_bias or {}).items()
        ]
        num_output = sum(stop - start for start, stop in setup.output_spans)
        until = min(len(setup.token_ids) - num_output + setup.params.min_tokens, ALWAYS)
        if setup.params.min_tokens > num_output:
            entries += [(token_id, BANNED, until) for token_id in setup.stop_token_ids]
        bias = np.zeros((3, BIAS_ENTRIES), np.int32)
        bias[0] = self._vocab_size
        if entries:
            ids, values, untils = zip(*entries, strict=True)
            bias[0, : len(ids)] = ids
            bias[1, : len(ids)] = np.array(values, np.float32).view(np.int32)
            bias[2, : len(ids)] = untils
        return bias
