"""The ledger of waste, and what the words for latency mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from jaxcept.scheduler.counters import Counters
from jaxcept.scheduler.events import Timing


def time_to_first_token(timing: Timing) -> float | None:
    """TTFT: seconds from arrival to the first generated token; None where there was none."""
    return None if timing.first_token_at is None else timing.first_token_at - timing.arrival


def time_per_output_token(timing: Timing, num_generated: int) -> float | None:
    """TPOT: mean seconds between generated tokens, interceptions not counted; None below two tokens."""
    if timing.first_token_at is None or num_generated < 2:
        return None
    return (timing.finished_at - timing.first_token_at - timing.intercepted_s) / (num_generated - 1)


def normalized_latency(timing: Timing, num_generated: int) -> float | None:
    """Seconds per generated token, end to end, interceptions not counted (InferCept, arXiv 2402.01869, section 5)."""
    if num_generated < 1:
        return None
    return (timing.finished_at - timing.arrival - timing.intercepted_s) / num_generated


def median_normalized_latency(latencies: Sequence[float]) -> float:
    """The paper's figure for a run: the median over its requests."""
    return median(latencies)


@dataclass(frozen=True, slots=True)
class Waste:
    """Device memory held × time without use, byte-seconds."""

    held: float  # contexts of intercepted sequences
    recompute: float  # memory of the batch during the share of a step that computed tokens again

    @property
    def total(self) -> float:
        """Byte-seconds of both causes."""
        return self.held + self.recompute


class Ledger:
    """Adds up waste over a run. `block_bytes` are the bytes of KV cache of one block.

    What an intercepted sequence alone holds is wasted for as long as it is held. A step that spends a share of its
    tokens on recomputation wastes, for that share of its time, all memory that the other sequences hold: the discard
    terms of InferCept, T_fwd(C)·C·M + T_fwd(C)·C_other·M, as they happen.
    """

    def __init__(self, block_bytes: int) -> None:
        if block_bytes < 1:
            raise ValueError(f"block_bytes={block_bytes}: expected the bytes of one KV block")
        self.block_bytes = block_bytes
        self.busy_s = 0.0  # steps in execution
        self._held = 0.0
        self._recompute = 0.0
        self._since: float | None = None
        self._idle_blocks = 0
        self._blocks_in_use = 0

    def observe(self, now: float, num_held_blocks: int, num_idle_blocks: int) -> None:
        """The pool as it is from `now` on; what it was before is charged until `now`."""
        if self._since is not None:
            self._held += self._idle_blocks * self.block_bytes * (now - self._since)
        self._since = now
        self._idle_blocks = num_idle_blocks
        self._blocks_in_use = num_held_blocks - num_idle_blocks

    def charge_step(self, seconds: float, num_tokens: int, num_recomputed: int) -> None:
        """A step took this long on the device for this many tokens."""
        self.busy_s += seconds
        if num_recomputed:
            self._recompute += seconds * num_recomputed / num_tokens * self._blocks_in_use * self.block_bytes

    @property
    def waste(self) -> Waste:
        """So far."""
        return Waste(self._held, self._recompute)


def recompute_share(counters: Counters) -> float:
    """Share of all computed tokens that were computed before."""
    total = counters.decode_tokens + counters.prefill_tokens + counters.returned_tokens + counters.recomputed_tokens
    return counters.recomputed_tokens / total if total else 0.0
