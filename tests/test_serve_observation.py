"""Turns and steps as observers see them: counts, spans, log lines."""

import asyncio
import io
import json
import logging
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from jaxcept.scheduler.params import SamplingParams
from jaxcept_serve.logs import AddRequestId, JsonFormatter, RequestContext, TextFormatter, log_config, request_id
from jaxcept_serve.observation import Observation
from jaxcept_serve.turns import (
    Caller,
    ChatTurn,
    Service,
    ServiceError,
    TextDelta,
    ToolAnswered,
    TurnDone,
    TurnEvent,
    TurnFinished,
    Usage,
)
from tests.fakes import Rig, scripted

TURN = ChatTurn("r", [{"role": "user", "content": "hi"}], SamplingParams())
USAGE = Usage(prompt_tokens=10, completion_tokens=4, cached_tokens=8, recomputed_tokens=1)


class OneTurn:
    """A service that answers every chat with the same events, or refuses."""

    model_names = ("m",)

    def __init__(self, refuses: bool = False) -> None:
        self.refuses = refuses
        self.closed = 0

    def metrics(self) -> dict[str, float]:
        return {"held_conversations": 3.0}

    async def chat(self, turn: ChatTurn, caller: Caller) -> AsyncIterator[TurnEvent]:
        if self.refuses:
            raise ServiceError(429, "too much")
        return self._events()

    async def _events(self) -> AsyncIterator[TurnEvent]:
        try:
            yield TextDelta(0, "Hello")
            yield ToolAnswered(0, "c", "add", "3", False, 0.25)
            yield TurnFinished(0, "stop", None, "Hello", (), (1,))
            yield TurnDone(USAGE)
        finally:
            self.closed += 1


async def answer(service: Service, events: int = 100) -> list[TurnEvent]:
    """The first events of one turn, which is closed then."""
    seen = []
    stream = await service.chat(TURN, Caller())
    async for each in stream:
        seen.append(each)
        if len(seen) == events:
            break
    await cast(Any, stream).aclose()
    return seen


def counted(observation: Observation, name: str) -> dict[tuple[str, ...], float]:
    """The samples of one name, by the values of their own labels."""
    found = {}
    for family in observation.telemetry.collect():
        for sample in family.samples:
            if sample.name == name:
                labels = {key: value for key, value in sample.labels.items() if key not in ("model_name", "engine")}
                found[tuple(labels.values())] = sample.value
    return found


def test_a_turn_is_counted_and_its_events_are_untouched(caplog: pytest.LogCaptureFixture):
    observation, inner = Observation("m", 64), OneTurn()
    service = observation.observe(cast(Service, inner))
    with caplog.at_level(logging.INFO, "jaxcept_serve.observation"):
        seen = asyncio.run(answer(service))
    assert [type(each) for each in seen] == [TextDelta, ToolAnswered, TurnFinished, TurnDone]
    assert service.model_names == ("m",) and inner.closed == 1
    assert counted(observation, "vllm:request_success_total")["stop",] == 1
    assert counted(observation, "jaxcept:turn_tokens_total")["cached",] == 8
    assert counted(observation, "jaxcept:tool_calls_total") == {("add", "ok"): 1}
    assert counted(observation, "jaxcept:held_conversations") == {(): 3.0}
    (record,) = caplog.records
    assert record.getMessage() == "turn: stop" and record.__dict__["request_id"] == "r"
    assert record.__dict__["cached_tokens"] == 8


def test_a_turn_that_its_client_leaves_is_aborted_and_a_refused_one_counted():
    observation, inner = Observation("m", 64), OneTurn()
    asyncio.run(answer(observation.observe(cast(Service, inner)), events=1))
    assert inner.closed == 1 and counted(observation, "vllm:request_success_total")["abort",] == 1
    with pytest.raises(ServiceError, match="too much"):
        asyncio.run(answer(observation.observe(cast(Service, OneTurn(refuses=True)))))
    assert counted(observation, "jaxcept:refused_requests_total") == {("429",): 1}


