"""Turns on a real engine: what the follow-up computes, what it goes on from, and who may."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sizes import MAX_LEN, SHIPPED

from jaxcept import AsyncLLM, SamplingParams, tool
from jaxcept.scheduler.params import StructuredOutput
from jaxcept.tools.builtin import calculator
from jaxcept.tools.calls import ToolCall
from jaxcept.tools.parsers import make_parser
from jaxcept.tools.toolbox import Toolbox
from jaxcept_serve.service import EngineService, HoldOptions, _tool_choice
from jaxcept_serve.turn_run import TurnRun
from jaxcept_serve.turns import (
    CallDelta,
    Caller,
    ChatTurn,
    Hints,
    PromptTurn,
    ServiceError,
    TextDelta,
    ToolAnswered,
    TurnDone,
    TurnEvent,
    TurnFinished,
    Usage,
)

ME, OTHER = Caller("me", "my salt"), Caller("other", "another salt")
CALCULATOR = tool(calculator)
GREEDY = SamplingParams(temperature=0, max_tokens=120)
QUESTION = [{"role": "user", "content": "What is 37 * 91?"}]
Message = dict[str, Any]
LOOKUP = {"type": "function", "function": {"name": "lookup", "description": "", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def llm(slow_costs: Path) -> Iterator[AsyncLLM]:
    made = AsyncLLM(**SHIPPED, cost_model=slow_costs)
    yield made
    made.close()


@pytest.fixture
def service(llm: AsyncLLM) -> EngineService:
    """A server that runs no tools of its own."""
    return EngineService(llm, ["shipped"], make_parser=lambda: make_parser("hermes"))


@pytest.fixture(scope="module")
def box():
    with Toolbox([calculator]) as made:
        yield made


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 60))


def turn(messages: Sequence[Mapping[str, Any]], **fields: Any) -> ChatTurn:
    fields = {"tools": [CALCULATOR.schema], "params": GREEDY, **fields}
    return ChatTurn(uuid.uuid4().hex, list(messages), **fields)


async def ask(service: EngineService, asked: ChatTurn, caller: Caller = ME) -> tuple[TurnFinished, Usage]:
    events = [event async for event in await service.chat(asked, caller)]
    done = events[-1]
    assert isinstance(done, TurnDone)
    return next(event for event in events if isinstance(event, TurnFinished)), done.usage


def said(finished: TurnFinished) -> Message:
    """The assistant's message as a client sends it back."""
    calls = [
        {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in finished.calls
    ]
    return {"role": "assistant", "content": finished.text or None, **({"tool_calls": calls} if calls else {})}


async def answers(box: Toolbox, finished: TurnFinished) -> list[Message]:
    """The client's tools."""
    found = []
    for call in finished.calls:
        result = await box.call(ToolCall(call.call_id, call.name, json.loads(call.arguments)))
        found.append({"role": "tool", "tool_call_id": call.call_id, "content": result.text})
    return found


async def settled(llm: AsyncLLM, is_so: Callable[[dict[str, float]], bool]) -> dict[str, float]:
    """The engine's figures, once they are so."""
    for _ in range(300):
        figures = await llm.ask(lambda session: session.engine.metrics())
        if is_so(figures):
            return figures
        await asyncio.sleep(0.01)
    raise AssertionError(f"the engine does not come to rest: {figures}")


def computed(figures: Mapping[str, float]) -> float:
    return sum(figures[name] for name in ("prefill_tokens", "returned_tokens", "recomputed_tokens"))


def test_a_follow_up_computes_the_new_messages_alone(service: EngineService, llm: AsyncLLM, box: Toolbox):
    async def conversation() -> None:
        first, usage = await ask(service, turn(QUESTION))
        assert first.finish_reason == "tool_calls" and [call.name for call in first.calls] == ["calculator"]
        assert service.conversations.num_held == 1 and llm.session.engine.scheduler.num_intercepted == 1
        messages = [*QUESTION, said(first), *await answers(box, first)]
        before = computed(await settled(llm, lambda figures: True))
        final, second = await ask(service, turn(messages))
        after = computed(await settled(llm, lambda figures: True))
        assert final.finish_reason == "stop" and "3367" in final.text
        num_known = usage.prompt_tokens + usage.completion_tokens
        assert num_known - 1 <= second.cached_tokens <= num_known < second.prompt_tokens
        assert after - before == second.prompt_tokens - second.cached_tokens, (
            "the tool's message, the end token at most"
        )
        assert second.recomputed_tokens == 0 and second.intercepted_s > 0
        # The answer is held too: the next question of the user is the only thing that is new.
        messages += [said(final), {"role": "user", "content": "What is 12 * 12?"}]
        _, third = await ask(service, turn(messages))
        assert third.cached_tokens >= second.prompt_tokens + second.completion_tokens - 1
        assert service.conversations.num_held == 1, "one conversation waits once"

    run(conversation())


def test_a_turn_whose_text_is_encoded_differently_goes_on_from_its_own_ids(service: EngineService):
    """The model is made to write what its tokenizer would not: every character a token of its own."""

    async def conversation() -> None:
        tokenizer = service.llm.session.tokenizer
        text = "The answer is known: hello."
        ids = [token_id for char in text for token_id in tokenizer.encode(char, False)]
        assert tokenizer.encode(text, False) != ids and tokenizer.decode(ids) == text
        events = await dictated(service, turn(QUESTION), ids)
        (odd,) = [event for event in events if isinstance(event, TurnFinished)]
        assert odd.text == text and odd.token_ids == (*ids, tokenizer.eos_id) and odd.finish_reason == "stop"
        messages = [*QUESTION, said(odd), {"role": "user", "content": "What is 2 + 2?"}]
        done = events[-1]
        assert isinstance(done, TurnDone)
        num_known = done.usage.prompt_tokens + len(odd.token_ids)
        _, second = await ask(service, turn(messages))
        assert second.cached_tokens >= num_known - 1 and second.recomputed_tokens == 0

    run(conversation())


def test_a_changed_history_goes_on_from_the_longest_known_beginning(service: EngineService, box: Toolbox):
    async def conversation() -> None:
        first, usage = await ask(service, turn(QUESTION))
        messages = [*QUESTION, said(first), *await answers(box, first)]
        final, _ = await ask(service, turn(messages))
        changed = [*messages, {**said(final), "content": "It is 3368."}, {"role": "user", "content": "Are you sure?"}]
        prompt = service._encode(turn(changed), service._tools_of(turn(changed)), ME)
        assert prompt.known is not None and len(prompt.known.ids) == usage.prompt_tokens + usage.completion_tokens
        assert "It is 3368." in service.detokenize(prompt.ids)
        _, third = await ask(service, turn(changed))
        assert third.cached_tokens >= usage.prompt_tokens // 16 * 16

    run(conversation())


def test_nobody_goes_on_from_anothers_conversation(service: EngineService, box: Toolbox):
    async def conversation() -> None:
        first, _ = await ask(service, turn(QUESTION))
        messages = [*QUESTION, said(first), *await answers(box, first)]
        _, usage = await ask(service, turn(messages), OTHER)
        assert usage.cached_tokens == 0 and service.conversations.num_held >= 1
        assert not service.has_prefix(turn(messages), OTHER) and service.has_prefix(turn(messages), ME)

    run(conversation())


def test_two_who_go_on_from_the_same_turn(service: EngineService, box: Toolbox):
    async def conversation() -> None:
        first, _ = await ask(service, turn(QUESTION))
        messages = [*QUESTION, said(first), *await answers(box, first)]
        both = await asyncio.gather(ask(service, turn(messages)), ask(service, turn(messages)))
        assert both[0][0].text == both[1][0].text and "3367" in both[0][0].text

    run(conversation())


def test_a_hold_ends_in_time_and_over_means_over(llm: AsyncLLM, box: Toolbox):
    async def conversation() -> None:
        hold = HoldOptions(ttl_s=0.2)
        service = EngineService(llm, ["shipped"], make_parser=lambda: make_parser("hermes"), hold=hold)
        before = (await settled(llm, lambda figures: True))["num_intercepted"]
        first, _ = await ask(service, turn(QUESTION))
        messages = [*QUESTION, said(first), *await answers(box, first)]
        await settled(llm, lambda figures: figures["num_intercepted"] == before)  # its time is up
        final, usage = await ask(service, turn(messages))
        assert "3367" in final.text and usage.cached_tokens > 0, "the prefix cache still has it"
        service = EngineService(llm, ["shipped"], make_parser=lambda: make_parser("hermes"))
        await ask(service, turn(QUESTION, hints=Hints(hold_ttl_s=0)))
        assert service.conversations.num_held == 0
        await settled(llm, lambda figures: figures["num_intercepted"] == before)

    run(conversation())


def test_only_so_many_contexts_wait(llm: AsyncLLM):
    async def conversation() -> None:
        service = EngineService(
            llm, ["shipped"], make_parser=lambda: make_parser("hermes"), hold=HoldOptions(max_held=2)
        )
        before = (await settled(llm, lambda figures: True))["num_intercepted"]
        for i in range(4):
            await ask(service, turn([{"role": "user", "content": f"What is {i} + 1?"}]))
        assert service.conversations.num_held == 2
        await settled(llm, lambda figures: figures["num_intercepted"] == before + 2)

    run(conversation())


def test_the_servers_tools_run_in_one_turn(llm: AsyncLLM, box: Toolbox):
    async def conversation() -> None:
        service = EngineService(llm, ["shipped"], tools=lambda: box, make_parser=lambda: make_parser("hermes"))
        events = [event async for event in await service.chat(turn(QUESTION, tools=[]), ME)]
        pieces = [event for event in events if isinstance(event, CallDelta)]
        assert json.loads("".join(piece.arguments for piece in pieces)) == {"expression": "37*91"}
        assert pieces[0].name == "calculator" and all(piece.by_server for piece in pieces) and len(pieces) > 3
        (answered,) = [event for event in events if isinstance(event, ToolAnswered)]
        assert answered.text == "3367" and answered.call_id == pieces[0].call_id and not answered.is_error
        (finished,) = [event for event in events if isinstance(event, TurnFinished)]
        assert finished.calls[0].result == "3367" and finished.text == "37 * 91 = 3367."
        assert "".join(event.text for event in events if isinstance(event, TextDelta)) == finished.text
        assert not (await ask(service, turn(QUESTION, tools=[], run_tools=())))[0].calls
        with pytest.raises(ServiceError, match="two tools are named"):
            await service.chat(turn(QUESTION), ME)

    run(conversation())


def test_a_clients_own_tool_of_the_name_of_a_servers(llm: AsyncLLM, box: Toolbox):
    """Whose it is, the turn says: here the server's own is left out."""

    async def conversation() -> None:
        service = EngineService(llm, ["shipped"], tools=lambda: box, make_parser=lambda: make_parser("hermes"))
        first, _ = await ask(service, turn(QUESTION, run_tools=()))
        assert first.finish_reason == "tool_calls" and [call.by_server for call in first.calls] == [False]
        final, _ = await ask(service, turn([*QUESTION, said(first), *await answers(box, first)], run_tools=()))
        assert "3367" in final.text

    run(conversation())


def test_completions_of_one_turn_wait_for_their_own_tools(llm: AsyncLLM, box: Toolbox):
    """n=2: what one completion waits for is not what the other does."""

    async def conversation() -> None:
        service = EngineService(llm, ["shipped"], tools=lambda: box, make_parser=lambda: make_parser("hermes"))
        made = TurnRun(service, replace(GREEDY, n=2), [1], box.select(None, [LOOKUP]), None)  # type: ignore[arg-type]  # no stream
        first, second = made._completions
        first.waiting = {"a"}
        assert made._end_if_answered(first) == []
        assert [event.index for event in made._end_if_answered(second) if isinstance(event, TurnFinished)] == [1]
        first.waiting.discard("a")
        assert [event.index for event in made._end_if_answered(first) if isinstance(event, TurnFinished)] == [0]

    run(conversation())


def test_prompt_logprobs_come_though_contexts_wait(service: EngineService):
    async def conversation() -> None:
        asked = turn(QUESTION, tools=[], params=replace(GREEDY, prompt_logprobs=1))
        events = [event async for event in await service.chat(asked, ME)]
        done = events[-1]
        assert isinstance(done, TurnDone) and done.prompt_logprobs is not None
        assert len(done.prompt_logprobs) == len(done.prompt_token_ids)

    run(conversation())


def test_so_many_calls_of_the_servers_tools_and_no_more(llm: AsyncLLM, box: Toolbox):
    """Calls are counted, not turns of calls: with a bound they come one by one."""

    async def conversation() -> None:
        service = EngineService(llm, ["shipped"], tools=lambda: box, make_parser=lambda: make_parser("hermes"))
        asked = [{"role": "user", "content": "What is 12 * 12 and what is 7 * 7?"}]
        for limit in (1, 2):
            events = [event async for event in await service.chat(turn(asked, tools=[], max_tool_calls=limit), ME)]
            assert sum(isinstance(event, ToolAnswered) for event in events) <= limit
        bound = replace(turn(QUESTION, tools=[], max_tool_calls=2), parallel_tool_calls=True)
        assert not _tool_choice(bound).parallel and _tool_choice(replace(bound, max_tool_calls=None)).parallel

    run(conversation())


def test_a_prewarmed_prompt_is_there_for_the_next_one(service: EngineService):
    async def conversation() -> None:
        messages = [{"role": "user", "content": "What is the capital of the country that has Lyon in it? " * 4}]
        warm = turn(messages, params=SamplingParams(temperature=0, max_tokens=1), is_prewarm=True)
        _, usage = await ask(service, warm)
        held = service.conversations.num_held
        _, after = await ask(service, turn(messages, params=SamplingParams(temperature=0, max_tokens=1)))
        assert usage.cached_tokens < 32 < after.cached_tokens and after.prompt_tokens - after.cached_tokens <= 16
        assert held == 0, "nothing waits for an answer to it"

    run(conversation())


def test_the_servers_and_the_clients_tools_in_one_turn(llm: AsyncLLM, box: Toolbox):
    """Both are called side by side: the server's answer is kept until the client's comes."""

    @tool
    def lookup(entity: str, attribute: str) -> str:
        """Looks up an attribute of an entity.

        entity: whose
        attribute: which
        """
        raise AssertionError("the client answers it")

    async def conversation() -> None:
        service = EngineService(llm, ["shipped"], tools=lambda: box, make_parser=lambda: make_parser("hermes"))
        written = (
            '<tool_call>\n{"name": "calculator", "arguments": {"expression": "6*7"}}\n</tool_call>\n'
            '<tool_call>\n{"name": "lookup", "arguments": {"entity": "x", "attribute": "y"}}\n</tool_call>'
        )
        asked = turn(QUESTION, tools=[lookup.schema])
        first = await dictated(service, asked, service.llm.session.tokenizer.encode(written, False))
        (finished,) = [event for event in first if isinstance(event, TurnFinished)]
        assert finished.finish_reason == "tool_calls"
        assert [(call.name, call.by_server, call.result) for call in finished.calls] == [
            ("calculator", True, "42"),
            ("lookup", False, None),
        ]
        own = [call for call in finished.calls if not call.by_server]
        back = said(replace(finished, calls=tuple(own)))
        messages = [*QUESTION, back, {"role": "tool", "tool_call_id": own[0].call_id, "content": "z"}]
        asked = turn(messages, tools=[lookup.schema])
        prompt = service._encode(asked, service._tools_of(asked), ME)
        assert prompt.known is not None and prompt.known.request_id is not None
        text = service.detokenize(prompt.ids)
        assert text.index("\n42\n") < text.index("\nz\n"), "both answers, in the order of the calls"
        _, usage = await ask(service, asked)
        assert usage.cached_tokens >= len(prompt.known.ids) - 1

    run(conversation())


async def dictated(service: EngineService, asked: ChatTurn, ids: Sequence[int]) -> list[TurnEvent]:
    """The events of a turn in which the model draws these ids and then ends it."""
    while await service.llm.ask(lambda session: session.engine.num_in_flight):
        await asyncio.sleep(0.01)
    sample = service.llm.session.engine.runner.collect
    left = [*ids, service.llm.session.tokenizer.eos_id]

    def collect() -> Any:
        result = sample()
        return replace(result, token_ids=tuple(left.pop(0) if left else token for token in result.token_ids))

    service.llm.session.engine.runner.collect = collect
    depth, service.llm.session.engine.pipeline_depth = service.llm.session.engine.pipeline_depth, 0
    try:
        return [event async for event in await service.chat(asked, ME)]
    finally:
        service.llm.session.engine.pipeline_depth = depth
        service.llm.session.engine.runner.collect = sample


def test_a_tool_can_be_required_and_its_arguments_match_its_schema(service: EngineService):
    """Whatever the model would say: at a high temperature, too."""
    schema = {
        "type": "object",
        "properties": {"unit": {"enum": ["km", "m"]}, "value": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["unit", "value"],
        "additionalProperties": False,
    }
    measure = {"type": "function", "function": {"name": "measure", "description": "Measures.", "parameters": schema}}
    tools = [CALCULATOR.schema, measure]

    async def turns() -> None:
        hello = [{"role": "user", "content": "Hello"}]
        for seed in range(4):
            params = SamplingParams(temperature=1.5, seed=seed, max_tokens=200)
            asked = turn(hello, tools=tools, tool_choice="measure", params=params, parallel_tool_calls=False)
            finished, _ = await ask(service, asked)
            (call,) = finished.calls
            arguments = json.loads(call.arguments)
            assert call.name == "measure" and arguments["unit"] in ("km", "m") and 0 <= arguments["value"] <= 99
            finished, _ = await ask(service, turn(hello, tools=tools, tool_choice="required", params=params))
            assert finished.finish_reason == "tool_calls" and finished.calls
        finished, _ = await ask(service, turn(QUESTION, tool_choice="none"))
        assert not finished.calls
        number = {"type": "integer", "minimum": 0, "maximum": 999}
        answer = {"type": "object", "properties": {"sum": number}, "required": ["sum"], "additionalProperties": False}
        params = SamplingParams(
            temperature=1.0, seed=1, max_tokens=200, structured=StructuredOutput(json_schema=answer)
        )
        finished, _ = await ask(service, turn(hello, tools=[], params=params))
        assert type(json.loads(finished.text)["sum"]) is int
        bad = SamplingParams(structured=StructuredOutput(json_schema={"type": "nothing"}))
        with pytest.raises(ServiceError) as error:
            await service.chat(turn(hello, tools=[], params=bad), ME)
        assert error.value.status == 400 and error.value.param

    run(turns())


def test_closing_a_turn_early_frees_everything(service: EngineService, llm: AsyncLLM):
    async def conversation() -> None:
        before = await settled(llm, lambda figures: figures["num_running"] == 0)
        events: AsyncIterator[TurnEvent] = await service.chat(
            turn(QUESTION, params=replace(GREEDY, ignore_eos=True, max_tokens=800)), ME
        )
        async for event in events:
            if isinstance(event, TextDelta):
                break
        await events.aclose()
        after = await settled(llm, lambda figures: figures["num_running"] + figures["num_waiting"] == 0)
        assert after["num_intercepted"] == before["num_intercepted"] and after["finished_abort"] >= 1

    run(conversation())


def test_what_a_turn_cannot_be(service: EngineService):
    async def refusals() -> None:
        for asked, param in (
            (turn([{"role": "user", "content": "x " * 5000}]), "prompt"),
            (turn([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]), "messages"),
            (turn([]), "messages"),
            (turn(QUESTION, tool_choice="nobody"), "tool_choice"),
            (turn(QUESTION, tools=[], tool_choice="required"), "tool_choice"),
            (turn(QUESTION, tools=[CALCULATOR.schema] * 2), "tools"),
            (turn(QUESTION, run_tools=["nobody"]), "tools"),
            (PromptTurn("r", [10**9], GREEDY), "prompt"),
            (PromptTurn("r", [], GREEDY), "prompt"),
        ):
            start = service.chat if isinstance(asked, ChatTurn) else service.complete
            with pytest.raises(ServiceError) as error:
                await start(asked, ME)  # type: ignore[arg-type]
            assert (error.value.status, error.value.param) == (400, param)
        service.is_draining = True
        with pytest.raises(ServiceError) as error:
            await service.chat(turn(QUESTION), ME)
        assert error.value.status == 503

    run(refusals())


def test_prompts_as_they_stand(service: EngineService):
    async def completions() -> None:
        ids = service.tokenize("Hello")
        for prompt in ("Hello", ids):
            params = SamplingParams(temperature=0, max_tokens=4, n=2, logprobs=1, prompt_logprobs=0)
            events = [event async for event in await service.complete(PromptTurn("p", prompt, params), ME)]
            finished = [event for event in events if isinstance(event, TurnFinished)]
            assert [event.index for event in finished] == [0, 1] and finished[0].token_ids == finished[1].token_ids
            assert finished[0].logprobs is not None and len(finished[0].logprobs) == 4
            done = events[-1]
            assert isinstance(done, TurnDone) and done.prompt_token_ids == tuple(ids)
            assert done.usage.completion_tokens == 8 and done.prompt_logprobs is not None
            assert len(done.prompt_logprobs) == len(ids)

    run(completions())


def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded(
    service: EngineService, monkeypatch: pytest.MonkeyPatch
):
    service._tokenizer.encode("warm")
    monkeypatch.setattr(service._tokenizer, "encode", None)
    monkeypatch.setattr(service._tokenizer, "encode_chat", None)
    text = "a" * (MAX_LEN * service._tokenizer.max_token_chars)
    for begun in (
        lambda: service.chat(turn([{"role": "user", "content": text}]), ME),
        lambda: service.complete(PromptTurn("x", text, GREEDY), ME),
    ):
        with pytest.raises(ServiceError, match=f"at least {MAX_LEN} ids: expected at most {MAX_LEN - 1}"):
            run(begun())
