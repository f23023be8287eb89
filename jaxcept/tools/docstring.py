"""A function's docstring, taken apart: what it does, and what each parameter means."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

_SECTION = re.compile(
    r"^(args|arguments|parameters|params|returns?|yields?|raises|examples?|notes?|attributes|see also|warnings?)"
    r"\s*:\s*$",
    re.IGNORECASE,
)
_ARGUMENT_SECTIONS = frozenset({"args", "arguments", "parameters", "params"})
_GOOGLE_ENTRY = re.compile(r"^\*{0,2}(\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)$")
_SPHINX_PARAM = re.compile(r"^:(?:param|parameter|arg|argument)\s+(?:[^:]*\s)?\*{0,2}(\w+)\s*:\s*(.*)$")
_SPHINX_FIELD = re.compile(r"^:\w+[^:]*:")


def parse_docstring(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """The description, and per parameter its text; from Google style `Args:` sections and Sphinx `:param x:` fields."""
    lines = (inspect.getdoc(function) or "").splitlines()
    description: list[str] = []
    parameters: dict[str, list[str]] = {}
    section: str | None = None
    entry: list[str] | None = None
    entry_indent = 0
    for line in lines:
        stripped = line.strip()
        indent = len(line) - len(line.lstrip())
        heading = _SECTION.match(line)
        if heading:
            section, entry, entry_indent = heading[1].lower(), None, 0
            continue
        if _SPHINX_FIELD.match(line):
            field = _SPHINX_PARAM.match(line)
            section = "field"
            entry = parameters.setdefault(field[1], [field[2]]) if field else None
            continue
        if section is not None and stripped and indent == 0:
            section, entry = None, None  # prose after a section belongs to the description
        if section is None:
            description.append(line)
        elif section in _ARGUMENT_SECTIONS and stripped:
            entry_indent = entry_indent or indent
            named = _GOOGLE_ENTRY.match(stripped) if indent == entry_indent else None
            if named:
                entry = parameters.setdefault(named[1], [named[2]])
            elif entry is not None:
                entry.append(stripped)
        elif section == "field" and entry is not None and stripped:
            entry.append(stripped)
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in description)).strip()
    return text, {name: " ".join(part for part in parts if part).strip() for name, parts in parameters.items()}
