"""What is emitted comes back as the message that it was; whatever a client sends is answered or refused by name."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise
from typing import Any

import pytest
from asgi_clients import gone_after, http, run
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_service import USAGE, ScriptedService, called, said

from jaxcept_serve import messages, responses
from jaxcept_serve.app import create_app
from jaxcept_serve.conversion import (
    Message,
    messages_of_anthropic,
    messages_of_items,
    with_one_system,
    with_server_calls,
)
from jaxcept_serve.message_events import MessageBuilder
from jaxcept_serve.response_events import ResponseBuilder
from jaxcept_serve.turns import CallDelta, FullCall, TextDelta, ToolAnswered, TurnDone, TurnEvent, TurnFinished

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
VALUES = st.recursive(st.none() | st.booleans() | st.integers(-(2**40), 2**40) | TEXT, st.lists, max_leaves=4)
ARGUMENTS = st.dictionaries(TEXT, VALUES, max_size=3).map(lambda value: json.dumps(value, ensure_ascii=False))
PARTS = st.lists(st.one_of(TEXT, st.tuples(ARGUMENTS, st.booleans(), TEXT)), max_size=8)


def turn_of(parts: list[Any]) -> tuple[list[TurnEvent], Message, list[tuple[str, str]]]:
    """(a turn's events, the message that the service remembers, the server's calls and their results)."""
    events: list[TurnEvent] = []
    text, calls, ran = "", [], []
    for number, part in enumerate(parts):
        if isinstance(part, str):
            events.append(TextDelta(0, part))
            text += part
            continue
        arguments, by_server, result = part
        call_id, half = f"call_{number}", len(arguments) // 2
        events += [CallDelta(0, number, call_id, "f", arguments[:half], by_server),
                   CallDelta(0, number, call_id, None, arguments[half:], by_server)]  # fmt: skip
        if by_server:
            events.append(ToolAnswered(0, call_id, "f", result, number % 2 == 0, 0.1))
            ran.append((call_id, result))
        else:
            calls.append(FullCall(call_id, "f", arguments))
    finish = "tool_calls" if calls else "stop"
    events += [TurnFinished(0, finish, None, text, tuple(calls), ()), TurnDone(USAGE)]
    message = {"role": "assistant", "content": text}
    if calls:
        message["tool_calls"] = [
            {"id": call.call_id, "type": "function", "function": {"name": "f", "arguments": json.loads(call.arguments)}}
            for call in calls
        ]
    return events, message, ran


def plain(message: Message) -> tuple[Message, list[tuple[str, str]]]:
    """(the message with arguments as objects, the server's calls and their results)."""
    made = {name: value for name, value in message.items() if name != "server_calls"}
    if "tool_calls" in made:
        made["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": json.loads(call["function"]["arguments"])}}
            for call in made["tool_calls"]
        ]
    return made, [(call["id"], call["result"]) for call in message.get("server_calls", ())]


@settings(deadline=None, max_examples=60)
@given(PARTS.filter(bool))
def test_items_become_the_turn_that_they_were(parts: list[Any]) -> None:
    events, message, ran = turn_of(parts)
    builder = ResponseBuilder({"id": "resp_1"}, lambda prefix: f"{prefix}_{len(builder.response['output'])}", chr)
    streamed = [made for event in events for made in builder.feed(event)]
    builder.end(0)
    items = json.loads(json.dumps(builder.response["output"]))
    (back,) = messages_of_items(items, lambda _: None) if message["content"] or items else [message]
    assert plain(back) == (message, ran)
    done = [made["item"] for made in streamed if made["type"] == "response.output_item.done"]
    assert sorted(done, key=items.index) == items


@settings(deadline=None, max_examples=60)
@given(PARTS)
def test_blocks_become_the_turn_that_they_were(parts: list[Any]) -> None:
    events, message, ran = turn_of(parts)
    builder = MessageBuilder("msg_1", "tiny")
    for event in events:
        builder.feed(event)
    blocks = json.loads(json.dumps(builder.message()["content"]))
    (back,) = messages_of_anthropic(None, [{"role": "assistant", "content": blocks}])
    assert plain(back) == (message, ran)


