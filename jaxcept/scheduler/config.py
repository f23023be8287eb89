"""The limits that a scheduler keeps to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Sizes of the pool and of a step. A ValueError names the field that is wrong.

    `watermark` is the share of the pool that admission leaves free for running sequences to grow into, so that what
    is admitted is not preempted at once; it does not bind while nothing runs. `return_head_start_s`: a sequence that
    returns queues by its original arrival, but as if that had been so long ago at most; None is what the policy says.
    Policies whose returns queue as new requests are left as they are.
    """

    num_blocks: int
    block_size: int = 16
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512  # the token budget of a step
    max_model_len: int = 2048
    vocab_size: int | None = None  # where given, ids outside the vocabulary are refused
    enable_prefix_caching: bool = True
    watermark: float = 0.01
    num_host_blocks: int = 0  # of the host pool, where intercepted contexts and evicted blocks may go
    return_head_start_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("num_blocks", "block_size", "max_num_seqs", "max_num_batched_tokens", "max_model_len"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r}: expected an integer of 1 or more")
        hosted = self.num_host_blocks
        if not isinstance(hosted, int) or isinstance(hosted, bool) or hosted < 0:
            raise ValueError(f"num_host_blocks={hosted!r}: expected an integer of 0 or more")
        if self.max_model_len < 2:
            raise ValueError(f"max_model_len={self.max_model_len}: expected room for a prompt and one more token")
        head_start = self.return_head_start_s
        if head_start is not None and not head_start >= 0:
            raise ValueError(f"return_head_start_s={head_start!r}: expected seconds, 0 or more, or None")
        if not 0 <= self.watermark < 1:
            raise ValueError(f"watermark={self.watermark!r}: expected a share of the pool, 0 to below 1")

    @property
    def max_len(self) -> int:
        """Most tokens that a sequence may have: the model's limit, or what the pool holds if that is less."""
        return min(self.max_model_len, self.num_blocks * self.block_size)

    @property
    def watermark_blocks(self) -> int:
        """Blocks that admission leaves free."""
        return int(self.watermark * self.num_blocks)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold the KV of this many tokens."""
        return -(-num_tokens // self.block_size)
