"""Give everything up at once; with a prefix cache, that is an engine of today."""

from __future__ import annotations

from collections.abc import Sequence

from jaxcept.scheduler.policy import BatchView, HostUse, InterceptedView, Placement, Traits


class Discard:
    """Gives every context up at once; it is recomputed when its tool returns, as far as no cache remembers it."""

    def __init__(
        self,
        name: str = "discard",
        traits: Traits = Traits(host=HostUse.NONE),  # noqa: B008  frozen
    ) -> None:
        self.name = name
        self.traits = traits

    def swap_budget(self, batch: BatchView) -> int | None:
        """Nothing is moved for the sake of an interception."""
        return 0

    def place(self, intercepted: Sequence[InterceptedView], batch: BatchView) -> Sequence[Placement]:
        """Keeps none."""
        return [Placement(0)] * len(intercepted)

    def next_change(self, now: float) -> float | None:
        """Never."""
        return None
