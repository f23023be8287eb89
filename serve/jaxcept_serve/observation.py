"""Everything that watches the engine and its turns, in one place: metrics, lanes, traces, log lines."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from starlette.routing import BaseRoute

from jaxcept.engine import Engine
from jaxcept.scheduler.events import Event
from jaxcept_serve.api import Api
from jaxcept_serve.lanes import Lanes
from jaxcept_serve.logs import trace_headers
from jaxcept_serve.page import live_routes
from jaxcept_serve.sse import closing
from jaxcept_serve.telemetry import Telemetry
from jaxcept_serve.turns import (
    Caller,
    ChatTurn,
    PromptTurn,
    Service,
    ServiceError,
    ToolAnswered,
    TurnDone,
    TurnEvent,
    TurnFinished,
    Usage,
)

if TYPE_CHECKING:
    from jaxcept_serve.tracing import Tracing

logger = logging.getLogger(__name__)

Observer = Callable[[Engine, Sequence[Event], float], object]


class Observation:
    """To be put together as

    observation = Observation(model_name, max_model_len, policy_name, tracing)
    session.observers.append(observation.on_step)
    app = create_app(observation.observe(service), options, extra_routes=[observation.routes])
    """

    def __init__(self, model_name: str, max_model_len: int, policy: str = "", tracing: Tracing | None = None) -> None:
        self.telemetry = Telemetry(model_name, max_model_len)
        self.lanes = Lanes()
        self.tracing = tracing
        self._policy = policy
        self._observers: list[Observer] = [self.telemetry.on_step, self.lanes.on_step]
        if tracing is not None:
            self._observers.append(tracing.on_step)

    def on_step(self, engine: Engine, events: Sequence[Event], now: float) -> None:
        """Tells every observer. One that fails is told nothing more: it must not take the engine with it."""
        for observer in list(self._observers):
            try:
                observer(engine, events, now)
            except Exception:
                logger.exception("%s failed and observes no more", observer)
                self._observers.remove(observer)

    def observe(self, service: Service) -> Service:
        """The service, with its turns watched."""
        self.telemetry.held = lambda: service.metrics().get("held_conversations", 0.0)
        return cast(Service, _ObservedService(service, self))

    def routes(self, api: Api) -> list[BaseRoute]:
        """GET /metrics, / and /live."""
        live = live_routes(self.lanes, lambda: self.telemetry.snapshot, self._policy)
        return [self.telemetry.route(), *live(api)]


class _ObservedService:
    """A Service whose turns are counted, traced and logged; all else is as the inner one does it."""

    def __init__(self, inner: Service, observation: Observation) -> None:
        self._inner = inner
        self._observation = observation

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def chat(self, turn: ChatTurn, caller: Caller) -> AsyncIterator[TurnEvent]:
        """Starts a turn."""
        watched = _WatchedTurn(self._observation, turn.request_id, "chat", self._inner.model_names[0], caller)
        return await watched.start(self._inner.chat(turn, caller))

    async def complete(self, turn: PromptTurn, caller: Caller) -> AsyncIterator[TurnEvent]:
        """Starts a completion."""
        name = self._inner.model_names[0]
        watched = _WatchedTurn(self._observation, turn.request_id, "text_completion", name, caller)
        return await watched.start(self._inner.complete(turn, caller))


class _WatchedTurn:
    """The events of a turn as they are, seen on their way."""

    def __init__(self, observation: Observation, request_id: str, operation: str, model: str, caller: Caller) -> None:
        self._telemetry = observation.telemetry
        self._tracing = observation.tracing
        self._request_id = request_id
        self._key_name = caller.key_name
        self._began = time.monotonic()
        self._reasons: list[str] = []
        self._usage: Usage | None = None
        self._is_over = False
        self._events: AsyncIterator[TurnEvent] | None = None
        headers = trace_headers.get()
        self._span = self._tracing.begin(request_id, operation, model, headers) if self._tracing is not None else None

    async def start(self, accepted: Awaitable[AsyncIterator[TurnEvent]]) -> _WatchedTurn:
        """Waits until the turn is taken; counts it where it is not."""
        try:
            self._events = await accepted
        except ServiceError as error:
            self._telemetry.turn_refused(error.status)
            self._end(f"{error.status}: {error.message}")
            raise
        except BaseException as error:
            self._end(type(error).__name__)
            raise
        return self

    def __aiter__(self) -> _WatchedTurn:
        return self

    async def __anext__(self) -> TurnEvent:
        assert self._events is not None, "the turn was never taken"
        try:
            event = await anext(self._events)
        except StopAsyncIteration:
            self._end(None)
            raise
        except asyncio.CancelledError:
            self._end("the client has gone", "abort")
            raise
        except BaseException as error:
            self._end(type(error).__name__, "error")
            raise
        self._see(event)
        return event

    async def aclose(self) -> None:
        """Ends the turn, if it has not ended."""
        if self._events is not None:
            async with closing(self._events):
                self._end("the client has gone", "abort")

    def _see(self, event: TurnEvent) -> None:
        match event:
            case TurnFinished():
                self._reasons.append(event.finish_reason)
                self._telemetry.turn_finished(event.finish_reason)
            case ToolAnswered():
                self._telemetry.tool_answered(event.name, event.is_error, event.duration_s)
            case TurnDone():
                self._usage = event.usage
                self._telemetry.turn_done(time.monotonic() - self._began, event.usage)
                self._end(None)

    def _end(self, error: str | None, reason: str | None = None) -> None:
        if self._is_over:
            return
        self._is_over = True
        if reason is not None:
            self._reasons.append(reason)
            self._telemetry.turn_finished(reason)
        if self._span is not None and self._tracing is not None:
            self._tracing.end(self._span, self._reasons, self._usage, error)
        usage = self._usage
        extra: dict[str, Any] = {
            "request_id": self._request_id,
            "key": self._key_name,
            "seconds": round(time.monotonic() - self._began, 4),
        }
        if usage is not None:
            extra |= {
                "prompt_tokens": usage.prompt_tokens,
                "cached_tokens": usage.cached_tokens,
                "completion_tokens": usage.completion_tokens,
                "recomputed_tokens": usage.recomputed_tokens,
                "intercepted_s": round(usage.intercepted_s, 4),
            }
        if error is not None:
            extra["error"] = error
        logger.info("turn: %s", ", ".join(self._reasons) or "no answer", extra=extra)
