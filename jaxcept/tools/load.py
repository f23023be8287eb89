"""Tools named on a command line: a module, a file, or one name of either."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxcept.tools.definition import Tool


def load_tools(spec: str) -> list[Tool | Callable[..., Any]]:
    """Tools of `module`, `module:name` or `file.py[:name]`; the name may be a function, a Tool or a list of them.

    Without a name: the module's Tool objects, or else its TOOLS list. Raises ValueError where there are none.
    """
    place, _, name = spec.partition(":")
    module = _module(place)
    if name:
        found = getattr(module, name, None)
        if isinstance(found, list | tuple) and found and all(callable(each) for each in found):
            return list(found)
        if not callable(found):
            raise ValueError(f"--tools {spec}: {place} has no function {name!r}")
        return [found]
    tools: list[Tool | Callable[..., Any]] = [value for value in vars(module).values() if isinstance(value, Tool)]
    tools = tools or list(getattr(module, "TOOLS", ()))
    if not tools:
        raise ValueError(
            f"--tools {spec}: {place} has neither @tool functions nor a list TOOLS; name one as {place}:name"
        )
    return tools


def _module(place: str) -> ModuleType:
    if not place.endswith(".py"):
        try:
            return importlib.import_module(place)
        except ImportError as error:
            raise ValueError(f"--tools {place}: {error}") from error
    path = Path(place)
    if not path.is_file():
        raise ValueError(f"--tools {place}: no such file")
    found = importlib.util.spec_from_file_location(path.stem, path)
    assert found is not None and found.loader is not None, f"{place} is a Python file"
    module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except Exception as error:  # whatever the file's own top level raises
        raise ValueError(f"--tools {place}: {type(error).__name__}: {error}") from error
    return module
