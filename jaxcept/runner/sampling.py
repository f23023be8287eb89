"""Drawing tokens on the device: filters, penalties, seeded draws, log-probabilities.

A draw depends on the request's own seed and on the token's position, never on its place in the batch. Filters find
their exact threshold by bisection over the bits of the logits, which costs a few passes over the vocabulary where a
sort costs many.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcept.scheduler.params import MAX_LOGPROBS
from jaxcept_kernels.rows import argmax_rows

NEGATIVE = -1e30
FORBIDDEN = -3e38  # a logit that no bias lifts to that of an allowed token, not even of one that min_tokens bans
LEAST_LOGPROB = -9999.0  # which the OpenAI API tells of tokens that are not drawn


class Variant(StrEnum):
    """How much a step's draws need; each is compiled on its own, and the cheapest that serves the batch runs."""

    GREEDY = "greedy"
    RANDOM = "random"  # temperature, top-k, top-p, min-p
    FULL = "full"  # and penalties, logit bias, min_tokens, log-probabilities
    MASKED = "masked"  # and a mask of the vocabulary for each row


class RowParams(NamedTuple):
    """Sampling parameters of the drawing sequences, one entry each."""

    rows: jax.Array  # [n] int32, row of the per-row state
    positions: jax.Array  # [n] int32, where the drawn token will stand
    seeds: jax.Array  # [n, 2] uint32
    temperature: jax.Array  # [n] float32
    top_p: jax.Array  # [n] float32
    top_k: jax.Array  # [n] int32, 0 is off
    min_p: jax.Array  # [n] float32
    presence: jax.Array  # [n] float32
    frequency: jax.Array  # [n] float32
    repetition: jax.Array  # [n] float32


class RowState(NamedTuple):
    """What the device remembers of each row; the last row is scratch for padding."""

    last_tokens: jax.Array  # [rows + 1] int32
    history: jax.Array  # [rows + 1, max_model_len] int32: id, or ~id where the model did not generate it
    bias_ids: jax.Array  # [rows + 1, entries] int32, the vocabulary's size where unused
    bias_values: jax.Array  # [rows + 1, entries] float32
    bias_until: jax.Array  # [rows + 1, entries] int32, applies to draws for positions below


class Logprobs(NamedTuple):
    """Natural-log probabilities of the model's own distribution."""

    chosen: jax.Array  # [n] float32
    rank: jax.Array  # [n] int32, 1 is the most likely
    top_ids: jax.Array  # [n, MAX_LOGPROBS] int32
    top_values: jax.Array  # [n, MAX_LOGPROBS] float32


