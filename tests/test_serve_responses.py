"""/v1/responses as the openai SDK reads it: items, events, storage, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import openai
import pytest
from asgi_clients import http, openai_async, openai_sync, run
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter
from scripted_service import USAGE, ScriptedService, called, ran, said
from starlette.applications import Starlette

from jaxcept.scheduler.params import SamplingParams
from jaxcept.scheduler.plan import TokenLogprobs
from jaxcept_serve.app import create_app
from jaxcept_serve.conversion import with_server_calls
from jaxcept_serve.response_store import ResponseStore, StoredResponse
from jaxcept_serve.responses import _kept
from jaxcept_serve.turns import Caller, ChatTurn, ServiceError, TextDelta, TurnDone, TurnFinished

TOOL = {
    "type": "function",
    "name": "calculator",
    "description": "Adds.",
    "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    "strict": True,
}
CALL = ("call_1", "calculator", '{"expression": "1+1"}')


def make(*scripts: Any, **kwargs: Any) -> tuple[ScriptedService, Starlette]:
    service = ScriptedService(*scripts, **kwargs)
    return service, create_app(service)


def post(app: Starlette, body: Any, path: str = "/v1/responses") -> tuple[int, Any]:
    async def send() -> tuple[int, Any]:
        async with http(app) as client:
            answer = await client.post(path, json=body)
            return answer.status_code, answer.json()

    return run(send())


def events_of(app: Starlette, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a stream, each checked against the SDK's own types."""

    async def send() -> list[dict[str, Any]]:
        async with http(app) as client:
            answer = await client.post("/v1/responses", json={**body, "stream": True})
            assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
            blocks = [block for block in answer.text.split("\n\n") if block]
            assert blocks.pop() == "data: [DONE]"
            events = []
            for block in blocks:
                head, data = block.split("\n")
                events.append(json.loads(data.removeprefix("data: ")))
                assert head == f"event: {events[-1]['type']}"
            return events

    events = run(send())
    adapter: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    for made in events:
        adapter.validate_python(made)
    assert [made["sequence_number"] for made in events] == list(range(len(events)))
    return events


def test_a_text_is_answered() -> None:
    service, app = make(said("Hel", "lo"))
    response = openai_sync(app).responses.create(
        model="tiny", input="hi", instructions="Be brief.", max_output_tokens=9, temperature=0.5, top_p=0.9,
        metadata={"a": "b"}, user="u",
    )  # fmt: skip
    assert response.output_text == "Hello" and response.status == "completed"
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens, response.usage.total_tokens) == (20, 7, 27)
    assert response.usage.input_tokens_details.cached_tokens == 12
    assert response.usage.input_tokens_details.cache_write_tokens == 5
    assert response.metadata == {"a": "b"} and response.instructions == "Be brief." and response.temperature == 0.5
    turn = service.turns[0]
    assert turn.messages == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert (turn.params.max_tokens, turn.params.temperature, turn.params.top_p) == (9, 0.5, 0.9)
    Response.model_validate(response.model_dump(by_alias=True))


def test_every_event_of_text_and_calls() -> None:
    _, app = make([*said("On ", "it.")[:-2], *called(CALL, ("call_2", "calculator", "{}"))])
    events = events_of(app, {"model": "tiny", "input": "x", "tools": [TOOL]})
    kinds = [made["type"].removeprefix("response.") for made in events]
    call = ["output_item.added", *["function_call_arguments.delta"] * 2, "function_call_arguments.done",
            "output_item.done"]  # fmt: skip
    assert kinds == [
        "created", "in_progress",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.delta", "output_text.done",
        "content_part.done", "output_item.done", *call, *call, "completed",
    ]  # fmt: skip
    final = events[-1]["response"]
    assert [item["type"] for item in final["output"]] == ["message", "function_call", "function_call"]
    assert final["output"][0]["content"][0]["text"] == "On it."
    assert (final["output"][1]["call_id"], final["output"][1]["arguments"]) == CALL[::2]
    done = [made["item"] for made in events if made["type"] == "response.output_item.done"]
    assert done == final["output"], "what was told at the end is what was streamed"


