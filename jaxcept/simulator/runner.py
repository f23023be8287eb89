"""A runner without a device: a step takes what the cost model says, and swaps run on a link of their own."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

from jaxcept.clock import VirtualClock
from jaxcept.scheduler.costs import CostModel, StepLoad
from jaxcept.scheduler.plan import ChunkKind, MoveKind, StepPlan, StepResult

_NONE: Mapping[int, object] = MappingProxyType({})


@dataclass(slots=True)
class DeviceUse:
    """Where the device's and the links' time went, seconds. A step's time is shared out by its query tokens."""

    decode_s: float = 0.0
    prefill_s: float = 0.0
    recompute_s: float = 0.0
    returned_s: float = 0.0
    stall_s: float = 0.0  # the device stood still for a swap although there was something to compute
    swap_wait_s: float = 0.0  # nothing could be computed before a swap was over
    swap_s: float = 0.0  # a link was busy, both directions added up
    hidden_s: float = 0.0  # of it, while the device computed
    swapped_out_tokens: int = 0
    swapped_in_tokens: int = 0

    @property
    def compute_s(self) -> float:
        """Seconds in which the device computed."""
        return self.decode_s + self.prefill_s + self.recompute_s + self.returned_s


@dataclass(slots=True)
class _Link:
    """One direction between device and host, first come, first served."""

    free_at: float = 0.0
    pending: deque[tuple[int, float, float]] = field(default_factory=deque)  # (step_id, begin, end)
    through: int | None = None  # the last step whose moves are known to be over

    def send(self, step_id: int, begin: float, seconds: float) -> float:
        """Queues the moves of a step, which may begin at `begin`; returns when they are over."""
        begin = max(begin, self.free_at)
        self.free_at = begin + seconds
        self.pending.append((step_id, begin, self.free_at))
        return self.free_at


class _Submitted(NamedTuple):
    """A step until its result is collected."""

    step_id: int
    num_drawn: int
    end: float  # when it is over
    computes: bool


class SimRunner:
    """Implements the engine's Runner on a virtual clock.

    The device runs steps one after the other in the order of submission, each as long as the cost model says. Blocks
    leave when their step begins, and set out for the device when their step is submitted, on one link per direction,
    beside the device's own work. `host_s` seconds pass on the clock for each submitted step: planning and launching.
    All tokens drawn are `token_id`.
    """

    def __init__(
        self, costs: CostModel, clock: VirtualClock, block_size: int, host_s: float = 0.0, token_id: int = 0
    ) -> None:
        if host_s < 0:
            raise ValueError(f"host_s={host_s}: expected seconds, 0 or more")
        self.use = DeviceUse()
        self._costs = costs
        self._clock = clock
        self._block_size = block_size
        self._host_s = host_s
        self._token_id = token_id
        self._free_at = 0.0  # when the device is done with all that was submitted
        self._outs, self._ins = _Link(), _Link()
        self._submitted: deque[_Submitted] = deque()
        self._busy: deque[tuple[float, float]] = deque()  # when the device computed, as far back as a swap needs it

    def submit(self, plan: StepPlan) -> None:
        """Fixes when the step will be over."""
        self._clock.advance(self._host_s)
        now = self._clock.now()
        begin = max(now, self._free_at)
        swaps_end = self._send(plan, now, begin) if plan.moves else begin
        load = StepLoad.of(plan)
        if not load.query_tokens:
            self._submitted.append(_Submitted(plan.step_id, 0, begin, computes=False))
            return
        if plan.waits_for_swaps and swaps_end > begin:
            self.use.stall_s += swaps_end - begin
            begin = swaps_end
        seconds = self._costs.step_s(load)
        self._share_out(plan, load.query_tokens, seconds)
        self._free_at = begin + seconds
        self._busy.append((begin, self._free_at))
        num_drawn = len(plan.decodes.rows) + sum([chunk.num_draws for chunk in plan.chunks])
        self._submitted.append(_Submitted(plan.step_id, num_drawn, self._free_at, computes=True))

    def collect(self) -> StepResult:
        """Moves the clock to the end of the oldest step; one without tokens ends with the next swap, if any."""
        step_id, num_drawn, end, computes = self._submitted.popleft()
        if not computes:
            end = self._wait_for_swap(max(end, self._clock.now()))
        self._clock.advance_to(end)
        now = self._clock.now()
        for link in (self._outs, self._ins):
            while link.pending and link.pending[0][2] <= now:
                link.through, sent_at, arrived_at = link.pending.popleft()
                self.use.hidden_s += self._overlap(sent_at, arrived_at)
        self._forget()
        return StepResult(
            step_id=step_id,
            token_ids=_repeated(self._token_id, num_drawn),
            logprobs=_NONE,  # type: ignore[arg-type]  # empty
            prompt_logprobs=_NONE,  # type: ignore[arg-type]  # empty
            outs_through=self._outs.through,
            ins_through=self._ins.through,
        )

    def _send(self, plan: StepPlan, now: float, begin: float) -> float:
        """Starts the plan's swaps; returns when the last of them is over."""
        kinds = [move.kind for move in plan.moves]
        num_out = kinds.count(MoveKind.SWAP_OUT) * self._block_size
        num_in = kinds.count(MoveKind.SWAP_IN) * self._block_size
        end = begin
        if num_out:
            seconds = self._costs.swap_out_s(num_out)
            end = self._outs.send(plan.step_id, begin, seconds)
            self.use.swap_s += seconds
            self.use.swapped_out_tokens += num_out
        if num_in:
            seconds = self._costs.swap_in_s(num_in)
            end = max(end, self._ins.send(plan.step_id, now, seconds))
            self.use.swap_s += seconds
            self.use.swapped_in_tokens += num_in
        return end

    def _share_out(self, plan: StepPlan, num_tokens: int, seconds: float) -> None:
        use, per_token = self.use, seconds / num_tokens
        use.decode_s += per_token * len(plan.decodes.rows)
        for chunk in plan.chunks:
            num_first = len(chunk.token_ids) - chunk.num_recomputed
            use.recompute_s += per_token * chunk.num_recomputed
            if chunk.kind is ChunkKind.PREFILL:
                use.prefill_s += per_token * num_first
            elif chunk.kind is ChunkKind.DRAFT:
                use.decode_s += per_token * num_first
            else:
                use.returned_s += per_token * num_first

    def _wait_for_swap(self, begin: float) -> float:
        """When a step without tokens that begins at this moment is over."""
        ends = [link.pending[0][2] for link in (self._outs, self._ins) if link.pending]
        end = max(begin, min(ends, default=begin))
        self.use.swap_wait_s += max(0.0, end - max(begin, self._free_at))
        return end

    def _overlap(self, begin: float, end: float) -> float:
        """Seconds of this interval in which the device computed."""
        return sum([max(0.0, min(end, e) - max(begin, b)) for b, e in self._busy])

    def _forget(self) -> None:
        """Drops the device's past before the oldest swap under way."""
        horizon = min([self._clock.now(), *[link.pending[0][1] for link in (self._outs, self._ins) if link.pending]])
        while self._busy and self._busy[0][1] <= horizon:
            self._busy.popleft()


@lru_cache(maxsize=4096)
def _repeated(token_id: int, count: int) -> tuple[int, ...]:
    return (token_id,) * count
