"""Measures a cost model on the device at hand: steps and swaps are timed, terms are fitted to the times.

Everything runs through the runner's own executables, so that nothing is compiled, and what is timed is what serves.
Steps are timed one after the other with one in flight, as the engine runs them.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from statistics import median
from typing import Literal, NamedTuple

import jax
import numpy as np

from jaxcept.runner.fit import StepFit, fit_steps, fit_swaps
from jaxcept.runner.runner import DeviceRunner, RunnerConfig
from jaxcept.runner.swapper import POLL_S, Swapper
from jaxcept.scheduler.costs import CostModel, StepLoad
from jaxcept.scheduler.params import SamplingParams
from jaxcept.scheduler.plan import (
    BlockMove,
    Chunk,
    ChunkKind,
    Decodes,
    MoveKind,
    RowSetup,
    StepPlan,
    TableUpdate,
)

Progress = Callable[[int, int, str], None]
Fit = Literal["full", "linear"]

BRIEF_S = 4.0  # after so many seconds a brief profile has enough, if it has at least BRIEF_POINTS
BRIEF_POINTS = 7
ROUNDS = 5
REPEATS = 3  # in each round
LONG_S = 2.0  # a load that took so long in sum is known well enough
_SOURCE = "measured by jaxcept profile"
_GREEDY = SamplingParams(temperature=0, ignore_eos=True)
_SWAP_SIZES = (1, 4, 8, 16, 32, 64, 128)


class Batch(NamedTuple):
    """What a timed step computes: `decodes` sequences at `context` tokens, and `tokens` of prompts behind `start`."""

    decodes: int
    context: int
    tokens: int
    start: int


class SwapTimes(NamedTuple):
    """Seconds to move so many blocks one way, with nothing else running and beside a step."""

    blocks: int
    alone_s: float
    beside_s: float


class _SwapSample(NamedTuple):
    out_alone: float
    out_beside: float
    in_alone: float
    in_beside: float


@dataclass(frozen=True, slots=True)
class Measurements:
    """What a profile saw, before any fit."""

    steps: tuple[tuple[StepLoad, float], ...]  # with seconds
    swaps_out: tuple[SwapTimes, ...] = ()
    swaps_in: tuple[SwapTimes, ...] = ()


def profile(
    runner: DeviceRunner,
    progress: Progress | None = None,
    *,
    model: str = "",
    brief: bool = False,
    fit: Fit = "full",
) -> CostModel:
    """The cost model of a warmed-up runner that serves nobody; it is left so. `brief` takes some seconds.

    `fit` "linear" is InferCept's model in tokens alone. `model` is the name to go by. ValueError for another fit.
    """
    if fit not in ("full", "linear"):
        raise ValueError(f"fit={fit!r}: expected 'full' or 'linear'")
    return make_cost_model(runner, measure(runner, progress, brief=brief), model, fit)


def measure(runner: DeviceRunner, progress: Progress | None = None, *, brief: bool = False) -> Measurements:
    """Times steps over a grid of loads, and swaps over numbers of blocks where the runner has host blocks.

    The grid is gone through several times, so that a moment in which the machine is busy with something else falls on
    a few times of many loads, and the medians leave it out.
    """
    stopwatch = _Stopwatch(runner)
    batches = list(grid(runner.config, brief))
    sizes = [n for n in _SWAP_SIZES if n <= min(runner.config.num_host_blocks, runner.config.num_blocks)]
    sizes = sizes[::3] if brief else sizes
    begin, done, total = time.perf_counter(), 0, ROUNDS * (len(batches) + len(sizes))
    steps: dict[Batch, list[float]] = {}
    swaps: dict[int, list[_SwapSample]] = {size: [] for size in sizes}
    for _ in range(ROUNDS):
        for batch in batches:
            done += 1
            is_late = brief and time.perf_counter() - begin > BRIEF_S
            if (is_late and len(steps) >= BRIEF_POINTS) or sum(steps.get(batch, ())) > LONG_S:
                continue
            steps.setdefault(batch, []).extend(stopwatch.step(batch))
            if progress is not None:
                progress(done, total, f"steps of {batch.decodes + batch.tokens} tokens")
        for size in sizes:
            done += 1
            if brief and swaps[size] and time.perf_counter() - begin > BRIEF_S:
                continue
            swaps[size] += [stopwatch.swap(size) for _ in range(REPEATS)]
            if progress is not None:
                progress(done, total, f"swaps of {size} blocks")
    stopwatch.leave()
    if progress is not None:
        progress(total, total, "fit")
    return Measurements(
        tuple((stopwatch.load(batch), median(seconds)) for batch, seconds in steps.items()),
        tuple(
            SwapTimes(n, median(t.out_alone for t in ts), median(t.out_beside for t in ts)) for n, ts in swaps.items()
        ),
        tuple(SwapTimes(n, median(t.in_alone for t in ts), median(t.in_beside for t in ts)) for n, ts in swaps.items()),
    )


def grid(config: RunnerConfig, brief: bool) -> Iterator[Batch]:
    """Loads to time, the telling ones first: the ends of each axis, then what lies between."""
    longest, seqs = config.max_model_len, min(config.max_num_seqs, config.max_num_batched_tokens)
    budget = config.max_num_batched_tokens
    chunks = _sizes(budget, 4 if brief else 2)
    counts = _sizes(seqs, 8 if brief else 2)
    behind = max(0, longest - min(budget, longest))
    corners = [
        Batch(1, max(1, longest // 8), 0, 0),
        Batch(0, 0, budget, 0),
        Batch(seqs, longest, 0, 0),
        Batch(seqs, max(1, longest // 8), 0, 0),
        Batch(0, 0, max(1, budget // 4), 0),
        Batch(0, 0, max(1, min(budget, longest) // 4), max(0, longest - max(1, min(budget, longest) // 4))),
        Batch(1, longest, 0, 0),
    ]
    rest = [Batch(0, 0, size, 0) for size in chunks]
    rest += [Batch(count, context, 0, 0) for count in counts for context in (longest // 3, longest) if context]
    if not brief:
        rest += [Batch(0, 0, size, longest - size) for size in chunks if size < longest]
    if behind:
        rest.append(Batch(0, 0, min(budget, longest), behind))
    half = seqs // 2
    if half and half < seqs and budget - half > 0:
        rest.append(Batch(half, max(1, longest // 2), budget - half, 0))
    yield from dict.fromkeys(corners + rest)


def _sizes(limit: int, step: int) -> list[int]:
    """From 1 to limit by factors of `step`; by 2 also what lies halfway, where padding to a bucket is at its worst."""
    sizes = [1]
    while sizes[-1] * step < limit:
        sizes.append(sizes[-1] * step)
    sizes.append(limit)
    if step == 2:
        sizes += [size * 5 // 4 for size in sizes if size >= 16 and size * 5 // 4 < limit]
    return sorted(set(sizes))


@dataclass
class _Stopwatch:
    """Times single loads on a runner; sequences of its own hold all rows meanwhile."""

    runner: DeviceRunner
    _step_id: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        config = self.runner.config
        per_row = -(-config.max_model_len // config.block_size)
        self._tables = tuple(
            TableUpdate(row, 0, tuple((row * per_row + i) % config.num_blocks for i in range(per_row)))
            for row in range(config.max_num_seqs)
        )
        self._rows = tuple(RowSetup(row, row, _GREEDY, 0, (1,), (), 1, ()) for row in range(config.max_num_seqs))
        self.runner.submit(self._plan(None))
        self.runner.collect()

    def load(self, batch: Batch) -> StepLoad:
        """What makes the batch's step long."""
        return StepLoad.of(self._plan(batch))

    def step(self, batch: Batch) -> list[float]:
        """Seconds from one collected step to the next, one being in flight, after one to warm up."""
        seconds: list[float] = []
        self._submit(batch)
        self._submit(batch)
        self.runner.collect()
        last = time.perf_counter()
        while len(seconds) < REPEATS and sum(seconds) < LONG_S:
            self._submit(batch)
            self.runner.collect()
            seconds.append(time.perf_counter() - last)
            last = time.perf_counter()
        self.runner.collect()
        return seconds

    def swap(self, blocks: int) -> _SwapSample:
        """Seconds of a swap out and of the way back, each alone and beside the largest step."""
        largest = Batch(0, 0, self.runner.config.max_num_batched_tokens, 0)
        out, back = MoveKind.SWAP_OUT, MoveKind.SWAP_IN
        return _SwapSample(
            self._swap(out, blocks, None),
            self._swap(out, blocks, largest),
            self._swap(back, blocks, None),
            self._swap(back, blocks, largest),
        )

    def leave(self) -> None:
        """The runner is as it was: it knows of no swaps, and rows are taken over by whoever comes."""
        if self.runner.swapper is not None:
            self.runner.swapper.reset()

    def _swap(self, kind: MoveKind, blocks: int, beside: Batch | None) -> float:
        swapper = self.runner.swapper
        assert swapper is not None
        moves = tuple(BlockMove(kind, i, i) for i in range(blocks))
        begin = time.perf_counter()
        if beside is None:
            self.runner.submit(self._plan(None, moves))
        else:
            self._submit(beside, moves)
        seconds = _until_over(swapper, begin)
        self.runner.collect()
        swapper.finish(self._step_id)
        self.runner.submit(self._plan(None))  # the report; what was staged is dropped with the next plan
        self.runner.collect()
        return seconds

    def _submit(self, batch: Batch, moves: tuple[BlockMove, ...] = ()) -> StepPlan:
        plan = self._plan(batch, moves)
        self.runner.submit(plan)
        return plan

    def _plan(self, batch: Batch | None, moves: tuple[BlockMove, ...] = ()) -> StepPlan:
        step_id = self._step_id
        self._step_id += 1
        if batch is None:
            setup = step_id == 0
            return StepPlan(
                step_id, Decodes(), (), self._tables if setup else (), self._rows if setup else (), moves
            )  # fmt: skip
        rows = tuple(range(batch.decodes))
        decodes = Decodes(rows, rows, (batch.context - 1,) * batch.decodes)
        return StepPlan(step_id, decodes, tuple(self._chunks(batch)), (), (), moves)

    def _chunks(self, batch: Batch) -> Iterator[Chunk]:
        room = self.runner.config.max_model_len - batch.start
        left, row = batch.tokens, batch.decodes
        while left and row < self.runner.config.max_num_seqs:
            size = min(left, room)
            yield Chunk(row, row, ChunkKind.PREFILL, batch.start, (1,) * size, True)
            left, row = left - size, row + 1


