"""Where the context of an intercepted sequence lives while it waits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class InterceptedView(NamedTuple):
    """One intercepted sequence that holds blocks."""

    seq_id: int
    arrival: float  # seconds
    tool: str
    since: float  # when the interception began, seconds
    elapsed: float  # seconds since then
    num_tokens: int  # context tokens
    num_computed: int  # of them with KV in the blocks held
    num_blocks: int  # held
    num_exclusive_blocks: int  # held by this sequence alone: what giving up can free


class BatchView(NamedTuple):
    """The rest of the engine, at the start of a step."""

    now: float  # seconds
    block_size: int
    num_blocks: int
    num_available_blocks: int
    num_running: int
    running_tokens: int  # context tokens of the running sequences, with KV on the device
    num_waiting: int


class Placement(NamedTuple):
    """What becomes of one context: its first `keep` blocks stay, the rest is given up and recomputed on return."""

    keep: int


class Policy(Protocol):
    """Decides at the start of every step, for every intercepted sequence that holds blocks."""

    @property
    def name(self) -> str:
        """What users call it."""
        ...

    def place(self, intercepted: Sequence[InterceptedView], batch: BatchView) -> Sequence[Placement]:
        """One placement per view, in the same order. Memory pressure may later take more than the policy gave up."""
        ...


class Preserve:
    """Holds every context until its tool returns."""

    name = "preserve"

    def place(self, intercepted: Sequence[InterceptedView], batch: BatchView) -> Sequence[Placement]:
        """Keeps all."""
        return [Placement(view.num_blocks) for view in intercepted]


class Discard:
    """Gives every context up at once; it is recomputed when its tool returns."""

    name = "discard"

    def place(self, intercepted: Sequence[InterceptedView], batch: BatchView) -> Sequence[Placement]:
        """Keeps none."""
        return [Placement(0)] * len(intercepted)