def test_the_sdk_streams_it() -> None:
    _, app = make([*said("On it.")[:-2], *called(CALL)])

    async def stream() -> Any:
        async with openai_async(app).responses.stream(model="tiny", input="x", tools=[TOOL]) as events:  # type: ignore[list-item]
            deltas = [made.delta async for made in events if made.type == "response.output_text.delta"]
            return deltas, await events.get_final_response()

    deltas, final = run(stream())
    assert deltas == ["On it."] and final.output_text == "On it."
    assert final.output[1].type == "function_call" and final.output[1].parsed_arguments == {"expression": "1+1"}


def test_a_client_loop_goes_on_by_id_and_by_items() -> None:
    service, app = make(called(CALL, text="Let me see."), said("Two."), said("Two."))
    client = openai_sync(app)
    first = client.responses.create(model="tiny", input="1+1?", tools=[TOOL])  # type: ignore[list-item]
    answer = {"type": "function_call_output", "call_id": "call_1", "output": "2"}
    by_id = client.responses.create(model="tiny", input=[answer], previous_response_id=first.id, tools=[TOOL])  # type: ignore[list-item]
    assert by_id.output_text == "Two." and by_id.previous_response_id == first.id
    history = [{"role": "user", "content": "1+1?"}, *(item.model_dump() for item in first.output), answer]
    client.responses.create(model="tiny", input=history, tools=[TOOL])  # type: ignore[arg-type, list-item]
    assert service.turns[1].messages == service.turns[2].messages == [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "calculator", "arguments": CALL[2]}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "2"},
    ]  # fmt: skip
    assert service.turns[0].hints.conversation == service.turns[1].hints.conversation == first.id
    assert service.turns[2].hints.conversation != first.id


def test_instructions_are_of_one_response_alone() -> None:
    service, app = make(said("A"), said("B"))
    client = openai_sync(app)
    first = client.responses.create(model="tiny", input="a", instructions="One.")
    client.responses.create(model="tiny", input="b", instructions="Two.", previous_response_id=first.id)
    assert [message["content"] for message in service.turns[1].messages] == ["Two.", "a", "A", "b"]


