"""/v1/generate and /v1/interceptions: the engine's own way, with declared triggers and answers by id."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from jaxcept.scheduler.params import OnToolFailure, SamplingParams
from jaxcept.session import InterceptOptions
from jaxcept_serve.api import Api, openai_usage
from jaxcept_serve.native import Event, NativeRun, NativeRuns
from jaxcept_serve.service import EngineService, refuse
from jaxcept_serve.sse import DONE, event
from jaxcept_serve.wire import Body, Field, as_array, as_token_ids, bad, from_value_error, json_response, read_fields

MAX_TRIGGERS = 64
MAX_TRIGGER_CHARS = 1024
_STRINGS = Field("", "string", nullable=False, min_length=1, max_length=MAX_TRIGGER_CHARS)

TRIGGER_FIELDS = (
    Field("strings", "array", "Texts that intercept when generated.", default=(), max_length=MAX_TRIGGERS,
          items=_STRINGS),
    Field("token_ids", "array", "Tokens that intercept when generated.", default=(), max_length=MAX_TRIGGERS,
          read=lambda value, path: tuple(as_token_ids(value, path))),
)  # fmt: skip
GENERATE_FIELDS = (
    Field("prompt", "any", "Text, or token ids.", required=True,
          schema={"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "integer"}}]}),
    Field("open", "boolean", "The prompt goes on: it is computed, and an interception waits for the rest.",
          default=False),
    Field("stream", "boolean", "Events as they come, through every interception.", default=False),
    Field("triggers", "object", "What intercepts.", read=lambda value, path: read_fields(value, TRIGGER_FIELDS, path),
          schema={"properties": {field.name: field.json_schema for field in TRIGGER_FIELDS}}),
    Field("timeout_s", "number", "Seconds of an interception, --max-hold-ttl at most.", default=120.0, minimum=0.001,
          maximum=86400),
    Field("on_timeout", "string", "tell: the model is told and goes on; end: the generation ends.", default="tell",
          choices=("tell", "end")),
    Field("expected_s", "number", "Seconds that an interception is expected to last.", minimum=0, maximum=86400),
    Field("max_interceptions", "integer", default=64, minimum=0, maximum=100_000),
    Field("max_tokens", "integer", default=16, minimum=1, maximum=2**31 - 1),
    Field("min_tokens", "integer", default=0, minimum=0, maximum=2**31 - 1),
    Field("temperature", "number", default=1.0, minimum=0, maximum=100),
    Field("top_p", "number", default=1.0),
    Field("top_k", "integer", default=0, minimum=-1, maximum=2**31 - 1),
    Field("min_p", "number", default=0.0),
    Field("presence_penalty", "number", default=0.0),
    Field("frequency_penalty", "number", default=0.0),
    Field("repetition_penalty", "number", default=1.0),
    Field("seed", "integer", minimum=-(2**63), maximum=2**64 - 1),
    Field("stop", "array", default=(), max_length=MAX_TRIGGERS, items=_STRINGS),
    Field("ignore_eos", "boolean", default=False),
)  # fmt: skip
RESUME_FIELDS = (
    Field("text", "string", "What the model goes on with, as text."),
    Field("token_ids", "any", "The same, as token ids.", schema={"type": "array", "items": {"type": "integer"}},
          read=lambda value, path: as_token_ids(as_array(value, path, 1 << 22), path)),
    Field("more", "boolean", "A piece: it is computed, and the interception waits for the rest.", default=False),
    Field("stream", "boolean", "Events as they come, where nobody else listens.", default=False),
)  # fmt: skip
_SAMPLING = (
    "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "seed", "stop", "ignore_eos",
)  # fmt: skip


def routes_of(service: EngineService) -> Callable[[Api], list[BaseRoute]]:
    """What makes the routes; they need an engine, not only the turns of the API's service."""
    return lambda api: _routes(api, service)


def _routes(api: Api, service: EngineService) -> list[BaseRoute]:
    native = _Native(api, service)
    one = "/v1/interceptions/{id}"
    return [
        Route("/v1/generate", native.generate, methods=["POST"]),
        Route(one, native.show, methods=["GET"]),
        Route(one, native.delete, methods=["DELETE"]),
        Route(f"{one}/resume", native.resume, methods=["POST"]),
    ]


