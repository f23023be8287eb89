"""Hold everything until the tool returns."""

from __future__ import annotations

from collections.abc import Sequence

from jaxcept.scheduler.policies.base import PolicyBase
from jaxcept.scheduler.policy import BatchView, HostUse, InterceptedView, Placement, Traits


class Preserve(PolicyBase):
    """Holds every context until its tool returns."""

    def __init__(self, prefix_caching: bool = True) -> None:
        super().__init__("preserve", Traits(host=HostUse.NONE, prefix_caching=prefix_caching, reconsiders=False))

    def place(self, intercepted: Sequence[InterceptedView], batch: BatchView) -> Sequence[Placement]:
        """Keeps all."""
        return [Placement(view.num_blocks) for view in intercepted]
