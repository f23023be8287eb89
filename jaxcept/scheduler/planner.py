"""One step: who computes what, under the token budget, in the memory there is.

Order and progress. Running sequences are served by (arrival, seq_id), which an interception does not change (but for a
return that is further ahead of newcomers than the policy's head start allows; its arrival is later then). The waiting
are admitted by rank, then arrival. When memory is short, whoever arrived last among those that hold blocks yields: a
RUNNING sequence is preempted, an idle context (INTERCEPTED, or WAITING after its return) gives up blocks from its tail.
To the queue's head, contexts that wait behind it give up theirs, the last in the queue first.
So nothing deadlocks and nobody starves:

- Take the earliest sequence that is not INTERCEPTED. If RUNNING it never yields for memory, for all other holders
  are later; where it is the only one left running, idle contexts of any arrival yield to it; alone it fits, for no
  sequence is longer than the pool. So it goes on in every step that has budget for it, or waits for copies that end.
- If it is WAITING, it is overdue after starvation_s at the latest and then stands before all that are ranked, by
  arrival, and is not preempted by rank any more. So it heads the queue and nobody behind it is admitted (but for a
  completion that defers to a RUNNING sibling, which computes their common prompt). Those that run end, are preempted or
  are intercepted within max_len steps, and once nothing runs it takes what it needs from idle contexts.
- An interception is bounded by its timeout, and a sequence by its number of interceptions and tokens.

So every sequence is the earliest one after finitely many steps, and then ends after finitely many more.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

from jaxcept.scheduler.book import Book
from jaxcept.scheduler.events import Resumed
from jaxcept.scheduler.memory import ContextMemory
from jaxcept.scheduler.plan import Chunk, ChunkKind, Decodes, Mask, RowSetup, StepPlan, TableUpdate
from jaxcept.scheduler.policy import Policy
from jaxcept.scheduler.sequence import SeqState, Sequence
from jaxcept.scheduler.speculation import Speculation
from jaxcept.scheduler.swaps import Swaps

_KEY = attrgetter("key")


class Flight(NamedTuple):
    """A submitted step until its result is collected."""

    step_id: int
    seqs: list[Sequence]  # those that draw a token, in the order of the result
    seq_ids: tuple[int, ...]
    num_decodes: int
    dropped: set[int]  # seq_ids whose token is stale by now
    num_drafts: int = 0


@dataclass(slots=True)
class _Draft:
    """A plan in the making."""

    step_id: int
    now: float
    chunks: list[Chunk] = field(default_factory=list)
    seqs: list[Sequence] = field(default_factory=list)  # of the chunks
    tables: list[TableUpdate] = field(default_factory=list)
    setups: list[RowSetup] = field(default_factory=list)
    masks: list[Mask] = field(default_factory=list)  # of draws behind drafts
    has_preempted: bool = False

    def extend_table(self, seq: Sequence, offset: int, block_ids: tuple[int, ...]) -> None:
        """These blocks stand in the sequence's table from `offset` on."""
        if block_ids:
            assert seq.row is not None, f"sequence {seq.seq_id} has no row"
            self.tables.append(TableUpdate(seq.row, offset, block_ids))


