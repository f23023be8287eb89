"""Sequences as a queue order sees them, and their ranks."""

from __future__ import annotations

from jaxcept.scheduler.orders import QueueOrder, QueueView
from jaxcept.scheduler.policy import BatchView
from jaxcept.scheduler.sequence import Sequence


class OrderRanking:
    """Asks a queue order for the rank of a sequence, with the batch as it was at the last step."""

    def __init__(self, order: QueueOrder, block_size: int) -> None:
        self.order = order
        self.batch = BatchView(
            now=0.0,
            block_size=block_size,
            num_blocks=0,
            num_available_blocks=0,
            num_available_host_blocks=0,
            num_running=0,
            running_tokens=0,
            num_waiting=0,
            waiting_tokens=0,
            query_tokens=0,
        )
        self.preempts = order.preempts
        self.starvation_s = None if order.is_arrival else order.starvation_s
        self._size = block_size

    def rank(self, seq: Sequence) -> float:
        """Less is served earlier."""
        return 0.0 if self.order.is_arrival else self.order.rank(self.view(seq), self.batch)

    def view(self, seq: Sequence) -> QueueView:
        """The sequence, waiting or running."""
        params, last = seq.request.params, seq.interceptions[-1] if seq.interceptions else None
        returned = seq.opened.num_returned if seq.opened is not None else 0
        on_host = max(0, seq.host_tokens - seq.host_start * self._size)
        tool = seq.opened.tool if seq.opened is not None else last.tool if last is not None else None
        return QueueView(
            seq_id=seq.seq_id,
            arrival=seq.arrival,
            queued_at=seq.queued_at,
            num_tokens=len(seq.token_ids),
            num_uncomputed=max(0, len(seq.token_ids) - seq.num_computed - on_host),
            num_host_tokens=on_host,
            num_generated=seq.num_output,
            num_returned=returned,
            is_returned=seq.opened is not None,
            served_tokens=max(seq.max_computed, seq.num_computed),
            max_tokens_left=None if params.max_tokens is None else params.max_tokens - seq.num_output,
            tool=tool,
        )
