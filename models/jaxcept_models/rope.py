"""Rotary position embeddings: frequencies from the config, tables from positions, the rotation itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

Frequencies = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Positions divided by `factor` (position interpolation, Chen et al. 2023, arXiv:2306.15595)."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, the band between them blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): interpolation per frequency, and `attention_factor` on cos and sin."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float
    beta_slow: float
    truncate: bool


Scaling = LinearScaling | Llama3Scaling | YarnScaling


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """The first `rotary_dim` entries of every query and key head are rotated.

    `interleaved` says how the checkpoint pairs them: (0, 1), (2, 3), … or (0, rotary_dim / 2), …. The loader brings
    the former into the order of the latter, which leaves every q · k as it was, so that `rotate` knows one order.
    """

    theta: float
    rotary_dim: int
    interleaved: bool = False
    scaling: Scaling | None = None

    def __post_init__(self) -> None:
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ValueError(f"rotary_dim={self.rotary_dim}: expected an even number, 2 or more")
        if self.theta <= 0:
            raise ValueError(f"rope theta={self.theta}: expected a positive number")


class RotaryTables(NamedTuple):
    """Cosines and sines of one batch, shared by all layers."""

    cos: jax.Array  # [tokens, rotary_dim / 2] float32
    sin: jax.Array  # [tokens, rotary_dim / 2] float32


def inverse_frequencies(rope: RopeConfig) -> Frequencies:  # [rotary_dim / 2]
    """Radians per position of each pair, scaling included, in float32 as the models were trained."""
    exponents = np.arange(0, rope.rotary_dim, 2).astype(np.float32) / np.float32(rope.rotary_dim)
    plain = (np.float32(1) / np.float32(rope.theta) ** exponents).astype(np.float32)
    match rope.scaling:
        case None:
            return plain
        case LinearScaling(factor):
            return (plain / np.float32(factor)).astype(np.float32)
        case Llama3Scaling():
            return _llama3(plain, rope.scaling)
        case YarnScaling():
            return _yarn(plain, rope, rope.scaling)


def _llama3(plain: Frequencies, scaling: Llama3Scaling) -> Frequencies:
    turns = scaling.original_max_position_embeddings * plain / np.float32(2 * math.pi)  # over the original context
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = np.clip(blend, 0, 1).astype(np.float32)
    blended: Frequencies = ((1 - blend) * plain / np.float32(scaling.factor) + blend * plain).astype(np.float32)
    return blended


def _yarn(plain: Frequencies, rope: RopeConfig, scaling: YarnScaling) -> Frequencies:
    def pair_of(turns: float) -> float:
        """The index, with its fraction, of the pair that turns this often over the original context."""
        wavelength = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return rope.rotary_dim * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    ramp = (np.arange(rope.rotary_dim // 2, dtype=np.float32) - low) / max(high - low, 0.001)
    stretched = np.clip(ramp, 0, 1).astype(np.float32)
    blended: Frequencies = plain / np.float32(scaling.factor) * stretched + plain * (1 - stretched)
    return blended.astype(np.float32)


def yarn_attention_factor(factor: float, mscale: float = 0.0, mscale_all_dim: float = 0.0) -> float:
    """The amplitude of cos and sin that YaRN derives from its factor where the config gives none."""

    def amplitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    return amplitude(mscale) / amplitude(mscale_all_dim) if mscale and mscale_all_dim else amplitude(1.0)


def rotary_tables(
    positions: jax.Array,  # [tokens] int32
    rope: RopeConfig,
) -> RotaryTables:
    """Cosines and sines of every position, in float32 whatever the model's dtype."""
    angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(inverse_frequencies(rope))[None, :]
    amplitude = rope.scaling.attention_factor if isinstance(rope.scaling, YarnScaling) else 1.0
    # XLA fuses cosines and sines into every use, so computes them for every head of every layer. It fuses no product
    # of matrices into its uses, and one with the identity is exact.
    identity = jnp.eye(rope.rotary_dim // 2, dtype=jnp.float32)
    cos, sin = (jnp.dot(part(angles), identity, precision=jax.lax.Precision.HIGHEST) for part in (jnp.cos, jnp.sin))
    return RotaryTables(cos * amplitude, sin * amplitude)


def rotate(
    x: jax.Array,  # [tokens, heads, head_dim]
    tables: RotaryTables,
) -> jax.Array:
    """Pair i of each head is (x[i], x[i + rotary_dim / 2]); entries from rotary_dim on stay. Shape and dtype of x."""
    half = tables.cos.shape[-1]
    cos, sin = tables.cos[:, None, :], tables.sin[:, None, :]
    first, second = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return turned if x.shape[-1] == 2 * half else jnp.concatenate([turned, x[..., 2 * half :]], axis=-1)
