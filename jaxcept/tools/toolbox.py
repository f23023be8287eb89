"""The tools of one model, and what runs their calls: several at once, bounded in time, every failure told as text."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any

from jaxcept.tools.arguments import ArgumentsError
from jaxcept.tools.calls import MalformedCall, ParsedCall, ToolCall, ToolResult
from jaxcept.tools.definition import Tool, tool
from jaxcept.tools.output import MAX_OUTPUT_CHARS, error_text, output_text
from jaxcept.tools.workers import LoopThread, ThreadPool, Worker

logger = logging.getLogger(__name__)

Done = Callable[[ToolResult], None]
MAX_THREADS = 32
MAX_STUCK_THREADS = 64
_MAX_NAMES_SHOWN = 50


class PendingCall:
    """A submitted call. Its `done` is called once: with what the tool gave, a timeout, or a cancellation."""

    __slots__ = ("_clock", "_done", "_lock", "_release", "_started_s", "call")

    def __init__(self, call: ParsedCall, done: Done, clock: Callable[[], float]) -> None:
        self.call = call
        self._done: Done | None = done
        self._clock = clock
        self._started_s = clock()
        self._lock = threading.Lock()
        self._release: list[Callable[[], object]] = []

    @property
    def is_settled(self) -> bool:
        """Whether a result was given."""
        return self._done is None

    def cancel(self) -> bool:
        """Give the call up: its result is an error that says so. False if it had a result before."""
        return self.settle("error: Cancelled: the call was given up", is_error=True)

    def settle(self, text: str, *, is_error: bool) -> bool:
        """Give the result, unless there is one. What was kept for the call (a timer, a thread) is released."""
        with self._lock:
            done, self._done = self._done, None
            release, self._release = self._release, []
        if done is None:
            return False
        for free in release:
            free()
        try:
            done(ToolResult(self.call, text, is_error, self._started_s, self._clock() - self._started_s))
        except Exception:
            logger.exception("the receiver of a result of tool %r raised", self.call.name)
        return True

    def on_settled(self, free: Callable[[], object]) -> None:
        """Have a function called when the result is given; at once if it was."""
        with self._lock:
            if self._done is not None:
                self._release.append(free)
                return
        free()


class Toolbox:
    """Tools by name. Functions run on threads, coroutines on an event loop that the toolbox owns.

    `tools` holds Tools, plain functions (made Tools of) and schemas in the OpenAI form, which somebody outside answers.
    `timeout_s` is for tools that set none. Raises ValueError on a name used twice.
    """

    def __init__(
        self,
        tools: Sequence[Tool | Callable[..., Any] | Mapping[str, Any]] = (),
        *,
        clock: Callable[[], float] = time.monotonic,
        timeout_s: float | None = 60.0,
        max_threads: int = MAX_THREADS,
        max_output_chars: int = MAX_OUTPUT_CHARS,
    ) -> None:
        if timeout_s is not None and not timeout_s > 0:
            raise ValueError(f"timeout_s={timeout_s!r}: expected seconds above 0, or None")
        if max_threads < 1 or max_output_chars < 1:
            raise ValueError(f"max_threads={max_threads}, max_output_chars={max_output_chars}: expected 1 or more")
        self._tools: dict[str, Tool] = {}
        for given in tools:
            made = _as_tool(given)
            if made.name in self._tools:
                raise ValueError(f"two tools are named {made.name!r}; give one of them another name")
            self._tools[made.name] = made
        self._clock = clock
        self._timeout_s = timeout_s
        self._max_output_chars = max_output_chars
        self._pool = ThreadPool(max_threads)
        self._loop = LoopThread("tool-loop")
        self._timers = LoopThread("tool-timers")  # its own thread: a coroutine that blocks its loop still times out
        self._pending: dict[int, PendingCall] = {}
        self._is_closed = False

    def schemas(self) -> list[dict[str, Any]]:
        """The tools in the OpenAI form, in the order given."""
        return [made.schema for made in self._tools.values()]

    def __contains__(self, name: object) -> bool:
        return name in self._tools

    def __getitem__(self, name: str) -> Tool:
        return self._tools[name]

    def __len__(self) -> int:
        return len(self._tools)

    def __iter__(self) -> Iterator[Tool]:
        return iter(self._tools.values())

    def get(self, name: str) -> Tool | None:
        """The tool of that name, or None."""
        return self._tools.get(name)

    def is_external(self, call: ParsedCall) -> bool:
        """Whether a well-formed call names a tool that somebody outside answers."""
        made = self._tools.get(call.name)
        return isinstance(call, ToolCall) and made is not None and made.function is None

    async def call(self, call: ParsedCall, timeout_s: float | None = None) -> ToolResult:
        """Run a call. Never raises for what the tool does; cancelling the awaiting task gives the call up."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[ToolResult] = loop.create_future()

        def give(result: ToolResult) -> None:
            if not future.done():
                future.set_result(result)

        def done(result: ToolResult) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(give, result)

        pending = self.submit(call, done, timeout_s)
        try:
            return await future
        finally:
            pending.cancel()

    def submit(self, call: ParsedCall, done: Done, timeout_s: float | None = None) -> PendingCall:
        """Run a call and hand its result to `done`, once, on whichever thread: it must be quick and thread-safe.

        `timeout_s` bounds this call (default: the tool's, then the toolbox's), counted from now. A call that cannot run
        (unknown tool, wrong arguments, malformed) gives its result before this returns.
        """
        pending = PendingCall(call, done, self._clock)
        try:
            made, kwargs = self._resolve(call)
        except ArgumentsError as error:
            pending.settle(f"error: {error}", is_error=True)
            return pending
        except Exception as error:  # a converter of the tool's own types (a dataclass's checks) may raise anything
            pending.settle(error_text(error), is_error=True)
            return pending
        self._pending[id(pending)] = pending
        pending.on_settled(lambda: self._pending.pop(id(pending), None))
        limit_s = timeout_s if timeout_s is not None else made.timeout_s
        limit_s = limit_s if limit_s is not None else self._timeout_s
        if limit_s is not None:
            self._arm(pending, limit_s)
        if made.is_async:
            self._loop.call(self._start_async, made, kwargs, pending)
        else:
            self._pool.submit(lambda: self._run(made, kwargs, pending))
        if self._is_closed:
            pending.cancel()
        return pending

    def close(self) -> None:
        """Give up all calls and end the threads. Functions that still run are left to end by themselves."""
        self._is_closed = True
        for pending in list(self._pending.values()):
            pending.cancel()
        self._pool.close()
        self._loop.close()
        self._timers.close()

    def __enter__(self) -> Toolbox:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _resolve(self, call: ParsedCall) -> tuple[Tool, dict[str, Any]]:
        """The tool and its keyword arguments. Raises ArgumentsError with what to tell the model."""
        made = self._tools.get(call.name)
        if self._is_closed:
            raise ArgumentsError("the tools are closed")
        if isinstance(call, MalformedCall):
            raise ArgumentsError(f"the call could not be read: {call.reason}")
        if made is None:
            raise ArgumentsError(f"there is no tool {call.name[:80]!r}; {self._names()}")
        if made.function is None:
            raise ArgumentsError(f"tool {made.name!r} is answered outside this process")
        if not made.is_async and self._pool.num_written_off >= MAX_STUCK_THREADS:
            raise ArgumentsError(f"{MAX_STUCK_THREADS} earlier calls ran out of time and are still running")
        return made, made.bind(call.arguments)

    def _names(self) -> str:
        names = list(self._tools)
        shown = ", ".join(names[:_MAX_NAMES_SHOWN]) + (", …" if len(names) > _MAX_NAMES_SHOWN else "")
        return f"the tools are: {shown}" if names else "there are no tools"

    def _arm(self, pending: PendingCall, limit_s: float) -> None:
        def expire() -> None:
            pending.settle(f"error: TimeoutError: the tool gave no answer in {limit_s:g} s", is_error=True)

        def start() -> None:
            timer = self._timers.call_later(limit_s, expire)
            pending.on_settled(lambda: self._timers.call(timer.cancel))

        self._timers.call(start)

    def _run(self, made: Tool, kwargs: dict[str, Any], pending: PendingCall) -> None:
        """A job of the thread pool: it runs the function and must not raise."""
        worker = threading.current_thread()
        assert isinstance(worker, Worker), "jobs run on the pool's threads"
        is_inside = True

        def give_up() -> None:
            if is_inside:
                self._pool.write_off(worker)

        pending.on_settled(give_up)
        if pending.is_settled:
            return
        process_id = os.getpid()
        try:
            value = made(**kwargs)
            if asyncio.iscoroutine(value):
                self._loop.call(self._start_coroutine, value, pending)
                is_inside = False
                return
            text, is_error = output_text(value, self._max_output_chars), False
        except BaseException as error:  # SystemExit and KeyboardInterrupt of a tool are the tool's failure, not ours
            text, is_error = error_text(error), True
        _end_forked_child(process_id)
        is_inside = False
        pending.settle(text, is_error=is_error)

    def _start_async(self, made: Tool, kwargs: dict[str, Any], pending: PendingCall) -> None:
        if not pending.is_settled:
            self._start_coroutine(made(**kwargs), pending)

    def _start_coroutine(self, coroutine: Coroutine[Any, Any, Any], pending: PendingCall) -> None:
        task = self._loop.start_task(self._run_coroutine(coroutine, pending))
        pending.on_settled(lambda: self._loop.call(task.cancel))

    async def _run_coroutine(self, coroutine: Coroutine[Any, Any, Any], pending: PendingCall) -> None:
        process_id = os.getpid()
        try:
            text, is_error = output_text(await coroutine, self._max_output_chars), False
        except GeneratorExit:
            raise  # the loop is gone; a coroutine that is being closed must not go on
        except BaseException as error:  # let through, SystemExit would end the loop that the other tools run on
            text, is_error = error_text(error), True
        _end_forked_child(process_id)
        pending.settle(text, is_error=is_error)


def _end_forked_child(process_id: int) -> None:
    """Ends this process if it is a child that a tool forked: the answer is the parent's to give."""
    if os.getpid() != process_id:
        os._exit(0)


def _as_tool(given: Tool | Callable[..., Any] | Mapping[str, Any]) -> Tool:
    if isinstance(given, Tool):
        return given
    if isinstance(given, Mapping):
        return Tool.from_schema(given)
    return tool(given)
