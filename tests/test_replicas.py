"""Several engines behind one service: failover, and what clients see of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from typing import Any

import pytest

from jaxcept.config import shipped_model
from jaxcept.scheduler.params import SamplingParams
from jaxcept.text.folder import read_text_files
from jaxcept.text.tokenizer import Tokenizer
from jaxcept_serve.replicas import Described, EngineLostError, ReplicaService, Turn
from jaxcept_serve.turns import (
    CallDelta,
    Caller,
    ChatTurn,
    FullCall,
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

GREEDY = SamplingParams(temperature=0)
DONE = TurnDone(Usage(1, 2, 0))
TOLD = Described("first", 512, (), {"generated_tokens": 3.0})


class FakeEngine:
    """Says its script; dies before the event whose number is in `deaths`, one for each turn that it starts."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.deaths: list[int] = []
        self.refusal: ServiceError | None = None
        self.num_started = self.num_closed = 0
        self.word = "yes"
        self.answers = False
        self.error: ServiceError | None = None  # instead of its second event
        self.stalls = False  # before its second event

    async def start(self, turn: Turn, caller: Caller) -> AsyncGenerator[TurnEvent, None]:
        self.num_started += 1
        if self.refusal is not None:
            raise self.refusal
        death = self.deaths.pop(0) if self.deaths else None
        if death == -1:
            raise EngineLostError(self.name)
        return self._events(death)

    async def _events(self, death: int | None) -> AsyncGenerator[TurnEvent, None]:
        try:
            for i, event in enumerate(self.script()):
                if i == death:
                    raise EngineLostError(self.name)
                if i == 1 and self.error is not None:
                    raise self.error
                if i == 1 and self.stalls:
                    await asyncio.Event().wait()
                yield event
        finally:
            self.num_closed += 1

    def script(self) -> list[TurnEvent]:
        call_id = f"call_{self.name}_{self.num_started}"
        answered = [ToolAnswered(0, call_id, "f", "1", False, 0.1)] if self.answers else []
        call = FullCall(call_id, "f", "{}")
        return [
            TextDelta(0, self.word, (1,)),
            CallDelta(0, 0, call_id, "f", "{}"),
            *answered,
            TextDelta(0, "", (2,)),
            TurnFinished(0, "tool_calls", None, self.word, (call,), (1, 2)),
            DONE,
        ]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(read_text_files(shipped_model()))


@pytest.fixture
def engines() -> list[FakeEngine]:
    return [FakeEngine("a"), FakeEngine("b")]


@pytest.fixture
def service(engines: list[FakeEngine], tokenizer: Tokenizer) -> Iterator[ReplicaService]:
    made = ReplicaService(engines, [TOLD, TOLD], tokenizer, ["m"])
    yield made
    assert not any(made.router.loads.values())
    assert all(engine.num_closed <= engine.num_started for engine in engines)
    made.close()


def chat(service: ReplicaService, *texts: str, params: SamplingParams = GREEDY, **hints: Any) -> list[TurnEvent]:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return run(service, ChatTurn("r", messages, params, hints=Hints(**hints)))


def run(service: ReplicaService, turn: Turn) -> list[TurnEvent]:
    async def collect() -> list[TurnEvent]:
        start = service.chat(turn, Caller()) if isinstance(turn, ChatTurn) else service.complete(turn, Caller())
        return [event async for event in await start]

    return asyncio.run(collect())


def test_a_turn_passes_through(service: ReplicaService, engines: list[FakeEngine]) -> None:
    events = chat(service, "hi")
    assert events == engines[0].script()
    assert chat(service, "hi", "x", params=SamplingParams(n=2))[-1] == DONE
    assert engines[0].num_started == 2 and not engines[1].num_started


def test_an_engine_that_is_gone_is_passed_over(
    service: ReplicaService, engines: list[FakeEngine], caplog: pytest.LogCaptureFixture
) -> None:
    engines[0].deaths = [-1]
    assert chat(service, "hi") == engines[1].script()
    assert service.router.up == ("b",) and service.is_ready
    assert "a died, with the contexts of 0 turns" in caplog.text


