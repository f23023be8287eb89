"""Hold what comes back soon; swap the rest behind the steps, and give up what the budget does not reach."""

from __future__ import annotations

from collections.abc import Sequence

from jaxcept.scheduler.costs import Costs
from jaxcept.scheduler.policies.base import PolicyBase, blocks_to_swap, hidden_blocks, swappable_blocks
from jaxcept.scheduler.policy import BatchView, InterceptedView, Placement, Traits


class Heuristic(PolicyBase):
    """The step of InferCept's ablation before min-waste: one threshold on how long a tool still takes, seconds."""

    def __init__(self, costs: Costs, threshold_s: float = 1.0) -> None:
        super().__init__("heuristic", Traits(prefix_caching=False, recompute_tokens=costs.saturation_tokens))
        self._costs = costs
        self._threshold_s = threshold_s

    def swap_budget(self, batch: BatchView) -> int | None:
        """What hides behind the step."""
        return hidden_blocks(self._costs, batch)

    def place(self, intercepted: Sequence[InterceptedView], batch: BatchView) -> Sequence[Placement]:
        """By the threshold; blocks that others hold too stay, for giving them up frees nothing."""
        budget = blocks_to_swap(batch)
        placements = []
        for view in intercepted:
            if view.remaining_s < self._threshold_s:
                placements.append(Placement(view.num_blocks))
                continue
            swap = min(budget, swappable_blocks(view, batch.block_size))
            budget -= swap
            placements.append(Placement(view.num_blocks - view.num_exclusive_blocks, swap))
        return placements
