"""How long a tool will still take: what the scheduler asks of an estimator."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple, Protocol

from jaxcept.scheduler.survival import SurvivalCurve

MAX_TOOLS = 1024  # tools whose history is kept: clients name tools as they like


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


class OpenCall(NamedTuple):
    """A call in flight."""

    tool: str
    since: float  # seconds
    expected_s: float | None
    actual_s: float | None


class Elapsed:
    """It will take as long again as it has taken (InferCept, arXiv 2402.01869); a hint overrides."""

    name = "elapsed"

    def __init__(self) -> None:
        self._open: dict[int, OpenCall] = {}

    def begin(self, seq_id: int, tool: str, now: float, expected_s: float | None, actual_s: float | None) -> None:
        """Remembers when."""
        self._open[seq_id] = OpenCall(tool, now, expected_s, actual_s)

    def end(self, seq_id: int, now: float, has_returned: bool) -> None:
        """Forgets it."""
        call = self._open.pop(seq_id)
        self._ended(call, now - call.since, has_returned)

    def remaining(self, seq_id: int, now: float) -> float:
        """The hint's rest while it lasts, else the guess."""
        call = self._open[seq_id]
        elapsed = now - call.since
        if call.expected_s is not None and call.expected_s > elapsed:
            return call.expected_s - elapsed
        return self._guess(call, elapsed, now)

    def _ended(self, call: OpenCall, seconds: float, has_returned: bool) -> None:
        """A call is over."""

    def _guess(self, call: OpenCall, elapsed: float, now: float) -> float:
        return elapsed


class Profile(Elapsed):
    """A table of mean durations by tool, seconds; past the mean, and for other tools, what has elapsed."""

    name = "profile"

    def __init__(self, means: Mapping[str, float]) -> None:
        super().__init__()
        self._means = dict(means)

    def _guess(self, call: OpenCall, elapsed: float, now: float) -> float:
        mean = self._means.get(call.tool, 0.0)
        return mean - elapsed if mean > elapsed else elapsed


class Oracle(Elapsed):
    """The truth, where a replay knows it."""

    name = "oracle"

    def remaining(self, seq_id: int, now: float) -> float:
        """The rest of the true duration; without one, the hint or what has elapsed."""
        call = self._open[seq_id]
        if call.actual_s is None:
            return super().remaining(seq_id, now)
        return max(0.0, call.actual_s - (now - call.since))


class Survival(Elapsed):
    """The mean of what is left, by each tool's own history.

    Kaplan and Meier's survival curve (JASA 53, 1958) of the last calls; calls in flight and calls cut short count as
    lasting longer than they have been seen to. Where fewer than `FEW` returned calls took longer than this one has
    taken, history says little, and the elapsed time decides. Of many tools the least recently used are forgotten.
    """

    name = "survival"

    def __init__(self) -> None:
        super().__init__()
        self._curves: OrderedDict[str, SurvivalCurve] = OrderedDict()

    def _ended(self, call: OpenCall, seconds: float, has_returned: bool) -> None:
        self._curves.setdefault(call.tool, SurvivalCurve()).add(seconds, has_returned)
        self._curves.move_to_end(call.tool)
        if len(self._curves) > MAX_TOOLS:
            self._curves.popitem(last=False)

    def _guess(self, call: OpenCall, elapsed: float, now: float) -> float:
        curve = self._curves.get(call.tool)
        if curve is None:
            return elapsed
        self._curves.move_to_end(call.tool)
        if curve.is_stale:
            curve.rebuild([now - other.since for other in self._open.values() if other.tool == call.tool])
        left = curve.mean_left(elapsed)
        return elapsed if left is None else left


ESTIMATORS = ("elapsed", "survival", "profile", "oracle")


def make_estimator(name: str, means: Mapping[str, float] | None = None) -> DurationEstimator:
    """An estimator by name; `means` is the table of "profile", seconds by tool. ValueError names those there are."""
    match name:
        case "elapsed":
            return Elapsed()
        case "survival":
            return Survival()
        case "profile":
            return Profile(means or {})
        case "oracle":
            return Oracle()
    raise ValueError(f"duration estimator {name!r}: expected one of {', '.join(ESTIMATORS)}")