class Planner:
    """Builds one plan at a time out of the book and the memory."""

    def __init__(
        self, book: Book, memory: ContextMemory, swaps: Swaps, policy: Policy, speculation: Speculation | None = None
    ) -> None:
        self.config = book.config
        self.speculation = speculation
        self._drafts_left = 0  # that this step may still compute
        self.book = book
        self.memory = memory
        self.swaps = swaps
        self.traits = policy.traits
        self.learn = policy.learn
        self._recompute_left = 0  # query tokens that this step may still spend on recomputed and returned tokens
        self._draft = _Draft(0, 0.0)
        self._version = -1  # of book.decoding, to which the columns below belong
        self._seqs: list[Sequence] = []
        self._seq_ids: tuple[int, ...] = ()
        self._rows: tuple[int, ...] = ()

    def plan(self, step_id: int, now: float, token_limit: int | None = None) -> tuple[StepPlan, Flight] | None:
        """The next step, or None where nothing can be computed or moved, and no swap is to be waited for.

        `token_limit`: most query tokens, where that is less than the configuration says.
        """
        self._draft = _Draft(step_id, now)
        budget = self.config.max_num_batched_tokens
        self._hurry_overdue()
        self._yield_to_better_rank()
        decodes, seqs, budget = self._serve_running(budget if token_limit is None else max(1, min(budget, token_limit)))
        if not self._draft.has_preempted:
            self._admit_waiting(budget)
        if seqs or self._draft.chunks or self._draft.setups or self.swaps.loading or self.swaps.has_moves:
            return self._seal(decodes, seqs)
        assert not self.memory.moves, "a step that computes nothing copies blocks"
        return None

    def _seal(self, decodes: Decodes, seqs: list[Sequence]) -> tuple[StepPlan, Flight]:
        counters = self.book.counters
        counters.steps += 1
        counters.decode_tokens += len(seqs)
        counters.decode_tokens += sum([chunk.kind is ChunkKind.DRAFT for chunk in self._draft.chunks])
        num_drafts = sum([chunk.num_drafts for chunk in self._draft.chunks])
        counters.draft_tokens += num_drafts
        num_decodes = len(seqs)
        if self._draft.chunks:
            for seq in self._draft.seqs:
                self.memory.register(seq)
            seqs = seqs + [
                seq for seq, chunk in zip(self._draft.seqs, self._draft.chunks, strict=True) if chunk.samples
            ]
        copies, self.memory.moves = self.memory.moves, []
        moves = self.swaps.take_moves(copies)
        plan = StepPlan(
            step_id=self._draft.step_id,
            decodes=decodes,
            chunks=tuple(self._draft.chunks),
            tables=tuple(self._draft.tables),
            rows=tuple(self._draft.setups),
            moves=moves,
            waits_for_swaps=self.traits.waits_for_swaps,
            masks=(*_masks(seqs), *self._draft.masks) if self.book.masked else (),
        )
        seq_ids = decodes.seq_ids if num_decodes == len(seqs) else tuple([seq.seq_id for seq in seqs])
        return plan, Flight(self._draft.step_id, seqs, seq_ids, num_decodes, set(), num_drafts)

    # Running sequences: memory goes to the earliest first, tokens to decodes first.

    def _serve_running(self, budget: int) -> tuple[Decodes, list[Sequence], int]:
        """Decodes and running prefills; returns the decodes' columns, their sequences and the budget left."""
        decoding = self.book.decoding.items[:budget]
        chunk_budget = budget - len(decoding)
        self._drafts_left = min(chunk_budget, self.room_for_drafts)
        limit = self.traits.recompute_tokens
        self._recompute_left = budget if limit is None else max(self.config.block_size, limit - len(decoding))
        scheduled: list[Sequence] = []
        positions: list[int] = []
        begin = 0
        for seq in list(self.book.prefilling):
            end = bisect_left(decoding, seq.key, key=_KEY)
            self._decode(decoding[begin:end], scheduled, positions)
            begin = end
            if seq.state is SeqState.RUNNING:
                chunk_budget -= self._continue(seq, chunk_budget)
        self._decode(decoding[begin:] if begin else decoding, scheduled, positions)
        used = len(scheduled) + sum(len(chunk.token_ids) for chunk in self._draft.chunks)
        return self._columns(scheduled, positions), scheduled, budget - used

    def _decode(self, seqs: list[Sequence], scheduled: list[Sequence], positions: list[int]) -> None:
        """The hot loop: one comparison tells whether a sequence needs more than its next position."""
        speculation = self.speculation
        for seq in seqs:
            if speculation is not None and seq.state is SeqState.RUNNING and self._verify(seq, speculation):
                continue
            position = seq.num_computed
            if position >= seq.attention and not self._attend(seq, position):
                continue
            seq.num_computed = position + 1
            seq.num_pending += 1
            positions.append(position)
            scheduled.append(seq)

    def _attend(self, seq: Sequence, position: int) -> bool:
        """A sequence needs a block, or surely ends with a token that is still to be collected, or was preempted."""
        if seq.state is not SeqState.RUNNING or position >= seq.last_position:
            return False
        if not self._make_room(seq, 1):
            return False
        self.memory.register(seq)
        self._draft.extend_table(seq, len(seq.blocks), self.memory.grow(seq, position + 1))
        self._set_attention(seq)
        return True

    @property
    def room_for_drafts(self) -> int:
        """Drafts that a step may compute; none where somebody prefills or waits, for whom the tokens are."""
        book = self.book
        if self.speculation is None or book.prefilling or book.waiting:
            return 0
        num_decoding = len(book.decoding)
        context_tokens = sum([seq.num_computed + 1 for seq in book.decoding])
        return self.speculation.room(num_decoding, context_tokens, self.config.max_num_seqs - num_decoding)

    def _verify(self, seq: Sequence, speculation: Speculation) -> bool:
        """Computes drafts behind the last token, in a chunk; whether the sequence is served so.

        A token that only the host knows, as it was drawn behind a draft, goes to the device in a chunk too.
        """
        drafts, masks = speculation.drafts(seq, self._drafts_left, self.config.block_size)
        if not drafts and not seq.is_known_only:
            return False
        position = seq.num_computed
        if position >= seq.attention and not self._attend(seq, position):
            return True
        assert seq.row is not None
        token_ids = (seq.token_ids[position], *drafts)
        chunk = Chunk(seq.seq_id, seq.row, ChunkKind.DRAFT, position, token_ids, True, num_drafts=len(drafts))
        self._draft.chunks.append(chunk)
        self._draft.seqs.append(seq)
        self._draft.masks += [Mask(seq.row, mask, draw) for draw, mask in enumerate(masks, 1) if mask is not None]
        self._drafts_left -= len(drafts)
        seq.is_known_only = bool(drafts)
        seq.num_computed = position + 1
        seq.num_pending += 1
        return True

    def _set_attention(self, seq: Sequence) -> None:
        seq.attention = min(len(seq.blocks) * self.config.block_size, seq.last_position)

    def _columns(self, scheduled: list[Sequence], positions: list[int]) -> Decodes:
        """Reuses the columns of the last step where the same sequences decode."""
        if self._version != self.book.decoding.version or scheduled != self._seqs:
            self._version = self.book.decoding.version
            self._seqs = scheduled
            self._seq_ids = tuple([seq.seq_id for seq in scheduled])
            self._rows = tuple([seq.row for seq in scheduled if seq.row is not None])
        return Decodes(self._seq_ids, self._rows, tuple(positions))

    def _continue(self, seq: Sequence, budget: int) -> int:
        """The next chunk of a running sequence; returns its tokens."""
        if seq.load is not None and seq.load.is_landed and seq.num_computed == seq.host_start * self.config.block_size:
            self._draft.extend_table(seq, len(seq.blocks), self.swaps.join(seq))
        size = self._chunk_size(seq, budget)
        if size <= 0:
            return 0
        missing = self.memory.missing(seq, seq.num_computed + size)
        if missing and not self._make_room(seq, missing):
            return 0
        self._draft.extend_table(seq, len(seq.blocks), self.memory.grow(seq, seq.num_computed + size))
        self._add_chunk(seq, size)
        return size

    def _chunk_size(self, seq: Sequence, budget: int) -> int:
        """Tokens that the sequence may compute in this step: 0 while it waits for its host part."""
        start = seq.num_computed
        end = len(seq.token_ids) if seq.load is None else seq.host_start * self.config.block_size
        size = min(end - start, budget)
        if start < seq.max_computed or start >= seq.num_prompt:
            size = min(size, self._recompute_left)
            self._recompute_left -= max(0, size)
        return size

    def _add_chunk(self, seq: Sequence, size: int) -> None:
        start, end = seq.num_computed, seq.num_computed + size
        num_recomputed = max(0, min(end, seq.max_computed) - start)
        num_prefill = max(0, min(end, seq.num_prompt) - start - num_recomputed)
        counters = self.book.counters
        counters.recomputed_tokens += num_recomputed
        counters.prefill_tokens += num_prefill
        counters.returned_tokens += size - num_recomputed - num_prefill
        if num_recomputed:
            kind = ChunkKind.RECOMPUTE
        else:
            kind = ChunkKind.PREFILL if start < seq.num_prompt else ChunkKind.RETURNED
        samples = end == len(seq.token_ids)
        assert seq.row is not None
        token_ids = tuple(seq.token_ids[start:end])
        self._draft.chunks.append(Chunk(seq.seq_id, seq.row, kind, start, token_ids, samples, num_recomputed))
        self._draft.seqs.append(seq)
        seq.chunk_step, seq.chunk_start = self._draft.step_id, start
        seq.num_computed = end
        seq.max_computed = max(seq.max_computed, end)
        if samples:
            seq.num_pending += 1
            self.book.decode(seq)
            self._set_attention(seq)

    # Memory: who arrived last yields.

    def _make_room(self, seq: Sequence, num_blocks: int) -> bool:
        """Takes blocks from the latest arrivals until num_blocks are available; False where `seq` itself yielded."""
        pool = self.memory.pool
        while pool.num_available < num_blocks:
            running, holder = self.book.latest_running, self.book.latest_holder()
            assert running is not None
            if holder is not None and (holder.key > running.key or self.book.num_running == 1):
                self.shrink(holder, len(holder.blocks) - (num_blocks - pool.num_available))
                continue
            self._preempt(running)
            if running is seq:
                return False
        return True

    def shrink(self, seq: Sequence, keep: int) -> None:
        """A sequence without a row gives up all but its first `keep` blocks."""
        self.memory.truncate(seq, max(0, keep))
        if not seq.blocks:
            self.book.holders.pop(seq.seq_id, None)

    def _preempt(self, seq: Sequence) -> None:
        """RUNNING → WAITING without blocks. A token that is still to be collected is kept."""
        self.swaps.cancel(seq)
        self.memory.truncate(seq, 0)
        seq.attention = 0
        seq.num_preemptions += 1
        self.book.wait(seq, self._draft.now)
        self.book.counters.preemptions += 1
        self._draft.has_preempted = True

    # Rank: who has waited too long goes by arrival, and a better rank may take what a worse one has.

    def _hurry_overdue(self) -> None:
        bound = self.book.ranking.starvation_s
        if bound is None:
            return
        overdue = [seq for seq in self.book.waiting if not seq.is_overdue and self._draft.now - seq.queued_at > bound]
        for seq in overdue:
            self.book.hurry(seq)

    def _yield_to_better_rank(self) -> None:
        """Running sequences of the worst rank are preempted, before anyone computes, until the queue's head fits."""
        ranking, waiting = self.book.ranking, self.book.waiting
        if not ranking.preempts or not waiting.items or waiting.items[0].num_pending:
            return
        head = waiting.items[0]
        running = [seq for seq in (*self.book.prefilling, *self.book.decoding) if not seq.is_overdue]
        ranked = sorted(((ranking.rank(seq), seq.key, seq) for seq in running), key=lambda entry: entry[:2])
        while ranked and ranked[-1][0] > head.queue_key[0] and not (self.book.free_rows and self._fits(head, [], 0)):
            self._preempt(ranked.pop()[2])
        self._draft.has_preempted = False

    # Admission: the earliest of the queue first, and nobody past one that does not fit.

    def _admit_waiting(self, budget: int) -> None:
        waiting = self.book.waiting
        index = 0
        while budget > 0 and index < len(waiting) and self.book.free_rows:
            seq = waiting.items[index]
            if seq.num_pending:
                return  # its last token is on its way, and must be known before the sequence runs again
            source = self._sharing_source(seq)
            if source is None and self._sibling_computes_prompt(seq):
                index += 1
                continue
            size = self._admit(seq, source, budget)
            if size is None:
                return
            budget -= size

    def _shared_tokens(self, seq: Sequence) -> int:
        """Tokens that completions of one prompt share: all but the last, which each computes to draw its first."""
        return seq.num_prompt - 1

    def _sharing_source(self, seq: Sequence) -> Sequence | None:
        """A sibling whose blocks hold the KV of the prompt."""
        if seq.blocks or seq.host or seq.num_prompt == 1:
            return None
        for sibling in seq.family.sequences:
            if sibling is not seq and sibling.settled(self._draft.step_id) >= self._shared_tokens(seq):
                return sibling
        return None

    def _sibling_computes_prompt(self, seq: Sequence) -> bool:
        if seq.blocks or seq.host or seq.num_prompt == 1:
            return False
        return any(sibling.state is SeqState.RUNNING for sibling in seq.family.sequences)

    def _admit(self, seq: Sequence, source: Sequence | None, budget: int) -> int | None:
        """WAITING → RUNNING with a first chunk, whose size is returned; None where it does not fit.

        A sequence whose context is on its way from the host may have nothing to compute yet: 0.
        """
        memory, swaps = self.memory, self.swaps
        num_kept = seq.num_computed
        seq.max_computed = max(seq.max_computed, num_kept)
        if seq.num_computed >= len(seq.token_ids):
            seq.num_computed = len(seq.token_ids) - 1  # nothing came back: the last token is computed again
        found = memory.find_cached(seq)
        shared = self._shared_tokens(seq)
        if source is not None and shared > len(found) * self.config.block_size:
            found, num_found = source.blocks[: self.config.blocks_for(shared)], shared
        else:
            source, num_found = None, seq.num_computed + len(found) * self.config.block_size
        if not self._make_way(seq, source, found, num_found):
            seq.num_computed = num_kept
            return None
        if found:
            memory.adopt(seq, found, num_found)
        self._take_from_idle(seq)
        if source is None:
            swaps.match(seq)
        if seq.host:
            swaps.begin_load(seq)
        memory.make_writable(seq)
        self._note_admission(seq, num_kept, 0 if source is not None else len(found) * self.config.block_size)

        size = max(0, self._chunk_size(seq, budget))
        memory.grow(seq, seq.num_computed + size)
        row = self.book.run(seq)
        self._draft.setups.append(self._row_setup(seq, row))
        self._draft.extend_table(seq, 0, tuple(seq.blocks))
        if size:
            self._add_chunk(seq, size)
        seq.chunk_step = self._draft.step_id
        seq.chunk_start = 0  # what it adopted may be copied by this step's moves: siblings must not copy it yet
        return size

    def _need(self, seq: Sequence) -> int:
        """Blocks that the sequence lacks to compute all known tokens and one more, copy-on-write included."""
        num_tokens = min(len(seq.token_ids) + 1, self.config.max_len)
        return self.memory.missing(seq, num_tokens) + self.memory.copies_to_write(seq)

    def _fits(self, seq: Sequence, found: list[int], num_found: int) -> bool:
        """Whether the sequence can run beside those that do. Where none does it can: idle contexts yield."""
        return not self.book.num_running or self._lacking(seq, found, num_found) <= 0

    def _lacking(self, seq: Sequence, found: list[int], num_found: int) -> int:
        """Blocks that are not available and that the sequence needs to run beside those that do."""
        pool = self.memory.pool
        num_taken = sum(1 for block in found if pool.refs[block] == 0)
        need = self._need(seq) - len(found) + num_taken
        if num_found % self.config.block_size and found:
            need += 1  # the last block that is found is partly filled: it will be copied
        promised = sum(self.memory.missing(other, len(other.token_ids)) for other in self.book.prefilling)
        return need + promised + self.config.watermark_blocks - pool.num_available

    def _make_way(self, seq: Sequence, source: Sequence | None, found: list[int], num_found: int) -> bool:
        """Contexts that wait behind the sequence in the queue give up blocks to it, the last of them first: to the host
        as far as that hides, else they are computed again. Not the one whose blocks it shares. Whether it fits then.

        Nobody else could have those blocks, and while they lie idle nobody else could run.
        """
        if self._fits(seq, found, num_found):
            return True
        key = attrgetter("queue_key")
        waiting = [other for other in self.book.holders.values() if other.state is SeqState.WAITING]
        behind = [other for other in waiting if key(other) > key(seq) and not other.num_pending and other is not source]
        behind.sort(key=key)
        while behind and (lacking := self._lacking(seq, found, num_found)) > 0:
            holder = behind.pop()
            num_blocks = min(len(holder.blocks), lacking)
            keep = len(holder.blocks) - num_blocks
            self.swaps.swap_out(holder, num_blocks)
            self.shrink(holder, keep)
        return self._fits(seq, found, num_found)

    def _take_from_idle(self, seq: Sequence) -> None:
        """Makes room for an admission: idle contexts yield, the latest arrival first."""
        pool = self.memory.pool
        while pool.num_available < self._need(seq):
            holder = self.book.latest_holder(but=seq)
            assert holder is not None, f"sequence {seq.seq_id} does not fit into an idle pool"
            self.shrink(holder, len(holder.blocks) - (self._need(seq) - pool.num_available))

    def _row_setup(self, seq: Sequence, row: int) -> RowSetup:
        return RowSetup(
            row=row,
            seq_id=seq.seq_id,
            params=seq.request.params,
            seed=seq.seed,
            token_ids=tuple(seq.token_ids),
            output_spans=seq.output_spans,
            num_prompt=seq.num_prompt,
            stop_token_ids=seq.request.stop_token_ids,
        )

    def _note_admission(self, seq: Sequence, num_kept: int, num_cached: int) -> None:
        counters = self.book.counters
        if self.config.enable_prefix_caching:
            counters.cache_query_tokens += len(seq.token_ids) - num_kept
            counters.cache_hit_tokens += num_cached
        if seq.first_scheduled_at is None:
            seq.first_scheduled_at = self._draft.now
            seq.num_cached = num_cached
        if seq.opened is not None:
            num_swapped = max(0, seq.host_tokens - seq.host_start * self.config.block_size)
            num_recomputed = max(0, seq.max_computed - seq.num_computed - num_swapped)
            record = seq.opened.resume(self._draft.now, num_kept, num_swapped, num_recomputed, num_cached)
            seq.interceptions.append(record)
            seq.opened = None
            self.learn(record)
            request_id = seq.request.request_id
            self.book.events.append(Resumed(seq.seq_id, request_id, seq.index, record, self._draft.now))


def _masks(seqs: list[Sequence]) -> tuple[Mask, ...]:
    """What the drawing sequences may draw, in their order."""
    return tuple([Mask(seq.row, seq.mask) for seq in seqs if seq.mask is not None and seq.row is not None])
