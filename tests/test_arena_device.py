"""The arena on a real model: interceptions are waited for, and the simulator predicts the same runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jaxcept.arena.cases import Sizes, Traffic
from jaxcept.arena.curves import compare
from jaxcept.arena.device import Bench, DeviceCase
from jaxcept.config import EngineConfig
from jaxcept.scheduler.costs import CostModel
from tests.checkpoints import build_checkpoint

# Not measured: policies need some profile to decide by.
COSTS = CostModel(
    name="assumed", device="cpu", model="tiny", dtype="float32", overhead_s=2e-3, floor_s=0.0, token_s=2e-5,
    context_token_s=0.0, pair_s=0.0, saturation_tokens=64, kv_token_bytes=1024, swap_out_latency_s=1e-4,
    swap_out_token_s=1e-6, swap_in_latency_s=1e-4, swap_in_token_s=1e-6,
)  # fmt: skip
SIZES = Sizes(
    num_blocks=24, num_host_blocks=32, block_size=4, max_num_seqs=4, max_num_batched_tokens=16, max_model_len=64
)
TRAFFIC = Traffic("mix", 8, time_scale=0.002, length_scale=0.02)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder: Path = build_checkpoint("llama2", tmp_path_factory.mktemp("tiny"))
    return Bench(EngineConfig(model=folder, compilation_cache=""), SIZES, COSTS, lambda done, total, what: None)


@pytest.mark.parametrize("policy", ["discard", "preserve", "min-waste"])
def test_a_replay_on_the_device(bench: Bench, policy: str):
    case: Any = DeviceCase(TRAFFIC, 200.0, policy)
    report, predicted = bench.run(case), bench.predict(case)
    wanted = sum(job.num_generated for job in TRAFFIC.at(200.0).jobs)
    assert report.num_finished == 8 and report.num_clipped == 0
    assert report.tokens["generated"] == predicted.tokens["generated"] == wanted
    assert not report.info.is_simulated and predicted.info.is_simulated
    longest = max(job.tool_s for job in TRAFFIC.at(200.0).jobs)
    assert report.makespan_s > longest, "its tools were not waited for"
    assert report.queue_after_return.mean >= 0.0
    assert sum(report.compute_s.values()) == pytest.approx(report.busy_s)
    assert compare([predicted], [report]).measured_order == (policy,)
