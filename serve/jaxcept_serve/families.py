"""What is counted, and the Prometheus families that it becomes: names, help texts, labels."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from jaxcept.engine import Engine
from jaxcept.scheduler.sequence import SeqState
from jaxcept_serve.histograms import REQUEST_S, STEP_TOKENS, TOKEN_S, TOOL_S, TTFT_S, Histogram, token_bounds


@dataclass(frozen=True, slots=True)
class Residence:
    """Blocks of the contexts of intercepted sequences, by where they are."""

    device: int = 0
    host: int = 0
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The engine at one moment, in numbers that any thread may read."""

    at: float = 0.0  # seconds of the engine's clock
    figures: Mapping[str, float] = field(default_factory=dict)  # Engine.metrics()
    residence: Residence = Residence()
    num_blocks: int = 0
    num_cached_blocks: int = 0
    num_host_blocks: int = 0
    num_cached_host_blocks: int = 0
    block_bytes: int = 0
    hides_swaps: bool = True
    is_dead: bool = False

    def figure(self, name: str) -> float:
        """One of the engine's figures; 0 where it has none of this name."""
        return self.figures.get(name, 0.0)

    @property
    def usage(self) -> float:
        """Share of the device's blocks that sequences hold."""
        return self.figure("held_blocks") / self.num_blocks if self.num_blocks else 0.0


def take_snapshot(engine: Engine, now: float) -> Snapshot:
    """Reads the engine, on the thread that steps it."""
    scheduler = engine.scheduler
    pool, host = scheduler.memory.pool, scheduler.swaps.host.pool
    return Snapshot(
        at=now,
        figures=engine.metrics(),
        residence=_residence(engine),
        num_blocks=pool.num_blocks,
        num_cached_blocks=pool.num_cached,
        num_host_blocks=host.num_blocks,
        num_cached_host_blocks=host.num_cached,
        block_bytes=engine.ledger.block_bytes,
        hides_swaps=not scheduler.policy.traits.waits_for_swaps,
        is_dead=engine.is_dead,
    )


def _residence(engine: Engine) -> Residence:
    scheduler = engine.scheduler
    device = host = dropped = 0
    if scheduler.num_intercepted:
        for seq in scheduler.sequences.values():
            if seq.state is SeqState.INTERCEPTED and seq.opened is not None:
                device += len(seq.blocks)
                host += len(seq.host)
                total = scheduler.config.blocks_for(seq.opened.num_computed)
                dropped += max(0, total - len(seq.blocks) - len(seq.host))
    return Residence(device, host, dropped)


class EngineCounts:
    """Of what the engine's events tell and its own counters do not."""

    def __init__(self) -> None:
        self.ttft = Histogram(TTFT_S)
        self.queue = Histogram(REQUEST_S)
        self.prefill = Histogram(REQUEST_S)
        self.inter_token = Histogram(TOKEN_S)
        self.per_token = Histogram(TOKEN_S)
        self.step_tokens = Histogram(STEP_TOKENS)
        self.resume_ttft = Histogram(TTFT_S)
        self.prediction_error = Histogram(TOOL_S)
        self.prompt_tokens = 0
        self.interceptions: Counter[tuple[str, str]] = Counter()  # (tool, outcome)
        self.residency: Counter[str] = Counter()
        self.resumed_tokens: Counter[str] = Counter()  # by where the KV came from
        self.durations: dict[str, Histogram] = {}  # by tool
        self.resume_delay: dict[str, Histogram] = {}  # by residency

    def first_token(self, asked_at: float, scheduled_at: float | None, at: float, num_prompt: int) -> None:
        """A request's first token has come."""
        self.ttft.observe(at - asked_at)
        if scheduled_at is not None:
            self.queue.observe(scheduled_at - asked_at)
            self.prefill.observe(at - scheduled_at)
        self.prompt_tokens += num_prompt


class TurnCounts:
    """Of what clients asked for and got."""

    def __init__(self, max_model_len: int) -> None:
        self.latency = Histogram(REQUEST_S)
        self.prompt = Histogram(token_bounds(max_model_len))
        self.generation = Histogram(token_bounds(max_model_len))
        self.finished: Counter[str] = Counter(dict.fromkeys(("stop", "length", "tool_calls", "abort"), 0))
        self.refused: Counter[str] = Counter()  # by status
        self.tokens: Counter[str] = Counter(dict.fromkeys(("prompt", "cached", "completion", "returned"), 0))
        self.tool_calls: Counter[tuple[str, str]] = Counter()  # (tool, ok or error)
        self.tool_seconds: defaultdict[str, float] = defaultdict(float)


