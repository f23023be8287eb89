"""Sweeps tile sizes of the attention kernel on the GPU at hand, and writes the fastest into the data file.

    python benchmarks/tune_tiles.py --out DIR [--budget 500]

A launch's tile is chosen for all shapes that it serves at once, by the geometric mean of its times; what does not
compile, does not fit shared memory or gives other results than the default is out. With the tiles chosen, the number of
programs and of splits is swept on few sequences of long contexts. DIR/tiles.json is the whole data file with this
device's entry; `--write` puts it into the package.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # in a checkout that is not installed too
    sys.path[:0] = [str(ROOT / part) for part in (".", "kernels_pallas", "models", "serve")]

if TYPE_CHECKING:
    from benchmarks.kernels_attention import Group
    from benchmarks.kernels_cases import Prefill, Preset
    from benchmarks.kernels_timing import Deadline
    from jaxcept_kernels.layout import KVPool
    from jaxcept_kernels.pallas.tiles import AttentionTiles, Tile, TileEntry

POOL_BYTES = 4 << 30
AT_ONCE = 24  # candidates compiled together
ROUNDS = 3
MULTIPROCESSORS = 108  # where the device does not tell

# Seconds of a call by candidate; and what measures them for one case, on each shape whose head size is wanted.
Times = Mapping["AttentionTiles", float]
Wanted = Callable[[int], bool]
Measure = Callable[["Prefill", Wanted, Sequence["AttentionTiles"], "Deadline"], list[Times]]


def main(argv: Sequence[str] | None = None) -> int:
    """0 where an entry was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for tiles.json and tune.md")
    parser.add_argument("--budget", type=float, default=500.0, help="seconds (default: %(default)g)")
    parser.add_argument("--write", action="store_true", help="write the package's data file too")
    args = parser.parse_args(argv)
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    import jax

    from benchmarks.kernels_cases import PRESETS
    from benchmarks.kernels_timing import Deadline
    from jaxcept_kernels.pallas.tiles import read_tiles, tiles_for, write_tiles

    device = jax.devices()[0]
    if device.platform != "gpu":
        raise SystemExit(f"tune_tiles: {device.device_kind}: the kernels are interpreted here; run this on a GPU")
    deadline = Deadline.after(args.budget)
    preset = replace(PRESETS["full"], pool_bytes=POOL_BYTES, rounds=ROUNDS)
    log: list[str] = []
    chosen = choose(tiles_for(device.device_kind), multiprocessors(device), measurer(preset), deadline, log)
    entry = make_entry(chosen, jax.__version__, log)
    args.out.mkdir(parents=True, exist_ok=True)
    write_tiles({**read_tiles(), device.device_kind: entry}, args.out / "tiles.json")
    (args.out / "tune.md").write_text("\n".join([f"# Tiles on {device.device_kind}", "", *log, ""]), encoding="utf-8")
    if args.write:
        write_tiles({**read_tiles(), device.device_kind: entry})
    print("\n".join([*log[-8:], str(chosen)]))
    return 0


def multiprocessors(device: Any) -> int:
    """As the device tells."""
    return int(getattr(device, "core_count", None) or MULTIPROCESSORS)


def make_entry(tiles: AttentionTiles, jax_version: str, log: Sequence[str]) -> TileEntry:
    """The data file's entry, with where it came from."""
    from jaxcept_kernels.pallas.tiles import TileEntry

    gains = "; ".join(line.removeprefix("- ") for line in log if line.startswith("- chosen"))
    return TileEntry(
        tiles, f"measured {time.strftime('%Y-%m-%d')} with jax {jax_version}, benchmarks/tune_tiles.py; {gains}"
    )


def decode_tiles() -> Iterator[Tile]:
    """Candidates of decodes: a group's queries fill few rows, so keys, warps and stages are what there is."""
    from jaxcept_kernels.pallas.tiles import Tile

    yield from (Tile(16, *sizes) for sizes in product((64, 32, 128), (4, 2, 8), (2, 3, 4, 1)))


def prefill_tiles() -> Iterator[Tile]:
    """Candidates of prefill chunks: 16 rows for each warp before others."""
    from jaxcept_kernels.pallas.tiles import Tile

    yield from (Tile(*sizes) for sizes in product((128, 64, 32), (64, 32, 128), (8, 4), (2, 3, 1)))


def wide_prefill_tiles() -> Iterator[Tile]:
    """Candidates of prefill chunks for heads of 256 values."""
    from jaxcept_kernels.pallas.tiles import Tile

    yield from (Tile(*sizes) for sizes in product((128, 64), (32, 16, 64), (8, 4), (2, 1)))


