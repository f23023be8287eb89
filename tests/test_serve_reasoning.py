"""Thoughts over HTTP: apart from what is said in every API, and no obstacle to the turn that follows."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from anthropic.types import Message, RawMessageStreamEvent
from asgi_clients import http, run
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from scripted_service import USAGE, ScriptedService, called
from test_session import make_session, tokenizer

from jaxcept import AsyncLLM, SamplingParams, async_llm
from jaxcept.text.reasoning import make_thoughts
from jaxcept.text.template import ChatTemplate
from jaxcept.tools.parsers import make_parser
from jaxcept_serve.app import create_app
from jaxcept_serve.service import EngineService
from jaxcept_serve.turns import Caller, ChatTurn, TextDelta, TurnDone, TurnEvent, TurnFinished, Usage

HI = [{"role": "user", "content": "hi"}]
CALL = ("call_1", "shout", '{"word": "hi"}')
THOUGHT = replace(USAGE, reasoning_tokens=4)

__all__ = ["tokenizer"]  # a fixture


def thinking() -> list[TurnEvent]:
    """A turn that thinks, says something and calls."""
    *events, finished, _ = called(CALL, text="So:")
    assert isinstance(finished, TurnFinished)
    thoughts = [TextDelta(0, "", (1,), None, "hm"), TextDelta(0, "", (2,), None, ", 3")]
    return [*thoughts, *events, replace(finished, thought="hm, 3"), TurnDone(THOUGHT)]


def post(path: str, body: Any) -> Any:
    async def send() -> Any:
        async with http(create_app(ScriptedService(thinking()))) as client:
            answer = await client.post(path, json=body)
            assert answer.status_code == 200, answer.text
            return answer

    return run(send())


def events_of(path: str, body: Any) -> list[Any]:
    lines = [line for line in post(path, {**body, "stream": True}).text.split("\n") if line.startswith("data: ")]
    return [json.loads(line.removeprefix("data: ")) for line in lines if line != "data: [DONE]"]


def test_chat_completions() -> None:
    body = {"model": "tiny", "messages": HI}
    answer = post("/v1/chat/completions", body).json()
    message = answer["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm, 3", "So:") and len(message["tool_calls"]) == 1
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 4}
    deltas = [event["choices"][0]["delta"] for event in events_of("/v1/chat/completions", body)]
    told = [(name, delta[name]) for delta in deltas for name in ("reasoning_content", "content") if delta.get(name)]
    assert told == [("reasoning_content", "hm"), ("reasoning_content", ", 3"), ("content", "So:")]


@pytest.mark.parametrize("asked", [None, {"type": "disabled"}, {"type": "enabled", "budget_tokens": 1024}])
def test_messages(asked: Any) -> None:
    body = {"model": "tiny", "messages": HI, "max_tokens": 64, "thinking": asked}
    message = Message.model_validate(post("/v1/messages", body).json())
    blocks = [block.type for block in message.content]
    assert blocks == (["thinking"] if asked and asked["type"] == "enabled" else []) + ["text", "tool_use"]
    adapter: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
    events = [adapter.validate_python(each) for each in events_of("/v1/messages", body) if each["type"] != "ping"]
    deltas = [each.delta for each in events if each.type == "content_block_delta"]
    thought = "".join(delta.thinking for delta in deltas if delta.type == "thinking_delta")
    assert thought == ("hm, 3" if "thinking" in blocks else "")
    assert [each.content_block.type for each in events if each.type == "content_block_start"] == blocks


def test_responses() -> None:
    body = {"model": "tiny", "input": "hi"}
    response = Response.model_validate(post("/v1/responses", body).json())
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call"]
    assert response.output[0].content[0].text == "hm, 3" and response.output_text == "So:"
    assert response.usage is not None and response.usage.output_tokens_details.reasoning_tokens == 4
    adapter: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    events = [adapter.validate_python(each) for each in events_of("/v1/responses", body)]
    assert "".join(each.delta for each in events if each.type == "response.reasoning_text.delta") == "hm, 3"
    assert [each.text for each in events if each.type == "response.reasoning_text.done"] == ["hm, 3"]
    assert [each.sequence_number for each in events] == list(range(len(events)))
    added = [each.item.type for each in events if each.type == "response.output_item.added"]
    done = [each.item.type for each in events if each.type == "response.output_item.done"]
    assert added == done == ["reasoning", "message", "function_call"]


FIRST = (
    "<think>\nA call.\n</think>\n\nWait.\n<tool_call>\n"
    '{"name": "shout", "arguments": {"word": "hi"}}\n</tool_call><|im_end|>'
)
SECOND = "<think>HI it is</think>It is HI.<|im_end|>"
SHOUT = {"type": "function", "function": {"name": "shout", "parameters": {"type": "object"}}}


@pytest.fixture(params=["chatml", "qwen3"])
def llm(tokenizer: Any, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[AsyncLLM]:
    """An engine that speaks from a script; the template leaves thoughts where they are, or drops them."""
    if request.param == "qwen3":
        template = ChatTemplate((Path(__file__).parent / "templates" / "qwen3.jinja").read_text(), {})
        monkeypatch.setattr(tokenizer, "chat_template", template)
    session = make_session(tokenizer, FIRST, reasoning="qwen3", max_model_len=2048)
    monkeypatch.setattr(async_llm, "build_session", lambda config, progress: session)
    made = AsyncLLM()
    yield made
    made.close()


def test_thoughts_stay_until_the_template_leaves_them_out(llm: AsyncLLM) -> None:
    """In a loop of calls the next turn goes on behind them, though the client does not send them back."""
    assert llm.session.tokenizer.chat_template is not None
    drops = llm.session.tokenizer.chat_template.drops_thoughts
    service = EngineService(
        llm, ["tiny"], make_parser=lambda: make_parser("hermes"), make_thoughts=lambda: make_thoughts("qwen3")
    )

    async def ask(messages: list[Any]) -> tuple[TurnFinished, Usage, str]:
        turn = ChatTurn(uuid.uuid4().hex, messages, SamplingParams(temperature=0, max_tokens=300), tools=[SHOUT])
        events = [event async for event in await service.chat(turn, Caller())]
        finished = next(event for event in events if isinstance(event, TurnFinished))
        done = events[-1]
        assert isinstance(done, TurnDone)
        return finished, done.usage, "".join(event.thought for event in events if isinstance(event, TextDelta))

    def speak(text: str) -> None:
        runner: Any = llm.session.engine.runner
        runner.scripts = dict.fromkeys(range(4), llm.session.tokenizer.encode(text, add_special_tokens=False))

    async def conversation() -> None:
        first, usage, thought = await ask(HI)
        assert (first.thought, thought, first.text.strip()) == ("A call.", "A call.", "Wait.")
        assert len("A call.") <= usage.reasoning_tokens <= len("<think>\nA call.\n</think>")
        (call,) = first.calls
        said = {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        messages = [
            *HI,
            {"role": "assistant", "content": first.text.strip(), "tool_calls": [said]},
            {"role": "tool", "tool_call_id": call.call_id, "content": "HI"},
        ]
        speak(SECOND)
        final, second, _ = await ask(messages)
        assert (final.thought, final.text) == ("HI it is", "It is HI.")
        known = usage.prompt_tokens + usage.completion_tokens
        assert known - 1 <= second.cached_tokens <= known < second.prompt_tokens, "the thought's tokens are there still"
        messages += [{"role": "assistant", "content": final.text}, {"role": "user", "content": "and now?"}]
        speak("<think>\n\n</think>\n\nNothing.<|im_end|>")
        last, third, _ = await ask(messages)
        assert last.text == "Nothing."
        whole = service.tokenize_chat(ChatTurn("x", messages, SamplingParams(), tools=[SHOUT]))
        if drops:
            assert third.prompt_tokens == len(whole), "what the template makes of the messages, and no more"
            assert 8 * (usage.prompt_tokens // 8) <= third.cached_tokens <= usage.prompt_tokens
        else:
            num_thought = len("<think>\nA call.\n</think>\n\n") + len("<think>HI it is</think>")
            assert third.prompt_tokens >= len(whole) + num_thought
            assert third.cached_tokens >= second.prompt_tokens + second.completion_tokens - 1
        assert service.conversations.num_held == 1 and llm.session.engine.scheduler.num_intercepted == 1

    asyncio.run(asyncio.wait_for(conversation(), 60))
