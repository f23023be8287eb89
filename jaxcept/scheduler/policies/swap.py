"""Contexts that go to the host: all at once while the device waits, or as much as hides behind each step."""

from __future__ import annotations

from collections.abc import Sequence

from jaxcept.scheduler.costs import Costs
from jaxcept.scheduler.policies.base import PolicyBase, blocks_to_swap, hidden_blocks, swappable_blocks
from jaxcept.scheduler.policy import BatchView, InterceptedView, Placement, Traits


class Swap(PolicyBase):
    """Whole contexts out and back, while the device stands still; what the host has no room for is held."""

    def __init__(self) -> None:
        super().__init__("swap", Traits(prefix_caching=False, waits_for_swaps=True))

    def swap_budget(self, batch: BatchView) -> int | None:
        """No limit: the device waits however long it takes."""
        return None

    def place(self, intercepted: Sequence[InterceptedView], batch: BatchView) -> Sequence[Placement]:
        """Swaps all."""
        return [Placement(0, view.num_blocks) for view in intercepted]


class BudgetedSwap(PolicyBase):
    """As much as hides behind the step is swapped, earliest arrival first; the rest is given up at once."""

    def __init__(self, costs: Costs) -> None:
        super().__init__("budgeted-swap", Traits(prefix_caching=False, recompute_tokens=costs.saturation_tokens))
        self._costs = costs

    def swap_budget(self, batch: BatchView) -> int | None:
        """What hides behind the step."""
        return hidden_blocks(self._costs, batch)

    def place(self, intercepted: Sequence[InterceptedView], batch: BatchView) -> Sequence[Placement]:
        """Swaps or gives up; blocks that others hold too stay, for giving them up frees nothing."""
        budget = blocks_to_swap(batch)
        placements = []
        for view in intercepted:
            swap = min(budget, swappable_blocks(view, batch.block_size))
            budget -= swap
            placements.append(Placement(view.num_blocks - view.num_exclusive_blocks, swap))
        return placements
