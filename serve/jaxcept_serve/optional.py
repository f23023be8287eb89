"""Commands whose packages come with the extra `serve`."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from functools import partial
from typing import Any


def add_optional(commands: Any, name: str, module: str, add: Callable[[Any], object]) -> None:
    """Adds a command by its module; where that cannot be imported, one that says what to install."""
    try:
        found = importlib.import_module(f"jaxcept_serve.{module}")
    except ImportError as error:
        told = "needs the extra serve: pip install 'jaxcept[serve]'"
        parser = commands.add_parser(name, help=told, add_help=False, prefix_chars="\0")  # flags are words like others
        parser.add_argument("words", nargs=argparse.REMAINDER)
        parser.set_defaults(run=partial(_refuse, str(error)))
    else:
        add(found)


def _refuse(why: str, args: argparse.Namespace) -> int:
    raise ValueError(f"{why}: pip install 'jaxcept[serve]'")
