"""`jaxcept convert`: a Hugging Face folder becomes a checkpoint that loads straight into the shards of any mesh."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from jaxcept.build import convert_model

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_command(commands: Commands) -> None:
    """Registers `convert`."""
    parser = commands.add_parser(
        "convert",
        help="write a model as a checkpoint for several devices",
        description="Writes a Hugging Face model as an Orbax checkpoint, in the dtypes that it has, its config, "
        "tokenizer and chat template with it. Every command takes the folder as a model, on any number of devices.",
    )
    parser.add_argument("source", type=Path, metavar="HF_DIR", help="Hugging Face folder with safetensors")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; a checkpoint there is replaced")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """`jaxcept convert`."""
    if not args.source.is_dir():
        raise FileNotFoundError(f"{args.source}: no such folder; expected a Hugging Face one with config.json")
    console = Console(stderr=True)
    with console.status("reading") as status:
        convert_model(args.source, args.out, lambda done, total, what: status.update(f"{what} ({done} of {total} MiB)"))
    print(args.out)
    return 0
