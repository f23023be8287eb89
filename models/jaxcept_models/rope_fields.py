"""Rotary embeddings as config.json tells of them, in the fields of any vintage."""

from __future__ import annotations

from jaxcept_models.errors import CheckpointError
from jaxcept_models.fields import Fields
from jaxcept_models.rope import LinearScaling, Llama3Scaling, RopeConfig, Scaling, YarnScaling, yarn_attention_factor

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def read_rope(fields: Fields, head_dim: int, max_positions: int) -> tuple[RopeConfig, int]:
    """The rotation, and how many positions it reaches. transformers 5 writes rope_parameters, older ones two fields."""
    theta = fields.number("rope_theta", 10000.0)
    scaling = fields.section("rope_parameters") or fields.section("rope_scaling")
    if scaling is not None and scaling.is_nested:
        raise CheckpointError(f"{fields.path}: rope parameters that differ by layer are not supported")
    return read_scaled_rope(scaling, theta, head_dim, max_positions)


def read_scaled_rope(scaling: Fields | None, theta: float, head_dim: int, max_positions: int) -> tuple[RopeConfig, int]:
    """The rotation of one section of parameters, None where there is none, and how many positions it reaches."""
    if scaling is None:
        return RopeConfig(theta, head_dim), max_positions
    theta = scaling.number("rope_theta", theta)
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    if kind not in ROPE_TYPES:
        raise CheckpointError(f"{scaling.path}: rope type {kind!r} is not supported; supported are {ROPE_TYPES}")
    if scaling.number("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(f"{scaling.path}: partial_rotary_factor is not supported for this architecture")
    if kind == "default":
        return RopeConfig(theta, head_dim), max_positions
    factor = scaling.number("factor")
    if factor < 1:
        raise CheckpointError(f"{scaling.path}: rope factor {factor}: expected 1 or more")
    original = scaling.integer("original_max_position_embeddings", max_positions)
    spec: Scaling
    if kind == "linear":
        spec, reach = LinearScaling(factor), int(max_positions * factor)
    elif kind == "llama3":
        low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
        spec, reach = Llama3Scaling(factor, low, high, original), max_positions
    else:
        spec, reach = _yarn(scaling, factor, original), max(max_positions, int(original * factor))
    return RopeConfig(theta, head_dim, scaling=spec), reach


def _yarn(scaling: Fields, factor: float, original: int) -> YarnScaling:
    mscale, mscale_all_dim = scaling.number("mscale", 0.0), scaling.number("mscale_all_dim", 0.0)
    return YarnScaling(
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=scaling.number("attention_factor", yarn_attention_factor(factor, mscale, mscale_all_dim)),
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        truncate=scaling.flag("truncate", True),
    )
