"""Plays a workload against an engine: arrivals in, tools that take their time, answers back. No threads.

The same loop runs in simulated and in real time; `wait_until` is what differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import NamedTuple

from jaxcept.clock import Clock
from jaxcept.engine import Engine
from jaxcept.metrics import Waste
from jaxcept.scheduler.durations import DurationEstimator
from jaxcept.scheduler.events import Event, Finished, Intercepted, Resumed, Tokens
from jaxcept.scheduler.request import Request
from jaxcept.simulator.workload import Job

SAMPLE_EVERY = 64  # steps between two looks at the estimator
RETRY_S = 1e-3  # after an idle step, how long a moment that is past waits

AnswerIds = Callable[[int, int], tuple[int, ...]]


class Outcome(NamedTuple):
    """What became of one request. Seconds of the engine's clock."""

    number: int  # of the job
    arrival: float
    first_token_at: float | None
    finished_at: float
    tool_s: float  # what its tools took, by the workload
    num_generated: int
    num_preemptions: int
    reason: str


@dataclass(slots=True)
class EstimatorError:
    """Sums over samples of interceptions under way, seconds."""

    num_samples: int = 0
    absolute_s: float = 0.0
    signed_s: float = 0.0  # above 0: estimated too long
    actual_s: float = 0.0


@dataclass(slots=True)
class Record:
    """What a replay saw."""

    outcomes: list[Outcome] = field(default_factory=list)
    queued_s: list[float] = field(default_factory=list)  # from a tool's return to the step that takes it in
    first_token_s: list[float] = field(default_factory=list)  # from a tool's return to the token after it
    estimator: EstimatorError = field(default_factory=EstimatorError)
    steps: int = 0
    stalled_block_s: float = 0.0  # blocks held while the device stood still for a swap, times seconds
    window_waste: Waste | None = None  # up to the last arrival
    window_stalled_block_s: float = 0.0


