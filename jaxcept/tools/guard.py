"""Limits around one tool: how many calls at once, when to stop asking a broken tool, which answers to keep."""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from cachetools import TTLCache

from jaxcept.tools.calls import Outcome, ToolResult
from jaxcept.tools.definition import Tool
from jaxcept.tools.output import MAX_OUTPUT_CHARS
from jaxcept.tools.pending import PendingCall

_ENOUGH = 0.9  # of the timeout: a run that was given as much and has no answer counts as a failure
MAX_CACHE_CHARS = 4_000_000  # of results kept per tool; the least recently used go first

DEFAULT_TIMEOUT_S = 60.0  # where neither the limits nor the tool nor the caller sets one

Clock = Callable[[], float]
Start = Callable[[PendingCall], None]


@dataclass(frozen=True, slots=True)
class ToolLimits:
    """Limits that hold for each tool by itself. Times are in seconds.

    `timeout_s` bounds every call, any wait for a free place included; a tool and a caller may ask for less.
    `max_concurrency` calls of a tool run at once, the rest wait in order. After `breaker_failures` failures in a row
    (crashes and runs over the whole timeout, not answers that blame the arguments nor callers in a hurry) calls are
    refused for `breaker_reset_s`; then one is let through to try. Answers of pure tools are kept for `cache_ttl_s`; 0
    keeps none. None stands for no limit. Raises ValueError.
    """

    timeout_s: float | None = None
    max_output_chars: int = MAX_OUTPUT_CHARS
    max_concurrency: int | None = None
    breaker_failures: int | None = None
    breaker_reset_s: float = 30.0
    cache_ttl_s: float = 0.0

    def __post_init__(self) -> None:
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise ValueError(f"timeout_s={self.timeout_s!r}: expected seconds above 0, or None")
        if self.max_output_chars < 1:
            raise ValueError(f"max_output_chars={self.max_output_chars!r}: expected 1 or more")
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise ValueError(f"max_concurrency={self.max_concurrency!r}: expected 1 or more, or None")
        if self.breaker_failures is not None and self.breaker_failures < 1:
            raise ValueError(f"breaker_failures={self.breaker_failures!r}: expected 1 or more, or None")
        if not self.breaker_reset_s > 0:
            raise ValueError(f"breaker_reset_s={self.breaker_reset_s!r}: expected seconds above 0")
        if not self.cache_ttl_s >= 0:
            raise ValueError(f"cache_ttl_s={self.cache_ttl_s!r}: expected seconds, 0 for no cache")


class Breaker:
    """Counts failures in a row. Open, it refuses; once the reset time is over it lets one call through to try."""

    def __init__(self, failures: int | None, reset_s: float, clock: Clock) -> None:
        self._max_failures = failures
        self._reset_s = reset_s
        self._clock = clock
        self._opened_s: float | None = None
        self._is_trying = False
        self.num_failures = 0

    @property
    def is_open(self) -> bool:
        """Whether calls are refused, but for one that tries."""
        return self._opened_s is not None

    def admit(self) -> bool:
        """Whether a call may run; each one admitted is followed by `record` or `forget`."""
        if self._opened_s is None:
            return True
        if self._is_trying or self._clock() < self._opened_s + self._reset_s:
            return False
        self._is_trying = True
        return True

    def record(self, *, is_failure: bool) -> None:
        """What came of a call that was admitted."""
        if not is_failure:
            self.num_failures, self._opened_s, self._is_trying = 0, None, False
            return
        self.num_failures += 1
        if self._max_failures is not None and self.num_failures >= self._max_failures:
            self._opened_s, self._is_trying = self._clock(), False

    def forget(self) -> None:
        """A call that was admitted was given up, which says nothing about the tool."""
        self._is_trying = False

    def refusal(self, name: str) -> str:
        """What a refused call is told."""
        assert self._opened_s is not None, "an open breaker refuses"
        left_s = max(0.0, self._opened_s + self._reset_s - self._clock())
        return (
            f"error: tool {name!r} failed {self.num_failures} times in a row and is not called for the next "
            f"{left_s:.0f} s; go on without it"
        )


class _Run:
    """One run of the tool, and the calls that wait for its answer."""

    __slots__ = ("callers", "inner", "key", "started_s")

    def __init__(self, key: bytes | None, caller: PendingCall) -> None:
        self.key = key
        self.callers = [caller]
        self.inner: PendingCall
        self.started_s: float | None = None


