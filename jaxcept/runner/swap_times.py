"""How long swaps take on the real device, and how much of that nobody waited for."""

from __future__ import annotations

import time
from collections.abc import Callable


class TransferTimeoutError(RuntimeError):
    """A transfer has not ended in a time in which any would."""


class SwapTimes:
    """Seconds of the links, each direction first come, first served, as far as polls see it.

    `busy_s`: a link was at work, both directions added up; a transfer counts until the poll that finds it over, so this
    is an upper bound. `waited_s`: somebody stood still for it.
    """

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self.busy_s = 0.0
        self.waited_s = 0.0
        self._limit_s = limit_s
        self._clock = clock
        self._free_at = {"out": 0.0, "in": 0.0}

    @property
    def hidden_s(self) -> float:
        """Seconds of the links for which nobody stood still."""
        return max(0.0, self.busy_s - self.waited_s)

    def now(self) -> float:
        """When something sets out."""
        return self._clock()

    def over(self, way: str, sent_at: float) -> None:
        """What set out then has arrived."""
        now = self._clock()
        self.busy_s += now - max(sent_at, self._free_at[way])
        self._free_at[way] = now

    def wait(self, is_over: Callable[[], bool], poll_s: float) -> None:
        """Asks again and again until it is over. TransferTimeoutError past the limit."""
        start = self._clock()
        while not is_over():
            if self._clock() - start > self._limit_s:
                raise TransferTimeoutError(f"a transfer between device and host has not ended in {self._limit_s:g} s")
            time.sleep(poll_s)
        self.waited_s += self._clock() - start
