"""What the engine tells its owner: values, in the order in which they happened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from jaxcept.scheduler.interception import Interception, Outcome
from jaxcept.scheduler.plan import TokenLogprobs


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    TOOL_TIMEOUT = "tool_timeout"
    TOOL_FAILED = "tool_failed"
    CONTINUED = "continued"  # a later request took over the context
    TOOL_LIMIT = "tool_limit"  # one more interception than the request allows
    ERROR = "error"  # the device or the sequence's watcher failed


class Tokens(NamedTuple):
    """The tokens that one step generated, as columns: token_ids[i] belongs to seq_ids[i]."""

    step_id: int
    seq_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: Mapping[int, TokenLogprobs]  # by seq_id, for the sequences that asked
    at: float


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """entries[i] is about prompt token i + 1; the first token has none. Sent once per request that asked."""

    request_id: str
    entries: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class Intercepted:
    """Generation stopped at a trigger: whoever owns the sequence runs the tool and calls `resume` or `fail`."""

    seq_id: int
    request_id: str
    index: int  # of the completion within its request
    tool: str
    payload: object | None
    interception: int  # 0 for the sequence's first
    at: float
    num_cached: int = 0  # prompt tokens found in the prefix cache
    earlier: tuple[Interception, ...] = ()


@dataclass(frozen=True, slots=True)
class Returned:
    """An interception is over, by an answer, a failure or a timeout; the sequence queues to go on."""

    seq_id: int
    request_id: str
    index: int
    interception: int
    outcome: Outcome
    num_returned: int
    at: float


@dataclass(frozen=True, slots=True)
class Resumed:
    """The sequence computes again: all that is known of the interception."""

    seq_id: int
    request_id: str
    index: int
    interception: Interception
    at: float


class Timing(NamedTuple):
    """When things happened to a sequence, seconds of the engine's clock; None where they never did."""

    arrival: float
    first_scheduled_at: float | None
    first_token_at: float | None
    finished_at: float
    intercepted_s: float  # spent waiting for tools


@dataclass(frozen=True, slots=True)
class Finished:
    """A sequence has ended: all its ids, and what it took."""

    seq_id: int
    request_id: str
    index: int
    reason: FinishReason
    stop_reason: int | str | None  # the stop token id of the client's or the stop string, where one ended it
    token_ids: tuple[int, ...]  # prompt, completion and returned ids, in order
    output_spans: tuple[tuple[int, int], ...]  # [start, stop) ranges of token_ids that the model generated
    num_prompt: int
    num_returned: int
    num_cached: int  # prompt tokens found in the prefix cache
    num_preemptions: int
    interceptions: tuple[Interception, ...]
    timing: Timing

    @property
    def num_generated(self) -> int:
        """Tokens that the model generated."""
        return len(self.token_ids) - self.num_prompt - self.num_returned


Event = Tokens | PromptLogprobs | Intercepted | Returned | Resumed | Finished
