"""Generations that stop at their client's own triggers and wait, by id, for whoever answers.

A run is one request. While it generates, its events belong to one listener: the request that started it, or the one
that resumed it last. Where that one leaves while the run is intercepted, the run waits on, until its time is up.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from jaxcept.async_llm import AsyncLLM, Stream
from jaxcept.engine import EngineDeadError
from jaxcept.outputs import Delta, Spent
from jaxcept.scheduler.border import StateError
from jaxcept.scheduler.lifecycle import MORE
from jaxcept.scheduler.params import SamplingParams
from jaxcept.session import InterceptOptions
from jaxcept_serve.turns import Caller, ServiceError, Usage

MAX_REMEMBERED = 4096  # interceptions that are over, so that an answer that comes late is told so
REOPEN_WAIT_S = 60.0  # for a piece that comes while the one before it is computed

Event = dict[str, Any]


class Status(StrEnum):
    """Of an interception."""

    OPEN = "open"
    COMPUTING = "computing"  # a piece of its answer
    RESUMED = "resumed"
    GONE = "gone"  # timed out, aborted, or its generation has ended


@dataclass(slots=True)
class OpenedInterception:
    """One interception as its client knows it. Times in seconds of the wall clock."""

    id: str
    run: NativeRun
    trigger: str
    text: str  # generated since the last one
    opened_at: float
    expires_at: float
    status: Status = Status.OPEN

    def as_json(self) -> Event:
        """What the API tells."""
        return {
            "id": self.id,
            "request_id": self.run.request_id,
            "trigger": self.trigger,
            "text": self.text,
            "status": self.status.value,
            "opened_at": self.opened_at,
            "expires_at": self.expires_at,
        }


@dataclass(eq=False)
class NativeRun:
    """One generation."""

    request_id: str
    caller: Caller
    stream: Stream
    num_prompt: int
    timeout_s: float
    opened: OpenedInterception | None = None
    is_over: bool = False
    listener: object | None = None
    events: asyncio.Queue[Event | Exception] = field(default_factory=asyncio.Queue)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    num_generated: int = 0
    num_returned: int = 0
    text: str = ""  # generated since the last interception

    def usage(self, spent: Spent, token_bytes: float) -> Usage:
        """What the generation took so far."""
        cached = min(spent.cached_tokens, self.num_prompt)
        return Usage(
            prompt_tokens=self.num_prompt,
            completion_tokens=self.num_generated,
            cached_tokens=cached,
            returned_tokens=self.num_returned,
            swapped_tokens=spent.swapped_tokens,
            recomputed_tokens=spent.recomputed_tokens,
            intercepted_s=spent.intercepted_s,
            held_byte_s=spent.held_token_s * token_bytes,
            cache_write_tokens=self.num_prompt - cached,
        )


class NativeRuns:
    """All generations of this kind, in one event loop."""

    def __init__(
        self, llm: AsyncLLM, token_bytes: float, max_runs: int = 4096, max_runs_per_key: int | None = None
    ) -> None:
        self._llm = llm
        self._max_runs_per_key = max_runs_per_key
        self._token_bytes = token_bytes
        self._max_runs = max_runs
        self._runs: dict[str, NativeRun] = {}
        self._interceptions: dict[str, OpenedInterception] = {}
        self._past: OrderedDict[str, tuple[Caller, Status]] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        options: InterceptOptions,
        caller: Caller,
        is_open: bool,
    ) -> NativeRun:
        """Queues a generation. ServiceError 400 for what cannot be served, 429 where the caller has too many, 503 where
        all callers have."""
        limit = self._max_runs_per_key
        if limit is not None and sum(run.caller.salt == caller.salt for run in self._runs.values()) >= limit:
            raise ServiceError(429, f"{limit} generations of this key run or wait to be resumed: at most so many may",
                               code="concurrency_limit_exceeded", retry_after_s=1.0)  # fmt: skip
        if len(self._runs) >= self._max_runs:
            raise ServiceError(503, f"{self._max_runs} generations wait or run", retry_after_s=1.0)
        try:
            stream = await self._llm.submit(
                list(prompt_ids),
                params,
                request_id=request_id,
                intercept=options,
                cache_salt=caller.salt,
                add_special_tokens=False,
                is_open=is_open,
            )
        except EngineDeadError:
            raise ServiceError(503, "the engine has failed", retry_after_s=30.0) from None
        run = NativeRun(request_id, caller, stream, len(prompt_ids), options.timeout_s)
        self._runs[request_id] = run
        task = asyncio.get_running_loop().create_task(self._pump(run))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return run

    async def listen(self, run: NativeRun, through: bool) -> AsyncIterator[Event]:
        """The run's events: to its end, or only to its next interception unless `through`.

        Whoever stops listening while it generates ends it; an intercepted run waits on for its answer.
        """
        listener = run.listener = object()
        try:
            while True:
                event = await run.events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if event["type"] == "finished" or (event["type"] == "intercepted" and not through):
                    return
        finally:
            if run.listener is listener:
                run.listener = None
                if not run.is_over and run.opened is None:
                    run.stream.close()
                    self._end(run)

    def find(self, interception_id: str, caller: Caller) -> OpenedInterception:
        """An interception of the caller's that waits. ServiceError 404, 409 or 410 where none does."""
        found = self._interceptions.get(interception_id)
        if found is not None and found.run.caller.salt == caller.salt:
            return found
        owner, status = self._past.get(interception_id, (None, Status.GONE))
        if owner is None or owner.salt != caller.salt:
            raise ServiceError(404, "there is no interception of this id", param="id")
        if status is Status.RESUMED:
            raise ServiceError(409, "the interception has been answered", param="id")
        raise ServiceError(410, "the interception is over: it timed out, or its generation was ended", param="id")

    async def answer(
        self, interception_id: str, caller: Caller, text: str | None, token_ids: Sequence[int] | None, more: bool
    ) -> NativeRun:
        """Goes on with an intercepted run, or computes a piece of its answer. ServiceError as `find`, 400 for ids that
        do not fit, 409 for a second answer at the same time."""
        opened = await self._reopened(self.find(interception_id, caller))
        run = opened.run
        opened.status = Status.COMPUTING
        try:
            await self._llm.resume(run.request_id, text, token_ids, more=more)
        except StateError:
            self._close(run, Status.GONE)
            raise ServiceError(410, "the interception is over: it timed out", param="id") from None
        except ValueError as error:
            opened.status = Status.OPEN
            raise ServiceError(400, str(error), param="text" if token_ids is None else "token_ids") from None
        if not more:
            self._close(run, Status.RESUMED)
        return run

    def abort(self, interception_id: str, caller: Caller) -> None:
        """Ends the generation of an interception. ServiceError as `find`."""
        run = self.find(interception_id, caller).run
        run.stream.close()
        run.events.put_nowait({"type": "finished", "finish_reason": "abort"})
        self._end(run)

    async def _reopened(self, opened: OpenedInterception) -> OpenedInterception:
        """Waits while a piece is computed."""
        end = time.monotonic() + REOPEN_WAIT_S
        while opened.status is Status.COMPUTING:
            opened.run.changed.clear()
            try:
                async with asyncio.timeout(max(0.0, end - time.monotonic())):
                    await opened.run.changed.wait()
            except TimeoutError:
                raise ServiceError(409, "a piece of the answer is still being computed", param="id") from None
        if opened.status is Status.RESUMED:
            raise ServiceError(409, "the interception has been answered", param="id")
        if opened.status is Status.GONE:
            raise ServiceError(410, "the interception is over", param="id")
        return opened

    async def _pump(self, run: NativeRun) -> None:
        """Deltas of the engine to events, whoever listens."""
        spent = Spent()
        try:
            async for delta in run.stream:
                spent = delta.spent or spent
                event = self._event(run, delta, spent)
                if event is not None:
                    run.events.put_nowait(event)
        except EngineDeadError:
            run.events.put_nowait(ServiceError(503, "the engine has failed", retry_after_s=30.0))
        self._end(run)

    def _event(self, run: NativeRun, delta: Delta, spent: Spent) -> Event | None:
        match delta.kind:
            case "generated":
                run.num_generated += len(delta.token_ids)
                run.text += delta.text
                return {"type": "generated", "text": delta.text, "token_ids": list(delta.token_ids)}
            case "returned":
                run.num_returned += len(delta.token_ids)
                if run.opened is not None and run.opened.status is not Status.COMPUTING:
                    self._close(run, Status.GONE)  # its time was up, and the model was told
                    if run.listener is None:
                        run.stream.close()  # which nobody would hear of
                return {"type": "returned", "text": delta.text, "token_ids": list(delta.token_ids)}
            case "intercepted":
                return self._on_intercepted(run, str(delta.trigger))
            case "finished":
                run.is_over = True
                if delta.text:
                    run.events.put_nowait({"type": "generated", "text": delta.text, "token_ids": []})
                usage = run.usage(spent, self._token_bytes)
                reason = {"finish_reason": delta.finish_reason, "stop_reason": delta.stop_reason}
                return {"type": "finished", **reason, "usage": usage}
            case _:
                return None

    def _on_intercepted(self, run: NativeRun, trigger: str) -> Event | None:
        now = time.time()
        opened = run.opened
        if trigger == MORE and opened is not None:
            opened.status, opened.expires_at = Status.OPEN, now + run.timeout_s
            run.changed.set()
            return None
        opened = OpenedInterception(f"int_{secrets.token_hex(16)}", run, trigger, run.text, now, now + run.timeout_s)
        run.opened, run.text = opened, ""
        self._interceptions[opened.id] = opened
        return {"type": "intercepted", "interception": opened.as_json()}

    def _close(self, run: NativeRun, status: Status) -> None:
        opened, run.opened = run.opened, None
        if opened is None:
            return
        opened.status = status
        del self._interceptions[opened.id]
        self._past[opened.id] = (run.caller, status)
        while len(self._past) > MAX_REMEMBERED:
            self._past.popitem(last=False)
        run.changed.set()

    def _end(self, run: NativeRun) -> None:
        run.is_over = True
        self._close(run, Status.GONE)
        self._runs.pop(run.request_id, None)
