"""Profiles: terms that are known come out of a fit again, and a real runner is measured and left as it was."""

from __future__ import annotations

import numpy as np
import pytest
from checkpoints import build_checkpoint

from jaxcept.runner.fit import fit_steps, fit_swaps, non_negative_fit
from jaxcept.runner.profile import Measurements, SwapTimes, grid, make_cost_model, profile, relative_errors
from jaxcept.runner.runner import DeviceRunner, RunnerConfig
from jaxcept.scheduler.costs import CostModel, StepLoad, chunk_pairs
from jaxcept_models.model import Model, load_model
from tests.test_runner_swaps import uninterrupted

LOADS = [
    StepLoad(size, start + size, chunk_pairs(start, size), 1)
    for size in (1, 2, 8, 31, 64, 100, 200, 400, 512)
    for start in (0, 300, 2000)
] + [StepLoad(count, count * context, count * context, count) for count in (1, 8, 30) for context in (10, 500, 2000)]


def costs_of(**terms: float) -> CostModel:
    zeros = dict.fromkeys(
        ("overhead_s", "floor_s", "token_s", "context_token_s", "pair_s", "swap_out_latency_s", "swap_out_token_s",
         "swap_in_latency_s", "swap_in_token_s"), 0.0)  # fmt: skip
    return CostModel("n", "d", "m", "float32", **zeros | terms, saturation_tokens=1, kv_token_bytes=1)  # type: ignore[arg-type]


def test_a_fit_finds_the_terms_and_the_saturation_point():
    truth = costs_of(overhead_s=2e-3, floor_s=64 * 1e-4, token_s=1e-4, context_token_s=3e-7, pair_s=2e-9)
    found = fit_steps([(load, truth.step_s(load)) for load in LOADS], is_linear=False)
    assert found.saturation_tokens == 64 and found.max_error < 1e-6
    np.testing.assert_allclose(found[:5], [2e-3, 6.4e-3, 1e-4, 3e-7, 2e-9], rtol=1e-4)


def test_a_fit_stands_noise():
    truth = costs_of(overhead_s=2e-3, floor_s=64 * 1e-4, token_s=1e-4, context_token_s=3e-7)
    noise = np.random.default_rng(0).normal(1, 0.05, len(LOADS))
    steps = [(load, truth.step_s(load) * factor) for load, factor in zip(LOADS, noise, strict=True)]
    found = fit_steps(steps, is_linear=False)
    assert 40 <= found.saturation_tokens <= 100 and found.mean_error < 0.06
    np.testing.assert_allclose(found.token_s, 1e-4, rtol=0.1)


def test_the_linear_fit_is_the_papers_model():
    truth = costs_of(overhead_s=1e-2, token_s=4.63e-5)
    found = fit_steps([(load, truth.step_s(load)) for load in LOADS], is_linear=True)
    np.testing.assert_allclose(found[:5], [1e-2, 0, 4.63e-5, 0, 0], rtol=1e-9)
    with pytest.raises(ValueError, match="2 loads were measured"):
        fit_steps([(load, 1.0) for load in LOADS[:2]], is_linear=True)


def test_no_term_is_negative_and_the_rest_makes_the_best_of_it():
    terms = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    values, errors = non_negative_fit(terms, np.array([3.0, 2.0, 1.0]))  # a line that falls: the slope is 0
    assert values[1] == 0 and values[0] > 0
    grid = np.linspace(0, 4, 4001)
    objective = ((grid[:, None] / np.array([3.0, 2.0, 1.0])[None, :] - 1) ** 2).sum(1)
    np.testing.assert_allclose(values[0], grid[objective.argmin()], atol=1e-3)
    np.testing.assert_allclose((errors**2).sum(), objective.min(), rtol=1e-4)
    assert fit_swaps([]) == (0.0, 0.0)
    np.testing.assert_allclose(fit_swaps([(16, 1.16e-3), (64, 1.64e-3), (512, 6.12e-3)]), (1e-3, 1e-5), rtol=1e-6)


