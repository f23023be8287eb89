"""An interception: generation stopped at a trigger, something outside answered, generation went on."""

from __future__ import annotations

from dataclasses import dataclass
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
    DISCARDED = "discarded"
    MIXED = "mixed"  # the head was kept, the tail given up


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
    ended_at: float | None = None
    outcome: Outcome = Outcome.ABORTED
    num_returned: int = 0

    def close(self, now: float, num_kept: int, num_recomputed: int = 0, num_cached: int = 0) -> Interception:
        """The record, given how many computed tokens are still held."""
        if num_kept == 0:
            residency = Residency.DISCARDED
        else:
            residency = Residency.PRESERVED if num_kept >= self.num_computed else Residency.MIXED
        ended_at = now if self.ended_at is None else self.ended_at
        return Interception(
            index=self.index,
            tool=self.tool,
            started_at=self.started_at,
            ended_at=ended_at,
            context_tokens=self.context_tokens,
            residency=residency,
            num_recomputed=num_recomputed,
            num_returned=self.num_returned,
            num_cached_on_return=num_cached,
            outcome=self.outcome,
        )
