"""Running totals of what a scheduler has planned."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxcept.scheduler.events import FinishReason


@dataclass(slots=True)
class Counters:
    """Totals since the start. Token counts are query tokens of submitted steps, by why they were computed."""

    steps: int = 0
    decode_tokens: int = 0
    prefill_tokens: int = 0
    returned_tokens: int = 0  # computed for the first time, after the prompt
    recomputed_tokens: int = 0
    stale_tokens: int = 0  # drawn for a sequence that had ended or was intercepted meanwhile
    generated_tokens: int = 0
    rejected_tokens: int = 0  # drawn before the mask that forbids them was known, and drawn again
    draft_tokens: int = 0  # guessed
    accepted_draft_tokens: int = 0  # and drawn
    preemptions: int = 0
    interceptions: int = 0
    swapped_out_blocks: int = 0
    swapped_in_blocks: int = 0
    failed_swaps: int = 0  # blocks that a transfer lost or damaged, and that were recomputed
    cache_query_tokens: int = 0
    cache_hit_tokens: int = 0
    finished: dict[FinishReason, int] = field(default_factory=dict)

    def finish(self, reason: FinishReason) -> None:
        """One more finished sequence."""
        self.finished[reason] = self.finished.get(reason, 0) + 1