def test_calls_that_the_server_runs_are_mcp_calls() -> None:
    runs = [*ran("call_1", "calculator", CALL[2], "2"), *ran("call_2", "lookup", "{}", "error: no", True)]
    service, app = make([*said("Wait. ")[:-2], *runs, *said("Two.")], said("Bye."))
    events = events_of(app, {"model": "tiny", "input": "x"})
    kinds = [made["type"].removeprefix("response.") for made in events]
    assert "mcp_call.in_progress" in kinds and "mcp_call.completed" in kinds and "mcp_call.failed" in kinds
    output = events[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["message", "mcp_call", "mcp_call", "message"]
    assert output[1]["output"] == "2" and output[1]["id"] == "call_1" and output[1]["status"] == "completed"
    assert output[2]["output"] is None and output[2]["error"]["content"][0]["text"] == "error: no"
    client = openai_sync(app)
    client.responses.create(model="tiny", input=[*output, {"role": "user", "content": "thanks"}])
    turn, thanks = service.turns[1].messages
    assert (turn["content"], thanks["content"]) == ("Wait. Two.", "thanks"), "one turn, as the service remembers it"
    expanded = with_server_calls([dict(turn), dict(thanks)])
    assert [(message["role"], message["content"]) for message in expanded] == [
        ("assistant", "Wait. "), ("tool", "2"), ("assistant", ""), ("tool", "error: no"), ("assistant", "Two."),
        ("user", "thanks"),
    ]  # fmt: skip
    assert [len(message.get("tool_calls", ())) for message in expanded] == [1, 0, 1, 0, 0, 0]


def test_text_behind_a_call_is_of_the_same_turn() -> None:
    service, app = make([*called(CALL)[:-2], *said("\n")[:-2], *called(("call_2", "calculator", "{}"))], said("ok"))
    client = openai_sync(app)
    first = client.responses.create(model="tiny", input="x", tools=[TOOL])  # type: ignore[list-item]
    client.responses.create(model="tiny", input="y", previous_response_id=first.id)
    turn = service.turns[1].messages[1]
    assert turn["content"] == "\n" and [call["id"] for call in turn["tool_calls"]] == ["call_1", "call_2"]


def test_structured_output_is_parsed_or_refused_by_name() -> None:
    class Answer(BaseModel):
        city: str

    service, app = make(said('{"city": "Oslo"}'))
    if "structured" not in service_params_fields():
        with pytest.raises(openai.BadRequestError, match=r"text\.format\.schema"):
            openai_sync(app).responses.parse(model="tiny", input="x", text_format=Answer)
        return
    parsed = openai_sync(app).responses.parse(model="tiny", input="x", text_format=Answer)
    assert parsed.output_parsed == Answer(city="Oslo")
    assert service.turns[0].params.structured is not None


def service_params_fields() -> Any:
    from jaxcept.scheduler.params import SamplingParams

    return SamplingParams.__dataclass_fields__


def test_logprobs() -> None:
    deltas = [TextDelta(0, "", (97,), (TokenLogprobs(-0.5, 1, ((97, -0.5), (98, -1.5))),)),
              TextDelta(0, "ab", (98,), (TokenLogprobs(-0.25, 1, ((98, -0.25), (99, -2.5))),)),
              TurnFinished(0, "stop", None, "ab", (), (97, 98)), TurnDone(USAGE)]  # fmt: skip
    service, app = make(deltas)
    response = openai_sync(app).responses.create(
        model="tiny", input="x", top_logprobs=2, include=["message.output_text.logprobs"]
    )
    part = response.output[0].content[0]  # type: ignore[union-attr]
    assert [entry.token for entry in part.logprobs] == ["a", "b"]  # type: ignore[union-attr]
    assert part.logprobs[0].top_logprobs[1].logprob == -1.5  # type: ignore[union-attr, index]
    assert service.turns[0].params.logprobs == 2


@pytest.mark.parametrize(
    ("finish", "status", "reason"),
    [("length", "incomplete", "max_output_tokens"), ("tool_limit", "incomplete", "max_messages"),
     ("tool_timeout", "failed", None), ("tool_failed", "failed", None)],
)  # fmt: skip
def test_how_a_turn_ended(finish: str, status: str, reason: str | None) -> None:
    _, app = make(said("a", finish=finish), said("a", finish=finish))
    response = openai_sync(app).responses.create(model="tiny", input="x")
    assert response.status == status
    assert (response.incomplete_details.reason if response.incomplete_details else None) == reason
    assert (response.error is not None) == (status == "failed")
    assert events_of(app, {"input": "x"})[-1]["type"] == f"response.{status}"


def test_stored_responses_are_read_listed_and_deleted() -> None:
    _, app = make(said("A"), said("B"))
    client = openai_sync(app)
    made = client.responses.create(
        model="tiny", input=[{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]
    )
    assert client.responses.retrieve(made.id) == made
    listed = client.responses.input_items.list(made.id, order="asc", limit=1)
    assert [item.content[0].text for item in listed] == ["one", "two"], "the SDK asks for the second page"  # type: ignore[union-attr]
    assert client.responses.input_items.list(made.id).data[0].content[0].text == "two"  # type: ignore[union-attr]
    item_id = made.output[0].id
    client.responses.create(model="tiny", input=[{"type": "item_reference", "id": item_id}])  # type: ignore[list-item, misc]
    client.responses.delete(made.id)
    for gone in (client.responses.retrieve, client.responses.delete, client.responses.input_items.list):
        with pytest.raises(openai.NotFoundError):
            gone(made.id)
    with pytest.raises(openai.NotFoundError, match="previous_response_id"):
        client.responses.create(model="tiny", input="x", previous_response_id=made.id)


def test_a_response_that_is_not_stored_is_gone() -> None:
    _, app = make(said("A"))
    client = openai_sync(app)
    made = client.responses.create(model="tiny", input="x", store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_cancel_ends_a_stream() -> None:
    service, app = make([TextDelta(0, "Once"), 30.0, *said("never")])

    async def cancelled() -> Any:
        import asyncio

        client = openai_async(app)
        api = next(route.endpoint.__self__ for route in app.routes if route.path == "/v1/responses")  # type: ignore[attr-defined]
        stream = asyncio.create_task(client.responses.create(model="tiny", input="x", stream=True))
        while len(api.store) == 0 or not service.turns:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        (response_id,) = api.store._by_caller[""]
        assert (await client.responses.retrieve(response_id)).status == "in_progress"
        with pytest.raises(openai.ConflictError):
            await client.responses.delete(response_id)
        assert (await client.responses.cancel(response_id)).status == "cancelled"
        events = [made async for made in await stream]
        with_text = await client.responses.retrieve(response_id)
        return events, with_text, await client.responses.cancel(response_id)

    events, stored, again = run(cancelled())
    assert events[-1].type == "response.incomplete" and events[-1].response.status == "cancelled"
    assert stored.output_text == "Once" and stored.status == again.status == "cancelled"
    assert service.num_closed == 1


def test_a_completed_response_cannot_be_cancelled() -> None:
    _, app = make(said("A"))
    client = openai_sync(app)
    made = client.responses.create(model="tiny", input="x")
    with pytest.raises(openai.ConflictError):
        client.responses.cancel(made.id)


def test_a_failure_in_the_middle_of_a_stream_is_an_event() -> None:
    for error in (RuntimeError("secret"), ServiceError(503, "full")):
        service, app = make([TextDelta(0, "Half"), error])
        last = events_of(app, {"input": "x"})[-1]
        assert last["type"] == "response.failed" and "secret" not in str(last)
        assert last["response"]["output"][0]["status"] == "incomplete" and service.num_closed == 1


def test_callers_see_their_own_alone() -> None:
    store = ResponseStore()
    stored = StoredResponse({"id": "resp_1", "output": [{"id": "msg_1"}]}, [], (), "c")
    store.put("mine", stored)
    assert store.get("mine", "resp_1") is stored and store.get("yours", "resp_1") is None
    assert store.item("mine", "msg_1") is not None and store.item("yours", "msg_1") is None
    assert not store.delete("yours", "resp_1") and store.delete("mine", "resp_1")
    assert store.num_bytes == 0 and store.item("mine", "msg_1") is None


def test_the_store_is_bounded_in_count_bytes_and_time() -> None:
    now = [0.0]
    store = ResponseStore(max_responses=4, max_bytes=2000, ttl_s=10, clock=lambda: now[0])

    def put(salt: str, number: int, size: int = 10) -> None:
        response = {"id": f"resp_{number}", "output": [{"id": f"msg_{number}", "text": "x" * size}]}
        store.put(salt, StoredResponse(response, [], (), "c"))
        store.check()

    put("quiet", 0)
    for number in range(1, 20):
        put("loud", number)
    assert len(store) == 4 and store.get("quiet", "resp_0") is not None, "who keeps most loses first"
    put("loud", 20, 1500)
    put("loud", 21, 1500)
    assert store.get("loud", "resp_20") is None and store.get("loud", "resp_21") is not None
    put("loud", 22, 5000)
    assert store.get("loud", "resp_22") is None, "larger than the whole store"
    put("quiet", 23)
    now[0] = 10.5
    assert store.get("quiet", "resp_0") is None and len(store) == 0
    store.check()


def test_hints() -> None:
    service, app = make(*[said("A")] * 4)
    client = openai_sync(app)
    client.responses.create(model="tiny", input="x", prompt_cache_key="k", prompt_cache_options={"ttl": "12h"})
    hints = service.turns[0].hints
    assert (hints.conversation, hints.hold_ttl_s) == ("k", 43200.0)
    part: Any = {"type": "input_text", "text": "x", "prompt_cache_breakpoint": {"mode": "explicit"}}
    client.responses.create(model="tiny", input="x", prompt_cache_options={"mode": "explicit"})
    client.responses.create(
        model="tiny", input=[{"role": "user", "content": [part]}], prompt_cache_options={"mode": "explicit"}
    )
    assert service.turns[1].hints.hold_ttl_s == 0 and service.turns[2].hints.hold_ttl_s is None
    assert service.turns[2].messages == [{"role": "user", "content": "x"}]
    warm: Any = {"prewarm": True}
    warmed = client.responses.create(model="tiny", input="x", max_output_tokens=500, prompt_cache_options=warm)
    assert warmed.output == [] and warmed.status == "completed" and service.turns[3].params.max_tokens == 1


def test_diagnostics_name_what_changed() -> None:
    _, app = make(*[said("A")] * 7)
    client = openai_sync(app)
    first = client.responses.create(model="tiny", input="x", tools=[TOOL])  # type: ignore[list-item]
    compared: Any = {"comparison_response_id": first.id}
    turns = (("user", "x"), ("assistant", "A"), ("user", "y"))
    said_back: Any = [{"role": role, "content": content} for role, content in turns]

    def told(**fields: Any) -> Any:
        made = client.responses.create(**{"model": "tiny", "tools": [TOOL], "prompt_cache_options": compared, **fields})
        return made.prompt_cache_diagnostics

    assert told(input=said_back).type == "cache_hit"
    assert told(input=[{"role": "user", "content": "z"}, *said_back[1:]]).reason == "input_changed"
    assert told(input=said_back, tools=[]).reason == "tools_changed"
    assert told(input=said_back, model="alias").reason == "model_changed"
    miss = told(input=said_back, prompt_cache_key="other")
    assert miss.reason == "prompt_cache_key_changed" and miss.cache_missed_tokens == 8
    missing = {"comparison_response_id": "resp_none"}
    assert told(input="x", prompt_cache_options=missing).type == "comparison_response_not_found"


def test_truncation_drops_the_oldest_turns() -> None:
    service, app = make(said("A"), max_model_len=10)
    items = [{"role": "user" if i % 2 == 0 else "assistant", "content": f"{i} a b"} for i in range(7)]
    openai_sync(app).responses.create(
        model="tiny",
        input=items,
        instructions="s",
        truncation="auto",
        max_output_tokens=3,  # type: ignore[arg-type]
    )
    kept = [message["content"] for message in service.turns[-1].messages]
    assert kept == ["s", "6 a b"], "seven tokens fit: the system's and the last question, not one turn more"


def test_what_truncation_left_out_is_not_stored() -> None:
    def said_by(role: str, *numbers: int) -> list[Any]:
        return [{"role": role, "content": str(i)} for i in numbers]

    whole = [*said_by("system", 0), *said_by("user", 1, 2, 3, 4)]
    turn = ChatTurn("id", [*said_by("system", 9), *said_by("user", 3, 4)], SamplingParams())
    assert _kept(whole, turn) == [*said_by("system", 0), *said_by("user", 3, 4)]
    assert _kept(whole[1:], replace(turn, messages=turn.messages[1:])) == said_by("user", 3, 4)
    assert _kept(whole, replace(turn, messages=whole)) == whole


def test_tool_choice_and_the_tools_of_the_server() -> None:
    service, app = make(*[said("A")] * 5)
    other = {**TOOL, "name": "other"}
    choices: list[Any] = [
        "required", {"type": "function", "name": "other"},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "other"}]},
        {"type": "mcp", "server_label": "jaxcept", "name": "lookup"}, "none",
    ]  # fmt: skip
    mcp = {"type": "mcp", "server_label": "jaxcept", "allowed_tools": ["lookup"]}
    for choice in choices:
        body = {"input": "x", "tools": [TOOL, other, mcp, {"type": "web_search"}], "tool_choice": choice,
                "parallel_tool_calls": False, "max_tool_calls": 3}  # fmt: skip
        assert post(app, body)[0] == 200
    assert [turn.tool_choice for turn in service.turns] == ["required", "other", "required", "lookup", "none"]
    assert [len(turn.tools) for turn in service.turns] == [2, 2, 1, 2, 2]
    turn = service.turns[0]
    assert (turn.run_tools, turn.max_tool_calls, turn.parallel_tool_calls) == (("lookup",), 3, False)
    assert turn.tools[0]["function"]["parameters"] == TOOL["parameters"]


