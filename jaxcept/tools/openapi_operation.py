"""An operation of an OpenAPI document: the arguments that it takes, and how each of them is sent."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urljoin, urlsplit

from jaxcept.tools.openapi_request import Operation, Parameter
from jaxcept.tools.openapi_schema import Document

MAX_DESCRIPTION_CHARS = 2_000
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
# Set by this client or by the operator; OpenAPI itself has a parameter of the first three ignored.
_OWN_HEADERS = {
    "accept", "content-type", "authorization", "host", "content-length", "transfer-encoding", "connection", "cookie",
    "proxy-authorization", "te", "trailer", "upgrade", "expect", "accept-encoding", "user-agent",
}  # fmt: skip


def read_operation(
    document: Document, path: str, item: Mapping[str, Any], method: str, operation: Mapping[str, Any], base_url: str
) -> tuple[Operation, dict[str, Any]]:
    """How to send an operation of the path `item`, and the JSON schema of its arguments.

    Raises ValueError, KeyError or TypeError on one that cannot be sent or is not described as OpenAPI asks.
    """
    properties: dict[str, Any] = {}
    required: list[str] = []
    parameters: list[Parameter] = []
    for given in _parameters(document, item, operation):
        parameter = _parameter(given, set(properties))
        if parameter is None:
            continue
        content = given.get("content")
        schema = next(iter(content.values())).get("schema") if content else given.get("schema")
        properties[parameter.argument] = document.schema(schema) | described(given)
        if given.get("required") or parameter.place == "path":
            required.append(parameter.argument)
        parameters.append(parameter)
    body_type, body = _body(document, operation)
    if body_type is not None:
        properties["body"] = document.schema(body.get("schema")) | described(body)
        if body.get("required"):
            required.append("body")
    schema = {"type": "object", "properties": properties, "required": required}
    return Operation(method.upper(), base_url, path, tuple(parameters), body_type), schema


def server_url(document: Document, item: Mapping[str, Any], operation: Mapping[str, Any], place: str) -> str:
    """The first server that the operation, its path or the document names; `place` is where the document is from."""
    servers = operation.get("servers") or item.get("servers") or document.root.get("servers") or [{"url": "/"}]
    server = document.resolve(servers[0])
    url = str(server.get("url", "/"))
    for key, variable in (server.get("variables") or {}).items():
        url = url.replace(f"{{{key}}}", str(variable.get("default", "")))
    return check_url(urljoin(place, url) if "://" in place else url)


def check_url(url: str) -> str:
    """The URL, if requests can be sent under it. Raises ValueError."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"server {url[:200]!r}: expected http:// or https://, a host and a path (set baseUrl)")
    if parts.username or parts.password:
        raise ValueError("a server with a password in its URL: set it as a header")
    return url


def _parameters(document: Document, item: Mapping[str, Any], operation: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The operation's parameters and those of its path that it does not replace."""
    merged: dict[tuple[Any, Any], Mapping[str, Any]] = {}
    for given in (item.get("parameters") or []), (operation.get("parameters") or []):
        for each in given:
            parameter = document.resolve(each)
            merged[parameter["in"], parameter["name"]] = parameter
    return list(merged.values())


def _parameter(given: Mapping[str, Any], taken: set[str]) -> Parameter | None:
    """How to send a parameter; None for one that this client sets by itself. Raises ValueError if it cannot be sent."""
    place, name = given["in"], str(given["name"])
    if place == "cookie" and not given.get("required"):
        return None
    if place not in ("path", "query", "header"):
        raise ValueError(f"a parameter in {place!r} is needed and cannot be sent")
    if place == "header" and not _HEADER_NAME.fullmatch(name):
        raise ValueError(f"{name[:80]!r} is no name of a header")
    if place == "header" and name.lower() in _OWN_HEADERS:
        return None
    argument = f"{place}_{name}" if name in taken or name == "body" else name
    style = str(given.get("style") or ("form" if place == "query" else "simple"))
    explode = bool(given.get("explode", style == "form"))
    return Parameter(argument, name, place, style, explode, is_json="content" in given)


def _body(document: Document, operation: Mapping[str, Any]) -> tuple[str | None, Mapping[str, Any]]:
    """The media type and the description of a request's body. Raises ValueError on one that cannot be written."""
    given = document.resolve(operation.get("requestBody"))
    content = given.get("content") if isinstance(given, dict) else None
    if not content:
        return None, {}
    kinds = {str(kind): str(kind).partition(";")[0].strip().lower() for kind in content}
    chosen = (
        next((kind for kind, plain in kinds.items() if plain.endswith(("/json", "+json"))), None)
        or next((kind for kind, plain in kinds.items() if plain == "application/x-www-form-urlencoded"), None)
        or next((kind for kind, plain in kinds.items() if plain.startswith("text/")), None)
    )
    if chosen is None:
        raise ValueError(f"a body of type {', '.join(kinds)[:200]} cannot be written")
    shape = {"schema": content[chosen].get("schema"), "required": given.get("required"), **described(given)}
    return (chosen if not chosen.startswith("text/") else "text/plain; charset=utf-8"), shape


def described(given: Mapping[str, Any]) -> dict[str, str]:
    """A node's description, as a schema carries it."""
    text = given.get("description")
    return {"description": text[:MAX_DESCRIPTION_CHARS]} if isinstance(text, str) and text else {}