@pytest.mark.parametrize("brief", [True, False])
@pytest.mark.parametrize("sizes", [(8, 4, 1, 1, 2), (64, 16, 32, 512, 4096), (64, 16, 256, 2048, 512), (9, 8, 4, 2, 8)])
def test_every_load_of_the_grid_can_be_run(sizes: tuple[int, ...], brief: bool):
    config = RunnerConfig(*sizes)
    batches = list(grid(config, brief))
    assert len(set(batches)) == len(batches) > 2
    for decodes, context, tokens, start in batches:
        assert decodes + tokens > 0 and decodes <= config.max_num_seqs
        assert decodes + tokens <= config.max_num_batched_tokens
        assert context <= config.max_model_len and bool(context) == bool(decodes)
        assert start >= 0 and (start == 0 or start + tokens <= config.max_model_len)
        assert not tokens or decodes < config.max_num_seqs


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(build_checkpoint("llama31", tmp_path_factory.mktemp("llama")), dtype="float32")


def make_runner(model: Model, num_host_blocks: int) -> DeviceRunner:
    runner = DeviceRunner(model, RunnerConfig(32, 8, 4, 32, 160, num_host_blocks))
    runner.warm_up()
    return runner


def test_a_profile_measures_compiles_nothing_and_leaves_the_runner_as_it_was(model: Model):
    runner = make_runner(model, 24)
    before = uninterrupted(runner, 12)
    compiled = runner.compiles.count
    told: list[tuple[int, int, str]] = []
    costs = profile(runner, lambda *progress: told.append(progress), brief=True)
    assert runner.compiles.count == compiled
    assert uninterrupted(runner, 12) == before
    assert runner.swapper is not None and not runner.swapper.is_busy and runner.swapper.report() == (None, None, ())
    assert all(runner.swapper.host[i] is None for i in range(24))

    assert 0 < costs.step_s(StepLoad(1, 10, 10, 1)) < 1 and costs.forward_s(32) > 0
    assert 0 < costs.swap_out_s(64) < 1 and 0 < costs.swap_in_s(64) < 1
    assert 1 <= costs.saturation_tokens <= 32
    assert costs.kv_token_bytes * 8 == runner.layout.block_bytes
    assert "error" in costs.sources["token_s"] and "beside a step" in costs.sources["swap_in_token_s"]
    assert costs.dtype == "float32" and "jax" in costs.versions
    assert CostModel.from_json(costs.to_json()) == costs
    assert told[-1][0] == told[-1][1] and [done for done, _, _ in told] == sorted(done for done, _, _ in told)


def test_without_host_blocks_swaps_are_not_measured_and_a_wrong_fit_is_refused(model: Model):
    runner = make_runner(model, 0)
    costs = profile(runner, brief=True, fit="linear", model="tiny")
    assert costs.swap_out_token_s == 0 and "no host blocks" in costs.sources["swap_out_token_s"]
    assert costs.floor_s == costs.context_token_s == costs.pair_s == 0 and costs.name.startswith("tiny@")
    with pytest.raises(ValueError, match="fit='square'"):
        profile(runner, fit="square")  # type: ignore[arg-type]


def test_measured_numbers_become_a_cost_model(model: Model):
    runner = DeviceRunner(model, RunnerConfig(32, 8, 4, 32, 160, 24))
    truth = costs_of(overhead_s=2e-3, floor_s=6.4e-3, token_s=1e-4, context_token_s=3e-7)
    steps = tuple((load, truth.step_s(load)) for load in LOADS)
    swaps = tuple(SwapTimes(n, 1e-4 + n * 1e-5, 1e-4 + n * 2e-5) for n in (1, 8, 32))
    seen = Measurements(steps, swaps, tuple(SwapTimes(n, 2 * a, 2 * b) for n, a, b in swaps))
    costs = make_cost_model(runner, seen)
    assert np.abs(relative_errors(costs, steps)).max() < 1e-6
    np.testing.assert_allclose(costs.swap_out_s(80), 3e-4)  # beside a step, ten blocks
    np.testing.assert_allclose(costs.swap_in_s(80), 6e-4)
    gigabytes = 32 * runner.layout.block_bytes / 1e9
    assert f"{gigabytes / 4.2e-4:.2f} GB/s alone, {gigabytes / 7.4e-4:.2f} GB/s" in costs.sources["swap_out_token_s"]
