"""Sharded runs on virtual devices of this machine's CPU: host memory at load, and host time of a step by mesh.

    python benchmarks/sharded.py load [--gib 1]     # writes a random checkpoint, loads it on each mesh, deletes it
    python benchmarks/sharded.py step               # scheduler, batch, dispatch: milliseconds of a decode step
    python benchmarks/sharded.py step --save benchmarks/results/sharded-step.json

A device of the CPU keeps its arrays in host memory, so what a load costs the host is its peak less what the devices
hold in the end. Every mesh is a process of its own. Virtual devices share the cores, and a step that small computes
while it is dispatched: of the three times the scheduler's alone says something about other machines.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median

MESHES = ((1, 1), (2, 1), (4, 1), (8, 1), (4, 2))  # tensor, data
HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCAB = 2048, 5632, 16, 8, 32000
MIB = 1 << 20
NUM_SEQS, STEPS, DEPTH_STEPS = 32, 120, 20
SMALL = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 512}


def config(num_layers: int, **changes: int) -> dict[str, object]:
    """A Llama's config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": num_layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCAB,
        "max_position_embeddings": 4096,
        **changes,
    }


def write_checkpoint(folder: Path, num_bytes: int) -> int:
    """A random bfloat16 Llama of about so many bytes, layer by layer; its true size."""
    import jax.numpy as jnp
    import numpy as np
    from safetensors.numpy import save_file

    dim = HIDDEN // HEADS
    layer = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * dim, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * dim, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    layer_bytes = 2 * sum(int(np.prod(shape)) for shape in layer.values())
    num_layers = max(1, (num_bytes - 4 * VOCAB * HIDDEN) // layer_bytes)
    (folder / "config.json").write_text(json.dumps(config(num_layers)))
    random, total, index = np.random.default_rng(0), 0, {}

    def write(file: str, shapes: dict[str, tuple[int, ...]]) -> None:
        nonlocal total
        tensors = {
            name: (random.standard_normal(shape, np.float32) * 0.02).astype(jnp.bfloat16)
            for name, shape in shapes.items()
        }
        save_file(tensors, folder / file)
        index.update(dict.fromkeys(tensors, file))
        total += sum(tensor.nbytes for tensor in tensors.values())

    ends = {"model.embed_tokens": (VOCAB, HIDDEN), "lm_head": (VOCAB, HIDDEN), "model.norm": (HIDDEN,)}
    write("ends.safetensors", {f"{name}.weight": shape for name, shape in ends.items()})
    for i in range(num_layers):
        write(f"layer-{i}.safetensors", {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return total


def anonymous_bytes() -> int:
    """This process's own memory: files that are mapped do not count."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("RssAnon"))


def load(folder: str, tensor: int, data: int) -> dict[str, float]:
    """Loads on a mesh and watches this process's memory."""
    from jaxcept_models.model import load_model
    from jaxcept_models.sharding import make_mesh

    mesh = make_mesh(tensor, data)
    before, peak, stop = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.002):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    model = load_model(folder, dtype="bfloat16", mesh=mesh)
    seconds = time.perf_counter() - start
    stop.set()
    watcher.join()
    held = sum(part.data.nbytes for weight in model.weights for part in weight.addressable_shards)
    shard = held // mesh.size
    return {
        "shard_mib": shard / MIB,
        "devices_mib": held / MIB,
        "peak_mib": (peak - before) / MIB,
        "host_mib": (peak - before - held) / MIB,
        "seconds": seconds,
    }


def step(tensor: int, data: int) -> dict[str, float]:
    """Medians of a steady decode step: the scheduler's part, and the runner's until the step is dispatched."""
    from jaxcept.runner.runner import DeviceRunner, RunnerConfig
    from jaxcept.scheduler.config import SchedulerConfig
    from jaxcept.scheduler.params import SamplingParams
    from jaxcept.scheduler.policies.preserve import Preserve
    from jaxcept.scheduler.request import Request
    from jaxcept.scheduler.scheduler import Scheduler
    from jaxcept_models.model import load_model
    from jaxcept_models.sharding import make_mesh

    with tempfile.TemporaryDirectory() as name:
        Path(name, "config.json").write_text(json.dumps(config(2, **SMALL)))
        model = load_model(name, load_format="dummy", mesh=make_mesh(tensor, data))
    sizes = (NUM_SEQS * 20, 16, NUM_SEQS, 64, 256)
    runner = DeviceRunner(model, RunnerConfig(*sizes))
    runner.warm_up()
    scheduler = Scheduler(SchedulerConfig(*sizes, 512), Preserve())
    for i in range(NUM_SEQS):
        scheduler.add(Request(str(i), tuple(range(3, 11 + i % 8)), SamplingParams(max_tokens=None)), 0.0)
    planning, submitting, waiting = [], [], []
    for now in range(STEPS):
        times = [time.perf_counter()]

        def lap(times: list[float] = times) -> None:
            times.append(time.perf_counter())

        plan = scheduler.schedule(float(now))
        assert plan is not None
        lap()
        runner.submit(plan)
        lap()
        result = runner.collect()
        lap()
        scheduler.update(plan, result, float(now))
        lap()
        first, second, third, fourth = (after - before for before, after in pairwise(times))
        planning.append(first + fourth)
        submitting.append(second)
        waiting.append(third)
    columns = {"scheduler_ms": planning, "submit_ms": submitting, "wait_ms": waiting}
    return {name: 1e3 * median(values[DEPTH_STEPS:]) for name, values in columns.items()}


def in_process(arguments: list[str]) -> dict[str, float]:
    """One measurement in a fresh process with eight virtual devices."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def measure_meshes(rows: Callable[[int, int], dict[str, float]]) -> list[dict[str, float]]:
    """A row for each mesh, printed as it comes."""
    measured = []
    for tensor, data in MESHES:
        row = rows(tensor, data)
        if not measured:
            print("| tensor | data | " + " | ".join(row) + " |\n|" + "---|" * (len(row) + 2))
        print(f"| {tensor} | {data} | " + " | ".join(f"{value:.3g}" for value in row.values()) + " |", flush=True)
        measured.append({"tensor": tensor, "data": data} | row)
    return measured


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["load", "step"])
    parser.add_argument("--gib", type=float, default=1.0, help="size of the checkpoint")
    parser.add_argument("--save", type=Path, help="file for the figures, as JSON")
    parser.add_argument("--mesh", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.mesh is not None:
        print(json.dumps(load(args.folder, *args.mesh) if args.what == "load" else step(*args.mesh)))
        return
    about: dict[str, object] = {"command": f"python benchmarks/sharded.py {args.what}"}
    if args.what == "step":
        rows = measure_meshes(lambda tensor, data: in_process(["step", "--mesh", str(tensor), str(data)]))
    else:
        with tempfile.TemporaryDirectory() as name:
            about["checkpoint_mib"] = size = write_checkpoint(Path(name), int(args.gib * 2**30)) / MIB
            print(f"a checkpoint of {size:.0f} MiB")
            rows = measure_meshes(
                lambda tensor, data: in_process(["load", "--mesh", str(tensor), str(data), "--folder", name])
            )
    if args.save is not None:
        about |= {
            "device": f"eight virtual devices on {os.cpu_count()} cores, {platform.machine()}",
            "jax": version("jax"),
            "date": datetime.now(UTC).date().isoformat(),
        }
        args.save.write_text(json.dumps(about | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