def gauge(name: str, text: str, value: float | Mapping[str, float], label: str = "") -> Metric:
    """One gauge, or one for each value of a label."""
    family = GaugeMetricFamily(name, text, labels=[label] if label else [])
    for key, each in value.items() if isinstance(value, Mapping) else [("", value)]:
        family.add_metric([key] if label else [], each)
    return family


def counter(name: str, text: str, value: float | Mapping[str, float], label: str = "") -> Metric:
    """One counter, or one for each value of a label; Prometheus appends _total to the name."""
    family = CounterMetricFamily(name, text, labels=[label] if label else [])
    for key, each in value.items() if isinstance(value, Mapping) else [("", value)]:
        family.add_metric([key] if label else [], each)
    return family


def pairs(name: str, text: str, values: Mapping[tuple[str, str], float], labels: tuple[str, str]) -> Metric:
    """A counter for each pair of two labels."""
    family = CounterMetricFamily(name, text, labels=list(labels))
    for key, each in values.items():
        family.add_metric(list(key), each)
    return family


def histogram(name: str, text: str, value: Histogram | Mapping[str, Histogram], label: str = "") -> Metric:
    """One histogram, or one for each value of a label."""
    family = HistogramMetricFamily(name, text, labels=[label] if label else [])
    for key, each in value.items() if isinstance(value, Mapping) else [("", value)]:
        family.add_metric([key] if label else [], each.cumulative(), each.total)
    return family


def engine_families(snapshot: Snapshot, counts: EngineCounts) -> Iterator[Metric]:
    """Names of vLLM where the meaning is the same, then ours."""
    yield from _shared_families(snapshot, counts)
    yield from _memory_families(snapshot)
    yield from _interception_families(snapshot, counts)
    figure = snapshot.figure
    yield gauge("jaxcept:engine_up", "1 while the device works, 0 once it has failed.", float(not snapshot.is_dead))
    yield counter("jaxcept:steps", "Steps that were submitted.", figure("steps"))
    yield counter("jaxcept:busy_seconds", "Seconds of steps in execution.", figure("busy_s"))
    kinds = {kind: figure(f"{kind}_tokens") for kind in ("decode", "prefill", "returned", "recomputed")}
    yield counter("jaxcept:computed_tokens", "Query tokens of steps, by why they were computed.", kinds, "kind")
    yield counter("jaxcept:stale_tokens", "Tokens drawn for sequences that had stopped.", figure("stale_tokens"))
    if "step_prediction_error" in snapshot.figures:
        text = "Median of |predicted - measured| / measured step seconds."
        yield gauge("jaxcept:step_prediction_error_ratio", text, figure("step_prediction_error"))


def _shared_families(snapshot: Snapshot, counts: EngineCounts) -> Iterator[Metric]:
    figure = snapshot.figure
    yield gauge("vllm:num_requests_running", "Sequences in the batch.", figure("num_running"))
    yield gauge("vllm:num_requests_waiting", "Sequences in the queue.", figure("num_waiting"))
    yield gauge("vllm:kv_cache_usage_perc", "Share of the device's KV blocks in use, 0 to 1.", snapshot.usage)
    yield counter("vllm:num_preemptions", "Preemptions.", figure("preemptions"))
    yield counter("vllm:prompt_tokens", "Tokens of prompts whose first token came.", counts.prompt_tokens)
    yield counter("vllm:generation_tokens", "Tokens generated.", figure("generated_tokens"))
    yield counter("vllm:prefix_cache_queries", "Tokens asked of the prefix cache.", figure("cache_query_tokens"))
    yield counter("vllm:prefix_cache_hits", "Tokens found in the prefix cache.", figure("cache_hit_tokens"))
    text = "Tokens guessed, where --speculative-config asks for it."
    yield counter("vllm:spec_decode_num_draft_tokens", text, figure("draft_tokens"))
    text = "Tokens guessed that were generated."
    yield counter("vllm:spec_decode_num_accepted_tokens", text, figure("accepted_draft_tokens"))
    yield histogram("vllm:time_to_first_token_seconds", "Arrival to the first token.", counts.ttft)
    text = "Between tokens of a run; the waits for tools are left out."
    yield histogram("vllm:inter_token_latency_seconds", text, counts.inter_token)
    text = "Mean between tokens of a request; the waits for tools are left out."
    yield histogram("vllm:request_time_per_output_token_seconds", text, counts.per_token)
    yield histogram("vllm:request_queue_time_seconds", "Arrival to the first step.", counts.queue)
    yield histogram("vllm:request_prefill_time_seconds", "First step to the first token.", counts.prefill)
    yield histogram("vllm:iteration_tokens_total", "Query tokens of a step.", counts.step_tokens)