class ToolGuard:
    """The limits of one tool, held over all of its calls. Thread-safe; nothing outside is called under its lock."""

    def __init__(self, tool: Tool, limits: ToolLimits, clock: Clock) -> None:
        self.tool = tool
        self._limits = limits
        self._clock = clock
        self._lock = threading.Lock()
        self._breaker = Breaker(limits.breaker_failures, limits.breaker_reset_s, clock)
        self._running = 0
        self._waiting: deque[_Run] = deque()
        self._flights: dict[bytes, _Run] = {}
        self._cache: TTLCache[bytes, str] | None = None
        if tool.is_pure and limits.cache_ttl_s > 0:
            self._cache = TTLCache(
                MAX_CACHE_CHARS, limits.cache_ttl_s, timer=clock, getsizeof=lambda text: len(text) + 100
            )

    @property
    def timeout_s(self) -> float:
        """The longest that a call may take."""
        given = [each for each in (self.tool.timeout_s, self._limits.timeout_s) if each is not None]
        return min(given, default=DEFAULT_TIMEOUT_S)

    def state(self) -> dict[str, Any]:
        """Counts for a health page: running, waiting, failures in a row, whether the breaker is open."""
        with self._lock:
            return {
                "tool": self.tool.name,
                "running": self._running,
                "waiting": len(self._waiting),
                "failures": self._breaker.num_failures,
                "is_open": self._breaker.is_open,
            }

    def submit(self, caller: PendingCall, start: Start) -> None:
        """Answer a call from the cache, join it to an equal one, refuse it, let it wait, or `start` it."""
        key = argument_key(caller.call.arguments) if self.tool.is_pure else None
        run: _Run | None = None
        text, outcome, is_next = "", Outcome.REFUSED, False
        with self._lock:
            kept = self._cache.get(key) if self._cache is not None and key is not None else None
            if kept is not None:
                text, outcome = kept, Outcome.CACHED
            elif key is not None and key in self._flights:
                run = self._flights[key]
                run.callers.append(caller)
            elif not self._breaker.admit():
                text = self._breaker.refusal(self.tool.name)
            else:
                run = self._new_run(key, caller, start)
                is_next = self._has_place
                if is_next:
                    self._take_place(run)
                else:
                    self._waiting.append(run)
        if run is None:
            caller.settle(text, outcome)
            return
        joined = run
        caller.on_settled(lambda: self._leave(joined, caller))
        if is_next:
            start(run.inner)

    def explain_wait(self, caller: PendingCall) -> str:
        """Why a call that ran out of time had not begun; empty if it had."""
        with self._lock:
            is_waiting = any(caller in run.callers for run in self._waiting)
        return f" (it waited for a free place: {self._limits.max_concurrency} calls run at once)" if is_waiting else ""

    @property
    def _has_place(self) -> bool:
        return self._limits.max_concurrency is None or self._running < self._limits.max_concurrency

    def _new_run(self, key: bytes | None, caller: PendingCall, start: Start) -> _Run:
        run = _Run(key, caller)
        run.inner = PendingCall(caller.call, lambda result: self._finish(run, result, start), self._clock)
        if key is not None:
            self._flights[key] = run
        return run

    def _take_place(self, run: _Run) -> None:
        self._running += 1
        run.started_s = self._clock()

    def _leave(self, run: _Run, caller: PendingCall) -> None:
        """A call has its result. If it was the last that waited for a run which goes on, the run is given up."""
        with self._lock:
            if caller not in run.callers:
                return  # the run itself gave the result
            run.callers.remove(caller)
            if run.callers:
                return
            self._drop_flight(run)
            if run.started_s is None:
                self._waiting.remove(run)
                self._breaker.forget()
                return
        had_its_time = self._clock() - run.started_s >= _ENOUGH * self.timeout_s
        is_failure = caller.outcome is Outcome.TIMEOUT and had_its_time
        run.inner.settle("", Outcome.TIMEOUT if is_failure else Outcome.CANCELLED)

    def _finish(self, run: _Run, result: ToolResult, start: Start) -> None:
        refused: list[PendingCall] = []
        refusal = ""
        following: _Run | None = None
        with self._lock:
            callers, run.callers = run.callers, []
            self._drop_flight(run)
            self._running -= 1
            if result.outcome is Outcome.CANCELLED:
                self._breaker.forget()
            else:
                self._breaker.record(is_failure=result.outcome in (Outcome.FAILED, Outcome.TIMEOUT))
            if result.outcome is Outcome.ANSWERED:
                self._keep(run.key, result.text)
            if self._breaker.is_open:
                refusal = self._breaker.refusal(self.tool.name)
                for waiting in self._waiting:
                    self._drop_flight(waiting)
                    refused += waiting.callers
                    waiting.callers = []
                self._waiting.clear()
            elif self._waiting and self._has_place:
                following = self._waiting.popleft()
                self._take_place(following)
        for caller in callers:
            caller.settle(result.text, result.outcome)
        for caller in refused:
            caller.settle(refusal, Outcome.REFUSED)
        if following is not None:
            start(following.inner)

    def _drop_flight(self, run: _Run) -> None:
        if run.key is not None and self._flights.get(run.key) is run:
            del self._flights[run.key]

    def _keep(self, key: bytes | None, text: str) -> None:
        if self._cache is not None and key is not None and len(text) < MAX_CACHE_CHARS // 4:
            self._cache[key] = text


def argument_key(arguments: Mapping[str, Any]) -> bytes | None:
    """A digest of the arguments, equal for equal ones in whatever order they came. None where JSON cannot hold them."""
    try:
        text = msgspec.json.encode(arguments, order="sorted")
    except (TypeError, ValueError, RecursionError):
        return None
    return hashlib.sha256(text).digest()
