"""Where tools run: functions on threads, coroutines on an event loop, a timer beside both, and each tool's limits."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from jaxcept.tools.calls import Outcome
from jaxcept.tools.definition import Tool
from jaxcept.tools.guard import ToolGuard, ToolLimits
from jaxcept.tools.output import error_outcome, error_text, output_text
from jaxcept.tools.pending import PendingCall
from jaxcept.tools.workers import LoopThread, ThreadPool, Worker

MAX_STUCK_THREADS = 64


class Executor:
    """Threads and loops for the tools of one or several toolboxes. `close` gives up every call."""

    def __init__(self, clock: Callable[[], float], limits: ToolLimits, max_threads: int) -> None:
        self.clock = clock
        self.limits = limits
        self._pool = ThreadPool(max_threads)
        self._loop = LoopThread("tool-loop")
        self._timers = LoopThread("tool-timers")  # its own thread: a coroutine that blocks its loop still times out
        self._pending: dict[int, PendingCall] = {}
        self._lock = threading.Lock()
        self._guards: dict[str, ToolGuard] = {}
        self.is_closed = False

    @property
    def num_stuck(self) -> int:
        """Threads whose function was given up and still runs."""
        return self._pool.num_written_off

    @property
    def num_pending(self) -> int:
        """Calls that have no result."""
        return len(self._pending)

    def guards(self) -> list[ToolGuard]:
        """The guards of tools that were called."""
        return list(self._guards.values())

    def run(self, pending: PendingCall, made: Tool, kwargs: dict[str, Any], timeout_s: float) -> None:
        """Run a call under its tool's limits; `timeout_s` counts from now. Its result goes to the pending call."""
        guard = self._guard(made)
        self._pending[id(pending)] = pending
        pending.on_settled(lambda: self._pending.pop(id(pending), None))
        try:
            self._arm(pending, guard, timeout_s)
            guard.submit(pending, lambda inner: self._start(inner, made, kwargs))
        except (RuntimeError, OSError) as error:  # the timers' thread cannot be started
            pending.settle(error_text(error), Outcome.FAILED)
        if self.is_closed:
            pending.cancel()

    def close(self) -> None:
        """Give up all calls and end the threads. Functions that still run are left to end by themselves."""
        self.is_closed = True
        for pending in list(self._pending.values()):
            pending.cancel()
        self._pool.close()
        self._loop.close()
        self._timers.close()

    def _guard(self, made: Tool) -> ToolGuard:
        with self._lock:
            guard = self._guards.get(made.name)
            if guard is None or guard.tool is not made:
                guard = self._guards[made.name] = ToolGuard(made, self.limits, self.clock)
            return guard

    def _arm(self, pending: PendingCall, guard: ToolGuard, limit_s: float) -> None:
        def expire() -> None:
            why = guard.explain_wait(pending)
            pending.settle(f"error: TimeoutError: the tool gave no answer in {limit_s:g} s{why}", Outcome.TIMEOUT)

        def start() -> None:
            timer = self._timers.call_later(limit_s, expire)
            pending.on_settled(lambda: self._timers.call(timer.cancel))

        self._timers.call(start)

    def _start(self, pending: PendingCall, made: Tool, kwargs: Mapping[str, Any]) -> None:
        try:
            if made.is_async:
                self._loop.call(self._start_async, made, kwargs, pending)
            else:
                self._pool.submit(lambda: self._run(made, kwargs, pending))
        except (RuntimeError, OSError) as error:  # no thread can be started
            pending.settle(error_text(error), Outcome.FAILED)

    def _run(self, made: Tool, kwargs: Mapping[str, Any], pending: PendingCall) -> None:
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
            text, outcome = output_text(value, self.limits.max_output_chars), Outcome.ANSWERED
        except BaseException as error:  # SystemExit and KeyboardInterrupt of a tool are the tool's failure, not ours
            text, outcome = error_text(error), error_outcome(error)
        _end_forked_child(process_id)
        is_inside = False
        pending.settle(text, outcome)

    def _start_async(self, made: Tool, kwargs: Mapping[str, Any], pending: PendingCall) -> None:
        if not pending.is_settled:
            self._start_coroutine(made(**kwargs), pending)

    def _start_coroutine(self, coroutine: Coroutine[Any, Any, Any], pending: PendingCall) -> None:
        task = self._loop.start_task(self._run_coroutine(coroutine, pending))
        pending.on_settled(lambda: self._loop.call(task.cancel))

    async def _run_coroutine(self, coroutine: Coroutine[Any, Any, Any], pending: PendingCall) -> None:
        process_id = os.getpid()
        try:
            text, outcome = output_text(await coroutine, self.limits.max_output_chars), Outcome.ANSWERED
        except GeneratorExit:
            raise  # the loop is gone; a coroutine that is being closed must not go on
        except BaseException as error:  # let through, SystemExit would end the loop that the other tools run on
            text, outcome = error_text(error), error_outcome(error)
        _end_forked_child(process_id)
        pending.settle(text, outcome)


def _end_forked_child(process_id: int) -> None:
    """Ends this process if it is a child that a tool forked: the answer is the parent's to give."""
    if os.getpid() != process_id:
        os._exit(0)
