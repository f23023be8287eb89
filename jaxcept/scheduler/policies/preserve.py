"""Hold everything until the tool returns."""

from __future__ import annotations

from collections.abc import Sequence

from jaxcept.scheduler.policy import BatchView, HostUse, InterceptedView, Placement, Traits


class Preserve:
    """Holds every context until its tool returns."""

    name = "preserve"

    def __init__(self, prefix_caching: bool = True) -> None:
        self.traits = Traits(host=HostUse.NONE, prefix_caching=prefix_caching)

    def swap_budget(self, batch: BatchView) -> int | None:
        """Nothing moves."""
        return 0

    def place(self, intercepted: Sequence[InterceptedView], batch: BatchView) -> Sequence[Placement]:
        """Keeps all."""
        return [Placement(view.num_blocks) for view in intercepted]

    def next_change(self, now: float) -> float | None:
        """Never."""
        return None
