"""The swapper on small pools: contents, checksums, what is over when, and everything that can go wrong on the link."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding

from jaxcept.runner.compiles import CompileCounter
from jaxcept.runner.host_pool import HostPool, block_sharding
from jaxcept.runner.swap_times import SwapTimes, TransferTimeoutError
from jaxcept.runner.swapper import ARITIES, Swapper, SwapReport, split, split_moves
from jaxcept.scheduler.plan import BlockMove, FailedMove, MoveKind
from jaxcept_kernels.blocks import block_checksums
from jaxcept_kernels.layout import KVLayout, KVPool
from tests.links import SlowLink

NUM_BLOCKS = 48
FLOAT32 = jnp.dtype(jnp.float32)


def layout_of(dtype: jnp.dtype = FLOAT32) -> KVLayout:
    return KVLayout(3, NUM_BLOCKS, 4, 4, 8, dtype)


def pool_sharding(num_devices: int) -> Sharding:
    if num_devices == 1:
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])
    mesh = jax.make_mesh((num_devices,), ("heads",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec(None, "heads", None, None))


def random_bits(shape: Sequence[int], dtype: jnp.dtype, seed: int) -> np.ndarray:
    """Every bit pattern but one NaN alone: XLA's CPU writes bfloat16 by way of float32, which makes them equal."""
    size = int(np.prod(shape)) * dtype.itemsize
    values = np.random.default_rng(seed).integers(0, 256, size, np.uint8).view(dtype).reshape(shape)
    with np.errstate(invalid="ignore"):
        return np.where(np.isnan(values), dtype.type("nan"), values)


def bits(array: jax.Array | np.ndarray) -> np.ndarray:
    values = np.asarray(array)
    return values.view(np.uint32 if values.dtype.itemsize == 4 else np.uint16)


class Rig:
    """A swapper, its pool, and what the pool's blocks held at first."""

    def __init__(self, num_devices: int = 1, dtype: jnp.dtype = FLOAT32, num_host_blocks: int = 64) -> None:
        self.link = SlowLink()
        self.layout = layout_of(dtype)
        self.sharding = pool_sharding(num_devices)
        self.swapper = Swapper(self.layout, num_host_blocks, self.sharding, self.link)
        for _, keep, lower in self.swapper.lowerings():
            keep(lower().compile())
        self.swapper.host.warm_up()
        self.first = [random_bits(self.layout.shape, dtype, seed) for seed in (1, 2)]
        self.pool = self.first_pool()
        self.steps = count()

    def first_pool(self) -> KVPool:
        """In memory of JAX's own, which can be donated; `device_put` alone may share NumPy's."""
        pool = self._write(_overwritten, KVPool(*(jax.device_put(part, self.sharding) for part in self.first)))
        return self._write(_filled, pool, KVPool(*self.first))

    def _write(self, change: Callable[..., KVPool], *pools: KVPool) -> KVPool:
        out = KVPool(self.sharding, self.sharding)
        return jax.jit(change, donate_argnums=0, keep_unused=True, out_shardings=out)(*pools)

    def overwrite(self) -> None:
        """Another content in every block, in the pool's own memory."""
        place = self.pool.k.addressable_shards[0].data.unsafe_buffer_pointer()
        self.pool = self._write(_overwritten, self.pool)
        assert self.pool.k.addressable_shards[0].data.unsafe_buffer_pointer() == place

    def submit(self, *moves: tuple[MoveKind, int, int], waits: bool = False) -> int:
        """One plan's moves, as a runner does them."""
        step_id = next(self.steps)
        by_kind = split_moves(BlockMove(*move) for move in moves)
        self.swapper.poll()
        self.swapper.swap_out(step_id, self.pool, by_kind[MoveKind.SWAP_OUT], waits)
        self.pool = self.swapper.land(self.pool, by_kind[MoveKind.LAND])
        self.swapper.swap_in(step_id, by_kind[MoveKind.SWAP_IN], waits)
        self.swapper.end_submit()
        return step_id

    def settle(self) -> SwapReport:
        """Everything under way is over; the report that tells so."""
        self.swapper.finish(10**9)
        return self.swapper.report()

    def out(self, *pairs: tuple[int, int]) -> SwapReport:
        self.submit(*((MoveKind.SWAP_OUT, src, dst) for src, dst in pairs))
        return self.settle()

    def back(self, *pairs: tuple[int, int]) -> SwapReport:
        """Swaps in and lands (host block, device block) pairs."""
        self.submit(*((MoveKind.SWAP_IN, src, dst) for src, dst in pairs))
        report = self.settle()
        self.submit(*((MoveKind.LAND, src, dst) for src, dst in pairs))
        return report

    def assert_holds(self, block: int, original: int) -> None:
        """The pool's block has the first content of another."""
        rows = np.arange(self.layout.num_layers) * NUM_BLOCKS
        for part, first in zip(self.pool, self.first, strict=True):
            np.testing.assert_array_equal(bits(part)[rows + block], bits(first)[rows + original])


