"""In which order the waiting are served: one protocol, four orders, each with a bound on starvation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from jaxcept.scheduler.policy import BatchView

STEP_TOKENS = 512  # known tokens that one step computes beside its decodes: the unit in which prefills count as steps
STARVATION_S = 30.0


class QueueView(NamedTuple):
    """One sequence, waiting or running."""

    seq_id: int
    arrival: float  # seconds
    queued_at: float  # when it last entered the queue, seconds
    num_tokens: int  # known
    num_uncomputed: int  # of them to compute before the next draw
    num_host_tokens: int  # of them to load from the host
    num_generated: int
    num_returned: int  # ids that its last tool returned; 0 where it is new
    is_returned: bool  # whether it comes back from a tool
    served_tokens: int  # query tokens computed for it so far
    max_tokens_left: int | None
    tool: str | None  # of its last interception


class QueueOrder(Protocol):
    """Ranks a sequence when it enters the queue, and running ones where a better rank may take their place."""

    @property
    def name(self) -> str:
        """What users call it."""
        ...

    @property
    def is_arrival(self) -> bool:
        """Whether all ranks are equal, so that the original arrival decides."""
        ...

    @property
    def preempts(self) -> bool:
        """Whether a running sequence of a worse rank yields to a waiting one that does not fit."""
        ...

    @property
    def starvation_s(self) -> float:
        """Whoever has waited longer goes first, by arrival, and keeps its place from then on."""
        ...

    def rank(self, view: QueueView, batch: BatchView) -> float:
        """Less is served earlier."""
        ...

    def token_limit(self, batch: BatchView) -> int | None:
        """Most query tokens of the next step; None: what the configuration says."""
        ...

    def observe_step(self, seconds: float) -> None:
        """How long the last step took."""
        ...


class Fcfs:
    """First come, first served, by the original arrival: InferCept's order."""

    name = "fcfs"
    is_arrival = True
    preempts = False

    def __init__(self, starvation_s: float = STARVATION_S) -> None:
        self.starvation_s = starvation_s

    def rank(self, view: QueueView, batch: BatchView) -> float:
        """The same for all."""
        return 0.0

    def token_limit(self, batch: BatchView) -> int | None:
        """None."""
        return None

    def observe_step(self, seconds: float) -> None:
        """Not of interest."""


class Mlfq(Fcfs):
    """FastServe's skip-join multi-level feedback queue (arXiv 2305.05920).

    Level i serves `quantum` · 2^i steps. A new sequence joins the first level whose quantum holds all that it computes
    up to its first token, so that a long prompt does not hold up short ones; with the steps that it has had, a sequence
    sinks.
    """

    name = "mlfq"
    is_arrival = False
    preempts = True

    def __init__(self, starvation_s: float = STARVATION_S, quantum: int = 4) -> None:
        super().__init__(starvation_s)
        self._quantum = quantum

    def rank(self, view: QueueView, batch: BatchView) -> float:
        """The level."""
        first = view.num_uncomputed / STEP_TOKENS
        served = view.num_generated + (view.served_tokens - view.num_generated) / STEP_TOKENS
        level, quantum, reach = 0, float(self._quantum), float(self._quantum)
        while first > quantum or served > reach:
            level += 1
            quantum *= 2
            reach += quantum
        return float(level)


class MemoryTime(Fcfs):
    """LAMPS' order (arXiv 2410.18248): the least memory x time first, from here to the end, tokens x steps.

    The output still to come is what max_tokens leaves, at most `horizon`; the way back of the context counts too:
    what is recomputed fills up step by step, what was held or is loaded stands there at once.
    """

    name = "memory-time"
    is_arrival = False

    def __init__(self, starvation_s: float = STARVATION_S, horizon: int = 256) -> None:
        super().__init__(starvation_s)
        self._horizon = horizon

    def rank(self, view: QueueView, batch: BatchView) -> float:
        """The predicted area."""
        left = self._horizon if view.max_tokens_left is None else min(view.max_tokens_left, self._horizon)
        there = view.num_tokens - view.num_uncomputed
        back = view.num_uncomputed / STEP_TOKENS * (there + view.num_uncomputed / 2)
        return back + left * view.num_tokens + left * left / 2


class Value(Fcfs):
    """AugServe's order (arXiv 2512.04013): most value for its cost first, judged in two stages.

    A new sequence is judged by its prompt and the output that it may have; one that a tool returned to by what it
    really brought back, and it is worth more the more memory it holds while it waits. The most tokens of a step adapt
    to the objective for a step's time: down by a fifth where a step was too long, up by `grain` where it was not and
    there was more to compute.
    """

    name = "value"
    is_arrival = False

    def __init__(
        self, starvation_s: float = STARVATION_S, step_slo_s: float = 0.1, horizon: int = 256, grain: int = 32
    ) -> None:
        super().__init__(starvation_s)
        self._step_slo_s = step_slo_s
        self._horizon = horizon
        self._grain = grain
        self._limit: float | None = None
        self._is_late: bool | None = None

    def rank(self, view: QueueView, batch: BatchView) -> float:
        """Minus value for cost."""
        steps = view.num_uncomputed / STEP_TOKENS
        if view.is_returned:
            held = view.num_tokens - view.num_uncomputed - view.num_host_tokens
            return -(1.0 + held / view.num_tokens) / (1.0 + steps)
        left = self._horizon if view.max_tokens_left is None else min(view.max_tokens_left, self._horizon)
        return -1.0 / (1.0 + steps + left / self._horizon)

    def token_limit(self, batch: BatchView) -> int | None:
        """The adapted limit, never below what the running sequences need for a token each."""
        if self._limit is None:
            self._limit = float(batch.query_tokens) if self._is_late else None
        elif self._is_late is not None:
            if self._is_late:
                self._limit *= 0.8
            elif self._limit < batch.query_tokens:
                self._limit += self._grain
        self._is_late = None
        if self._limit is None:
            return None
        self._limit = max(self._limit, batch.num_running + self._grain)
        return int(self._limit)

    def observe_step(self, seconds: float) -> None:
        """Whether the step was too long."""
        self._is_late = seconds > self._step_slo_s


_FACTORIES: dict[str, Callable[[], QueueOrder]] = {
    "fcfs": Fcfs,
    "mlfq": Mlfq,
    "memory-time": MemoryTime,
    "value": Value,
}
ORDERS = tuple(_FACTORIES)


def make_order(name: str) -> QueueOrder:
    """A queue order by name. ValueError names those that there are."""
    if name not in _FACTORIES:
        raise ValueError(f"queue order {name!r}: expected one of {', '.join(ORDERS)}")
    return _FACTORIES[name]()
