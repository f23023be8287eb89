"""Environment variables in the strings of configuration files, so that secrets stay out of them."""

from __future__ import annotations

import os
import re
from typing import Any

_VARIABLE = re.compile(r"\$\{(?:env:)?([A-Za-z_]\w*)(?::-([^}]*))?\}")


def texts(value: Any, where: str) -> dict[str, str]:
    """An object of strings, its values expanded. Raises ValueError."""
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object of strings")
    return {key: expand(item, f"{where}.{key}") or "" for key, item in value.items()}


def expand(value: Any, where: str) -> str | None:
    """A string with `${NAME}`, `${env:NAME}` and `${NAME:-default}` replaced; None stays None. Raises ValueError."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"{where}: expected a string")

    def variable(match: re.Match[str]) -> str:
        found = os.environ.get(match[1], match[2])
        if found is None:
            raise ValueError(f"{where}: the environment variable {match[1]} is not set")
        return found

    return _VARIABLE.sub(variable, value)