def _until_over(swapper: Swapper, begin: float) -> float:
    swapper.poll()
    while swapper.num_in_transit:
        time.sleep(POLL_S)
        swapper.poll()
    return time.perf_counter() - begin


def make_cost_model(runner: DeviceRunner, seen: Measurements, model: str = "", fit: Fit = "full") -> CostModel:
    """Fits the terms of a cost model to what was measured."""
    size, config = runner.config.block_size, runner.model.config
    full = fit_steps(seen.steps, is_linear=False)
    steps = full if fit == "full" else fit_steps(seen.steps, is_linear=True)
    out_latency, out_token = fit_swaps([(times.blocks * size, times.beside_s) for times in seen.swaps_out])
    in_latency, in_token = fit_swaps([(times.blocks * size, times.beside_s) for times in seen.swaps_in])
    device = describe_device()
    model = model or f"{config.architecture} {config.num_layers}x{config.hidden_size}"
    return CostModel(
        name=f"{model}@{device}",
        device=device,
        model=model,
        dtype=str(runner.model.dtype),
        overhead_s=steps.overhead_s,
        floor_s=steps.floor_s,
        token_s=steps.token_s,
        context_token_s=steps.context_token_s,
        pair_s=steps.pair_s,
        saturation_tokens=full.saturation_tokens,
        kv_token_bytes=max(1, runner.layout.block_bytes // size),
        swap_out_latency_s=out_latency,
        swap_out_token_s=out_token,
        swap_in_latency_s=in_latency,
        swap_in_token_s=in_token,
        sources=_sources(seen, steps, runner.layout.block_bytes, fit),
        versions={name: version(name) for name in ("jax", "jaxlib", "numpy")} | {"python": platform.python_version()},
    )


def describe_device() -> str:
    """The device that steps run on."""
    devices = jax.devices()
    if devices[0].platform == "cpu":
        return f"cpu {platform.machine()}, {os.cpu_count()} cores"
    return str(devices[0].device_kind)


def _sources(seen: Measurements, steps: StepFit, block_bytes: int, fit: Fit) -> dict[str, str]:
    names = ("overhead_s", "floor_s", "token_s", "context_token_s", "pair_s", "saturation_tokens")
    error = (
        f"{len(seen.steps)} loads, {fit} fit, error {steps.mean_error:.1%} in the mean, {steps.max_error:.1%} at most"
    )
    sources = dict.fromkeys(names, f"{_SOURCE}: {error}")
    sources["kv_token_bytes"] = "the model's shape and dtype"
    for way, times in (("out", seen.swaps_out), ("in", seen.swaps_in)):
        told = (
            f"{_SOURCE}: {_bandwidth(times, block_bytes)}" if times else "not measured: the runner has no host blocks"
        )
        sources[f"swap_{way}_latency_s"] = sources[f"swap_{way}_token_s"] = told
    return sources


def _bandwidth(times: Sequence[SwapTimes], block_bytes: int) -> str:
    blocks, alone, beside = times[-1]
    gigabytes = blocks * block_bytes / 1e9
    return f"{blocks} blocks at {gigabytes / alone:.2f} GB/s alone, {gigabytes / beside:.2f} GB/s beside a step"


def relative_errors(costs: CostModel, steps: Sequence[tuple[StepLoad, float]]) -> np.ndarray:
    """[steps] predicted over measured seconds, minus 1."""
    return np.array([costs.step_s(load) / seconds - 1 for load, seconds in steps])
