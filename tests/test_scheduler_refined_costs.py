"""A cost model that follows what it measures, and is not taken in by a pause."""

import random

import pytest

from jaxcept.scheduler.costs import Costs, StepLoad
from jaxcept.scheduler.refined_costs import WINDOW, RefinedCosts
from tests.costs import FULL, HAND

LOAD = StepLoad(400, 9000, 9000, 5)


def test_it_is_the_model_until_it_has_seen_a_step():
    costs: Costs = RefinedCosts(FULL)
    assert costs.step_s(LOAD) == FULL.step_s(LOAD)
    assert costs.forward_s(100, 50) == FULL.forward_s(100, 50)
    assert (costs.swap_out_s(100), costs.swap_in_s(100)) == (FULL.swap_out_s(100), FULL.swap_in_s(100))
    assert (costs.saturation_tokens, costs.kv_token_bytes) == (404, 1000)
    assert RefinedCosts(FULL).relative_error is None


@pytest.mark.parametrize("true_factor", [0.2, 0.9, 3.0])
def test_it_follows_a_device_that_is_faster_or_slower(true_factor: float):
    costs, rng = RefinedCosts(HAND), random.Random(1)
    for _ in range(500):
        load = StepLoad(rng.randint(1, 400), 0, 0, 1)
        costs.observe(load, true_factor * HAND.step_s(load) * rng.lognormvariate(0, 0.1))
    assert costs.factor == pytest.approx(true_factor, rel=0.05)
    assert costs.forward_s(100) == costs.factor * HAND.forward_s(100)
    assert costs.relative_error is not None and 0.03 < costs.relative_error < 0.12  # the noise: 0.067


def test_a_pause_of_the_host_moves_it_by_one_small_step():
    costs = RefinedCosts(HAND)
    for _ in range(100):
        costs.observe(LOAD, HAND.step_s(LOAD))
    costs.observe(LOAD, 60.0)
    assert costs.factor == pytest.approx(1.0, abs=0.011)
    assert costs.relative_error == 0, "the median does not see one pause"


def test_an_error_is_that_of_the_prediction_made_before():
    costs = RefinedCosts(HAND)
    costs.observe(LOAD, HAND.step_s(LOAD) * 1.25)
    assert costs.relative_error == pytest.approx(0.2)  # 1 predicted, 1.25 measured
    assert costs.factor == pytest.approx(1.25)


def test_what_says_nothing_is_passed_over():
    costs = RefinedCosts(HAND)
    for load, seconds in [(StepLoad(0, 0, 0, 0), 1.0), (LOAD, 0.0), (LOAD, float("inf")), (LOAD, float("nan"))]:
        costs.observe(load, seconds)
    assert (costs.factor, costs.num_observed, costs.relative_error) == (1.0, 0, None)


def test_old_errors_are_forgotten():
    costs = RefinedCosts(HAND)
    costs.observe(LOAD, 10.0)
    for _ in range(2 * WINDOW):
        costs.observe(LOAD, costs.step_s(LOAD))
    assert costs.relative_error == pytest.approx(0.0, abs=1e-9)
