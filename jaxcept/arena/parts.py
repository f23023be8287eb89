"""Policies, queue orders and estimators by the names that users call them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from jaxcept.scheduler.costs import CostModel
from jaxcept.scheduler.durations import DurationEstimator, make_estimator
from jaxcept.scheduler.orders import QueueOrder, make_order
from jaxcept.scheduler.policies.catalog import make_policy
from jaxcept.scheduler.policy import Policy


class Parts(NamedTuple):
    """What decides, in one run."""

    policy: Policy
    order: QueueOrder
    estimator: DurationEstimator


def make_parts(
    policy: str,
    order: str,
    estimator: str,
    costs: CostModel,
    block_size: int,
    tool_means: Mapping[str, float] | None = None,
) -> Parts:
    """`tool_means`: mean seconds by tool, for the estimator "profile". ValueError for a name that there is not."""
    return Parts(make_policy(policy, costs, block_size), make_order(order), make_estimator(estimator, tool_means))
