"""Rotary frequencies and tables against transformers' own, and the rotation against its definition."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from jaxcept_models.rope import (
    LinearScaling,
    Llama3Scaling,
    RopeConfig,
    RotaryTables,
    YarnScaling,
    inverse_frequencies,
    rotary_tables,
    rotate,
    yarn_attention_factor,
)

LLAMA31 = Llama3Scaling(8.0, 1.0, 4.0, 8192)
QWEN = YarnScaling(4.0, 32768, yarn_attention_factor(4.0), 32.0, 1.0, truncate=True)
CASES: list[tuple[RopeConfig, dict[str, Any]]] = [
    (RopeConfig(10000.0, 64, scaling=LinearScaling(2.5)), {"rope_type": "linear", "factor": 2.5}),
    (
        RopeConfig(500000.0, 128, scaling=LLAMA31),
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    (
        RopeConfig(1e6, 128, scaling=QWEN),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    ),
    (
        RopeConfig(
            1e4, 64, scaling=YarnScaling(40.0, 4096, yarn_attention_factor(40.0, 0.7, 0.9), 24.0, 2.0, truncate=False)
        ),
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "mscale": 0.7,
            "mscale_all_dim": 0.9,
            "beta_fast": 24.0,
            "beta_slow": 2.0,
            "truncate": False,
        },
    ),
]


@pytest.mark.parametrize(("rope", "parameters"), CASES, ids=lambda case: str(getattr(case, "theta", "")))
def test_scaled_frequencies_are_those_of_transformers(rope: RopeConfig, parameters: dict[str, Any]) -> None:
    config = transformers.LlamaConfig(
        hidden_size=rope.rotary_dim * 4,
        num_attention_heads=4,
        max_position_embeddings=131072,
        rope_parameters=parameters | {"rope_theta": rope.theta},
    )
    expected, amplitude = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"))
    np.testing.assert_allclose(inverse_frequencies(rope), expected.numpy(), rtol=1e-6)
    ours = rope.scaling.attention_factor if isinstance(rope.scaling, YarnScaling) else 1.0
    assert ours == pytest.approx(amplitude)


def test_tables_hold_at_the_far_end_of_a_long_context() -> None:
    positions = np.array([0, 1, 4095, 131071], np.int32)
    tables = rotary_tables(jnp.asarray(positions), RopeConfig(500000.0, 128))
    angles = positions.astype(np.float32)[:, None] * inverse_frequencies(RopeConfig(500000.0, 128))
    np.testing.assert_allclose(tables.cos, np.cos(angles.astype(np.float64)), atol=2e-6)
    np.testing.assert_allclose(tables.sin, np.sin(angles.astype(np.float64)), atol=2e-6)


def test_yarn_amplifies_both_tables() -> None:
    tables = rotary_tables(jnp.arange(3), RopeConfig(1e6, 128, scaling=QWEN))
    np.testing.assert_allclose(np.hypot(tables.cos, tables.sin), 0.1 * np.log(4) + 1, rtol=1e-6)


def test_rotation_turns_pairs_and_leaves_the_rest() -> None:
    x = jnp.asarray(np.arange(1.0, 7.0, dtype=np.float32).reshape(1, 1, 6))
    quarter = RotaryTables(jnp.array([[0.0, 1.0]]), jnp.array([[1.0, 0.0]]))  # pair (0, 2) by 90°, pair (1, 3) not
    assert rotate(x, quarter).tolist() == [[[-3.0, 2.0, 1.0, 4.0, 5.0, 6.0]]]


def test_scores_depend_on_distance_alone() -> None:
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(np.tile(rng.normal(size=(1, 1, 16)), (4, 1, 1)), jnp.float32) for _ in range(2))
    rope = RopeConfig(10000.0, 16)
    turned_q = rotate(q, rotary_tables(jnp.array([5, 9, 100, 1000]), rope))
    turned_k = rotate(k, rotary_tables(jnp.array([2, 6, 97, 997]), rope))
    scores = np.einsum("thd,thd->t", turned_q, turned_k)
    np.testing.assert_allclose(scores, scores[0], rtol=1e-4)


@pytest.mark.parametrize("rotary_dim", [0, 7, -2])
def test_an_odd_or_empty_rotation_is_refused(rotary_dim: int) -> None:
    with pytest.raises(ValueError, match=f"rotary_dim={rotary_dim}"):
        RopeConfig(10000.0, rotary_dim)
