"""InferCept's policy (arXiv 2402.01869): whichever wastes least, decided again at every step, block by block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxcept.scheduler.costs import Costs
from jaxcept.scheduler.policies.base import PolicyBase, blocks_to_swap, hidden_blocks
from jaxcept.scheduler.policy import BatchView, InterceptedView, Placement, Traits
from jaxcept.scheduler.waste import chunked_discard_waste, num_chunks, preserve_waste


class _Choice(NamedTuple):
    """The lesser waste of one context if it is not swapped."""

    waste: float
    place: int  # among the views
    is_held: bool


class MinWaste(PolicyBase):
    """Swaps what would waste most, as far as the copies hide behind the step; the rest is held or given up.

    The paper weighs a context by what it wastes from now on: held, T_INT·C·M, with T_INT the estimate of the remaining
    time; given up, the two terms of chunked recompute. `spares` departs from it in two ways. While nobody waits for
    memory, giving up frees what nobody wants, so contexts are held (or swapped behind the step, which costs nothing).
    And a context whose tool is back before it could go out and come in is not swapped.
    """

    def __init__(
        self, costs: Costs, *, name: str = "min-waste", prefix_caching: bool = True, spares: bool = True
    ) -> None:
        super().__init__(name, Traits(prefix_caching=prefix_caching, recompute_tokens=costs.saturation_tokens))
        self.costs = costs
        self.spares = spares

    def swap_budget(self, batch: BatchView) -> int | None:
        """What hides behind the step."""
        return hidden_blocks(self.costs, batch)

    def place(self, intercepted: Sequence[InterceptedView], batch: BatchView) -> Sequence[Placement]:
        """In descending waste: swapped while the budget lasts, then held or given up."""
        budget = blocks_to_swap(batch)
        has_room = self.spares and not batch.num_waiting
        choices = [self._choose(place, view, batch, has_room) for place, view in enumerate(intercepted)]
        choices.sort(key=lambda choice: (-choice.waste, choice.place))
        placements = [Placement(0)] * len(intercepted)
        for choice in choices:
            view = intercepted[choice.place]
            swap = min(budget, view.num_exclusive_blocks) if self._is_worth_moving(view, choice, batch) else 0
            budget -= swap
            placements[choice.place] = Placement(view.num_blocks - swap if choice.is_held else 0, swap)
        return placements

    def _is_worth_moving(self, view: InterceptedView, choice: _Choice, batch: BatchView) -> bool:
        if choice.waste <= 0:
            return False
        num_tokens = view.num_exclusive_blocks * batch.block_size
        there_and_back = self.costs.swap_out_s(num_tokens) + self.costs.swap_in_s(num_tokens)
        return not self.spares or view.remaining_s > there_and_back

    def _choose(self, place: int, view: InterceptedView, batch: BatchView, has_room: bool) -> _Choice:
        own = min(view.num_computed, view.num_exclusive_blocks * batch.block_size)
        held = preserve_waste(self.costs, own, view.remaining_s)
        if has_room:
            return _Choice(held, place, True)
        chunks = num_chunks(self.costs, view.num_computed, batch.num_running)
        given_up = chunked_discard_waste(self.costs, view.num_computed, batch.running_tokens, chunks)
        return _Choice(min(held, given_up), place, held <= given_up)
