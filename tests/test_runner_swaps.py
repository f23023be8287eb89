"""Contexts that leave the device and come back: plans by hand, then the whole engine. Greedy tokens never change."""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import replace

import jax
import numpy as np
import pytest
from checkpoints import build_checkpoint
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcept.clock import MonotonicClock
from jaxcept.engine import Engine
from jaxcept.metrics import Ledger
from jaxcept.runner.compiles import CompileCounter
from jaxcept.runner.host_pool import copy_parts
from jaxcept.runner.runner import DeviceRunner, RunnerConfig
from jaxcept.scheduler.config import SchedulerConfig
from jaxcept.scheduler.events import Finished, Intercepted
from jaxcept.scheduler.params import InterceptParams, SamplingParams, ScriptedTrigger
from jaxcept.scheduler.plan import (
    BlockMove,
    Chunk,
    ChunkKind,
    Decodes,
    FailedMove,
    MoveKind,
    RowSetup,
    StepPlan,
    StepResult,
    TableUpdate,
)
from jaxcept.scheduler.policies.preserve import Preserve
from jaxcept.scheduler.policies.swap import Swap
from jaxcept.scheduler.policy import Policy
from jaxcept.scheduler.request import Request
from jaxcept.scheduler.scheduler import Scheduler
from jaxcept_models.model import Model, load_model
from tests.links import SlowLink
from tests.test_scheduler_swaps import Swapping

SIZE = 8  # tokens of a block
GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
PROMPT = tuple(int(i) for i in np.random.default_rng(1).integers(3, 150, 21))
OTHER = tuple(int(i) for i in np.random.default_rng(2).integers(3, 150, 24))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(build_checkpoint("llama31", tmp_path_factory.mktemp("llama")), dtype="float32")


def make_runner(model: Model, link: SlowLink | None = None, num_host_blocks: int = 24) -> DeviceRunner:
    runner = DeviceRunner(model, RunnerConfig(32, SIZE, 4, 32, 160, num_host_blocks), link)
    runner.warm_up()
    return runner


class Driver:
    """Plans by hand: one sequence a row, whose KV lies where the test says."""

    def __init__(self, runner: DeviceRunner, depth: int) -> None:
        self.runner = runner
        self.depth = depth
        self.tokens: dict[int, list[int]] = {}  # by row
        self.computed: dict[int, int] = {}
        self.results: list[StepResult] = []
        self._in_flight: deque[StepPlan] = deque()
        self._step_id = 0

    def submit(
        self, chunks: tuple[Chunk, ...] = (), decodes: tuple[int, ...] = (), moves: tuple[BlockMove, ...] = (),
        tables: tuple[TableUpdate, ...] = (), rows: tuple[RowSetup, ...] = (), waits: bool = False,
    ) -> int:  # fmt: skip
        """One plan; collects what the depth does not keep in flight."""
        positions = tuple(self.computed[row] for row in decodes)
        for row in decodes:
            self.computed[row] += 1
        for chunk in chunks:
            self.computed[chunk.row] = chunk.start + len(chunk.token_ids)
        plan = StepPlan(self._step_id, Decodes(decodes, decodes, positions), chunks, tables, rows, moves, waits)
        self._step_id += 1
        self.runner.submit(plan)
        self._in_flight.append(plan)
        self.drain(self.depth)
        return plan.step_id

    def drain(self, depth: int = 0) -> None:
        """Collects until so many are in flight."""
        while len(self._in_flight) > depth:
            plan, result = self._in_flight.popleft(), self.runner.collect()
            assert plan.step_id == result.step_id
            for row, token_id in zip(plan.sampling_seq_ids, result.token_ids, strict=True):
                self.tokens[row].append(token_id)
            self.results.append(result)

    def start(self, row: int, ids: tuple[int, ...], blocks: tuple[int, ...], begin: int = 0,
              moves: tuple[BlockMove, ...] = (), waits: bool = False) -> None:  # fmt: skip
        """A sequence takes a row; its KV up to `begin` is in the blocks already, the rest is computed."""
        self.tokens[row] = list(ids)
        setup = RowSetup(row, row, GREEDY, 0, ids, (), len(ids), ())
        chunk = Chunk(row, row, ChunkKind.PREFILL, begin, ids[begin:], True)
        self.submit((chunk,), moves=moves, tables=(TableUpdate(row, 0, blocks),), rows=(setup,), waits=waits)

    def until(self, name: str, step_id: int, busy_row: int | None) -> None:
        """Steps until a result says that these swaps are over; with nothing else to do, plans without tokens."""
        for _ in range(500):
            reached = getattr(self.results[-1], name) if self.results else None
            if reached is not None and reached >= step_id:
                return
            self.submit(decodes=() if busy_row is None else (busy_row,))
        raise AssertionError(f"{name} does not reach {step_id}")


