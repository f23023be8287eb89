"""How long calls of one tool last, with those that were cut short or are still running counted as censored."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence

WINDOW = 512  # calls remembered
FEW = 5  # returned calls below which history says nothing
REBUILD_SHARE = 16  # the curve is rebuilt once this part of the window is new


def _returns_first(call: tuple[float, bool]) -> tuple[float, bool]:
    return call[0], not call[1]


class SurvivalCurve:
    """Kaplan and Meier's estimate (JASA 53, 1958) over a window of calls.

    Beyond the last duration seen, calls are taken to last as long again as they have lasted: durations of tools have
    heavy tails, for which the mean of what is left grows with what has passed.
    """

    def __init__(self) -> None:
        self._calls: deque[tuple[float, bool]] = deque(maxlen=WINDOW)  # (seconds, whether it returned)
        self._num_new = 0
        self._times: list[float] = []  # of returns, ascending
        self._survival: list[float] = []  # [i]: share that lasts longer than times[i]
        self._area: list[float] = []  # [i]: integral of the survival curve from times[i] on

    def add(self, seconds: float, has_returned: bool) -> None:
        """A call is over."""
        self._calls.append((seconds, has_returned))
        self._num_new += 1

    @property
    def is_stale(self) -> bool:
        """Whether enough is new to rebuild the curve."""
        return self._num_new * REBUILD_SHARE >= len(self._calls) > 0

    def rebuild(self, in_flight: Sequence[float] = ()) -> None:
        """Draws the curve anew; `in_flight` are the seconds that running calls have taken so far."""
        self._num_new = 0
        # A call that was last seen at a moment when another returned had not returned by then: it comes after.
        seen = sorted([*self._calls, *((seconds, False) for seconds in in_flight)], key=_returns_first)
        times, survival, alive = [], [], 1.0
        for rank, (seconds, has_returned) in enumerate(seen):
            if has_returned:
                alive *= 1.0 - 1.0 / (len(seen) - rank)
                times.append(seconds)
                survival.append(alive)
        self._times, self._survival = times, survival
        if not times:
            self._area = []
            return
        area = alive * seen[-1][0] + alive * (seen[-1][0] - times[-1])
        areas = [area]
        for i in range(len(times) - 1, 0, -1):
            area += survival[i - 1] * (times[i] - times[i - 1])
            areas.append(area)
        self._area = areas[::-1]

    def mean_left(self, elapsed: float) -> float | None:
        """Mean seconds that a call lasts beyond `elapsed`; None where too few returned calls lasted longer."""
        index = bisect_right(self._times, elapsed)  # returns up to `elapsed`
        if len(self._times) - index < FEW:
            return None
        alive = self._survival[index - 1] if index else 1.0
        return (alive * (self._times[index] - elapsed) + self._area[index]) / alive
