"""How a sequence is intercepted, goes on, fails and ends; every such change tells its event."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable
from heapq import heappop, heappush
from math import inf

from jaxcept.scheduler.book import Book
from jaxcept.scheduler.border import StateError
from jaxcept.scheduler.durations import DurationEstimator
from jaxcept.scheduler.events import Finished, FinishReason, Intercepted, Returned, Timing
from jaxcept.scheduler.interception import OpenInterception, Outcome
from jaxcept.scheduler.judge import Call, End, Reject, judge
from jaxcept.scheduler.memory import ContextMemory
from jaxcept.scheduler.params import OnToolFailure
from jaxcept.scheduler.planner import Flight
from jaxcept.scheduler.sequence import Family, SeqState, Sequence
from jaxcept.scheduler.swaps import Swaps
from jaxcept.scheduler.watcher import WatcherError

logger = logging.getLogger(__name__)

MORE = "more"  # what an open sequence waits for
REMEMBERED = 4096  # ended sequences and requests whose reason an error message can still name


class Lifecycle:
    """Moves sequences from state to state, out of turn with the steps in flight: what those still draw is dropped."""

    def __init__(
        self,
        book: Book,
        memory: ContextMemory,
        swaps: Swaps,
        flights: Iterable[Flight],
        estimator: DurationEstimator,
        head_start_s: float = inf,
    ) -> None:
        self._config = book.config
        self._book = book
        self._memory = memory
        self._swaps = swaps
        self._head_start_s = head_start_s
        self._flights = flights
        self._estimator = estimator
        self._deadlines: list[tuple[float, int]] = []  # a heap of (time, seq_id)
        self._ended: OrderedDict[int | str, FinishReason] = OrderedDict()  # by seq_id and by request_id

    def begin(self, seq: Sequence, now: float) -> None:
        """A sequence has a watcher of its own from here on."""
        if seq.watcher is not None:
            try:
                self._book.mask(seq)
            except WatcherError as error:
                self.finish(seq, FinishReason.ERROR, now, str(error))
            except Exception:
                logger.exception("the watcher of sequence %d (%s) failed", seq.seq_id, seq.request.request_id)
                self.finish(seq, FinishReason.ERROR, now)

    def rule(self, seq: Sequence, token_id: int, now: float) -> bool:
        """Does what the generated token asks for; whether it stays. A watcher that raises ends its own sequence alone.

        A token drawn under the mask that forbids it is an error: it would be drawn for ever.
        """
        try:
            ruling = judge(seq, token_id, self._config.max_len)
            if isinstance(ruling, Reject):
                self._reject(seq, now)
                return False
            if ruling is None and seq.watcher is not None:
                self._book.mask(seq)
        except WatcherError as error:
            ruling = End(FinishReason.ERROR, str(error))
        except Exception:
            logger.exception("the watcher of sequence %d (%s) failed", seq.seq_id, seq.request.request_id)
            ruling = End(FinishReason.ERROR)
        if isinstance(ruling, End):
            self.finish(seq, ruling.reason, now, ruling.stop_reason)
        elif isinstance(ruling, Call):
            self.intercept(seq, ruling, now)
        return True

    def _reject(self, seq: Sequence, now: float) -> None:
        """The token appended last was never there: the one before it is computed again, and drawn after by the mask."""
        if seq.rejected_at == len(seq.token_ids):
            raise RuntimeError(f"token {seq.token_ids[-1]} was drawn though its mask forbids it")
        seq.rejected_at = len(seq.token_ids)
        seq.token_ids.pop()
        self._drop_pending(seq)
        self._memory.truncate(seq, self._config.blocks_for(seq.num_computed))
        if not seq.num_output:
            seq.first_token_at = None
        self._book.retry(seq, now)

    def finish(self, seq: Sequence, reason: FinishReason, now: float, stop_reason: int | str | None = None) -> None:
        """Any state → FINISHED."""
        self._drop_pending(seq)
        if seq.opened is not None and seq.opened.ended_at is None:
            self._estimator.end(seq.seq_id, now, has_returned=False)
        if seq.opened is not None:
            on_host = max(0, seq.host_tokens - seq.host_start * self._config.block_size)
            seq.interceptions.append(seq.opened.close(now, seq.num_computed, on_host))
            seq.opened = None
        self._swaps.release(seq)
        self._memory.truncate(seq, 0)
        self._book.finish(seq)
        self._book.counters.finish(reason)
        self._remember(seq.seq_id, reason)
        self._remember(seq.request.request_id, reason)
        if seq.watcher is not None:
            try:
                seq.watcher.finish()
            except Exception:
                logger.exception("the watcher of sequence %d failed to finish", seq.seq_id)
        self._book.events.append(_finished(seq, reason, now, stop_reason))

    def intercept(self, seq: Sequence, call: Call, now: float) -> None:
        """→ INTERCEPTED. The KV of the trigger counts as computed where a submitted step computes it."""
        self._drop_pending(seq)
        self._memory.truncate(seq, self._config.blocks_for(seq.num_computed))  # stale tokens may have grown it
        index = seq.num_interceptions
        deadline = now + (seq.request.intercept.timeout_s if call.hold_s is None else call.hold_s)
        seq.opened = OpenInterception(
            index=index,
            tool=call.tool,
            payload=call.payload,
            started_at=now,
            context_tokens=len(seq.token_ids),
            num_computed=seq.num_computed,
            block_size=self._config.block_size,
            deadline=deadline,
            is_hold=call.hold_s is not None,
        )
        self._book.intercept(seq)
        expected_s = seq.request.intercept.expected_s.get(call.tool)
        self._estimator.begin(seq.seq_id, call.tool, now, expected_s, call.actual_s)
        self._book.counters.interceptions += 1
        heappush(self._deadlines, (deadline, seq.seq_id))
        request_id = seq.request.request_id
        earlier = tuple(seq.interceptions)
        event = Intercepted(
            seq.seq_id, request_id, seq.index, call.tool, call.payload, index, now, seq.num_cached, earlier
        )
        self._book.events.append(event)

    def give_back(
        self, seq: Sequence, token_ids: tuple[int, ...], outcome: Outcome, now: float, is_open: bool = False
    ) -> None:
        """INTERCEPTED → WAITING with these ids appended, queued by the original arrival (`_queue`).

        `is_open` says that more is to come: the ids are computed, then the sequence is intercepted again.
        """
        opened = seq.opened
        assert opened is not None, f"sequence {seq.seq_id} is intercepted without a record"
        opened.ended_at, opened.outcome, opened.num_returned = now, outcome, len(token_ids)
        self._estimator.end(seq.seq_id, now, has_returned=outcome is Outcome.RETURNED)
        seq.append_returned(token_ids)
        request_id = seq.request.request_id
        event = Returned(seq.seq_id, request_id, seq.index, opened.index, outcome, len(token_ids), now)
        self._book.events.append(event)
        if seq.watcher is not None:
            try:
                seq.watcher.returned(token_ids)
                self._book.mask(seq)
            except Exception:
                logger.exception("the watcher of sequence %d failed on returned ids", seq.seq_id)
                self.finish(seq, FinishReason.ERROR, now)
                return
        if seq.is_exhausted or len(seq.token_ids) >= self._config.max_len:
            self.finish(seq, FinishReason.LENGTH, now)
            return
        seq.is_open = is_open
        seq.rearm(self._config.max_len)
        self._queue(seq, now)

    def await_more(self, seq: Sequence, now: float) -> None:
        """An open sequence has computed all that is known: INTERCEPTED; the token that its step drew is dropped."""
        seq.num_pending -= 1
        seq.num_foreign += 1
        self.intercept(seq, Call(MORE), now)

    def follow(self, seq: Sequence, family: Family, now: float) -> Finished:
        """INTERCEPTED → WAITING for another request, whose prompt begins with all that the sequence has.

        The request that ends so gives its Finished event; what it waited for is the first interception of the next.
        What the next one's watcher raises comes before anything has changed.
        """
        watcher = family.make_watcher(seq.index)
        opened = seq.opened
        assert opened is not None, f"sequence {seq.seq_id} is intercepted without a record"
        ended = _finished(seq, FinishReason.CONTINUED, now, None)
        self._book.counters.finish(FinishReason.CONTINUED)
        self._remember(seq.request.request_id, FinishReason.CONTINUED)
        self._estimator.end(seq.seq_id, now, has_returned=True)
        opened.index, opened.ended_at, opened.outcome = 0, now, Outcome.RETURNED
        self._book.hand_over(seq, family)
        seq.serve(family, watcher, now, self._config.max_len)
        self._queue(seq, now)
        self.begin(seq, now)
        return ended

    def _queue(self, seq: Sequence, now: float) -> None:
        """Waits by its original arrival, or by that of `head_start_s` ago where it is later."""
        arrival = max(seq.arrival, now - self._head_start_s)
        seq.key = (seq.request.rank(arrival), seq.seq_id)
        self._book.wait(seq, now)

    def fail(self, seq: Sequence, outcome: Outcome, reason: FinishReason, now: float) -> None:
        """An INTERCEPTED sequence whose tool failed: by its on_failure the model is told, or the sequence ends."""
        opened = seq.opened
        assert opened is not None, f"sequence {seq.seq_id} is intercepted without a record"
        if seq.request.intercept.on_failure is OnToolFailure.TELL and not opened.is_hold:
            ids = seq.request.intercept.failure_ids
            if len(ids) <= self.room(seq):
                self.give_back(seq, ids, outcome, now)
                return
            reason = FinishReason.LENGTH
        self._estimator.end(seq.seq_id, now, has_returned=False)
        opened.ended_at, opened.outcome = now, outcome
        self.finish(seq, reason, now)

    def expire(self, now: float) -> None:
        """Fails the interceptions whose time is up."""
        while (deadline := self.next_deadline()) is not None and deadline <= now:
            _, seq_id = heappop(self._deadlines)
            self.fail(self._book.intercepted[seq_id], Outcome.TIMEOUT, FinishReason.TOOL_TIMEOUT, now)

    def next_deadline(self) -> float | None:
        """When the next open interception times out, seconds."""
        while self._deadlines:
            deadline, seq_id = self._deadlines[0]
            seq = self._book.intercepted.get(seq_id)
            if seq is not None and seq.opened is not None and seq.opened.deadline == deadline:
                return deadline
            heappop(self._deadlines)
        return None

    def room(self, seq: Sequence) -> int:
        """Most ids that may be returned to the sequence, so that one more token can be generated."""
        room = self._config.max_len - 1 - len(seq.token_ids)
        limit = seq.request.intercept.max_returned_tokens
        return max(0, room if limit is None else min(room, limit - seq.num_returned))

    def intercepted(self, target: int | str, interception: int | None = None) -> Sequence:
        """The intercepted sequence of this seq_id, or the only one of this request_id; else StateError.

        Where `interception` is given, it must be the one that is open: an answer that comes after its own interception
        timed out must not be taken for the answer to the next one.
        """
        if isinstance(target, int):
            one = self._book.sequences.get(target)
            seqs = [one] if one is not None else []
        else:
            family = self._book.families.get(target)
            seqs = family.sequences if family is not None else []
        if not seqs:
            reason = self._ended.get(target)
            state = "unknown" if reason is None else f"finished ({reason})"
            raise StateError(f"{target!r} is {state}: expected a sequence that is intercepted")
        intercepted = [seq for seq in seqs if seq.state is SeqState.INTERCEPTED]
        if len(intercepted) != 1:
            states = ", ".join(f"sequence {seq.seq_id} is {seq.state}" for seq in seqs)
            raise StateError(f"{states}: expected one that is intercepted; name it by its seq_id")
        seq = intercepted[0]
        opened = seq.opened
        if interception is not None and opened is not None and opened.index != interception:
            raise StateError(f"sequence {seq.seq_id} is at interception {opened.index}: {interception} is over")
        return seq

    def _drop_pending(self, seq: Sequence) -> None:
        if seq.num_pending:
            for flight in self._flights:
                flight.dropped.add(seq.seq_id)
            seq.num_pending = 0
        seq.num_computed = min(seq.num_computed, len(seq.token_ids))
        seq.max_computed = min(seq.max_computed, len(seq.token_ids))

    def _remember(self, key: int | str, reason: FinishReason) -> None:
        self._ended[key] = reason
        if len(self._ended) > REMEMBERED:
            self._ended.popitem(last=False)


def _finished(seq: Sequence, reason: FinishReason, now: float, stop_reason: int | str | None) -> Finished:
    timing = Timing(
        arrival=seq.asked_at,
        first_scheduled_at=seq.first_scheduled_at,
        first_token_at=seq.first_token_at,
        finished_at=now,
        intercepted_s=sum(record.duration_s for record in seq.interceptions),
    )
    return Finished(
        seq_id=seq.seq_id,
        request_id=seq.request.request_id,
        index=seq.index,
        reason=reason,
        stop_reason=stop_reason,
        token_ids=tuple(seq.token_ids),
        output_spans=seq.output_spans,
        num_prompt=seq.num_prompt,
        num_returned=seq.num_returned,
        num_cached=seq.num_cached,
        num_preemptions=seq.num_preemptions,
        interceptions=tuple(seq.interceptions),
        timing=timing,
    )
