"""Continuous batching in which a sequence may stop for a tool and go on.

The scheduler is pure: time is an argument, and the same calls give the same plans. `schedule` may run ahead of `update`
by any number of steps: a token that was drawn and not collected yet is pending, and a sequence that ended meanwhile
leaves a stale token behind, which is dropped. The device executes plans in order, so a freed block or row may be given
out again at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace

from jaxcept.scheduler.book import Book
from jaxcept.scheduler.border import StateError, check_ids, check_params, check_prompt
from jaxcept.scheduler.check import check_all
from jaxcept.scheduler.config import SchedulerConfig
from jaxcept.scheduler.counters import Counters
from jaxcept.scheduler.durations import DurationEstimator, Elapsed
from jaxcept.scheduler.events import Event, Finished, FinishReason, PromptLogprobs, Tokens
from jaxcept.scheduler.host import HostMemory
from jaxcept.scheduler.interception import Outcome
from jaxcept.scheduler.lifecycle import Lifecycle
from jaxcept.scheduler.memory import ContextMemory
from jaxcept.scheduler.orders import Fcfs, QueueOrder
from jaxcept.scheduler.params import OnToolFailure
from jaxcept.scheduler.plan import StepPlan, StepResult, TokenLogprobs
from jaxcept.scheduler.planner import Flight, Planner
from jaxcept.scheduler.policy import BatchView, HostUse, InterceptedView, Policy
from jaxcept.scheduler.ranking import OrderRanking
from jaxcept.scheduler.request import Request
from jaxcept.scheduler.sequence import Family, SeqState, Sequence
from jaxcept.scheduler.speculation import Speculation, Trial, split_draws
from jaxcept.scheduler.swaps import Swaps

__all__ = ["Scheduler", "StateError"]


class Scheduler:
    """Requests in, plans out, results in, events out. Not thread-safe: one thread calls it."""

    def __init__(
        self,
        config: SchedulerConfig,
        policy: Policy,
        estimator: DurationEstimator | None = None,
        order: QueueOrder | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        traits = policy.traits
        config = replace(config, enable_prefix_caching=config.enable_prefix_caching and traits.prefix_caching)
        self.config = config
        self.policy = policy
        self._estimator = estimator if estimator is not None else Elapsed()
        host = HostMemory(config.num_host_blocks if traits.host is not HostUse.NONE else 0)
        self.memory = ContextMemory(config, host if traits.host is HostUse.CACHE else None)
        self.order = order if order is not None else Fcfs()
        self._ranking = OrderRanking(self.order, config.block_size)
        self._book = Book(config, self._ranking)
        self.swaps = Swaps(self._book, self.memory, host, traits)
        self._flights: deque[Flight] = deque()
        self._speculation = speculation
        self._planner = Planner(self._book, self.memory, self.swaps, policy, speculation)
        head_start_s = traits.head_start_s
        if head_start_s and config.return_head_start_s is not None:
            head_start_s = config.return_head_start_s
        self._lifecycle = Lifecycle(self._book, self.memory, self.swaps, self._flights, self._estimator, head_start_s)
        self._next_seq_id = 0
        self._next_step_id = 0

    # What a client does.

    def add(self, request: Request, now: float) -> tuple[int, ...]:
        """Queues a request and returns the seq_ids of its params.n completions.

        Raises ValueError where it can never be served, naming the field.
        """
        if request.request_id in self._book.families:
            raise ValueError(f"request_id={request.request_id!r}: expected one that no unfinished request has")
        check_prompt(request.prompt_ids, self.config)
        check_params(request.params, self.config)
        family = Family(request)
        arrival = now if request.arrival is None else request.arrival
        for index in range(request.params.n):
            family.sequences.append(Sequence(self._next_seq_id, index, family, arrival, self.config.max_len))
            self._next_seq_id += 1
        self._book.families[request.request_id] = family
        for seq in family.sequences:
            self._book.admit(seq, now)
        seq_ids = tuple(seq.seq_id for seq in family.sequences)
        for seq in list(family.sequences):
            self._lifecycle.begin(seq, now)
        return seq_ids

    def follow(self, target: int | str, request: Request, now: float) -> tuple[int, Finished]:
        """A request that goes on with the context of an intercepted sequence, which leaves its own request.

        The new prompt must begin with all ids that the sequence has. Returns the seq_id, which stays, and how the
        earlier request ended, of which no event is told. The place in the queue is that of a tool's return. Raises
        StateError where nothing is intercepted, ValueError where the request cannot go on from there; nothing has
        changed then.
        """
        seq = self._lifecycle.intercepted(target)
        if request.request_id in self._book.families:
            raise ValueError(f"request_id={request.request_id!r}: expected one that no unfinished request has")
        check_prompt(request.prompt_ids, self.config)
        check_params(request.params, self.config)
        if request.params.n != 1 or len(seq.family.sequences) != 1:
            raise ValueError(f"n={request.params.n}: expected one completion, for a context is taken over by one alone")
        if request.params.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs: expected none, for most of the prompt is not computed again")
        if request.cache_salt != seq.request.cache_salt:
            raise StateError(f"{target!r} is unknown: expected a sequence that is intercepted")
        if list(request.prompt_ids[: len(seq.token_ids)]) != seq.token_ids:
            raise ValueError(f"prompt_ids: expected to begin with the {len(seq.token_ids)} ids of {target!r}")
        return seq.seq_id, self._lifecycle.follow(seq, Family(request), now)

    def abort(self, request_id: str, now: float) -> bool:
        """Ends all sequences of a request, in whatever state; whether there were any."""
        return self.end(request_id, now, FinishReason.ABORT)

    def end(self, target: int | str, now: float, reason: FinishReason) -> bool:
        """Ends a sequence (seq_id) or all of a request (request_id) for a reason of the caller's."""
        if isinstance(target, str):
            family = self._book.families.get(target)
            seqs = list(family.sequences) if family is not None else []
        else:
            seqs = [self._book.sequences[target]] if target in self._book.sequences else []
        for seq in seqs:
            self._lifecycle.finish(seq, reason, now)
        return bool(seqs)

    def end_all(self, now: float, reason: FinishReason) -> None:
        """Ends everything and forgets the steps in flight: for an engine whose device is gone."""
        for seq in list(self._book.sequences.values()):
            self._lifecycle.finish(seq, reason, now)
        self._flights.clear()

    def resume(self, target: int | str, token_ids: Seq[int], now: float, interception: int | None = None) -> None:
        """A tool's answer: the intercepted sequence goes on with exactly its own ids and these; none at all are fine.

        `target` is a seq_id, or the request_id where one of its sequences is intercepted; `interception`, where given,
        the index that the Intercepted event told. Raises StateError where that is not what is intercepted, ValueError
        where the ids are more than `room` allows.
        """
        seq = self._lifecycle.intercepted(target, interception)
        self._lifecycle.give_back(seq, self._checked_return(seq, token_ids), Outcome.RETURNED, now)

    def extend(self, target: int | str, token_ids: Seq[int], now: float, interception: int | None = None) -> None:
        """A piece of a tool's answer, or of a prompt: it is computed, and the sequence is intercepted for the rest.

        The last piece goes to `resume`. Raises like `resume`, and ValueError where there are no ids.
        """
        seq = self._lifecycle.intercepted(target, interception)
        ids = self._checked_return(seq, token_ids)
        if not ids:
            raise ValueError("token_ids is empty: expected a piece of at least one id")
        self._lifecycle.give_back(seq, ids, Outcome.RETURNED, now, is_open=True)

    def fail(
        self, target: int | str, now: float, token_ids: Seq[int] | None = None, interception: int | None = None
    ) -> None:
        """A tool failed: by the request's `on_failure` the model is told, or the sequence ends.

        `token_ids` say what the model is told; by default the request's failure_ids. Raises like `resume`.
        """
        seq = self._lifecycle.intercepted(target, interception)
        if token_ids is not None and seq.request.intercept.on_failure is OnToolFailure.TELL:
            self._lifecycle.give_back(seq, self._checked_return(seq, token_ids), Outcome.FAILED, now)
        else:
            self._lifecycle.fail(seq, Outcome.FAILED, FinishReason.TOOL_FAILED, now)

    def room(self, target: int | str, interception: int | None = None) -> int:
        """Most ids that `resume` takes for an intercepted sequence. Raises StateError as `resume` does."""
        return self._lifecycle.room(self._lifecycle.intercepted(target, interception))

    def _checked_return(self, seq: Sequence, token_ids: Seq[int]) -> tuple[int, ...]:
        ids, room = tuple(token_ids), self._lifecycle.room(seq)
        check_ids("token_ids", ids, self.config)
        if len(ids) > room:
            raise ValueError(
                f"token_ids has {len(ids)} ids: expected at most {room}, for sequence {seq.seq_id} has"
                f" {len(seq.token_ids)} tokens (max_model_len={self.config.max_len}), {seq.num_returned} of them"
                f" returned (max_returned_tokens={seq.request.intercept.max_returned_tokens}); shorten the answer"
            )
        return ids

    # What the engine does.

    def expire(self, now: float) -> None:
        """Ends the interceptions whose time is up; `schedule` does so first."""
        self._lifecycle.expire(now)

    def next_deadline(self, now: float) -> float | None:
        """When `schedule` is to be called though nothing else happens, seconds: an interception times out, or the
        policy changes its mind. None: never."""
        moments = (self._lifecycle.next_deadline(), self.policy.next_change(now))
        return min((moment for moment in moments if moment is not None), default=None)

    def schedule(self, now: float) -> StepPlan | None:
        """The next step, or None where nothing can be computed until a result, an answer or a request comes in."""
        self._lifecycle.expire(now)
        if self._book.masked and self._book.awaits_masked:
            return None  # a step without those would only split the batch in two that take turns
        if self._flights and (self._flights[-1].num_drafts or self._planner.room_for_drafts):
            return None  # guesses follow the last token, which must be known
        token_limit = None
        book = self._book
        if book.intercepted or book.holders or book.unplaced or self.swaps.is_in_use or not self.order.is_arrival:
            batch = self._batch_view(now)
            self._ranking.batch = batch
            self.swaps.begin_step(self._next_step_id, self.policy.swap_budget(batch))
            self._place_contexts(batch)
            token_limit = self.order.token_limit(batch)
        planned = self._planner.plan(self._next_step_id, now, token_limit)
        if planned is None:
            return None
        plan, flight = planned
        self._next_step_id += 1
        self._flights.append(flight)
        return plan

    def update(self, plan: StepPlan, result: StepResult, now: float) -> list[Event]:
        """Takes the result of the oldest plan in flight; returns all events since the last call."""
        flight = self._flights.popleft()
        assert flight.step_id == plan.step_id == result.step_id, (
            f"results out of order: step {flight.step_id} is due, got {result.step_id} for plan {plan.step_id}"
        )
        drawn = len(flight.seqs) + flight.num_drafts
        assert len(result.token_ids) == drawn, f"{len(result.token_ids)} tokens for {drawn} draws"
        self.swaps.settle(result)
        if result.prompt_logprobs:
            self._take_prompt_logprobs(plan, result)
        seqs, seq_ids, token_ids = flight.seqs, flight.seq_ids, result.token_ids
        trials: list[Trial] = []
        if flight.num_drafts:
            token_ids, trials = split_draws(plan, seqs, token_ids)
            trials = [trial for trial in trials if trial.seq.seq_id not in flight.dropped]
        for seq in seqs[flight.num_decodes :]:
            if seq.is_open and seq.seq_id not in flight.dropped:
                self._lifecycle.await_more(seq, now)
                flight.dropped.add(seq.seq_id)
            elif seq.first_token_at is None:
                seq.first_token_at = now
        if flight.dropped:
            live = [i for i, seq_id in enumerate(seq_ids) if seq_id not in flight.dropped]
            self.counters.stale_tokens += len(seqs) - len(live)
            seqs = [seqs[i] for i in live]
            seq_ids = tuple([seq_ids[i] for i in live])
            token_ids = tuple([token_ids[i] for i in live])
        if seqs:
            for trial in trials:
                trial.credit()
            logprobs = _logprobs_by_seq(plan, flight, result) if result.logprobs else {}
            self._take(seqs, Tokens(plan.step_id, seq_ids, token_ids, logprobs, now))
        if trials:
            self._confirm(trials, plan.step_id, now)
        return self.drain()

    def observe_step(self, seconds: float) -> None:
        """How long the step of the last result took on the device."""
        self.order.observe_step(seconds)

    def drain(self) -> list[Event]:
        """What happened since the last call of `drain` or `update`."""
        events = self._book.events[:]
        self._book.events.clear()
        return events

    def check(self) -> None:
        """Asserts every invariant whole; for tests, it takes time in proportion to everything there is."""
        check_all(self._book, self.memory, self.swaps, self._flights)

    def _take(self, seqs: list[Sequence], told: Tokens) -> None:
        """A token for each of these sequences."""
        place = len(self._book.events)
        self._book.events.append(told)
        self.counters.generated_tokens += len(seqs)
        rejected = self._append(seqs, told.token_ids, told.at)
        if rejected:
            self._take_back(place, rejected)

    def _confirm(self, trials: list[Trial], step_id: int, now: float) -> None:
        """Takes what was drawn behind drafts, place by place, as far as the drafts were right."""
        assert self._speculation is not None
        going = trials
        while going := [trial for trial in going if trial.goes_on]:
            token_ids = tuple([trial.drawn[trial.num_taken] for trial in going])
            for trial in going:
                trial.credit()
                trial.seq.num_pending += 1
            seqs = [trial.seq for trial in going]
            self._take(seqs, Tokens(step_id, tuple([seq.seq_id for seq in seqs]), token_ids, {}, now))
        for trial in trials:
            right = trial.end()
            self.counters.accepted_draft_tokens += right
            if trial.seq.lookup is not None:
                trial.seq.lookup.learn(right, self._speculation.config.max_tokens)

    def _append(self, seqs: list[Sequence], token_ids: tuple[int, ...], now: float) -> set[int]:
        """The hot loop: a sequence is judged only where the token or its place is special, or a watcher reads it.

        Returns the seq_ids whose token was rejected.
        """
        rejected = set()
        for seq, token_id in zip(seqs, token_ids, strict=True):
            seq.num_pending -= 1
            known = seq.token_ids
            known.append(token_id)
            is_special = len(known) >= seq.stop_len or token_id in seq.special_ids or seq.watcher is not None
            if is_special and not self._lifecycle.rule(seq, token_id, now):
                rejected.add(seq.seq_id)
        return rejected

    def _take_back(self, place: int, rejected: set[int]) -> None:
        """Nobody is told of rejected tokens."""
        told = self._book.events[place]
        assert isinstance(told, Tokens)
        kept = [i for i, seq_id in enumerate(told.seq_ids) if seq_id not in rejected]
        left = told._replace(
            seq_ids=tuple([told.seq_ids[i] for i in kept]),
            token_ids=tuple([told.token_ids[i] for i in kept]),
            logprobs={seq_id: entry for seq_id, entry in told.logprobs.items() if seq_id not in rejected},
        )
        self._book.events[place : place + 1] = [left] if kept else []
        self.counters.generated_tokens -= len(rejected)
        self.counters.rejected_tokens += len(rejected)

    def _take_prompt_logprobs(self, plan: StepPlan, result: StepResult) -> None:
        for index, entries in sorted(result.prompt_logprobs.items()):
            chunk = plan.chunks[index]
            seq = self._book.sequences.get(chunk.seq_id)
            if seq is None or seq.family.prompt_logprobs_sent:
                continue
            family, have = seq.family, len(seq.family.prompt_logprobs)
            if chunk.start <= have:  # a chunk computed again after a preemption brings what is there already
                family.prompt_logprobs.extend(entries[have - chunk.start :])
            if len(family.prompt_logprobs) >= seq.num_prompt - 1:
                family.prompt_logprobs_sent = True
                whole = tuple(family.prompt_logprobs[: seq.num_prompt - 1])
                self._book.events.append(PromptLogprobs(family.request.request_id, whole))

    def _place_contexts(self, batch: BatchView) -> None:
        """Asks the policy where the contexts of intercepted sequences live."""
        book = self._book
        unplaced, book.unplaced = book.unplaced, []
        among = book.holders.values() if self.policy.traits.reconsiders else dict.fromkeys(unplaced)
        seqs = [seq for seq in among if seq.state is SeqState.INTERCEPTED and seq.blocks]
        if not seqs:
            return
        batch = batch._replace(swap_budget=self.swaps.budget_left)
        placements = self.policy.place([self._view(seq, batch.now) for seq in seqs], batch)
        for seq, (keep, swap) in zip(seqs, placements, strict=True):
            num_blocks = len(seq.blocks)
            assert 0 <= keep <= keep + swap <= num_blocks, (
                f"policy {self.policy.name} keeps {keep} and swaps {swap} of {num_blocks} blocks"
            )
            left = swap - self.swaps.swap_out(seq, swap) if swap else 0
            if left == 0 and (swap or keep < num_blocks):
                self._planner.shrink(seq, keep)

    def _batch_view(self, now: float) -> BatchView:
        book, pool = self._book, self.memory.pool
        waiting_tokens = sum([len(seq.token_ids) - seq.num_computed for seq in book.waiting])
        prefilling_tokens = sum([len(seq.token_ids) - seq.num_computed for seq in book.prefilling])
        num_decoding = len(book.decoding)
        return BatchView(
            now=now,
            block_size=self.config.block_size,
            num_blocks=self.config.num_blocks,
            num_available_blocks=pool.num_available,
            num_available_host_blocks=self.swaps.host.pool.num_available,
            num_running=book.num_running,
            running_tokens=sum([seq.num_computed for queue in (book.prefilling, book.decoding) for seq in queue]),
            num_waiting=len(book.waiting),
            waiting_tokens=waiting_tokens,
            query_tokens=min(num_decoding + prefilling_tokens + waiting_tokens, self.config.max_num_batched_tokens),
        )

    def _view(self, seq: Sequence, now: float) -> InterceptedView:
        opened = seq.opened
        assert opened is not None, f"sequence {seq.seq_id} is intercepted without a record"
        return InterceptedView(
            seq_id=seq.seq_id,
            arrival=seq.arrival,
            tool=opened.tool,
            since=opened.started_at,
            elapsed=now - opened.started_at,
            remaining_s=self._estimator.remaining(seq.seq_id, now),
            num_tokens=len(seq.token_ids),
            num_computed=seq.num_computed,
            num_blocks=len(seq.blocks),
            num_exclusive_blocks=self.memory.num_exclusive(seq),
            num_host_blocks=len(seq.host),
        )

    # What others ask.

    @property
    def has_work(self) -> bool:
        """Whether `schedule` or `drain` has something to do: not while every sequence waits for a tool."""
        book = self._book
        return len(book.sequences) > len(book.intercepted) or bool(book.events) or bool(book.unplaced)

    @property
    def counters(self) -> Counters:
        """Totals since the start."""
        return self._book.counters

    @property
    def num_running(self) -> int:
        """Sequences that hold a row."""
        return self._book.num_running

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue."""
        return len(self._book.waiting)

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens that sequences in the queue have yet to compute. May be asked from any thread."""
        return sum([len(seq.token_ids) - seq.num_computed for seq in list(self._book.waiting.items)])

    @property
    def num_intercepted(self) -> int:
        """Sequences that wait for a tool."""
        return len(self._book.intercepted)

    @property
    def num_unfinished(self) -> int:
        """Sequences in any state but FINISHED."""
        return len(self._book.sequences)

    @property
    def sequences(self) -> Mapping[int, Sequence]:
        """The unfinished sequences by seq_id, for observers to read from the stepping thread."""
        return self._book.sequences

    def remaining_s(self, seq_id: int, now: float) -> float:
        """Estimate of the seconds until the tool of an intercepted sequence returns."""
        return self._estimator.remaining(seq_id, now)

    @property
    def num_held_blocks(self) -> int:
        """Blocks that any sequence holds."""
        return self.memory.pool.num_held

    @property
    def num_idle_blocks(self) -> int:
        """Blocks that an intercepted sequence holds and nobody else uses."""
        seqs = [seq for seq in self._book.holders.values() if seq.state is SeqState.INTERCEPTED]
        return sum([self.memory.num_exclusive(seq) for seq in seqs])


def _logprobs_by_seq(plan: StepPlan, flight: Flight, result: StepResult) -> dict[int, TokenLogprobs]:
    seq_ids = plan.sampling_seq_ids
    entries = ((seq_ids[index], entry) for index, entry in result.logprobs.items())
    return {seq_id: entry for seq_id, entry in entries if seq_id not in flight.dropped}
