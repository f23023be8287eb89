"""One run in numbers: latency, throughput, waste, and where the time went."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

from jaxcept.metrics import Waste
from jaxcept.scheduler.counters import Counters
from jaxcept.simulator.replay import Outcome, Record
from jaxcept.simulator.runner import DeviceUse


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Of one quantity over a run; all 0 where there is none."""

    mean: float = 0.0
    p50: float = 0.0
    p90: float = 0.0
    p99: float = 0.0
    max: float = 0.0

    @classmethod
    def of(cls, values: Sequence[float]) -> Quantiles:
        """Quantiles by the nearest rank."""
        if not values:
            return cls()
        ordered = sorted(values)

        def rank(share: float) -> float:
            return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

        return cls(sum(ordered) / len(ordered), rank(0.5), rank(0.9), rank(0.99), ordered[-1])


@dataclass(frozen=True, slots=True)
class Slo:
    """What a request must keep to, to count as goodput. Seconds."""

    ttft_s: float = 2.0
    normalized_latency_s: float = 0.1  # per generated token


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What was run."""

    policy: str
    order: str
    estimator: str
    workload: str
    rate: float  # requests per second
    num_requests: int
    seed: int
    deployment: str  # MODEL@DEVICE, or the folder of a model
    is_simulated: bool
    num_blocks: int
    block_size: int
    block_bytes: int
    num_host_blocks: int = 0
    max_num_seqs: int = 0
    max_num_batched_tokens: int = 0
    max_model_len: int = 0
    time_scale: float = 1.0
    length_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class WasteShares:
    """Device memory held × time without use, in byte-seconds, and of the pool's bytes × the time."""

    held: float  # contexts of intercepted sequences
    recompute: float  # memory in use during the share of steps that computed tokens again
    stalled: float  # memory held while the device stood still for a swap
    held_share: float
    recompute_share: float
    stalled_share: float

    @property
    def total(self) -> float:
        """Byte-seconds of all causes."""
        return self.held + self.recompute + self.stalled

    @property
    def total_share(self) -> float:
        """Share of the pool's bytes × the time."""
        return self.held_share + self.recompute_share + self.stalled_share


@dataclass(frozen=True, slots=True)
class SwapUse:
    """What crossed the link, both directions."""

    out_bytes: int = 0
    in_bytes: int = 0
    seconds: float = 0.0  # that a direction of the link was busy, added up
    hidden_share: float = 0.0  # of these seconds, while the device computed
    waited_s: float = 0.0  # the device stood still for a swap