def _memory_families(snapshot: Snapshot) -> Iterator[Metric]:
    figure, cached = snapshot.figure, snapshot.num_cached_blocks
    held = figure("held_blocks")
    states = {"held": held, "cached": cached, "free": snapshot.num_blocks - held - cached}
    yield gauge("jaxcept:kv_blocks", "KV blocks on the device, by state.", states, "state")
    held, cached = figure("held_host_blocks"), snapshot.num_cached_host_blocks
    states = {"held": held, "cached": cached, "free": snapshot.num_host_blocks - held - cached}
    yield gauge("jaxcept:host_blocks", "KV blocks in the host's memory, by state.", states, "state")
    yield gauge("jaxcept:block_bytes", "Bytes of a KV block.", snapshot.block_bytes)
    waste = {"held": figure("waste_held"), "recompute": figure("waste_recompute")}
    text = "Device memory held x seconds without use, by cause."
    yield counter("jaxcept:waste_byte_seconds", text, waste, "cause")
    moved = {
        (direction, "yes" if snapshot.hides_swaps else "no"): figure(f"swapped_{direction}_blocks")
        * snapshot.block_bytes
        for direction in ("out", "in")
    }
    text = "Bytes between device and host; hidden: steps go on computing meanwhile."
    yield pairs("jaxcept:swap_bytes", text, moved, ("direction", "hidden"))
    yield counter(
        "jaxcept:failed_swaps", "Blocks that a transfer lost, and that were recomputed.", figure("failed_swaps")
    )


def _interception_families(snapshot: Snapshot, counts: EngineCounts) -> Iterator[Metric]:
    yield gauge(
        "jaxcept:num_requests_intercepted", "Sequences that wait for a tool.", snapshot.figure("num_intercepted")
    )
    where = snapshot.residence
    blocks = {"device": where.device, "host": where.host, "dropped": where.dropped}
    text = "Blocks of the contexts of intercepted sequences, by where they are."
    yield gauge("jaxcept:intercepted_blocks", text, blocks, "residency")
    text = "Interceptions that are over, by tool and outcome."
    yield pairs("jaxcept:interceptions", text, counts.interceptions, ("tool", "outcome"))
    text = "Interceptions that are over, by where the context was at the end."
    yield counter("jaxcept:interception_residency", text, counts.residency, "residency")
    yield histogram("jaxcept:interception_seconds", "Trigger to answer, by tool.", counts.durations, "tool")
    text = "Answer to the step that takes the sequence in again, by where its context was."
    yield histogram("jaxcept:resume_delay_seconds", text, counts.resume_delay, "residency")
    yield histogram("jaxcept:resume_time_to_first_token_seconds", "Answer to the next token.", counts.resume_ttft)
    text = "Context tokens of resumed sequences, by where their KV came from."
    yield counter("jaxcept:resumed_tokens", text, counts.resumed_tokens, "source")
    text = "|predicted - measured| seconds of interceptions, as predicted when they began."
    yield histogram("jaxcept:interception_prediction_error_seconds", text, counts.prediction_error)


def turn_families(counts: TurnCounts) -> Iterator[Metric]:
    """What the server's clients saw."""
    text = "Completions sent whole, by finish reason."
    yield counter("vllm:request_success", text, counts.finished, "finished_reason")
    yield histogram("vllm:e2e_request_latency_seconds", "A request from its arrival to its end.", counts.latency)
    yield histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", counts.prompt)
    yield histogram("vllm:request_generation_tokens", "Tokens generated for a request.", counts.generation)
    yield counter("jaxcept:turn_tokens", "Tokens of requests, as usage tells them.", counts.tokens, "kind")
    yield counter("jaxcept:refused_requests", "Requests not taken, by HTTP status.", counts.refused, "status")
    text = "Calls that the server ran, by tool and outcome."
    yield pairs("jaxcept:tool_calls", text, counts.tool_calls, ("tool", "outcome"))
    yield counter("jaxcept:tool_call_seconds", "Seconds of calls that the server ran.", counts.tool_seconds, "tool")
