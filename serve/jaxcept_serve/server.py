"""The composition root of the server: engine, tools, observation, application, and how all of it ends."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette

from jaxcept.async_llm import AsyncLLM
from jaxcept.build import Progress, choose_parser, choose_reasoning
from jaxcept.config import EngineConfig
from jaxcept.text.reasoning import make_thoughts
from jaxcept.tools.guard import ToolLimits
from jaxcept.tools.parsers import make_parser
from jaxcept.tools.sources import SERVER_LIMITS, ToolSource, open_tools
from jaxcept_serve import generate
from jaxcept_serve.app import create_app
from jaxcept_serve.limits import ServerOptions
from jaxcept_serve.logs import RequestContext, log_config
from jaxcept_serve.observation import Observation
from jaxcept_serve.protocol import guarded_protocol, raise_file_limit
from jaxcept_serve.service import EngineService, HoldOptions

logger = logging.getLogger(__name__)

DEAD_GRACE_S = 1.0  # for answers that tell of the failure to leave
EXIT_ENGINE_DEAD = 70  # EX_SOFTWARE
EXIT_INVARIANT = 71


def silent(done: int, total: int, what: str) -> None:
    """Progress that nobody is shown."""


@dataclass(frozen=True, slots=True)
class ToolFlags:
    """What opens the tools that the server runs; see jaxcept.tools.sources.open_tools."""

    functions: Sequence[Any] = ()
    mcp: Sequence[str] = ()
    openapi: Sequence[str] = ()
    allow: Sequence[str] = ()
    allow_hosts: Sequence[str] = ()
    isolate: bool = False
    limits: ToolLimits = SERVER_LIMITS

    def open(self) -> ToolSource:
        """Opens them all. ValueError in words for whoever wrote the flags."""
        return open_tools(
            self.functions,
            self.mcp,
            self.openapi,
            self.allow,
            self.limits,
            allow_hosts=self.allow_hosts,
            isolate=self.isolate,
        )


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """Everything that one server is built from. Seconds end in _s."""

    engine: EngineConfig
    options: ServerOptions = field(default_factory=ServerOptions)
    hold: HoldOptions = field(default_factory=HoldOptions)
    tools: ToolFlags = field(default_factory=ToolFlags)
    model_names: Sequence[str] = ()
    otlp_endpoint: str | None = None
    trace: bool = False
    host: str = "127.0.0.1"
    port: int = 8000
    grace_s: float = 30.0
    log_format: str = "text"
    log_level: str = "info"
    backlog: int = 2048
    keep_alive_s: int = 30


class Running:
    """A server's parts, alive. `close` ends them."""

    def __init__(self, config: ServeConfig, progress: Progress = silent) -> None:
        self.config = config
        self.source = config.tools.open()
        try:
            self.llm = AsyncLLM(config=config.engine, progress=progress)
        except BaseException:
            self.source.close()
            raise
        session = self.llm.session
        parser = choose_parser(config.engine, session.tokenizer)
        reasoning = choose_reasoning(config.engine, session.tokenizer)
        names = tuple(config.model_names) or (config.engine.model_name,)
        self.service = EngineService(
            self.llm,
            names,
            tools=lambda: self.source.toolbox,
            make_parser=(lambda: make_parser(parser)) if parser is not None else None,
            make_thoughts=(lambda: make_thoughts(reasoning)) if reasoning is not None else None,
            hold=config.hold,
        )
        self.tracing = self._make_tracing()
        limit = session.engine.scheduler.config.max_len
        self.observation = Observation(names[0], limit, config.engine.intercept_policy, self.tracing)
        session.observers.append(self.observation.on_step)
        self.app: Starlette = create_app(
            self.observation.observe(self.service),
            config.options,
            extra_routes=[self.observation.routes, generate.routes_of(self.service)],
        )

    def _make_tracing(self) -> Any:
        if not self.config.trace and self.config.otlp_endpoint is None:
            return None
        try:
            from jaxcept_serve.tracing import make_tracing  # noqa: PLC0415 (optional dependency)
        except ImportError as error:
            raise ValueError(f"traces need OpenTelemetry: pip install 'jaxcept[otel]' ({error})") from error
        return make_tracing(self.config.otlp_endpoint)

    def drain(self) -> None:
        """Takes no further request; what runs goes on."""
        self.service.is_draining = True
        self.app.state.api.gate.is_draining = True

    def check(self) -> None:
        """Every invariant of the scheduler. AssertionError says what does not add up."""
        self.llm.session.engine.scheduler.check()

    def close(self) -> None:
        """Ends the engine, its requests, the tools."""
        self.llm.close()
        self.source.close()
        if self.tracing is not None:
            self.tracing.close()


class Server(uvicorn.Server):
    """uvicorn's server with an end of its own. The first signal drains: who is served goes on, whoever comes is told to
    come again, elsewhere or later. The second one, or the end of the grace time, gives up what is left."""

    def __init__(self, config: uvicorn.Config, running: Running) -> None:
        super().__init__(config)
        self._running = running
        self._give_up_at: float | None = None
        self.exit_status = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal."""
        if self._give_up_at is None:
            grace_s = self._running.config.grace_s
            logger.info("%s: draining, for at most %g s", signal.Signals(sig).name, grace_s)
            self._give_up_at = time.monotonic() + grace_s
            self._running.drain()
        else:
            self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Ends the process once it is drained, and where the engine is dead: whoever supervises it must not see a
        healthy server."""
        if not self._running.llm.is_alive and not self.exit_status:
            logger.error("the engine is dead: the server ends")
            self.exit_status = EXIT_ENGINE_DEAD
            self._running.drain()
            self._give_up_at = time.monotonic() + DEAD_GRACE_S
        if self._give_up_at is not None:
            is_drained = not self._running.app.state.api.gate.num_in_flight
            self.should_exit |= is_drained or time.monotonic() > self._give_up_at
        return await super().on_tick(counter)


def run(config: ServeConfig, progress: Progress = silent, running: Any = None) -> int:
    """Serves until a signal; the exit status: 0, or what says that the engine died or its books did not add up.

    `running` has the parts of Running, where they are others.
    """
    raise_file_limit()
    running = running if running is not None else Running(config, progress)
    options = uvicorn.Config(
        RequestContext(running.app),
        host=config.host,
        port=config.port,
        log_config=log_config("json" if config.log_format == "json" else "text", config.log_level),
        access_log=False,
        lifespan="off",
        ws="none",
        http=guarded_protocol(config.options),
        loop="uvloop",
        backlog=config.backlog,
        timeout_keep_alive=config.keep_alive_s,
        timeout_graceful_shutdown=1,
        server_header=False,
        proxy_headers=False,
    )
    server = Server(options, running)
    try:
        server.run()
    finally:
        running.close()
    try:
        running.check()
    except AssertionError:
        logger.exception("the scheduler's books do not add up")
        return EXIT_INVARIANT
    return server.exit_status if server.started else 1
