"""A call's arguments held against the tool's JSON schema, with the words a model needs to do better."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxcept.tools.schema import has_type, is_listed, json_type_name, matches

MAX_DEPTH = 64  # deeper schemas are not looked into: a client's schema may have any depth
MAX_PROBLEMS = 8
_NUMBER = re.compile(r"-?(?:0|[1-9]\d{0,299})(\.\d{1,300})?([eE][+-]?\d{1,4})?")
_WORDS = {"true": True, "false": False, "null": None}


class ArgumentsError(ValueError):
    """The arguments do not fit the schema; the message says which and why."""


def check_arguments(schema: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, checked, with unambiguous slips mended ("3" where only a number fits). Raises ArgumentsError.

    Keywords looked at: type, properties, required, additionalProperties, items, enum, const, anyOf, oneOf. An argument
    that `properties` does not name is refused unless additionalProperties allows it.
    """
    problems: list[str] = []
    if schema.get("properties") and "additionalProperties" not in schema:
        schema = {**schema, "additionalProperties": False}
    checked = _check_object(schema, arguments, "", problems, mend=True, depth=0)
    if problems:
        more = len(problems) - MAX_PROBLEMS
        raise ArgumentsError("; ".join(problems[:MAX_PROBLEMS]) + (f"; and {more} more" if more > 0 else ""))
    return checked


def _check(schema: Any, value: Any, path: str, problems: list[str], *, mend: bool, depth: int) -> Any:
    if not isinstance(schema, Mapping) or depth > MAX_DEPTH:
        return value
    choices = schema.get("anyOf") or schema.get("oneOf")
    if isinstance(choices, Sequence) and not isinstance(choices, str):
        return _check_choices(choices, value, path, problems, mend=mend, depth=depth)
    names = _type_names(schema)
    if names and not any(has_type(value, name) for name in names):
        mended = _mend(value, names) if mend else None
        if mended is None:
            problems.append(f"argument {path!r}: expected {_expected(schema, names)}, got {_shown(value)}")
            return value
        value = mended[0]
    if names and "number" not in names and isinstance(value, float) and "integer" in names:
        value = int(value)
    if "enum" in schema and not is_listed(value, schema["enum"]):
        problems.append(f"argument {path!r}: expected one of {_shown(schema['enum'], 400)}, got {_shown(value)}")
    if "const" in schema and not is_listed(value, [schema["const"]]):
        problems.append(f"argument {path!r}: expected {_shown(schema['const'])}, got {_shown(value)}")
    if isinstance(value, Mapping):
        return _check_object(schema, value, path, problems, mend=mend, depth=depth)
    if isinstance(value, list | tuple) and isinstance(schema.get("items"), Mapping):
        items = schema["items"]
        return [_check(items, item, f"{path}[{index}]", problems, mend=mend, depth=depth + 1)
                for index, item in enumerate(value)]  # fmt: skip
    return value


def _check_choices(
    choices: Sequence[Any], value: Any, path: str, problems: list[str], *, mend: bool, depth: int
) -> Any:
    """The first member that fits as it is; where none does, the first that fits once mended."""
    inside: list[str] = []
    for mend_here in (False, True) if mend else (False,):
        for choice in choices:
            found: list[str] = []
            checked = _check(choice, value, path, found, mend=mend_here, depth=depth + 1)
            if not found:
                return checked
            if isinstance(value, Mapping | list | tuple) and _is_kind(choice, value):
                inside = inside or found  # of the right kind, and wrong further in: that is what helps
    expected = " or ".join(_expected(choice, _type_names(choice)) for choice in choices if isinstance(choice, Mapping))
    problems += inside or [f"argument {path!r}: expected {expected}, got {_shown(value)}"]
    return value


def _is_kind(choice: Any, value: Any) -> bool:
    return isinstance(choice, Mapping) and "anyOf" not in choice and matches(choice, value)


def _check_object(
    schema: Mapping[str, Any], value: Mapping[str, Any], path: str, problems: list[str], *, mend: bool, depth: int
) -> dict[str, Any]:
    properties = schema.get("properties")
    properties = properties if isinstance(properties, Mapping) else {}
    extra = schema.get("additionalProperties", True)
    prefix = f"{path}." if path else ""
    for name in schema.get("required") or ():
        if name not in value:
            problems.append(f"missing argument {prefix + str(name)!r}")
    checked: dict[str, Any] = {}
    for name, item in value.items():
        if name in properties:
            checked[name] = _check(properties[name], item, prefix + name, problems, mend=mend, depth=depth + 1)
        elif extra is False:
            takes = ", ".join(map(str, properties)) or "none"
            problems.append(f"unexpected argument {_cut(prefix + str(name), 80)!r} (it takes: {_cut(takes, 400)})")
        else:
            checked[name] = _check(extra, item, prefix + str(name), problems, mend=mend, depth=depth + 1)
    return checked


def _mend(value: Any, names: Sequence[str]) -> tuple[Any] | None:
    """The one value that a slip can only mean, in a tuple; None where it could mean several or nothing."""
    if type(value) is int and "string" in names and abs(value) < 10**300:
        return (str(value),)
    if not isinstance(value, str):
        return None
    text = value.strip()
    number = _NUMBER.fullmatch(text)
    if number:
        return _mend_number(text, names, is_whole=not (number[1] or number[2]))
    if text in _WORDS and json_type_name(_WORDS[text]) in names:
        return (_WORDS[text],)
    if text[:1] in ("[", "{") and ("array" if text[0] == "[" else "object") in names:
        with contextlib.suppress(ValueError, RecursionError):
            return (json.loads(text),)
    return None


def _mend_number(text: str, names: Sequence[str], *, is_whole: bool) -> tuple[Any] | None:
    if "integer" in names and is_whole:
        return (int(text),)
    return (float(text),) if "number" in names and math.isfinite(float(text)) else None


def _type_names(schema: Mapping[str, Any]) -> list[str]:
    names = schema.get("type")
    return [names] if isinstance(names, str) else [str(name) for name in names] if isinstance(names, list) else []


def _expected(schema: Mapping[str, Any], names: Sequence[str]) -> str:
    if "enum" in schema:
        return f"one of {_shown(schema['enum'], 400)}"
    return " or ".join(names) or "another value"


def _shown(value: Any, limit: int = 80) -> str:
    if isinstance(value, Mapping):
        return "an object"
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):
        return f"a {json_type_name(value)}"
    return _cut(text, limit)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[:limit] + "…"
