"""The whole server in this process: the engine with the shipped model, on a socket, as `jaxcept serve` builds it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx

from jaxcept.config import EngineConfig
from jaxcept.session import Session
from jaxcept.tools.guard import ToolLimits
from jaxcept_serve.limits import ApiKey, ServerOptions
from jaxcept_serve.logs import RequestContext
from jaxcept_serve.protocol import guarded_protocol
from jaxcept_serve.server import Running, ServeConfig, ToolFlags
from jaxcept_serve.service import HoldOptions
from tests.live_server import serving
from tests.sizes import SHIPPED

COSTS = {
    "name": "test", "device": "cpu", "model": "shipped", "dtype": "float32", "overhead_s": 0.001, "floor_s": 0.0,
    "token_s": 1e-4, "context_token_s": 0.0, "pair_s": 0.0, "saturation_tokens": 32, "kv_token_bytes": 1024,
    "swap_out_latency_s": 0.0, "swap_out_token_s": 1e-6, "swap_in_latency_s": 0.0, "swap_in_token_s": 1e-6,
}  # fmt: skip
KEYS = (ApiKey("me", "mine"), ApiKey("other", "theirs"))
GOOD = {
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "max_tokens": 6,
    "temperature": 0,
    "tool_choice": "none",
    "jaxcept": {"hold_ttl_s": 0},
}


@dataclass
class LiveEngine:
    """A running server. `bystander` is another client, who asks the same good question all the time."""

    url: str
    running: Running
    bystander: Bystander = field(init=False)

    def __post_init__(self) -> None:
        self.client = httpx.Client(base_url=self.url, headers={"authorization": "Bearer mine"}, timeout=30)
        self.bystander = Bystander(self.url)

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.url.rsplit(":", 1)[1])

    def ask(self, question: Callable[[Session], Any]) -> Any:
        """What the engine's thread answers."""
        return asyncio.run(self.running.llm.ask(question))

    def settled(self, timeout_s: float = 15.0) -> dict[str, float]:
        """The engine's figures, once nothing runs but the bystander's request."""
        end = time.monotonic() + timeout_s
        while True:
            figures = dict(self.ask(lambda session: session.engine.metrics()))
            if figures["num_running"] + figures["num_waiting"] <= 1 or time.monotonic() > end:
                return figures
            time.sleep(0.02)


class Bystander:
    """Another client. `seconds` are the times of its answers, `wrong` what was not as it had to be."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.seconds: list[float] = []
        self.wrong: list[str] = []
        self._expected: str | None = None

    def start(self) -> None:
        """Begins to ask."""
        self._thread.start()

    def stop(self) -> None:
        """Ends."""
        self._is_over.set()
        self._thread.join(30)

    def wait_for_one(self, since: int, timeout_s: float = 20.0) -> None:
        """Waits until a request that began after the `since`th answer was answered."""
        end = time.monotonic() + timeout_s
        while len(self.seconds) <= since + 1:
            assert time.monotonic() < end, "another client's good request is not answered"
            assert not self.wrong, self.wrong
            time.sleep(0.002)

    def _run(self) -> None:
        with httpx.Client(base_url=self._url, headers={"x-api-key": "theirs"}, timeout=30) as client:
            while not self._is_over.wait(0.02):
                self._ask(client)

    def _ask(self, client: httpx.Client) -> None:
        begun = time.monotonic()
        try:
            answer = client.post("/v1/chat/completions", json=GOOD)
        except httpx.TransportError as error:
            self.wrong.append(repr(error))
            return
        self.seconds.append(time.monotonic() - begun)
        if answer.status_code != 200:
            self.wrong.append(answer.text[:200])
            return
        text = answer.json()["choices"][0]["message"]["content"]
        self._expected = self._expected or text
        if text != self._expected:
            self.wrong.append(f"{text!r} instead of {self._expected!r}")


@contextmanager
def live_engine(folder: Path, tools: Sequence[Any] = (), **limits: Any) -> Iterator[LiveEngine]:
    """A server with these tools of its own and these limits (ServerOptions)."""
    costs = folder / "costs.json"
    costs.write_text(json.dumps(COSTS))
    options = ServerOptions(api_keys=KEYS, **limits)
    engine = EngineConfig(cost_model=costs, **SHIPPED)
    config = ServeConfig(
        engine,
        options=options,
        hold=HoldOptions(ttl_s=2.0),
        tools=ToolFlags(functions=tools, limits=ToolLimits(timeout_s=1.0, max_concurrency=4)),
    )
    running = Running(config)
    try:
        served = serving(
            RequestContext(running.app),
            http=guarded_protocol(options),
            loop="uvloop",
            access_log=False,
            backlog=config.backlog,
            timeout_keep_alive=config.keep_alive_s,
            timeout_graceful_shutdown=1,
            server_header=False,
            proxy_headers=False,
        )
        with served as url:
            live = LiveEngine(url, running)
            try:
                yield live
            finally:
                live.client.close()
    finally:
        running.close()
