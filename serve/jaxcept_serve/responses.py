"""/v1/responses: responses that are stored, streamed, continued, cancelled and deleted."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from jaxcept_serve.api import Api, prewarms
from jaxcept_serve.cache_diagnostics import GIVEN_UP, PromptDigest, first_change
from jaxcept_serve.conversion import Message, messages_of_items, with_one_system
from jaxcept_serve.response_events import ResponseBuilder
from jaxcept_serve.response_request import (
    PROMPT_FIELDS,
    RESPONSE_FIELDS,
    ToolsAsked,
    read_hints,
    read_input,
    read_params,
    read_tool_choice,
    read_tools,
    refuse_unsupported,
    stored_items,
)
from jaxcept_serve.response_store import ResponseStore, StoredResponse
from jaxcept_serve.sse import DONE, INTERNAL_ERROR, closing, event
from jaxcept_serve.turn_chunks import TurnChunks, begin_turn
from jaxcept_serve.turns import Caller, ChatTurn, ServiceError, TurnDone, TurnEvent, require_whole
from jaxcept_serve.wire import Body, bad, json_response, read_fields, shown

logger = logging.getLogger(__name__)

MAX_LISTED = 100
_DIFFERENCES = {
    "model": "model_changed",
    "key": "prompt_cache_key_changed",
    "tools": "tools_changed",
    "text_format": "text_format_changed",
    "system": "input_changed",
    "messages": "input_changed",
}


@dataclass(slots=True)
class _Run:
    """A response in the making. `messages` are the conversation without instructions; `own` those of this request."""

    caller: Caller
    turn: ChatTurn
    values: Body
    items: list[dict[str, Any]]
    messages: list[Mapping[str, Any]]
    own: list[Message]
    digest: PromptDigest
    conversation: str
    builder: ResponseBuilder
    task: asyncio.Task[Any] | None = None  # while it waits for the turn
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    def cancel(self) -> None:
        """Ends the turn, wherever it is."""
        self.cancelled.set()
        if self.task is not None:
            self.task.cancel()


class Responses:
    """The routes of /v1/responses. `store` holds what callers go on from."""

    def __init__(self, api: Api, store: ResponseStore | None = None) -> None:
        self.store = store or ResponseStore()
        self._api = api

    async def create(self, request: Request) -> Response:
        """POST /v1/responses."""
        api = self._api
        body = await api.read_body(request)
        refuse_unsupported(body)
        run = await self._read(read_fields(body, RESPONSE_FIELDS), request)
        api.admit()
        if run.values["stream"]:
            events = await begin_turn(api.service, run.turn, run.caller, "input", "text.format")
            return api.stream(request, TurnChunks(self._stream(run, events), events))
        return json_response(await api.collect(request, self._whole(run)))

    async def count_tokens(self, request: Request) -> Response:
        """POST /v1/responses/input_tokens."""
        body = await self._api.read_body(request)
        run = await self._read(read_fields(body, PROMPT_FIELDS), request)
        count = await asyncio.to_thread(self._api.service.count_tokens, run.turn)
        return json_response({"object": "response.input_tokens", "input_tokens": count})

    async def retrieve(self, request: Request) -> Response:
        """GET /v1/responses/{id}."""
        if request.query_params.get("stream", "false").lower() in ("true", "1"):
            raise bad("stream", "a stored response is answered in one piece")
        return json_response(self._stored(request).response)

    async def delete(self, request: Request) -> Response:
        """DELETE /v1/responses/{id}."""
        stored = self._stored(request)
        if stored.cancel is not None:
            raise bad("response_id", "the response is in progress; cancel it first", status=409)
        self.store.delete(self._api.caller(request).salt, stored.response_id)
        return json_response({"id": stored.response_id, "object": "response", "deleted": True})

    async def cancel(self, request: Request) -> Response:
        """POST /v1/responses/{id}/cancel."""
        stored = self._stored(request)
        status = stored.response["status"]
        if stored.cancel is not None:
            stored.cancel()
        elif status != "cancelled":
            raise bad("response_id", f"the response is {status}: there is nothing to cancel", status=409)
        return json_response({**stored.response, "status": "cancelled"})

    async def input_items(self, request: Request) -> Response:
        """GET /v1/responses/{id}/input_items."""
        query = request.query_params
        order, limit = query.get("order", "desc"), query.get("limit", "20")
        if order not in ("asc", "desc"):
            raise bad("order", f"expected asc or desc, got {shown(order)}")
        if not (limit.isascii() and limit.isdigit() and len(limit) <= 3 and 1 <= int(limit) <= MAX_LISTED):
            raise bad("limit", f"expected 1 to {MAX_LISTED}, got {shown(limit)}")
        items = list(self._stored(request).input_items)
        items = items if order == "asc" else items[::-1]
        ids = [str(item["id"]) for item in items]
        after = query.get("after")
        if after is not None:
            if after not in ids:
                raise bad("after", f"there is no input item {shown(after)}")
            items = items[ids.index(after) + 1 :]
        page = items[: int(limit)]
        first, last = (page[0]["id"], page[-1]["id"]) if page else ("", "")
        listed = {"object": "list", "data": page, "first_id": first, "last_id": last}
        return json_response({**listed, "has_more": len(page) < len(items)})

    def _stored(self, request: Request) -> StoredResponse:
        response_id = str(request.path_params["response_id"])
        stored = self.store.get(self._api.caller(request).salt, response_id)
        if stored is None:
            raise bad("response_id", f"there is no response {shown(response_id)}", status=404)
        return stored

    async def _read(self, values: Body, request: Request) -> _Run:
        api, caller = self._api, self._api.caller(request)
        response_id = f"resp_{uuid.uuid4().hex}"
        model = api.check_model(values["model"])
        previous = self._previous(values["previous_response_id"], caller)
        before = () if previous is None else previous.messages
        given, own = read_input(values, lambda item_id: self.store.item(caller.salt, item_id), api.options, before)
        messages = [*before, *own]
        tool_choice, tools = read_tool_choice(values["tool_choice"], read_tools(values, api.options))
        hints = api.hints(values, request)
        conversation = hints.conversation or response_id if previous is None else previous.conversation
        ours: Mapping[str, Any] = values["jaxcept"] or {}
        max_tool_calls = values.get("max_tool_calls")
        instructions = values["instructions"]
        system: list[Mapping[str, Any]] = [{"role": "system", "content": instructions}] if instructions else []
        turn = ChatTurn(
            request_id=response_id,  # a client's X-Request-Id may come twice
            messages=with_one_system([*system, *messages]),
            params=read_params(values, api.options),
            tools=tools.client,
            tool_choice=tool_choice,
            parallel_tool_calls=values["parallel_tool_calls"],
            run_tools=tools.run_tools,
            max_tool_calls=ours.get("max_tool_calls") if max_tool_calls is None else max_tool_calls,
            hints=read_hints(hints, values, conversation),
            is_prewarm=prewarms(values),
        )
        if values["truncation"] == "auto":
            turn = await asyncio.to_thread(_truncated, turn, api)
            messages = _kept(messages, turn)
        digest = PromptDigest.of(
            turn.messages,
            tools.client,
            model=model,
            key=values["prompt_cache_key"],
            text_format=(values["text"] or {}).get("format"),
        )
        builder = ResponseBuilder(
            _response_fields(response_id, model, values, tools),
            _new_id,
            lambda token_id: api.service.detokenize([token_id]),
            is_silent=turn.is_prewarm,
        )
        items = stored_items(given, _new_id)
        return _Run(caller, turn, values, items, messages, own, digest, conversation, builder)

    def _previous(self, response_id: str | None, caller: Caller) -> StoredResponse | None:
        if response_id is None:
            return None
        previous = self.store.get(caller.salt, response_id)
        if previous is None:
            problem = f"there is no response {shown(response_id)}: it was never stored, was deleted or has expired"
            raise bad("previous_response_id", problem, status=404, code="previous_response_not_found")
        if previous.cancel is not None:
            raise bad("previous_response_id", f"response {shown(response_id)} is in progress", status=409)
        return previous

    async def _whole(self, run: _Run) -> dict[str, Any]:
        async with closing(await begin_turn(self._api.service, run.turn, run.caller, "input", "text.format")) as events:
            async for turn_event in events:
                run.builder.feed(turn_event)
        self._complete(run)
        finished = run.builder.finished
        if finished is None or finished.finish_reason in ("error", "abort"):  # other failures are the response's status
            require_whole(finished)
        self._keep(run)
        return run.builder.response

    async def _stream(self, run: _Run, events: AsyncIterator[TurnEvent]) -> AsyncGenerator[bytes, None]:
        builder = run.builder
        try:
            for made in builder.start():
                yield event(made, made["type"])
            self._keep(run, run.cancel)
            async with closing(_until_cancelled(run, events)) as live:
                async for turn_event in live:
                    for made in builder.feed(turn_event):
                        yield event(made, made["type"])
            ending = builder.cancel() if run.cancelled.is_set() else self._complete(run)
        except ServiceError as error:
            ending = builder.fail(error.message, "invalid_prompt" if error.status < 500 else "server_error")
        except Exception:
            logger.exception("a response failed")
            ending = builder.fail(INTERNAL_ERROR)
        finally:
            if builder.response["status"] == "in_progress":
                builder.cancel()  # the client has gone
            self._keep(run)
        for made in ending:
            yield event(made, made["type"])
        yield DONE

    def _complete(self, run: _Run) -> list[dict[str, Any]]:
        """Completes the response of a turn that is done; the events that tell it."""
        builder, done = run.builder, run.builder.done
        if builder.finished is None or done is None:
            return builder.fail(INTERNAL_ERROR)
        compared = (run.values["prompt_cache_options"] or {}).get("comparison_response_id")
        if compared is not None:
            before = self.store.get(run.caller.salt, compared)
            builder.response["prompt_cache_diagnostics"] = _diagnostics(before, run.digest, done)
        return builder.end(time.time())

    def _keep(self, run: _Run, cancel: Any = None) -> None:
        """Stores the response as it is; `cancel` is there while it is in progress."""
        if not run.values["store"]:
            return
        response = run.builder.response
        said = messages_of_items(response["output"], lambda _: None)
        stored = StoredResponse(
            response=response,
            input_items=run.items,
            messages=(*run.messages, *said),
            conversation=run.conversation,
            prompt=run.digest.followed_by(said),
            cancel=cancel,
        )
        self.store.put(run.caller.salt, stored, [*run.own, *said])


async def _until_cancelled(run: _Run, events: AsyncIterator[TurnEvent]) -> AsyncIterator[TurnEvent]:
    """The turn's events until the run is cancelled. Closes the turn."""
    async with closing(events):
        while not run.cancelled.is_set():
            run.task = asyncio.current_task()
            try:
                turn_event = await anext(events)
            except StopAsyncIteration:
                return
            except asyncio.CancelledError:
                if not run.cancelled.is_set() or run.task is None or run.task.uncancel() > 0:
                    raise  # the connection was closed
                return
            finally:
                run.task = None
            yield turn_event


