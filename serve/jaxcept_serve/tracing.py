"""OpenTelemetry traces: a span for each request, and in it one for each interception.

Needs the packages of the extra `otel`; without them nothing here is called.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from jaxcept.engine import Engine
from jaxcept.scheduler.events import Event, Finished, Resumed
from jaxcept.scheduler.interception import Interception, Outcome
from jaxcept_serve.turns import Usage

try:
    from opentelemetry import trace
    from opentelemetry.context import Context
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ModuleNotFoundError as missing:
    _missing: ModuleNotFoundError | None = missing
else:
    _missing = None

MAX_REMEMBERED = 4096  # requests whose interceptions can still be told: contexts are held beyond their requests


def make_tracing(endpoint: str | None = None, service_name: str = "jaxcept") -> Tracing:
    """Traces sent to an OTLP endpoint over HTTP, such as http://localhost:4318/v1/traces; None is what
    OTEL_EXPORTER_OTLP_ENDPOINT says. Raises ValueError where the packages are missing."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ValueError(f"tracing needs {error.name}: pip install 'jaxcept[otel]'") from error
    if _missing is not None:
        raise ValueError(f"tracing needs {_missing.name}: pip install 'jaxcept[otel]'") from _missing
    provider = TracerProvider(resource=Resource.create({"service.name": service_name}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return Tracing(provider)


class Tracing:
    """Makes the spans. `on_step` belongs to the engine's thread, the rest to any."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("jaxcept")
        self._propagator = TraceContextTextMapPropagator()
        self._lock = threading.Lock()
        self._parents: OrderedDict[str, Context] = OrderedDict()  # by request_id

    def begin(self, request_id: str, operation: str, model: str, headers: Mapping[str, str]) -> trace.Span:
        """The span of a request, under the W3C traceparent of its headers, if it has one."""
        span = self._tracer.start_span(
            f"{operation} {model}",
            context=self._propagator.extract(headers),
            kind=trace.SpanKind.SERVER,
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.request.model": model,
                "jaxcept.request_id": request_id,
            },
        )
        with self._lock:
            self._parents[request_id] = trace.set_span_in_context(span)
            while len(self._parents) > MAX_REMEMBERED:
                self._parents.popitem(last=False)
        return span

    def end(self, span: trace.Span, reasons: Sequence[str], usage: Usage | None, error: str | None) -> None:
        """The request is over: its finish reasons, what it took, or what went wrong."""
        attributes: dict[str, Any] = {"gen_ai.response.finish_reasons": list(reasons)}
        if usage is not None:
            attributes |= {
                "gen_ai.usage.input_tokens": usage.prompt_tokens,
                "gen_ai.usage.output_tokens": usage.completion_tokens,
                "jaxcept.cached_tokens": usage.cached_tokens,
                "jaxcept.recomputed_tokens": usage.recomputed_tokens,
                "jaxcept.intercepted_s": usage.intercepted_s,
                "jaxcept.held_byte_s": usage.held_byte_s,
            }
        span.set_attributes(attributes)
        if error is not None:
            span.set_status(trace.Status(trace.StatusCode.ERROR, error))
        span.end()

    def on_step(self, engine: Engine, events: Sequence[Event], now: float) -> None:
        """Spans of the interceptions that are over."""
        for event in events:
            match event:
                case Resumed():
                    self._tell(event.request_id, event.seq_id, event.interception, now)
                case Finished():
                    for record in event.interceptions:
                        if record.resumed_at is None:
                            self._tell(event.request_id, event.seq_id, record, now)

    def _tell(self, request_id: str, seq_id: int, record: Interception, now: float) -> None:
        with self._lock:
            parent = self._parents.get(request_id)
        if parent is None:
            return
        start_ns = time.time_ns() - int(now * 1e9)  # of the engine's clock
        span = self._tracer.start_span(
            f"interception {record.tool}"[:200],
            context=parent,
            start_time=start_ns + int(record.started_at * 1e9),
            attributes={
                "gen_ai.tool.name": record.tool[:200],
                "jaxcept.seq_id": seq_id,
                "jaxcept.interception": record.index,
                "jaxcept.outcome": record.outcome.value,
                "jaxcept.residency": record.residency.value,
                "jaxcept.context_tokens": record.context_tokens,
                "jaxcept.recomputed_tokens": record.num_recomputed,
                "jaxcept.swapped_tokens": record.num_swapped,
                "jaxcept.returned_tokens": record.num_returned,
                "jaxcept.tool_s": record.duration_s,
                "jaxcept.queued_s": record.queued_s,
            },
        )
        if record.outcome is not Outcome.RETURNED:
            span.set_status(trace.Status(trace.StatusCode.ERROR, record.outcome.value))
        end = record.ended_at if record.resumed_at is None else record.resumed_at
        span.end(end_time=start_ns + int(end * 1e9))

    def close(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()