class Replay:
    """One workload on one engine.

    `requests` yields (job, request) in order of arrival, requests named by the job's number. `answer_ids(number,
    count)` are the ids that a tool returns. `wait_until` returns at the given time of the engine's clock, or never
    earlier than a moment after the call. `stall_s` gives the device's stall seconds so far.
    """

    def __init__(
        self,
        engine: Engine,
        clock: Clock,
        wait_until: Callable[[float], None],
        requests: Iterable[tuple[Job, Request]],
        answer_ids: AnswerIds,
        estimator: DurationEstimator,
        stall_s: Callable[[], float] = lambda: 0.0,
        on_finished: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.record = Record()
        self._engine = engine
        self._clock = clock
        self._wait_until = wait_until
        self._requests = iter(requests)
        self._answer_ids = answer_ids
        self._estimator = estimator
        self._stall_s = stall_s
        self._on_finished = on_finished
        self._next = next(self._requests, None)
        self._open: dict[str, tuple[int, Job]] = {}
        self._num_added = 0
        self._returns: list[tuple[float, int, str, int]] = []  # a heap of (due, seq_id, request_id, interception)
        self._waiting: dict[int, float] = {}  # seq_id → when its tool returns
        self._returned: dict[int, float] = {}  # seq_id → when its tool returned, until its next token
        self._stalled = 0.0

    def run(self) -> Record:
        """Until every request is finished."""
        while self._next is not None or self._open:
            self._deliver(self._clock.now())
            if self._engine.has_work and self._step():
                continue
            self._wait()
        while self._engine.has_work and self._step():
            pass  # steps still in flight, events not told
        return self.record

    def _deliver(self, now: float) -> None:
        """Arrivals and answers that are due."""
        while self._next is not None and (self._next[1].arrival or 0.0) <= now:
            job, request = self._next
            self._engine.add(request)
            self._open[request.request_id] = (self._num_added, job)
            self._num_added += 1
            self._next = next(self._requests, None)
            if self._next is None:
                self.record.window_waste = self._engine.ledger.waste
                self.record.window_stalled_block_s = self.record.stalled_block_s
        while self._returns and self._returns[0][0] <= now:
            due, seq_id, request_id, index = heappop(self._returns)
            if self._waiting.pop(seq_id, None) is None:
                continue  # the engine gave it up
            _, job = self._open[request_id]
            count = min(job.segments[index].num_returned, self._engine.room(seq_id))
            self._returned[seq_id] = due
            self._engine.resume(seq_id, self._answer_ids(seq_id, count), index)

    def _step(self) -> bool:
        """One step of the engine; whether anything came of it."""
        engine, counters = self._engine, self._engine.scheduler.counters
        before = (counters.steps, engine.num_in_flight)
        events = engine.step()
        stalled = self._stall_s()
        if stalled > self._stalled:
            self.record.stalled_block_s += (stalled - self._stalled) * engine.scheduler.num_held_blocks
            self._stalled = stalled
        for event in events:
            self._take(event)
        if counters.steps % SAMPLE_EVERY == 0 and self._waiting:
            self._sample(self._clock.now())
        self.record.steps = counters.steps
        return bool(events) or (counters.steps, engine.num_in_flight) != before

    def _take(self, event: Event) -> None:
        if isinstance(event, Tokens):
            if self._returned:
                for seq_id in [seq_id for seq_id in event.seq_ids if seq_id in self._returned]:
                    self.record.first_token_s.append(event.at - self._returned.pop(seq_id))
        elif isinstance(event, Intercepted):
            _, job = self._open[event.request_id]
            due = event.at + job.segments[event.interception].duration_s
            self._waiting[event.seq_id] = due
            heappush(self._returns, (due, event.seq_id, event.request_id, event.interception))
        elif isinstance(event, Resumed):
            _, job = self._open[event.request_id]
            record = event.interception
            assert record.resumed_at is not None, f"sequence {event.seq_id} goes on, but never did"
            returned_at = record.started_at + job.segments[record.index].duration_s
            self.record.queued_s.append(record.resumed_at - returned_at)
        elif isinstance(event, Finished):
            self._finish(event)

    def _finish(self, event: Finished) -> None:
        number, job = self._open.pop(event.request_id)
        self._waiting.pop(event.seq_id, None)
        self._returned.pop(event.seq_id, None)
        self.record.outcomes.append(
            Outcome(
                number=number,
                arrival=event.timing.arrival,
                first_token_at=event.timing.first_token_at,
                finished_at=event.timing.finished_at,
                tool_s=sum([job.segments[record.index].duration_s for record in event.interceptions]),
                num_generated=event.num_generated,
                num_preemptions=event.num_preemptions,
                reason=event.reason.value,
            )
        )
        self._on_finished(len(self.record.outcomes))

    def _sample(self, now: float) -> None:
        """How far the estimator is off for those that wait, whose return is known here."""
        error = self.record.estimator
        for seq_id, due in self._waiting.items():
            if due <= now:
                continue
            actual, estimate = due - now, self._estimator.remaining(seq_id, now)
            error.num_samples += 1
            error.absolute_s += abs(estimate - actual)
            error.signed_s += estimate - actual
            error.actual_s += actual

    def _wait(self) -> None:
        """Nothing can be computed: on to the next arrival, answer or deadline."""
        now = self._clock.now()
        due = [self._returns[0][0]] if self._returns else []
        if self._next is not None:
            due.append(self._next[1].arrival or 0.0)
        deadline = self._engine.next_deadline()
        if deadline is not None:
            deadline = max(deadline, now + RETRY_S)
        moment = min(due, default=None)
        if moment is None and deadline is None:
            raise RuntimeError(f"the engine is stuck with {len(self._open)} requests and nothing to wait for")
        if moment is not None and (deadline is None or moment <= deadline):
            self._wait_until(moment)
        elif deadline is not None:
            self._wait_until(deadline)
            self._step()
