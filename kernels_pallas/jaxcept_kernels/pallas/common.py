"""What every kernel's launch has in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

MOST_SIGNED = 1 << 31  # offsets that 32 bits with a sign can tell


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel, its grid and its results; operands and results stay in global memory."""

    name: str
    kernel: Callable[..., None]
    grid: tuple[int, ...]
    results: Sequence[jax.ShapeDtypeStruct]
    warps: int = 4
    stages: int = 1
    aliases: Mapping[int, int] | None = None  # operand: the result that takes its place

    def __call__(self, *operands: jax.Array) -> tuple[jax.Array, ...]:
        """The results. The CPU interprets the kernel, whichever platform the trace is lowered for later.

        ValueError for an operand of a size that Pallas addresses wrongly.
        """
        for operand in operands:
            if not can_address(operand.size, operand.dtype.itemsize):
                raise ValueError(
                    f"{self.name}: Pallas cannot address {operand.size:,} elements of one byte (more than 2**31, up to "
                    "2**32); choose fewer blocks, or more than that"
                )

        def build(interpret: bool) -> Callable[..., tuple[jax.Array, ...]]:
            def call(*operands: jax.Array) -> tuple[jax.Array, ...]:
                anywhere = pl.BlockSpec(memory_space=pl.ANY)
                launched: Any = pl.pallas_call(
                    self.kernel,
                    out_shape=tuple(self.results),
                    grid=self.grid,
                    in_specs=[anywhere] * len(operands),
                    out_specs=tuple(anywhere for _ in self.results),
                    input_output_aliases=dict(self.aliases or {}),
                    compiler_params=pltriton.CompilerParams(num_warps=self.warps, num_stages=self.stages),
                    interpret=interpret,
                    name=self.name,
                )
                return tuple(launched(*operands))

            return call

        out: tuple[jax.Array, ...] = lax.platform_dependent(*operands, cpu=build(True), default=build(False))
        return out


def power_of_two(size: int, at_least: int = 1) -> int:
    """The least power of two that is no less than both numbers."""
    return max(at_least, 1 << (size - 1).bit_length())


def can_address(elements: int, itemsize: int) -> bool:
    """Whether Pallas finds every element of such an array.

    It takes offsets of 32 bits for arrays of up to 2**32 bytes, and Triton reads them with a sign: elements of one byte
    past 2**31 would lie before the array (jax/_src/pallas/triton/lowering.py, `_compute_offsets_from_indices`).
    """
    return itemsize > 1 or not MOST_SIGNED < elements <= 2 * MOST_SIGNED


def device_kind() -> str:
    """The kind of device that is traced for: that of the ambient mesh if there is one, else the default device's."""
    meant = jax.sharding.get_abstract_mesh().abstract_device
    kind: str = jax.devices()[0].device_kind if meant is None else meant.device_kind
    return kind
