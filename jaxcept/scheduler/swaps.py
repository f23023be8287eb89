"""The two ways between device and host: contexts that leave, and contexts that come back.

Out: the copy is planned and the device block is given up in the same breath, for the device gathers before it writes.
In: a sequence that is admitted gets device blocks for what it has on the host and asks for the content piece by piece.
What has arrived lands in its block at the start of a later step, and once all of it has, the sequence goes on behind
it. Meanwhile it recomputes whatever is missing in front of its host part.
"""

from __future__ import annotations

from jaxcept.scheduler.book import Book
from jaxcept.scheduler.host import HostMemory
from jaxcept.scheduler.memory import ContextMemory
from jaxcept.scheduler.plan import BlockMove, FailedMove, MoveKind, StepResult
from jaxcept.scheduler.policy import HostUse, Traits
from jaxcept.scheduler.sequence import Load, Sequence


class Swaps:
    """Owns the host part of every sequence and its way back; one swap budget a step for both directions."""

    def __init__(self, book: Book, memory: ContextMemory, host: HostMemory, traits: Traits) -> None:
        self.host = host
        self.use = traits.host
        self._drops_partial_blocks = memory.config.enable_prefix_caching and not traits.swaps_partial_blocks
        self.loading: dict[int, Sequence] = {}
        self._book = book
        self._memory = memory
        self._size = memory.block_size
        self._budget: int | None = None
        self._lands: list[BlockMove] = []
        self._ins: list[BlockMove] = []
        self._step_id = 0

    def begin_step(self, step_id: int, budget: int | None) -> None:
        """What has arrived lands; who is on the way asks for more, the earliest arrival first.

        `budget`: blocks that may move in this step. One block may always come in, so that nobody waits for ever.
        """
        self._step_id = step_id
        self.host.next_step_id = step_id
        self._budget = budget if budget is None else max(budget, 1)
        for seq in sorted(self.loading.values(), key=lambda seq: seq.key):
            self._land(seq)
            self._request(seq)

    @property
    def is_in_use(self) -> bool:
        """Whether anything is on the host, or on its way; without, a step need not think of swaps."""
        return bool(self.loading) or not self.host.is_empty or self.use is HostUse.CACHE

    @property
    def budget_left(self) -> int | None:
        """Blocks that may still be moved in this step; None: any number."""
        return self._budget

    # Out.

    def swap_out(self, seq: Sequence, count: int) -> int:
        """The last `count` blocks of a context go to the host, as far as budget and memory reach; how many went.

        Full blocks that the host has already cost nothing. Where the policy says so, a block that is partly filled is
        not sent: its few tokens are computed again in one chunk with what the tool returns, which is sooner than a
        copy. What follows a gap between the device's part and the host's stays: a context has one head on the device
        and one tail on the host.
        """
        if seq.host and seq.host_start != len(seq.blocks):
            return 0
        self._memory.register(seq)
        if count and self._drops_partial_blocks and seq.num_computed % self._size and self._can_send(seq):
            self._memory.truncate(seq, len(seq.blocks) - 1)
            return 1 + (self.swap_out(seq, count - 1) if count > 1 else 0)
        sent: list[int] = []
        while len(sent) < min(count, len(seq.blocks)):
            index = len(seq.blocks) - 1 - len(sent)
            digest = seq.digest(index, self._size) if index < seq.num_registered else None
            if self._budget == 0 and (digest is None or self.host.pool.find(digest) is None):
                break
            num_unsent = self.host.num_unsent
            host_block = self.host.send(seq.blocks[index], digest)
            if host_block is None:
                break
            if self._budget is not None:
                self._budget -= self.host.num_unsent - num_unsent
            sent.append(host_block)
        if sent:
            seq.host_tokens = seq.host_tokens if seq.host else seq.num_computed
            seq.host[:0] = reversed(sent)
            seq.host_start = len(seq.blocks) - len(sent)
            self._memory.truncate(seq, seq.host_start)
        return len(sent)

    def _can_send(self, seq: Sequence) -> bool:
        """Whether at least one full block can follow the partly filled one."""
        return len(seq.blocks) > 1 and self._budget != 0 and self.host.pool.num_available > 0

    # In.

    def match(self, seq: Sequence) -> None:
        """Before an admission: what the device holds is not needed from the host; what the host's cache has is."""
        if seq.host:
            self._drop_head(seq, len(seq.blocks) - seq.host_start)
        aligned = seq.num_computed == len(seq.blocks) * self._size
        if seq.host or not aligned or self.host.is_empty or not self._memory.may_find(seq):
            return
        first, stop = len(seq.blocks), (len(seq.token_ids) - 1) // self._size
        if stop > first:
            seq.digest(stop - 1, self._size)
            found = self.host.pool.find_run(seq.digests[first:stop])
            for host_block in found:
                self.host.pool.share(host_block)
            if found:
                seq.host, seq.host_start, seq.host_tokens = found, first, (first + len(found)) * self._size

    def begin_load(self, seq: Sequence) -> None:
        """Takes device blocks, which must be available, for the sequence's host part, and asks for the content."""
        seq.load = Load([self._memory.pool.allocate() for _ in seq.host])
        self.loading[seq.seq_id] = seq
        self._request(seq)

    def join(self, seq: Sequence) -> tuple[int, ...]:
        """The host part stands behind what is computed: the block table grows by these blocks."""
        load = seq.load
        assert load is not None and load.num_landed == len(load.blocks), f"sequence {seq.seq_id} is not there yet"
        assert seq.num_computed == seq.host_start * self._size, f"sequence {seq.seq_id} has a gap before its host part"
        seq.blocks.extend(load.blocks)
        seq.num_computed = min(seq.host_tokens, len(seq.token_ids) - 1)
        del self.loading[seq.seq_id]
        seq.load = None
        self._cut(seq, 0)
        return tuple(load.blocks)

    def cancel(self, seq: Sequence) -> None:
        """A sequence gives up its device blocks: its host part stays on the host."""
        if seq.load is not None:
            del self.loading[seq.seq_id]
            self._unplan(seq.load.blocks)
            self._memory.pool.release(seq.load.blocks)
            seq.load = None

    def release(self, seq: Sequence) -> None:
        """A sequence ends."""
        self.cancel(seq)
        self._cut(seq, 0)

    # What the device tells.

    def settle(self, result: StepResult) -> None:
        """Takes note of the swaps that are over."""
        if result.outs_through is not None:
            self.host.arrived_before = max(self.host.arrived_before, result.outs_through + 1)
        if result.ins_through is not None:
            for seq in self.loading.values():
                if seq.load is not None:
                    seq.load.arrive(result.ins_through)
        for failed in result.failed:
            self._book.counters.failed_swaps += 1
            self._settle_failure(failed)

    def _settle_failure(self, failed: FailedMove) -> None:
        """Whoever counted on a lost block recomputes from there on."""
        kind, src, dst = failed.move
        if kind is MoveKind.SWAP_OUT:
            if self.host.is_sent_by(dst, failed.step_id):
                self._spoil(dst)
        elif kind is MoveKind.SWAP_IN:
            for seq in self.loading.values():
                load = seq.load
                if load is not None and dst in load.blocks and seq.host[load.blocks.index(dst)] == src:
                    self._spoil(src)
                    return

    def _spoil(self, host_block: int) -> None:
        self.host.spoil(host_block)
        for seq in list(self._book.sequences.values()):
            if host_block in seq.host:
                self._cut(seq, seq.host.index(host_block))

    def _cut(self, seq: Sequence, keep: int) -> None:
        """All but the first `keep` blocks of the host part are forgotten."""
        self.host.pool.release(seq.host[keep:])
        del seq.host[keep:]
        seq.host_tokens = min(seq.host_tokens, (seq.host_start + keep) * self._size) if keep else 0
        load = seq.load
        if load is not None:
            self._unplan(load.blocks[keep:])
            self._memory.pool.release(load.blocks[keep:])
            load.cut(keep)
            if not keep:
                del self.loading[seq.seq_id]
                seq.load = None

    def _drop_head(self, seq: Sequence, count: int) -> None:
        """The first `count` blocks of the host part are on the device already."""
        if count > 0:
            self.host.pool.release(seq.host[:count])
            del seq.host[:count]
            seq.host_start = len(seq.blocks)
            if not seq.host:
                seq.host_tokens = 0

    def _land(self, seq: Sequence) -> None:
        load = seq.load
        assert load is not None
        for index in range(load.num_landed, load.num_arrived):
            self._lands.append(BlockMove(MoveKind.LAND, seq.host[index], load.blocks[index]))
        load.num_landed = load.num_arrived

    def _request(self, seq: Sequence) -> None:
        load = seq.load
        assert load is not None
        begin = load.num_requested
        for host_block in seq.host[begin:]:
            if self._budget == 0 or not self.host.has_arrived(host_block):
                break
            self._ins.append(BlockMove(MoveKind.SWAP_IN, host_block, load.blocks[load.num_requested]))
            load.num_requested += 1
            if self._budget is not None:
                self._budget -= 1
        if load.num_requested > begin:
            load.requests.append((self._step_id, load.num_requested))

    # The plan.

    @property
    def has_moves(self) -> bool:
        """Whether the next plan moves blocks between device and host."""
        return bool(self._lands or self._ins or self.host.num_unsent)

    def take_moves(self, copies: list[BlockMove]) -> tuple[BlockMove, ...]:
        """All moves of the plan, in their order; `copies` are those of copy-on-write."""
        outs = [BlockMove(MoveKind.SWAP_OUT, src, dst) for src, dst in self.host.take_outs()]
        self.host.next_step_id = self._step_id + 1
        counters = self._book.counters
        counters.swapped_out_blocks += len(outs)
        counters.swapped_in_blocks += len(self._ins)
        moves = (*outs, *self._lands, *copies, *self._ins)
        self._ins, self._lands = [], []
        return moves

    def _unplan(self, device_blocks: list[int]) -> None:
        """Nothing comes into these blocks any more."""
        if self._ins or self._lands:
            self._ins = [move for move in self._ins if move.dst not in device_blocks]
            self._lands = [move for move in self._lands if move.dst not in device_blocks]
