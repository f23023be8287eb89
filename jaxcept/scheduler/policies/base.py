"""What most policies have in common: nothing moves, nothing is learnt, nobody needs to ask again."""

from __future__ import annotations

from jaxcept.scheduler.costs import Costs, StepLoad
from jaxcept.scheduler.interception import Interception
from jaxcept.scheduler.policy import BatchView, InterceptedView, Traits

IDLE_BLOCKS = 64  # that move in a step in which nothing runs, where they delay nobody


class PolicyBase:
    """Defaults for the methods of Policy but `place`."""

    def __init__(self, name: str, traits: Traits) -> None:
        self.name = name
        self.traits = traits

    def swap_budget(self, batch: BatchView) -> int | None:
        """Nothing moves for the sake of an interception."""
        return 0

    def next_change(self, now: float) -> float | None:
        """Never."""
        return None

    def learn(self, record: Interception) -> None:
        """Nothing."""


def hidden_blocks(costs: Costs, batch: BatchView) -> int:
    """The largest N with T_swap(N) <= T_fwd(B), in blocks (InferCept, arXiv 2402.01869): free behind this step."""
    if not batch.query_tokens:
        return IDLE_BLOCKS
    context = batch.running_tokens + batch.query_tokens
    seconds = costs.step_s(StepLoad(batch.query_tokens, context, context, max(1, batch.num_running)))
    return costs.hidden_tokens(seconds) // batch.block_size


def blocks_to_swap(batch: BatchView) -> int:
    """Blocks that budget and host have room for."""
    free = batch.num_available_host_blocks
    return free if batch.swap_budget is None else min(free, batch.swap_budget)


def swappable_blocks(view: InterceptedView, block_size: int) -> int:
    """The tail that this context alone holds; nothing where a part was given up in front of what is on the host.

    The context's last token may not be computed, and a block that is partly filled may not have been sent.
    """
    if view.num_host_blocks and view.num_blocks + view.num_host_blocks < (view.num_tokens - 1) // block_size:
        return 0
    return view.num_exclusive_blocks
