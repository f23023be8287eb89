"""InferCept's policy (arXiv 2402.01869): whichever wastes least, decided again at every step, block by block."""

from __future__ import annotations

from collections.abc import Sequence

from jaxcept.scheduler.costs import Costs
from jaxcept.scheduler.policies.base import PolicyBase, blocks_to_swap, hidden_blocks, swappable_blocks
from jaxcept.scheduler.policy import BatchView, InterceptedView, Placement, Traits
from jaxcept.scheduler.waste import chunked_discard_waste, num_chunks, preserve_waste

HEAD_START_S = 300.0  # for agents whose turns take minutes: with less, everybody begins and few end
COSTLY_SHARE = 0.2  # of the shortest step, by which a block of tokens may prolong it and still count as little


class MinWaste(PolicyBase):
    """Swaps what would waste most, as far as the copies hide behind the step; the rest is held or given up.

    The paper weighs a context by what it wastes from now on: held, T_INT·C·M, with T_INT the estimate of the remaining
    time; given up, the two terms of chunked recompute. C are the tokens that this context alone holds on the device:
    giving up others frees nothing, so they stay, and a context without any of its own wastes nothing.

    With the prefix cache, what went out stays findable on the device until its block is needed, so that an early swap
    costs a tool that is back soon nothing. A block that is partly filled has no name in the cache; it is recomputed
    where that adds little to a step, as on a GPU, and swapped where every token counts, as on a CPU. Three departures
    from the paper can be turned off: while nobody waits for memory, giving up frees what nobody wants, so contexts are
    held (`spares`); what is recomputed or returned takes the step's whole token budget rather than S - decodes
    tokens (`saturates`); and a return goes before those who have come since its arrival by `head_start_s` at most, so
    that conversations which never end do not keep others out.
    """

    def __init__(
        self,
        costs: Costs,
        block_size: int = 16,
        *,
        name: str = "min-waste",
        prefix_caching: bool = True,
        spares: bool = True,
        saturates: bool = False,
        head_start_s: float = HEAD_START_S,
    ) -> None:
        limit = costs.saturation_tokens if saturates else None
        extra_s = costs.forward_s(block_size) - costs.forward_s(1)
        is_costly = extra_s > COSTLY_SHARE * costs.forward_s(1)
        swaps_partial = is_costly or not prefix_caching
        traits = Traits(
            prefix_caching=prefix_caching,
            recompute_tokens=limit,
            swaps_partial_blocks=swaps_partial,
            head_start_s=head_start_s,
        )
        super().__init__(name, traits)
        self.costs = costs
        self.spares = spares

    def swap_budget(self, batch: BatchView) -> int | None:
        """What hides behind the step."""
        return hidden_blocks(self.costs, batch)

    def place(self, intercepted: Sequence[InterceptedView], batch: BatchView) -> Sequence[Placement]:
        """In descending waste: swapped while the budget lasts, then held or given up."""
        budget = blocks_to_swap(batch)
        has_room = self.spares and not batch.num_waiting
        choices = []  # (minus the waste if it is not swapped, place among the views, whether it is held then)
        for place, view in enumerate(intercepted):
            waste, is_held = self._weigh(view, batch, has_room)
            choices.append((-waste, place, is_held))
        choices.sort()
        placements = [Placement(0)] * len(intercepted)
        for gain, place, is_held in choices:
            view = intercepted[place]
            swap = min(budget, swappable_blocks(view, batch.block_size)) if budget and gain < 0 else 0
            budget -= swap
            keep = view.num_blocks - (swap if is_held else view.num_exclusive_blocks)
            placements[place] = Placement(keep, swap)
        return placements

    def _weigh(self, view: InterceptedView, batch: BatchView, has_room: bool) -> tuple[float, bool]:
        """The lesser waste of one context if it is not swapped, and whether that is to hold it."""
        num_shared = (view.num_blocks - view.num_exclusive_blocks) * batch.block_size
        own = max(0, view.num_computed - num_shared)
        held = preserve_waste(self.costs, own, view.remaining_s)
        if has_room or not own:
            return held, True
        chunks = num_chunks(self.costs, own, batch.num_running)
        given_up = chunked_discard_waste(self.costs, own, batch.running_tokens, chunks)
        return (held, True) if held <= given_up else (given_up, False)
