"""What passes between the model's text, the toolbox and the engine: calls, calls gone wrong, results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A complete call that the model wrote. `raw` is its text in the stream, markup included."""

    id: str
    name: str
    arguments: Mapping[str, Any]
    raw: str = ""


@dataclass(frozen=True, slots=True)
class MalformedCall:
    """Markup of a call that cannot be run. `reason` is a sentence for the model; `name` a guess, "" where none is."""

    id: str
    name: str
    raw: str = field(repr=False)
    reason: str

    @property
    def arguments(self) -> Mapping[str, Any]:
        """Always empty: lets a malformed call stand where a call is expected."""
        return {}


ParsedCall = ToolCall | MalformedCall


class Outcome(StrEnum):
    """How a call ended. FAILED and TIMEOUT say that the tool is broken, ERROR only that this call asked amiss."""

    ANSWERED = "answered"
    CACHED = "cached"
    ERROR = "error"
    FAILED = "failed"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"
    REFUSED = "refused"  # it never ran: no such tool, wrong arguments, the tool's breaker is open

    @property
    def is_error(self) -> bool:
        """Whether the model is told of an error."""
        return self not in (Outcome.ANSWERED, Outcome.CACHED)


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What came of a call, as text for the model. Times are in seconds of the toolbox's clock.

    `started_s` is when the call was submitted, `duration_s` includes any wait for a free thread.
    """

    call: ParsedCall
    text: str
    is_error: bool
    started_s: float
    duration_s: float
    outcome: Outcome = Outcome.ANSWERED


MakeId = Callable[[], str]


class CountedIds:
    """Ids call00000, call00001, …: nine letters and digits, which is what the strictest templates ask for."""

    __slots__ = ("_count",)

    def __init__(self) -> None:
        self._count = 0

    def __call__(self) -> str:
        """The next id."""
        name = f"call{self._count:05d}"
        self._count += 1
        return name
