"""Histograms and bounded label names: plain numbers, cheap enough to be kept by the engine's thread."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

# Bounds that dashboards for vLLM draw, seconds and tokens.
TTFT_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
TOKEN_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
STEP_TOKENS = (1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0)
TOOL_S = (
    0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0,
)  # fmt: skip


def token_bounds(limit: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50, … up to the limit, as vLLM bounds lengths of requests."""
    bounds: list[float] = []
    power = 1
    while True:
        for digit in (1, 2, 5):
            if digit * power > limit:
                return tuple(bounds)
            bounds.append(float(digit * power))
        power *= 10


class Histogram:
    """Counts by upper bound, bounds included."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """The value was seen so many times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    @property
    def count(self) -> int:
        """Values seen."""
        return sum(self.counts)

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper bound, values up to it), as Prometheus writes them; the last bound is +Inf."""
        found, pairs = 0, []
        for bound, count in zip((*self.bounds, None), self.counts, strict=True):
            found += count
            pairs.append(("+Inf" if bound is None else repr(float(bound)), float(found)))
        return pairs


class Names:
    """Label values from outside: the first `limit` different ones stay what they are, all others are "other"."""

    def __init__(self, limit: int = 64, max_length: int = 64) -> None:
        self._limit = limit
        self._max_length = max_length
        self._known: set[str] = set()

    def label(self, name: str) -> str:
        """The label of a name: cut to the length allowed, without control characters."""
        label = "".join([char if char.isprintable() else "?" for char in name[: self._max_length]]) or "unnamed"
        if label not in self._known:
            if len(self._known) >= self._limit:
                return "other"
            self._known.add(label)
        return label
