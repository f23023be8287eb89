"""/v1/messages in the Anthropic form, and its count_tokens."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from jaxcept.scheduler.params import MAX_STOP_STRING_CHARS, MAX_STOP_STRINGS, SamplingParams
from jaxcept_serve.api import HINT_FIELDS, MAX_NAME_CHARS, Api, all_fields
from jaxcept_serve.cache_diagnostics import GIVEN_UP, DigestBook, PromptDigest, first_change
from jaxcept_serve.client_tools import ToolLimits, constrained_to_schema, read_function
from jaxcept_serve.conversion import messages_of_anthropic, with_one_system
from jaxcept_serve.message_events import MessageBuilder
from jaxcept_serve.sse import closing, event
from jaxcept_serve.turn_chunks import TurnChunks, begin_turn
from jaxcept_serve.turns import Caller, ChatTurn, Hints, TurnDone, TurnEvent, require_whole
from jaxcept_serve.wire import (
    Body,
    Field,
    as_object,
    bad,
    from_value_error,
    json_response,
    read_fields,
    refuse_fields,
    shown,
)

_TTLS = {"5m": 300.0, "1h": 3600.0}
_REFUSED = {
    "mcp_servers": "MCP servers are named when the server is started (--mcp)",
    "container": "containers are not supported",
}

_DIAGNOSTICS = (Field("previous_message_id", "string", max_length=MAX_NAME_CHARS),)
_METADATA = (Field("user_id", "string", max_length=MAX_NAME_CHARS),)
_TEXT = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}

PROMPT_FIELDS = (
    Field("model", "string", "Name of the model.", required=True, max_length=MAX_NAME_CHARS),
    Field("messages", "array", "The conversation: user and assistant turns.", required=True, min_length=1,
          items=Field("", "object", nullable=False)),
    Field("system", "any", "The system prompt: text, or text blocks.", schema=_TEXT),
    Field("tools", "array", "The client's tools.", items=Field("", "object", nullable=False)),
    Field("tool_choice", "object", "auto, any, tool (with a name) or none."),
    Field("thinking", "object", "enabled or adaptive: what the model thinks is told, in blocks of its own."),
    Field("cache_control", "object", "How long the context may wait for the next turn: ttl 5m or 1h."),
    Field("output_config", "object", "format: a JSON schema that the text is to match."),
    Field("output_format", "object", "The older place of output_config.format."),
    *(field for field in HINT_FIELDS if field.name in ("jaxcept", "priority")),
)  # fmt: skip

MESSAGE_FIELDS = all_fields(
    PROMPT_FIELDS,
    (
        Field("max_tokens", "integer", "Most tokens to generate.", required=True, minimum=1, maximum=2**31 - 1),
        Field("stream", "boolean", "Answer as server-sent events.", default=False),
        Field("stop_sequences", "array", "Texts that end the turn.", max_length=MAX_STOP_STRINGS,
              items=Field("", "string", nullable=False, min_length=1, max_length=MAX_STOP_STRING_CHARS)),
        Field("temperature", "number", minimum=0, maximum=2, default=1.0),
        Field("top_p", "number", minimum=0, maximum=1, default=1.0),
        Field("top_k", "integer", minimum=0, maximum=2**31 - 1, default=0),
        Field("metadata", "object", "user_id names the session: Claude Code sends it.",
              read=lambda value, path: read_fields(value, _METADATA, path)),
        Field("diagnostics", "object", "previous_message_id: tell why the cache was missed.",
              read=lambda value, path: read_fields(value, _DIAGNOSTICS, path)),
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Ask:
    """A request as it was understood. `compare_with`: the message whose cache it should have hit, "" for none yet."""

    turn: ChatTurn
    model: str
    digest: PromptDigest
    compare_with: str | None
    has_marks: bool  # of the cache
    shows_thoughts: bool

    def make_builder(self) -> MessageBuilder:
        """What makes the answer."""
        return MessageBuilder(self.turn.request_id, self.model, self.has_marks, self.shows_thoughts)


class Messages:
    """The routes of /v1/messages."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._book = DigestBook()

    async def create(self, request: Request) -> Response:
        """POST /v1/messages."""
        api, caller = self._api, self._api.caller(request)
        body = await api.read_body(request)
        values = read_fields(body, MESSAGE_FIELDS)
        ask = self._read(body, values, request)
        api.admit()
        if values["stream"]:
            events = await begin_turn(api.service, ask.turn, caller, "messages", "output_config.format")
            return api.stream(request, TurnChunks(self._stream(events, ask, caller), events))
        return json_response(await api.collect(request, self._whole(ask, caller)))

    async def count_tokens(self, request: Request) -> Response:
        """POST /v1/messages/count_tokens."""
        body = await self._api.read_body(request)
        ask = self._read(body, read_fields(body, PROMPT_FIELDS), request)
        count = await asyncio.to_thread(self._api.service.count_tokens, ask.turn)
        return json_response({"input_tokens": count})

    async def _whole(self, ask: _Ask, caller: Caller) -> dict[str, Any]:
        builder = ask.make_builder()
        async with closing(
            await begin_turn(self._api.service, ask.turn, caller, "messages", "output_config.format")
        ) as events:
            async for turn_event in events:
                builder.feed(turn_event)
        _check(builder)
        message = builder.message(self._diagnostics(ask, caller, builder))
        self._remember(ask, caller, builder)
        return message

    async def _stream(self, events: AsyncIterator[TurnEvent], ask: _Ask, caller: Caller) -> AsyncGenerator[bytes, None]:
        builder = ask.make_builder()
        async with closing(events):
            async for turn_event in events:
                for made in builder.feed(turn_event):
                    yield event(made, made["type"])
        _check(builder)
        self._remember(ask, caller, builder)
        for made in builder.end(self._diagnostics(ask, caller, builder)):
            yield event(made, made["type"])

    def _read(self, body: Body, values: Body, request: Request) -> _Ask:
        api = self._api
        model = api.check_model(values["model"])
        refuse_fields(body, _REFUSED)
        limits = ToolLimits(api.options.max_tools, api.options.max_schema_bytes)
        tools = _read_tools(values["tools"] or [], limits)
        if len(values["messages"]) > api.options.max_messages:
            raise bad("messages", f"expected at most {api.options.max_messages} of them")
        messages = with_one_system(messages_of_anthropic(values["system"], values["messages"]))
        tool_choice, parallel = _read_tool_choice(values["tool_choice"], tools)
        ours: Mapping[str, Any] = values["jaxcept"] or {}
        turn = ChatTurn(
            request_id=f"msg_{uuid.uuid4().hex}",  # a client's X-Request-Id may come twice
            messages=messages,
            params=_read_params(values, api),
            tools=tools,
            tool_choice=tool_choice,
            parallel_tool_calls=parallel,
            run_tools=ours.get("run_tools"),
            max_tool_calls=ours.get("max_tool_calls"),
            hints=_read_hints(api.hints(values, request), values),
        )
        wanted = values.get("diagnostics")
        compare_with = None if wanted is None else wanted["previous_message_id"] or ""
        has_marks = any(holder.get("cache_control") is not None for _, holder in _cache_marks(values))
        shows_thoughts = (values["thinking"] or {}).get("type") in ("enabled", "adaptive")
        return _Ask(turn, model, PromptDigest.of(messages, tools, model=model), compare_with, has_marks, shows_thoughts)

    def _remember(self, ask: _Ask, caller: Caller, builder: MessageBuilder) -> None:
        answer = messages_of_anthropic(None, [{"role": "assistant", "content": builder.content}])
        self._book.put(caller.salt, ask.turn.request_id, ask.digest.followed_by(answer))

    def _diagnostics(self, ask: _Ask, caller: Caller, builder: MessageBuilder) -> dict[str, Any] | None:
        """Where the request differs from the message that it goes on from; None where nobody asked."""
        if ask.compare_with is None:
            return None
        assert builder.done is not None, "the turn is done"
        if not ask.compare_with:
            return {"cache_miss_reason": None}
        before = self._book.get(caller.salt, ask.compare_with)
        if before is None:
            return {"cache_miss_reason": {"type": "previous_message_not_found"}}
        return {"cache_miss_reason": _miss_reason(before, ask.digest, builder.done)}


