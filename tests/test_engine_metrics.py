"""Waste and latency, worked by hand."""

import pytest

from jaxcept.metrics import (
    Ledger,
    Waste,
    median_normalized_latency,
    normalized_latency,
    recompute_share,
    time_per_output_token,
    time_to_first_token,
)
from jaxcept.scheduler.counters import Counters
from jaxcept.scheduler.events import Finished, Intercepted, Timing
from jaxcept.scheduler.policies.discard import Discard
from tests.fakes import Rig, scripted

TIMING = Timing(arrival=10.0, first_scheduled_at=11.0, first_token_at=12.0, finished_at=40.0, intercepted_s=8.0)
NEVER = Timing(arrival=10.0, first_scheduled_at=None, first_token_at=None, finished_at=11.0, intercepted_s=0.0)


def test_latencies_leave_the_tools_time_out():
    assert time_to_first_token(TIMING) == 2.0
    assert time_per_output_token(TIMING, 11) == (40 - 12 - 8) / 10
    assert normalized_latency(TIMING, 11) == (40 - 10 - 8) / 11
    assert median_normalized_latency([3.0, 1.0, 2.0]) == 2.0


def test_latencies_of_what_never_was_are_none():
    assert time_to_first_token(NEVER) is None
    assert time_per_output_token(NEVER, 0) is None and time_per_output_token(TIMING, 1) is None
    assert normalized_latency(NEVER, 0) is None


def test_idle_blocks_are_wasted_for_as_long_as_they_are_held():
    ledger = Ledger(block_bytes=100)
    ledger.observe(0.0, num_held_blocks=5, num_idle_blocks=0)
    ledger.observe(2.0, num_held_blocks=5, num_idle_blocks=3)
    ledger.observe(6.0, num_held_blocks=2, num_idle_blocks=0)
    ledger.observe(9.0, num_held_blocks=2, num_idle_blocks=0)
    assert ledger.waste == Waste(held=3 * 100 * 4.0, recompute=0.0)


def test_recomputing_wastes_the_memory_of_the_batch_for_its_share_of_the_step():
    ledger = Ledger(block_bytes=100)
    ledger.observe(0.0, num_held_blocks=10, num_idle_blocks=4)
    ledger.charge_step(0.5, num_tokens=8, num_recomputed=2)
    ledger.charge_step(0.5, num_tokens=8, num_recomputed=0)
    assert ledger.waste.recompute == 0.5 * 2 / 8 * 6 * 100
    assert ledger.waste.total == ledger.waste.recompute and ledger.busy_s == 1.0
    with pytest.raises(ValueError, match="block_bytes=0"):
        Ledger(0)


def test_the_engine_charges_what_an_interception_holds():
    """Seven tokens of KV lie in two blocks of 100 bytes from the trigger at 2 s to the answer at 6 s."""
    rig = Rig()
    rig.add("r", range(6), scripted(2), max_tokens=4)
    rig.run()
    (event,) = rig.told(Intercepted)
    rig.clock.advance_to(event.at + 4.0)
    rig.engine.resume("r", (1, 2))
    rig.run()
    assert rig.engine.ledger.waste.held == 2 * 100 * 4.0
    assert rig.engine.ledger.waste.recompute == 0.0
    assert rig.told(Finished)[0].timing.intercepted_s == 4.0


def test_a_discarded_context_wastes_nothing_while_it_waits_and_time_when_it_is_computed_again():
    rig = Rig(Discard(), depth=1, enable_prefix_caching=False)
    rig.add("r", range(6), scripted(2), max_tokens=4)
    rig.run()
    rig.clock.advance(100.0)
    rig.engine.resume("r", (1, 2))
    rig.run()
    waste = rig.engine.ledger.waste
    assert waste.held <= 2 * 100 * 1.0, "at most the moment until the next plan"
    assert waste.recompute > 0
    counters = rig.scheduler.counters
    assert recompute_share(counters) == counters.recomputed_tokens / sum(plan.num_tokens for plan in rig.runner.plans)


def test_the_share_of_nothing_is_nothing():
    assert recompute_share(Counters()) == 0.0
