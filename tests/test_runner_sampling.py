"""Device sampling against a plain NumPy float64 reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcept.runner.rows import HostRows, make_row_state, set_row, unpack_params
from jaxcept.runner.sampling import NEGATIVE, RowParams, Variant, filter_logits, logprobs_of, sample
from jaxcept.scheduler.params import SamplingParams
from jaxcept.scheduler.plan import Mask, RowSetup

VOCAB, ROWS, LENGTH = 50, 4, 32


draw = jax.jit(sample, static_argnames="variant")


def row_params(n, **columns):
    defaults = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "presence": 0.0, "frequency": 0.0,
                "repetition": 1.0}  # fmt: skip
    columns = defaults | columns
    arrays = {k: jnp.full(n, v, jnp.int32 if k == "top_k" else jnp.float32) for k, v in columns.items()}
    return RowParams(jnp.arange(n, dtype=jnp.int32), jnp.full(n, 3, jnp.int32), jnp.zeros((n, 2), jnp.uint32), **arrays)


def reference_filter(logits, top_k, top_p, min_p):
    """Which tokens stay, one row, in float64; ties at a threshold stay."""
    x = np.asarray(logits, np.float64)
    keep = np.ones(len(x), bool)
    if top_k:
        keep &= x >= np.sort(x)[::-1][min(top_k, len(x)) - 1]
    p = np.where(keep, np.exp(x - x.max()), 0.0)
    p /= p.sum()
    if top_p < 1:
        order = np.argsort(-x, kind="stable")
        needed = int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1
        keep &= x >= x[order[min(needed, len(x)) - 1]]
    if min_p:
        keep &= x >= x.max() + np.log(min_p)
    return keep


@given(st.integers(0, 2**31), st.sampled_from([0, 1, 3, 49, 50, 400]), st.sampled_from([1.0, 0.9, 0.5, 0.01]),
       st.sampled_from([0.0, 0.05, 0.5, 1.0]))  # fmt: skip
def test_filters_keep_what_the_reference_keeps(seed, top_k, top_p, min_p):
    logits = np.random.default_rng(seed).normal(size=(2, VOCAB)).astype(np.float32) * 3
    out = jax.jit(filter_logits)(jnp.asarray(logits), row_params(2, top_k=top_k, top_p=top_p, min_p=min_p))
    for row in range(2):
        kept = np.asarray(out)[row] > NEGATIVE / 2
        np.testing.assert_array_equal(kept, reference_filter(logits[row], top_k, top_p, min_p))
        np.testing.assert_array_equal(np.asarray(out)[row][kept], logits[row][kept])


def test_filters_keep_ties_and_infinities():
    logits = jnp.asarray([[1.0, 1.0, 1.0, -jnp.inf, 0.0]], jnp.float32)
    out = filter_logits(logits, row_params(1, top_k=2))
    np.testing.assert_array_equal(np.asarray(out)[0] > NEGATIVE / 2, [True, True, True, False, False])


def drawn(logits, setups, positions, variant, state=None):
    host = HostRows(ROWS, LENGTH, VOCAB)
    state = make_row_state(ROWS, LENGTH, VOCAB) if state is None else state
    for setup in setups:
        if host.set(setup):
            state = set_row(state, jnp.int32(setup.row), jnp.asarray(host.history(setup)),
                            jnp.asarray(host.bias(setup)))  # fmt: skip
    rows = np.array([s.row for s in setups], np.int32)
    packed = host.params(rows, np.asarray(positions, np.int32), len(rows))
    params = unpack_params(jnp.asarray(packed))
    return draw(jnp.asarray(logits), params, state, variant)


def setup(row, token_ids=(1, 2, 3), spans=(), seed=0, stop=(), **params):
    return RowSetup(row, row, SamplingParams(**params), seed, tuple(token_ids), spans, len(token_ids), stop)


def test_greedy_is_argmax_in_every_variant():
    logits = np.random.default_rng(0).normal(size=(3, VOCAB)).astype(np.float32)
    setups = [setup(r, temperature=0.0) for r in range(3)]
    for variant in Variant:
        tokens, state, _ = drawn(logits, setups, [3, 3, 3], variant)
        np.testing.assert_array_equal(tokens, logits.argmax(-1))
        np.testing.assert_array_equal(state.last_tokens[:3], logits.argmax(-1))


def test_a_seeded_draw_does_not_depend_on_its_neighbours():
    logits = np.random.default_rng(1).normal(size=(3, VOCAB)).astype(np.float32)
    alone, _, _ = drawn(logits[1:2], [setup(0, seed=77)], [9], Variant.RANDOM)
    together, _, _ = drawn(logits, [setup(2, seed=5), setup(1, seed=77), setup(0, seed=6)], [4, 9, 9], Variant.RANDOM)
    assert int(alone[0]) == int(together[1])


def test_draws_follow_the_distribution():
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    logits = np.full((1, VOCAB), NEGATIVE, np.float32)
    logits[0, :4] = np.log(probabilities)
    params = row_params(1)
    count = 4000

    def one(position):
        spread = params._replace(positions=position[None])
        return sample(jnp.asarray(logits), spread, make_row_state(ROWS, LENGTH, VOCAB), Variant.RANDOM)[0][0]

    tokens = np.asarray(jax.lax.map(one, jnp.arange(count, dtype=jnp.int32)))
    observed = np.bincount(tokens, minlength=4)[:4]
    chi_square = ((observed - count * probabilities) ** 2 / (count * probabilities)).sum()
    assert observed.sum() == count
    assert chi_square < 16.27  # 99.9 % of draws with 3 degrees of freedom


def reference_penalties(logits, ids, is_output, params):
    x = np.asarray(logits, np.float64).copy()
    for token in set(ids):
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token, output in zip(ids, is_output, strict=True):
        if output:
            x[token] -= params.frequency_penalty
    for token in {t for t, output in zip(ids, is_output, strict=True) if output}:
        x[token] -= params.presence_penalty
    for token, bias in (params.logit_bias or {}).items():
        x[token] += bias
    return x


@pytest.mark.parametrize("seed", range(8))
def test_penalties_and_bias_match_the_reference(seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(1, VOCAB)).astype(np.float32)
    ids = rng.integers(0, 8, size=12).tolist()
    spans = ((4, 7), (9, 12))  # a tool returned tokens 7 and 8
    params = {"temperature": 0.0, "presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.3,
              "logit_bias": {3: 1.5, 40: -2.0}}  # fmt: skip
    tokens, state, logprobs = drawn(logits, [setup(2, ids, spans, **params)], [12], Variant.FULL)
    is_output = [any(a <= i < b for a, b in spans) for i in range(12)]
    expected = reference_penalties(logits[0], ids, is_output, SamplingParams(**params))
    assert int(tokens[0]) == int(expected.argmax())
    assert int(state.history[2, 12]) == int(tokens[0])
    raw = logits[0].astype(np.float64)
    log_softmax = raw - np.log(np.exp(raw).sum())
    np.testing.assert_allclose(logprobs.chosen[0], log_softmax[int(tokens[0])], rtol=1e-5)
    np.testing.assert_allclose(logprobs.top_values[0], np.sort(log_softmax)[::-1][:20], rtol=1e-5)
    assert int(logprobs.rank[0]) == 1 + int((raw > raw[int(tokens[0])]).sum())


def test_penalties_count_what_was_drawn_since_the_row_was_set():
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, 7], logits[0, 8] = 1.0, 0.5
    row = setup(1, temperature=0.0, presence_penalty=1.0)
    first, state, _ = drawn(logits, [row], [3], Variant.FULL)
    host = HostRows(ROWS, LENGTH, VOCAB)
    host.set(row)
    packed = jnp.asarray(host.params(np.array([1]), np.array([4]), 1))
    second, _, _ = draw(jnp.asarray(logits), unpack_params(packed), state, Variant.FULL)
    assert (int(first[0]), int(second[0])) == (7, 8)


def test_min_tokens_bans_the_stop_ids_until_it_is_reached():
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, 9], logits[0, 4] = 5.0, 1.0
    row = setup(0, temperature=0.0, min_tokens=2, stop=(9,))
    drawn_at = [int(drawn(logits, [row], [position], Variant.FULL)[0][0]) for position in (3, 4, 5)]
    assert drawn_at == [4, 4, 9]


def test_variant_is_the_cheapest_that_serves_all():
    host = HostRows(ROWS, LENGTH, VOCAB)
    for row, params in enumerate([{"temperature": 0.0}, {"temperature": 0.5}, {"logprobs": 0}]):
        host.set(setup(row, **params))
    assert host.variant(np.array([0])) is Variant.GREEDY
    assert host.variant(np.array([0, 1])) is Variant.RANDOM
    assert host.variant(np.array([0, 1, 2])) is Variant.FULL


def test_logprobs_of_counts_ties_once():
    out = logprobs_of(jnp.asarray([[1.0, 1.0, 0.0]], jnp.float32), jnp.asarray([1], jnp.int32))
    assert int(out.rank[0]) == 1


def masked_draw(logits, allowed, params, host=None, positions=(3,), state=None):
    """One row's draw under a mask: (token, log-probabilities)."""
    host = host or HostRows(ROWS, LENGTH, VOCAB)
    setup = RowSetup(0, 7, params, 5, (1, 2, 3), (), 3, (VOCAB - 1,))
    state = make_row_state(ROWS, LENGTH, VOCAB) if state is None else state
    if host.set(setup):
        state = set_row(state, np.int32(0), host.history(setup), host.bias(setup))
    rows = np.zeros(1, np.int32)
    bits = sum(1 << i for i in allowed).to_bytes(4 * -(-VOCAB // 32), "little")
    mask = host.masks(rows, (Mask(0, bits),), 2)
    packed = host.params(rows, np.asarray(positions, np.int32), 2)
    both = jnp.stack([jnp.asarray(logits)] * 2)
    tokens, _, logprobs = draw(both, unpack_params(packed), state, Variant.MASKED, jnp.asarray(mask))
    return int(tokens[0]), logprobs


@given(st.integers(0, 2**31), st.sets(st.integers(0, VOCAB - 1), min_size=1), st.sampled_from([0.0, 0.01, 1.0, 5.0]),
       st.sampled_from([0, 1, 5]), st.sampled_from([1.0, 0.5]), st.sampled_from([1.0, 1.5]))  # fmt: skip
def test_a_mask_comes_before_everything_else(seed, allowed, temperature, top_k, top_p, repetition):
    logits = np.random.default_rng(seed).normal(size=VOCAB).astype(np.float32) * 5
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=0.01, seed=seed,
                            repetition_penalty=repetition, logit_bias={3: 100.0}, logprobs=20)  # fmt: skip
    token, logprobs = masked_draw(logits, allowed, params)
    assert token in allowed
    best = max(sorted(allowed), key=lambda i: logits[i])
    exact = np.log(np.exp(logits[list(allowed)].astype(np.float64) - logits[best]).sum()) + logits[best]
    np.testing.assert_allclose(float(logprobs.top_values[0, 0]), logits[best] - exact, atol=1e-4)
    assert np.isfinite(np.asarray(logprobs.top_values[0])).all()
    np.testing.assert_allclose(float(logprobs.chosen[0]), logits[token] - exact, atol=1e-4)


def test_a_stop_token_that_min_tokens_bans_is_drawn_where_the_mask_leaves_no_other():
    for params in (
        SamplingParams(min_tokens=8, top_k=1, seed=1),
        SamplingParams(min_tokens=8, temperature=0),
        SamplingParams(min_tokens=8, temperature=0.01, top_p=0.5, min_p=0.2),
    ):
        assert masked_draw(np.zeros(VOCAB, np.float32), {VOCAB - 1}, params)[0] == VOCAB - 1


def test_rows_beyond_the_masks_and_words_beyond_a_mask():
    host = HostRows(ROWS, LENGTH, VOCAB)
    masks = host.masks(np.array([2, 0], np.int32), (Mask(0, b"\x01\x00\x00\x80"),), 3)
    assert masks.tolist() == [[0xFFFFFFFF] * 2, [0x80000001, 0], [0xFFFFFFFF] * 2]


def test_each_draw_of_a_row_has_a_mask_of_its_own():
    host = HostRows(ROWS, LENGTH, VOCAB)
    masks = (Mask(0, b"\x01\x00\x00\x00"), Mask(0, b"\x04\x00\x00\x00", 2))
    packed = host.masks(np.array([2, 0, 0, 0], np.int32), masks, 4)
    assert packed.tolist() == [[0xFFFFFFFF] * 2, [1, 0], [0xFFFFFFFF] * 2, [4, 0]]


def test_a_row_forgets_the_bias_of_the_sequence_that_had_it():
    host, state = HostRows(ROWS, LENGTH, VOCAB), make_row_state(ROWS, LENGTH, VOCAB)
    biased = RowSetup(0, 1, SamplingParams(logit_bias={9: 100.0}), 5, (1,), (), 1, ())
    assert host.set(biased)
    state = set_row(state, np.int32(0), host.history(biased), host.bias(biased))
    logits = np.zeros(VOCAB, np.float32)
    logits[4] = 1.0
    token, _ = masked_draw(logits, range(VOCAB), SamplingParams(temperature=0), host, state=state)
    assert token == 4
