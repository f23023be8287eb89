"""How long a tool will still take: what the scheduler asks of an estimator."""

from __future__ import annotations

from typing import Protocol


class DurationEstimator(Protocol):
    """Sees every interception begin and end, and guesses at those in between. Times: seconds of the engine's clock."""

    @property
    def name(self) -> str:
        """What users call it."""
        ...

    def begin(self, seq_id: int, tool: str, now: float, expected_s: float | None, actual_s: float | None) -> None:
        """A sequence waits for a tool. `expected_s` is a client's hint for the whole wait; `actual_s` is the truth,
        known in replays alone and for the oracle alone."""
        ...

    def end(self, seq_id: int, now: float, has_returned: bool) -> None:
        """It waits no longer; without a return (abort, timeout, failure) the wait was cut short."""
        ...

    def remaining(self, seq_id: int, now: float) -> float:
        """Estimate of the seconds until the tool returns, 0 or more."""
        ...


class Elapsed:
    """It will take as long again as it has taken (InferCept, arXiv 2402.01869, section 4.4); a hint overrides."""

    name = "elapsed"

    def __init__(self) -> None:
        self._open: dict[int, tuple[float, float | None]] = {}

    def begin(self, seq_id: int, tool: str, now: float, expected_s: float | None, actual_s: float | None) -> None:
        """Remembers when."""
        self._open[seq_id] = (now, expected_s)

    def end(self, seq_id: int, now: float, has_returned: bool) -> None:
        """Forgets it."""
        del self._open[seq_id]

    def remaining(self, seq_id: int, now: float) -> float:
        """The hint's rest while it lasts, else what has elapsed."""
        since, expected_s = self._open[seq_id]
        elapsed = now - since
        if expected_s is not None and expected_s > elapsed:
            return expected_s - elapsed
        return elapsed