@pytest.mark.parametrize("death", [0, 1, 2, 3, 4])
def test_a_turn_begins_anew_elsewhere_and_its_client_sees_nothing_of_it(
    service: ReplicaService, engines: list[FakeEngine], death: int, caplog: pytest.LogCaptureFixture
) -> None:
    engines[0].deaths = [death]
    events = chat(service, "hi")
    call_ids = {event.call_id for event in events if isinstance(event, CallDelta)}
    call_ids |= {call.call_id for event in events if isinstance(event, TurnFinished) for call in event.calls}
    assert len(call_ids) == 1  # the ids that were sent stay, whoever writes on
    assert [type(event) for event in events] == [type(event) for event in engines[0].script()]
    assert "r: a died: begun anew on b" in caplog.text


def test_engines_may_die_one_after_the_other(tokenizer: Tokenizer) -> None:
    engines = [FakeEngine(name) for name in "abc"]
    for engine, death in zip(engines, (2, 1, 4), strict=True):
        engine.deaths = [death]
    service = ReplicaService(engines, [TOLD] * 3, tokenizer, ["m"])
    with pytest.raises(ServiceError, match="no engine is there") as caught:
        chat(service, "hi")
    assert caught.value.status == 503 and not service.is_ready and not any(service.router.loads.values())
    service.report("b", replace(TOLD, birth="second"))
    assert chat(service, "hi") == engines[1].script()
    service.close()


@pytest.mark.parametrize("why", ["draws", "acts", "differs"])
def test_what_cannot_be_said_again_is_an_error_that_clients_retry(
    service: ReplicaService, engines: list[FakeEngine], why: str
) -> None:
    engines[0].deaths = [3]
    if why == "acts":
        engines[0].answers = True
    if why == "differs":
        engines[1].word = "no"
    with pytest.raises(ServiceError, match="ask again") as caught:
        chat(service, "hi", params=SamplingParams(temperature=1 if why == "draws" else 0))
    assert caught.value.status == 503 and caught.value.retry_after_s
    assert engines[1].num_started == (why == "differs")


def test_a_seed_makes_a_draw_repeatable(service: ReplicaService, engines: list[FakeEngine]) -> None:
    engines[0].deaths = [3]
    assert chat(service, "hi", params=SamplingParams(temperature=1, seed=7))[-1] == DONE


def test_conversations_of_a_dead_engine_are_named_when_they_come_back(
    service: ReplicaService, engines: list[FakeEngine], caplog: pytest.LogCaptureFixture
) -> None:
    chat(service, "hi", conversation="mine")
    chat(service, "elsewhere")
    assert engines[0].num_started == 2
    engines[0].deaths = [-1]
    caplog.set_level(logging.WARNING)
    chat(service, "unknown")
    assert "with the contexts of 3 turns" in caplog.text  # one of them by its name as well
    chat(service, "hi", "rewritten by the client", "more", conversation="mine")
    assert "r: its conversation was on a, which died: recomputed on b" in caplog.text


def test_an_engine_that_was_replaced_unnoticed_has_lost_its_contexts(
    service: ReplicaService, caplog: pytest.LogCaptureFixture
) -> None:
    chat(service, "hi", conversation="mine")
    service.report("a", replace(TOLD, birth="second"))
    assert service.is_ready and service.router.up == ("a", "b")
    assert "a died, with the contexts of 2 turns" in caplog.text
    service.report("a", replace(TOLD, birth="second", figures={"generated_tokens": 5.0}))
    assert service.metrics() == {"generated_tokens": 8.0, "num_engines": 2.0}


def begin(service: ReplicaService) -> Any:
    return service.chat(ChatTurn("r", [{"role": "user", "content": "hi"}], GREEDY), Caller())


def test_a_successor_is_not_blamed_for_a_death_that_is_heard_of_late(
    service: ReplicaService, engines: list[FakeEngine]
) -> None:
    engines[0].deaths = [3]

    async def read_slowly() -> list[TurnEvent]:
        events = await begin(service)
        first = await anext(events)
        service.report("a", replace(TOLD, birth="second"))
        assert service.is_ready and service.router.up == ("a", "b")
        return [first, *[event async for event in events]]

    assert asyncio.run(read_slowly())[-1] == DONE
    assert service.router.up == ("a", "b")


