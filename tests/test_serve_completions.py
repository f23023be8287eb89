"""/v1/completions, /tokenize and their like over a model that counts."""

from __future__ import annotations

import json
from typing import Any

import pytest
from asgi_clients import http, openai_async, run
from fake_service import FakeService
from starlette.routing import Route

from jaxcept_serve.app import create_app
from jaxcept_serve.chat import CHAT_FIELDS
from jaxcept_serve.limits import ApiKey, ServerOptions
from jaxcept_serve.turn_chunks import retold
from jaxcept_serve.turns import PromptTurn, ServiceError

PATH = "/v1/completions"


def post(body: Any, service: FakeService | None = None, options: ServerOptions | None = None, path: str = PATH) -> Any:
    async def send() -> Any:
        async with http(create_app(service or FakeService(), options)) as client:
            return await client.post(path, json=body)

    return run(send())


def chunks_of(text: str) -> list[Any]:
    lines = [line for line in text.split("\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@pytest.mark.parametrize(
    ("prompt", "count"),
    [("one two", 1), ([3, 3], 1), (["one two", "three"], 2), ([[3, 3], [5]], 2), (["one", [5]], 2)],
)
def test_every_form_of_prompt(prompt: Any, count: int):
    service = FakeService()
    answer = post({"model": "fake", "prompt": prompt, "max_tokens": 2}, service).json()
    assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-")
    assert answer["choices"] == [
        {"index": i, "text": " 1 2", "logprobs": None, "finish_reason": "length"} for i in range(count)
    ]
    assert answer["usage"]["completion_tokens"] == 2 * count
    assert len(service.turns) == count and len({turn.request_id for turn in service.turns}) == count


def test_prompts_times_n_are_numbered_through():
    body = {"prompt": ["one two", "three"], "n": 2, "max_tokens": 1, "best_of": 2}
    assert [choice["index"] for choice in post(body).json()["choices"]] == [0, 1, 2, 3]
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = chunks_of(post({**body, "stream": True, "stream_options": options}).text)
    texts = dict.fromkeys(range(4), "")
    for chunk in chunks[:-1]:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == dict.fromkeys(range(4), " 1")
    assert max(chunk["usage"]["completion_tokens"] for chunk in chunks[:-1]) == 4
    assert chunks[-1]["usage"]["completion_tokens"] == 4 and chunks[-1]["usage"]["prompt_tokens"] == 3
    assert len([chunk for chunk in chunks[:-1] if chunk["choices"][0]["finish_reason"]]) == 4


def test_what_lm_eval_sends():
    body = {"model": "fake", "prompt": [[3, 4, 5], [6, 7]], "temperature": 0, "max_tokens": 1, "logprobs": 1,
            "seed": 1234, "echo": True}  # fmt: skip
    first, second = post(body).json()["choices"]
    logprobs = first["logprobs"]
    assert first["text"] == " 3 4 5 1" and logprobs["tokens"] == [" 3", " 4", " 5", " 1"]
    assert logprobs["token_logprobs"] == [None, -0.5, -0.5, -0.5] and logprobs["text_offset"] == [0, 2, 4, 6]
    assert logprobs["top_logprobs"] == [None, {" 4": -0.5}, {" 5": -0.5}, {" 1": -0.5}]
    assert len(second["logprobs"]["tokens"]) == 3
    only = post({**body, "max_tokens": 0}).json()["choices"][0]
    assert only["text"] == " 3 4 5" and len(only["logprobs"]["token_logprobs"]) == 3


def test_streamed_logprobs_continue_their_offsets():
    chunks = chunks_of(post({"prompt": "a b", "max_tokens": 3, "logprobs": 2, "stream": True}).text)
    told = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"][0]["logprobs"]]
    assert [each["text_offset"] for each in told] == [[0], [2], [4]]
    assert told[0]["top_logprobs"] == [{" 1": -0.5, " 2": -1.5}]


def test_defaults_and_sampling():
    service = FakeService()
    post({"prompt": "a b"}, service)
    turn = service.turns[-1]
    assert isinstance(turn, PromptTurn) and turn.params.max_tokens == 16 and turn.add_special_tokens
    post({"prompt": "a", "max_tokens": 5, "min_tokens": 2, "ignore_eos": True, "add_special_tokens": False}, service)
    turn = service.turns[-1]
    assert isinstance(turn, PromptTurn) and not turn.add_special_tokens
    assert (turn.params.max_tokens, turn.params.min_tokens, turn.params.ignore_eos) == (5, 2, True)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"), ({"prompt": ""}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": {}}, "prompt"),
    ({"prompt": 1}, "prompt"), ({"prompt": [[]]}, "prompt"), ({"prompt": [[[1]]]}, "prompt[0][0]"),
    ({"prompt": [-1]}, "prompt[0]"), ({"prompt": [1, 2**63]}, "prompt[1]"), ({"prompt": [1, 1.5]}, "prompt[1]"),
    ({"prompt": [1, True]}, "prompt[1]"), ({"prompt": [1, "a"]}, "prompt[1]"), ({"prompt": ["a", 1]}, "prompt[1]"),
    ({"prompt": ["a", None]}, "prompt[1]"), ({"prompt": [[1], [-1]]}, "prompt[1][0]"), ({"prompt": [10**6]}, "prompt"),
    ({"prompt": ["a"] * 100_000}, "prompt"), ({"prompt": [1] * 64}, "prompt"), ({"prompt": "a " * 64}, "prompt"),
    ({"prompt": ["a"] * 1000, "n": 128}, "n"), ({"best_of": 3}, "best_of"), ({"best_of": -1}, "best_of"),
    ({"suffix": "x"}, "suffix"), ({"prompt_embeds": "x"}, "prompt_embeds"), ({"echo": 1}, "echo"),
    ({"echo": True, "stream": True}, "echo"), ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 2**40}, "max_tokens"), ({"logprobs": 21}, "logprobs"), ({"logprobs": -1}, "logprobs"),
    ({"logprobs": True}, "logprobs"), ({"temperature": -1}, "temperature"), ({"stop": [1]}, "stop[0]"),
    ({"n": 0}, "n"), ({"min_tokens": 17}, "min_tokens"), ({"prompt_logprobs": 2**40}, "prompt_logprobs"),
]  # fmt: skip