def choose(start: AttentionTiles, cores: int, measure: Measure, deadline: Deadline, log: list[str]) -> AttentionTiles:
    """The fastest sizes: decode tile, prefill tiles, then programs and splits. What the time leaves out stays."""
    from benchmarks.kernels_cases import Prefill
    from benchmarks.kernels_timing import parts_of

    decodes, chunks = (Prefill(32, 1, 2048),), (Prefill(1, 2048, 4096),)
    rounds: list[tuple[str, tuple[Prefill, ...], Wanted, Callable[[AttentionTiles], Iterable[AttentionTiles]]]] = [
        ("decode", decodes, any_head, lambda best: (replace(best, decode=tile) for tile in decode_tiles())),
        ("prefill", chunks, narrow, lambda best: (replace(best, prefill=tile) for tile in prefill_tiles())),
        ("wide prefill", chunks, wide, lambda best: (replace(best, wide_prefill=t) for t in wide_prefill_tiles())),
        (
            "splits",
            (Prefill(1, 1, 8192), Prefill(8, 1, 4096)),
            any_head,
            lambda best: (
                replace(best, programs=cores * times, max_splits=splits)
                for times, splits in product((2, 1, 4, 8), (16, 8, 32, 64))
            ),
        ),
    ]
    best = start
    for (name, cases, heads, candidates), until in parts_of(deadline, tuple(rounds)):
        if until.left_s <= 0:
            log.append(f"- {name}: out of time")
            continue
        wanted = list(dict.fromkeys([best, *candidates(best)]))
        times = [each for case, part in parts_of(until, cases) for each in measure(case, heads, wanted, part)]
        best = pick(name, best, wanted, times, log)
    return best


def any_head(head_dim: int) -> bool:
    """Shapes of every head size."""
    return head_dim > 0


def narrow(head_dim: int) -> bool:
    """Shapes that `prefill` is for."""
    return head_dim <= 128


def wide(head_dim: int) -> bool:
    """Shapes that `wide_prefill` is for."""
    return head_dim > 128


def pick(
    name: str,
    current: AttentionTiles,
    wanted: Sequence[AttentionTiles],
    times: Sequence[Times],
    log: list[str],
) -> AttentionTiles:
    """The candidate with the least geometric mean of those that ran in every case; the log gets a table."""
    complete = [tiles for tiles in wanted if all(tiles in case for case in times)]
    if not times or not complete:
        log.append(f"- {name}: nothing ran in every case; {current} stays")
        return current
    means = {tiles: math.exp(sum(math.log(case[tiles]) for case in times) / len(times)) for tiles in complete}
    best = min(means, key=means.__getitem__)
    log += ["", f"## {name}: {len(complete)} of {len(wanted)} candidates ran", ""]
    log += [f"{mean * 1e6:.1f} us {tiles}" for tiles, mean in sorted(means.items(), key=lambda item: item[1])]
    before = f", {means[current] / means[best]:.2f} times as fast as before" if current in means else ""
    log += ["", f"- chosen for {name}: {means[best] * 1e6:.1f} us{before}"]
    return best


def measurer(preset: Preset) -> Measure:
    """Times candidates on the device, for the shapes of the preset."""

    def measure(case: Prefill, heads: Wanted, wanted: Sequence[AttentionTiles], deadline: Deadline) -> list[Times]:
        import jax
        import jax.numpy as jnp

        from benchmarks.kernels_attention import make_groups, pool_rows
        from benchmarks.kernels_timing import memory_limit, noise, parts_of
        from jaxcept_kernels.layout import KVPool

        found: list[Times] = []
        for shape, until in parts_of(deadline, tuple(shape for shape in preset.shapes if heads(shape.head_dim))):
            rows = pool_rows(shape, preset, memory_limit(jax.devices()[0]))
            size = (rows, shape.kv_heads, preset.block_size, shape.head_dim)
            pool = KVPool(*(noise(size, jnp.dtype(preset.dtype), i) for i in (1, 2)))
            for group in make_groups(shape, preset, (case,), rows):
                found.append(measure_group(group, case.context, pool, wanted, preset, until))
            del pool
        return found

    return measure


def measure_group(
    group: Group,
    context: int,
    pool: KVPool,
    wanted: Sequence[AttentionTiles],
    preset: Preset,
    deadline: Deadline,
) -> dict[AttentionTiles, float]:
    """Seconds of a call for each candidate that compiles and agrees with the first; fewer where the time runs out."""
    import jax.numpy as jnp
    import numpy as np

    from benchmarks.kernels_attention import TOLERANCE, make_meta, queries, step
    from benchmarks.kernels_timing import compare, compile_all, judge, relative_error
    from jaxcept_kernels.pallas.ragged_attention import ragged_paged_attention

    tables = np.random.default_rng(0).permutation(group.layout.num_blocks).reshape(group.sequences, group.columns)
    q, operands = queries(group), (pool, make_meta(group, context, tables))
    found: dict[AttentionTiles, float] = {}
    first = wanted[0]
    for begin in range(1, len(wanted), AT_ONCE):
        if found and deadline.left_s <= 0:
            break
        part = {str(tiles): tiles for tiles in (first, *wanted[begin : begin + AT_ONCE])}
        steps = {name: partial(step, group, partial(ragged_paged_attention, tiles=each)) for name, each in part.items()}
        compiled = compile_all({name: (each, q, operands) for name, each in steps.items()})
        shared, index = dict.fromkeys(compiled, operands), dict.fromkeys(compiled, 0)
        judged = judge(compiled, q, shared, index, relative_error, TOLERANCE[preset.dtype])
        _, seconds = compare(judged.right, jnp.array(q, copy=True), preset.rounds, preset.round_s)
        # Batches are compared through the first candidate, which is in each: the device's mood leaves the ratio alone.
        scale = found[first] / seconds[str(first)] if first in found and str(first) in seconds else 1.0
        found.update({part[name]: spent * scale for name, spent in seconds.items() if part[name] not in found})
    return found


if __name__ == "__main__":
    sys.exit(main())