def test_an_engine_that_was_out_of_reach_for_a_moment_comes_back(
    service: ReplicaService, engines: list[FakeEngine], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    engines[0].deaths = [-1]
    chat(service, "hi")
    assert service.is_ready and service.router.up == ("b",)
    service.report("a", TOLD)
    assert service.is_ready and service.router.up == ("a", "b")
    assert "a answers again" in caplog.text


def test_what_an_engine_said_before_it_died_does_not_bring_it_back(
    service: ReplicaService, engines: list[FakeEngine]
) -> None:
    engines[0].deaths = [3]

    async def die() -> None:
        events = await begin(service)
        await anext(events)
        service.report("a", TOLD)
        service.report("b", replace(TOLD, figures={"generated_tokens": 5.0}))
        assert [event async for event in events][-1] == DONE

    asyncio.run(die())
    assert service.metrics() == {"generated_tokens": 5.0, "num_engines": 1.0} and service.router.up == ("b",)


def test_a_turn_that_fails_while_it_begins_anew_leaves_no_load_behind(
    service: ReplicaService, engines: list[FakeEngine]
) -> None:
    engines[0].deaths = [3]
    engines[1].error = ServiceError(500, "no")
    with pytest.raises(ServiceError, match="no"):
        chat(service, "hi")
    assert service.router.loads == {"a": 0, "b": 0}


def test_a_client_that_leaves_while_its_turn_begins_anew_leaves_no_load_behind(
    service: ReplicaService, engines: list[FakeEngine]
) -> None:
    engines[0].deaths = [3]
    engines[1].stalls = True

    async def leave() -> None:
        events = await begin(service)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                while True:
                    await anext(events)
        await events.aclose()

    asyncio.run(leave())
    assert service.router.loads == {"a": 0, "b": 0} and engines[1].num_closed == 1


def test_refusals_are_the_clients(service: ReplicaService, engines: list[FakeEngine]) -> None:
    engines[0].refusal = ServiceError(400, "temperature", param="temperature")
    with pytest.raises(ServiceError, match="temperature"):
        chat(service, "hi")
    assert service.router.up == ("a", "b") and not engines[1].num_started


def test_a_client_that_leaves_ends_its_turn(service: ReplicaService, engines: list[FakeEngine]) -> None:
    async def leave() -> None:
        events: Any = await service.chat(ChatTurn("r", [{"role": "user", "content": "hi"}], GREEDY), Caller())
        await anext(events)
        assert service.router.loads == {"a": 1, "b": 0}
        await events.aclose()

    asyncio.run(leave())
    assert engines[0].num_closed == 1


def test_a_client_that_leaves_before_the_first_event_leaves_no_load_behind(service: ReplicaService) -> None:
    async def leave() -> None:
        events: Any = await service.chat(ChatTurn("r", [{"role": "user", "content": "hi"}], GREEDY), Caller())
        await events.aclose()
        await events.aclose()

    asyncio.run(leave())
    assert service.router.loads == {"a": 0, "b": 0}


def test_prompts_and_text_need_no_engine_of_their_own(service: ReplicaService, tokenizer: Tokenizer) -> None:
    assert run(service, PromptTurn("r", "The", GREEDY))[-1] == DONE
    assert service.detokenize(service.tokenize("hello")) == "hello"
    with pytest.raises(ServiceError, match="expected 0 to"):
        service.detokenize([10**9])
    turn = ChatTurn("r", [{"role": "user", "content": "hi"}], GREEDY)
    assert service.count_tokens(turn) == len(tokenizer.encode_chat([{"role": "user", "content": "hi"}], None, True))
    assert service.max_model_len == 512 and service.tokenizer_info()["model_max_length"] == 512
    assert not service.has_prefix(turn, Caller())
    chat(service, "hi")
    follow = replace(turn, messages=[*turn.messages, {"role": "assistant", "content": "yes"}])
    assert not service.has_prefix(follow, Caller("other", "salt"))


def test_a_server_that_shuts_down_takes_nothing(service: ReplicaService) -> None:
    service.is_draining = True
    with pytest.raises(ServiceError, match="shutting down"):
        chat(service, "hi")
