"""Where each array of a model comes from: which tensors of a checkpoint fill which of its rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from jaxcept_models.config import ModelConfig
from jaxcept_models.sharding import gate_block, spread_kv_heads

Rows = npt.NDArray[np.intp]


class Part(NamedTuple):
    """A tensor of the checkpoint and the row of the array that each of its rows becomes; None for all in their order.

    Rows are counted as the checkpoint stores them: a matrix is [out, in] there, so its rows are output features.
    `entry` is for an array of several matrices, [entries, out, in]: the one that the rows are of.
    """

    tensor: str
    rows: Rows | None = None
    entry: int | None = None


WeightMap = Mapping[str, tuple[Part, ...]]  # by the array's path in the module, such as layers.0.mlp.down.weight


class ExpertNames(NamedTuple):
    """What a checkpoint calls the matrices of an expert."""

    gate: str
    up: str
    down: str


class FusedRows(NamedTuple):
    """Rows of the fused arrays, the same in every layer."""

    q: Rows
    k: tuple[Rows, ...]  # one for each copy of the KV heads
    v: tuple[Rows, ...]
    gate: Rows
    up: Rows

    def qkv(self, prefix: str, names: tuple[str, str, str], kind: str) -> tuple[Part, ...]:
        """Query, key and value by kv head."""
        return tuple(
            Part(f"{prefix}.{name}.{kind}", rows)
            for name, copies in zip(names, ((self.q,), self.k, self.v), strict=True)
            for rows in copies
        )

    def gate_up(self, prefix: str, kind: str) -> tuple[Part, ...]:
        """Gate and up in alternating blocks."""
        return (Part(f"{prefix}.gate_proj.{kind}", self.gate), Part(f"{prefix}.up_proj.{kind}", self.up))

    def experts(self, prefix: str, count: int, names: ExpertNames) -> dict[str, tuple[Part, ...]]:
        """The matrices of all experts, gate and up in alternating blocks."""
        each = [(entry, f"{prefix}.experts.{entry}") for entry in range(count)]
        fused = ((names.gate, self.gate), (names.up, self.up))
        return {
            "router.weight": (Part(f"{prefix}.gate.weight"),),
            "gate_up.weight": tuple(
                Part(f"{expert}.{name}.weight", rows, entry) for entry, expert in each for name, rows in fused
            ),
            "down.weight": tuple(Part(f"{expert}.{names.down}.weight", entry=entry) for entry, expert in each),
        }


def fused_rows(config: ModelConfig, tensor: int = 1) -> FusedRows:
    """How this package lays out what a checkpoint holds apart; see layers.Attention, layers.GatedMLP, experts.Experts.

    Where `tensor` devices are more than there are KV heads, each head comes several times, its queries shared out.
    """
    copies = max(1, tensor // config.num_kv_heads)
    config = spread_kv_heads(config, tensor)
    group, dim = config.num_heads // config.num_kv_heads, config.head_dim
    places = np.arange(config.num_kv_heads * (group + 2) * dim).reshape(config.num_kv_heads, group + 2, dim)
    if config.rope.interleaved:
        places[:, : group + 1] = places[:, : group + 1][:, :, _pairs_to_halves(config)]
    block = gate_block(config.intermediate_size)
    blocks = np.arange(2 * config.intermediate_size).reshape(-1, 2, block)
    return FusedRows(
        q=places[:, :group].ravel(),
        k=tuple(places[copy::copies, group].ravel() for copy in range(copies)),
        v=tuple(places[copy::copies, group + 1].ravel() for copy in range(copies)),
        gate=blocks[:, 0].ravel(),
        up=blocks[:, 1].ravel(),
    )


def _pairs_to_halves(config: ModelConfig) -> Rows:
    """Where entry j of a head goes when pairs (0, 1), (2, 3), … of r entries become (0, r / 2), (1, r / 2 + 1), …"""
    places = np.arange(config.head_dim)
    rotary = config.rope.rotary_dim
    places[:rotary] = np.arange(rotary).reshape(2, rotary // 2).T.ravel()
    return places
