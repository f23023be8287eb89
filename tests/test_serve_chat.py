"""/v1/chat/completions over a model that counts: whole, streamed, with tools, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from asgi_clients import http, openai_async, run
from fake_service import FakeService

from jaxcept.scheduler.params import StructuredOutput
from jaxcept_serve.app import create_app
from jaxcept_serve.turns import ChatTurn, ServiceError

PATH = "/v1/chat/completions"
USER = {"role": "user", "content": "one two three"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"x": {}}}}}
CALL = {"id": "c0", "type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}


def post(body: Any, service: FakeService | None = None, **headers: str) -> Any:
    async def send() -> Any:
        async with http(create_app(service or FakeService())) as client:
            given = body if isinstance(body, bytes) else json.dumps(body).encode()
            return await client.post(PATH, content=given, headers={"content-type": "application/json", **headers})

    return run(send())


def ask(**fields: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": [USER], **fields}


def chunks_of(text: str) -> list[Any]:
    """The events of a stream, which must end as streams do."""
    lines = [line for line in text.split("\n") if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def turn_of(service: FakeService) -> ChatTurn:
    turn = service.turns[-1]
    assert isinstance(turn, ChatTurn)
    return turn


def test_a_whole_answer():
    answer = post(ask(max_tokens=3, stop=["x"])).json()
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-") and answer["model"] == "fake"
    assert answer["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": " 1 2 3", "refusal": None}, "logprobs": None,
         "finish_reason": "length"}
    ]  # fmt: skip
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (3, 3, 6)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2, "cache_write_tokens": 1}
    assert usage["jaxcept"] == {"returned_tokens": 0, "swapped_tokens": 2, "recomputed_tokens": 3, "intercepted_s": 0.5,
                                "held_byte_s": 7.0}  # fmt: skip


def test_a_streamed_answer():
    chunks = chunks_of(post(ask(max_tokens=3, stream=True, stream_options={"include_usage": True})).text)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1]) == " 1 2 3"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * 4 + ["length"]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 3
    assert all(chunk["usage"] is None for chunk in chunks[:-1]) and len({chunk["id"] for chunk in chunks}) == 1
    assert "usage" not in chunks_of(post(ask(stream=True)).text)[-1]


def test_usage_all_along_a_stream():
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = chunks_of(post(ask(max_tokens=3, stream=True, stream_options=options)).text)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [0, 1, 2, 3, 3, 3]
    assert len({chunk["usage"]["prompt_tokens"] for chunk in chunks}) == 1


def test_a_prewarmed_prompt():
    """The prompt is computed, and nothing is said."""
    service = FakeService()
    asked = ask(max_tokens=50, n=2, logprobs=True, prompt_cache_options={"prewarm": True})
    (choice,) = post(asked, service).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"], choice["logprobs"]) == ("", "stop", None)
    assert service.turns[0].params.max_tokens == 1 and service.turns[0].is_prewarm
    chunks = chunks_of(post({**asked, "stream": True}).text)
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [{"role": "assistant", "content": ""}, {}]


@pytest.mark.parametrize(("reason", "status"), [("error", 500), ("abort", 503), ("tool_timeout", 500)])
def test_a_completion_that_did_not_end_by_itself_is_an_error(reason: str, status: int):
    """An SDK asks again; half an answer with "stop" it would take for the whole."""
    service = FakeService()
    service.finish_reason = reason
    assert post(ask(), service).status_code == status
    text = post(ask(stream=True), service).text
    assert '"error"' in text and '"finish_reason":"stop"' not in text and text.endswith("data: [DONE]\n\n")


def test_several_completions():
    answer = post(ask(n=3, max_tokens=2)).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    chunks = chunks_of(post(ask(n=3, max_tokens=2, stream=True)).text)
    ends = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["finish_reason"]]
    assert [end["index"] for end in ends] == [0, 1, 2]


def test_logprobs():
    answer = post(ask(max_tokens=2, logprobs=True, top_logprobs=2)).json()
    content = answer["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == [" 1", " 2"]
    assert content[0]["top_logprobs"] == [
        {"token": " 1", "logprob": -0.5, "bytes": [32, 49]}, {"token": " 2", "logprob": -1.5, "bytes": [32, 50]},
    ]  # fmt: skip
    assert post(ask(max_tokens=1, logprobs=True)).json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    streamed = chunks_of(post(ask(max_tokens=2, logprobs=True, top_logprobs=2, stream=True)).text)
    told = [each for chunk in streamed for each in (chunk["choices"][0]["logprobs"] or {}).get("content", [])]
    assert told == content
    prompt = post(ask(prompt_logprobs=1)).json()["prompt_logprobs"]
    assert prompt[0] is None and prompt[1]["3"] == {"logprob": -0.5, "decoded_token": " 3"}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_call_of_the_clients_tool(choice: Any):
    service = FakeService()
    asked = ask(tools=[TOOL], tool_choice=choice, parallel_tool_calls=False)
    [made] = post(asked, service).json()["choices"]
    assert made["finish_reason"] == "tool_calls" and made["message"]["content"] is None
    assert made["message"]["tool_calls"] == [CALL]
    turn = turn_of(service)
    assert turn.tool_choice == ("add" if isinstance(choice, dict) else "required") and not turn.parallel_tool_calls
    pieces = [
        piece
        for chunk in chunks_of(post({**asked, "stream": True}).text)
        for piece in chunk["choices"][0]["delta"].get("tool_calls", [])
    ]
    assert pieces[0] == {"index": 0, "id": "c0", "type": "function", "function": {"name": "add", "arguments": ""}}
    assert "".join(piece["function"]["arguments"] for piece in pieces) == '{"x": 1}' and "id" not in pieces[1]


def test_a_call_of_the_servers_tool_is_told_apart():
    asked = ask(messages=[{"role": "user", "content": "server tool"}], max_tokens=1)
    [choice] = post(asked).json()["choices"]
    served = {"id": "s1", "name": "clock", "arguments": "{}", "result": "noon", "is_error": False}
    assert choice["message"]["jaxcept_tools"] == [served] and "tool_calls" not in choice["message"]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks_of(post({**asked, "stream": True}).text)]
    assert [delta["jaxcept_tool"] for delta in deltas if "jaxcept_tool" in delta] == [{**served, "duration_s": 0.25}]
    assert not any("tool_calls" in delta for delta in deltas)


def test_what_follows_a_call_is_read():
    service = FakeService()
    answer = {"role": "tool", "tool_call_id": "c0", "content": "2"}
    history = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, answer, {"role": "developer",
               "content": [{"type": "text", "text": "brief"}]}]  # fmt: skip
    assert post(ask(messages=history, tools=[TOOL]), service).status_code == 200
    assert turn_of(service).messages == [
        USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, answer,
        {"role": "system", "content": [{"type": "text", "text": "brief"}]},
    ]  # fmt: skip


def test_sampling_and_hints_arrive():
    service = FakeService()
    body = ask(
        temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, presence_penalty=1, frequency_penalty=-1,
        repetition_penalty=1.1, seed=7, stop="end", stop_token_ids=[3], min_tokens=1, ignore_eos=True, priority=3,
        logit_bias={"5": -100},
        max_completion_tokens=9, max_tokens=4, prompt_cache_key="k", prompt_cache_options={"ttl": "5m"}, user="u",
        jaxcept={"expected_tool_s": 2, "run_tools": ["a"], "max_tool_calls": 2}, metadata={"a": "b"}, store=True,
        service_tier="auto", anything_else={"x": 1}, chat_template_kwargs={"enable_thinking": False},
    )  # fmt: skip
    assert post(body, service).status_code == 200
    turn, params = turn_of(service), turn_of(service).params
    assert (params.temperature, params.top_p, params.top_k, params.min_p, params.seed) == (0.5, 0.9, 5, 0.1, 7)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (1, -1, 1.1)
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (("end",), (3,), {5: -100.0})
    assert (params.max_tokens, params.min_tokens, params.ignore_eos) == (9, 1, True)
    hints = turn.hints
    assert (hints.expected_tool_s, hints.hold_ttl_s, hints.conversation, hints.priority) == (2, 300, "k", 3)
    assert turn.run_tools == ("a",) and turn.max_tool_calls == 2 and turn.template_kwargs == {"enable_thinking": False}
    post(ask(jaxcept={"hold_ttl_s": 0}), service, **{"x-session-id": "s"})
    assert turn_of(service).hints.hold_ttl_s == 0 and turn_of(service).hints.conversation == "s"


WRONG: list[tuple[dict[str, Any], str]] = [
    *(({name: value}, name) for name in ("n", "max_tokens", "max_completion_tokens", "min_tokens", "top_k",
                                         "top_logprobs", "prompt_logprobs", "seed")
      for value in (2**70 // 3, -(2**62), 1.5, "1", True, [1], {})
      if not (name == "seed" and value == -(2**62))),
    *(({name: value}, name) for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty",
                                         "repetition_penalty")
      for value in (1e308, -1e308, "1", False, [], 101)),
    *(({name: value}, name) for name in ("stream", "logprobs", "ignore_eos", "parallel_tool_calls")
      for value in (1, "true", [])),
    ({"n": 0}, "n"), ({"max_tokens": 0}, "max_tokens"), ({"top_p": 0}, "top_p"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"), ({"top_logprobs": 2}, "top_logprobs"),
    ({"stop": ["a"] * 10_000}, "stop"), ({"stop": [""]}, "stop[0]"), ({"stop": ["a", 1]}, "stop[1]"),
    ({"stop": "x" * 1_000_000}, "stop[0]"), ({"stop": {}}, "stop"), ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"logit_bias": {"-1": 1}}, "logit_bias.-1"), ({"logit_bias": {"x": 1}}, "logit_bias.x"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1"), ({"logit_bias": {"1": None}}, "logit_bias.1"),
    ({"logit_bias": {str(i): 1 for i in range(10_000)}}, "logit_bias"), ({"logit_bias": [1]}, "logit_bias"),
    ({"bad_words": ["a"]}, "bad_words"), ({"use_beam_search": True}, "use_beam_search"),
    ({"model": 1}, "model"), ({"model": "x" * 10_000}, "model"),
    ({"messages": None}, "messages"), ({"messages": []}, "messages"), ({"messages": "hi"}, "messages"),
    ({"messages": [USER] * 20_000}, "messages"), ({"messages": [1]}, "messages[0]"),
    ({"messages": [{}]}, "messages[0].role"), ({"messages": [{"role": "king", "content": ""}]}, "messages[0].role"),
    ({"messages": [{"role": ["user"], "content": ""}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": ["a"]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://10.0.0.1/x"}}]}]},
     "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "dance"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ({"messages": [USER, {"role": "tool", "content": "2", "tool_call_id": "c0"}]}, "messages[1].tool_call_id"),
    ({"messages": [USER, {"role": "tool", "content": "2"}]}, "messages[1].tool_call_id"),
    ({"messages": [{"role": "assistant", "tool_calls": [CALL, CALL]}]}, "messages[0].tool_calls[1].id"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]}, "messages[0].tool_calls[0].function"),
    ({"messages": [{"role": "assistant", "tool_calls": {}}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "assistant", "tool_calls": [CALL]}, USER, {"role": "tool", "tool_call_id": "c0",
                    "content": ""}]}, "messages[2].tool_call_id"),
    ({"messages": [{"role": "assistant", "tool_calls": [CALL]}, *[{"role": "tool", "tool_call_id": "c0",
                    "content": ""}] * 2]}, "messages[2].tool_call_id"),
    ({"tools": {}}, "tools"), ({"tools": [1]}, "tools[0]"), ({"tools": [{"type": "magic"}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "a\x07b"}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]}, "tools[0].function.parameters"),
    ({"tools": [TOOL, TOOL]}, "tools[1].name"), ({"tools": [TOOL] * 10_000}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "a", "description": "x" * 300_000}}]}, "tools"),
    ({"tool_choice": "maybe"}, "tool_choice"), ({"tool_choice": 1}, "tool_choice"),
    ({"tool_choice": {"type": "function"}}, "tool_choice.function"),
    ({"tool_choice": {"type": "magic"}}, "tool_choice.type"),
    ({"chat_template": "{% for _ in range(10**9) %}x{% endfor %}"}, "chat_template"),
    ({"chat_template_kwargs": {"chat_template": "{{ ''.__class__ }}"}}, "chat_template_kwargs.chat_template"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
    ({"audio": {"voice": "x"}}, "audio"), ({"functions": [{}]}, "functions"),
    ({"modalities": ["audio"]}, "modalities[0]"),
    ({"metadata": {str(i): "" for i in range(10_000)}}, "metadata"), ({"user": "x" * 10_000}, "user"),
    ({"prompt_cache_key": "x" * 10_000}, "prompt_cache_key"), ({"prompt_cache_key": 1}, "prompt_cache_key"),
    ({"prompt_cache_options": {"ttl": "soon"}}, "prompt_cache_options.ttl"),
    ({"prompt_cache_options": {"ttl": -1}}, "prompt_cache_options.ttl"),
    ({"jaxcept": {"hold_ttl_s": -1}}, "jaxcept.hold_ttl_s"), ({"jaxcept": {"nonsense": 1}}, "jaxcept.nonsense"),
    ({"jaxcept": {"run_tools": [1]}}, "jaxcept.run_tools[0]"), ({"priority": 2**40}, "priority"),
    ({"response_format": {"type": "poem"}}, "response_format.type"), ({"response_format": "json"}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": 1}}}, "response_format.json_schema.schema"),
    ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
    ({"guided_choice": []}, "guided_choice"), ({"guided_choice": [1]}, "guided_choice[0]"),
    ({"structured_outputs": {}}, "structured_outputs"), ({"guided_regex": ""}, "guided_regex"),
    ({"guided_regex": "a" * 100_000}, "guided_regex"), ({"guided_json": "{"}, "guided_json"),
    ({"stream_options": 1}, "stream_options"),
    ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
]  # fmt: skip


def test_every_wrong_value_is_refused_by_its_name():
    service = FakeService(max_model_len=100)

    async def check() -> None:
        async with http(create_app(service)) as client:
            for fields, param in WRONG:
                response = await client.post(PATH, json=ask() | fields)
                told = response.json()["error"]
                seen = (response.status_code, told["param"], told["type"])
                assert seen == (400, param, "invalid_request_error"), (str(fields)[:100], told)
            assert (await client.post(PATH, json=ask())).status_code == 200

    run(check())
    assert len(service.turns) == 1


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'{"messages": NaN}', b"[" * 20_000, b'{"a": "\\udfff"}'])
def test_bodies_that_are_none(body: bytes):
    response = post(body)
    assert response.status_code == 400 and response.json()["error"]["param"] == "body"


def test_what_the_service_refuses_keeps_its_status():
    long = {"role": "user", "content": "word " * 200}
    response = post(ask(messages=[long]))
    assert response.status_code == 400 and response.json()["error"]["code"] == "context_length_exceeded"
    assert response.json()["error"]["param"] == "messages"
    assert post(ask(model="other")).json()["error"]["code"] == "model_not_found"
    assert post(ask(model="alias")).json()["model"] == "alias"


@pytest.mark.parametrize(("error", "told"), [(ServiceError(503, "the engine has failed"), "the engine has failed"),
                                             (RuntimeError("secret"), "the server failed")])  # fmt: skip
def test_an_engine_that_fails_in_the_midst(error: Exception, told: str):
    service = FakeService()
    service.error = error
    chunks = chunks_of(post(ask(stream=True), service).text)
    assert told in chunks[-1]["error"]["message"] and "secret" not in str(chunks)
    response = post(ask(), service)
    assert response.status_code in (500, 503) and told in response.text and not service.open


@pytest.mark.parametrize(("fields", "expected"), [
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, StructuredOutput(json_object=True)),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "array"}}}},
     StructuredOutput(json_schema={"type": "array"})),
    ({"guided_json": {"type": "array"}}, StructuredOutput(json_schema={"type": "array"})),
    ({"guided_json": '{"type": "array"}'}, StructuredOutput(json_schema={"type": "array"})),
    ({"guided_regex": "a+"}, StructuredOutput(regex="a+")),
    ({"guided_choice": ["a", "b"]}, StructuredOutput(choice=("a", "b"))),
    ({"guided_grammar": "start: x"}, StructuredOutput(grammar="start: x")),
    ({"structured_outputs": {"json": {"type": "array"}}}, StructuredOutput(json_schema={"type": "array"})),
    ({"structured_outputs": {"regex": "a+", "choice": None}}, StructuredOutput(regex="a+")),
    ({"structured_outputs": {"json_object": True}}, StructuredOutput(json_object=True)),
])  # fmt: skip
def test_what_the_output_must_match(fields: dict[str, Any], expected: StructuredOutput | None):
    service = FakeService()
    assert post(ask(**fields), service).status_code == 200
    assert turn_of(service).params.structured == expected


@pytest.mark.parametrize("name", ["guided_regex", "guided_grammar"])
def test_a_constraint_that_cannot_be_compiled_is_told_of_its_field(name: str):
    response = post(ask(**{name: FakeService.UNCOMPILABLE}))
    assert response.status_code == 400 and response.json()["error"]["param"] == name


def test_the_official_client():
    async def check() -> None:
        client = openai_async(create_app(FakeService()))
        answer = await client.chat.completions.create(**ask(max_tokens=2))  # type: ignore[call-overload]
        assert answer.choices[0].message.content == " 1 2" and answer.usage.prompt_tokens_details.cached_tokens == 2
        stream = await client.chat.completions.create(**ask(max_tokens=2, stream=True))  # type: ignore[call-overload]
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == " 1 2"
        names = [model.id async for model in client.models.list()]
        assert names == ["fake", "alias"] and (await client.models.retrieve("alias")).id == "alias"

    run(check())
