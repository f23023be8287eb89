"""Continuum's rule (arXiv 2511.02230): pin a context for a time to live, then leave it to the prefix cache."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Sequence

from jaxcept.scheduler.costs import Costs
from jaxcept.scheduler.interception import Interception, Outcome
from jaxcept.scheduler.policies.base import PolicyBase
from jaxcept.scheduler.policy import BatchView, HostUse, InterceptedView, Placement, Traits
from jaxcept.scheduler.waste import num_chunks

WINDOW = 512  # durations remembered of each tool
FEW = 4  # durations below which a tool is unknown
DELAY_WEIGHT = 0.05  # of a new queueing delay in the running mean


class _Durations:
    """The last durations of one tool, in order of size."""

    def __init__(self) -> None:
        self.ordered: list[float] = []
        self._recent: deque[float] = deque()

    def add(self, seconds: float) -> None:
        insort(self.ordered, seconds)
        self._recent.append(seconds)
        if len(self._recent) > WINDOW:
            del self.ordered[bisect_right(self.ordered, self._recent.popleft()) - 1]


class Ttl(PolicyBase):
    """Pins for the time to live t that maximises P(tool returns within t) · (queueing delay + reload cost) - t.

    P is the tool's own distribution so far. Of a tool that is unknown a context is pinned for as long as its reload
    costs, which is never worse than twice the best choice (the ski rental rule).
    """

    def __init__(self, costs: Costs) -> None:
        super().__init__("ttl", Traits(host=HostUse.NONE))
        self._costs = costs
        self._durations: dict[str, _Durations] = {}
        self._queueing_s = 0.0
        self._pins: dict[int, tuple[float, float]] = {}  # seq_id → (since, until)

    def learn(self, record: Interception) -> None:
        """A tool's duration, and the queueing delay of a context that was not pinned any more."""
        if record.outcome is Outcome.RETURNED:
            self._durations.setdefault(record.tool, _Durations()).add(record.duration_s)
        if record.num_recomputed or record.num_cached_on_return:
            self._queueing_s += DELAY_WEIGHT * (record.queued_s - self._queueing_s)

    def place(self, intercepted: Sequence[InterceptedView], batch: BatchView) -> Sequence[Placement]:
        """Keeps what is pinned."""
        pins = {}
        placements = []
        for view in intercepted:
            pin = self._pins.get(view.seq_id)
            if pin is None or pin[0] != view.since:
                pin = (view.since, view.since + self.time_to_live(view.tool, view.num_computed, batch.num_running))
            pins[view.seq_id] = pin
            placements.append(Placement(view.num_blocks if batch.now < pin[1] else 0))
        self._pins = pins
        return placements

    def next_change(self, now: float) -> float | None:
        """When the next pin ends."""
        return min((until for _, until in self._pins.values() if until > now), default=None)

    def time_to_live(self, tool: str, num_tokens: int, num_decodes: int) -> float:
        """Seconds to pin a context of num_tokens for."""
        chunks = num_chunks(self._costs, num_tokens, num_decodes)
        size = -(-num_tokens // chunks)
        reload_s = chunks * self._costs.forward_s(size, (num_tokens - size) // 2)  # the middle one: the mean of all
        known = self._durations.get(tool)
        if known is None or len(known.ordered) < FEW:
            return reload_s
        best, best_gain = 0.0, 0.0
        count = len(known.ordered)
        for rank, seconds in enumerate(known.ordered, start=1):
            gain = rank / count * (self._queueing_s + reload_s) - seconds
            if gain > best_gain:
                best, best_gain = seconds, gain
        return best * 1.001  # the tool must be back before the pin ends
