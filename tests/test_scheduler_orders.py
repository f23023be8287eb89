"""Ranks by hand: less is served earlier."""

import pytest

from jaxcept.engine import Engine
from jaxcept.metrics import Ledger
from jaxcept.scheduler.events import Finished
from jaxcept.scheduler.orders import ORDERS, STEP_TOKENS, MemoryTime, Mlfq, QueueOrder, QueueView, Value, make_order
from jaxcept.scheduler.policies.preserve import Preserve
from jaxcept.scheduler.policy import BatchView
from jaxcept.scheduler.scheduler import Scheduler
from tests.fakes import Rig, next_token

BATCH = BatchView(
    now=10.0,
    block_size=16,
    num_blocks=100,
    num_available_blocks=50,
    num_available_host_blocks=0,
    num_running=8,
    running_tokens=4000,
    num_waiting=3,
    waiting_tokens=3000,
    query_tokens=1000,
)
NEW = QueueView(
    seq_id=0,
    arrival=1.0,
    queued_at=1.0,
    num_tokens=512,
    num_uncomputed=512,
    num_host_tokens=0,
    num_generated=0,
    num_returned=0,
    is_returned=False,
    served_tokens=0,
    max_tokens_left=100,
    tool=None,
)


@pytest.mark.parametrize("name", ORDERS)
def test_every_order_ranks_and_bounds_starvation(name: str):
    order = make_order(name)
    assert order.name == name
    assert order.starvation_s > 0
    assert order.is_arrival is (name == "fcfs")
    assert order.preempts is (name == "mlfq")
    for changes in ({}, {"max_tokens_left": None}, {"is_returned": True, "num_returned": 5, "num_uncomputed": 6}):
        view = NEW._replace(**changes)
        assert order.rank(view, BATCH) == order.rank(view, BATCH)
    assert order.token_limit(BATCH) is None


def test_an_unknown_order_is_named():
    with pytest.raises(ValueError, match=r"'guess'.*fcfs, mlfq, memory-time, value"):
        make_order("guess")


def test_fcfs_ranks_all_alike():
    order = make_order("fcfs")
    assert order.rank(NEW, BATCH) == order.rank(NEW._replace(num_tokens=9, is_returned=True), BATCH)


@pytest.mark.parametrize(("steps", "level"), [(1, 0), (4, 0), (5, 1), (8, 1), (9, 2), (16, 2), (17, 3)])
def test_mlfq_joins_the_level_that_holds_the_first_token(steps: int, level: int):
    num_tokens = steps * STEP_TOKENS
    assert Mlfq(quantum=4).rank(NEW._replace(num_tokens=num_tokens, num_uncomputed=num_tokens), BATCH) == level


@pytest.mark.parametrize(("served", "level"), [(0, 0), (4, 0), (5, 1), (12, 1), (13, 2), (28, 2), (29, 3)])
def test_mlfq_sinks_with_what_it_was_served(served: int, level: int):
    """Levels of 4, 8 and 16 steps end after 4, 12 and 28."""
    view = NEW._replace(num_tokens=served + 1, num_uncomputed=1, num_generated=served, served_tokens=served)
    assert Mlfq(quantum=4).rank(view, BATCH) == level
    # 512 tokens of a prompt are one step, as one token drawn is.
    prefilled = NEW._replace(num_uncomputed=1, served_tokens=served * STEP_TOKENS)
    assert Mlfq(quantum=4).rank(prefilled, BATCH) == level


def test_memory_time_by_hand():
    # One step fills 512 tokens, 256 in the mean; then 100 steps hold 512 and 50 more in the mean.
    assert MemoryTime().rank(NEW, BATCH) == pytest.approx(256 + 100 * 512 + 5000)
    # Nothing to compute again but the last token: what was held stands there at once.
    back = NEW._replace(num_uncomputed=1, is_returned=True)
    assert MemoryTime().rank(back, BATCH) == pytest.approx(511.5 / 512 + 100 * 512 + 5000)
    assert MemoryTime(horizon=10).rank(NEW._replace(max_tokens_left=None), BATCH) == pytest.approx(256 + 5120 + 50)


def test_memory_time_puts_the_short_and_the_small_first():
    rank = MemoryTime().rank
    assert rank(NEW._replace(max_tokens_left=10), BATCH) < rank(NEW, BATCH)
    assert rank(NEW._replace(num_tokens=100, num_uncomputed=100), BATCH) < rank(NEW, BATCH)
    discarded = NEW._replace(is_returned=True)
    assert rank(discarded._replace(num_uncomputed=10), BATCH) < rank(discarded, BATCH)


