"""/v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from jaxcept.scheduler.params import MAX_LOGPROBS
from jaxcept_serve.api import HINT_FIELDS, MAX_NAME_CHARS, Api, all_fields, openai_usage, prewarms, usage_so_far
from jaxcept_serve.chat_messages import MESSAGE_SCHEMA, TOOL_SCHEMA, read_messages, read_tool_choice, read_tools
from jaxcept_serve.client_tools import ToolLimits
from jaxcept_serve.logprobs import chat_logprobs, prompt_logprobs
from jaxcept_serve.sampling import MAX_INT, SAMPLING_FIELDS, UNSUPPORTED, constraints_asked, read_sampling
from jaxcept_serve.sse import DONE, closing, event
from jaxcept_serve.turn_chunks import TurnChunks, begin_turn
from jaxcept_serve.turns import (
    CallDelta,
    ChatTurn,
    FullCall,
    TextDelta,
    ToolAnswered,
    TurnDone,
    TurnEvent,
    TurnFinished,
    TurnStarted,
    require_whole,
)
from jaxcept_serve.wire import Body, Field, bad, json_response, read_fields, refuse_fields

# Finishes that OpenAI's clients know; ours are told as jaxcept_finish_reason beside "stop".
KNOWN_REASONS = ("stop", "length", "tool_calls")
_REFUSED = UNSUPPORTED | {
    "chat_template": "templates are not taken from requests; the server's is set by --chat-template",
    "audio": "audio is not supported",
    "functions": "functions are not supported; use tools",
    "function_call": "function_call is not supported; use tool_choice",
    "mm_processor_kwargs": "the model takes text alone",
    "web_search_options": "there is no web search",
    "continue_final_message": "is not supported; use /v1/completions",
    "echo": "is not supported; use /v1/completions",
    "documents": "documents are not supported; put them into a message",
}
_STREAM_OPTIONS = (
    Field("include_usage", "boolean", default=False),
    Field("continuous_usage_stats", "boolean", default=False),
)

CHAT_FIELDS = all_fields(
    (
        Field("model", "string", "Name of the model; absent: the first.", max_length=MAX_NAME_CHARS),
        Field("messages", "array", "The conversation.", required=True, min_length=1,
              items=Field("", "object", nullable=False, schema=MESSAGE_SCHEMA)),
        Field("tools", "array", "Functions of the client.",
              items=Field("", "object", nullable=False, schema=TOOL_SCHEMA)),
        Field("tool_choice", "any", "none, auto, required, or one tool.",
              schema={"anyOf": [{"enum": ["none", "auto", "required"]}, {"type": "object"}]}),
        Field("parallel_tool_calls", "boolean", default=True),
        Field("max_tokens", "integer", minimum=1, maximum=MAX_INT),
        Field("max_completion_tokens", "integer", minimum=1, maximum=MAX_INT),
        Field("stream", "boolean", default=False),
        Field("stream_options", "object", read=lambda value, path: read_fields(value, _STREAM_OPTIONS, path),
              schema={"properties": {field.name: field.json_schema for field in _STREAM_OPTIONS}}),
        Field("logprobs", "boolean", default=False),
        Field("top_logprobs", "integer", minimum=0, maximum=MAX_LOGPROBS),
        Field("add_generation_prompt", "boolean", default=True),
        Field("chat_template_kwargs", "object", "What the chat template reads further.", max_length=64),
        Field("max_tool_calls", "integer", "Most calls of the server's tools.", minimum=0, maximum=100_000),
        Field("user", "string", max_length=MAX_NAME_CHARS),
        Field("safety_identifier", "string", max_length=MAX_NAME_CHARS),
        Field("service_tier", "string", max_length=64),
        Field("metadata", "object", max_length=16),
        Field("store", "boolean"),
        Field("modalities", "array", "text alone.", items=Field("", "string", nullable=False, choices=("text",))),
        Field("reasoning_effort", "string", max_length=64),
    ),
    SAMPLING_FIELDS,
    HINT_FIELDS,
)  # fmt: skip


def routes(api: Api) -> list[BaseRoute]:
    """POST /v1/chat/completions."""
    return [Route("/v1/chat/completions", ChatCompletions(api).create, methods=["POST"])]


def read_turn(api: Api, request: Request, body: Body, values: Body) -> ChatTurn:
    """A chat request's turn. Raises ServiceError."""
    refuse_fields(body, _REFUSED)
    kwargs = values["chat_template_kwargs"] or {}
    for name in ("chat_template", "messages", "tools", "add_generation_prompt"):
        if name in kwargs:
            raise bad(f"chat_template_kwargs.{name}", "may not be set here")
    messages = read_messages(values["messages"], api.options.max_messages)
    tools = read_tools(values["tools"] or [], ToolLimits(api.options.max_tools, api.options.max_schema_bytes))
    limit = values["max_completion_tokens"] or values["max_tokens"]
    wants_logprobs = values["logprobs"] or values["top_logprobs"] is not None
    if values["top_logprobs"] is not None and not values["logprobs"]:
        raise bad("top_logprobs", "expected logprobs to be true with it")
    params = read_sampling(
        values, api.options, max_tokens=limit, logprobs=(values["top_logprobs"] or 0) if wants_logprobs else None
    )
    is_prewarm = prewarms(values)
    if is_prewarm:
        params = replace(params, max_tokens=1, min_tokens=0, n=1, logprobs=None, structured=None)
    ours: Mapping[str, Any] = values["jaxcept"] or {}
    max_tool_calls = values["max_tool_calls"]
    run_tools = ours.get("run_tools")
    return ChatTurn(
        request_id=f"chatcmpl-{uuid.uuid4().hex}",
        messages=messages,
        params=params,
        tools=tools,
        tool_choice=read_tool_choice(values["tool_choice"]),
        parallel_tool_calls=values["parallel_tool_calls"],
        run_tools=None if run_tools is None else tuple(run_tools),
        max_tool_calls=ours.get("max_tool_calls") if max_tool_calls is None else max_tool_calls,
        template_kwargs=kwargs,
        add_generation_prompt=values["add_generation_prompt"],
        hints=api.hints(values, request),
        is_prewarm=is_prewarm,
    )