def _overwritten(pool: KVPool) -> KVPool:
    return KVPool(jnp.full_like(pool.k, 7), jnp.full_like(pool.v, 9))


def _filled(pool: KVPool, first: KVPool) -> KVPool:
    return KVPool(pool.k.at[:].set(first.k), pool.v.at[:].set(first.v))


@pytest.fixture(scope="module")
def shared_rig() -> Rig:
    return Rig()


@pytest.fixture
def rig(shared_rig: Rig) -> Iterator[Rig]:
    """A rig of its own state; compiled once."""
    fresh = Rig.__new__(Rig)
    fresh.__dict__ |= shared_rig.__dict__
    fresh.link = SlowLink()
    fresh.swapper = Swapper(shared_rig.layout, 64, shared_rig.sharding, fresh.link)
    for table in ("_gather", "_land", "_check"):
        setattr(fresh.swapper, table, getattr(shared_rig.swapper, table))
    fresh.pool = fresh.first_pool()
    fresh.steps = count()
    yield fresh
    assert not fresh.swapper.is_busy


@pytest.mark.parametrize("num_devices", [1, 4])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_every_bit_survives_while_the_pool_is_overwritten(num_devices: int, dtype: jnp.dtype) -> None:
    rig = Rig(num_devices, jnp.dtype(dtype))
    pairs = [(src, (src * 5 + 3) % 64) for src in range(41)]  # more than the largest arity, and padding
    report_at = rig.submit(*((MoveKind.SWAP_OUT, src, dst) for src, dst in pairs))
    rig.overwrite()
    assert rig.settle() == (report_at, None, ())
    back = [(dst, (src + 7) % NUM_BLOCKS) for src, dst in pairs]
    report = rig.back(*back)
    assert report.ins_through == report_at + 1 and not report.failed
    for (src, _), (_, place) in zip(pairs, back, strict=True):
        rig.assert_holds(place, src)
    assert bool(jnp.all(rig.pool.k[NUM_BLOCKS + 2] == 7)), "nothing landed there"
    assert rig.pool.k.sharding.is_equivalent_to(rig.sharding, 4)


def test_each_device_keeps_its_own_heads_in_pinned_memory() -> None:
    pool = HostPool(layout_of(), 3, block_sharding(pool_sharding(4)))
    assert pool.sharding.memory_kind == "pinned_host"
    assert pool.sharding.shard_shape(pool.block_shape) == (2, 3, 1, 4, 8)
    assert pool.num_bytes == 3 * 2 * 3 * 4 * 4 * 8 * 4
    pool.warm_up()
    with pytest.raises(ValueError, match="its heads"):
        mesh = jax.make_mesh((4,), ("layers",), axis_types=(AxisType.Auto,))
        Swapper(layout_of(), 3, NamedSharding(mesh, PartitionSpec("layers")))
    with pytest.raises(ValueError, match="num_blocks=0"):
        HostPool(layout_of(), 0, block_sharding(pool_sharding(1)))


def test_nothing_compiles_for_whatever_number_of_blocks(rig: Rig) -> None:
    jax.block_until_ready(rig.pool)
    compiles = CompileCounter()
    for number in (1, 2, 8, 9, 17, 33, 40):
        rig.out(*((i, i) for i in range(number)))
        rig.back(*((i, i) for i in range(number)))
    assert compiles.count == 0
    for block in range(NUM_BLOCKS):
        rig.assert_holds(block, block)


