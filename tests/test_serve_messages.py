"""/v1/messages as the anthropic SDK reads it: blocks, events, cache fields, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from asgi_clients import anthropic_async, anthropic_sync, http, run
from pydantic import TypeAdapter
from scripted_service import ScriptedService, called, ran, said
from starlette.applications import Starlette

from jaxcept.scheduler.params import SamplingParams
from jaxcept_serve.app import create_app
from jaxcept_serve.conversion import messages_of_anthropic, with_server_calls
from jaxcept_serve.turns import ServiceError, TextDelta, Usage

TOOL: Any = {
    "name": "calculator",
    "description": "Adds.",
    "input_schema": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
}
CALL = ("toolu_1", "calculator", '{"expression": "1+1"}')
HI: Any = [{"role": "user", "content": "hi"}]


def make(*scripts: Any, **kwargs: Any) -> tuple[ScriptedService, Starlette]:
    service = ScriptedService(*scripts, **kwargs)
    return service, create_app(service)


def post(app: Starlette, body: Any, path: str = "/v1/messages", **headers: str) -> tuple[int, Any]:
    async def send() -> tuple[int, Any]:
        async with http(app) as client:
            answer = await client.post(path, json=body, headers=headers)
            return answer.status_code, answer.json()

    return run(send())


def events_of(app: Starlette, body: dict[str, Any]) -> list[dict[str, Any]]:
    async def send() -> list[dict[str, Any]]:
        async with http(app) as client:
            answer = await client.post("/v1/messages?beta=true", json={**body, "stream": True})
            assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
            events = []
            for block in filter(None, answer.text.split("\n\n")):
                head, data = block.split("\n")
                events.append(json.loads(data.removeprefix("data: ")))
                assert head == f"event: {events[-1]['type']}"
            return events

    return run(send())


def test_a_text_is_answered() -> None:
    service, app = make(said("Hel", "lo"))
    made = anthropic_sync(app).messages.create(
        model="tiny", max_tokens=9, messages=HI, system="Be brief.", stop_sequences=["END"], metadata={"user_id": "u"},
        extra_body={"temperature": 0.5, "top_p": 0.9, "top_k": 5},
    )  # fmt: skip
    assert made.content[0].text == "Hello" and made.stop_reason == "end_turn" and made.model == "tiny"  # type: ignore[union-attr]
    assert (made.usage.input_tokens, made.usage.output_tokens) == (8, 7)
    assert (made.usage.cache_read_input_tokens, made.usage.cache_creation_input_tokens) == (12, 0)
    turn = service.turns[0]
    assert turn.messages == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    params = turn.params
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k, params.stop) == (
        9,
        0.5,
        0.9,
        5,
        ("END",),
    )
    Message.model_validate(made.model_dump())


def test_every_event_of_text_and_calls() -> None:
    _, app = make([*said("On ", "it.")[:-2], *called(CALL, ("toolu_2", "calculator", "{}"))])
    events = events_of(app, {"model": "tiny", "max_tokens": 9, "messages": HI, "tools": [TOOL]})
    adapter: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
    for made in events:
        if made["type"] != "ping":
            adapter.validate_python(made)
    block = ["content_block_start", "content_block_delta", "content_block_delta", "content_block_stop"]
    kinds = [made["type"] for made in events]
    assert kinds == ["message_start", "ping", *block * 3, "message_delta", "message_stop"]
    assert [made["index"] for made in events if made["type"] == "content_block_start"] == [0, 1, 2]
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == 7


def test_what_is_written_to_the_cache_is_told_where_it_was_asked_for() -> None:
    _, app = make(said("A"))
    block: Any = {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}
    client = anthropic_sync(app)
    made = client.messages.create(model="tiny", max_tokens=9, messages=[{"role": "user", "content": [block]}])
    usage = made.usage
    assert (usage.input_tokens, usage.cache_creation_input_tokens, usage.cache_read_input_tokens) == (3, 5, 12)


def test_a_stream_tells_its_prompt_at_once() -> None:
    _, app = make(said("A"))
    first = events_of(app, {"model": "tiny", "max_tokens": 9, "messages": HI})[0]
    assert first["type"] == "message_start" and first["message"]["usage"]["input_tokens"] == 20


def test_the_sdk_streams_it_as_it_creates_it() -> None:
    _, app = make(*[[*said("On ", "it.")[:-2], *called(CALL)]] * 2)
    client = anthropic_sync(app)
    fields: Any = {"model": "tiny", "max_tokens": 9, "messages": HI, "tools": [TOOL]}
    with client.messages.stream(**fields) as stream:
        assert list(stream.text_stream) == ["On ", "it."]
        streamed = stream.get_final_message()
    created = client.messages.create(**fields)
    assert streamed.content[1].input == {"expression": "1+1"} and streamed.stop_reason == "tool_use"  # type: ignore[union-attr]
    shown = [made.model_dump(exclude={"id": True}) for made in (streamed, created)]
    shown[1]["usage"].pop("jaxcept")  # the SDK takes over the counts that it knows from the stream's end
    assert shown[0] == shown[1]


def test_a_client_loop_sends_back_what_it_was_sent() -> None:
    service, app = make(called(CALL, text="Let me see."), said("Two."))
    client = anthropic_async(app)

    async def loop() -> Any:
        history: Any = [*HI]
        first = await client.messages.create(model="tiny", max_tokens=9, messages=history, tools=[TOOL])
        results = [{"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "2"}]}
                   for block in first.content if block.type == "tool_use"]  # fmt: skip
        history += [{"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
        return await client.messages.create(model="tiny", max_tokens=9, messages=history, tools=[TOOL])

    assert run(loop()).content[0].text == "Two."
    assert service.turns[1].messages == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [
            {"id": "toolu_1", "type": "function", "function": {"name": "calculator", "arguments": CALL[2]}}]},
        {"role": "tool", "tool_call_id": "toolu_1", "content": "2"},
    ]  # fmt: skip
    assert service.turns[1].tools == [{"type": "function", "function": {
        "name": "calculator", "description": "Adds.", "parameters": TOOL["input_schema"]}}]  # fmt: skip


def test_calls_that_the_server_runs_are_mcp_blocks() -> None:
    runs = [*ran("toolu_1", "calculator", CALL[2], "2"), *ran("toolu_2", "lookup", "{}", "error: no", True)]
    script = [*said("Wait. ")[:-2], *runs, *said("Two.")]
    service, app = make(script, script, said("Bye."), said("Bye."))
    client = anthropic_sync(app)
    with client.beta.messages.stream(model="tiny", max_tokens=9, messages=HI) as stream:
        streamed = stream.get_final_message()
    created = client.messages.create(model="tiny", max_tokens=9, messages=HI)
    kinds = ["text", "mcp_tool_use", "mcp_tool_result", "mcp_tool_use", "mcp_tool_result", "text"]
    assert [block.type for block in streamed.content] == [block.type for block in created.content] == kinds
    use, result = streamed.content[1], streamed.content[2]
    assert use.input == {"expression": "1+1"} and use.server_name == "jaxcept"  # type: ignore[union-attr]
    assert result.content[0].text == "2" and streamed.content[4].is_error  # type: ignore[union-attr, index]
    for made in (streamed, created):
        history: Any = [*HI, {"role": "assistant", "content": made.content}, {"role": "user", "content": "thanks"}]
        client.beta.messages.create(model="tiny", max_tokens=9, messages=history)
    assert service.turns[2].messages == service.turns[3].messages
    assert [message["content"] for message in service.turns[2].messages] == ["hi", "Wait. Two.", "thanks"]
    expanded = with_server_calls([dict(message) for message in service.turns[2].messages])
    assert [(message["role"], message["content"]) for message in expanded[1:]] == [
        ("assistant", "Wait. "), ("tool", "2"), ("assistant", ""), ("tool", "error: no"), ("assistant", "Two."),
        ("user", "thanks"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("finish", "stop", "expected"),
    [("stop", None, ("end_turn", None)), ("stop", "END", ("stop_sequence", "END")),
     ("length", None, ("max_tokens", None)), ("tool_limit", None, ("pause_turn", None))],
)  # fmt: skip
def test_why_a_turn_stopped(finish: str, stop: str | None, expected: tuple[str, str | None]) -> None:
    _, app = make(said("a", finish=finish, stop=stop))
    made = anthropic_sync(app).messages.create(model="tiny", max_tokens=9, messages=HI, stop_sequences=["END"])
    assert (made.stop_reason, made.stop_sequence) == expected


def test_a_failure_has_anthropics_form() -> None:
    broken = [TextDelta(0, "Half"), RuntimeError("secret")]
    _, app = make(broken, said("a", finish="tool_failed"), [ServiceError(503, "full")])
    last = events_of(app, {"model": "tiny", "max_tokens": 9, "messages": HI})[-1]
    assert last["type"] == "error" and last["error"]["type"] == "api_error" and "secret" not in str(last)
    client = anthropic_sync(app)
    with pytest.raises(anthropic.InternalServerError, match="a tool that the server runs failed"):
        client.messages.create(model="tiny", max_tokens=9, messages=HI)
    with pytest.raises(anthropic.APIStatusError, match="overloaded_error"):
        client.messages.create(model="tiny", max_tokens=9, messages=HI)


def test_count_tokens() -> None:
    service, app = make()
    counted = anthropic_sync(app).messages.count_tokens(model="tiny", messages=HI, system="a b", tools=[TOOL])
    assert counted.input_tokens == 3 and len(service.turns[0].tools) == 1


def test_cache_marks_say_how_long_the_context_is_held() -> None:
    service, app = make(*[said("A")] * 5)
    client = anthropic_sync(app)
    short: Any = {"type": "ephemeral"}
    long: Any = {"type": "ephemeral", "ttl": "1h"}
    system: Any = [{"type": "text", "text": "s", "cache_control": long}]
    marked: Any = [{"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": short}]}]
    fields: Any = {"model": "tiny", "max_tokens": 9}
    client.messages.create(**fields, messages=marked)
    client.messages.create(**fields, messages=marked, system=system)
    client.messages.create(**fields, messages=HI, tools=[{**TOOL, "cache_control": short}])
    client.messages.create(**fields, messages=HI, cache_control=long)
    client.messages.create(**fields, messages=HI)
    assert [turn.hints.hold_ttl_s for turn in service.turns] == [300.0, 3600.0, 300.0, 3600.0, None]
    assert service.turns[0].messages == HI, "a mark is no part of the message: clients move it from turn to turn"


def test_diagnostics_name_what_changed() -> None:
    usage = Usage(prompt_tokens=30, completion_tokens=2, cached_tokens=10)
    cold = Usage(prompt_tokens=30, completion_tokens=2, cached_tokens=0)
    service, app = make(
        said("A"), *[said("B", usage=usage)] * 3, said("B", usage=cold), said("B", usage=usage), said("B")
    )
    client = anthropic_sync(app)
    fields: Any = {"model": "tiny", "max_tokens": 9, "tools": [TOOL], "system": "s"}
    first = client.messages.create(**fields, messages=HI)
    going_on: Any = [*HI, {"role": "assistant", "content": first.content}, {"role": "user", "content": "go on"}]

    def told(**changed: Any) -> Any:
        asked = {**fields, "messages": going_on, "diagnostics": {"previous_message_id": first.id}, **changed}
        made = client.messages.create(**asked)
        assert made.diagnostics is not None
        return made.diagnostics.cache_miss_reason

    changed = told(messages=[{"role": "user", "content": "ho"}, *going_on[1:]])
    assert (changed.type, changed.cache_missed_input_tokens) == ("messages_changed", 20)
    assert "messages[0]" in changed.message
    assert told(tools=[]).type == "tools_changed"
    assert told(system="other").type == "system_changed"
    assert told().type == "unavailable", "the same prefix, and yet not held any more"
    assert told() is None
    assert told(diagnostics={"previous_message_id": "msg_none"}).type == "previous_message_not_found"
    assert len(service.turns) == 7


def test_diagnostics_come_at_the_end_of_a_stream() -> None:
    _, app = make(said("A"))
    fields = {"model": "tiny", "max_tokens": 9, "messages": HI, "diagnostics": {"previous_message_id": "msg_none"}}
    ending = events_of(app, fields)[-2]
    assert ending["diagnostics"] == {"cache_miss_reason": {"type": "previous_message_not_found"}}


@pytest.mark.parametrize(
    ("choice", "expected"),
    [({"type": "auto"}, ("auto", True)), ({"type": "none"}, ("none", True)),
     ({"type": "any", "disable_parallel_tool_use": True}, ("required", False)),
     ({"type": "tool", "name": "calculator"}, ("calculator", True))],
)  # fmt: skip
def test_tool_choice(choice: Any, expected: tuple[str, bool]) -> None:
    service, app = make(said("A"))
    anthropic_sync(app).messages.create(model="tiny", max_tokens=9, messages=HI, tools=[TOOL], tool_choice=choice)
    assert (service.turns[0].tool_choice, service.turns[0].parallel_tool_calls) == expected


def test_structured_output_is_passed_on_or_refused_by_name() -> None:
    service, app = make(said("{}"))
    body = {"model": "tiny", "max_tokens": 9, "messages": HI,
            "output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}}  # fmt: skip
    status, told = post(app, body)
    if "structured" in SamplingParams.__dataclass_fields__:
        assert status == 200 and service.turns[0].params.structured is not None
    else:
        assert status == 400 and "output_config.format.schema" in told["error"]["message"]


def test_claude_code_is_understood() -> None:
    service, app = make(said("A"), said("A"))
    mark = {"type": "ephemeral", "ttl": "1h"}

    def body(checksum: str) -> dict[str, Any]:
        return {
            "model": "tiny", "max_tokens": 32000, "stream": False, "temperature": 1,
            "metadata": {"user_id": "user_1_account__session_2"},
            "thinking": {"type": "enabled", "budget_tokens": 31999},
            "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
            "system": [
                {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2.1; cch={checksum};"},
                {"type": "text", "text": "You are Claude Code.", "cache_control": mark},
                {"type": "text", "text": "Rules.", "cache_control": mark},
            ],
            "tools": [{**TOOL, "name": f"tool_{i}", "eager_input_streaming": True} for i in range(40)],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "<system-reminder>r</system-reminder>"},
                                             {"type": "text", "text": "fix it", "cache_control": mark}]},
                {"role": "assistant", "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "sig"},
                    {"type": "text", "text": "Looking."},
                    {"type": "tool_use", "id": "toolu_1", "name": "tool_1", "input": {"expression": "é"}},
                    {"type": "tool_use", "id": "toolu_2", "name": "tool_2", "input": {}}]},
                {"role": "user", "content": [
                    {"type": "tool_result", "tool_use_id": "toolu_1", "content": "out", "is_error": False},
                    {"type": "tool_result", "tool_use_id": "toolu_2", "is_error": True, "cache_control": mark},
                    {"type": "text", "text": "also this"}]},
            ],
        }  # fmt: skip

    headers = {"x-api-key": "k", "anthropic-version": "2023-06-01",
               "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14"}  # fmt: skip
    for checksum in ("1", "2"):
        status, told = post(app, body(checksum), "/v1/messages?beta=true", **headers)
        assert status == 200, told
    turn, again = service.turns
    assert turn.messages == again.messages, "what changes with every request is no part of the prompt"
    roles = [message["role"] for message in turn.messages]
    assert roles == ["system", "user", "assistant", "tool", "tool", "user"]
    assert turn.messages[2]["content"] == "Looking." and len(turn.messages[2]["tool_calls"]) == 2
    assert turn.messages[2]["tool_calls"][0]["function"]["arguments"] == '{"expression": "é"}'
    assert [message["content"] for message in turn.messages[3:]] == ["out", "error: ", "also this"]
    assert turn.params.max_tokens == 4096 and turn.hints.hold_ttl_s == 3600.0 and len(turn.tools) == 40


def test_text_and_blocks_are_the_same_messages() -> None:
    def block(*texts: str) -> Any:
        return [{"type": "text", "text": text} for text in texts]

    plain = messages_of_anthropic("s", [{"role": "user", "content": "u"}, {"role": "assistant", "content": "ab"}])
    blocks = messages_of_anthropic(
        block("s"), [{"role": "user", "content": block("u")}, {"role": "assistant", "content": block("a", "b")}]
    )
    assert plain == blocks
    assert messages_of_anthropic(None, [{"role": "assistant", "content": []}]) == [{"role": "assistant", "content": ""}]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 2**63}, "max_tokens"),
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": ["x"]}, "messages[0]"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "messages[0].content[0].tool_use_id"),
    ({"messages": [{"role": "assistant", "content": [{"type": "tool_use"}]}]}, "messages[0].content[0].id"),
    ({"system": 3}, "system"),
    ({"system": [{"type": "image"}]}, "system[0].type"),
    ({"stop_sequences": [""]}, "stop_sequences[0]"),
    ({"stop_sequences": ["x"] * 10_000}, "stop_sequences"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"stream": 1}, "stream"),
    ({"tools": [{"name": "x"}]}, "tools[0].input_schema"),
    ({"tools": [{"input_schema": {}}]}, "tools[0].name"),
    ({"tools": [TOOL, TOOL]}, "tools[1].name"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
    ({"tool_choice": {"type": "tool", "name": "absent"}}, "tool_choice.name"),
    ({"tool_choice": {"type": "some"}}, "tool_choice.type"),
    ({"tool_choice": {"type": "auto", "disable_parallel_tool_use": 1}}, "tool_choice.disable_parallel_tool_use"),
    ({"cache_control": {"type": "ephemeral", "ttl": "2h"}}, "cache_control.ttl"),
    ({"system": [{"type": "text", "text": "s", "cache_control": 1}]}, "system[0].cache_control"),
    ({"diagnostics": {"previous_message_id": 3}}, "diagnostics.previous_message_id"),
    ({"mcp_servers": [{"type": "url", "url": "http://10.0.0.1"}]}, "mcp_servers"),
    ({"output_config": {"format": {"type": "yaml"}}}, "output_config.format.type"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=[param for _, param in REFUSED])
def test_a_bad_value_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    service, app = make(said("ok"))
    good = {"model": "tiny", "max_tokens": 9, "messages": HI}
    status, told = post(app, {**good, **fields})
    assert status == 400 and told["type"] == "error" and told["error"]["type"] == "invalid_request_error", told
    assert param in told["error"]["message"] and not service.turns, told
    assert post(app, good)[0] == 200


def test_a_model_that_is_not_there() -> None:
    _, app = make()
    with pytest.raises(anthropic.NotFoundError, match="not_found_error"):
        anthropic_sync(app).messages.create(model="absent", max_tokens=9, messages=HI)
