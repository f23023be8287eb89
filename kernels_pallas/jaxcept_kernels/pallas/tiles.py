"""Tile sizes of the attention kernel, kept as data per kind of device in tiles.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

DATA = Path(__file__).with_name("tiles.json")
DEFAULT_KIND = "default"


@dataclass(frozen=True, slots=True)
class Tile:
    """Sizes of one launch."""

    rows: int  # least rows of a matrix tile: queries times the query heads of a KV head
    keys: int  # keys of an iteration
    warps: int
    stages: int  # iterations whose keys and values are in shared memory or on their way there

    def __post_init__(self) -> None:
        check_tile(self, ("rows", "keys"))


def check_tile(tile: object, sizes: tuple[str, ...]) -> None:
    """ValueError, naming the field, unless these are powers of two from 16 on and there are warps and stages."""
    for name in sizes:
        value = getattr(tile, name)
        if value < 16 or value & (value - 1):
            raise ValueError(f"{name}={value}: expected a power of two, 16 or more")
    for name in ("warps", "stages"):
        if getattr(tile, name) < 1:
            raise ValueError(f"{name}={getattr(tile, name)}: expected 1 or more")


@dataclass(frozen=True, slots=True)
class AttentionTiles:
    """How a device's launches are cut, for two-byte elements."""

    decode: Tile  # for 128 values a head
    prefill: Tile  # for 128 values a head
    wide_prefill: Tile  # for 256
    programs: int  # programs that fill the device; with fewer tiles, contexts are split
    max_splits: int = 16

    def __post_init__(self) -> None:
        for name in ("programs", "max_splits"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected 1 or more")


@dataclass(frozen=True, slots=True)
class TileEntry:
    """The sizes for a kind of device, and where they came from."""

    tiles: AttentionTiles
    source: str


def read_tiles(path: Path = DATA) -> dict[str, TileEntry]:
    """The data file by kind of device. ValueError that names what is wrong with it."""
    entries = {}
    for kind, fields in json.loads(path.read_text(encoding="utf-8")).items():
        try:
            decode, prefill, wide = (Tile(**fields[name]) for name in ("decode", "prefill", "wide_prefill"))
            tiles = AttentionTiles(decode, prefill, wide, fields["programs"], fields["max_splits"])
            entries[kind] = TileEntry(tiles, fields["source"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: {kind!r}: {error}") from error
    if DEFAULT_KIND not in entries:
        raise ValueError(f"{path}: expected sizes for {DEFAULT_KIND!r}")
    return entries


def write_tiles(entries: Mapping[str, TileEntry], path: Path = DATA) -> None:
    """Writes what `read_tiles` reads, a line per launch."""
    blocks = []
    for kind, entry in entries.items():
        fields: dict[str, Any] = {"source": entry.source, **asdict(entry.tiles)}
        lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items())
        blocks.append(f"  {json.dumps(kind)}: {{\n{lines}\n  }}")
    path.write_text("{\n" + ",\n".join(blocks) + "\n}\n", encoding="utf-8")


ENTRIES: Mapping[str, TileEntry] = read_tiles()


def entry_for(device_kind: str, entries: Mapping[str, TileEntry] = ENTRIES) -> TileEntry:
    """The entry with the longest name that the device's begins with, so that one covers a family; else the default."""
    names = [name for name in entries if device_kind.startswith(name)]
    return entries[max(names, key=len, default=DEFAULT_KIND)]


def tiles_for(device_kind: str) -> AttentionTiles:
    """The sizes for a kind of device as JAX names it; the default for an unknown one."""
    return entry_for(device_kind).tiles
