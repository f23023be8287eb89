"""What the modules of routes share: the engine's service, the limits, and how a request is read and answered.

A module of routes has `routes(api: Api) -> list[BaseRoute]`; `jaxcept_serve.app.create_app` puts them together.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from jaxcept_serve.limits import Gate, ServerOptions
from jaxcept_serve.sse import DONE, EventStream, OnError, event, while_connected
from jaxcept_serve.turns import Caller, Hints, Service, ServiceError, Usage
from jaxcept_serve.wire import (
    Body,
    Field,
    as_object,
    bad,
    error_body,
    error_response,
    is_anthropic,
    read_body,
    read_fields,
)

T = TypeVar("T")

MAX_NAME_CHARS = 512

JAXCEPT_FIELDS = (
    Field("expected_tool_s", "number", "Seconds that the client's tools are expected to take.", minimum=0, maximum=1e6),
    Field("hold_ttl_s", "number", "Seconds that the context may wait for the next turn; 0: the conversation is over.",
          minimum=0, maximum=1e6),
    Field("run_tools", "array", "Names of the server's tools that this turn may use (absent: all).", max_length=1024,
          items=Field("", "string", nullable=False, max_length=MAX_NAME_CHARS)),
    Field("max_tool_calls", "integer", "Most calls of the server's tools.", minimum=0, maximum=100_000),
)  # fmt: skip


def _read_jaxcept(value: Any, path: str) -> Body:
    for name in as_object(value, path):
        if name not in {field.name for field in JAXCEPT_FIELDS}:
            raise bad(f"{path}.{name[:80]}", "is unknown")
    return read_fields(value, JAXCEPT_FIELDS, path)


_TTL_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def read_ttl(value: Any, path: str) -> float:
    """Seconds of a TTL: a number, or a string such as "300", "30s", "5m", "1h"."""
    if type(value) in (int, float) and 0 <= value < 1e9:
        return float(value)
    if isinstance(value, str) and value.isascii():
        number, unit = (value[:-1], _TTL_UNITS[value[-1]]) if value[-1:] in _TTL_UNITS else (value, 1.0)
        if number.isdigit() and len(number) <= 6:
            return float(number) * unit
    raise bad(path, "expected seconds, or a string such as 30s, 5m or 1h")


_CACHE_OPTIONS = (
    Field("ttl", "any", "Seconds, or 30s, 5m, 1h, 24h: how long the context may wait.", read=read_ttl,
          schema={"anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": "^[0-9]{1,6}[smhd]?$"}]}),
    Field("mode", "string", max_length=64),
    Field("prewarm", "boolean", "Compute the prompt, for the cache, and generate nothing."),
    Field("comparison_response_id", "string", "The answer that this request is expected to go on from.",
          max_length=MAX_NAME_CHARS),
)  # fmt: skip

HINT_FIELDS = (
    Field("priority", "integer", "Lower is served first.", default=0, minimum=-(2**31), maximum=2**31 - 1),
    Field("prompt_cache_key", "string", "Names the conversation.", max_length=MAX_NAME_CHARS),
    Field("prompt_cache_options", "object", "How the context is kept.",
          read=lambda value, path: read_fields(value, _CACHE_OPTIONS, path),
          schema={"properties": {field.name: field.json_schema for field in _CACHE_OPTIONS}}),
    Field("prompt_cache_retention", "string", "How long the context may wait: 24h is --max-hold-ttl.",
          choices=("in_memory", "in-memory", "24h")),
    Field("jaxcept", "object", "What this server alone understands.", read=_read_jaxcept,
          schema={"properties": {field.name: field.json_schema for field in JAXCEPT_FIELDS},
                  "additionalProperties": False}),
)  # fmt: skip
_RETENTION_S = {"24h": 86400.0}
_SESSION_HEADERS = ("x-session-id", "x-conversation-id")


@dataclass(frozen=True, slots=True)
class Api:
    """The service and the limits, with the helpers that every API needs."""

    service: Service
    options: ServerOptions
    gate: Gate

    async def read_body(self, request: Request) -> Body:
        """The request's JSON object, within the limits. Raises ServiceError."""
        options = self.options
        return await read_body(
            request,
            max_bytes=options.max_body_bytes,
            timeout_s=options.body_timeout_s,
            max_depth=options.max_json_depth,
        )

    def caller(self, request: Request) -> Caller:
        """Who asks, as the API key tells."""
        caller = request.scope.get("state", {}).get("caller")
        return caller if isinstance(caller, Caller) else Caller()

    def request_id(self, request: Request) -> str:
        """The id of this HTTP request, which logs and the header X-Request-Id tell."""
        return str(request.scope.get("state", {}).get("request_id") or uuid.uuid4().hex)

    def check_model(self, name: str | None) -> str:
        """The model's name as asked for, or its first one. Raises ServiceError 404."""
        names = self.service.model_names
        if name is None:
            return names[0]
        if name not in names:
            raise ServiceError(404, f"model: there is none of this name; there is {', '.join(names)}", param="model",
                               code="model_not_found")  # fmt: skip
        return name

    def hints(self, values: Mapping[str, Any], request: Request) -> Hints:
        """What a client says about its conversation: HINT_FIELDS as read_fields returns them, and session headers."""
        options: Mapping[str, Any] = values.get("prompt_cache_options") or {}
        ours: Mapping[str, Any] = values.get("jaxcept") or {}
        headers = (request.headers.get(name) for name in _SESSION_HEADERS)
        conversation = values.get("prompt_cache_key") or options.get("comparison_response_id")
        conversation = conversation or next((value[:MAX_NAME_CHARS] for value in headers if value), None)
        hold_ttl_s = ours.get("hold_ttl_s")
        if hold_ttl_s is None:
            hold_ttl_s = options.get("ttl", _RETENTION_S.get(values.get("prompt_cache_retention") or ""))
        return Hints(
            expected_tool_s=ours.get("expected_tool_s"),
            hold_ttl_s=hold_ttl_s,
            conversation=conversation,
            priority=values.get("priority") or 0,
        )

    def admit(self, num_prompts: int = 1) -> None:
        """Raises ServiceError 503 (with Retry-After) where the queue is full."""
        self.gate.admit(self.service.metrics(), num_prompts)

    def stream(self, request: Request, chunks: AsyncIterator[bytes], on_error: OnError | None = None) -> EventStream:
        """An answer of server-sent events (see sse.event). `chunks` is closed when the client goes away.

        Errors of the iterator are sent as events in the form of the path's API, unless `on_error` writes them.
        """
        path, request_id = request.scope["path"], self.request_id(request)

        def tell(error: ServiceError) -> bytes:
            body = error_body(error, path, request_id)
            return event(body, "error") if is_anthropic(path) else event(body) + DONE

        return EventStream(
            chunks,
            on_error=on_error or tell,
            keepalive_s=self.options.sse_keepalive_s,
            send_timeout_s=self.options.send_timeout_s,
        )

    async def collect(self, request: Request, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which is cancelled when the client goes away. For answers in one piece."""
        return await while_connected(request.receive, work)

    def error(self, request: Request, error: ServiceError) -> Response:
        """An error as a whole answer, in the form of the path's API."""
        return error_response(error, request.scope["path"], self.request_id(request))


def usage_figures(usage: Usage) -> dict[str, Any]:
    """What `usage.jaxcept` tells."""
    return {
        "returned_tokens": usage.returned_tokens,
        "swapped_tokens": usage.swapped_tokens,
        "recomputed_tokens": usage.recomputed_tokens,
        "intercepted_s": usage.intercepted_s,
        "held_byte_s": usage.held_byte_s,
    }


def openai_usage(usage: Usage) -> dict[str, Any]:
    """Usage as chat and plain completions tell it. What the server's tools returned was taken in, like the prompt."""
    return {
        "prompt_tokens": usage.prompt_tokens + usage.returned_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "cache_write_tokens": usage.cache_write_tokens,
        },
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "jaxcept": usage_figures(usage),
    }


def usage_so_far(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """Usage in the midst of a stream: what continuous_usage_stats asks for."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def prewarms(values: Body) -> bool:
    """Whether the prompt alone is to be computed."""
    return bool((values["prompt_cache_options"] or {}).get("prewarm"))


def all_fields(*tables: Sequence[Field]) -> tuple[Field, ...]:
    """Tables of fields as one."""
    return tuple(field for table in tables for field in table)
