"""`jaxcept plan`: prints what a model takes of some devices, and how fast a step is at best. Nothing is loaded."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from jaxcept.capacity import KNOWN_MODELS, SHEETS, Plan, Sizes, default_max_model_len, plan_capacity
from jaxcept.config import KV_CACHE_DTYPES
from jaxcept.runner.memory import DEVICE_SHARE
from jaxcept.simulator.rooflines import BANDWIDTH_EFFICIENCY, COMPUTE_EFFICIENCY

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

GB = 1e9


def add_command(commands: Commands) -> None:
    """Registers `plan`."""
    parser = commands.add_parser(
        "plan",
        help="memory and speed of a model on devices that need not be there",
        description="Says, on paper, what a model takes of each device, how many tokens of context fit, and how long a "
        "step takes at best. The model may be a folder with a config.json, or one of: " + ", ".join(KNOWN_MODELS) + ".",
    )
    parser.add_argument("model", metavar="MODEL", help="folder, or the name of a well-known model")
    parser.add_argument("--devices", required=True, metavar="NxDEVICE", help=f"one of {', '.join(SHEETS)}: 4xa100-80gb")
    parser.add_argument(
        "--data-parallel-size", type=int, default=1, help="groups of devices that share a step's tokens"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--kv-cache-dtype", default="auto", choices=KV_CACHE_DTYPES)
    parser.add_argument("--implementation", default="pallas", choices=["pallas", "xla"])
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--max-model-len", type=int, help="(default: the model's, at most 4096)")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--context", type=int, default=1024, help="tokens of each sequence in the table of steps")
    parser.add_argument("--json", action="store_true", help="JSON instead of tables")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """`jaxcept plan`."""
    sizes = Sizes(
        args.max_num_seqs,
        args.max_num_batched_tokens,
        args.max_model_len or default_max_model_len(args.model),
        args.block_size,
        args.gpu_memory_utilization,
        args.context,
    )
    plan = plan_capacity(
        args.model, args.devices, args.data_parallel_size, sizes, args.dtype, args.implementation, args.kv_cache_dtype
    )
    if args.json:
        print(json.dumps(asdict(plan) | {"pool_bytes": plan.memory.pool_bytes}, indent=2))
    else:
        show(plan, sizes, Console())
    return 0


def show(plan: Plan, sizes: Sizes, console: Console) -> None:
    """Both tables, and what they assume."""
    memory = plan.memory
    devices = f"{plan.tensor * plan.data} x {plan.device} (tensor {plan.tensor}, data {plan.data})"
    active = ""
    if plan.num_active_params < plan.num_params:
        active = f" ({plan.num_active_params / 1e9:.2f}e9 for each token)"
    title = f"{plan.model}, {plan.num_params / 1e9:.2f}e9 parameters{active}, on {devices}"
    table = Table(title=title, title_justify="left")
    table.add_column("each device")
    table.add_column("GB", justify="right")
    for what, size in (
        ("memory", memory.device_bytes),
        (f"usable, {sizes.memory_utilization:.0%} of {DEVICE_SHARE:.0%}", memory.usable_bytes),
        ("weights", memory.weight_bytes),
        ("workspace of the largest programs", memory.workspace_bytes),
        ("staging of swaps", memory.staging_bytes),
        ("KV pool", memory.pool_bytes),
    ):
        table.add_row(what, f"{size / GB:.2f}")
    console.print(table)
    console.print(
        f"The KV pool holds {memory.num_tokens:,} tokens in {memory.num_blocks:,} blocks of {sizes.block_size}: "
        f"{memory.num_tokens // sizes.max_model_len:,} sequences of {sizes.max_model_len:,}.",
        highlight=False,
    )
    if plan.data > 1:
        console.print("Every data-parallel group has the whole pool: more groups make steps shorter, not room.")
    table = Table(title="steps", title_justify="left")
    for title in ("step", "tokens", "context", "ms", "tokens/s", ""):
        table.add_column(title, justify="left" if title in ("step", "") else "right")
    for step in plan.steps:
        note = "" if step.fits else "its contexts do not fit the pool together"
        row = (f"{step.tokens:,}", f"{step.context_tokens:,}", f"{step.seconds * 1e3:.2f}", f"{step.tokens_per_s:,.0f}")
        table.add_row(step.what, *row, note)
    console.print(table)
    if active:
        console.print("A step reads the experts that its tokens meet, if each token's are any, evenly and by chance.")
    console.print(
        f"Swap budget: {plan.swap_tokens_per_step:,} tokens each way hide behind a step of {plan.saturation_tokens} "
        f"tokens; a context of {sizes.context:,} takes {plan.swap_context_s * 1e3:.1f} ms one way.\n"
        f"Assumed: {COMPUTE_EFFICIENCY:.0%} of the data sheet's operations, {BANDWIDTH_EFFICIENCY:.0%} of its "
        "bandwidth, a host link of 10 GB/s, and the host's part of a published profile (jaxcept.simulator.rooflines). "
        "On the device itself, `jaxcept profile` measures.",
        highlight=False,
    )
