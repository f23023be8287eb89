"""What each policy decides, worked by hand, and what every policy keeps to."""

import random
from collections.abc import Callable
from dataclasses import replace
from math import inf

import pytest

from jaxcept.scheduler.interception import Interception, Outcome, Residency
from jaxcept.scheduler.policies.base import IDLE_BLOCKS, hidden_blocks
from jaxcept.scheduler.policies.catalog import ABLATION, POLICIES, SWAPPING, make_policy
from jaxcept.scheduler.policies.heuristic import Heuristic
from jaxcept.scheduler.policies.min_waste import MinWaste
from jaxcept.scheduler.policies.ttl import Ttl
from jaxcept.scheduler.policy import BatchView, HostUse, InterceptedView, Placement
from jaxcept.scheduler.refined_costs import RefinedCosts
from tests.costs import FULL, HAND

SIZE = 100  # tokens of a block
BATCH = BatchView(
    now=10.0,
    block_size=SIZE,
    num_blocks=200,
    num_available_blocks=20,
    num_available_host_blocks=1000,
    num_running=4,
    running_tokens=4000,
    num_waiting=3,
    waiting_tokens=396,
    query_tokens=400,
)


def view(seq_id: int, num_tokens: int, remaining_s: float, shared: int = 0, on_host: int = 0) -> InterceptedView:
    """A context with num_tokens computed on the device."""
    num_blocks = -(-num_tokens // SIZE)
    return InterceptedView(
        seq_id=seq_id,
        arrival=float(seq_id),
        tool="tool",
        since=9.0,
        elapsed=1.0,
        remaining_s=remaining_s,
        num_tokens=num_tokens + on_host * SIZE,
        num_computed=num_tokens,
        num_blocks=num_blocks,
        num_exclusive_blocks=num_blocks - shared,
        num_host_blocks=on_host,
    )


def paper() -> MinWaste:
    """The paper's rule, without departures."""
    return MinWaste(HAND, spares=False, prefix_caching=False)


def test_one_iteration_of_the_paper_by_hand():
    """T_fwd(n) = 10 ms + 0.05 ms · n, T_swap(n) = 0.02 ms · n, M = 1,000, S = 404, 4 decodes: chunks of 400.

    Budget: T_fwd(400) = 30 ms, in which 1,500 tokens or 15 blocks move.
    A, 1200 tokens, 2 s:   held 2,400,000; given up 42,000 + 3 · 0.03 · 4,000,000 = 402,000 → 402,000
    B, 1200 tokens, 0.1 s: held 120,000;   given up 402,000                                 → 120,000
    C, 400 tokens, 5 s:    held 2,000,000; given up 6,000 + 0.03 · 4,000,000 = 126,000      → 126,000
    D, 800 tokens, 0.2 s:  held 160,000;   given up 20,000 + 2 · 0.03 · 4,000,000 = 260,000 → 160,000
    In descending waste A, D, C, B: A goes out whole (12 blocks), of D the last 3, and 5 are held. C is given up.
    """
    policy = paper()
    budget = policy.swap_budget(BATCH)
    assert budget == 15
    views = [view(0, 1200, 2.0), view(1, 1200, 0.1), view(2, 400, 5.0), view(3, 800, 0.2)]
    placed = policy.place(views, BATCH._replace(swap_budget=budget))
    assert placed == [Placement(0, 12), Placement(12), Placement(0), Placement(5, 3)]

    # A step later B and D are left. D, 500 tokens: held 100,000; given up 8,750 + 2 · 0.0225 · 4,000,000 = 188,750.
    # B wastes more, 120,000: it goes out, 12 blocks, and of D 3 more.
    views = [view(1, 1200, 0.1), view(3, 500, 0.2, on_host=3)]
    assert policy.place(views, BATCH._replace(swap_budget=15)) == [Placement(0, 12), Placement(2, 3)]


def test_the_rest_of_a_context_that_is_partly_swapped_may_be_given_up():
    # 1200 tokens, 2 s: given up wastes less than held. 5 blocks go out, the head is recomputed.
    assert paper().place([view(0, 1200, 2.0)], BATCH._replace(swap_budget=5)) == [Placement(0, 5)]


def test_the_host_bounds_what_goes_out():
    full = BATCH._replace(swap_budget=15, num_available_host_blocks=2)
    assert paper().place([view(0, 1200, 0.1)], full) == [Placement(10, 2)]


def test_what_others_hold_too_costs_nothing_to_hold():
    budget = BATCH._replace(swap_budget=15)
    assert paper().place([view(0, 1200, 100.0, shared=12)], budget) == [Placement(12)]
    # Of 1200 tokens 400 are its own: held 40,000,000 for 100 s, so given up, but for the 8 blocks that others hold.
    assert paper().place([view(0, 1200, 100.0, shared=8)], BATCH._replace(swap_budget=0)) == [Placement(8)]
    assert paper().place([view(0, 1200, 100.0, shared=8)], budget) == [Placement(8, 4)]


def test_nothing_goes_out_in_front_of_a_gap():
    """4 blocks on the device, 3 on the host, 3 given up between them."""
    gap = view(0, 400, 0.2, on_host=3)._replace(num_tokens=1000)
    whole = view(1, 400, 0.1)
    placed = paper().place([gap, whole], BATCH._replace(swap_budget=4))
    assert placed == [Placement(4), Placement(0, 4)], "the budget is left to those that can use it"


def test_without_anyone_waiting_min_waste_holds_what_the_paper_gives_up():
    views, alone = [view(0, 1200, 50.0)], BATCH._replace(num_waiting=0, swap_budget=0)
    assert paper().place(views, alone) == [Placement(0)]
    assert MinWaste(HAND).place(views, alone) == [Placement(12)]
    assert MinWaste(HAND).place(views, alone._replace(num_waiting=1)) == [Placement(0)]


def test_the_budget_hides_behind_the_step():
    assert hidden_blocks(HAND, BATCH) == 15
    # T_fwd(4) = 10.2 ms, in which 510 tokens move.
    assert hidden_blocks(HAND, BATCH._replace(query_tokens=4)) == 5
    assert hidden_blocks(HAND, BATCH._replace(query_tokens=0)) == IDLE_BLOCKS
    assert hidden_blocks(replace(HAND, swap_in_token_s=0.00004), BATCH) == 7, "the slower way counts"


def test_the_heuristic_has_one_threshold():
    policy = Heuristic(HAND, threshold_s=1.0)
    views = [view(0, 1200, 0.9), view(1, 1200, 1.1), view(2, 400, 30.0)]
    assert policy.place(views, BATCH._replace(swap_budget=15)) == [Placement(12), Placement(0, 12), Placement(0, 3)]


@pytest.mark.parametrize(
    ("name", "placement"),
    [
        ("discard", Placement(0)),
        ("discard-ordered", Placement(0)),
        ("chunked", Placement(0)),
        ("prefix-lru", Placement(0)),
        ("prefix-lru-offload", Placement(0)),
        ("preserve", Placement(12)),
        ("swap", Placement(0, 12)),
        ("budgeted-swap", Placement(0, 5)),
    ],
)
def test_policies_that_do_not_look_at_the_time(name: str, placement: Placement):
    policy = make_policy(name, HAND)
    for seconds in (0.0, 1000.0):
        assert policy.place([view(0, 1200, seconds)], BATCH._replace(swap_budget=5)) == [placement]


def test_traits_are_those_of_the_table():
    traits = {name: make_policy(name, HAND).traits for name in POLICIES}
    assert {name for name in POLICIES if traits[name].head_start_s == 0} == {
        "discard",
        "prefix-lru",
        "prefix-lru-offload",
    }
    assert {name for name in POLICIES if traits[name].head_start_s not in (0, inf)} == {"min-waste"}
    assert {name for name in POLICIES if traits[name].waits_for_swaps} == {"swap"}
    assert {name for name in POLICIES if traits[name].host is HostUse.CACHE} == {"prefix-lru-offload"}
    assert not any(traits[name].prefix_caching for name in (*ABLATION, "swap"))
    assert all(
        traits[name].prefix_caching for name in ("preserve", "prefix-lru", "prefix-lru-offload", "ttl", "min-waste")
    )
    chunked = {name for name in POLICIES if traits[name].recompute_tokens == HAND.saturation_tokens}
    assert chunked == {"chunked", "budgeted-swap", "heuristic", "min-waste-paper"}
    assert make_policy("swap", HAND).swap_budget(BATCH) is None
    assert make_policy("min-waste", HAND).swap_budget(BATCH) == 15
    assert make_policy("preserve", HAND).swap_budget(BATCH) == 0


@pytest.mark.parametrize("name", POLICIES)
def test_names(name: str):
    assert make_policy(name, HAND).name == name
    assert make_policy(name, RefinedCosts(HAND)).name == name


def test_an_unknown_policy_is_named():
    with pytest.raises(ValueError, match=r"'guess'.*discard.*min-waste"):
        make_policy("guess", HAND)


@pytest.mark.parametrize("name", POLICIES)
def test_every_placement_keeps_to_blocks_budget_and_host(name: str):
    rng = random.Random(11)
    for _ in range(200):
        policy = make_policy(name, HAND)
        views = []
        for seq_id in range(rng.randint(0, 12)):
            num_tokens = rng.randint(1, 3000)
            shared = rng.randint(0, -(-num_tokens // SIZE))
            on_host = rng.choice([0, 0, rng.randint(1, 20)])
            views.append(view(seq_id, num_tokens, rng.expovariate(1.0), shared, on_host))
        batch = BATCH._replace(
            num_waiting=rng.randint(0, 2), num_available_host_blocks=rng.randint(0, 40), swap_budget=rng.randint(0, 40)
        )
        placed = policy.place(views, batch)
        assert len(placed) == len(views)
        assert all(0 <= p.keep <= p.keep + p.swap <= v.num_blocks for p, v in zip(placed, views, strict=True))
        if name != "swap":  # it waits for the device instead, and holds what the host has no room for
            total = sum(p.swap for p in placed)
            assert total <= batch.num_available_host_blocks and total <= (batch.swap_budget or 0)
        assert policy.place(views, batch) == placed, "the same question, the same answer"


def resumed(tool: str, seconds: float, queued_s: float = 0.0, **changes: object) -> Interception:
    """The record of a call."""
    record = Interception(
        index=0, tool=tool, started_at=0.0, ended_at=seconds, context_tokens=1200, residency=Residency.DISCARDED,
        num_recomputed=1200, num_returned=1, num_cached_on_return=0, outcome=Outcome.RETURNED,
        resumed_at=seconds + queued_s,
    )  # fmt: skip
    return replace(record, **changes)  # type: ignore[arg-type]


def test_ttl_of_an_unknown_tool_is_what_its_reload_costs():
    # 1200 tokens behind 4 decodes: 3 chunks of 30 ms.
    assert Ttl(HAND).time_to_live("new", 1200, 4) == pytest.approx(0.09)


def test_ttl_counts_what_later_chunks_attend_to():
    # 1200 tokens in 3 chunks, behind 0, 400 and 800.
    reload_s = sum(FULL.forward_s(400, start) for start in (0, 400, 800))
    assert reload_s > 3 * FULL.forward_s(400)
    assert Ttl(FULL).time_to_live("new", 1200, 4) == pytest.approx(reload_s)


@pytest.mark.parametrize("draw", [lambda rng: rng.expovariate(20.0), lambda rng: rng.choice([0.02, 5.0])])
def test_ttl_is_the_best_of_all(draw: Callable[[random.Random], float]):
    """P(tool returns within t) · (queueing delay + reload cost) - t, tried for every t of a fine grid."""
    rng, policy = random.Random(4), Ttl(HAND)
    durations = [draw(rng) for _ in range(60)]
    for seconds in durations:
        policy.learn(resumed("tool", seconds, queued_s=0.5))
    queueing_s = 0.5 * (1 - 0.95**60)  # a running mean that began at 0

    def gain(moment: float) -> float:
        return sum(seconds <= moment for seconds in durations) / 60 * (queueing_s + 0.09) - moment

    best = max(gain(step / 10_000) for step in range(10_000))
    chosen = policy.time_to_live("tool", 1200, 4)
    assert gain(chosen) == pytest.approx(best, abs=2e-3)
    assert chosen > 0


def test_ttl_does_not_pin_for_a_tool_that_is_always_slow():
    policy = Ttl(HAND)
    for _ in range(20):
        policy.learn(resumed("slow", 60.0))
    assert policy.time_to_live("slow", 1200, 4) == 0
    assert policy.place([view(0, 1200, 1.0)._replace(tool="slow")], BATCH) == [Placement(0)]


def test_ttl_learns_from_returns_alone_and_queueing_from_what_was_not_held():
    policy = Ttl(HAND)
    for _ in range(20):
        policy.learn(resumed("tool", 0.001, outcome=Outcome.TIMEOUT, num_recomputed=0))
        policy.learn(resumed("other", 0.05, queued_s=9.0, num_recomputed=0))
    assert policy.time_to_live("tool", 1200, 4) == pytest.approx(0.09), "still unknown"
    assert policy.time_to_live("other", 400, 4) == 0, "no delay but the reload's 30 ms, which 50 ms do not pay for"


def test_a_pin_ends_when_it_was_set_to_end():
    policy, pinned = Ttl(HAND), view(0, 1200, 1.0)._replace(since=10.0)
    assert policy.next_change(10.0) is None
    assert policy.place([pinned], BATCH) == [Placement(12)]
    assert policy.next_change(10.0) == pytest.approx(10.09)
    assert policy.place([pinned], BATCH._replace(now=10.08)) == [Placement(12)]
    assert policy.place([pinned], BATCH._replace(now=10.10)) == [Placement(0)]
    assert policy.next_change(10.10) is None
    # The sequence's next call gets a pin of its own.
    assert policy.place([pinned._replace(since=20.0)], BATCH._replace(now=20.0)) == [Placement(12)]


def test_the_host_pool_is_built_for_the_policies_that_use_it():
    assert {name for name in POLICIES if make_policy(name, HAND).traits.host is not HostUse.NONE} == set(SWAPPING)