class ChatCompletions:
    """The route's handler."""

    def __init__(self, api: Api) -> None:
        self._api = api

    async def create(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        api, caller = self._api, self._api.caller(request)
        body = await api.read_body(request)
        values = read_fields(body, CHAT_FIELDS)
        model = api.check_model(values["model"])
        turn = read_turn(api, request, body, values)
        api.admit(turn.params.n)
        constraint = next(iter(constraints_asked(values)), "response_format")
        if values["stream"]:
            events = await begin_turn(api.service, turn, caller, "messages", constraint)
            chunks = self._chunks(events, turn, model, values["stream_options"] or {})
            return api.stream(request, TurnChunks(chunks, events))

        async def whole() -> Body:
            async with closing(await begin_turn(api.service, turn, caller, "messages", constraint)) as events:
                return await self._whole(events, turn, model)

        return json_response(await api.collect(request, whole()))

    async def _whole(self, events: AsyncIterator[TurnEvent], turn: ChatTurn, model: str) -> Body:
        choices: list[Body] = []
        usage: Body = {}
        extra: Body = {}
        async for item in _shown(events, turn):
            if isinstance(item, TurnFinished):
                choices.append(self._choice(item, turn))
            elif isinstance(item, TurnDone):
                usage = openai_usage(item.usage)
                if item.prompt_logprobs is not None:
                    entries = item.prompt_logprobs
                    extra["prompt_logprobs"] = prompt_logprobs(item.prompt_token_ids, entries, self._token_text)
        choices.sort(key=lambda choice: int(choice["index"]))
        return {**_head(turn, model, "chat.completion"), "choices": choices, "usage": usage, **extra}

    def _choice(self, finished: TurnFinished, turn: ChatTurn) -> Body:
        own = [call for call in finished.calls if not call.by_server]
        message: Body = {"role": "assistant", "content": finished.text, "refusal": None}
        if finished.thought:
            message["reasoning_content"] = finished.thought
        if own:
            message["content"] = finished.text or None
            message["tool_calls"] = [_call(call) for call in own]
        served = [_served(call) for call in finished.calls if call.by_server]
        if served:
            message["jaxcept_tools"] = served
        choice: Body = {"index": finished.index, "message": message, "logprobs": None} | _finish(finished)
        if turn.params.logprobs is not None:
            choice["logprobs"] = chat_logprobs(finished.token_ids, finished.logprobs or (), self._token_text)
        return choice

    async def _chunks(
        self, events: AsyncIterator[TurnEvent], turn: ChatTurn, model: str, options: Mapping[str, Any]
    ) -> AsyncGenerator[bytes, None]:
        stream = _Stream(
            _head(turn, model, "chat.completion.chunk"),
            tells_usage=bool(options.get("include_usage")),
            tells_all_along=bool(options.get("include_usage") and options.get("continuous_usage_stats")),
        )
        async with closing(events):
            async for item in _shown(events, turn):
                stream.count(item)
                if isinstance(item, TurnStarted):
                    for index in range(turn.params.n):
                        yield stream.chunk(index, {"role": "assistant", "content": ""})
                if isinstance(item, TurnDone):
                    if stream.tells_usage:
                        yield stream.usage(item)
                    break
                for chunk in self._chunk(stream, item, turn):
                    yield chunk
        yield DONE

    def _chunk(self, stream: _Stream, item: TurnEvent, turn: ChatTurn) -> list[bytes]:
        match item:
            case TextDelta():
                return self._text_chunk(stream, item, turn)
            case CallDelta(by_server=True):
                stream.note(item)
            case CallDelta():
                return [stream.chunk(item.index, {"tool_calls": [stream.piece(item)]})]
            case ToolAnswered():
                return [stream.chunk(item.index, {"jaxcept_tool": stream.answered(item)})]
            case TurnFinished():
                return [stream.chunk(item.index, {}, None, item)]
        return []

    def _text_chunk(self, stream: _Stream, item: TextDelta, turn: ChatTurn) -> list[bytes]:
        logprobs = None
        if turn.params.logprobs is not None and item.logprobs:
            logprobs = chat_logprobs(item.token_ids, item.logprobs, self._token_text)
        thought = [stream.chunk(item.index, {"reasoning_content": item.thought})] if item.thought else []
        if not item.text and logprobs is None:
            return thought
        return [*thought, stream.chunk(item.index, {"content": item.text}, logprobs)]

    def _token_text(self, token_id: int) -> str:
        return self._api.service.detokenize([token_id])


@dataclass(slots=True)
class _Stream:
    """The chunks of one streamed turn."""

    head: Body
    tells_usage: bool
    tells_all_along: bool = False  # usage so far, with every chunk
    prompt_tokens: int = 0
    completion_tokens: int = 0
    numbers: dict[tuple[int, str], int] = field(default_factory=dict)  # of the client's calls, by completion and id
    arguments: dict[str, str] = field(default_factory=dict)  # of the server's calls

    def chunk(self, index: int, delta: Body, logprobs: Body | None = None, end: TurnFinished | None = None) -> bytes:
        """One chunk with one choice."""
        finish = {"finish_reason": None} if end is None else _finish(end)
        choice = {"index": index, "delta": delta, "logprobs": logprobs, **finish}
        usage = {"usage": self._so_far() if self.tells_all_along else None} if self.tells_usage else {}
        return event({**self.head, "choices": [choice], **usage})

    def count(self, item: TurnEvent) -> None:
        """Counts the tokens of an event."""
        if isinstance(item, TurnStarted):
            self.prompt_tokens = item.prompt_tokens
        elif isinstance(item, TextDelta):
            self.completion_tokens += len(item.token_ids)

    def _so_far(self) -> Body:
        return usage_so_far(self.prompt_tokens, self.completion_tokens)

    def usage(self, done: TurnDone) -> bytes:
        """The chunk that tells the usage."""
        return event({**self.head, "choices": [], "usage": openai_usage(done.usage)})

    def piece(self, delta: CallDelta) -> Body:
        """A piece of a call of the client's; their numbers count those alone."""
        of_choice = sum(1 for index, _ in self.numbers if index == delta.index)
        number = self.numbers.setdefault((delta.index, delta.call_id), of_choice)
        piece: Body = {"index": number, "function": {"arguments": delta.arguments}}
        if delta.name is not None:
            piece |= {"id": delta.call_id, "type": "function"}
            piece["function"]["name"] = delta.name
        return piece

    def note(self, delta: CallDelta) -> None:
        """Keeps the arguments of a call of the server's, to be told with its answer."""
        self.arguments[delta.call_id] = self.arguments.get(delta.call_id, "") + delta.arguments

    def answered(self, item: ToolAnswered) -> Body:
        """A call of the server's and its answer."""
        return {
            "id": item.call_id,
            "name": item.name,
            "arguments": self.arguments.pop(item.call_id, "{}"),
            "result": item.text,
            "is_error": item.is_error,
            "duration_s": item.duration_s,
        }


def _head(turn: ChatTurn, model: str, kind: str) -> Body:
    return {"id": turn.request_id, "object": kind, "created": int(time.time()), "model": model}


async def _shown(events: AsyncIterator[TurnEvent], turn: ChatTurn) -> AsyncIterator[TurnEvent]:
    """The events that the client is told of: without output where the prompt alone was wanted. Raises ServiceError for
    a completion that did not come to an end of its own."""
    async for item in events:
        if isinstance(item, TurnFinished):
            require_whole(item)
        if not turn.is_prewarm or isinstance(item, TurnStarted | TurnDone):
            yield item
        elif isinstance(item, TurnFinished):
            yield TurnFinished(item.index, "stop", None, "", (), ())


def _finish(finished: TurnFinished) -> Body:
    reason = finished.finish_reason
    told: Body = {"finish_reason": reason if reason in KNOWN_REASONS else "stop"}
    if finished.stop_reason is not None:
        told["stop_reason"] = finished.stop_reason
    return told if reason in KNOWN_REASONS else {**told, "jaxcept_finish_reason": reason}


def _call(call: FullCall) -> Body:
    return {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _served(call: FullCall) -> Body:
    return {
        "id": call.call_id,
        "name": call.name,
        "arguments": call.arguments,
        "result": call.result,
        "is_error": call.is_error,
    }
