"""Bytes in and out of HTTP: bounded bodies, typed fields that name themselves when they are wrong, error bodies."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from jaxcept_serve.turns import ServiceError

Kind = Literal["string", "integer", "number", "boolean", "array", "object", "any"]
Body = dict[str, Any]

_DECODER = msgspec.json.Decoder()
_ENCODER = msgspec.json.Encoder()
_MAX_SHOWN = 80
_JSON_NAMES: dict[type, str] = {
    str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null", list: "array", dict: "object",
}  # fmt: skip
_PARAM = re.compile(r"([A-Za-z_][A-Za-z0-9_.\[\]]{0,80}?)(?:\[[^=]*\])?=")

OPENAI_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 409: "conflict_error", 410: "invalid_request_error", 413: "invalid_request_error",
    415: "invalid_request_error", 429: "rate_limit_error", 431: "invalid_request_error", 500: "server_error",
    503: "service_unavailable_error",
}  # fmt: skip
ANTHROPIC_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 500: "api_error", 503: "overloaded_error",
}  # fmt: skip


def to_json(value: object) -> bytes:
    """A value as JSON bytes; non-finite floats become null."""
    return _ENCODER.encode(value)


def bad(param: str, message: str, *, status: int = 400, code: str | None = None) -> ServiceError:
    """A refusal that names the field at fault, in its text too."""
    return ServiceError(status, f"{param}: {message}", param=param, code=code)


def from_value_error(error: ValueError) -> ServiceError:
    """A refusal of our own checks (`field=value: expected …`), with the field taken from its text."""
    text = str(error)
    found = _PARAM.match(text)
    return ServiceError(400, text[:500], param=found[1] if found else None)


def shown(value: object) -> str:
    """A value for a message: short, and harmless wherever it is printed."""
    if isinstance(value, dict | list):
        return f"an {'object' if isinstance(value, dict) else 'array'} of {len(value)}"
    text = ascii(value)
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…"


# -- bodies


async def read_body(request: Request, *, max_bytes: int, timeout_s: float, max_depth: int) -> Body:
    """The JSON object that a request carries.

    Raises ServiceError: 413 for a body over `max_bytes`, 415 for another content type or charset (a page in a browser
    can send those without asking), 408 where it takes longer than `timeout_s`, 400 for what is no JSON object.
    """
    check_content_type(request.headers.get("content-type", ""))
    return decode_body(await read_bytes(request, max_bytes, timeout_s), max_depth)


def check_content_type(value: str) -> None:
    """Raises ServiceError 415 unless the body is declared as JSON in UTF-8."""
    kind, *parameters = (part.strip().lower() for part in value.split(";"))
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise bad("Content-Type", f"expected application/json, got {shown(value)}", status=415)
    for parameter in parameters:
        name, _, charset = parameter.partition("=")
        if name.strip() == "charset" and charset.strip().strip('"') not in ("utf-8", "utf8"):
            raise bad("Content-Type", f"expected charset utf-8, got {shown(charset)}", status=415)


async def read_bytes(request: Request, max_bytes: int, timeout_s: float) -> bytes:
    """A request's body. Raises ServiceError 413 and 408; ClientDisconnect where the client goes away."""
    too_large = ServiceError(413, f"the body is larger than {max_bytes} bytes", code="request_too_large")
    length = request.headers.get("content-length", "")
    if length and (not length.isascii() or not length.isdigit()):
        raise bad("Content-Length", "expected a number of bytes")
    if length and (len(length) > 15 or int(length) > max_bytes):
        raise too_large
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                size += len(chunk)
                if size > max_bytes:
                    raise too_large
                chunks.append(chunk)
    except TimeoutError:
        raise ServiceError(408, f"the body did not arrive within {timeout_s:g} s") from None
    return b"".join(chunks)


