"""A call's arguments as an HTTP request: what goes into the path, the query, the headers and the body."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

import msgspec

from jaxcept.tools.output import ToolError

_HEADER_VALUE = re.compile(r"[\t\x20-\x7e]*")
_PLACE = re.compile(r"\{([^{}]+)\}")


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of an operation. `argument` is its name as the model knows it."""

    argument: str
    name: str
    place: str  # path, query or header
    style: str
    explode: bool
    is_json: bool  # its value is sent as JSON text


@dataclass(frozen=True, slots=True)
class Operation:
    """How to send one operation. `body_type` is the media type of its body, None where it has none."""

    method: str
    base_url: str
    path: str
    parameters: tuple[Parameter, ...]
    body_type: str | None

    def request(self, arguments: Mapping[str, Any]) -> tuple[str, list[tuple[str, str]], bytes | None]:
        """The URL, headers and body of a call. Raises ToolError on a value that cannot stand where it belongs."""
        path, query, headers = self.path, list[tuple[str, str]](), list[tuple[str, str]]()
        in_path: dict[str, str] = {}
        for parameter in self.parameters:
            value = arguments.get(parameter.argument)
            if value is None:
                continue
            if parameter.place == "path":
                in_path[parameter.name] = _path_text(parameter, value)
            elif parameter.place == "query":
                query += _query_pairs(parameter, value)
            else:
                headers.append((parameter.name, _header_text(parameter, value)))
        path = _PLACE.sub(lambda match: _filled(in_path, match[1]), path)
        url = self.base_url.rstrip("/") + path + (f"?{urlencode(query)}" if query else "")
        body = arguments.get("body")
        if self.body_type is None or body is None:
            return url, headers, None
        return url, [*headers, ("Content-Type", self.body_type)], _body_bytes(self.body_type, body)


def _filled(values: Mapping[str, str], name: str) -> str:
    if name not in values:
        raise ToolError(f"argument {name!r} is needed: it is part of the path")
    return values[name]


def _path_text(parameter: Parameter, value: Any) -> str:
    text = _joined(parameter, value)
    if text in ("", ".", ".."):  # these would make another path of it
        raise ToolError(f"argument {parameter.argument!r}: {text!r} cannot be part of a path")
    return quote(text, safe="")


def _query_pairs(parameter: Parameter, value: Any) -> Iterator[tuple[str, str]]:
    if not parameter.is_json and isinstance(value, Mapping) and parameter.style == "deepObject":
        yield from ((f"{parameter.name}[{key}]", _text(item)) for key, item in value.items())
    elif not parameter.is_json and parameter.explode and isinstance(value, Mapping):
        yield from ((str(key), _text(item)) for key, item in value.items())
    elif not parameter.is_json and parameter.explode and _is_list(value):
        yield from ((parameter.name, _text(item)) for item in value)
    else:
        yield parameter.name, _joined(parameter, value)


def _header_text(parameter: Parameter, value: Any) -> str:
    text = _joined(parameter, value)
    if not _HEADER_VALUE.fullmatch(text):
        raise ToolError(f"argument {parameter.argument!r}: a header takes printable ASCII characters alone")
    return text


def _joined(parameter: Parameter, value: Any) -> str:
    if parameter.is_json:
        return msgspec.json.encode(value).decode()
    if _is_list(value):
        return {"spaceDelimited": " ", "pipeDelimited": "|"}.get(parameter.style, ",").join(map(_text, value))
    if isinstance(value, Mapping):
        return ",".join(f"{key},{_text(item)}" for key, item in value.items())
    return _text(value)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return msgspec.json.encode(value).decode()


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _body_bytes(media_type: str, value: Any) -> bytes:
    if media_type == "application/x-www-form-urlencoded":
        if not isinstance(value, Mapping):
            raise ToolError("argument 'body': expected an object")
        pairs = [
            (str(key), _text(each)) for key, item in value.items() for each in (item if _is_list(item) else [item])
        ]
        return urlencode(pairs).encode()
    if media_type.startswith("text/"):
        return _text(value).encode("utf-8", "replace")
    return msgspec.json.encode(value)