def test_codex_is_understood() -> None:
    service, app = make(said("A"))
    body = {
        "model": "tiny", "instructions": "You are a coding agent.", "store": False, "stream": False,
        "input": [
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "rules"}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "zzz"},
            {"type": "function_call", "name": "shell", "arguments": "{}", "call_id": "c1", "id": "fc_1"},
            {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "ok"}]},
        ],
        "tools": [{**TOOL, "name": "shell", "strict": False}, {"type": "web_search", "external_web_access": False}],
        "tool_choice": "auto", "parallel_tool_calls": False, "reasoning": {"effort": "medium", "summary": "auto"},
        "include": ["reasoning.encrypted_content"], "prompt_cache_key": "c0ffee", "text": {"verbosity": "low"},
        "client_metadata": {"x": "y"},
    }  # fmt: skip
    status, made = post(app, body)
    assert status == 200, made
    roles = [message["role"] for message in service.turns[0].messages]
    assert roles == ["system", "user", "assistant", "tool"]
    assert service.turns[0].messages[0]["content"] == "You are a coding agent.\n\nrules"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "input"),
    ({"input": 3}, "input"),
    ({"input": []}, "input"),
    ({"input": [3]}, "input[0]"),
    ({"input": [{}]}, "input[0].type"),
    ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
    ({"input": [{"type": "function_call", "call_id": "c", "name": "", "arguments": "{}"}]}, "input[0].name"),
    ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
    ({"input": [{"type": "computer_call"}]}, "input[0].type"),
    ({"input": [{"type": ["x"], "role": {}}]}, "input[0].type"),
    ({"background": True}, "background"),
    ({"conversation": "c"}, "conversation"),
    ({"stream": "yes"}, "stream"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": 1.5}, "max_output_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_logprobs": 21}, "top_logprobs"),
    ({"truncation": "some"}, "truncation"),
    ({"metadata": {"k": 3}}, "metadata.k"),
    ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
    ({"include": ["everything"]}, "include[0]"),
    ({"text": {"format": {"type": "yaml"}}}, "text.format.type"),
    ({"text": {"format": {"type": "json_schema", "name": "n", "schema": 3}}}, "text.format.schema"),
    ({"tools": [{"type": "code_interpreter"}]}, "tools[0].type"),
    ({"tools": [{"type": "mcp", "server_label": "x", "server_url": "http://10.0.0.1"}]}, "tools[0].server_label"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"),
    ({"tools": [{"type": "function", "name": "a\nb"}]}, "tools[0].name"),
    ({"tools": [{"type": "function", "name": "a", "parameters": []}]}, "tools[0].parameters"),
    ({"tools": [TOOL, TOOL]}, "tools[1].name"),
    ({"tools": [TOOL] * 1000}, "tools"),
    ({"tool_choice": "sometimes"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "name": "none"}}, "tool_choice.name"),
    ({"tool_choice": {"type": "file_search"}}, "tool_choice.type"),
    ({"prompt_cache_options": {"mode": "loose"}}, "prompt_cache_options.mode"),
    ({"prompt_cache_options": {"ttl": "soon"}}, "prompt_cache_options.ttl"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=[param for _, param in REFUSED])
def test_a_bad_value_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    service, app = make(said("ok"))
    body = fields if not fields or "input" in fields else {"input": "x", **fields}
    status, told = post(app, body)
    assert status == 400 and told["error"]["param"] == param and param in told["error"]["message"], told
    assert told["error"]["type"] == "invalid_request_error" and not service.turns
    assert post(app, {"input": "x"})[0] == 200


def test_a_refusal_of_the_engine_comes_before_the_stream() -> None:
    for stream in (False, True):
        _, app = make([ServiceError(400, "prompt: too long", param="input")])
        status, told = post(app, {"input": "x", "stream": stream})
        assert status == 400 and told["error"]["param"] == "input"


def test_count_tokens() -> None:
    _, app = make()
    assert openai_sync(app).responses.input_tokens.count(model="tiny", input="a b c").input_tokens == 3


def test_callers_are_told_to_the_service() -> None:
    service, app = make(said("A"))
    assert post(app, {"input": "x"})[0] == 200
    assert service.callers[0] == Caller()