def test_every_wrong_value_is_refused_by_its_name():
    service = FakeService()

    async def check() -> None:
        async with http(create_app(service)) as client:
            for fields, param in WRONG:
                response = await client.post(PATH, json={"prompt": "a"} | fields)
                told = response.json()["error"]
                seen = (response.status_code, told["param"])
                assert seen == (400, param), (str(fields)[:100], told)
            assert (await client.post(PATH, json={})).json()["error"]["param"] == "prompt"
            assert (await client.post(PATH, json={"prompt": "a", "model": "b"})).status_code == 404
            assert (await client.post(PATH, json={"prompt": "a"})).status_code == 200

    run(check())
    assert not service.open


def test_one_prompt_that_is_refused_starts_none():
    service = FakeService()
    assert post({"prompt": ["a", "b", "word " * 100]}, service).status_code == 400
    assert not service.open and len(service.turns) == 2


def test_the_longest_prompt_that_fits():
    assert post({"prompt": [1] * 63, "max_tokens": 1}).status_code == 200
    response = post({"prompt": [1] * 64, "max_tokens": 1})
    assert response.status_code == 400 and response.json()["error"]["code"] == "context_length_exceeded"


def test_a_failure_of_one_prompt_ends_all():
    service = FakeService()
    service.error = RuntimeError("secret")
    response = post({"prompt": ["a", "b"]}, service)
    assert response.status_code == 500 and "secret" not in response.text and not service.open
    chunks = chunks_of(post({"prompt": ["a", "b"], "stream": True}, service).text)
    assert "error" in chunks[-1] and not service.open