class _Native:
    def __init__(self, api: Api, service: EngineService) -> None:
        self._api = api
        self._service = service
        limit = api.options.max_concurrent_per_key
        self._runs = NativeRuns(service.llm, service.token_bytes, max_runs_per_key=limit)

    async def generate(self, request: Request) -> Response:
        """POST /v1/generate."""
        body = await self._api.read_body(request)
        values = read_fields(body, GENERATE_FIELDS)
        params, options = _params(values), _options(values, self._service.hold.max_ttl_s)
        self._api.admit()
        self._service.require_ready()
        prompt = values["prompt"]
        ids = await self._service.ids_of(prompt if isinstance(prompt, str) else as_token_ids(_array(prompt), "prompt"))
        try:
            run = await self._runs.start(
                f"gen-{uuid.uuid4().hex}", ids, params, options, self._api.caller(request), values["open"]
            )
        except ValueError as error:
            refuse(error)
        return await self._tell(request, run, bool(values["stream"]))

    async def resume(self, request: Request) -> Response:
        """POST /v1/interceptions/{id}/resume."""
        values = read_fields(await self._api.read_body(request), RESUME_FIELDS)
        text, token_ids = values["text"], values["token_ids"]
        if (text is None) == (token_ids is None):
            raise bad("text", "expected either text or token_ids, and not both")
        more = bool(values["more"])
        interception_id = request.path_params["id"]
        run = await self._runs.answer(interception_id, self._api.caller(request), text, token_ids, more)
        if more or run.listener is not None:
            status = "computing" if more else "resumed"
            return json_response({"id": interception_id, "request_id": run.request_id, "status": status}, 202)
        return await self._tell(request, run, bool(values["stream"]))

    async def show(self, request: Request) -> Response:
        """GET /v1/interceptions/{id}."""
        return json_response(self._runs.find(request.path_params["id"], self._api.caller(request)).as_json())

    async def delete(self, request: Request) -> Response:
        """DELETE /v1/interceptions/{id}."""
        self._runs.abort(request.path_params["id"], self._api.caller(request))
        return json_response({"id": request.path_params["id"], "deleted": True})

    async def _tell(self, request: Request, run: NativeRun, is_streamed: bool) -> Response:
        if is_streamed:
            return self._api.stream(request, _chunks(self._runs.listen(run, through=True)))
        return json_response(await self._api.collect(request, self._part(run)))

    async def _part(self, run: NativeRun) -> Body:
        """What came up to the next interception, or to the end."""
        part: Body = {"id": run.request_id, "object": "generation", "text": "", "token_ids": []}
        async for item in self._runs.listen(run, through=False):
            if item["type"] == "generated":
                part["text"] += item["text"]
                part["token_ids"] += item["token_ids"]
            elif item["type"] == "intercepted":
                part |= {"status": "intercepted", "interception": item["interception"]}
            elif item["type"] == "finished":
                part |= {"status": "finished", **_wire(item)}
                part.pop("type")
        return part


async def _chunks(events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
    try:
        async for item in events:
            yield event(_wire(item), str(item["type"]))
        yield DONE
    finally:
        await events.aclose()  # type: ignore[attr-defined]  # it is a generator


def _wire(item: Event) -> Event:
    return {**item, "usage": openai_usage(item["usage"])} if item.get("usage") is not None else item


def _array(value: Any) -> list[Any]:
    return as_array(value, "prompt", 1 << 22)


def _params(values: Body) -> SamplingParams:
    try:
        return SamplingParams(**{name: values[name] for name in _SAMPLING})
    except ValueError as error:
        raise from_value_error(error) from None


def _options(values: Body, max_timeout_s: float) -> InterceptOptions:
    triggers: Body = values["triggers"] or {"strings": (), "token_ids": ()}
    names = [*triggers["strings"], *(f"token:{token_id}" for token_id in triggers["token_ids"])]
    expected: float | None = values["expected_s"]
    return InterceptOptions(
        strings=tuple(triggers["strings"]),
        token_ids=tuple(triggers["token_ids"]),
        timeout_s=min(values["timeout_s"], max_timeout_s),
        max_interceptions=values["max_interceptions"],
        on_failure=OnToolFailure.TELL if values["on_timeout"] == "tell" else OnToolFailure.FAIL,
        expected_s=dict.fromkeys(names, expected) if expected is not None else {},
    )