def _ordered_bits(x: jax.Array) -> jax.Array:
    """float32 → uint32 in the same order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _largest_threshold(bits: jax.Array, weights: jax.Array, target: jax.Array) -> jax.Array:
    """Per row, the largest t such that the weights where bits >= t add up to at least target: [n] uint32.

    bits, weights: [n, vocab]; target: [n] float32.
    """

    def try_bit(i: jax.Array, found: jax.Array) -> jax.Array:
        candidate = found | (jnp.uint32(1) << (jnp.uint32(31) - i.astype(jnp.uint32)))
        mass = jnp.sum(jnp.where(bits >= candidate[:, None], weights, 0.0), axis=-1)
        return jnp.where(mass >= target, candidate, found)

    found: jax.Array = jax.lax.fori_loop(0, 32, try_bit, jnp.zeros(bits.shape[0], jnp.uint32))
    return found


def filter_logits(logits: jax.Array, params: RowParams) -> jax.Array:
    """Top-k, then top-p of what is left, then min-p: filtered logits are NEGATIVE or less. Ties at a threshold stay.

    logits: [n, vocab] float32, already divided by the temperature.
    """
    vocab = logits.shape[-1]
    bits = _ordered_bits(logits)

    def top_k(x: jax.Array) -> jax.Array:
        k = jnp.where(params.top_k > 0, jnp.minimum(params.top_k, vocab), vocab).astype(jnp.float32)
        threshold = _largest_threshold(bits, jnp.ones_like(x), k)
        return jnp.where(bits >= threshold[:, None], x, jnp.minimum(x, NEGATIVE))

    def top_p(x: jax.Array) -> jax.Array:
        threshold = _largest_threshold(_ordered_bits(x), jax.nn.softmax(x, axis=-1), params.top_p)
        kept = (_ordered_bits(x) >= threshold[:, None]) | (params.top_p >= 1.0)[:, None]
        return jnp.where(kept, x, jnp.minimum(x, NEGATIVE))

    logits = jax.lax.cond(jnp.any(params.top_k > 0), top_k, lambda x: x, logits)
    logits = jax.lax.cond(jnp.any(params.top_p < 1.0), top_p, lambda x: x, logits)
    floor = jnp.max(logits, axis=-1) + jnp.log(jnp.maximum(params.min_p, 1e-30))
    kept = (logits >= floor[:, None]) | (params.min_p <= 0.0)[:, None]
    return jnp.where(kept, logits, jnp.minimum(logits, NEGATIVE))


def penalise(logits: jax.Array, params: RowParams, state: RowState) -> jax.Array:
    """Repetition penalty over prompt and completion, presence and frequency penalty over the completion, then bias.

    logits: [n, vocab] float32.
    """
    vocab = logits.shape[-1]
    n = logits.shape[0]
    history = state.history[params.rows]  # [n, max_model_len]
    known = jnp.arange(history.shape[1])[None, :] < params.positions[:, None]
    is_output = history >= 0
    ids = jnp.where(known, jnp.where(is_output, history, ~history), vocab)
    each = jnp.arange(n)[:, None]
    seen = jnp.zeros((n, vocab), jnp.bool_).at[each, ids].set(True, mode="drop")
    counts = jnp.zeros((n, vocab), jnp.float32).at[each, jnp.where(is_output, ids, vocab)].add(1.0, mode="drop")
    repetition = params.repetition[:, None]
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(seen, repeated, logits)
    logits = logits - params.frequency[:, None] * counts
    logits = logits - params.presence[:, None] * (counts > 0).astype(jnp.float32)
    bias = jnp.where(state.bias_until[params.rows] > params.positions[:, None], state.bias_values[params.rows], 0.0)
    return logits.at[each, state.bias_ids[params.rows]].add(bias, mode="drop")


def apply_mask(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """Forbids the tokens whose bit is 0. logits: [n, vocab] float32; mask: [n, words] uint32, token i at bit i % 32 of
    word i // 32."""
    bits = mask[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None, :] & 1
    allowed = bits.reshape(mask.shape[0], -1)[:, : logits.shape[-1]]
    return jnp.where(allowed == 1, logits, FORBIDDEN)


def draw(logits: jax.Array, params: RowParams) -> jax.Array:
    """Gumbel-max draws, [n] int32: temperature 0 takes the largest logit. logits: [n, vocab] float32."""
    temperature = jnp.where(params.temperature > 0, params.temperature, 1.0)
    filtered = filter_logits(logits / temperature[:, None], params)

    def noise(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        return jax.random.gumbel(jax.random.fold_in(key, position), (logits.shape[-1],), jnp.float32)

    noisy = filtered + jax.vmap(noise)(params.seeds, params.positions)
    return argmax_rows(jnp.where((params.temperature > 0)[:, None], noisy, logits))


def logprobs_of(logits: jax.Array, token_ids: jax.Array) -> Logprobs:
    """logits: [n, vocab] float32, before any penalty or filter; token_ids: [n] int32."""
    chosen_logit = jnp.take_along_axis(logits, token_ids[:, None], axis=-1)
    norm = jax.nn.logsumexp(logits, axis=-1)
    rank = 1 + jnp.sum((logits > chosen_logit).astype(jnp.int32), axis=-1)
    values, ids = jax.lax.top_k(logits, min(MAX_LOGPROBS, logits.shape[-1]))
    values = jnp.maximum(values - norm[:, None], LEAST_LOGPROB)
    return Logprobs(chosen_logit[:, 0] - norm, rank, ids.astype(jnp.int32), values)


def sample(
    logits: jax.Array, params: RowParams, state: RowState, variant: Variant, mask: jax.Array | None = None
) -> tuple[jax.Array, RowState, Logprobs | None]:
    """Draws one token per entry and remembers it. logits: [n, vocab] float32; returns [n] int32.

    `mask` as in apply_mask, for Variant.MASKED alone.
    """
    logprobs = None
    if mask is not None:
        logits = apply_mask(logits, mask)
    if variant is Variant.GREEDY:
        tokens = argmax_rows(logits)
    elif variant is Variant.RANDOM:
        tokens = draw(logits, params)
    else:
        tokens = draw(penalise(logits, params, state), params)
        logprobs = logprobs_of(logits, tokens)
        state = state._replace(history=state.history.at[params.rows, params.positions].set(tokens, mode="drop"))
    return tokens, state._replace(last_tokens=state.last_tokens.at[params.rows].set(tokens)), logprobs
