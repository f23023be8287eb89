"""The engine's state for one stream of tokens."""

from __future__ import annotations

import sys
from collections import deque
from enum import StrEnum

from jaxcept.scheduler.interception import Interception, OpenInterception
from jaxcept.scheduler.lookup import Lookup
from jaxcept.scheduler.params import ScriptedTrigger
from jaxcept.scheduler.plan import TokenLogprobs
from jaxcept.scheduler.prefix import block_digest, root_digest
from jaxcept.scheduler.request import Request
from jaxcept.scheduler.watcher import Watcher


class SeqState(StrEnum):
    """WAITING for blocks and a row, RUNNING with both, INTERCEPTED until a tool answers, or FINISHED."""

    WAITING = "waiting"
    RUNNING = "running"
    INTERCEPTED = "intercepted"
    FINISHED = "finished"


class Family:
    """A request and its n sequences, which share the prompt's blocks."""

    __slots__ = ("prompt_logprobs", "prompt_logprobs_sent", "request", "root", "sequences")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.root = root_digest(request.cache_salt)
        self.sequences: list[Sequence] = []  # the unfinished ones
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs_sent = request.params.prompt_logprobs is None

    def make_watcher(self, index: int) -> Watcher | None:
        """What reads the tokens of the completion at this index; raises what the request's function raises."""
        return self.request.watcher(index) if self.request.watcher is not None else None

    @property
    def needs_prompt_logprobs(self) -> bool:
        """Whether prompt positions must still be computed for the sake of their log-probabilities."""
        return not self.prompt_logprobs_sent


class Load:
    """The way back of a context's host part: a device block for each of its blocks, and how far the copies are."""

    __slots__ = ("blocks", "num_arrived", "num_landed", "num_requested", "requests")

    def __init__(self, blocks: list[int]) -> None:
        self.blocks = blocks
        self.num_requested = 0
        self.num_arrived = 0
        self.num_landed = 0
        self.requests: deque[tuple[int, int]] = deque()  # (step that asks, num_requested after it)

    def arrive(self, through: int) -> None:
        """What steps up to this one asked for has arrived."""
        while self.requests and self.requests[0][0] <= through:
            self.num_arrived = min(self.requests.popleft()[1], len(self.blocks))

    def cut(self, keep: int) -> None:
        """Nothing comes for any but the first `keep` blocks."""
        del self.blocks[keep:]
        self.num_requested = min(self.num_requested, keep)
        self.num_arrived = min(self.num_arrived, keep)
        self.num_landed = min(self.num_landed, keep)

    @property
    def is_landed(self) -> bool:
        """Whether everything is in its block."""
        return self.num_landed == len(self.blocks)


