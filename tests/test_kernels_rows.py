"""argmax_rows is argmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcept_kernels.rows import argmax_rows


@pytest.mark.parametrize("columns", [1, 5, 64, 65, 1000, 32_000])
@pytest.mark.parametrize("values", [3, 10**9])
def test_argmax_rows_is_argmax_with_ties_to_the_first(columns: int, values: int) -> None:
    rng = np.random.default_rng(columns)
    logits = rng.integers(-values, values, (7, columns)).astype(np.float32)
    logits[0] = -np.inf
    got = jax.jit(argmax_rows)(jnp.asarray(logits))
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, np.argmax(logits, axis=-1))


def test_a_nan_counts_as_the_largest() -> None:
    logits = np.zeros((2, 200), np.float32)
    logits[0, 130], logits[1, 7] = np.nan, np.inf
    np.testing.assert_array_equal(argmax_rows(jnp.asarray(logits)), [130, 7])
