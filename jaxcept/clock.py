"""Time, handed in: seconds that never go back."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Seconds since some fixed moment."""

    def now(self) -> float:
        """Never less than before."""
        ...


class MonotonicClock:
    """The machine's clock."""

    def now(self) -> float:
        """Seconds, by the system's monotonic clock."""
        return time.monotonic()


class VirtualClock:
    """A clock that moves only when it is told to, for simulation and tests."""

    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def now(self) -> float:
        """Seconds."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Moves forward by this much."""
        if seconds < 0:
            raise ValueError(f"seconds={seconds}: expected 0 or more, time does not go back")
        self._now += seconds

    def advance_to(self, moment: float) -> None:
        """Moves forward to this moment; where it is past already, nothing happens."""
        self._now = max(self._now, moment)