def _miss_reason(before: PromptDigest, after: PromptDigest, done: TurnDone) -> dict[str, Any] | None:
    change = first_change(before, after)
    if change is None:
        return None if done.usage.cached_tokens else {"type": "unavailable", "message": GIVEN_UP}
    part, index = change
    missed = max(done.usage.prompt_tokens - done.usage.cached_tokens, 0)
    told: dict[str, Any] = {"type": f"{part}_changed", "cache_missed_input_tokens": missed}
    if index is not None:
        told["message"] = f"messages[{index}] differs"
    return told


def _check(builder: MessageBuilder) -> None:
    """Raises ServiceError for a turn that did not come to an end of its own."""
    require_whole(builder.finished if builder.done is not None else None)


def _read_params(values: Body, api: Api) -> SamplingParams:
    """Sampling as asked for; for counting alone, any."""
    if "max_tokens" not in values:
        return SamplingParams()
    fields: dict[str, Any] = {
        "max_tokens": min(values["max_tokens"], api.service.max_model_len),
        "temperature": values["temperature"],
        "top_p": values["top_p"],
        "top_k": values["top_k"],
        "stop": tuple(values["stop_sequences"] or ()),
    }
    if values["top_p"] == 0:
        raise bad("top_p", "expected a number above 0, at most 1")
    config = values["output_config"] or {}
    wanted, path = config.get("format"), "output_config.format"
    if wanted is None:
        wanted, path = values["output_format"], "output_format"
    if wanted is not None:
        if as_object(wanted, path).get("type") != "json_schema":
            raise bad(f"{path}.type", f"expected json_schema, got {shown(wanted.get('type'))}")
        fields |= constrained_to_schema(wanted.get("schema"), f"{path}.schema", api.options.max_schema_bytes)
    try:
        return SamplingParams(**fields)
    except ValueError as error:
        raise from_value_error(error) from None


