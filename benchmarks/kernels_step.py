"""Section `step`: the engine's decode step on a GPT-J with random weights, as a share of its roofline.

The floor is the weights and the batch's keys and values over the copy bandwidth of the same run. Steps go through the
runner as the engine sends them: with one in flight, and with many queued, where the host's part hides. A trace of the
device tells which kernels the rest goes to.
"""

from __future__ import annotations

import gc
import gzip
import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.kernels_cases import EngineStep, Preset
from benchmarks.kernels_report import reason
from benchmarks.kernels_timing import Ceilings, Deadline, memory_limit
from jaxcept.runner.runner import DeviceRunner, RunnerConfig
from jaxcept.scheduler.params import SamplingParams
from jaxcept.scheduler.plan import Decodes, RowSetup, StepPlan, TableUpdate
from jaxcept_kernels.attention import Implementation
from jaxcept_kernels.library import native_available
from jaxcept_models.model import Model, load_model

POOL_SHARE = 0.8  # of the memory beside the weights
QUEUED = 8
MAX_STEPS = 50
TOP_KERNELS = 12
_GREEDY = SamplingParams(temperature=0, ignore_eos=True)


def run_step(preset: Preset, ceilings: Ceilings, deadline: Deadline) -> Iterator[dict[str, Any]]:
    """A record for each implementation and batch."""
    for implementation in implementations(preset.dtype):
        try:
            yield from run_model(preset, implementation, ceilings, deadline)
        except Exception as error:  # the others are measured all the same
            yield {"what": f"{preset.step.shape.name}, {implementation}", "note": reason(error)}
        gc.collect()  # the next one's weights and pool need the room


def implementations(dtype: str) -> list[Implementation]:
    """Those that run here, the fastest first."""
    wanted = ["pallas", "xla"]
    if jax.default_backend() != "gpu":
        wanted = ["native", "xla"] if dtype == "float32" and native_available() else ["xla"]
    return [Implementation(name) for name in wanted if name in {each.value for each in Implementation}]


def run_model(
    preset: Preset, implementation: Implementation, ceilings: Ceilings, deadline: Deadline
) -> Iterator[dict[str, Any]]:
    """The records of one implementation."""
    step, itemsize = preset.step, jnp.dtype(preset.dtype).itemsize
    model = make_model(step, preset, implementation)
    room = memory_limit(jax.devices()[0])
    context = fitting_context(step, preset.block_size, itemsize, room)
    runner = make_runner(model, step, context, preset.block_size)
    driver = Driver(runner, context)
    for batch in step.batches:
        what = f"{step.shape.name}, {implementation}, {batch} x {context}"
        if deadline.left_s <= 0:
            yield {"what": what, "note": "out of time"}
            continue
        work = step.work(batch, context, itemsize)
        one, queued, submit = driver.time(batch, preset.rounds)
        floor = work.floor_s(ceilings.copy, ceilings.matrix)
        yield {
            "what": what,
            "floor ms": floor * 1e3,
            "step ms": one * 1e3,
            "share of roofline": floor / one,
            "queued ms": queued * 1e3,
            "share queued": floor / queued,
            "host submit ms": submit * 1e3,
            "weights GB": step.weight_bytes(itemsize) / 1e9,
            "KV GB": (work.bytes - step.weight_bytes(itemsize)) / 1e9,
            "kernels": driver.kernels(batch),
        }


def make_model(step: EngineStep, preset: Preset, implementation: Implementation) -> Model:
    """Weights drawn on the device, for a config.json that is written for the purpose."""
    fields = {
        "architectures": ["GPTJForCausalLM"],
        "n_layer": step.shape.layers,
        "n_embd": step.hidden,
        "n_head": step.shape.heads,
        "n_positions": 2048,
        "rotary_dim": step.shape.head_dim // 4,
        "vocab_size": step.vocab,
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(fields))
        return load_model(folder, dtype=preset.dtype, load_format="dummy", implementation=implementation)  # type: ignore[arg-type]  # a preset's dtype is one of those


def fitting_context(step: EngineStep, block_size: int, itemsize: int, room: int | None) -> int:
    """The context, halved until the largest batch fits beside the weights."""
    context = step.context
    per_token = step.shape.token_bytes * step.shape.layers * itemsize
    free = None if room is None else int((room - step.weight_bytes(itemsize)) * POOL_SHARE)
    while free is not None and max(step.batches) * (context + block_size) * per_token > free and context > block_size:
        context //= 2
    return context


