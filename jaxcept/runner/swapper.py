"""Moves blocks between the KV pool and the host behind the running step: starts copies, and notes when they are over.

Out: gather on the device, which also computes checksums, then a copy to pinned memory. In: a copy to the device, a
checksum of what arrived, compared with the one from the way out, and, when a later plan says so, a scatter into the
pool. Nothing here waits but `finish` and `wait_next`.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jaxcept.runner.host_pool import (
    HeadParts,
    HostBlock,
    HostPool,
    Link,
    block_sharding,
    checksum_sharding,
    is_ready,
    local_columns,
)
from jaxcept.runner.swap_times import SwapTimes
from jaxcept.scheduler.plan import BlockMove, FailedMove, MoveKind
from jaxcept_kernels.attention import Implementation
from jaxcept_kernels.blocks import block_checksums, gather_each, scatter_each
from jaxcept_kernels.layout import KVLayout, KVPool

logger = logging.getLogger(__name__)

ARITIES = (8, 32)  # blocks in one compiled call
POLL_S = 5e-5
TRANSFER_LIMIT_S = 60.0  # a step's blocks take milliseconds

T = TypeVar("T")
Executable = Callable[..., Any]
Job = tuple[str, Callable[[Any], None], Callable[[], Any]]  # name, where to keep the executable, how to lower it


class SwapReport(NamedTuple):
    """The fields of a StepResult that tell of swaps."""

    outs_through: int | None
    ins_through: int | None
    failed: tuple[FailedMove, ...]


@dataclass(eq=False, slots=True)
class _Outs:
    """The swaps out of one plan."""

    step_id: int
    sent_at: float
    pending: deque[tuple[BlockMove, HostBlock]] = field(default_factory=deque)
    checksums: list[tuple[jax.Array, list[HostBlock]]] = field(default_factory=list)  # [arity, kv_heads] and its rows
    failed: list[FailedMove] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class _Staged:
    """A block on its way in, or there."""

    step_id: int
    move: BlockMove
    content: jax.Array
    expected: np.ndarray  # [kv_heads of this host] uint32


@dataclass(eq=False, slots=True)
class _Ins:
    """The swaps in of one plan."""

    step_id: int
    sent_at: float
    pending: deque[_Staged] = field(default_factory=deque)
    arrived: list[_Staged] = field(default_factory=list)
    checksums: list[tuple[jax.Array, list[_Staged]]] = field(default_factory=list)  # of what arrived, once it has
    failed: list[FailedMove] = field(default_factory=list)


class Swapper:
    """The host's part of the KV cache, for one runner. Plans come in the order of their step ids.

    The pool may be sharded over its KV heads: each device then keeps its own heads' part in its own pinned memory.
    """

    def __init__(
        self,
        layout: KVLayout,
        num_host_blocks: int,
        sharding: Sharding,
        link: Link | None = None,
        implementation: Implementation = Implementation.XLA,
    ) -> None:
        """`sharding` is that of the pool's arrays. ValueError where it shards anything but the heads."""
        self.layout = layout
        self.host = HostPool(layout, num_host_blocks, block_sharding(sharding))
        self._pool_sharding = sharding
        self._implementation = implementation
        self._link = link if link is not None else Link()
        self.times = SwapTimes(TRANSFER_LIMIT_S)
        self._outs: deque[_Outs] = deque()
        self._ins: deque[_Ins] = deque()
        self._staged: dict[int, _Staged] = {}  # by device block
        self._failed: list[FailedMove] = []
        self._through: tuple[int | None, int | None] = (None, None)  # out, in
        self._reported: tuple[int | None, int | None] = (None, None)
        self._last_followed: int | None = None
        self._gather: dict[int, Executable] = {}
        self._land: dict[int, Executable] = {}
        self._check: dict[int, Executable] = {}

    # The compiled borders.

    def lowerings(self) -> list[Job]:
        """Everything that swapping runs on the device, for the caller to compile."""
        pool_sharding, layout = self._pool_sharding, self.layout
        checks = checksum_sharding(pool_sharding)
        whole = pool_sharding
        if isinstance(whole, NamedSharding):
            whole = NamedSharding(whole.mesh, PartitionSpec())
        part: Any = jax.ShapeDtypeStruct(layout.shape, layout.dtype, sharding=pool_sharding)
        pool = KVPool(part, part)
        block = jax.ShapeDtypeStruct(self.host.block_shape, layout.dtype, sharding=self.host.device)

        def ids(n: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((n,), jnp.int32, sharding=whole)

        heads = HeadParts(layout, pool_sharding)
        here, no_part = heads.layout, PartitionSpec()

        def gather(pool: KVPool, block_ids: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array]:
            return gather_each(pool, here, block_ids, implementation=self._implementation)

        def land(pool: KVPool, block_ids: jax.Array, blocks: tuple[jax.Array, ...]) -> KVPool:
            return scatter_each(pool, here, block_ids, blocks, implementation=self._implementation)

        def check(blocks: tuple[jax.Array, ...]) -> jax.Array:
            return block_checksums(jnp.stack(blocks))

        def lower_gather(n: int) -> Any:
            each = heads.on_each(gather, (heads.pool_spec, no_part), (heads.block_spec, heads.checksum_spec))
            return jax.jit(each, out_shardings=((self.host.device,) * n, checks)).lower(pool, ids(n))

        def lower_land(n: int) -> Any:
            out = KVPool(pool_sharding, pool_sharding)  # type: ignore[arg-type]  # a tree of the same shape
            each = heads.on_each(land, (heads.pool_spec, no_part, heads.block_spec), heads.pool_spec)
            return jax.jit(each, donate_argnums=0, out_shardings=out).lower(pool, ids(n), (block,) * n)

        def lower_check(n: int) -> Any:
            each = heads.on_each(check, (heads.block_spec,), heads.checksum_spec)
            return jax.jit(each, out_shardings=checks).lower((block,) * n)

        jobs: list[Job] = []
        for n in reversed(ARITIES):
            jobs.append((f"swap out {n}", partial(self._gather.__setitem__, n), partial(lower_gather, n)))
            jobs.append((f"swap in {n}", partial(self._land.__setitem__, n), partial(lower_land, n)))
            jobs.append((f"checksum {n}", partial(self._check.__setitem__, n), partial(lower_check, n)))
        return jobs

    # A plan's moves, in the order of MoveKind.

    def swap_out(self, step_id: int, pool: KVPool, moves: Sequence[BlockMove], waits: bool = False) -> None:
        """Starts the plan's swaps out; the pool may be written to afterwards. `waits`: until they are over."""
        if not moves:
            return
        outs = _Outs(step_id, self.times.now())
        self._outs.append(outs)
        for arity, part in split(moves):
            block_ids = _padded_ids((move.src for move in part), arity, self.layout.num_blocks)
            try:
                contents, checksums = self._gather[arity](pool, block_ids)
                checksums.copy_to_host_async()
                sent = self._link.send(contents[: len(part)], self.host.sharding)
            except (RuntimeError, MemoryError) as error:
                outs.failed += [_failure(step_id, move, error) for move in part]
                continue
            blocks = [HostBlock(content) for content in sent]
            outs.checksums.append((checksums, blocks))
            outs.pending.extend(zip(part, blocks, strict=True))
            for move, block in zip(part, blocks, strict=True):
                self.host.put(move.dst, block)
        if waits:
            self.finish(step_id)

    def land(self, pool: KVPool, moves: Sequence[BlockMove]) -> KVPool:
        """The pool, which is donated, with the staged blocks in their places."""
        for arity, part in split(moves):
            staged = [self._take_staged(move) for move in part]
            block_ids = _padded_ids((move.dst for move in part), arity, self.layout.num_blocks)
            pool = self._land[arity](pool, block_ids, _padded(staged, arity))
        return pool

    def swap_in(self, step_id: int, moves: Sequence[BlockMove], waits: bool = False) -> None:
        """Starts the plan's swaps in. What an earlier plan staged for the same device blocks is dropped."""
        if not moves:
            return
        ins = _Ins(step_id, self.times.now())
        self._ins.append(ins)
        found: list[tuple[BlockMove, jax.Array, np.ndarray]] = []
        for move in moves:
            block = self.host[move.src]
            if block is None or block.checksums is None:
                ins.failed.append(_failure(step_id, move, "nothing has arrived in the host block"))
            else:
                found.append((move, block.content, block.checksums))
        try:
            sent = self._link.send([content for _, content, _ in found], self.host.device)
        except (RuntimeError, MemoryError) as error:
            ins.failed += [_failure(step_id, move, error) for move, _, _ in found]
        else:
            for (move, _, checksums), content in zip(found, sent, strict=True):
                staged = _Staged(step_id, move, content, checksums)
                ins.pending.append(staged)
                self._staged[move.dst] = staged
        if waits:
            self.finish(step_id)

    def end_submit(self) -> None:
        """After a plan's moves: whatever was reported as there and has not landed is dropped."""
        through = self._reported[1]
        if self._staged and through is not None:
            self._staged = {dst: staged for dst, staged in self._staged.items() if staged.step_id > through}

    # What is over.

    @property
    def is_busy(self) -> bool:
        """Whether a swap is under way."""
        return bool(self._outs or self._ins)

    @property
    def num_in_transit(self) -> int:
        """Blocks whose copy is under way, as far as the last poll saw."""
        return sum(len(swaps.pending) for queue in (self._outs, self._ins) for swaps in queue)

    def reset(self) -> None:
        """Forgets all contents, so that step ids may begin anew. Nothing may be under way."""
        assert not self.is_busy, "swaps are under way"
        self.host.clear()
        self._staged.clear()
        self._failed.clear()
        self._through = self._reported = (None, None)

    def poll(self) -> None:
        """Notes what is over, and starts to check what has arrived. Never waits."""
        out_step, in_step = self._through
        while self._outs and self._is_out(self._outs[0]):
            outs = self._outs.popleft()
            out_step = outs.step_id
            self._failed += outs.failed
            self.times.over("out", outs.sent_at)
        for ins in self._ins:
            self._check_arrived(ins)
        while self._ins and self._is_in(self._ins[0]):
            ins = self._ins.popleft()
            in_step = ins.step_id
            self._failed += ins.failed
            self.times.over("in", ins.sent_at)
        self._through = (out_step, in_step)

    @property
    def reported(self) -> tuple[int | None, int | None]:
        """How far the last report said that swaps are: out, in."""
        return self._reported

    def follow(self, step_id: int, reported: tuple[int | None, int | None]) -> None:
        """Goes by the report of another host, on which the plan of step_id was made: waits until as much is over here.

        TransferTimeoutError where it never is; RuntimeError where a swap failed here, of which that host knows nothing.
        """
        if self._last_followed is not None and step_id <= self._last_followed:  # step ids begin anew
            self.finish(self._last_followed)
            self.reset()
        self._last_followed = step_id
        self.finish(max((through for through in reported if through is not None), default=-1))
        self._reported = reported
        if self._failed:
            raise RuntimeError(f"{len(self._failed)} swaps failed on this host")

    def report(self) -> SwapReport:
        """For a StepResult: how far the swaps are, and the failures since the last report."""
        failed, self._failed = tuple(self._failed), []
        self._reported = self._through
        return SwapReport(*self._through, failed)

    def finish(self, step_id: int) -> None:
        """Waits until the swaps of all plans up to this one are over. TransferTimeoutError where they never are."""

        def is_over() -> bool:
            self.poll()
            return not any(queue and queue[0].step_id <= step_id for queue in (self._outs, self._ins))

        self.times.wait(is_over, POLL_S)

    def wait_next(self) -> None:
        """Waits until something is over that no report has told of, or nothing is under way. TransferTimeoutError where
        that never is."""

        def is_over() -> bool:
            self.poll()
            return not self.is_busy or self._through != self._reported

        self.times.wait(is_over, POLL_S)

    def _is_out(self, outs: _Outs) -> bool:
        while outs.pending:
            move, block = outs.pending[0]
            try:
                if not self._link.is_over(block.content):
                    return False
            except (RuntimeError, MemoryError) as error:
                outs.failed.append(_failure(outs.step_id, move, error))
                self.host.drop(move.dst, block)
            outs.pending.popleft()
        if not all(is_ready(checksums) for checksums, _ in outs.checksums):
            return False
        for checksums, blocks in outs.checksums:
            for block, row in zip(blocks, local_columns(checksums), strict=False):  # rows past the blocks are padding
                block.checksums = row
        return True

    def _check_arrived(self, ins: _Ins) -> None:
        while ins.pending:
            staged = ins.pending[0]
            try:
                if not self._link.is_over(staged.content):
                    return
                ins.arrived.append(staged)
            except (RuntimeError, MemoryError) as error:
                ins.failed.append(_failure(ins.step_id, staged.move, error))
                self._unstage(staged)
            ins.pending.popleft()
        for arity, part in split(ins.arrived):
            checksums = self._check[arity](_padded([staged.content for staged in part], arity))
            checksums.copy_to_host_async()
            ins.checksums.append((checksums, list(part)))
        ins.arrived = []

    def _is_in(self, ins: _Ins) -> bool:
        if ins.pending or not all(is_ready(checksums) for checksums, _ in ins.checksums):
            return False
        for checksums, part in ins.checksums:
            for staged, row in zip(part, local_columns(checksums), strict=False):
                if not np.array_equal(staged.expected, row):
                    ins.failed.append(_failure(ins.step_id, staged.move, "the content is not what was sent"))
                    self._unstage(staged)
        return True

    def _take_staged(self, move: BlockMove) -> jax.Array:
        staged, through = self._staged.pop(move.dst, None), self._reported[1]
        assert staged is not None and staged.move.src == move.src, f"{move}: it was not staged"
        assert through is not None and staged.step_id <= through, f"{move}: its arrival was not reported"
        return staged.content

    def _unstage(self, staged: _Staged) -> None:
        if self._staged.get(staged.move.dst) is staged:
            del self._staged[staged.move.dst]


def split_moves(moves: Iterable[BlockMove]) -> dict[MoveKind, list[BlockMove]]:
    """A plan's moves by kind."""
    by_kind: dict[MoveKind, list[BlockMove]] = {kind: [] for kind in MoveKind}
    for move in moves:
        by_kind[move.kind].append(move)
    return by_kind


def split(items: Sequence[T]) -> Iterator[tuple[int, Sequence[T]]]:
    """(arity, at most so many items): the largest calls first, none of them half empty if a smaller one exists."""
    start = 0
    while start < len(items):
        left = len(items) - start
        arity = next((n for n in ARITIES if n >= left > n // 2), None)
        if arity is None:
            arity = max((n for n in ARITIES if n <= left), default=ARITIES[0])
        yield arity, items[start : start + arity]
        start += arity


def _padded_ids(block_ids: Iterable[int], arity: int, out_of_range: int) -> np.ndarray:
    ids = np.full(arity, out_of_range, np.int32)  # of its own: the device may read it later
    known = np.fromiter(block_ids, np.int32)
    ids[: len(known)] = known
    return ids


def _padded(blocks: Sequence[jax.Array], arity: int) -> tuple[jax.Array, ...]:
    return (*blocks, *[blocks[0]] * (arity - len(blocks)))


def _failure(step_id: int, move: BlockMove, why: object) -> FailedMove:
    logger.warning("step %d: %s of block %d to %d failed: %s", step_id, move.kind, move.src, move.dst, why)
    return FailedMove(step_id, move)
