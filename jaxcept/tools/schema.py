"""Python types as JSON schema, and JSON values back as those types."""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

Schema = dict[str, Any]
Convert = Callable[[Any], Any]

_SCALARS: dict[Any, str] = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
_JSON_NAMES: dict[type, str] = {**_SCALARS, list: "array", tuple: "array", dict: "object"}


class UnsupportedTypeError(TypeError):
    """A type that has no JSON schema here."""


def _same(value: Any) -> Any:
    return value


def json_type_name(value: object) -> str:
    """The JSON name of a value's type, for messages."""
    return _JSON_NAMES.get(type(value), type(value).__name__)


def type_schema(hint: Any) -> tuple[Schema, Convert]:
    """The JSON schema of a type hint, and the function that turns a checked JSON value into that type.

    Supports str, int, float, bool, None, Any, list, tuple[T, ...], dict[str, T], Literal, Enum, unions, Annotated (a
    string in it is the description), dataclasses and TypedDicts. Raises UnsupportedTypeError for the rest.
    """
    if hint is None:
        hint = type(None)
    if hint is Any or hint is object:
        return {}, _same
    if hint in _SCALARS:
        return {"type": _SCALARS[hint]}, float if hint is float else _same
    origin = get_origin(hint)
    if origin is typing.Annotated:
        made = _annotated(hint)
    elif origin in (Union, types.UnionType):
        made = _union(get_args(hint))
    elif origin is Literal:
        made = _literal(get_args(hint)), _same
    elif hint in (list, Sequence, tuple) or origin in (list, Sequence, tuple):
        made = _array(hint, origin)
    elif hint in (dict, Mapping) or origin in (dict, Mapping):
        made = _mapping(hint)
    else:
        made = _class(hint)
    return made


def _class(hint: Any) -> tuple[Schema, Convert]:
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _enum(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _dataclass(hint)
    if typing.is_typeddict(hint):
        return _typed_dict(hint)
    raise UnsupportedTypeError(
        f"{hint!r} has no JSON schema; use str, int, float, bool, list, dict[str, T], Literal, Enum, a dataclass, "
        "a TypedDict, or a union of these"
    )


def _annotated(hint: Any) -> tuple[Schema, Convert]:
    inner, *notes = get_args(hint)
    schema, convert = type_schema(inner)
    text = next((note for note in notes if isinstance(note, str)), None)
    return ({**schema, "description": text} if text else schema), convert


def _union(members: tuple[Any, ...]) -> tuple[Schema, Convert]:
    parts = [type_schema(member) for member in members]

    def convert(value: Any) -> Any:
        for schema, convert_member in parts:
            if matches(schema, value):
                return convert_member(value)
        return value

    return {"anyOf": [schema for schema, _ in parts]}, convert


def _literal(values: tuple[Any, ...]) -> Schema:
    kinds = sorted({json_type_name(value) for value in values})
    if not all(type(value) in _SCALARS for value in values):
        raise UnsupportedTypeError(f"Literal{list(values)!r} holds a value that is not str, int, bool or None")
    return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": list(values)}


def _enum(hint: type[enum.Enum]) -> tuple[Schema, Convert]:
    return _literal(tuple(member.value for member in hint)), hint


def _array(hint: Any, origin: Any) -> tuple[Schema, Convert]:
    args = get_args(hint)
    make = tuple if tuple in (hint, origin) else list
    if not args:
        return {"type": "array", "items": {}}, make
    if make is tuple and not (len(args) == 2 and args[1] is Ellipsis):
        raise UnsupportedTypeError(f"{hint!r}: only tuple[T, ...] has a JSON schema here; use a list or a dataclass")
    items, convert = type_schema(args[0])
    return {"type": "array", "items": items}, lambda value: make(convert(item) for item in value)


def _mapping(hint: Any) -> tuple[Schema, Convert]:
    args = get_args(hint)
    if not args:
        return {"type": "object"}, _same
    if args[0] is not str:
        raise UnsupportedTypeError(f"{hint!r}: the keys of a JSON object are strings; use dict[str, T]")
    values, convert = type_schema(args[1])
    schema = {"type": "object", "additionalProperties": values}
    return schema, lambda value: {key: convert(item) for key, item in value.items()}


def _object(fields: Mapping[str, Any], required: Sequence[str]) -> tuple[Schema, dict[str, Convert]]:
    parts = {name: type_schema(hint) for name, hint in fields.items()}
    schema = {
        "type": "object",
        "properties": {name: schema for name, (schema, _) in parts.items()},
        "required": list(required),
        "additionalProperties": False,
    }
    return schema, {name: convert for name, (_, convert) in parts.items()}


def _dataclass(hint: Any) -> tuple[Schema, Convert]:
    hints = typing.get_type_hints(hint, include_extras=True)
    fields = [field for field in dataclasses.fields(hint) if field.init]
    missing = dataclasses.MISSING
    required = [field.name for field in fields if field.default is missing and field.default_factory is missing]
    schema, converts = _object({field.name: hints[field.name] for field in fields}, required)
    return schema, lambda value: hint(**{name: converts[name](item) for name, item in value.items()})


def _typed_dict(hint: Any) -> tuple[Schema, Convert]:
    hints = typing.get_type_hints(hint)
    # Where annotations are strings, __required_keys__ does not know of NotRequired inside of them.
    marks = {name: get_origin(mark) for name, mark in typing.get_type_hints(hint, include_extras=True).items()}
    required = [
        name
        for name in hints
        if marks[name] is typing.Required or (marks[name] is not typing.NotRequired and name in hint.__required_keys__)
    ]
    schema, converts = _object(hints, required)
    return schema, lambda value: {name: converts[name](item) for name, item in value.items()}


def matches(schema: Mapping[str, Any], value: Any) -> bool:
    """Whether a JSON value has the schema's outer type and, where it has an enum, is one of its values."""
    if "anyOf" in schema:
        return any(matches(member, value) for member in schema["anyOf"])
    wanted = schema.get("type")
    if wanted is not None and not any(
        has_type(value, name) for name in ([wanted] if isinstance(wanted, str) else wanted)
    ):
        return False
    return "enum" not in schema or is_listed(value, schema["enum"])


def has_type(value: Any, name: object) -> bool:
    """Whether a JSON value is of the named JSON type. 3.0 is an integer, True is none."""
    if name == "integer":
        return type(value) is int or (isinstance(value, float) and value.is_integer())
    if name == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    if name == "array":
        return isinstance(value, list | tuple)
    if name == "object":
        return isinstance(value, Mapping)
    return json_type_name(value) == name


def is_listed(value: Any, allowed: Sequence[Any]) -> bool:
    """Membership that tells True from 1, as JSON does."""
    return any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in allowed)