def _read_tools(tools: Sequence[Any], limits: ToolLimits) -> list[dict[str, Any]]:
    """The client's tools in the chat form."""
    limits.check(tools, "tools")
    made = []
    for i, tool in enumerate(tools):
        path = f"tools[{i}]"
        kind = tool.get("type")
        if kind not in (None, "custom"):
            raise bad(f"{path}.type", f"tools of type {shown(kind)} are not supported; expected custom tools")
        made.append(read_function(tool, path, schema_field="input_schema", is_schema_required=True))
    limits.check_names(made, "tools")
    return made


def _read_tool_choice(choice: Any, tools: Sequence[Mapping[str, Any]]) -> tuple[str, bool]:
    """(ChatTurn.tool_choice, parallel_tool_calls)."""
    if choice is None:
        return "auto", True
    kind = choice.get("type")
    kinds = {"auto": "auto", "any": "required", "none": "none"}
    if kind == "tool":
        name = choice.get("name")
        if name not in [tool["function"]["name"] for tool in tools]:
            raise bad("tool_choice.name", f"there is no tool {shown(name)} in tools")
        made = str(name)
    elif isinstance(kind, str) and kind in kinds:
        made = kinds[kind]
    else:
        raise bad("tool_choice.type", f"expected auto, any, tool or none, got {shown(kind)}")
    alone = choice.get("disable_parallel_tool_use")
    if alone is not None and not isinstance(alone, bool):
        raise bad("tool_choice.disable_parallel_tool_use", f"expected a boolean, got {shown(alone)}")
    return made, not alone


def _read_hints(hints: Hints, values: Body) -> Hints:
    """The hints, with the longest ttl of the cache marks and the session's name."""
    ttls = [
        _ttl(holder["cache_control"], f"{path}.cache_control".lstrip("."))
        for path, holder in _cache_marks(values)
        if holder.get("cache_control") is not None
    ]
    session = (values.get("metadata") or {}).get("user_id")
    return replace(
        hints,
        hold_ttl_s=max(ttls) if ttls and hints.hold_ttl_s is None else hints.hold_ttl_s,
        conversation=hints.conversation or session,
    )


def _ttl(mark: Any, path: str) -> float:
    if as_object(mark, path).get("type") != "ephemeral":
        raise bad(f"{path}.type", f"expected ephemeral, got {shown(mark.get('type'))}")
    ttl = mark.get("ttl")
    if ttl is None:
        return _TTLS["5m"]
    if not isinstance(ttl, str) or ttl not in _TTLS:
        raise bad(f"{path}.ttl", f"expected 5m or 1h, got {shown(ttl)}")
    return _TTLS[ttl]


def _cache_marks(values: Body) -> list[tuple[str, Mapping[str, Any]]]:
    """Everything that may carry a cache mark, by its path."""
    places: list[tuple[str, Any]] = [("", values)]
    places += _listed("tools", values["tools"]) + _listed("system", values["system"])
    for path, message in _listed("messages", values["messages"]):
        for block_path, block in _listed(f"{path}.content", message.get("content")):
            places.append((block_path, block))
            places += _listed(f"{block_path}.content", block.get("content"))
    return places


def _listed(path: str, value: Any) -> list[tuple[str, Mapping[str, Any]]]:
    if not isinstance(value, list):
        return []
    return [(f"{path}[{i}]", entry) for i, entry in enumerate(value) if isinstance(entry, Mapping)]


def routes(api: Api) -> list[BaseRoute]:
    """The routes of the Anthropic API."""
    messages = Messages(api)
    return [
        Route("/v1/messages", messages.create, methods=["POST"]),
        Route("/v1/messages/count_tokens", messages.count_tokens, methods=["POST"]),
    ]