def test_an_observer_that_fails_does_not_take_the_engine_with_it(caplog: pytest.LogCaptureFixture):
    rig, observation = Rig(), Observation("m", 64)
    observation.lanes._meet = None  # type: ignore[method-assign, assignment]
    rig.add("r", range(6), max_tokens=3)
    while rig.engine.has_work:
        before = len(rig.events)
        rig.step()
        observation.on_step(rig.engine, rig.events[before:], rig.clock.now())
    assert counted(observation, "vllm:generation_tokens_total") == {(): 3}
    assert len([record for record in caplog.records if "observes no more" in record.getMessage()]) == 1


def test_interceptions_are_spans_under_the_request_and_its_trace():
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from jaxcept_serve.tracing import Tracing

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    rig, tracing = Rig(), Tracing(provider)
    parent = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    request = tracing.begin("r", "chat", "m", parent)
    seq_id = rig.add("r", range(6), scripted(2, 1), max_tokens=6)
    for answered in (True, False):
        while rig.engine.has_work:
            before = len(rig.events)
            rig.step()
            tracing.on_step(rig.engine, rig.events[before:], rig.clock.now())
        rig.clock.advance(5.0)
        if answered:
            rig.engine.resume(seq_id, [7, 8])
        else:
            rig.engine.abort("r")
            tracing.on_step(rig.engine, rig.engine.step(), rig.clock.now())
    tracing.end(request, ["stop"], USAGE, None)
    first, second, whole = exporter.get_finished_spans()
    assert whole.name == "chat m" and whole.attributes["gen_ai.usage.input_tokens"] == 10
    assert f"{whole.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    for span in (first, second):
        assert span.parent.span_id == whole.context.span_id and span.name == "interception scripted"
    assert first.attributes["jaxcept.residency"] == "preserved" and first.attributes["jaxcept.returned_tokens"] == 2
    assert first.attributes["jaxcept.recomputed_tokens"] == 0 and first.status.is_ok
    assert (first.end_time - first.start_time) / 1e9 == pytest.approx(
        first.attributes["jaxcept.tool_s"] + first.attributes["jaxcept.queued_s"], abs=1e-6
    )
    assert second.attributes["jaxcept.outcome"] == "aborted" and not second.status.is_ok


def test_opentelemetry_is_loaded_where_it_is_asked_for_alone():
    code = "import sys, jaxcept_serve.observation; sys.exit('opentelemetry' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def logged(formatter: logging.Formatter, message: str, **extra: Any) -> str:
    """One line through a handler as log_config makes it."""
    stream, logger = io.StringIO(), logging.Logger("test")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    handler.addFilter(AddRequestId())
    logger.addHandler(handler)
    logger.info(message, extra=extra)
    return stream.getvalue()


def test_a_log_line_is_one_line_that_tells_its_request():
    token = request_id.set("req-1")
    try:
        line = json.loads(logged(JsonFormatter(), "first\nsecond", num_tokens=3))
        assert (line["message"], line["request_id"], line["num_tokens"]) == ("first\nsecond", "req-1", 3)
        assert line["level"] == "info" and line["time"].endswith("Z")
        text = logged(TextFormatter(), "first\nsecond", num_tokens=3)
        assert text.endswith("info    test: first\\nsecond [req-1] num_tokens=3\n")
    finally:
        request_id.reset(token)
    with pytest.raises(ValueError, match="expected text or json"):
        log_config("xml")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="log level 'loud'"):
        log_config("json", "loud")


def test_every_request_has_an_id_and_an_access_line(caplog: pytest.LogCaptureFixture):
    async def echo(request: Request) -> PlainTextResponse:
        return PlainTextResponse(f"{request.headers['x-request-id']} {request_id.get()}")

    client = TestClient(RequestContext(Starlette(routes=[Route("/echo", echo)])))
    with caplog.at_level(logging.INFO, "jaxcept_serve.access"):
        assert client.get("/echo", headers={"x-request-id": "mine-1"}).text == "mine-1 mine-1"
        given, seen = client.get("/echo", headers={"x-request-id": "bad id\u00e9".encode("latin-1")}).text.split(" ")
    assert given == seen and len(given) == 32
    first = caplog.records[0]
    assert first.getMessage() == "GET /echo" and first.__dict__["status"] == 200