def decode_body(data: bytes, max_depth: int) -> Body:
    """The JSON object in `data`. Where a key comes twice the last one counts, for there is no other reader of it."""
    try:
        body = _DECODER.decode(data)
    except RecursionError:
        raise ServiceError(400, f"the body is nested deeper than {max_depth} levels", param="body") from None
    except UnicodeDecodeError:
        raise ServiceError(400, "the body is not UTF-8", param="body") from None
    except msgspec.MsgspecError as error:
        raise ServiceError(400, f"the body is not valid JSON: {error}", param="body") from None
    if not isinstance(body, dict):
        raise ServiceError(400, f"the body: expected a JSON object, got {_json_name(body)}", param="body")
    # Counting brackets is a thousand times faster than looking at every value, and mostly settles it.
    if data.count(b"[") + data.count(b"{") > max_depth and depth_exceeds(body, max_depth):
        raise ServiceError(400, f"the body is nested deeper than {max_depth} levels", param="body")
    return body


def depth_exceeds(value: object, limit: int) -> bool:
    """Whether arrays and objects are nested deeper than `limit`. Takes no recursion."""
    level: list[Any] = [value] if isinstance(value, dict | list) else []
    for _ in range(limit):
        level = [
            item
            for each in level
            for item in (each.values() if type(each) is dict else each)
            if type(item) is dict or type(item) is list
        ]
        if not level:
            return False
    return bool(level)