def make_runner(model: Model, step: EngineStep, context: int, block_size: int) -> DeviceRunner:
    """A runner with room for the largest batch, whose executables for these batches are compiled."""
    most = max(step.batches)
    length = context + block_size
    config = RunnerConfig(most * -(-length // block_size), block_size, most, most, length)
    runner = DeviceRunner(model, config)
    wanted = {f"{kind} {batch}{end}" for batch in step.batches for kind, end in (("step", ""), ("sample", " greedy"))}
    jobs = runner.lowerings()
    if (wanted | {"rows"}) <= {what for what, _, _ in jobs}:
        with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
            needed = [(keep, lower()) for what, keep, lower in jobs if what in wanted | {"rows"}]
            compiling = [(keep, threads.submit(lowered.compile)) for keep, lowered in needed]
            for keep, future in compiling:
                keep(future.result())
    else:
        runner.warm_up()
    return runner


class Driver:
    """Sends decode steps to a runner that serves nobody else."""

    def __init__(self, runner: DeviceRunner, context: int) -> None:
        self.runner, self.context = runner, context
        self._step_id = 0
        config = runner.config
        per_row = -(-config.max_model_len // config.block_size)
        tables = tuple(
            TableUpdate(row, 0, tuple(range(row * per_row, (row + 1) * per_row))) for row in range(config.max_num_seqs)
        )
        rows = tuple(RowSetup(row, row, _GREEDY, 0, (1,), (), 1, ()) for row in range(config.max_num_seqs))
        runner.submit(StepPlan(self._next_id(), Decodes(), (), tables, rows, ()))
        runner.collect()

    def time(self, batch: int, rounds: int) -> tuple[float, float, float]:
        """Median seconds of a step with one in flight, of one of many queued, and of the host's call to submit."""
        self._queue(batch, 2)
        queued = median(self._queue(batch, QUEUED) for _ in range(rounds))
        count = min(MAX_STEPS, max(rounds, int(1 / queued)))
        seconds, submits = [], []
        self.runner.submit(self._plan(batch))
        last = time.perf_counter()
        for _ in range(count):
            begin = time.perf_counter()
            self.runner.submit(self._plan(batch))
            submits.append(time.perf_counter() - begin)
            self.runner.collect()
            seconds.append(time.perf_counter() - last)
            last = time.perf_counter()
        self.runner.collect()
        return median(seconds[1:]), queued, median(submits)

    def kernels(self, batch: int) -> list[str]:
        """What the device spends a step's time on, the longest first; empty where the profiler sees no device."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                with jax.profiler.trace(folder):
                    self._queue(batch, 4)
            except RuntimeError as error:  # a profiler that is not allowed here
                return [reason(error)]
            events = [event for path in Path(folder).rglob("*.trace.json.gz") for event in read_trace(path)]
        return [f"{name} {spent * 1e3 / 4:.3f} ms" for name, spent in device_times(events)[:TOP_KERNELS]]

    def _queue(self, batch: int, count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            self.runner.submit(self._plan(batch))
        for _ in range(count):
            self.runner.collect()
        return (time.perf_counter() - begin) / count

    def _plan(self, batch: int) -> StepPlan:
        rows = tuple(range(batch))
        return StepPlan(self._next_id(), Decodes(rows, rows, (self.context - 1,) * batch), (), (), (), ())

    def _next_id(self) -> int:
        self._step_id += 1
        return self._step_id - 1


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The events of a trace as the profiler writes it."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return events


def device_times(events: Iterable[dict[str, Any]]) -> list[tuple[str, float]]:
    """(kernel, seconds in sum) on the streams of GPUs, the longest first. Numbers that end a name are left out."""
    events = list(events)
    gpus = {
        event["pid"]
        for event in events
        if event.get("name") == "process_name" and "GPU" in event.get("args", {}).get("name", "")
    }
    streams = {
        (event["pid"], event["tid"])
        for event in events
        if event.get("name") == "thread_name" and event.get("args", {}).get("name", "").startswith("Stream")
    }
    spent: dict[str, float] = defaultdict(float)
    for event in events:
        if event.get("ph") == "X" and event["pid"] in gpus and (event["pid"], event.get("tid")) in streams:
            spent[event["name"].rstrip("0123456789_")] += event["dur"] * 1e-6
    return sorted(spent.items(), key=lambda item: -item[1])
