"""The contexts of sequences in blocks: growing, giving up, sharing, copy-on-write, the prefix cache."""

from __future__ import annotations

from jaxcept.scheduler.blocks import BlockPool
from jaxcept.scheduler.config import SchedulerConfig
from jaxcept.scheduler.host import HostMemory
from jaxcept.scheduler.plan import BlockMove, MoveKind
from jaxcept.scheduler.sequence import Sequence


class ContextMemory:
    """Owns the pool; the only one to change a sequence's block table and `num_computed` downwards."""

    def __init__(self, config: SchedulerConfig, second_tier: HostMemory | None = None) -> None:
        self.config = config
        self.second_tier = second_tier  # where what is left to the prefix cache is copied to as well
        self.pool = BlockPool(config.num_blocks)
        self.block_size = config.block_size
        self.moves: list[BlockMove] = []  # for the next plan

    def missing(self, seq: Sequence, num_tokens: int) -> int:
        """Blocks that the sequence lacks to hold the KV of its first num_tokens tokens."""
        num_blocks = self.config.blocks_for(num_tokens)
        loading = len(seq.load.blocks) if seq.load is not None and num_blocks > seq.host_start else 0
        return max(0, num_blocks - len(seq.blocks) - loading)

    def grow(self, seq: Sequence, num_tokens: int) -> tuple[int, ...]:
        """Appends the missing blocks, which must be available, and returns them."""
        grown = tuple(self.pool.allocate() for _ in range(self.missing(seq, num_tokens)))
        seq.blocks.extend(grown)
        return grown

    def num_exclusive(self, seq: Sequence) -> int:
        """Blocks that this sequence alone holds; counted again only where the table or any sharing changed."""
        state = (self.pool.sharing_version, len(seq.blocks))
        if seq.exclusive_state != state:
            seq.exclusive_state = state
            seq.num_exclusive = self.pool.num_exclusive(seq.blocks)
        return seq.num_exclusive

    def truncate(self, seq: Sequence, keep: int) -> None:
        """Gives up all but the first `keep` blocks. What is full of known tokens stays findable until evicted."""
        self.register(seq)
        blocks = seq.blocks
        if self.second_tier is not None:
            self._copy_to(self.second_tier, seq, keep)
        self.pool.release(blocks[keep:])
        del blocks[keep:]
        seq.max_computed = max(seq.max_computed, seq.num_computed)
        seq.num_computed = min(seq.num_computed, keep * self.block_size)
        seq.num_registered = min(seq.num_registered, keep)

    def _copy_to(self, host: HostMemory, seq: Sequence, first: int) -> None:
        for index in range(first, min(len(seq.blocks), seq.num_registered)):
            host_block = host.send(seq.blocks[index], seq.digest(index, self.block_size))
            if host_block is None:
                return
            host.pool.release([host_block])  # nobody holds it: it is cached there

    def register(self, seq: Sequence) -> None:
        """Makes the sequence's full, computed blocks of known tokens findable.

        Call it for tokens of earlier steps, or at the end of a step's planning: a block that this step computes must
        not be found by another chunk of the same step.
        """
        if not self.config.enable_prefix_caching:
            return
        full = min(seq.num_computed, len(seq.token_ids)) // self.block_size
        for index in range(seq.num_registered, full):
            self.pool.register(seq.blocks[index], seq.digest(index, self.block_size))
        seq.num_registered = max(seq.num_registered, full)

    def may_find(self, seq: Sequence) -> bool:
        """Whether the prefix cache may serve the sequence."""
        return self.config.enable_prefix_caching and not seq.family.needs_prompt_logprobs

    def find_cached(self, seq: Sequence) -> list[int]:
        """Blocks of the prefix cache that continue what the sequence holds; at least one token is left to compute."""
        if not self.may_find(seq):
            return []
        if seq.num_computed < len(seq.blocks) * self.block_size:
            return []  # its last block is partly filled already
        first, stop = len(seq.blocks), (len(seq.token_ids) - 1) // self.block_size
        if stop <= first:
            return []
        seq.digest(stop - 1, self.block_size)  # and with it all before
        return self.pool.find_run(seq.digests[first:stop])

    def adopt(self, seq: Sequence, blocks: list[int], num_computed: int) -> None:
        """Appends blocks that hold the KV of the sequence's tokens up to num_computed, and shares them."""
        for block in blocks:
            self.pool.share(block)
        seq.blocks.extend(blocks)
        seq.num_computed = num_computed
        seq.num_registered = num_computed // self.block_size

    def is_writable(self, seq: Sequence) -> bool:
        """Whether the sequence may write its next token without copying or forgetting the block it goes to."""
        index = seq.num_computed // self.block_size
        if index >= len(seq.blocks):
            return True
        block = seq.blocks[index]
        return self.pool.refs[block] == 1 and self.pool.digest(block) is None

    def copies_to_write(self, seq: Sequence) -> int:
        """Blocks that `make_writable` will take: 1 where the block of the next token has another holder."""
        index = seq.num_computed // self.block_size
        return int(index < len(seq.blocks) and self.pool.refs[seq.blocks[index]] > 1)

    def make_writable(self, seq: Sequence) -> None:
        """Copy-on-write of the block that the next token goes to; a block of its own is only forgotten."""
        if self.is_writable(seq):
            return
        index = seq.num_computed // self.block_size
        block = seq.blocks[index]
        if self.pool.refs[block] > 1:
            seq.blocks[index] = self.pool.allocate()
            self.moves.append(BlockMove(MoveKind.COPY, block, seq.blocks[index]))
            self.pool.release([block])
        else:
            self.pool.forget(block)
        seq.num_registered = min(seq.num_registered, index)
