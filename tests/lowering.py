"""Programs lowered for a GPU that is not there."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

A100 = AbstractMesh(
    (1,), ("heads",), abstract_device=AbstractDevice("NVIDIA A100-SXM4-80GB", num_cores=108, platform="gpu")
)


def lowered(function: Callable[..., object], *args: object) -> str:
    """The text of a program for an A100."""
    with use_abstract_mesh(A100):
        return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
