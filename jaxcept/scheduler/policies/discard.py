"""Give everything up at once; with a prefix cache, that is an engine of today."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from jaxcept.scheduler.policies.base import PolicyBase
from jaxcept.scheduler.policy import BatchView, HostUse, InterceptedView, Placement, Traits


class Discard(PolicyBase):
    """Gives every context up at once; it is recomputed when its tool returns, as far as no cache remembers it."""

    def __init__(self, name: str = "discard", traits: Traits | None = None) -> None:
        traits = traits if traits is not None else Traits(host=HostUse.NONE)
        super().__init__(name, replace(traits, reconsiders=False))

    def swap_budget(self, batch: BatchView) -> int | None:
        """No limit: a second tier of the cache copies in and out as it comes."""
        return None

    def place(self, intercepted: Sequence[InterceptedView], batch: BatchView) -> Sequence[Placement]:
        """Keeps none."""
        return [Placement(0)] * len(intercepted)