@dataclass(frozen=True, slots=True)
class Report:
    """One run. Two runs of one seed are equal, but for `wall_s`."""

    info: RunInfo
    num_finished: int
    num_clipped: int  # ended by the model's or the pool's limit, short of what the workload asked for
    makespan_s: float  # from the start to the end of the last request
    busy_s: float  # steps in execution
    steps: int
    normalized_latency: Quantiles  # (end to end - tools) / generated tokens, seconds
    ttft: Quantiles
    queue_after_return: Quantiles  # from a tool's return to the step that takes the sequence in
    token_after_return: Quantiles  # from a tool's return to the next generated token
    completed_rps: float  # over the makespan
    window_rps: float  # finished before the last arrival, over the time until then
    goodput_rps: float  # of requests within the SLO, over the makespan
    slo: Slo
    waste: WasteShares
    window_waste: WasteShares  # up to the last arrival: what follows is an emptying machine
    compute_s: Mapping[str, float]  # by cause: decode, prefill, returned, recompute
    recompute_share: float  # of the forward seconds, by tokens
    recompute_token_share: float  # of the computed tokens
    tokens: Mapping[str, int]
    cache_hit_share: float  # of the tokens asked of the prefix cache
    swap: SwapUse
    preemptions: int
    estimator_mae_s: float  # mean absolute error of the estimate of the remaining seconds, over interceptions and time
    estimator_relative_error: float  # the same over the mean of what remained
    estimator_bias_s: float  # mean of estimate - truth
    wall_s: float = field(default=0.0, compare=False)  # that the run took here

    def to_dict(self) -> dict[str, Any]:
        """Plain values, nested as the fields are."""
        return asdict(self)

    def to_json(self) -> str:
        """With two spaces of indent."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """What `to_dict` gave."""
        nested = {
            "info": RunInfo,
            "normalized_latency": Quantiles,
            "ttft": Quantiles,
            "queue_after_return": Quantiles,
            "token_after_return": Quantiles,
            "slo": Slo,
            "waste": WasteShares,
            "window_waste": WasteShares,
            "swap": SwapUse,
        }
        unknown = set(data) - {each.name for each in fields(cls)}
        if unknown:
            raise ValueError(f"a report with unknown fields: {', '.join(sorted(unknown))}")
        return cls(**{name: nested[name](**value) if name in nested else value for name, value in data.items()})


class SwapSeconds(NamedTuple):
    """Seconds of the links; of them, those behind which the device computed; those for which it stood still."""

    busy_s: float
    hidden_s: float
    waited_s: float


def make_report(
    info: RunInfo,
    record: Record,
    counters: Counters,
    waste: Waste,
    busy_s: float,
    use: DeviceUse | None,
    slo: Slo,
    start: float,
    last_arrival: float,
    wanted: Sequence[int],
    wall_s: float,
    swaps: SwapSeconds | None = None,
) -> Report:
    """Puts a run into numbers.

    `wanted`: tokens that each job was to generate. `use` is what a simulated device counted; without one, seconds by
    cause are the busy seconds shared out by tokens. `swaps` is what a
    real device's swaps took. `start` and `last_arrival` in seconds of the engine's clock.
    """
    outcomes = record.outcomes
    makespan = max((outcome.finished_at for outcome in outcomes), default=start) - start
    latencies = [normalized(outcome) for outcome in outcomes]
    ttfts = [_ttft(outcome) for outcome in outcomes]
    good = [_is_good(outcome, slo) for outcome in outcomes]
    early = sum(1 for outcome in outcomes if outcome.finished_at <= last_arrival)
    tokens = {
        "decode": counters.decode_tokens,
        "prefill": counters.prefill_tokens,
        "returned": counters.returned_tokens,
        "recompute": counters.recomputed_tokens,
    }
    num_tokens = sum(tokens.values())
    compute_s = _compute_s(tokens, busy_s, use)
    forward_s = sum(compute_s.values())
    error = record.estimator
    return Report(
        info=info,
        num_finished=len(outcomes),
        num_clipped=sum(1 for outcome in outcomes if outcome.num_generated < wanted[outcome.number]),
        makespan_s=makespan,
        busy_s=busy_s,
        steps=counters.steps,
        normalized_latency=Quantiles.of([value for value in latencies if value is not None]),
        ttft=Quantiles.of([value for value in ttfts if value is not None]),
        queue_after_return=Quantiles.of(record.queued_s),
        token_after_return=Quantiles.of(record.first_token_s),
        completed_rps=_over(len(outcomes), makespan),
        window_rps=_over(early, last_arrival - start),
        goodput_rps=_over(sum(good), makespan),
        slo=slo,
        waste=_waste(info, waste, record.stalled_block_s, makespan),
        window_waste=_waste(
            info, record.window_waste or Waste(0.0, 0.0), record.window_stalled_block_s, last_arrival - start
        ),
        compute_s=compute_s,
        recompute_share=_over(compute_s["recompute"], forward_s),
        recompute_token_share=_over(counters.recomputed_tokens, num_tokens),
        tokens={**tokens, "generated": counters.generated_tokens, "stale": counters.stale_tokens},
        cache_hit_share=_over(counters.cache_hit_tokens, counters.cache_query_tokens),
        swap=_swap(info, counters, swaps if use is None else _swap_seconds(use)),
        preemptions=counters.preemptions,
        estimator_mae_s=_over(error.absolute_s, error.num_samples),
        estimator_relative_error=_over(error.absolute_s, error.actual_s),
        estimator_bias_s=_over(error.signed_s, error.num_samples),
        wall_s=wall_s,
    )


def normalized(outcome: Outcome) -> float | None:
    """Normalized latency of a request; what tools took is known from the workload."""
    if not outcome.num_generated:
        return None
    return (outcome.finished_at - outcome.arrival - outcome.tool_s) / outcome.num_generated


def _ttft(outcome: Outcome) -> float | None:
    return None if outcome.first_token_at is None else outcome.first_token_at - outcome.arrival


def _is_good(outcome: Outcome, slo: Slo) -> bool:
    latency, ttft = normalized(outcome), _ttft(outcome)
    return latency is not None and ttft is not None and latency <= slo.normalized_latency_s and ttft <= slo.ttft_s


def _over(value: float, base: float) -> float:
    return value / base if base else 0.0


def _compute_s(tokens: Mapping[str, int], busy_s: float, use: DeviceUse | None) -> dict[str, float]:
    if use is None:
        num_tokens = sum(tokens.values())
        return {cause: _over(busy_s * count, num_tokens) for cause, count in tokens.items()}
    return {
        "decode": use.decode_s,
        "prefill": use.prefill_s,
        "returned": use.returned_s,
        "recompute": use.recompute_s,
    }


def _waste(info: RunInfo, waste: Waste, stalled_block_s: float, seconds: float) -> WasteShares:
    stalled = stalled_block_s * info.block_bytes
    whole = info.block_bytes * info.num_blocks * seconds
    return WasteShares(
        waste.held,
        waste.recompute,
        stalled,
        _over(waste.held, whole),
        _over(waste.recompute, whole),
        _over(stalled, whole),
    )


def _swap_seconds(use: DeviceUse) -> SwapSeconds:
    return SwapSeconds(use.swap_s, use.hidden_s, use.stall_s + use.swap_wait_s)


def _swap(info: RunInfo, counters: Counters, seconds: SwapSeconds | None) -> SwapUse:
    out_bytes = counters.swapped_out_blocks * info.block_bytes
    in_bytes = counters.swapped_in_blocks * info.block_bytes
    if seconds is None:
        return SwapUse(out_bytes, in_bytes)
    return SwapUse(out_bytes, in_bytes, seconds.busy_s, _over(seconds.hidden_s, seconds.busy_s), seconds.waited_s)
