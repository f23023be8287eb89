"""A server for the page: a fake device under the real scheduler, in real time, and a chat that answers by rote."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Sequence
from typing import cast

import uvicorn

from jaxcept.clock import MonotonicClock
from jaxcept.engine import Engine
from jaxcept.metrics import Ledger
from jaxcept.scheduler.config import SchedulerConfig
from jaxcept.scheduler.events import Event, Intercepted
from jaxcept.scheduler.params import InterceptParams, SamplingParams, ScriptedTrigger
from jaxcept.scheduler.policies.base import PolicyBase
from jaxcept.scheduler.policy import BatchView, InterceptedView, Placement, Traits
from jaxcept.scheduler.request import Request as EngineRequest
from jaxcept.scheduler.scheduler import Scheduler
from jaxcept_serve.api import Api
from jaxcept_serve.app import create_app
from jaxcept_serve.lanes import Lanes
from jaxcept_serve.limits import ServerOptions
from jaxcept_serve.page import live_routes
from jaxcept_serve.telemetry import Telemetry
from jaxcept_serve.turns import (
    CallDelta,
    Caller,
    ChatTurn,
    FullCall,
    Service,
    TextDelta,
    ToolAnswered,
    TurnDone,
    TurnEvent,
    TurnFinished,
    Usage,
)
from tests.fakes import FakeRunner

TOOLS = ("calculator", "lookup", "convert", "search")


class Thirds(PolicyBase):
    """A third of the contexts stays on the device, a third goes to the host, a third is given up."""

    def __init__(self) -> None:
        super().__init__("thirds", Traits())

    def place(self, intercepted: Sequence[InterceptedView], batch: BatchView) -> Sequence[Placement]:
        everything = [(Placement(view.num_blocks), Placement(0, view.num_blocks), Placement(0)) for view in intercepted]
        return [choice[view.seq_id % 3] for choice, view in zip(everything, intercepted, strict=True)]


class FakeTraffic:
    """Sequences that come, call tools and go, on a thread of its own."""

    def __init__(self, num_seqs: int, seed: int = 0) -> None:
        config = SchedulerConfig(num_blocks=num_seqs * 3, block_size=8, max_num_seqs=max(4, num_seqs // 3),
                                 max_num_batched_tokens=256, max_model_len=256, num_host_blocks=num_seqs)  # fmt: skip
        self.scheduler = Scheduler(config, Thirds())
        runner = FakeRunner(config.num_blocks, config.block_size, config.max_num_seqs)
        self.engine = Engine(self.scheduler, runner, MonotonicClock(), Ledger(4096), 0)
        self.telemetry, self.lanes = Telemetry("fake", 256), Lanes()
        self._num_seqs, self._random, self._count = num_seqs, random.Random(seed), 0
        self._answers: list[tuple[float, int]] = []  # (when the tool answers, seq_id)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> FakeTraffic:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self._thread.join(10)

    def _run(self) -> None:
        while not self._stopped.wait(0.015):
            if self.scheduler.num_unfinished < self._num_seqs and self._random.random() < 0.5:
                self._add()
            now = self.engine.clock.now()
            due = [seq_id for at, seq_id in self._answers if at <= now and seq_id in self.scheduler.sequences]
            self._answers = [entry for entry in self._answers if entry[0] > now]
            for seq_id in due:
                self.engine.resume(seq_id, [self._random.randrange(200) for _ in range(6)])
            events = self.engine.step()
            self._plan_answers(events)
            now = self.engine.clock.now()
            self.telemetry.on_step(self.engine, events, now)
            self.lanes.on_step(self.engine, events, now)

    def _add(self) -> None:
        rng = self._random
        self._count += 1
        script = tuple(ScriptedTrigger(rng.randint(6, 30), tool=rng.choice(TOOLS)) for _ in range(rng.randint(1, 4)))
        prompt = tuple(rng.randrange(200) for _ in range(rng.randint(10, 60)))
        request = EngineRequest(str(self._count), prompt, SamplingParams(max_tokens=rng.randint(40, 110)),
                                InterceptParams(script=script))  # fmt: skip
        self.engine.add(request)

    def _plan_answers(self, events: list[Event]) -> None:
        for each in events:
            if isinstance(each, Intercepted):
                self._answers.append((each.at + self._random.expovariate(0.7), each.seq_id))


class RoteService:
    """As much of a service as the page asks for: it calls a tool of the server's, and answers by rote."""

    model_names = ("fake",)
    max_model_len = 256
    is_alive = is_ready = True

    def metrics(self) -> dict[str, float]:
        return {}

    async def chat(self, turn: ChatTurn, caller: Caller) -> AsyncIterator[TurnEvent]:
        return self._events(turn)

    async def _events(self, turn: ChatTurn) -> AsyncIterator[TurnEvent]:
        arguments = '{"expression": "37 * 91"}'
        yield CallDelta(0, 0, "call_1", "calculator", arguments, by_server=True)
        await asyncio.sleep(0.05)
        yield ToolAnswered(0, "call_1", "calculator", "3367", False, 0.05)
        words = ("37 * 91", " is", " 3367", f". <b>turn {len(turn.messages)}</b>")
        for word in words:
            yield TextDelta(0, word)
        call = FullCall("call_1", "calculator", arguments, by_server=True, result="3367")
        yield TurnFinished(0, "stop", None, "".join(words), (call,), ())
        yield TurnDone(Usage(prompt_tokens=41, completion_tokens=9, cached_tokens=32))


class PageServer:
    """The page on a free port of the loopback; `url` is where."""

    def __init__(self, traffic: FakeTraffic, options: ServerOptions | None = None) -> None:
        live = live_routes(traffic.lanes, lambda: traffic.telemetry.snapshot, "thirds")
        app = create_app(cast(Service, RoteService()), options, extra_routes=[live])
        self.api: Api = app.state.api
        config = uvicorn.Config(app, port=0, log_level="warning", lifespan="off", timeout_graceful_shutdown=2)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self.url = ""

    def __enter__(self) -> PageServer:
        self._thread.start()
        while not self._server.started:
            self._thread.join(0.02)
            assert self._thread.is_alive(), "the server did not start"
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        return self

    def __exit__(self, *error: object) -> None:
        self.api.gate.is_draining = True
        self._server.should_exit = True
        self._thread.join(10)


if __name__ == "__main__":
    import sys

    with FakeTraffic(int(sys.argv[1])) as traffic, PageServer(traffic) as server:
        print(server.url, flush=True)
        threading.Event().wait(float(sys.argv[2]))