def test_tokenize_and_back():
    told = post({"prompt": "one two three", "return_token_strs": True}, path="/tokenize").json()
    assert told == {"count": 3, "max_model_len": 64, "tokens": [3, 3, 5], "token_strs": [" 3", " 3", " 5"]}
    chat = post({"messages": [{"role": "user", "content": "hi there"}]}, path="/tokenize").json()
    assert chat["count"] == 2 and chat["token_strs"] is None
    assert post({"tokens": [3, 5]}, path="/detokenize").json() == {"prompt": " 3 5"}


@pytest.mark.parametrize(("path", "body", "param"), [
    ("/tokenize", {}, "prompt"), ("/tokenize", {"prompt": 1}, "prompt"), ("/tokenize", {"messages": []}, "messages"),
    ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
    ("/tokenize", {"messages": [{"role": "king"}]}, "messages[0].role"),
    ("/detokenize", {}, "tokens"), ("/detokenize", {"tokens": "a"}, "tokens"),
    ("/detokenize", {"tokens": [5000]}, "tokens"),
    ("/detokenize", {"tokens": [1, -1]}, "tokens[1]"), ("/detokenize", {"tokens": [2**63]}, "tokens[0]"),
    ("/detokenize", {"tokens": [[1]]}, "tokens[0]"),
])  # fmt: skip
def test_what_cannot_be_tokenized(path: str, body: dict[str, Any], param: str):
    response = post(body, path=path)
    assert response.status_code == 400 and response.json()["error"]["param"] == param


def test_what_the_server_tells_of_itself():
    async def check() -> None:
        async with http(create_app(FakeService())) as client:
            assert (await client.get("/tokenizer_info")).json()["vocab_size"] == 1000
            assert "version" in (await client.get("/version")).json()
            [first, _] = (await client.get("/v1/models")).json()["data"]
            assert (first["id"], first["object"], first["max_model_len"]) == ("fake", "model", 64)

    run(check())


def test_the_official_client():
    async def check() -> None:
        client = openai_async(create_app(FakeService()))
        answer = await client.completions.create(model="fake", prompt=["a b", "c"], max_tokens=2)
        assert [choice.text for choice in answer.choices] == [" 1 2"] * 2
        stream = await client.completions.create(model="fake", prompt="a", max_tokens=2, stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == " 1 2"

    run(check())


@pytest.mark.parametrize("has_keys", [False, True])
def test_the_document_names_every_route(has_keys: bool):
    options = ServerOptions(api_keys=(ApiKey("a", "key"),) if has_keys else ())
    app = create_app(FakeService(), options)

    async def fetch() -> Any:
        async with http(app) as client:
            return (await client.get("/openapi.json", headers={"x-api-key": "key"})).json()

    document = run(fetch())
    told = {(path, method) for path, methods in document["paths"].items() for method in methods}
    served = {
        (route.path.replace(":path", ""), method.lower())
        for route in app.routes
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert told == served - {("/openapi.json", "get")}
    chat = document["paths"]["/v1/chat/completions"]["post"]
    schema = chat["requestBody"]["content"]["application/json"]["schema"]
    assert schema["required"] == ["messages"] and schema["properties"]["model"]["enum"] == ["fake", "alias", None]
    assert set(schema["properties"]) == {field.name for field in CHAT_FIELDS}
    assert schema["properties"]["n"] == {"type": ["integer", "null"], "minimum": 1, "maximum": 128, "default": 1,
                                         "description": "Completions of the prompt."}  # fmt: skip
    assert ("security" in chat) == has_keys and "security" not in document["paths"]["/health"]["get"]


def test_a_text_that_cannot_fit_is_told_as_too_long():
    error = ServiceError(400, "prompt_ids has at least 5000 ids: expected at most 63", param="prompt")
    told = retold(error, "messages", "response_format")
    assert told.message == "messages: prompt is too long: 5000 tokens > 63 maximum"
    assert (told.param, told.code) == ("messages", "context_length_exceeded")