def moves_of(kind: MoveKind, pairs: list[tuple[int, int]]) -> tuple[BlockMove, ...]:
    return tuple(BlockMove(kind, src, dst) for src, dst in pairs)


def uninterrupted(runner: DeviceRunner, count: int) -> list[int]:
    driver = Driver(runner, 0)
    driver.start(0, PROMPT, (0, 1, 2, 3, 4, 5))
    for _ in range(count - 1):
        driver.submit(decodes=(0,))
    return driver.tokens[0][len(PROMPT) :]


@pytest.mark.parametrize(
    ("depth", "is_busy", "waits", "dtype"),
    [*((*each, None) for each in itertools.product((0, 1), (True, False), (False, True))), (1, True, False, "int8")],
)
def test_a_context_goes_out_is_overwritten_and_comes_back(
    model: Model, depth: int, is_busy: bool, waits: bool, dtype: str | None
) -> None:
    runner = make_runner(replace(model, kv_cache_dtype=None if dtype is None else np.dtype(dtype)))
    expected = uninterrupted(runner, 20)
    compiled = runner.compiles.count
    driver = Driver(runner, depth)
    driver.start(0, PROMPT, (0, 1, 2, 3))
    for _ in range(7):
        driver.submit(decodes=(0,))
    driver.drain()
    ids, computed = tuple(driver.tokens[0]), driver.computed[0]
    assert len(ids) == len(PROMPT) + 8 and computed == len(ids) - 1 == 28

    # The same plan sends the blocks out and lets another sequence write into them.
    pairs = [(0, 7), (1, 3), (2, 23), (3, 0)]
    out = moves_of(MoveKind.SWAP_OUT, pairs)
    driver.start(1, OTHER, (3, 2, 1, 0, 20, 21, 22, 23), moves=out, waits=waits)
    step_id = driver._step_id - 1
    driver.until("outs_through", step_id, 1 if is_busy else None)

    back = [(host, device + 10) for device, host in pairs]
    step_id = driver.submit(decodes=(1,), moves=moves_of(MoveKind.SWAP_IN, back), waits=waits)
    driver.until("ins_through", step_id, 1 if is_busy else None)
    driver.start(2, ids, (10, 11, 12, 13, 14), computed, moves_of(MoveKind.LAND, back))
    while len(driver.tokens[2]) < len(PROMPT) + 20:
        driver.submit(decodes=(2,))
        driver.drain(depth)
    driver.drain()
    assert driver.tokens[2][len(PROMPT) :][:20] == expected
    assert not any(result.failed for result in driver.results)
    assert runner.compiles.count == compiled


def test_an_empty_plan_waits_for_one_swap_and_for_nothing_else(model: Model) -> None:
    driver = Driver(make_runner(model), 0)
    driver.submit()
    assert driver.results[-1].token_ids == () and driver.results[-1].outs_through is None
    driver.start(0, PROMPT, (0, 1, 2))
    first = driver.submit(moves=moves_of(MoveKind.SWAP_OUT, [(0, 0)]))
    assert driver.results[-1].outs_through == first
    driver.submit()
    second = driver.submit(moves=moves_of(MoveKind.SWAP_IN, [(0, 9)]))
    assert driver.results[-1].ins_through == second and driver.results[-1].outs_through == first
    driver.submit(moves=moves_of(MoveKind.LAND, [(0, 9)]))


def test_a_lost_and_a_corrupted_block_are_told_and_the_rest_lands(model: Model) -> None:
    link = SlowLink()
    runner = make_runner(model, link)
    driver = Driver(runner, 1)
    driver.start(0, PROMPT, (0, 1, 2))
    link.lost, link.corrupted = {1}, {4}
    step_id = driver.submit(decodes=(0,), moves=moves_of(MoveKind.SWAP_OUT, [(0, 0), (1, 1), (2, 2)]))
    driver.until("outs_through", step_id, None)
    step_id = driver.submit(decodes=(0,), moves=moves_of(MoveKind.SWAP_IN, [(0, 10), (2, 12)]))
    driver.until("ins_through", step_id, None)
    driver.drain()
    failed = [move for result in driver.results for move in result.failed]
    assert failed == [
        FailedMove(1, BlockMove(MoveKind.SWAP_OUT, 1, 1)),
        FailedMove(step_id, BlockMove(MoveKind.SWAP_IN, 2, 12)),
    ]


def test_a_runner_without_host_blocks_has_nothing_for_swaps(model: Model) -> None:
    runner = DeviceRunner(model, RunnerConfig(32, SIZE, 4, 32, 160))
    assert runner.swapper is None
    assert not [what for what, _, _ in runner.lowerings() if "swap" in what or "checksum" in what]
    with pytest.raises(AssertionError, match="num_host_blocks is 0"):
        runner.submit(StepPlan(0, Decodes(), (), (), (), (BlockMove(MoveKind.SWAP_OUT, 0, 0),)))
    with pytest.raises(ValueError, match="num_host_blocks=-1"):
        RunnerConfig(32, SIZE, 4, 32, 160, -1)


