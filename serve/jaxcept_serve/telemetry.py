"""Prometheus metrics: an observer of the engine's steps and of turns, read at /metrics.

Counting is done by the thread that steps the engine, in plain numbers under one lock; a scrape copies them. Gauges are
those of the engine's last snapshot: no other thread looks at the scheduler.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector, CollectorRegistry
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jaxcept.engine import Engine
from jaxcept.metrics import time_per_output_token
from jaxcept.scheduler.events import Event, Finished, Intercepted, Resumed, Tokens
from jaxcept.scheduler.interception import Interception
from jaxcept.scheduler.sequence import SeqState
from jaxcept_serve.families import (
    EngineCounts,
    Snapshot,
    TurnCounts,
    engine_families,
    gauge,
    take_snapshot,
    turn_families,
)
from jaxcept_serve.histograms import TOOL_S, TTFT_S, Histogram, Names
from jaxcept_serve.turns import Usage

SNAPSHOT_S = 0.25  # gauges are at most this old while the engine works


class Telemetry(Collector):
    """Counts what the engine and the turns do. `on_step` belongs to the engine's thread, everything else to any.

    `held` tells how many conversations are held for their next turn, where somebody knows.
    """

    def __init__(self, model_name: str, max_model_len: int, max_tools: int = 64) -> None:
        self.registry = CollectorRegistry()
        self.held: Callable[[], float] | None = None
        self.snapshot = Snapshot()
        self._labels = {"model_name": model_name, "engine": "0"}
        self._lock = threading.Lock()
        self._tools = Names(max_tools)
        self._last_token: dict[int, float] = {}  # by seq_id, of sequences that are in the middle of a run
        self._unseen: set[int] = set()  # ended with the step of their first token
        self._returned: dict[int, float] = {}  # by seq_id, when the answer came, until the next token
        self._predicted: dict[int, float] = {}  # by seq_id, seconds that a tool was expected to take
        self._engine = EngineCounts()
        self._turns = TurnCounts(max_model_len)
        self._num_computed = 0
        self.registry.register(self)

    # The engine's thread.

    def on_step(self, engine: Engine, events: Sequence[Event], now: float) -> None:
        """Counts what a step brought."""
        with self._lock:
            for event in events:
                match event:
                    case Tokens():
                        self._on_tokens(engine, event)
                    case Intercepted():
                        self._on_intercepted(engine, event)
                    case Resumed():
                        self._returned[event.seq_id] = event.interception.ended_at
                        self._on_over(event.seq_id, event.interception)
                    case Finished():
                        self._on_finished(event)
            counters = engine.scheduler.counters
            computed = counters.decode_tokens + counters.prefill_tokens
            computed += counters.returned_tokens + counters.recomputed_tokens
            if computed > self._num_computed:
                self._engine.step_tokens.observe(computed - self._num_computed)
                self._num_computed = computed
            if now - self.snapshot.at >= SNAPSHOT_S or not self.snapshot.num_blocks or engine.is_dead:
                self.snapshot = take_snapshot(engine, now)

    def _on_tokens(self, engine: Engine, event: Tokens) -> None:
        last, at = self._last_token, event.at
        before = Counter(map(last.get, event.seq_ids))  # most sequences of a batch had their last token together
        if before.pop(None, 0):
            for seq_id in event.seq_ids:
                if seq_id not in last:
                    self._on_first_token(engine, seq_id, at)
        last.update(dict.fromkeys(event.seq_ids, at))
        for earlier, times in before.items():
            if earlier is not None:
                self._engine.inter_token.observe(at - earlier, times)

    def _on_first_token(self, engine: Engine, seq_id: int, at: float) -> None:
        """Of a sequence, or after an interception."""
        answered_at = self._returned.pop(seq_id, None)
        if answered_at is not None:
            self._engine.resume_ttft.observe(at - answered_at)
        seq = engine.scheduler.sequences.get(seq_id)
        if seq is None:
            self._unseen.add(seq_id)
        elif seq.first_token_at == at:
            self._engine.first_token(seq.asked_at, seq.first_scheduled_at, at, seq.num_prompt)

    def _on_intercepted(self, engine: Engine, event: Intercepted) -> None:
        self._last_token.pop(event.seq_id, None)
        seq = engine.scheduler.sequences.get(event.seq_id)
        if seq is not None and seq.state is SeqState.INTERCEPTED:
            self._predicted[event.seq_id] = engine.scheduler.remaining_s(event.seq_id, event.at)

    def _on_over(self, seq_id: int, record: Interception) -> None:
        counts, tool = self._engine, self._tools.label(record.tool)
        counts.interceptions[tool, record.outcome.value] += 1
        counts.residency[record.residency.value] += 1
        if tool not in counts.durations:
            counts.durations[tool] = Histogram(TOOL_S)
        counts.durations[tool].observe(record.duration_s)
        predicted = self._predicted.pop(seq_id, None)
        if predicted is not None:
            counts.prediction_error.observe(abs(predicted - record.duration_s))
        if record.resumed_at is None:
            return
        if record.residency.value not in counts.resume_delay:
            counts.resume_delay[record.residency.value] = Histogram(TTFT_S)
        counts.resume_delay[record.residency.value].observe(record.queued_s)
        counts.resumed_tokens["recomputed"] += record.num_recomputed
        counts.resumed_tokens["host"] += record.num_swapped
        counts.resumed_tokens["prefix_cache"] += record.num_cached_on_return
        elsewhere = record.num_recomputed + record.num_swapped + record.num_cached_on_return
        counts.resumed_tokens["device"] += max(0, record.context_tokens - elsewhere)

    def _on_finished(self, event: Finished) -> None:
        timing, seq_id = event.timing, event.seq_id
        self._last_token.pop(seq_id, None)
        self._returned.pop(seq_id, None)
        for record in event.interceptions:
            if record.resumed_at is None:
                self._on_over(seq_id, record)
        self._predicted.pop(seq_id, None)
        if seq_id in self._unseen:
            self._unseen.discard(seq_id)
            if timing.first_token_at is not None and not event.interceptions:
                scheduled_at = timing.first_scheduled_at
                self._engine.first_token(timing.arrival, scheduled_at, timing.first_token_at, event.num_prompt)
        per_token = time_per_output_token(timing, event.num_generated)
        if per_token is not None:
            self._engine.per_token.observe(per_token)

    # Turns, from the server's thread.

    def turn_finished(self, reason: str) -> None:
        """One completion of a turn is whole."""
        with self._lock:
            self._turns.finished[reason] += 1

    def turn_done(self, seconds: float, usage: Usage) -> None:
        """A turn is over, this long after it was asked for."""
        with self._lock:
            counts = self._turns
            counts.latency.observe(seconds)
            counts.prompt.observe(usage.prompt_tokens)
            counts.generation.observe(usage.completion_tokens)
            counts.tokens["prompt"] += usage.prompt_tokens
            counts.tokens["cached"] += usage.cached_tokens
            counts.tokens["completion"] += usage.completion_tokens
            counts.tokens["returned"] += usage.returned_tokens

    def tool_answered(self, name: str, is_error: bool, seconds: float) -> None:
        """A tool that the server runs has answered."""
        with self._lock:
            tool = self._tools.label(name)
            self._turns.tool_calls[tool, "error" if is_error else "ok"] += 1
            self._turns.tool_seconds[tool] += seconds

    def turn_refused(self, status: int) -> None:
        """A turn was not taken, with this HTTP status."""
        with self._lock:
            self._turns.refused[str(status)] += 1

    # A scrape.

    def collect(self) -> Iterator[Metric]:
        """All families, copied under the lock."""
        with self._lock:
            families = [*engine_families(self.snapshot, self._engine), *turn_families(self._turns)]
        if self.held is not None:
            families.append(gauge("jaxcept:held_conversations", "Conversations held for a next turn.", self.held()))
        for family in families:
            family.samples[:] = [sample._replace(labels={**self._labels, **sample.labels}) for sample in family.samples]
        return iter(families)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """(body, content type) in the form that the Accept header asks for."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def route(self) -> Route:
        """GET /metrics."""

        async def metrics(request: Request) -> Response:
            body, content_type = self.render(request.headers.get("accept", ""))
            return Response(body, headers={"content-type": content_type, "cache-control": "no-store"})

        return Route("/metrics", metrics, methods=["GET"])
