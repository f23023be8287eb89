"""A call on its way: whoever is first gives its result, once."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from jaxcept.tools.calls import Outcome, ParsedCall, ToolResult

logger = logging.getLogger(__name__)

Done = Callable[[ToolResult], None]


class PendingCall:
    """A submitted call. Its `done` is called once: with what the tool gave, a timeout, or a cancellation."""

    __slots__ = ("_clock", "_done", "_lock", "_release", "_started_s", "call", "outcome")

    def __init__(self, call: ParsedCall, done: Done, clock: Callable[[], float]) -> None:
        self.call = call
        self.outcome: Outcome | None = None
        self._done: Done | None = done
        self._clock = clock
        self._started_s = clock()
        self._lock = threading.Lock()
        self._release: list[Callable[[], object]] = []

    @property
    def is_settled(self) -> bool:
        """Whether a result was given."""
        return self.outcome is not None

    def cancel(self) -> bool:
        """Give the call up: its result is an error that says so. False if it had a result before."""
        return self.settle("error: Cancelled: the call was given up", Outcome.CANCELLED)

    def settle(self, text: str, outcome: Outcome) -> bool:
        """Give the result, unless there is one. What was kept for the call (a timer, a thread) is released."""
        with self._lock:
            if self._done is None:
                return False
            done, self._done = self._done, None
            release, self._release = self._release, []
            self.outcome = outcome
        for free in release:
            free()
        duration_s = self._clock() - self._started_s
        try:
            done(ToolResult(self.call, text, outcome.is_error, self._started_s, duration_s, outcome))
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
