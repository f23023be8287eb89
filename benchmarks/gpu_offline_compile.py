"""Compiles what serving runs for a GPU that is not there, and judges it: check_gpu_offline.py runs this.

Programs are those of the runner itself, lowered over shapes: no weight and no pool takes memory here. XLA chooses its
own kernels without measuring them, so its choices may differ from those on the device.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.gpu_offline_kernels import kernels
from benchmarks.gpu_offline_report import (
    Kernel,
    Program,
    Target,
    count_all_reduces,
    count_launches,
    faults,
    loads_ahead,
    pool_copies,
    read_kernels,
    read_target,
    table,
)
from jaxcept.runner.runner import DeviceRunner, RunnerConfig
from jaxcept.runner.swapper import ARITIES
from jaxcept_kernels.attention import Implementation
from jaxcept_kernels.layout import KVLayout
from jaxcept_models.config import ModelConfig
from jaxcept_models.model import Model, find_kv_dtype, outline_model
from jaxcept_models.shapes import SHAPES
from jaxcept_models.sharding import make_mesh

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "gpu-offline"
BLOCK_SIZE = 16
MAX_NUM_SEQS = 128  # a decode step's tokens
MAX_NUM_BATCHED_TOKENS = 1024  # a mixed step's
MEMORY_SHARE = 0.85  # of the device, for weights and KV pool
# From 0.11 on a dump holds the PTX only where an emitter is named.
EVERY_EMITTER = {"xla_dump_emitter_re": ".*"} if jax.__version_info__ >= (0, 11) else {}


class Served(NamedTuple):
    """A well-known model, how many devices share it, and the implementations to compile it with."""

    shape: str
    num_devices: int
    implementations: tuple[Implementation, ...]
    kv_cache_dtype: str = "auto"


BOTH = (Implementation.XLA, Implementation.PALLAS)
MODELS = {
    "gpt-j-6b": Served("gpt-j-6b", 1, BOTH),
    "llama-3-8b": Served("llama-3-8b", 1, BOTH),
    "vicuna-13b": Served("vicuna-13b", 1, (Implementation.PALLAS,)),
    "vicuna-13b on 2": Served("vicuna-13b", 2, (Implementation.PALLAS,)),
    "qwen3-30b-a3b": Served("qwen3-30b-a3b", 1, (Implementation.PALLAS,)),
    "qwen3-30b-a3b on 4": Served("qwen3-30b-a3b", 4, (Implementation.PALLAS,)),
    "mixtral-8x7b": Served("mixtral-8x7b", 2, (Implementation.PALLAS,)),
    "gemma-2-9b": Served("gemma-2-9b", 1, (Implementation.PALLAS,)),
    "gemma-3-27b": Served("gemma-3-27b", 2, (Implementation.PALLAS,)),
    "llama-3-70b": Served("llama-3-70b", 4, (Implementation.PALLAS,)),
    "llama-3-70b int8": Served("llama-3-70b", 4, (Implementation.PALLAS,), "int8"),
}


class Devices(NamedTuple):
    """A target and a mesh of such devices."""

    target: Target
    mesh: Mesh

    @property
    def whole(self) -> NamedSharding:
        """An array that every device has whole."""
        return NamedSharding(self.mesh, PartitionSpec())


def make_devices(path: Path, count: int) -> Devices:
    """Devices of the kind that the file describes, which share every layer of a model."""
    text = path.read_text()
    topology: Any = topologies.get_topology_desc(platform="cuda", target_config=text, topology=f"1x1x{count}")
    return Devices(read_target(path.stem, text), make_mesh(count, devices=topology.devices))


def make_model(
    config: ModelConfig, implementation: Implementation, devices: Devices, kv_cache_dtype: str = "auto"
) -> Model:
    """A bfloat16 model whose weights are shapes."""
    mesh = devices.mesh if devices.mesh.size > 1 else None
    model = outline_model(config, jnp.dtype(jnp.bfloat16), implementation, mesh)
    model = replace(model, kv_cache_dtype=find_kv_dtype(kv_cache_dtype))
    if mesh is not None:
        return model
    weights = (jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=devices.whole) for x in model.weights)
    return replace(model, weights=tuple(weights))  # type: ignore[arg-type]  # shapes in place of arrays


def make_runner(model: Model, num_blocks: int, devices: Devices) -> DeviceRunner:
    """The runner that serves the model, with shapes for its arrays."""
    longest = model.config.max_position_embeddings
    config = RunnerConfig(num_blocks, BLOCK_SIZE, MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS, longest, num_host_blocks=1)
    return DeviceRunner(model, config, shapes_on=devices.whole)


def blocks_that_fit(model: Model, devices: Devices) -> int:
    """Blocks of a pool that fills the devices beside the weights."""
    parts = [(x.sharding.shard_shape(x.shape), x.dtype.itemsize) for x in model.weights]
    weights = sum(math.prod(shape) * size for shape, size in parts)
    room = int(devices.target.memory_bytes * MEMORY_SHARE) - weights
    return room * devices.mesh.size // model.kv_layout(1, BLOCK_SIZE).block_bytes


def programs_of(name: str, layers: int | None, implementation: Implementation, devices: Devices) -> Iterator[Program]:
    """What serving this model runs, at its largest sizes: all with Pallas, a mixed step and the moves with XLA."""
    served = MODELS[name]
    config, told = SHAPES[served.shape], served.shape
    if served.kv_cache_dtype != "auto":
        told = f"{told}, {served.kv_cache_dtype} KV"
    num_blocks = blocks_that_fit(make_model(config, implementation, devices, served.kv_cache_dtype), devices)
    part = replace(config, num_layers=layers or config.num_layers)
    runner = make_runner(make_model(part, implementation, devices, served.kv_cache_dtype), num_blocks, devices)
    wanted = {f"step {MAX_NUM_BATCHED_TOKENS}", "copy", *(f"swap {way} {max(ARITIES)}" for way in ("out", "in"))}
    if implementation is Implementation.PALLAS:
        variants = [f"sample {MAX_NUM_SEQS} {variant}" for variant in ("greedy", "full")]
        wanted |= {f"step {MAX_NUM_SEQS}", f"checksum {max(ARITIES)}", *variants}
    for what, _, lower in runner.lowerings():
        if what in wanted:
            writes = what.startswith(("step", "swap in", "copy"))
            yield compile_program(Task(told, f"{what} {implementation}", runner.layout, writes, lower), devices)


def kernel_programs(devices: Devices) -> Iterator[Program]:
    """Every kernel by itself."""
    for what, layout, lower, writes in kernels(devices.whole):
        yield compile_program(Task("kernels", what, layout, writes, lower), devices)


class Task(NamedTuple):
    """Something to compile."""

    model: str
    what: str
    layout: KVLayout
    writes: bool  # to the pool
    lower: Callable[[], Any]


def compile_program(task: Task, devices: Devices) -> Program:
    """Compiles, and reads what came of it."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as dump:
        with jax.set_mesh(devices.mesh):  # so that tiles are those of this kind of device
            lowered = task.lower()
        compiled = lowered.compile(compiler_options={"xla_dump_to": dump} | EVERY_EMITTER)
        compile_s = time.perf_counter() - start
        thunks = "".join(path.read_text() for path in Path(dump).glob("*.thunk_sequence.txt"))
        found = kernels_in(Path(dump), thunks)
    launches, loops = count_launches(thunks)
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    parts = devices.mesh.size
    return Program(
        jax=jax.__version__,
        target=devices.target.name,
        model=task.model,
        what=task.what,
        num_layers=task.layout.num_layers,
        num_devices=parts,
        compile_s=round(compile_s, 2),
        memory_bytes=devices.target.memory_bytes,
        shared_limit=devices.target.shared_limit,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        pool_bytes=task.layout.num_blocks * task.layout.block_bytes // parts if task.writes else 0,
        all_reduces=count_all_reduces(hlo),
        pool_copies=pool_copies(hlo, math.prod(task.layout.shape) // parts),
        kernels=found,
        launches=launches,
        loops=loops,
    )


def kernels_in(dump: Path, thunks: str) -> tuple[Kernel, ...]:
    """The kernels of one dumped compilation."""
    texts = {path: path.read_text() for path in sorted(dump.glob("*.ptx"))}
    sources = {path: text for path, text in texts.items() if ".entry" in text}
    with ThreadPoolExecutor(2) as threads:
        told = list(threads.map(_assemble, sources, sources.values()))
    return read_kernels("".join(told), thunks, loads_ahead("".join(sources.values())))


def _assemble(path: Path, text: str) -> str:
    architecture = next(line.split()[1] for line in text.splitlines() if line.startswith(".target"))
    command = [ptxas(), "-v", f"-arch={architecture.rstrip(',')}", str(path), "-o", "/dev/null"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def ptxas() -> str:
    """The assembler of the package nvidia-cuda-nvcc-cu12."""
    found = find_spec("nvidia")
    for folder in (found.submodule_search_locations if found else None) or ():
        path = Path(folder) / "cuda_nvcc" / "bin" / "ptxas"
        if path.is_file():
            return str(path)
    raise FileNotFoundError("ptxas: install nvidia-cuda-nvcc-cu12")


def save(programs: list[Program], out: Path) -> None:
    """Replaces this jax version's part of the results, as JSON and as a table."""
    kept = read_results(out) if out.with_suffix(".json").is_file() else []
    write_results([*(row for row in kept if row.jax != jax.__version__), *programs], out)


def read_results(out: Path) -> list[Program]:
    """What `write_results` wrote."""
    rows = []
    for row in json.loads(out.with_suffix(".json").read_text()):
        row["kernels"] = tuple(Kernel(*kernel) for kernel in row["kernels"])
        row["pool_copies"] = tuple(row["pool_copies"])
        rows.append(Program(**row))
    return rows


def write_results(programs: list[Program], out: Path) -> None:
    """Writes `out`.json and `out`.md, by version."""
    rows = sorted(programs, key=lambda row: row.jax)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text("[\n" + ",\n".join(json.dumps(asdict(row)) for row in rows) + "\n]\n")
    versions = " ".join(dict.fromkeys(row.jax for row in rows))
    wrong = [fault for row in rows for fault in faults(row)]
    verdict = "\n".join(f"- {fault}" for fault in wrong) or f"{len(rows)} programs, nothing failed."
    command = f"`python benchmarks/check_gpu_offline.py --jax {versions}`"
    legend = "Bytes are those of one device; registers and spills are ptxas's. Nothing here was run."
    text = f"# Compiled for GPUs, without one\n\n{command}. {legend}\n\n{verdict}\n\n{table(rows)}\n"
    out.with_suffix(".md").write_text(text)


def main() -> int:
    """Compiles, prints, saves; 1 where anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--targets", nargs="+", default=sorted(path.stem for path in (ROOT / "targets").glob("*.txtpb"))
    )
    known = ["kernels", *MODELS]
    parser.add_argument("--models", nargs="+", choices=known, default=known)
    parser.add_argument("--layers", type=int, help="only so many layers of each model")
    parser.add_argument("--out", type=Path, help="results, without suffix; a whole run has its place")
    args = parser.parse_args()
    programs: list[Program] = []
    for target in args.targets:
        path = ROOT / "targets" / f"{target}.txtpb"
        runs = [kernel_programs(make_devices(path, 1))] if "kernels" in args.models else []
        for name in args.models:
            if name in MODELS:
                devices = make_devices(path, MODELS[name].num_devices)
                runs += [programs_of(name, args.layers, each, devices) for each in MODELS[name].implementations]
        for program in chain.from_iterable(runs):
            programs.append(program)
            print(table([program]).splitlines()[-1], flush=True)
    print(table(programs))
    if args.out is not None:
        save(programs, args.out)
    elif args == parser.parse_args([]):  # nothing left out
        save(programs, RESULTS)
    wrong = [fault for program in programs for fault in faults(program)]
    for fault in wrong:
        print(f"FAILED: {fault}")
    print(f"{len(programs)} programs, {len(wrong)} faults")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
