"""The policies by the names that users call them."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

from jaxcept.scheduler.costs import Costs
from jaxcept.scheduler.policies.discard import Discard
from jaxcept.scheduler.policies.heuristic import Heuristic
from jaxcept.scheduler.policies.min_waste import MinWaste
from jaxcept.scheduler.policies.preserve import Preserve
from jaxcept.scheduler.policies.swap import BudgetedSwap, Swap
from jaxcept.scheduler.policies.ttl import Ttl
from jaxcept.scheduler.policy import HostUse, Policy, Traits

NO_HOST = HostUse.NONE
# An engine of 2023 frees at the call and queues the resumed request as a new one; one of today has a prefix cache
# and, in some, a tier of it on the host, but knows no more of tools. A context that waits at its arrival's place, a
# recompute in chunks, swaps behind the steps and a held short call are the steps of InferCept's ablation.
_FACTORIES: dict[str, Callable[[Costs, int], Policy]] = {
    "discard": lambda costs, block_size: Discard(
        "discard", Traits(host=NO_HOST, prefix_caching=False, head_start_s=0.0)
    ),
    "discard-ordered": lambda costs, block_size: Discard("discard-ordered", Traits(host=NO_HOST, prefix_caching=False)),
    "chunked": lambda costs, block_size: Discard(
        "chunked", Traits(host=NO_HOST, prefix_caching=False, recompute_tokens=costs.saturation_tokens)
    ),
    "budgeted-swap": lambda costs, block_size: BudgetedSwap(costs),
    "heuristic": lambda costs, block_size: Heuristic(costs),
    "min-waste-paper": lambda costs, block_size: MinWaste(
        costs, name="min-waste-paper", prefix_caching=False, spares=False, saturates=True, head_start_s=inf
    ),
    "preserve": lambda costs, block_size: Preserve(),
    "swap": lambda costs, block_size: Swap(),
    "prefix-lru": lambda costs, block_size: Discard("prefix-lru", Traits(host=NO_HOST, head_start_s=0.0)),
    "prefix-lru-offload": lambda costs, block_size: Discard(
        "prefix-lru-offload", Traits(host=HostUse.CACHE, head_start_s=0.0)
    ),
    "ttl": lambda costs, block_size: Ttl(costs),
    "min-waste": MinWaste,
}
POLICIES = tuple(_FACTORIES)
SWAPPING = ("budgeted-swap", "heuristic", "min-waste-paper", "swap", "prefix-lru-offload", "min-waste")  # use the host
ABLATION = ("discard", "discard-ordered", "chunked", "budgeted-swap", "heuristic", "min-waste-paper")


def make_policy(name: str, costs: Costs, block_size: int = 16) -> Policy:
    """A policy of its own. ValueError names those that there are."""
    if name not in _FACTORIES:
        raise ValueError(f"intercept policy {name!r}: expected one of {', '.join(POLICIES)}")
    return _FACTORIES[name](costs, block_size)
