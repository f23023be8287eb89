"""A call's JSON, read with some patience for how models write it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from jaxcept.tools.scan import MAX_NESTING, nesting

_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}|\\u[dD][c-fC-F][0-9a-fA-F]{2}")
_NAME_GUESS = re.compile(r'"name"\s*:\s*"([^"\\]{1,128})"')
MAX_NAME_CHARS = 256


class CallTextError(ValueError):
    """The text of a call cannot be read; the message is a sentence for the model."""


def guess_name(raw: str) -> str:
    """The tool's name in a text that cannot be read whole; "" where none is found."""
    found = _NAME_GUESS.search(raw)
    return found[1] if found else ""


def load_json(text: str, deepest: int | None = None) -> Any:
    """A JSON value. `deepest` is its nesting, where a scanner has counted it. Raises CallTextError."""
    if (nesting(text) if deepest is None else deepest) > MAX_NESTING:
        raise CallTextError(f"the JSON is nested more than {MAX_NESTING} deep")
    try:
        value = json.loads(text, strict=False, parse_constant=_refuse_constant)
    except RecursionError:
        raise CallTextError(f"the JSON is nested more than {MAX_NESTING} deep") from None
    except json.JSONDecodeError as error:
        raise CallTextError(f"the JSON is not valid: {error.msg} at character {error.pos}") from None
    except ValueError as error:
        raise CallTextError(f"the JSON is not valid: {error}") from None
    return _without_lone_surrogates(value) if _ESCAPED_SURROGATE.search(text) else value


def read_call(value: Any) -> tuple[str, dict[str, Any]]:
    """Name and arguments of a decoded call: {"name", "arguments"}, with the variations that models produce.

    "parameters" stands for "arguments"; arguments may be missing, null or JSON in a string; the call may be wrapped in
    "function". Raises CallTextError.
    """
    if not isinstance(value, dict):
        raise CallTextError('a call is a JSON object with "name" and "arguments"')
    inner = value.get("function")
    if isinstance(inner, dict):
        value = inner
    name = value.get("name")
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_CHARS:
        raise CallTextError('the call has no "name"')
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        arguments = load_json(arguments) if arguments.strip() else None
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise CallTextError(f'the "arguments" of {name!r} are not a JSON object')
    return name, arguments


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _without_lone_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, Mapping):
        return {_without_lone_surrogates(key): _without_lone_surrogates(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_lone_surrogates(item) for item in value]
    return value