def _truncated(turn: ChatTurn, api: Api) -> ChatTurn:
    """The turn without its oldest turns, as few as leave room for an answer. Cuts before a user's message."""
    service, messages = api.service, list(turn.messages)
    num_system = 1 if messages and messages[0]["role"] == "system" else 0
    cuts = [i for i, message in enumerate(messages) if message["role"] == "user" and i > num_system]
    room = service.max_model_len - min(turn.params.max_tokens or 1, service.max_model_len // 2)

    def shortened(cut: int) -> ChatTurn:
        return replace(turn, messages=messages[:num_system] + messages[cut:])

    if not cuts or service.count_tokens(turn) <= room:
        return turn
    low, high = 0, len(cuts) - 1
    while low < high:
        middle = (low + high) // 2
        if service.count_tokens(shortened(cuts[middle])) <= room:
            high = middle
        else:
            low = middle + 1
    return shortened(cuts[low])


def _kept(messages: Sequence[Mapping[str, Any]], turn: ChatTurn) -> list[Mapping[str, Any]]:
    """What a truncated turn kept of the conversation: what it left out is not stored either."""
    num_system = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    count = sum(message["role"] != "system" for message in turn.messages[:1]) + len(turn.messages) - 1
    return [*messages[:num_system], *messages[max(num_system, len(messages) - count) :]]


def _diagnostics(before: StoredResponse | None, digest: PromptDigest, done: TurnDone) -> dict[str, Any]:
    """Where the prompt differs from that of the response that it was compared with."""
    if before is None or before.prompt is None:
        return {"type": "comparison_response_not_found"}
    change = first_change(before.prompt, digest)
    if change is None:
        return {"type": "cache_hit"} if done.usage.cached_tokens else {"type": "unavailable", "message": GIVEN_UP}
    part, index = change
    told: dict[str, Any] = {
        "type": "cache_miss",
        "reason": _DIFFERENCES[part],
        "cache_missed_tokens": max(done.usage.prompt_tokens - done.usage.cached_tokens, 0),
    }
    if index is not None:
        told["message"] = f"message {index} of the conversation differs"
    return told


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def _response_fields(response_id: str, model: str, values: Body, tools: ToolsAsked) -> dict[str, Any]:
    """The response object as the request alone makes it."""
    options = values["prompt_cache_options"]
    fields: dict[str, Any] = {
        "id": response_id,
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": values["instructions"],
        "max_output_tokens": values.get("max_output_tokens"),
        "max_tool_calls": values.get("max_tool_calls"),
        "metadata": values.get("metadata") or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": values["parallel_tool_calls"],
        "previous_response_id": values["previous_response_id"],
        "prompt_cache_key": values["prompt_cache_key"],
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": values.get("safety_identifier"),
        "service_tier": "default",
        "store": values.get("store"),
        "temperature": values.get("temperature"),
        "text": {"format": {"type": "text"}, **(values["text"] or {})},
        "tool_choice": values["tool_choice"] or "auto",
        "tools": tools.shown,
        "top_logprobs": values.get("top_logprobs") or 0,
        "top_p": values.get("top_p"),
        "truncation": values["truncation"],
        "usage": None,
        "user": values.get("user"),
    }
    if options is not None:
        fields["prompt_cache_options"] = {
            "mode": options.get("mode") or "implicit",
            "ttl": _ttl_text(options.get("ttl")),
            "comparison_response_id": options.get("comparison_response_id"),
        }
    return fields


def _ttl_text(ttl_s: float | None) -> str:
    seconds = 1800 if ttl_s is None else int(ttl_s)
    if seconds % 60:
        return f"{seconds}s"
    return f"{seconds // 60}m" if seconds % 3600 or not seconds else f"{seconds // 3600}h"


def routes(api: Api) -> list[BaseRoute]:
    """The routes of the Responses API."""
    responses = Responses(api)
    one = "/v1/responses/{response_id}"
    return [
        Route("/v1/responses", responses.create, methods=["POST"]),
        Route("/v1/responses/input_tokens", responses.count_tokens, methods=["POST"]),
        Route(one, responses.retrieve, methods=["GET"]),
        Route(one, responses.delete, methods=["DELETE"]),
        Route(f"{one}/cancel", responses.cancel, methods=["POST"]),
        Route(f"{one}/input_items", responses.input_items, methods=["GET"]),
    ]
