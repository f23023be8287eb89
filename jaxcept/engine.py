"""The loop: schedule, submit, collect, update. Time, device and decisions are handed in."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from jaxcept.clock import Clock
from jaxcept.metrics import Ledger
from jaxcept.scheduler.costs import StepLoad
from jaxcept.scheduler.events import Event, Finished, FinishReason
from jaxcept.scheduler.plan import StepPlan, StepResult
from jaxcept.scheduler.request import Request
from jaxcept.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)


class Runner(Protocol):
    """Executes plans in the order in which they are submitted."""

    def submit(self, plan: StepPlan) -> None:
        """Starts a step; need not wait for it."""
        ...

    def collect(self) -> StepResult:
        """Waits for the oldest step that was submitted and not collected."""
        ...


class StepObserver(Protocol):
    """Learns what steps take."""

    def observe(self, load: StepLoad, seconds: float) -> None:
        """A step of this load took so long on the device."""
        ...

    @property
    def relative_error(self) -> float | None:
        """Median of |predicted - measured| / measured over the last steps; None before the first."""
        ...


class EngineDeadError(RuntimeError):
    """The device failed: this engine will not work again."""


class Engine:
    """One scheduler and one runner, in one thread.

    `pipeline_depth` steps stay submitted while the next one is planned: 0 waits for every step, 1 keeps the device
    busy while the host reads the last tokens.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        clock: Clock,
        ledger: Ledger,
        pipeline_depth: int = 1,
        costs: StepObserver | None = None,
    ) -> None:
        if pipeline_depth < 0:
            raise ValueError(f"pipeline_depth={pipeline_depth}: expected 0 or more")
        self.scheduler = scheduler
        self.runner = runner
        self.clock = clock
        self.ledger = ledger
        self.pipeline_depth = pipeline_depth
        self.costs = costs
        self._in_flight: deque[tuple[StepPlan, float]] = deque()  # with the time of submission
        self._last_collect = 0.0
        self._failure: BaseException | None = None

    @property
    def has_work(self) -> bool:
        """Whether `step` can make progress: not while every sequence waits for a tool, or there is none."""
        return bool(self._in_flight) or self.scheduler.has_work

    @property
    def is_dead(self) -> bool:
        """Whether the device failed."""
        return self._failure is not None

    @property
    def num_in_flight(self) -> int:
        """Steps submitted and not collected."""
        return len(self._in_flight)

    def add(self, request: Request) -> tuple[int, ...]:
        """Queues a request; returns the seq_ids of its completions. ValueError where it can never be served."""
        self._require_alive()
        return self.scheduler.add(request, self.clock.now())

    def follow(self, target: int | str, request: Request) -> tuple[int, Finished]:
        """A request that goes on with the context of an intercepted one. StateError or ValueError as Scheduler.follow
        says."""
        self._require_alive()
        now = self.clock.now()
        followed = self.scheduler.follow(target, request, now)
        self._observe(now)
        return followed

    def abort(self, request_id: str) -> bool:
        """Ends a request in whatever state; whether there was one. Its events come with the next step."""
        return self.end(request_id, FinishReason.ABORT)

    def end(self, target: int | str, reason: FinishReason) -> bool:
        """Ends a sequence (seq_id) or a request (request_id) for a reason of the caller's."""
        now = self.clock.now()
        found = self.scheduler.end(target, now, reason)
        self._observe(now)
        return found

    def resume(self, target: int | str, token_ids: Sequence[int], interception: int | None = None) -> None:
        """A tool's answer for an intercepted sequence. StateError or ValueError as Scheduler.resume says."""
        self._require_alive()
        now = self.clock.now()
        self.scheduler.resume(target, token_ids, now, interception)
        self._observe(now)

    def extend(self, target: int | str, token_ids: Sequence[int], interception: int | None = None) -> None:
        """A piece of an answer, or of a prompt, of which more is to come. StateError or ValueError as Scheduler.extend
        says."""
        self._require_alive()
        now = self.clock.now()
        self.scheduler.extend(target, token_ids, now, interception)
        self._observe(now)

    def fail(self, target: int | str, token_ids: Sequence[int] | None = None, interception: int | None = None) -> None:
        """A tool failed. StateError or ValueError as Scheduler.fail says."""
        self._require_alive()
        now = self.clock.now()
        self.scheduler.fail(target, now, token_ids, interception)
        self._observe(now)

    def room(self, target: int | str, interception: int | None = None) -> int:
        """Most ids that `resume` takes for an intercepted sequence."""
        return self.scheduler.room(target, interception)

    def next_deadline(self) -> float | None:
        """When `step` must be called though nothing else happens, seconds of the clock; None: never."""
        return self.scheduler.next_deadline(self.clock.now())

    def metrics(self) -> dict[str, float]:
        """Figures of the moment and totals since the start, by name; seconds, bytes, byte-seconds, tokens, blocks."""
        scheduler, counters, waste = self.scheduler, self.scheduler.counters, self.ledger.waste
        figures: dict[str, float] = {
            "num_running": scheduler.num_running,
            "num_waiting": scheduler.num_waiting,
            "num_waiting_tokens": scheduler.num_waiting_tokens,
            "num_intercepted": scheduler.num_intercepted,
            "held_blocks": scheduler.num_held_blocks,
            "held_host_blocks": scheduler.swaps.host.pool.num_held,
            "busy_s": self.ledger.busy_s,
            "waste_held": waste.held,
            "waste_recompute": waste.recompute,
        }
        figures |= {name: getattr(counters, name) for name in counters.__slots__ if name != "finished"}
        finished = list(counters.finished.items())  # other threads ask too
        figures |= {f"finished_{reason}": count for reason, count in finished}
        if self.costs is not None and self.costs.relative_error is not None:
            figures["step_prediction_error"] = self.costs.relative_error
        return figures

    def step(self) -> list[Event]:
        """Plans and submits a step, collects the oldest one where enough are in flight; returns what happened.

        A failing runner ends every sequence with reason "error"; later calls raise EngineDeadError.
        """
        self._require_alive()
        now = self.clock.now()
        plan = self.scheduler.schedule(now)
        self._observe(now)
        try:
            if plan is not None:
                self.runner.submit(plan)
                self._in_flight.append((plan, now))
            if not self._in_flight or (plan is not None and len(self._in_flight) <= self.pipeline_depth):
                return self.scheduler.drain()
            result = self.runner.collect()
        except Exception as error:
            return self._die(error)
        plan, submitted = self._in_flight.popleft()
        now = self.clock.now()
        self._charge(plan, submitted, now)
        events = self.scheduler.update(plan, result, now)
        self._observe(now)
        return events

    def _observe(self, now: float) -> None:
        self.ledger.observe(now, self.scheduler.num_held_blocks, self.scheduler.num_idle_blocks)

    def _charge(self, plan: StepPlan, submitted: float, now: float) -> None:
        seconds = now - max(submitted, self._last_collect)  # a step starts once the one before it is done
        self._last_collect = now
        if not plan.num_tokens:
            return  # it waited for a swap
        self.scheduler.observe_step(seconds)
        if self.costs is not None and not plan.waits_for_swaps:
            self.costs.observe(StepLoad.of(plan), seconds)
        num_recomputed = sum([chunk.num_recomputed for chunk in plan.chunks])
        self.ledger.charge_step(seconds, plan.num_tokens, num_recomputed)

    def _die(self, error: Exception) -> list[Event]:
        logger.error("the runner failed: every sequence ends", exc_info=error)
        self._failure = error
        self._in_flight.clear()
        self.scheduler.end_all(self.clock.now(), FinishReason.ERROR)
        return self.scheduler.drain()

    def _require_alive(self) -> None:
        if self._failure is not None:
            raise EngineDeadError(f"the engine is dead: its runner failed with {self._failure!r}") from self._failure
