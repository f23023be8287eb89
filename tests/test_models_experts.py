"""The experts' layer by itself, against NumPy in float64; what padding holds reaches nobody."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxcept_kernels.attention import Implementation
from jaxcept_models.config import ModelConfig
from jaxcept_models.experts import Experts, Router, sort_rows
from jaxcept_models.rope import RopeConfig
from jaxcept_models.sharding import ALONE

HIDDEN, SIZE, EXPERTS, TAKEN = 32, 24, 6, 3
FLOAT32 = jnp.dtype(jnp.float32)


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """On a GPU XLA would round the operands of float32 products."""
    with jax.default_matmul_precision("highest"):
        yield


def make_config(*, norm_topk_prob: bool) -> ModelConfig:
    return ModelConfig(
        "Qwen3MoeForCausalLM", 1, HIDDEN, 4, 2, 8, SIZE, 64, 64, 1e-5, RopeConfig(1e4, 8),
        num_experts=EXPERTS, num_experts_per_token=TAKEN, norm_topk_prob=norm_topk_prob,
    )  # fmt: skip


def make_experts(implementation: Implementation, *, norm_topk_prob: bool = True) -> Experts:
    layer = Experts(make_config(norm_topk_prob=norm_topk_prob), FLOAT32, implementation, ALONE)
    rng = np.random.default_rng(0)
    for part in (layer.router, layer.gate_up, layer.down):
        part.weight[...] = jnp.asarray(0.3 * rng.standard_normal(part.weight.shape), jnp.float32)
    return layer


def expected(layer: Experts, x: np.ndarray) -> np.ndarray:
    """Token by token, in float64."""
    router, gate_up, down = (
        np.asarray(part.weight[...], np.float64) for part in (layer.router, layer.gate_up, layer.down)
    )
    columns = gate_up.reshape(EXPERTS, HIDDEN, -1, 2, layer.block)
    gate, up = (columns[:, :, :, i].reshape(EXPERTS, HIDDEN, SIZE) for i in range(2))
    made = np.zeros(x.shape)
    for token, row in enumerate(x.astype(np.float64)):
        shares = np.exp(row @ router)
        taken = np.argsort(-shares)[:TAKEN]
        shares /= shares[taken].sum() if layer.router.norm_topk_prob else shares.sum()
        for expert in taken:
            gated = row @ gate[expert]
            made[token] += shares[expert] * (gated / (1 + np.exp(-gated)) * (row @ up[expert])) @ down[expert]
    return made


@pytest.mark.parametrize(
    ("implementation", "norm_topk_prob"), [*((each, True) for each in Implementation), (Implementation.XLA, False)]
)
def test_tokens_are_the_shares_of_their_experts(implementation: Implementation, norm_topk_prob: bool) -> None:
    """Padding is NaN, and so are the matrices of experts that nobody takes."""
    layer = make_experts(implementation, norm_topk_prob=norm_topk_prob)
    x = np.random.default_rng(1).standard_normal((20, HIDDEN)).astype(np.float32)
    want = expected(layer, x)
    run = jax.jit(lambda layer, x, count: layer(x, count))
    for count in (20, 7, 1, 0):
        padded = x.copy()
        padded[count:] = np.nan
        taken = np.unique(layer.router(jnp.asarray(x[:count])).expert) if count else []
        spoilt = nnx.clone(layer)
        for part in (spoilt.gate_up, spoilt.down):
            is_idle = ~np.isin(np.arange(EXPERTS), taken)
            part.weight[...] = jnp.where(is_idle[:, None, None], jnp.nan, part.weight[...])
        made = np.asarray(run(spoilt, jnp.asarray(padded), jnp.int32(count)))
        assert np.abs(made[:count] - want[:count]).max(initial=0) < 2e-6 * np.abs(want).max()
        assert not made[count:].any()


def test_rows_are_sorted_by_expert_and_come_back() -> None:
    expert = jnp.asarray([[2, 0], [1, 2], [2, 1], [0, 1]], jnp.int32)
    rows = jax.jit(partial(sort_rows, num_experts=4))(expert, jnp.int32(3))
    assert rows.sizes.tolist() == [1, 2, 3, 0]
    assert rows.token.tolist() == [0, 1, 2, 0, 1, 2, 3, 3]
    assert rows.row.tolist() == [[3, 0], [1, 4], [5, 2], [6, 7]]


def test_of_equal_logits_the_first_experts_are_taken() -> None:
    router = Router(make_config(norm_topk_prob=False), FLOAT32, Implementation.XLA)
    routes = router(jnp.ones((2, HIDDEN), jnp.float32))
    assert routes.expert.tolist() == [[0, 1, 2]] * 2
    np.testing.assert_allclose(routes.share, 1 / EXPERTS, rtol=1e-6)


def test_logits_are_wider_than_the_model() -> None:
    """Two experts whose logits round to the same bfloat16 keep their order."""
    router = Router(make_config(norm_topk_prob=True), jnp.dtype(jnp.bfloat16), Implementation.XLA)
    weight = np.zeros((HIDDEN, EXPERTS), np.float32)
    weight[:2, 3], weight[:2, 5] = [256, 0], [256, 0.25]
    router.weight[...] = jnp.asarray(weight, jnp.bfloat16)
    routes = router(jnp.ones((1, HIDDEN), jnp.bfloat16))
    assert routes.expert[0, :2].tolist() == [5, 3] and routes.share[0, 0] > routes.share[0, 1]
