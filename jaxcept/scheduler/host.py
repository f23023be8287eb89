"""The host's side of the KV cache: which host block holds what, and whether its content has arrived."""

from __future__ import annotations

from jaxcept.scheduler.blocks import BlockPool


class HostMemory:
    """Host blocks, counted and found like those of the device; content arrives some steps after it was sent.

    Full blocks of known tokens are registered under their digests, so that a block that several contexts share, or
    that one context sends out twice, crosses the link once.
    """

    def __init__(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self._sent_in = [0] * num_blocks  # the step that sends or sent the content
        self._outs: dict[int, int] = {}  # host block → device block, for the next plan
        self.arrived_before = 0  # whatever earlier steps than this one sent has arrived
        self.next_step_id = 0

    def send(self, device_block: int, digest: bytes | None) -> int | None:
        """A host block, held by the caller, for the content of a device block; None where the host is full.

        The content is on its way with the next plan, or there already under the same digest.
        """
        if digest is not None:
            found = self.pool.find(digest)
            if found is not None:
                self.pool.share(found)
                return found
        if not self.pool.num_available:
            return None
        host_block = self.pool.allocate()
        self._outs[host_block] = device_block
        self._sent_in[host_block] = self.next_step_id
        if digest is not None:
            self.pool.register(host_block, digest)
        return host_block

    @property
    def is_empty(self) -> bool:
        """Whether no block holds anything, cached ones included."""
        return self.pool.num_held == 0 and self.pool.num_cached == 0

    @property
    def num_unsent(self) -> int:
        """Blocks that the next plan will send."""
        return len(self._outs)

    def take_outs(self) -> list[tuple[int, int]]:
        """(device block, host block) of everything to send; they are the next plan's from here on."""
        outs = [(device_block, host_block) for host_block, device_block in self._outs.items()]
        self._outs.clear()
        return outs

    def has_arrived(self, host_block: int) -> bool:
        """Whether the content is on the host."""
        return self._sent_in[host_block] < self.arrived_before

    def is_sent_by(self, host_block: int, step_id: int) -> bool:
        """Whether the block waits for, or has, what this step sent."""
        return self._sent_in[host_block] == step_id

    def spoil(self, host_block: int) -> None:
        """The content is not what it should be: nobody will find it any more."""
        self.pool.spoil(host_block)
