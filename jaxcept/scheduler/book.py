"""Who is where: the queues, the rows, and the moves of a sequence between its states."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from operator import attrgetter
from typing import Protocol

from jaxcept.scheduler.config import SchedulerConfig
from jaxcept.scheduler.counters import Counters
from jaxcept.scheduler.events import Event
from jaxcept.scheduler.sequence import Family, SeqState, Sequence

_KEY = attrgetter("key")
OVERDUE = float("-inf")  # the rank of a sequence that has waited too long


class Ranking(Protocol):
    """Where a sequence belongs among the waiting."""

    @property
    def starvation_s(self) -> float | None:
        """Whoever has waited longer goes first, by arrival, and is not preempted by rank; None: ranks are all equal."""
        ...

    @property
    def preempts(self) -> bool:
        """Whether a running sequence of a worse rank yields to a waiting one that does not fit."""
        ...

    def rank(self, seq: Sequence) -> float:
        """Less is served earlier; equal ranks go by arrival."""
        ...


class ByArrival:
    """First come, first served."""

    starvation_s = None
    preempts = False

    def rank(self, seq: Sequence) -> float:
        """The same for all."""
        return 0.0


class ArrivalQueue:
    """Sequences in order of their keys: original arrival, ties by seq_id; `version` grows with every change."""

    _key = staticmethod(_KEY)

    def __init__(self) -> None:
        self.items: list[Sequence] = []
        self.version = 0

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self.items)

    def add(self, seq: Sequence) -> None:
        """Puts a sequence in its place."""
        insort(self.items, seq, key=self._key)
        self.version += 1

    def remove(self, seq: Sequence) -> None:
        """Takes a sequence out; it must be there."""
        index = self.before(seq)
        assert index < len(self.items) and self.items[index] is seq, f"sequence {seq.seq_id} is not in the queue"
        del self.items[index]
        self.version += 1

    def before(self, seq: Sequence) -> int:
        """How many of the queue arrived before the sequence."""
        return bisect_left(self.items, self._key(seq), key=self._key)

    @property
    def last(self) -> Sequence | None:
        """The latest arrival."""
        return self.items[-1] if self.items else None


class WaitingQueue(ArrivalQueue):
    """The waiting sequences by the rank that the queue order gave them, then by arrival."""

    _key = staticmethod(attrgetter("queue_key"))


class Book:
    """Every unfinished sequence, in the one place that its state says, and what happened that nobody was told of yet.

    RUNNING sequences hold a row each: in `prefilling` while known tokens are left to compute, then in `decoding`.
    `holders` are the sequences that hold blocks without a row: INTERCEPTED ones, and WAITING ones that came back.
    """

    def __init__(self, config: SchedulerConfig, ranking: Ranking | None = None) -> None:
        self.config = config
        self.ranking = ranking if ranking is not None else ByArrival()
        self.counters = Counters()
        self.events: list[Event] = []
        self.families: dict[str, Family] = {}
        self.sequences: dict[int, Sequence] = {}
        self.waiting = WaitingQueue()
        self.prefilling = ArrivalQueue()
        self.decoding = ArrivalQueue()
        self.intercepted: dict[int, Sequence] = {}
        self.holders: dict[int, Sequence] = {}
        self.masked: dict[int, Sequence] = {}  # those of which not any token may come next
        self.unplaced: list[Sequence] = []  # intercepted with blocks, and the policy was not asked yet
        self.free_rows = list(range(config.max_num_seqs))
        heapify(self.free_rows)

    @property
    def num_running(self) -> int:
        """Sequences with a row."""
        return len(self.prefilling) + len(self.decoding)

    @property
    def latest_running(self) -> Sequence | None:
        """The RUNNING sequence that arrived last."""
        prefilling, decoding = self.prefilling.last, self.decoding.last
        if prefilling is None or decoding is None:
            return prefilling or decoding
        return max(prefilling, decoding, key=_KEY)

    def latest_holder(self, but: Sequence | None = None) -> Sequence | None:
        """The sequence without a row that holds blocks and arrived last, other than `but`."""
        return max((seq for seq in self.holders.values() if seq is not but), key=_KEY, default=None)

    def admit(self, seq: Sequence, now: float) -> None:
        """An unknown sequence → WAITING."""
        self.sequences[seq.seq_id] = seq
        self._queue(seq, now)

    def wait(self, seq: Sequence, now: float) -> None:
        """RUNNING or INTERCEPTED → WAITING."""
        self._leave(seq)
        seq.state = SeqState.WAITING
        self._queue(seq, now)

    def hurry(self, seq: Sequence) -> None:
        """A WAITING sequence has waited too long: from here on it goes by its arrival, before all that are ranked."""
        self.waiting.remove(seq)
        seq.is_overdue = True
        seq.queue_key = (OVERDUE, *seq.key)
        self.waiting.add(seq)

    def _queue(self, seq: Sequence, now: float) -> None:
        seq.queued_at = now
        seq.queue_key = (OVERDUE if seq.is_overdue else self.ranking.rank(seq), *seq.key)
        self.waiting.add(seq)

    def run(self, seq: Sequence) -> int:
        """WAITING → RUNNING with the lowest free row, which is returned."""
        self._leave(seq)
        self.holders.pop(seq.seq_id, None)
        seq.state = SeqState.RUNNING
        seq.row = heappop(self.free_rows)
        self.prefilling.add(seq)
        return seq.row

    def decode(self, seq: Sequence) -> None:
        """RUNNING: all known tokens are computed, from here on the sequence decodes."""
        self.prefilling.remove(seq)
        seq.is_decoding = True
        self.decoding.add(seq)

    def retry(self, seq: Sequence, now: float) -> None:
        """A sequence whose last token was rejected → WAITING; it keeps its blocks."""
        if seq.state is SeqState.RUNNING:
            self.wait(seq, now)
            if seq.blocks:
                self.holders[seq.seq_id] = seq

    def mask(self, seq: Sequence) -> None:
        """Asks the sequence's watcher which tokens may come next; raises what it raises."""
        seq.mask = seq.watcher.mask() if seq.watcher is not None else None
        if seq.mask is not None:
            self.masked[seq.seq_id] = seq
        else:
            self.masked.pop(seq.seq_id, None)

    @property
    def awaits_masked(self) -> bool:
        """Whether a sequence can only go on once the token that it draws in a submitted step is known."""
        return any(seq.num_pending and seq.is_decoding for seq in self.masked.values())

    def intercept(self, seq: Sequence) -> None:
        """RUNNING, or WAITING after a preemption → INTERCEPTED."""
        self._leave(seq)
        seq.state = SeqState.INTERCEPTED
        self.intercepted[seq.seq_id] = seq
        if seq.blocks:
            self.holders[seq.seq_id] = seq
            self.unplaced.append(seq)

    def hand_over(self, seq: Sequence, family: Family) -> None:
        """The sequence leaves its request, which must have no other, for another one."""
        del self.families[seq.request.request_id]
        self.families[family.request.request_id] = family
        family.sequences.append(seq)

    def finish(self, seq: Sequence) -> None:
        """Any state → FINISHED; the sequence must hold no blocks."""
        assert not seq.blocks, f"sequence {seq.seq_id} finishes with blocks"
        self._leave(seq)
        self.holders.pop(seq.seq_id, None)
        self.masked.pop(seq.seq_id, None)
        seq.state = SeqState.FINISHED
        del self.sequences[seq.seq_id]
        seq.family.sequences.remove(seq)
        if not seq.family.sequences:
            del self.families[seq.request.request_id]

    def _leave(self, seq: Sequence) -> None:
        if seq.state is SeqState.RUNNING:
            (self.decoding if seq.is_decoding else self.prefilling).remove(seq)
            assert seq.row is not None
            heappush(self.free_rows, seq.row)
            seq.row = None
            seq.is_decoding = False
            seq.is_known_only = False
        elif seq.state is SeqState.WAITING:
            self.waiting.remove(seq)
        else:
            del self.intercepted[seq.seq_id]
