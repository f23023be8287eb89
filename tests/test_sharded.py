"""Every family on several devices: logits and greedy tokens of one, through interceptions, swaps, cached prefixes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from checkpoints import FAMILIES, build_checkpoint
from jax.sharding import PartitionSpec
from paging import PagedRun

from jaxcept.build import choose_implementation
from jaxcept.clock import MonotonicClock
from jaxcept.config import EngineConfig
from jaxcept.engine import Engine
from jaxcept.metrics import Ledger
from jaxcept.runner.host_pool import HeadParts
from jaxcept.runner.runner import DeviceRunner, RunnerConfig
from jaxcept.scheduler.config import SchedulerConfig
from jaxcept.scheduler.events import Finished, Intercepted
from jaxcept.scheduler.params import InterceptParams, SamplingParams, ScriptedTrigger
from jaxcept.scheduler.request import Request
from jaxcept.scheduler.scheduler import Scheduler
from jaxcept_kernels.attention import Implementation
from jaxcept_kernels.layout import KVLayout
from jaxcept_models.config import ModelConfig
from jaxcept_models.loading import Draw, Leaf, random_arrays
from jaxcept_models.model import KVDType, Model, load_model
from jaxcept_models.rope import RopeConfig
from jaxcept_models.sharding import DATA, LLAMA_RULES, TENSOR, check_tensor_size, make_mesh, place, tensor_sizes
from tests.test_scheduler_swaps import Swapping

MESHES = [(2, 1), (4, 1), (8, 1), (4, 2)]
SHARED_FAMILIES = [family for family in FAMILIES if family not in ("gemma3", "mixtral")]  # as gemma2, as qwen3moe
ENGINE_MESHES = dict(
    zip(SHARED_FAMILIES, [(4, 1), (2, 1), (8, 1), (4, 1), (4, 2), (8, 1), (2, 2), (2, 2)], strict=True)
)
SIZE = 8  # tokens of a block
LENGTHS = (5, 30, 17, 44)
SHARED = 16  # tokens that the prompts begin with
RETURNS = ((11, 12, 13), (21,), (31, 32, 33, 34, 35))


def wide(family: str, folder: Path, **overrides: Any) -> Path:
    """A checkpoint with eight heads, so that eight devices can share it; most have two KV heads and, to save time, one
    layer."""
    if family == "gptj":
        sizes = {"n_head": 8, "rotary_dim": 4}
    else:
        sizes = {"num_attention_heads": 8, "num_key_value_heads": 8 if family == "llama2" else 2}
        sizes |= {} if family in ("llama31", "gemma2") else {"num_hidden_layers": 1}
    return build_checkpoint(family, folder, **sizes | overrides)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's checkpoint, written once."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = wide(family, tmp_path_factory.mktemp(family))
        return made[family]

    return get


def mixed_logits(model: Model) -> np.ndarray:
    """Logits of two prompts in one batch, then of a decode beside a chunk: [tokens, vocab]."""
    first, second = (np.random.default_rng(seed).integers(3, 150, 40).tolist() for seed in (1, 2))
    run = PagedRun(model)
    steps = [run.step({0: first[:30], 2: second[:25]}), run.step({0: first[30:31], 2: second[25:]})]
    return np.concatenate([step[seq] for step in steps for seq in (0, 2)])


@pytest.fixture(scope="module")
def expected_logits(folder: Callable[[str], Path]) -> Callable[[str], np.ndarray]:
    known: dict[str, np.ndarray] = {}

    def get(family: str) -> np.ndarray:
        if family not in known:
            known[family] = mixed_logits(load_model(folder(family)))
        return known[family]

    return get


@pytest.mark.parametrize(("tensor", "data"), MESHES)
@pytest.mark.parametrize("family", SHARED_FAMILIES)
def test_logits_are_those_of_one_device(folder, expected_logits, family: str, tensor: int, data: int) -> None:
    model = load_model(folder(family), mesh=make_mesh(tensor, data))
    matrices = [weight for weight in model.weights if weight.ndim > 1 and weight.shape[-1] != model.config.num_experts]
    parts = [weight.addressable_shards[0].data.size / weight.size for weight in matrices]
    assert max(parts) == 1 / tensor  # no matrix is whole anywhere, but for that of a router
    logits, expected = mixed_logits(model), expected_logits(family)
    assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()


class LazyRunner(DeviceRunner):
    """Compiles what is called, when it is: a test calls a few of many sizes."""

    def warm_up(self, progress: object = None) -> None:
        for _, keep, lower in self.lowerings():
            keep(Lazy(lower))


class Lazy:
    def __init__(self, lower: Callable[[], Any]) -> None:
        self._lower = lower
        self._compiled: Any = None

    def __call__(self, *args: Any) -> Any:
        if self._compiled is None:
            self._compiled = self._lower().compile()
        return self._compiled(*args)


def run_engine(model: Model) -> tuple[dict[str, tuple[int, ...]], Engine]:
    """All ids of four sequences with shared prefixes and three interceptions each, in a pool too small for them."""
    config = SchedulerConfig(24, SIZE, 4, 16, 160, model.config.vocab_size, num_host_blocks=24)
    runner = LazyRunner(model, RunnerConfig(24, SIZE, 4, 16, 160, 24))
    runner.warm_up()
    engine = Engine(Scheduler(config, Swapping(budget=2)), runner, MonotonicClock(), Ledger(runner.layout.block_bytes))
    shared = np.random.default_rng(0).integers(3, 150, SHARED).tolist()
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    script = InterceptParams(script=tuple(ScriptedTrigger(6) for _ in RETURNS))
    for index, length in enumerate(LENGTHS):
        prompt = (*shared, *np.random.default_rng(index + 1).integers(3, 150, length).tolist())
        engine.add(Request(str(index), prompt, params, script))
    finished: dict[str, tuple[int, ...]] = {}
    answers = {str(index): iter(RETURNS) for index in range(len(LENGTHS))}
    due: deque[tuple[int, int, tuple[int, ...]]] = deque()
    for step in range(3000):
        for event in engine.step():
            if isinstance(event, Finished):
                finished[event.request_id] = event.token_ids
            elif isinstance(event, Intercepted):
                due.append((step + 6, event.seq_id, next(answers[event.request_id])))
        engine.scheduler.check()
        while due and due[0][0] <= step:
            _, seq_id, ids = due.popleft()
            engine.resume(seq_id, ids)
        if len(finished) == len(LENGTHS):
            return finished, engine
    raise AssertionError("the engine does not come to an end")


@pytest.mark.parametrize(
    ("family", "kv_cache_dtype"), [*((family, "auto") for family in SHARED_FAMILIES), ("llama31", "int8")]
)
def test_greedy_tokens_are_those_of_one_device_through_swaps_and_cached_prefixes(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, family: str, kv_cache_dtype: KVDType
) -> None:
    monkeypatch.setattr("jaxcept.runner.runner.token_buckets", lambda limit, *_: (limit,))  # as each takes a second
    expected, _ = run_engine(load_model(folder(family), kv_cache_dtype=kv_cache_dtype))
    model = load_model(folder(family), mesh=make_mesh(*ENGINE_MESHES[family]), kv_cache_dtype=kv_cache_dtype)
    tokens, engine = run_engine(model)
    assert tokens == expected
    counters = engine.scheduler.counters
    assert counters.swapped_out_blocks > 0 and counters.swapped_in_blocks > 0 and not counters.failed_swaps
    assert counters.cache_hit_tokens > 0 and counters.interceptions == len(RETURNS) * len(LENGTHS)


def test_the_pool_stays_in_place_and_each_device_has_its_heads(folder: Callable[[str], Path]) -> None:
    model = load_model(folder("llama31"), mesh=make_mesh(8))
    runner = LazyRunner(model, RunnerConfig(512, SIZE, 4, 16, 160, 24))
    lowerings = {what: lower for what, _, lower in runner.lowerings()}
    pool_bytes = runner.layout.num_blocks * runner.layout.block_bytes // 8
    assert runner.layout.num_kv_heads == 8  # two, each on four devices
    assert {part.data.shape[1] for part in runner._pool.k.addressable_shards} == {1}
    step = lowerings["step 16"]().compile()
    assert step.memory_analysis().alias_size_in_bytes == pool_bytes
    hlo = step.as_text()
    # Two sums a layer, and one for the embedding.
    assert hlo.count(" all-reduce(") + hlo.count(" all-reduce-start(") == 2 * model.config.num_layers + 1
    assert "all-gather" not in hlo
    for what in ("swap in 8", "copy"):
        assert lowerings[what]().compile().memory_analysis().alias_size_in_bytes == pool_bytes
    for what in ("swap out 8", "swap in 8", "checksum 8", "copy"):
        hlo = lowerings[what]().compile().as_text()
        assert not any(word in hlo for word in ("all-gather", "all-reduce", "collective-permute", "all-to-all"))
    assert runner.swapper is not None
    assert runner.swapper.host.sharding.memory_kind == "pinned_host"
    assert runner.swapper.host.sharding.shard_shape(runner.swapper.host.block_shape)[2] == 1


def test_pallas_kernels_run_on_each_device(folder: Callable[[str], Path], expected_logits) -> None:
    model = load_model(folder("llama2"), implementation=Implementation.PALLAS, mesh=make_mesh(2))
    expected = expected_logits("llama2")
    assert np.abs(mixed_logits(model) - expected).max() < 1e-5 * np.abs(expected).max()


def test_a_vocabulary_that_cannot_be_shared_is_whole_on_every_device(tmp_path: Path) -> None:
    saved = wide("llama31", tmp_path, vocab_size=167, num_hidden_layers=1)
    model = load_model(saved, mesh=make_mesh(2))
    whole = [weight for weight in model.weights if 167 in weight.shape]
    assert len(whole) == 2 and all(weight.is_fully_replicated for weight in whole)
    expected = mixed_logits(load_model(saved))
    assert np.abs(mixed_logits(model) - expected).max() < 1e-5 * np.abs(expected).max()


def shape(heads: int, kv_heads: int, intermediate: int = 96) -> ModelConfig:
    rope = RopeConfig(1e4, 8)
    return ModelConfig("LlamaForCausalLM", 1, 64, heads, kv_heads, 8, intermediate, 160, 512, 1e-5, rope)


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (shape(8, 2), (1, 2, 4, 8)),
        (shape(12, 4), (1, 2, 4, 12)),
        (shape(12, 4, 87), (1,)),
        (shape(7, 7, 112), (1, 7)),
        (shape(16, 16, 64), (1, 2, 4, 8)),
    ],
)
def test_sizes_that_work(config: ModelConfig, sizes: tuple[int, ...]) -> None:
    assert tensor_sizes(config) == sizes
    refused = next(size for size in range(1, 99) if size not in sizes)
    with pytest.raises(ValueError, match=f"tensor={refused}: .* sizes that work: {', '.join(map(str, sizes))}"):
        check_tensor_size(config, refused)


def test_a_mesh_that_does_not_fit_is_refused(folder: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="needs 16 devices, and there are 8"):
        make_mesh(8, 2)
    with pytest.raises(ValueError, match="tensor=0"):
        make_mesh(0)
    with pytest.raises(ValueError, match=r"tensor=3: 8 heads, 2 KV heads .* sizes that work: 1, 2, 4, 8"):
        load_model(folder("llama31"), mesh=make_mesh(3))
    with pytest.raises(ValueError, match="'native' computes on one device"):
        load_model(folder("llama31"), implementation=Implementation.NATIVE, mesh=make_mesh(2))
    with pytest.raises(ValueError, match="tensor_parallel_size=0"):
        EngineConfig(tensor_parallel_size=0)
    with pytest.raises(ValueError, match="'native' computes on one device"):
        EngineConfig(data_parallel_size=2, implementation="native")
    assert choose_implementation(EngineConfig(tensor_parallel_size=2)) is Implementation.XLA


def test_an_array_without_a_rule_is_refused() -> None:
    placement = place(shape(8, 2), LLAMA_RULES, make_mesh(2))
    assert placement.spec("layers.17.mlp.down.weight") == PartitionSpec(TENSOR, None)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.side: the sharding table has no rule"):
        placement.spec("layers.0.mlp.side")


def test_only_heads_of_a_pool_may_be_shared() -> None:
    layout = KVLayout(2, 4, SIZE, 8, 16, np.dtype(np.float32))
    mesh = make_mesh(4, 2)
    both = jax.sharding.NamedSharding(mesh, PartitionSpec(None, (DATA, TENSOR)))
    assert HeadParts(layout, both).layout.num_kv_heads == 1
    assert HeadParts(layout, None).layout == layout
    with pytest.raises(ValueError, match="expected its heads"):
        HeadParts(layout, jax.sharding.NamedSharding(mesh, PartitionSpec(TENSOR)))


def test_random_weights_are_the_same_on_every_mesh() -> None:
    sharding = jax.sharding.NamedSharding(make_mesh(4, 2), PartitionSpec(None, TENSOR))
    leaves = [Leaf("weight", (16, 32), (), lambda rows: rows, where) for where in (None, sharding)]
    one, several = (random_arrays([leaf], [Draw(0.0, 0.02)], 3)[0] for leaf in leaves)
    assert several.sharding == sharding
    np.testing.assert_array_equal(np.asarray(one), np.asarray(several))