def test_calls_are_as_large_as_possible_and_rarely_padded() -> None:
    small, large = ARITIES
    assert [(n, len(part)) for n, part in split(range(3))] == [(small, 3)]
    assert [(n, len(part)) for n, part in split(range(large + small + 1))] == [
        (large, large),
        (small, small),
        (small, 1),
    ]
    assert [(n, len(part)) for n, part in split(range(large - 1))] == [(large, large - 1)]
    assert [item for _, part in split(range(100)) for item in part] == list(range(100))
    assert list(split([])) == []


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_checksums_notice_a_changed_bit_and_anything_in_the_wrong_place(dtype: jnp.dtype) -> None:
    block = random_bits((2, 3, 4, 4, 8), jnp.dtype(dtype), 5)
    flipped = block.copy()
    flipped.view(np.uint8)[1, 2, 3, 1, -1] ^= 1
    variants = [block, flipped, block[::-1], block[:, ::-1], block[:, :, ::-1], block[..., ::-1, :], block[..., ::-1]]
    sums = np.asarray(block_checksums(jnp.asarray(np.stack(variants))))
    assert sums.shape == (7, 4) and sums.dtype == np.uint32
    assert (sums[0] != sums[1]).tolist() == [False, False, False, True]
    assert (sums[2:] != sums[0]).all()
    again = np.asarray(block_checksums(jnp.asarray(np.stack([flipped, block]))))
    np.testing.assert_array_equal(again, sums[[1, 0]])


def test_swaps_are_over_in_the_order_of_plans_and_directions_apart(rig: Rig) -> None:
    rig.out((0, 10))
    rig.link.is_open = False
    first_in = rig.submit((MoveKind.SWAP_IN, 10, 5))
    first_out = rig.submit((MoveKind.SWAP_OUT, 1, 11))
    second_out = rig.submit((MoveKind.SWAP_OUT, 2, 12))
    rig.swapper.poll()
    assert rig.swapper.report() == (0, None, ())
    rig.link.is_open = True
    report = rig.settle()
    assert report == (second_out, first_in, ()) and first_out < second_out


def test_what_is_not_landed_after_the_report_is_dropped_and_may_be_asked_for_again(rig: Rig) -> None:
    rig.out((3, 0))
    rig.overwrite()
    rig.submit((MoveKind.SWAP_IN, 0, 20))
    rig.swapper.finish(10**9)
    rig.submit()  # submitted before the report: nothing is dropped
    assert 20 in rig.swapper._staged
    rig.swapper.report()
    rig.submit()
    assert not rig.swapper._staged
    with pytest.raises(AssertionError, match="not staged"):
        rig.swapper.land(rig.pool, [BlockMove(MoveKind.LAND, 0, 20)])
    rig.back((0, 20))
    rig.assert_holds(20, 3)


def test_landing_before_the_report_is_a_broken_plan(rig: Rig) -> None:
    rig.out((3, 0))
    rig.submit((MoveKind.SWAP_IN, 0, 20))
    rig.swapper.finish(10**9)
    with pytest.raises(AssertionError, match="not reported"):
        rig.swapper.land(rig.pool, [BlockMove(MoveKind.LAND, 0, 20)])


def test_a_device_block_asked_for_twice_gets_the_later_content(rig: Rig) -> None:
    rig.out((3, 0), (4, 1))
    rig.link.is_open = False
    rig.submit((MoveKind.SWAP_IN, 0, 20))
    rig.submit((MoveKind.SWAP_IN, 1, 20))
    rig.link.is_open = True
    assert not rig.settle().failed
    rig.submit((MoveKind.LAND, 1, 20))
    rig.assert_holds(20, 4)


def test_a_host_block_used_again_keeps_the_later_content_though_the_older_copy_ends_last(rig: Rig) -> None:
    rig.link.is_open = False
    rig.link.lost = {0}
    older = rig.submit((MoveKind.SWAP_OUT, 3, 9))
    newer = rig.submit((MoveKind.SWAP_OUT, 4, 9))
    rig.link.is_open = True
    report = rig.settle()
    assert report == (newer, None, (FailedMove(older, BlockMove(MoveKind.SWAP_OUT, 3, 9)),))
    rig.overwrite()
    assert not rig.back((9, 30)).failed
    rig.assert_holds(30, 4)


def test_a_refused_copy_out_is_told_once_and_its_block_cannot_come_in(rig: Rig) -> None:
    rig.link.refused = [MoveKind.SWAP_OUT]
    report = rig.out((3, 0), (4, 1))
    moves = [BlockMove(MoveKind.SWAP_OUT, 3, 0), BlockMove(MoveKind.SWAP_OUT, 4, 1)]
    assert report == (0, None, tuple(FailedMove(0, move) for move in moves))
    assert rig.settle() == (0, None, ())
    rig.submit((MoveKind.SWAP_IN, 1, 7))
    assert rig.settle() == (0, 1, (FailedMove(1, BlockMove(MoveKind.SWAP_IN, 1, 7)),))


