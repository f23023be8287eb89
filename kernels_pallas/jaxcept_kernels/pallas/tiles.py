"""Tile sizes of the attention kernel, as data per kind of device."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tile:
    """Sizes of one launch, for two-byte elements and 128 values a head."""

    rows: int  # least rows of a matrix tile: queries times the query heads of a KV head
    keys: int  # keys of an iteration
    warps: int
    stages: int  # iterations whose loads are under way at once

    def __post_init__(self) -> None:
        for name in ("rows", "keys"):
            value = getattr(self, name)
            if value < 16 or value & (value - 1):
                raise ValueError(f"{name}={value}: expected a power of two, 16 or more")
        for name in ("warps", "stages"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected 1 or more")


@dataclass(frozen=True, slots=True)
class AttentionTiles:
    """How a device's launches are cut."""

    decode: Tile
    prefill: Tile
    programs: int  # programs that fill the device; with fewer tiles, contexts are split
    max_splits: int = 16

    def __post_init__(self) -> None:
        for name in ("programs", "max_splits"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected 1 or more")


# Chosen by the register counts of offline compilations for sm_80 and sm_90, not by timings.
DEFAULT = AttentionTiles(
    decode=Tile(rows=16, keys=64, warps=4, stages=2),
    prefill=Tile(rows=64, keys=64, warps=8, stages=2),
    programs=216,
)
# Two programs for each multiprocessor: 108 on an A100, 132 on Hopper.
BY_DEVICE_KIND = {
    "NVIDIA A100-SXM4-40GB": DEFAULT,
    "NVIDIA A100-SXM4-80GB": DEFAULT,
    "NVIDIA H100 80GB HBM3": AttentionTiles(DEFAULT.decode, DEFAULT.prefill, programs=264),
    "NVIDIA H200": AttentionTiles(DEFAULT.decode, DEFAULT.prefill, programs=264),
}


def tiles_for(device_kind: str) -> AttentionTiles:
    """The sizes for a kind of device as JAX names it; the default for an unknown one."""
    return BY_DEVICE_KIND.get(device_kind, DEFAULT)
