"""An interception: generation stopped at a trigger, something outside answered, generation went on."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum


class Outcome(StrEnum):
    """How an interception ended."""

    RETURNED = "returned"
    TIMEOUT = "timeout"
    FAILED = "failed"
    ABORTED = "aborted"


class Residency(StrEnum):
    """Where the context was when generation went on."""

    PRESERVED = "preserved"
    CACHED = "cached"  # not held, but found again in the prefix cache, but for less than a block
    SWAPPED = "swapped"  # what the device did not hold was on the host, but for less than a block
    DISCARDED = "discarded"
    MIXED = "mixed"  # a part was kept or swapped, a part given up


@dataclass(frozen=True, slots=True)
class Interception:
    """What one interception was and what it cost. Times in seconds of the engine's clock."""

    index: int  # 0 for the sequence's first
    tool: str
    started_at: float
    ended_at: float
    context_tokens: int  # known tokens when it began
    residency: Residency
    num_recomputed: int  # tokens whose KV was computed again because the context was given up
    num_returned: int
    num_cached_on_return: int  # tokens found in the prefix cache instead
    outcome: Outcome
    num_swapped: int = 0  # tokens whose KV came back from the host
    resumed_at: float | None = None  # when the sequence was admitted again; None where it never was
    num_computed: int = 0  # tokens whose KV was held when it began

    @property
    def queued_s(self) -> float:
        """Seconds between the answer and the step that took the sequence in again."""
        return 0.0 if self.resumed_at is None else self.resumed_at - self.ended_at

    @property
    def duration_s(self) -> float:
        """Seconds between the trigger and the answer."""
        return self.ended_at - self.started_at


@dataclass(slots=True)
class OpenInterception:
    """An interception from its trigger until its sequence computes again."""

    index: int
    tool: str
    payload: object | None
    started_at: float
    context_tokens: int
    num_computed: int  # tokens whose KV was held when it began
    block_size: int = 1
    deadline: float = math.inf  # when it times out
    is_hold: bool = False  # then the sequence ends, whatever the request's on_failure
    ended_at: float | None = None
    outcome: Outcome = Outcome.ABORTED
    num_returned: int = 0

    def close(self, now: float, num_kept: int, num_swapped: int = 0) -> Interception:
        """The record of one that never went on, given how many computed tokens are held on the device and the host."""
        ended_at = now if self.ended_at is None else self.ended_at
        return Interception(
            index=self.index,
            tool=self.tool,
            started_at=self.started_at,
            ended_at=ended_at,
            context_tokens=self.context_tokens,
            residency=self._residency(num_kept, num_swapped, 0),
            num_recomputed=0,
            num_returned=self.num_returned,
            num_cached_on_return=0,
            outcome=self.outcome,
            num_swapped=num_swapped,
            num_computed=self.num_computed,
        )

    def resume(self, now: float, num_kept: int, num_swapped: int, num_recomputed: int, num_cached: int) -> Interception:
        """The record of one whose sequence goes on."""
        return replace(
            self.close(now, num_kept, num_swapped),
            residency=self._residency(num_kept, num_swapped, num_cached),
            num_recomputed=num_recomputed,
            num_cached_on_return=num_cached,
            resumed_at=now,
        )

    def _residency(self, num_kept: int, num_swapped: int, num_cached: int) -> Residency:
        if num_kept >= self.num_computed and num_kept > 0:
            return Residency.PRESERVED
        if num_kept + num_swapped + num_cached > self.num_computed - self.block_size:
            return Residency.SWAPPED if num_swapped else Residency.CACHED
        return Residency.MIXED if num_kept or num_swapped or num_cached else Residency.DISCARDED
