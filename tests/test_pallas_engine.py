"""The whole engine on the Pallas kernels, interpreted: steps, swaps and copies give the tokens that XLA gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from checkpoints import build_checkpoint
from costs import HAND

from jaxcept.build import build_engine, build_runner, choose_implementation
from jaxcept.config import IMPLEMENTATIONS, KV_CACHE_DTYPES, EngineConfig
from jaxcept.runner import swapper
from jaxcept.runner.runner import DeviceRunner
from jaxcept.runner.swapper import Job
from jaxcept.scheduler.events import Finished, Intercepted
from jaxcept.scheduler.params import InterceptParams, SamplingParams, ScriptedTrigger
from jaxcept.scheduler.refined_costs import RefinedCosts
from jaxcept.scheduler.request import Request
from jaxcept_kernels.attention import Implementation

RETURNED = (11, 12, 13)
PROMPTS = [tuple(int(i) for i in np.random.default_rng(9).integers(3, 150, n)) for n in (5, 21, 13)]


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """On a GPU XLA would round the operands of float32 products."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture
def greedy_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiles what greedy tokens need, and swaps of one size."""
    everything = DeviceRunner.lowerings

    def lowerings(runner: DeviceRunner) -> list[Job]:
        unused = ("score", "random", "full")
        return [job for job in everything(runner) if not any(word in job[0] for word in unused)]

    monkeypatch.setattr(DeviceRunner, "lowerings", lowerings)
    monkeypatch.setattr(swapper, "ARITIES", (4,))


def run_engine(
    folder: Path, implementation: str, kv_cache_dtype: str
) -> tuple[dict[tuple[str, int], tuple[int, ...]], int]:
    """All ids of each completion with an interception whose context is swapped; and how many blocks came back."""
    config = EngineConfig(
        folder,
        dtype="float32",
        kv_cache_dtype=kv_cache_dtype,
        implementation=implementation,
        intercept_policy="swap",
        max_model_len=64,
        max_num_seqs=4,
        max_num_batched_tokens=4,
        block_size=8,
        num_blocks=24,
        compilation_cache="",
    )
    runner = build_runner(config, lambda done, total, what: None)
    assert runner.model.implementation == implementation
    engine = build_engine(config, runner, RefinedCosts(HAND))
    script = InterceptParams(script=(ScriptedTrigger(5),))
    for index, prompt in enumerate(PROMPTS):
        # The last has two completions: the second takes a copy of a block that they cannot share.
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, n=1 + (index == 2))
        engine.add(Request(str(index), prompt, params, script))
    finished: dict[tuple[str, int], tuple[int, ...]] = {}
    waiting: list[int] = []
    for _ in range(500):
        for event in engine.step():
            if isinstance(event, Finished):
                finished[event.request_id, event.index] = event.token_ids
            elif isinstance(event, Intercepted):
                waiting.append(event.seq_id)
        if len(waiting) == len(PROMPTS) + 1:  # all contexts are out, or on their way
            for seq_id in waiting:
                engine.resume(seq_id, RETURNED)
            waiting = []
        if len(finished) == len(PROMPTS) + 1:
            return finished, engine.scheduler.counters.swapped_in_blocks
    raise AssertionError("the engine does not come to an end")


@pytest.mark.usefixtures("greedy_alone")
@pytest.mark.parametrize(
    ("family", "kv_cache_dtype"), [*(("llama31", dtype) for dtype in KV_CACHE_DTYPES), ("qwen3moe", "auto")]
)
def test_tokens_with_an_interception_a_swap_and_a_copy_equal_those_of_xla(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, kv_cache_dtype: str
) -> None:
    has_experts = family == "qwen3moe"
    checkpoint = build_checkpoint(family, tmp_path, num_hidden_layers=1 if has_experts else 2)
    if has_experts:  # several layers and sizes of steps are the dense model's to show
        monkeypatch.setattr("jaxcept.runner.runner.token_buckets", lambda limit, *_: (limit,))
    tokens, swapped = run_engine(checkpoint, "pallas", kv_cache_dtype)
    assert (tokens, swapped) == run_engine(checkpoint, "xla", kv_cache_dtype)
    assert swapped > 0
    assert all(ids[-10:-7] == RETURNED for ids in tokens.values())


@pytest.mark.parametrize("asked", list(Implementation))
def test_what_is_asked_for_is_chosen(asked: str) -> None:
    assert asked in IMPLEMENTATIONS
    assert choose_implementation(EngineConfig(implementation=asked)) == asked


def test_a_gpu_takes_pallas_by_itself_and_a_cpu_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_implementation(EngineConfig()) is not Implementation.PALLAS
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert choose_implementation(EngineConfig()) is Implementation.PALLAS


def test_an_unknown_implementation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"implementation='cuda'.*pallas"):
        EngineConfig(implementation="cuda")
    with pytest.raises(ValueError, match=r"kv_cache_dtype='fp8'.*auto, int8"):
        EngineConfig(kv_cache_dtype="fp8")