def test_a_copy_lost_on_the_way_leaves_the_others_alone(rig: Rig) -> None:
    rig.link.lost = {1, 5}  # the second block out, and the third that comes in (0, 2 and 3 do)
    report = rig.out((3, 0), (4, 1), (5, 2), (6, 3))
    assert report.failed == (FailedMove(0, BlockMove(MoveKind.SWAP_OUT, 4, 1)),)
    rig.link.lost = {6}
    rig.submit((MoveKind.SWAP_IN, 0, 20), (MoveKind.SWAP_IN, 2, 21), (MoveKind.SWAP_IN, 3, 22))
    assert rig.settle().failed == (FailedMove(1, BlockMove(MoveKind.SWAP_IN, 3, 22)),)
    rig.submit((MoveKind.LAND, 0, 20), (MoveKind.LAND, 2, 21))
    rig.assert_holds(20, 3)
    rig.assert_holds(21, 5)
    rig.assert_holds(22, 22)


def test_a_refused_copy_in_is_told(rig: Rig) -> None:
    rig.out((3, 0))
    rig.link.refused = [MoveKind.SWAP_IN]
    rig.submit((MoveKind.SWAP_IN, 0, 20))
    assert rig.settle() == (0, 1, (FailedMove(1, BlockMove(MoveKind.SWAP_IN, 0, 20)),))


@pytest.mark.parametrize("corrupted", [1, 4])
def test_a_block_corrupted_on_either_way_is_told_on_the_way_in(rig: Rig, corrupted: int) -> None:
    rig.link.corrupted = {corrupted}  # 0, 1, 2 go out, 3, 4, 5 come in
    assert not rig.out((3, 0), (4, 1), (5, 2)).failed
    rig.submit((MoveKind.SWAP_IN, 0, 20), (MoveKind.SWAP_IN, 1, 21), (MoveKind.SWAP_IN, 2, 22))
    assert rig.settle() == (0, 1, (FailedMove(1, BlockMove(MoveKind.SWAP_IN, 1, 21)),))
    rig.submit((MoveKind.LAND, 0, 20), (MoveKind.LAND, 2, 22))
    rig.assert_holds(20, 3)
    rig.assert_holds(22, 5)


def test_a_plan_that_waits_is_over_when_it_is_submitted(rig: Rig) -> None:
    rig.submit(*((MoveKind.SWAP_OUT, i, i) for i in range(40)), waits=True)
    assert not rig.swapper.is_busy and rig.swapper.report() == (0, None, ())
    # From the last of the parts in which the blocks went as well as from the first.
    rig.submit((MoveKind.SWAP_IN, 0, 41), (MoveKind.SWAP_IN, 39, 42), waits=True)
    assert not rig.swapper.is_busy and rig.swapper.report() == (0, 1, ())


def test_waiting_for_the_next_one_ends_with_news_or_when_nothing_is_under_way(rig: Rig) -> None:
    rig.swapper.wait_next()
    rig.submit((MoveKind.SWAP_OUT, 1, 1))
    rig.swapper.wait_next()
    assert rig.swapper.report().outs_through == 0
    rig.submit((MoveKind.SWAP_OUT, 2, 2))
    rig.swapper.finish(10**9)
    rig.submit((MoveKind.SWAP_OUT, 3, 3))
    rig.link.is_open = False
    rig.swapper.wait_next()  # the one before is news
    assert rig.swapper.report().outs_through == 1
    rig.link.is_open = True
    rig.settle()


def test_a_transfer_that_never_ends_is_told_instead_of_waited_for(rig: Rig) -> None:
    times, rig.swapper.times = rig.swapper.times, SwapTimes(limit_s=0.02)
    rig.submit((MoveKind.SWAP_OUT, 1, 1))
    rig.link.is_open = False
    with pytest.raises(TransferTimeoutError, match=r"not ended in 0\.02 s"):
        rig.swapper.wait_next()
    with pytest.raises(TransferTimeoutError):
        rig.swapper.finish(10**9)
    rig.link.is_open, rig.swapper.times = True, times
    rig.settle()


def test_seconds_of_the_links_count_once_and_waiting_is_not_hidden() -> None:
    now = 0.0
    times = SwapTimes(60.0, lambda: now)
    first, second = times.now(), times.now()
    now = 3.0
    times.over("out", first)
    now = 5.0
    times.over("out", second)  # it stood behind the first
    times.over("in", 4.0)
    assert times.busy_s == 6.0 and times.hidden_s == 6.0
    polls = iter((False, True))

    def is_over() -> bool:
        nonlocal now
        now += 1.0
        return next(polls)

    times.wait(is_over, 0.0)
    assert times.waited_s == 2.0 and times.hidden_s == 4.0
