"""Products with the matrix of each row's group, by all implementations (Pallas interpreted), and NumPy in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lowering import lowered

from jaxcept_kernels.attention import Implementation
from jaxcept_kernels.group_tiles import cut_groups
from jaxcept_kernels.grouped import grouped_linear
from jaxcept_kernels.library import native_available
from jaxcept_kernels.linear import pack_weight, unpack_weight
from jaxcept_kernels.pallas.grouped_linear import FEW, MANY, ProductTile, grouped_linear_pallas, tile_for

TOLERANCE = {"float32": 2e-6, "bfloat16": 8e-3, "float16": 2e-3}
GROUPS, ROWS = 7, 50
SMALL = ProductTile(rows=16, columns=32, depth=16, warps=4, stages=2)


def draw(dtype: str, features: int, out: int, seed: int = 0, groups: int = GROUPS, rows: int = ROWS) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    shapes = ((rows, features), (groups, features, out))
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32).astype(dtype) for shape in shapes]


def expected(x: jax.Array, weight: jax.Array, sizes: list[int]) -> np.ndarray:
    """[rows that have a group, out]"""
    matrices = np.asarray(weight, np.float64)[np.repeat(np.arange(len(sizes)), sizes)]
    return np.einsum("rk,rkn->rn", np.asarray(x, np.float64)[: sum(sizes)], matrices)


def products(dtype: str, sizes: list[int], x: jax.Array, weight: jax.Array) -> dict[str, np.ndarray]:
    """By whoever can compute them."""
    counts, out = jnp.asarray(sizes, jnp.int32), weight.shape[2]
    made = {
        "xla": COMPILED[Implementation.XLA](x, weight, counts),
        "pallas": COMPILED[Implementation.PALLAS](x, weight, counts),
        "small tiles": COMPILED["small"](x, weight, counts),
    }
    if dtype == "float32":
        made["native"] = exact(partial(grouped_linear, out_features=out))(x, pack_weight(weight), counts)
    return {name: np.asarray(product, np.float64) for name, product in made.items()}


def exact(product: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """On a GPU XLA would round the operands of float32 products."""

    def compute(*operands: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return product(*operands)

    return jax.jit(compute)


COMPILED = {
    **{each: exact(partial(grouped_linear, implementation=each)) for each in Implementation},
    "small": exact(partial(grouped_linear_pallas, tile=SMALL)),
}


@st.composite
def group_sizes(drawn: st.DrawFn) -> list[int]:
    """Rows of each group, empty ones and one that has all among them; the last rows may have no group."""
    sizes, left = [], ROWS
    for _ in range(GROUPS):
        sizes.append(min(left, drawn(st.sampled_from([0, 0, 1, 2, 15, 16, 17, 33, ROWS]))))
        left -= sizes[-1]
    return drawn(st.permutations(sizes))


@pytest.mark.parametrize(("dtype", "features", "out"), [("float32", 40, 72), ("bfloat16", 96, 64), ("float16", 33, 50)])
@settings(max_examples=15)
@given(sizes=group_sizes(), seed=st.integers(0, 9))
def test_any_groups(dtype: str, features: int, out: int, sizes: list[int], seed: int) -> None:
    """NaN lies in every row without a group, and in every matrix whose group has no rows."""
    x, weight = draw(dtype, features, out, seed)
    x = x.at[sum(sizes) :].set(jnp.nan)
    weight = jnp.where((np.asarray(sizes) == 0)[:, None, None], jnp.asarray(jnp.nan, dtype), weight)
    want = expected(x, weight, sizes)
    for name, product in products(dtype, sizes, x, weight).items():
        error = np.abs(product[: len(want)] - want)
        assert error.max(initial=0) <= TOLERANCE[dtype] * np.abs(want).max(initial=0), name


@pytest.mark.parametrize("row", [0, 15, 16, 30])
def test_a_row_that_is_not_finite_spoils_itself_alone(row: int) -> None:
    x, weight = draw("float32", 40, 72)
    sizes = [16, 0, 15, 4, 0, 1, 2]
    for name, product in products("float32", sizes, x.at[row].set(jnp.nan), weight).items():
        is_spoilt = np.isnan(product[: sum(sizes)]).any(axis=1)
        assert np.array_equal(np.flatnonzero(is_spoilt), [row]), name


@pytest.mark.parametrize(("rows", "sizes"), [(1, [0, 0, 1]), (1, [0, 0, 0]), (130, [130, 0, 0]), (130, [1, 128, 1])])
def test_one_row_and_many_of_one_group(rows: int, sizes: list[int]) -> None:
    x, weight = draw("float32", 64, 48, groups=3, rows=rows)
    want = expected(x, weight, sizes)
    for name, product in products("float32", sizes, x, weight).items():
        assert np.abs(product[: len(want)] - want).max(initial=0) <= 2e-6 * np.abs(want).max(initial=0), name


@pytest.mark.skipif(not native_available(), reason="needs the native kernels")
def test_a_row_has_the_same_bits_in_every_batch() -> None:
    x, weight = draw("float32", 300, 100)
    packed = pack_weight(weight)
    product = jax.jit(partial(grouped_linear, out_features=100))
    whole = product(x, packed, jnp.asarray([9, 0, 30, 1, 0, 2, 8], jnp.int32))
    alone = product(x[20:21], packed, jnp.asarray([0, 0, 1, 0, 0, 0, 0], jnp.int32))
    few = product(x[20:25], packed, jnp.asarray([0, 0, 5, 0, 0, 0, 0], jnp.int32))
    assert np.array_equal(whole[20:21], alone) and np.array_equal(whole[20:25], few)
    assert np.array_equal(unpack_weight(packed, 100), weight)


CUT = jax.jit(partial(cut_groups, num_rows=40, tile_rows=16))


@pytest.mark.parametrize(
    "sizes", [[5, 0, 16, 17, 0], [0, 0, 0, 0, 0], [40, 0, 0, 0, 0], [8, 8, 8, 8, 8], [1, 1, 1, 1, 33]]
)
def test_tiles_have_every_row_once(sizes: list[int]) -> None:
    tiles = CUT(jnp.asarray(sizes, jnp.int32))
    pairs = [
        (int(first) + i, int(group))
        for group, first, rows in zip(tiles.group, tiles.first, tiles.rows, strict=True)
        for i in range(int(rows))
    ]
    assert pairs == list(enumerate(np.repeat(np.arange(5), sizes).tolist()))
    assert int(tiles.num_used) == sum(-(-size // 16) for size in sizes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rows", [8, 8192])
def test_the_kernel_lowers_for_cuda(dtype: str, rows: int) -> None:
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape in ((rows, 256), (16, 256, 192))]
    product = partial(grouped_linear, implementation=Implementation.PALLAS)
    text = lowered(product, *shapes, jax.ShapeDtypeStruct((16,), jnp.int32))
    assert "triton" in text and "grouped_linear" in text


def test_tiles_go_by_the_rows_of_a_group() -> None:
    assert tile_for(8, 128, jnp.dtype(jnp.bfloat16)) == FEW == tile_for(1024, 128, jnp.dtype(jnp.bfloat16))
    assert tile_for(8192, 128, jnp.dtype(jnp.bfloat16)) == MANY
    with pytest.raises(ValueError, match="depth=24"):
        ProductTile(16, 32, 24, 4, 1)
    with pytest.raises(ValueError, match="warps=0"):
        ProductTile(16, 32, 32, 0, 1)


@pytest.mark.parametrize(
    ("x", "weight", "sizes", "message"),
    [
        ((3, 8), (2, 9, 4), 2, r"x of shape \(3, 8\): expected \[rows, 9\]"),
        ((3, 8), (8, 4), 2, r"weight of shape \(8, 4\)"),
        ((3, 8), (2, 1, 8, 15), 2, r"weight of shape \(2, 1, 8, 15\)"),
        ((3, 8), (2, 8, 4), 3, r"group_sizes of shape \(3,\): expected \[2\]"),
    ],
)
def test_shapes_that_do_not_fit_are_named(
    x: tuple[int, ...], weight: tuple[int, ...], sizes: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        grouped_linear(jnp.ones(x), jnp.ones(weight), jnp.zeros(sizes, jnp.int32))
