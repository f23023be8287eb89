"""Agent loops over the shipped model: the official SDKs run the tools, or the server does; the context goes on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from asgi_clients import anthropic_async, gone_after, openai_async, run
from sizes import SHIPPED
from starlette.applications import Starlette

from jaxcept import AsyncLLM
from jaxcept.tools import builtin
from jaxcept.tools.definition import Tool, tool
from jaxcept.tools.parsers import detect_parser, make_parser
from jaxcept.tools.toolbox import Toolbox
from jaxcept_serve.app import create_app
from jaxcept_serve.service import EngineService

TOOLS: dict[str, Tool] = {function.__name__: tool(function) for function in builtin.TOOLS}
LOOP = (("What is 37 * 91?", "3367"), ("What is the capital of France?", "Paris"), ("Convert 12 km to m.", "12000"))
OPENAI_TOOLS: Any = [{"type": "function", **made.schema["function"]} for made in TOOLS.values()]
ANTHROPIC_TOOLS: Any = [
    {"name": made.name, "description": made.description, "input_schema": made.parameters} for made in TOOLS.values()
]
GREEDY: Any = {"temperature": 0}
MOST_NEW = 48  # tokens of a question, an answer of a tool and what the template puts around them


@pytest.fixture(scope="module")
def llm(slow_costs: Path) -> Iterator[AsyncLLM]:
    made = AsyncLLM(**SHIPPED, cost_model=slow_costs)
    yield made
    made.close()


@pytest.fixture
def make_app(llm: AsyncLLM) -> Callable[..., Starlette]:
    template = llm.session.tokenizer.chat_template
    assert template is not None
    parser = detect_parser(template.source)
    assert parser is not None

    def make(tools: Sequence[Tool] = ()) -> Starlette:
        box = Toolbox(tools)
        service = EngineService(llm, ["shipped"], tools=lambda: box, make_parser=lambda: make_parser(parser))
        return create_app(service)

    return make


def answer(name: str, arguments: dict[str, Any]) -> str:
    return str(TOOLS[name](**arguments))


def test_the_openai_client_runs_the_tools(make_app: Callable[..., Starlette]) -> None:
    async def loop() -> None:
        client = openai_async(make_app())
        previous, known = None, 0
        for question, expected in LOOP:
            given: Any = question
            for _ in range(2):
                made = await client.responses.create(
                    model="shipped", input=given, tools=OPENAI_TOOLS, previous_response_id=previous, temperature=0,
                    max_output_tokens=100,
                )  # fmt: skip
                assert made.usage is not None
                assert made.usage.input_tokens - made.usage.input_tokens_details.cached_tokens <= MOST_NEW or not known
                assert made.usage.input_tokens > known, "the whole conversation is there"
                previous, known = made.id, made.usage.input_tokens + made.usage.output_tokens
                given = [
                    {"type": "function_call_output", "call_id": item.call_id,
                     "output": answer(item.name, json.loads(item.arguments))}
                    for item in made.output if item.type == "function_call"
                ]  # fmt: skip
            assert expected in made.output_text and not given

    run(loop())


def test_a_streaming_client_that_keeps_no_state_here_goes_on_too(make_app: Callable[..., Starlette]) -> None:
    async def loop() -> None:
        client = openai_async(make_app())
        history: Any = []
        for question, expected in LOOP[:2]:
            history.append({"role": "user", "content": question})
            for turn in range(2):
                async with client.responses.stream(
                    model="shipped", input=history, tools=OPENAI_TOOLS, store=False, temperature=0,
                    max_output_tokens=100,
                ) as stream:  # fmt: skip
                    made = await stream.get_final_response()
                assert made.usage is not None
                assert made.usage.input_tokens - made.usage.input_tokens_details.cached_tokens <= MOST_NEW or not turn
                for item in made.output:
                    history.append(item.model_dump(exclude={"parsed_arguments": True}))
                    if item.type == "function_call":
                        output = answer(item.name, json.loads(item.arguments))
                        history.append({"type": "function_call_output", "call_id": item.call_id, "output": output})
            assert expected in made.output_text

    run(loop())


def test_the_anthropic_client_runs_the_tools(make_app: Callable[..., Starlette]) -> None:
    async def loop() -> None:
        client = anthropic_async(make_app())
        history: Any = []
        for number, (question, expected) in enumerate(LOOP):
            history.append({"role": "user", "content": question})
            for turn in range(2):
                fields: Any = {"model": "shipped", "max_tokens": 100, "messages": history, "tools": ANTHROPIC_TOOLS}
                if number == 1:
                    async with client.messages.stream(**fields, extra_body=GREEDY) as stream:
                        made: Any = await stream.get_final_message()
                else:
                    made = await client.messages.create(**fields, extra_body=GREEDY)
                new = made.usage.input_tokens + (made.usage.cache_creation_input_tokens or 0)
                assert new <= MOST_NEW or number == turn == 0
                assert made.stop_reason == ("end_turn" if turn else "tool_use")
                history.append({"role": "assistant", "content": made.content})
                results = [{"type": "tool_result", "tool_use_id": block.id, "content": answer(block.name, block.input)}
                           for block in made.content if block.type == "tool_use"]  # fmt: skip
                if results:
                    history.append({"role": "user", "content": results})
            assert expected in made.content[0].text
        counted = await client.messages.count_tokens(model="shipped", messages=history, tools=ANTHROPIC_TOOLS)
        assert counted.input_tokens > 200

    run(loop())


def test_the_server_runs_the_tools(make_app: Callable[..., Starlette]) -> None:
    async def loop() -> None:
        app = make_app(list(TOOLS.values()))
        history: Any = []
        for question, expected in LOOP:
            history.append({"role": "user", "content": question})
            made = await openai_async(app).responses.create(
                model="shipped", input=history, temperature=0, max_output_tokens=200
            )
            history += [item.model_dump() for item in made.output]
            assert [item.type for item in made.output] == ["mcp_call", "message"] and expected in made.output_text
            assert made.usage is not None
            new = made.usage.input_tokens - made.usage.input_tokens_details.cached_tokens
            assert new <= MOST_NEW * 2 or len(history) == 3, "what the server's tools returned is known too"
        turns: Any = []
        for question, expected in LOOP[:2]:
            turns.append({"role": "user", "content": question})
            message = await anthropic_async(app).beta.messages.create(
                model="shipped", max_tokens=200, messages=turns, extra_body=GREEDY
            )
            turns.append({"role": "assistant", "content": message.content})
            assert [block.type for block in message.content] == ["mcp_tool_use", "mcp_tool_result", "text"]
            assert expected in message.content[-1].text  # type: ignore[union-attr]

    run(loop())


def test_a_prompt_is_warmed(make_app: Callable[..., Starlette]) -> None:
    async def loop() -> None:
        client = openai_async(make_app())
        rules = "Answer every question with one number alone, please, whatever it is. " * 3
        warm: Any = {"prewarm": True}
        await client.responses.create(model="shipped", instructions=rules, input="", prompt_cache_options=warm)
        made = await client.responses.create(model="shipped", instructions=rules, input="Hello!", max_output_tokens=4)
        assert made.usage is not None and made.usage.input_tokens_details.cached_tokens >= 32

    run(loop())


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
def test_a_client_that_goes_away_leaves_nothing_behind(
    llm: AsyncLLM, make_app: Callable[..., Starlette], path: str
) -> None:
    async def leave() -> None:
        app = make_app()
        fields = {"model": "shipped", "max_tokens": 300, "messages": [{"role": "user", "content": LOOP[0][0]}]}
        body: dict[str, Any] = {"input": LOOP[0][0]} if path == "/v1/responses" else fields
        before = (await llm.ask(lambda session: session.engine.metrics()))["num_intercepted"]
        for num_chunks in (0, 2):
            await gone_after(app, path, {**body, "stream": True}, num_chunks)
        for _ in range(100):
            figures = await llm.ask(lambda session: session.engine.metrics())
            if not figures["num_running"] + figures["num_waiting"]:
                break
            await asyncio.sleep(0.05)
        assert figures["num_running"] == figures["num_waiting"] == 0
        assert figures["num_intercepted"] == before, "no context waits for a client that is gone"

    run(leave())


def test_a_prompt_that_is_too_long_is_told_in_known_words(make_app: Callable[..., Starlette]) -> None:
    async def ask() -> None:
        app, text = make_app(), "word " * 2000
        with pytest.raises(openai.BadRequestError) as told:
            await openai_async(app).responses.create(model="shipped", input=text)
        assert (told.value.code, told.value.param) == ("context_length_exceeded", "input")
        with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > 511 maximum"):
            await anthropic_async(app).messages.create(
                model="shipped", max_tokens=9, messages=[{"role": "user", "content": text}]
            )

    run(ask())