class Sequence:
    """One completion. The scheduler alone changes it.

    `token_ids` are the ids known on the host; `num_pending` more are drawn by submitted steps and not collected.
    `num_computed` counts the tokens whose KV is in `blocks`, or will be once the submitted steps ran. While the
    sequence decodes, num_computed + 1 == len(token_ids) + num_pending.

    `host` are the host blocks that hold the KV of the tokens host_start * block_size .. host_tokens - 1: the tail of a
    context that was swapped out. While it comes back, `load` says how far it is.
    """

    __slots__ = (
        "arrival",
        "asked_at",
        "attention",
        "blocks",
        "chunk_start",
        "chunk_step",
        "digests",
        "exclusive_state",
        "family",
        "first_scheduled_at",
        "first_token_at",
        "host",
        "host_start",
        "host_tokens",
        "index",
        "interceptions",
        "is_decoding",
        "is_known_only",
        "is_open",
        "is_overdue",
        "key",
        "last_position",
        "load",
        "lookup",
        "mask",
        "max_computed",
        "num_cached",
        "num_computed",
        "num_exclusive",
        "num_foreign",
        "num_pending",
        "num_preemptions",
        "num_prompt",
        "num_registered",
        "num_returned",
        "opened",
        "queue_key",
        "queued_at",
        "rejected_at",
        "request",
        "row",
        "script_len",
        "seed",
        "seq_id",
        "span_start",
        "spans",
        "special_ids",
        "state",
        "stop_ids",
        "stop_len",
        "token_ids",
        "watcher",
    )

    def __init__(self, seq_id: int, index: int, family: Family, arrival: float, max_len: int) -> None:
        self.seq_id = seq_id
        self.index = index
        self.arrival = arrival
        self.key = (family.request.rank(arrival), seq_id)
        self.queue_key: tuple[float, float, int] = (0.0, *self.key)  # (rank, *key): its place among the waiting
        self.queued_at = arrival
        self.is_overdue = False  # it has waited so long once that its rank counts no more
        self.state = SeqState.WAITING
        self.row: int | None = None
        self.is_decoding = False
        self.num_pending = 0
        self.is_known_only = False  # the token drawn last is known on the host, and not to the device

        self.blocks: list[int] = []
        self.num_computed = 0
        self.max_computed = 0  # tokens whose KV was computed at some time
        self.digests: list[bytes] = []  # of the full blocks, as far as they were needed
        self.num_registered = 0  # blocks whose content the prefix cache was told of
        self.host: list[int] = []
        self.host_start = 0  # index in the block table of the first of them
        self.host_tokens = 0
        self.load: Load | None = None
        self.exclusive_state = (-1, 0)  # for which num_exclusive was counted
        self.num_exclusive = 0
        self.chunk_step = -1  # the last step that computed a chunk of this sequence
        self.chunk_start = 0  # num_computed before it, 0 if it is the first one since the sequence took its row

        self.mask: bytes | None = None  # of the token that follows token_ids, as its watcher says

        self.opened: OpenInterception | None = None
        self.attention = 0
        self.serve(family, family.make_watcher(index), arrival, max_len)

    def serve(self, family: Family, watcher: Watcher | None, asked_at: float, max_len: int) -> None:
        """Takes what belongs to the request, of which nothing is generated yet: at the start, and where a later request
        goes on with the context of an earlier one."""
        request = family.request
        self.family = family
        self.request = request
        self.asked_at = asked_at
        self.seed = request.seed(self.index)
        self.watcher = watcher
        self.stop_ids = frozenset(request.stop_token_ids)
        self.special_ids = self.stop_ids | frozenset(request.intercept.token_ids)
        self.token_ids = list(request.prompt_ids)
        self.num_prompt = len(self.token_ids)
        self.num_returned = 0
        self.lookup: Lookup | None = None
        self.rejected_at = -1  # len(token_ids) where a token was rejected last
        self.is_open = request.is_open  # more is to come before it generates
        self.num_foreign = int(self.opened is not None)  # interceptions that no trigger of the request began
        self.spans: list[tuple[int, int]] = []  # runs of generated tokens, up to the last return
        self.span_start = self.num_prompt  # where the current run begins
        self.interceptions: list[Interception] = []
        self.num_cached = 0
        self.num_preemptions = 0
        self.first_scheduled_at: float | None = None
        self.first_token_at: float | None = None
        self.rearm(max_len)

    def rearm(self, max_len: int) -> None:
        """Sets the lengths at which generation surely stops; called at the start and after each return.

        `stop_len` is the number of tokens at which the scheduler looks at the sequence. The token at `last_position` is
        the last one that is ever computed before that.
        """
        limit = self.request.params.max_tokens
        stop_len = max_len
        if limit is not None:
            stop_len = min(stop_len, len(self.token_ids) + limit - self.num_output)
        self.script_len = sys.maxsize
        trigger = self.next_script
        if trigger is not None:
            self.script_len = len(self.token_ids) + trigger.after_tokens
        self.stop_len = len(self.token_ids) + 1 if self.is_open else min(stop_len, self.script_len)
        self.last_position = self.stop_len - 1

    @property
    def next_script(self) -> ScriptedTrigger | None:
        """The scripted trigger that is armed."""
        script = self.request.intercept.script
        count = self.num_interceptions - self.num_foreign
        return script[count] if count < len(script) else None

    @property
    def num_interceptions(self) -> int:
        """Interceptions so far, the open one included."""
        return len(self.interceptions) + (self.opened is not None)

    @property
    def num_output(self) -> int:
        """Tokens that the model generated, as far as known."""
        return len(self.token_ids) - self.num_prompt - self.num_returned

    @property
    def is_exhausted(self) -> bool:
        """Whether max_tokens leaves nothing to generate."""
        limit = self.request.params.max_tokens
        return limit is not None and self.num_output >= limit

    @property
    def output_spans(self) -> tuple[tuple[int, int], ...]:
        """[start, stop) ranges of token_ids that the model generated."""
        start, stop = self.span_start, len(self.token_ids)
        return (*self.spans, (start, stop)) if start < stop else tuple(self.spans)

    def append_returned(self, token_ids: tuple[int, ...]) -> None:
        """Closes the run of generated tokens and appends ids that a tool returned."""
        start, stop = self.span_start, len(self.token_ids)
        if start < stop:
            self.spans.append((start, stop))
        self.token_ids.extend(token_ids)
        self.num_returned += len(token_ids)
        self.span_start = len(self.token_ids)

    def settled(self, step_id: int) -> int:
        """Tokens whose KV is in place before step_id runs."""
        return self.chunk_start if self.chunk_step == step_id else self.num_computed

    def digest(self, index: int, block_size: int) -> bytes:
        """The digest of the block at this index of the table; its tokens must be known."""
        digests = self.digests
        while len(digests) <= index:
            start = len(digests) * block_size
            parent = digests[-1] if digests else self.family.root
            block = self.token_ids[start : start + block_size]
            assert len(block) == block_size, f"sequence {self.seq_id}: block {len(digests)} is not full yet"
            digests.append(block_digest(parent, block))
        return digests[index]