@settings(deadline=None, max_examples=60)
@given(PARTS)
def test_server_calls_spelled_out_keep_everything(parts: list[Any]) -> None:
    events, message, ran = turn_of(parts)
    builder = MessageBuilder("msg_1", "tiny")
    for event in events:
        builder.feed(event)
    spelled = with_server_calls(messages_of_anthropic(None, [{"role": "assistant", "content": builder.content}]))
    assert "".join(each["content"] for each in spelled if each["role"] == "assistant") == message["content"]
    assert [(each["tool_call_id"], each["content"]) for each in spelled if each["role"] == "tool"] == ran
    for before, each in pairwise(spelled):
        if each["role"] == "tool":
            assert [call["id"] for call in before["tool_calls"]] == [each["tool_call_id"]]


def test_one_message_of_the_system_stands_first() -> None:
    system = [{"role": "system", "content": "a"}, {"role": "system", "content": [{"type": "text", "text": "b"}]}]
    later = [{"role": "user", "content": "c"}, {"role": "system", "content": "d"}]
    assert with_one_system([*system, *later]) == [{"role": "system", "content": "a\n\nb"}, *later]
    assert with_one_system(later) == later and with_one_system([]) == []


MESSAGE = {"model": "tiny", "max_tokens": 5, "messages": [{"role": "user", "content": "x"}]}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "auto", "text", "x" * 600, "resp_1", "user"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["type", "role", "content", "text", "name", "id", "call_id", "ttl", "format", "input"]), inner,
        max_size=4,
    ),
    max_leaves=8,
)  # fmt: skip
KINDS = st.sampled_from(["message", "function_call", "function_call_output", "mcp_call", "item_reference", "reasoning",
                         "text", "tool_use", "tool_result", "mcp_tool_use", "mcp_tool_result", "thinking", "function",
                         "mcp", "custom", "tool", "allowed_tools", "ephemeral", "json_schema"])  # fmt: skip
NEAR = st.dictionaries(
    st.sampled_from(["role", "content", "text", "name", "id", "call_id", "arguments", "output", "tool_use_id", "input",
                     "server_label", "allowed_tools", "error", "cache_control", "mode", "tools", "ttl", "schema"]),
    JSON, max_size=5,
).flatmap(lambda value: KINDS.map(lambda kind: {**value, "type": kind}))  # fmt: skip
ANY = JSON | NEAR | st.lists(NEAR, max_size=3)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_no_body_breaks_the_server(data: st.DataObject) -> None:
    path, table, good = data.draw(st.sampled_from([
        ("/v1/responses", responses.RESPONSE_FIELDS, {"input": "x"}),
        ("/v1/messages", messages.MESSAGE_FIELDS, MESSAGE),
    ]))  # fmt: skip
    names = st.sampled_from([field.name for field in table])
    fields = data.draw(st.dictionaries(names, ANY, min_size=1, max_size=3))
    if path == "/v1/messages" and data.draw(st.booleans()):
        role = data.draw(st.sampled_from(["user", "assistant", "system"]))
        fields["messages"] = [{"role": role, "content": data.draw(st.lists(NEAR, max_size=3))}]

    async def send() -> tuple[int, Any]:
        service = ScriptedService()
        service.respond = lambda turn: said("A")
        app = create_app(service)
        async with http(app) as client:
            answer = await client.post(path, json={**good, **fields})
            return answer.status_code, answer.text

    status, text = asyncio.run(send())
    assert status in (200, 400, 404), (status, text)
    if status == 404:
        assert any(name in text for name in ("model", "previous_response_id", "no stored item")), text


@pytest.mark.parametrize("num_chunks", [0, 1, 3])
@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
def test_a_client_that_goes_away_frees_its_turn(path: str, num_chunks: int, stream: bool = True) -> None:
    async def leave() -> ScriptedService:
        service = ScriptedService([*said("Once ", "upon")[:-2], 30.0, *called(("c", "f", "{}"))])
        app = create_app(service)
        body: dict[str, Any] = {"input": "x"} if path == "/v1/responses" else MESSAGE
        await gone_after(app, path, {**body, "stream": stream}, num_chunks)
        return service

    service = run(leave())
    assert service.num_closed == service.num_started == 1


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
def test_a_client_that_waits_for_the_whole_and_goes_away(path: str) -> None:
    test_a_client_that_goes_away_frees_its_turn(path, 0, stream=False)