def test_value_judges_in_two_stages():
    rank = Value().rank
    held = NEW._replace(is_returned=True, num_returned=20, num_uncomputed=20)
    assert rank(held, BATCH) < rank(NEW, BATCH), "what is held while it waits goes first"
    long_return = held._replace(num_tokens=2500, num_returned=2000, num_uncomputed=2000)
    assert rank(held, BATCH) < rank(long_return, BATCH), "by what really came back"
    discarded = held._replace(num_uncomputed=512)
    assert rank(held, BATCH) < rank(discarded, BATCH)
    assert rank(NEW._replace(max_tokens_left=10), BATCH) < rank(NEW, BATCH)


def limits(order: Value, seconds: list[float], query_tokens: int = 1000) -> list[int | None]:
    """The limit after each of these steps."""
    found = []
    for each in seconds:
        order.observe_step(each)
        found.append(order.token_limit(BATCH._replace(query_tokens=query_tokens)))
    return found


def test_value_fits_the_step_to_its_objective():
    order = Value(step_slo_s=0.1, grain=32)
    assert limits(order, [0.05]) == [None], "no limit until a step is late"
    assert limits(order, [0.2, 0.2, 0.2, 0.05, 0.05]) == [1000, 800, 640, 672, 704]


def test_value_keeps_its_limit_in_reach():
    """A long quiet time must not lift the limit so high that it takes many late steps to bind again."""
    order = Value(step_slo_s=0.1, grain=32)
    limits(order, [0.2, 0.2])
    quiet = limits(order, [0.05] * 1000)
    assert quiet[-1] is not None and quiet[-1] < 1000 + 32
    low = limits(order, [0.2] * 100)[-1]
    assert low == BATCH.num_running + 32, "every running sequence keeps its token, and something gets in"


def test_value_does_not_count_a_step_twice():
    order = Value(step_slo_s=0.1)
    limits(order, [0.2, 0.2])
    assert [order.token_limit(BATCH) for _ in range(3)] == [800, 800, 800]


def rig_of(order: QueueOrder, **config: int) -> Rig:
    """A rig whose scheduler serves in this order; its clock ticks once a step."""
    rig = Rig(**config)
    rig.scheduler = Scheduler(rig.config, Preserve(), order=order)
    rig.engine = Engine(rig.scheduler, rig.runner, rig.clock, Ledger(100))
    return rig


def finished(rig: Rig) -> list[str]:
    """Names of the requests, the first that ended first. Each has the tokens that it would have had alone."""
    seeds = {setup.seq_id: setup.seed for plan in rig.runner.plans for setup in plan.rows}
    for end in rig.told(Finished):
        for position in range(end.num_prompt, len(end.token_ids)):
            assert end.token_ids[position] == next_token(end.token_ids[:position], seeds[end.seq_id])
    return [end.request_id for end in rig.told(Finished)]


@pytest.mark.parametrize(
    ("name", "served"),
    [
        ("fcfs", ["long", "middle", "short"]),
        ("mlfq", ["long", "middle", "short"]),  # all prompts fit the first level, and none outlasts its 4 steps
        ("memory-time", ["short", "middle", "long"]),
        ("value", ["short", "middle", "long"]),
    ],
)
def test_one_row_is_served_in_the_order(name: str, served: list[str]):
    rig = rig_of(make_order(name), max_num_seqs=1)
    for arrival, (request, max_tokens) in enumerate([("long", 4), ("middle", 3), ("short", 2)]):
        rig.add(request, (1, 2, 3), max_tokens=max_tokens, arrival=float(arrival))
    rig.run()
    assert finished(rig) == served
    assert rig.scheduler.counters.preemptions == 0


def served_before_the_long_one(starvation_s: float) -> int:
    """A long request waits for the one row, and at every step a short one comes in that ranks before it."""
    rig = rig_of(MemoryTime(starvation_s=starvation_s), max_num_seqs=1)
    rig.add("long", (1, 2, 3), max_tokens=12)
    for arrival in range(40):
        rig.add(f"short {arrival}", (4, 5), max_tokens=2)
        rig.step()
    rig.run()
    order = finished(rig)
    assert len(order) == 41
    return order.index("long")


def test_who_has_waited_too_long_goes_first():
    assert served_before_the_long_one(1000.0) == 40, "nothing but the bound lets it in"
    assert served_before_the_long_one(8.0) <= 6, "a short one takes about two steps of a second"


def test_mlfq_lets_a_short_one_in_front_of_a_long_one():
    """One row. After 2 steps the long one has sunk to the second level; the short one joins the first and takes it."""
    rig = rig_of(Mlfq(quantum=2), max_num_seqs=1)
    rig.add("long", (1, 2, 3), max_tokens=20)
    for _ in range(6):
        rig.step()
    rig.add("short", (4, 5), max_tokens=2)
    rig.run()
    assert finished(rig) == ["short", "long"]
    assert {end.request_id: end.num_preemptions for end in rig.told(Finished)} == {"short": 0, "long": 1}