# The whole engine.

RETURNS = ((11, 12, 13), (21,), (31, 32, 33, 34, 35))
PROMPTS = [tuple(int(i) for i in np.random.default_rng(9).integers(3, 150, n)) for n in (5, 30, 17, 44)]


def run_engine(
    model: Model, policy: Policy, depth: int, link: SlowLink | None = None, num_host_blocks: int = 24
) -> tuple[dict[str, tuple[int, ...]], Engine]:
    """All ids of four sequences with three interceptions each, in a pool too small for all of them."""
    runner = make_runner(model, link, num_host_blocks)
    config = SchedulerConfig(
        24, SIZE, 4, 32, 160, model.config.vocab_size, enable_prefix_caching=False, num_host_blocks=num_host_blocks
    )
    scheduler = Scheduler(config, policy)
    engine = Engine(scheduler, runner, MonotonicClock(), Ledger(runner.layout.block_bytes), depth)
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    script = InterceptParams(script=tuple(ScriptedTrigger(6) for _ in RETURNS))
    for index, prompt in enumerate(PROMPTS):
        engine.add(Request(str(index), prompt, params, script))
    compiled = runner.compiles.count
    finished: dict[str, tuple[int, ...]] = {}
    answers = {str(index): iter(RETURNS) for index in range(len(PROMPTS))}
    due: deque[tuple[int, int, tuple[int, ...]]] = deque()
    step = 0
    while len(finished) < len(PROMPTS):
        step += 1
        assert step < 5000, "the engine does not come to an end"
        for event in engine.step():
            if isinstance(event, Finished):
                finished[event.request_id] = event.token_ids
            elif isinstance(event, Intercepted):
                due.append((step + 6, event.seq_id, next(answers[event.request_id])))
        scheduler.check()
        while due and due[0][0] <= step:
            _, seq_id, ids = due.popleft()
            engine.resume(seq_id, ids)
    assert runner.compiles.count == compiled
    return finished, engine


@pytest.fixture(scope="module")
def preserved(model: Model) -> dict[str, tuple[int, ...]]:
    return run_engine(model, Preserve(), 0)[0]


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("budget", [None, 2])
def test_tokens_are_equal_swapped_and_preserved(model, preserved, budget: int | None, depth: int) -> None:
    swapped, engine = run_engine(model, Swapping(budget=budget), depth)
    assert swapped == preserved
    counters = engine.scheduler.counters
    assert counters.swapped_out_blocks > 0 and counters.swapped_in_blocks > 0 and not counters.failed_swaps


def test_tokens_are_equal_where_every_swap_is_waited_for(model, preserved) -> None:
    swapped, engine = run_engine(model, Swap(), 1)
    assert swapped == preserved and engine.scheduler.counters.swapped_in_blocks > 0


@pytest.mark.parametrize("depth", [0, 1])
def test_tokens_are_equal_on_a_slow_link_that_loses_and_corrupts_blocks(model, preserved, depth: int) -> None:
    link = SlowLink()
    link.delay = 2
    link.lost = set(range(3, 1000, 11))
    link.corrupted = set(range(1, 1000, 6))
    swapped, engine = run_engine(model, Swapping(budget=3), depth, link)
    assert swapped == preserved
    assert engine.scheduler.counters.failed_swaps > 0 and engine.scheduler.counters.recomputed_tokens > 0


def test_the_host_pool_may_be_too_small(model, preserved) -> None:
    swapped, _ = run_engine(model, Swapping(), 1, num_host_blocks=3)
    assert swapped == preserved


def test_a_block_is_copied_device_by_device_where_others_have_parts_of_it() -> None:
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    device = NamedSharding(mesh, PartitionSpec(None, None, "tensor"))
    host = device.with_memory_kind("pinned_host")
    block = jax.device_put(np.arange(48.0, dtype=np.float32).reshape(2, 3, 4, 2), device)
    compiles = CompileCounter()
    out, again = copy_parts([block, block], host)
    (back,) = copy_parts([out], device)
    assert out.sharding == again.sharding == host and back.sharding == device and compiles.count == 0
    assert np.array_equal(back, block) and out.sharding.memory_kind == "pinned_host"


def test_the_pool_stays_where_it_is(model: Model) -> None:
    runner = make_runner(model)
    place = runner._pool.k.unsafe_buffer_pointer()
    driver = Driver(runner, 0)
    driver.start(0, PROMPT, (0, 1, 2), moves=moves_of(MoveKind.SWAP_OUT, [(0, 0), (1, 1)]))
    driver.submit()
    driver.submit(moves=moves_of(MoveKind.SWAP_IN, [(0, 9), (1, 8)]))
    driver.submit(moves=moves_of(MoveKind.LAND, [(0, 9), (1, 8)]))
    jax.block_until_ready(runner._pool)
    assert runner._pool.k.unsafe_buffer_pointer() == place