# -- fields


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a body: what parses it, and what the OpenAPI document says of it.

    `kind` "any" leaves all checks to `read`. Bounds are inclusive; lengths are of strings, arrays and objects. null
    counts as absent unless `nullable` is False. `items` describes an array's entries. `read(value, path)` reads
    further what the kind allows, and raises ServiceError. `schema` adds to (or replaces keys of) the JSON schema.
    """

    name: str
    kind: Kind
    about: str = ""
    default: Any = None
    required: bool = False
    nullable: bool = True
    minimum: float | None = None
    maximum: float | None = None
    min_length: int | None = None
    max_length: int | None = None
    choices: tuple[Any, ...] = ()
    items: Field | None = None
    read: Callable[[Any, str], Any] | None = None
    schema: Mapping[str, Any] | None = None

    def parse(self, value: Any, path: str) -> Any:
        """The checked value. Raises ServiceError 400 that names `path`."""
        if value is None:
            if self.required or not self.nullable:
                raise bad(path, f"expected {self.expected}, got null")
            return self.default
        if self.kind != "any":
            value = self._check(value, path)
        if self.items is not None:
            value = [self.items.parse(item, f"{path}[{index}]") for index, item in enumerate(value)]
        return value if self.read is None else self.read(value, path)

    def _check(self, value: Any, path: str) -> Any:
        if not _is_kind(value, self.kind):
            raise bad(path, f"expected {self.expected}, got {_json_name(value)} {shown(value)}")
        if self.kind == "integer":
            value = int(value)
        if self.kind in ("integer", "number"):
            is_low = self.minimum is not None and value < self.minimum
            if is_low or (self.maximum is not None and value > self.maximum) or not math.isfinite(value):
                raise bad(path, f"expected {self.expected}, got {shown(value)}")
        elif self.kind in ("string", "array", "object"):
            if self.min_length is not None and len(value) < self.min_length:
                raise bad(path, f"expected {self.expected}, got an empty one" if not value else "is too short")
            if self.max_length is not None and len(value) > self.max_length:
                raise bad(path, f"expected {self.expected}, got {len(value)}")
        if self.choices and value not in self.choices:
            raise bad(path, f"expected {self.expected}, got {shown(value)}")
        return value

    @property
    def expected(self) -> str:
        """What the field takes, in words."""
        if self.choices:
            return "one of " + ", ".join(map(str, self.choices))
        words = f"an {self.kind}" if self.kind[0] in "aio" else f"a {self.kind}"
        unit = {"string": " characters", "array": " entries", "object": " fields"}.get(self.kind, "")
        low = self.min_length if unit else self.minimum
        high = self.max_length if unit else self.maximum
        if low is not None and high is not None:
            return f"{words} of {low:g} to {high:g}{unit}"
        if low is not None:
            return f"{words} of {low:g}{unit} or more"
        return words if high is None else f"{words} of at most {high:g}{unit}"

    @property
    def json_schema(self) -> dict[str, Any]:
        """The field for the OpenAPI document."""
        schema: dict[str, Any] = {} if self.kind == "any" else {"type": self.kind}
        suffix = {"string": "Length", "array": "Items", "object": "Properties"}.get(self.kind, "")
        for key, value in (("min", self.min_length), ("max", self.max_length)):
            if value is not None and suffix:
                schema[key + suffix] = value
        for key, bound in (("minimum", self.minimum), ("maximum", self.maximum)):
            if bound is not None:
                schema[key] = bound
        if self.choices:
            schema["enum"] = list(self.choices)
        if self.items is not None:
            schema["items"] = self.items.json_schema
        schema.update(self.schema or {})
        if self.nullable and not self.required:
            if "type" in schema:
                schema["type"] = [schema["type"], "null"]
                if "enum" in schema:
                    schema["enum"] = [*schema["enum"], None]
            elif "anyOf" in schema:
                schema["anyOf"] = [*schema["anyOf"], {"type": "null"}]
        if self.about:
            schema["description"] = self.about
        if self.default is not None:
            schema["default"] = self.default
        return schema


def read_fields(body: Mapping[str, Any], table: Iterable[Field], path: str = "") -> Body:
    """Every field of the table by its name, checked; those that are absent have their default. Others are left out.

    Raises ServiceError 400 whose param is the field's path.
    """
    values: Body = {}
    for field in table:
        at = f"{path}.{field.name}" if path else field.name
        if field.name in body:
            values[field.name] = field.parse(body[field.name], at)
        elif field.required:
            raise bad(at, f"is missing: expected {field.expected}")
        else:
            values[field.name] = field.default
    return values


def refuse_fields(body: Mapping[str, Any], reasons: Mapping[str, str], path: str = "") -> None:
    """Raises ServiceError 400 for a field that is given (not null, false or empty) and cannot be honoured."""
    for name, reason in reasons.items():
        if body.get(name):
            raise bad(f"{path}.{name}" if path else name, reason)


def as_object(value: Any, path: str) -> Body:
    """The value, an object. Raises ServiceError 400."""
    if not isinstance(value, dict):
        raise bad(path, f"expected an object, got {_json_name(value)}")
    return value


def as_array(value: Any, path: str, max_length: int | None = None) -> list[Any]:
    """The value, an array of at most so many. Raises ServiceError 400."""
    if not isinstance(value, list):
        raise bad(path, f"expected an array, got {_json_name(value)}")
    if max_length is not None and len(value) > max_length:
        raise bad(path, f"expected at most {max_length} entries, got {len(value)}")
    return value


def as_text(value: Any, path: str) -> str:
    """The value, a string. Raises ServiceError 400."""
    if not isinstance(value, str):
        raise bad(path, f"expected a string, got {_json_name(value)}")
    return value


def as_token_ids(value: Sequence[Any], path: str) -> list[int]:
    """The value, a list of token ids (their range is the tokenizer's matter). Raises ServiceError 400."""
    for index, token_id in enumerate(value):
        if type(token_id) is not int or not 0 <= token_id < 2**31:
            raise bad(f"{path}[{index}]", f"expected a token id, got {_json_name(token_id)} {shown(token_id)}")
    return list(value)


def _is_kind(value: object, kind: Kind) -> bool:
    if kind == "integer":
        return type(value) is int or (type(value) is float and value.is_integer() and abs(value) < 2**53)
    if kind == "number":
        return type(value) is int or type(value) is float
    return _json_name(value) == kind


def _json_name(value: object) -> str:
    return _JSON_NAMES.get(type(value), "a value")


# -- errors


def is_anthropic(path: str) -> bool:
    """Whether a path belongs to the Anthropic API, whose errors have a form of their own."""
    return path.startswith("/v1/messages")


def error_body(error: ServiceError, path: str, request_id: str | None = None) -> dict[str, Any]:
    """An error in the form of the API that the path belongs to."""
    status, message = error.status, error.message
    if is_anthropic(path):
        kind = ANTHROPIC_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}
    kind = OPENAI_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": error.param, "code": error.code}}


def error_response(error: ServiceError, path: str, request_id: str | None = None) -> Response:
    """An error as a whole answer, with Retry-After where it says when to come again."""
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return json_response(error_body(error, path, request_id), error.status, headers)


def json_response(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON answer."""
    return Response(to_json(value), status, headers, media_type="application/json")
