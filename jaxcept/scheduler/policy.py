"""Where the context of an intercepted sequence lives while it waits: what a policy sees, and what it decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import inf
from typing import NamedTuple, Protocol

from jaxcept.scheduler.interception import Interception


class InterceptedView(NamedTuple):
    """One intercepted sequence that holds blocks on the device."""

    seq_id: int
    arrival: float  # seconds
    tool: str
    since: float  # when the interception began, seconds
    elapsed: float  # seconds since then
    remaining_s: float  # estimate of the seconds until the tool returns
    num_tokens: int  # context tokens
    num_computed: int  # of them with KV in the blocks held
    num_blocks: int  # held on the device
    num_exclusive_blocks: int  # held by this sequence alone: what giving up can free
    num_host_blocks: int  # of its context on the host


class BatchView(NamedTuple):
    """The rest of the engine, at the start of a step."""

    now: float  # seconds
    block_size: int
    num_blocks: int
    num_available_blocks: int
    num_available_host_blocks: int
    num_running: int
    running_tokens: int  # context tokens of the running sequences, with KV on the device
    num_waiting: int
    waiting_tokens: int  # known tokens of the waiting sequences that are still to be computed
    query_tokens: int  # that the step is expected to compute
    swap_budget: int | None = None  # blocks that may still be moved in this step; None: no limit


class Placement(NamedTuple):
    """What becomes of one context of num_blocks blocks on the device.

    Its last `swap` blocks go to the host; what the swap budget or the host's memory does not reach stays where it is.
    Of the others the first `keep` stay, and what lies between is given up and recomputed on return.
    keep + swap <= num_blocks.
    """

    keep: int
    swap: int = 0


class HostUse(StrEnum):
    """What the host's memory is for."""

    NONE = "none"
    CONTEXTS = "contexts"  # intercepted contexts that the policy swaps out
    CACHE = "cache"  # a second tier of the prefix cache: what is released to the cache is copied to the host too


@dataclass(frozen=True, slots=True)
class Traits:
    """What is fixed about a policy, for the scheduler to obey. Defaults are those of min-waste."""

    host: HostUse = HostUse.CONTEXTS
    prefix_caching: bool = True  # False: never, whatever the configuration says
    head_start_s: float = inf  # a return queues by its original arrival, but as if that had been so long ago at most
    recompute_tokens: int | None = None  # most query tokens of a step that recomputes or takes returned tokens in
    swaps_partial_blocks: bool = True  # False: a block that is partly filled is recomputed where full ones are cached
    waits_for_swaps: bool = False  # the device stands still while blocks move
    reconsiders: bool = True  # False: a context is placed once, when its interception begins


class Policy(Protocol):
    """Decides at the start of every step, for every intercepted sequence that holds blocks on the device.

    One that does not reconsider is asked for those alone that were intercepted since it was asked last.
    """

    @property
    def name(self) -> str:
        """What users call it."""
        ...

    @property
    def traits(self) -> Traits:
        """What is fixed about it."""
        ...

    def swap_budget(self, batch: BatchView) -> int | None:
        """Most blocks that may be moved in this step, both directions together; None: no limit."""
        ...

    def place(self, intercepted: Sequence[InterceptedView], batch: BatchView) -> Sequence[Placement]:
        """One placement per view, in the same order; earlier views are swapped first.

        Memory pressure may later take more than the policy gave up.
        """
        ...

    def learn(self, record: Interception) -> None:
        """An interception is over and its sequence goes on: how long it took, and what it cost."""
        ...

    def next_change(self, now: float) -> float | None:
        """When the policy wants to be asked again though nothing else happens, seconds; None: never."""
        ...
