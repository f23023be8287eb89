"""Products with packed weights against NumPy in float64; a row has the same bits in every batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcept_kernels.library import native_available
from jaxcept_kernels.linear import PANEL, linear, lookup_rows, pack_weight

SHAPES = [(64, 64), (37, 100), (1, 1), (513, 16), (300, 17), (512, 1376), (2048, 96)]
BATCHES = [1, 2, 5, 7, 16, 25, 49, 250]


def random(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def assert_close(got: jax.Array, want: np.ndarray, terms: int) -> None:
    np.testing.assert_allclose(np.asarray(got), want, rtol=1e-5, atol=2e-6 * terms**0.5 * 4)


@pytest.mark.parametrize(("features", "out"), SHAPES)
def test_packed_product_is_the_product(features: int, out: int) -> None:
    rng = np.random.default_rng(features + out)
    weight = random(rng, features, out)
    packed = pack_weight(weight)
    assert packed.shape == (-(-out // PANEL), features, PANEL)
    product = jax.jit(linear, static_argnames="out_features")
    for i, tokens in enumerate(BATCHES):
        bias = random(rng, out) if i % 2 else None
        x = random(rng, tokens, features)
        want = np.asarray(x, np.float64) @ np.asarray(weight, np.float64)
        want = want if bias is None else want + np.asarray(bias, np.float64)
        assert_close(product(x, packed, bias=bias, out_features=out), want, features)
        assert_close(linear(x, weight, bias=bias), want, features)


def test_without_out_features_the_columns_of_all_panels_come_out() -> None:
    rng = np.random.default_rng(0)
    weight, x = random(rng, 8, 20), random(rng, 3, 8)
    got = linear(x, pack_weight(weight))
    assert got.shape == (3, 32)
    assert_close(got[:, :20], np.asarray(x, np.float64) @ np.asarray(weight, np.float64), 8)
    assert not np.asarray(got[:, 20:]).any()


def test_other_dtypes_take_xla() -> None:
    rng = np.random.default_rng(0)
    weight, x = random(rng, 32, 40).astype(jnp.bfloat16), random(rng, 3, 32).astype(jnp.bfloat16)
    got = linear(x, pack_weight(weight), out_features=40, bias=jnp.ones(40, jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    want = np.asarray(x, np.float64) @ np.asarray(weight, np.float64) + 1
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0.05, atol=0.1)


@pytest.mark.skipif(not native_available(), reason="needs the native kernels")
@pytest.mark.parametrize(("features", "out"), [(64, 64), (300, 17), (512, 1376)])
def test_a_row_has_the_same_bits_in_every_batch(features: int, out: int) -> None:
    rng = np.random.default_rng(1)
    packed, bias = pack_weight(random(rng, features, out)), random(rng, out)
    product = jax.jit(lambda x: linear(x, packed, bias=bias, out_features=out))
    x = random(rng, 250, features)
    alone = np.concatenate([np.asarray(product(x[i : i + 1])) for i in range(len(x))])
    for tokens in BATCHES:
        together = np.asarray(product(x[:tokens]))
        np.testing.assert_array_equal(together, alone[:tokens])


def test_lookup_rows_reads_a_table_from_its_packed_transpose() -> None:
    rng = np.random.default_rng(2)
    table = random(rng, 45, 24)
    ids = jnp.asarray([0, 44, 15, 16, 17, 3, 3], jnp.int32)
    np.testing.assert_array_equal(lookup_rows(pack_weight(table.T), ids), table[ids])


@pytest.mark.parametrize(
    ("x", "weight", "bias", "out_features", "message"),
    [
        ((3, 8), (9, 4), None, None, r"x of shape \(3, 8\): expected \[tokens, 9\]"),
        ((8,), (8, 4), None, None, r"x of shape \(8,\)"),
        ((3, 8), (8, 4), (5,), None, r"bias of shape \(5,\): expected \[4\]"),
        ((3, 8), (2, 8, 16), None, 33, "out_features=33"),
        ((3, 8), (2, 8, 16), None, 16, "out_features=16"),
        ((3, 8), (2, 8, 15), None, None, r"weight of shape \(2, 8, 15\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(
    x: tuple[int, ...], weight: tuple[int, ...], bias: tuple[int, ...] | None, out_features: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        linear(jnp.ones(x), jnp.ones(weight), bias=None if bias is None else jnp.ones(bias), out_features=out_features)
