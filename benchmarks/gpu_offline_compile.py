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
from flax import nnx
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.gpu_offline_kernels import kernels
from benchmarks.gpu_offline_report import (
    Kernel,
    Program,
    Target,
    count_all_reduces,
    faults,
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
from jaxcept_models.model import ARCHITECTURES, Model
from jaxcept_models.rope import RopeConfig

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "gpu-offline"
BLOCK_SIZE = 16
MAX_NUM_SEQS = 128  # a decode step's tokens
MAX_NUM_BATCHED_TOKENS = 1024  # a mixed step's
MEMORY_SHARE = 0.85  # of the device, for weights and KV pool
AXIS = "heads"
IMPLEMENTATIONS = (Implementation.XLA, Implementation.PALLAS)
# From 0.11 on a dump holds the PTX only where an emitter is named.
EVERY_EMITTER = {"xla_dump_emitter_re": ".*"} if jax.__version_info__ >= (0, 11) else {}

MODELS = {
    "gpt-j-6b": ModelConfig(
        "GPTJForCausalLM", 28, 4096, 16, 16, 256, 16384, 50400, 2048, 1e-5, RopeConfig(10_000.0, 64)
    ),
    "llama-3-8b": ModelConfig(
        "LlamaForCausalLM", 32, 4096, 32, 8, 128, 14336, 128256, 8192, 1e-5, RopeConfig(500_000.0, 128)
    ),
}


class Device(NamedTuple):
    """A target and a mesh of such devices."""

    target: Target
    mesh: jax.sharding.Mesh

    @property
    def whole(self) -> NamedSharding:
        """An array that every device has whole."""
        return NamedSharding(self.mesh, PartitionSpec())


def make_device(path: Path) -> Device:
    """One device of the kind that the file describes."""
    text = path.read_text()
    topology = topologies.get_topology_desc(platform="cuda", target_config=text, topology="1x1x1")
    return Device(read_target(path.stem, text), topologies.make_mesh(topology, (1,), (AXIS,)))


def make_model(config: ModelConfig, implementation: Implementation, device: Device) -> Model:
    """A bfloat16 model whose weights are shapes."""
    dtype = jnp.dtype(jnp.bfloat16)
    module = ARCHITECTURES[config.architecture].module
    graph, state = nnx.split(nnx.eval_shape(lambda: module(config, dtype, implementation)))
    weights, tree = jax.tree.flatten(state)
    return Model(config, tuple(_on(device, weights)), dtype, implementation, graph, tree)


def make_runner(model: Model, num_blocks: int, device: Device) -> DeviceRunner:
    """The runner that serves the model, with shapes for its arrays."""
    longest = model.config.max_position_embeddings
    config = RunnerConfig(num_blocks, BLOCK_SIZE, MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS, longest, num_host_blocks=1)
    return DeviceRunner(model, config, shapes_on=device.whole)


def _on(device: Device, tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device.whole), tree)


def blocks_that_fit(model: Model, device: Device) -> int:
    """Blocks of a pool that fills the device beside the weights."""
    weights = sum(x.size * x.dtype.itemsize for x in model.weights)
    room = int(device.target.memory_bytes * MEMORY_SHARE) - weights
    return room // model.kv_layout(1, BLOCK_SIZE).block_bytes


def programs_of(name: str, num_layers: int | None, implementation: Implementation, device: Device) -> Iterator[Program]:
    """What serving this model runs, at its largest sizes: all with Pallas, a mixed step and the moves with XLA."""
    config = MODELS[name]
    num_blocks = blocks_that_fit(make_model(config, implementation, device), device)
    model = make_model(replace(config, num_layers=num_layers or config.num_layers), implementation, device)
    runner = make_runner(model, num_blocks, device)
    wanted = {f"step {MAX_NUM_BATCHED_TOKENS}", "copy", *(f"swap {way} {max(ARITIES)}" for way in ("out", "in"))}
    if implementation is Implementation.PALLAS:
        variants = [f"sample {MAX_NUM_SEQS} {variant}" for variant in ("greedy", "random", "full")]
        wanted |= {f"step {MAX_NUM_SEQS}", f"checksum {max(ARITIES)}", *variants}
    for what, _, lower in runner.lowerings():
        if what in wanted:
            writes = what.startswith(("step", "swap in", "copy"))
            yield compile_program(Task(name, f"{what} {implementation}", runner.layout, writes, lower), device)


def kernel_programs(device: Device) -> Iterator[Program]:
    """Every kernel by itself."""
    for what, layout, lower in kernels(device.whole):
        yield compile_program(Task("kernels", what, layout, True, lower), device)


class Task(NamedTuple):
    """Something to compile."""

    model: str
    what: str
    layout: KVLayout
    writes: bool  # to the pool
    lower: Callable[[], Any]


def compile_program(task: Task, device: Device) -> Program:
    """Compiles, and reads what came of it."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as dump:
        with jax.set_mesh(device.mesh):  # so that tiles are those of this kind of device
            lowered = task.lower()
        compiled = lowered.compile(compiler_options={"xla_dump_to": dump} | EVERY_EMITTER)
        compile_s = time.perf_counter() - start
        found = kernels_in(Path(dump))
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    pool_elements = math.prod(task.layout.shape)
    return Program(
        jax=jax.__version__,
        target=device.target.name,
        model=task.model,
        what=task.what,
        num_layers=task.layout.num_layers,
        num_devices=device.mesh.size,
        compile_s=round(compile_s, 2),
        memory_bytes=device.target.memory_bytes,
        shared_limit=device.target.shared_limit,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        pool_bytes=task.layout.num_blocks * task.layout.block_bytes if task.writes else 0,
        all_reduces=count_all_reduces(hlo),
        pool_copies=pool_copies(hlo, pool_elements),
        kernels=found,
    )


def kernels_in(dump: Path) -> tuple[Kernel, ...]:
    """The kernels of one dumped compilation."""
    sources = [path for path in sorted(dump.glob("*.ptx")) if ".entry" in path.read_text()]
    with ThreadPoolExecutor(2) as threads:
        told = list(threads.map(_assemble, sources))
    launches = "".join(path.read_text() for path in dump.glob("*.thunk_sequence.txt"))
    return read_kernels("".join(told), launches)


def _assemble(path: Path) -> str:
    architecture = next(line.split()[1] for line in path.read_text().splitlines() if line.startswith(".target"))
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
    kept: list[Program] = []
    if out.with_suffix(".json").is_file():
        for row in json.loads(out.with_suffix(".json").read_text()):
            row["kernels"] = tuple(Kernel(*kernel) for kernel in row["kernels"])
            row["pool_copies"] = tuple(row["pool_copies"])
            kept.append(Program(**row))
    rows = [*(row for row in kept if row.jax != jax.__version__), *programs]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text("[\n" + ",\n".join(json.dumps(asdict(row)) for row in rows) + "\n]\n")
    wrong = [fault for row in rows for fault in faults(row)]
    verdict = "\n".join(f"- {fault}" for fault in wrong) or "Nothing failed."
    out.with_suffix(".md").write_text(
        "# Compiled for GPUs, without one\n\n`make check-gpu-offline`. Bytes are those of one device; registers and "
        f"spills are ptxas's. Nothing here was run.\n\n{table(rows)}\n\n{verdict}\n"
    )


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
        device = make_device(ROOT / "targets" / f"{target}.txtpb")
        runs = [kernel_programs(device)] if "kernels" in args.models else []
        for name in args.models:
            if name in MODELS:
                runs += [programs_of(name, args.layers, each, device) for each in IMPLEMENTATIONS]
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
