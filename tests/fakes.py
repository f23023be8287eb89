"""A runner and a world that one can check by hand.

The fake device keeps one token id per KV slot. The next token of a sequence is a weighted sum of the ids that it reads
back through its row's block table, so a wrong table, a missing copy or a block that somebody else wrote into changes
tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

from jaxcept.clock import VirtualClock
from jaxcept.engine import Engine
from jaxcept.metrics import Ledger
from jaxcept.scheduler.config import SchedulerConfig
from jaxcept.scheduler.events import Event
from jaxcept.scheduler.params import InterceptParams, SamplingParams, ScriptedTrigger
from jaxcept.scheduler.plan import BlockMove, FailedMove, MoveKind, StepPlan, StepResult, TokenLogprobs
from jaxcept.scheduler.policies.preserve import Preserve
from jaxcept.scheduler.policy import Policy
from jaxcept.scheduler.request import Request
from jaxcept.scheduler.scheduler import Scheduler
from jaxcept.scheduler.speculation import Speculation
from jaxcept.scheduler.watcher import REJECT, Verdict

VOCAB = 251
T = TypeVar("T")


def next_token(ids: Sequence[int], seed: int = 0) -> int:
    """The fake model: sum over positions of (position + 1) * (id + 1), plus the seed."""
    return (sum(i * (token_id + 1) for i, token_id in enumerate(ids, 1)) + seed) % VOCAB


def next_masked(ids: Sequence[int], seed: int, allowed: Collection[int] | None) -> int:
    """The fake model under a mask: the first allowed token from the one that it would draw."""
    token_id = next_token(ids, seed)
    while allowed is not None and token_id not in allowed:
        token_id = (token_id + 1) % VOCAB
    return token_id


def allowed_after(last: int | None, masks: Sequence[int] | None) -> frozenset[int] | None:
    """Which tokens may follow this one in a turn, None where all may. masks: every how many tokens there is a mask, and
    whether a turn begins with one."""
    if masks is None or (last is None and not masks[1]) or (last is not None and last % masks[0]):
        return None
    return frozenset(i for i in range(VOCAB) if i % 7 == (last or 0) % 5)


def bits_of(allowed: Collection[int]) -> bytes:
    """As a plan carries it."""
    return sum(1 << i for i in allowed).to_bytes(4 * -(-VOCAB // 32), "little")


class Entry(NamedTuple):
    """What one row computes in a step."""

    seq_id: int
    row: int
    start: int
    token_ids: tuple[int, ...]
    samples: bool
    num_drafts: int = 0


class FakeRunner:
    """Obeys plans against a pool of token ids, and looks for what a device could not survive."""

    def __init__(self, num_blocks: int, block_size: int, max_num_seqs: int) -> None:
        self.block_size = block_size
        self.pool: list[int | None] = [None] * (num_blocks * block_size)
        self.tables: list[dict[int, int]] = [{} for _ in range(max_num_seqs)]
        self.history: list[list[int]] = [[] for _ in range(max_num_seqs)]  # what RowSetup and draws say
        self.seeds = [0] * max_num_seqs
        self.seq_ids: list[int | None] = [None] * max_num_seqs
        self.num_prompt = [0] * max_num_seqs
        self.wants = [(False, False)] * max_num_seqs
        self.plans: list[StepPlan] = []
        self.fail_at: int | None = None
        self.swap_delay = 1
        self.swap_failures = 0
        self.host: dict[int, tuple[int, list[int | None]]] = {}
        self.staged: dict[int, tuple[int, list[int | None], int]] = {}
        self.outs_through: int | None = None
        self.ins_through: int | None = None
        self._outs: deque[int] = deque()
        self._ins: deque[int] = deque()
        self._failed: list[FailedMove] = []
        self._results: deque[tuple[StepPlan, StepResult]] = deque()

    def submit(self, plan: StepPlan) -> None:
        """Runs the step at once; the result waits for `collect`."""
        if plan.step_id == self.fail_at:
            raise RuntimeError("the device is gone")
        self.plans.append(plan)
        self._move(plan)
        for setup in plan.rows:
            self.tables[setup.row] = {}
            self.history[setup.row] = list(setup.token_ids)
            self.seeds[setup.row] = setup.seed
            self.seq_ids[setup.row] = setup.seq_id
            self.num_prompt[setup.row] = setup.num_prompt
            params = setup.params
            self.wants[setup.row] = (params.logprobs is not None, params.prompt_logprobs is not None)
        for row, offset, block_ids in plan.tables:
            for i, block in enumerate(block_ids):
                self.tables[row][offset + i] = block
        self._results.append((plan, self._compute(plan)))

    def collect(self) -> StepResult:
        """The oldest result, with the swaps that are over by then: those of a step `swap_delay` collections later."""
        plan, result = self._results.popleft()
        done = self._over(plan, plan.step_id - self.swap_delay)
        failed = tuple(move for move in self._failed if self._is_covered(move))
        self._failed = [move for move in self._failed if not self._is_covered(move)]
        return (
            replace(result, outs_through=self.outs_through, ins_through=self.ins_through, failed=failed)
            if done
            else result
        )

    def _over(self, plan: StepPlan, through: int) -> bool:
        """Moves the swaps on; a plan without tokens waits for one."""
        before = (self.outs_through, self.ins_through)
        while self._outs and self._outs[0] <= through:
            self.outs_through = self._outs.popleft()
        while self._ins and self._ins[0] <= through:
            self.ins_through = self._ins.popleft()
        if not plan.num_tokens and before == (self.outs_through, self.ins_through):
            if self._outs and (not self._ins or self._outs[0] <= self._ins[0]):
                self.outs_through = self._outs.popleft()
            elif self._ins:
                self.ins_through = self._ins.popleft()
        return self.outs_through is not None or self.ins_through is not None

    def _is_covered(self, failed: FailedMove) -> bool:
        through = self.outs_through if failed.move.kind is MoveKind.SWAP_OUT else self.ins_through
        return through is not None and failed.step_id <= through

    def _move(self, plan: StepPlan) -> None:
        size, moves = self.block_size, plan.moves
        kinds = [list(MoveKind).index(move.kind) for move in moves]
        assert kinds == sorted(kinds), f"moves are out of order: {moves}"
        copies = [move for move in moves if move.kind is MoveKind.COPY]
        written: list[int] = []
        for move in copies:
            assert move.src not in written, "a copy needs what another one wrote"
            written.append(move.dst)
        for kind, src, dst in moves:
            move = BlockMove(kind, src, dst)
            if kind is MoveKind.SWAP_OUT:
                content = self.pool[src * size : (src + 1) * size]
                self.host[dst] = (plan.step_id, [None] * size if self._fails(plan, move) else content)
            elif kind is MoveKind.LAND:
                step_id, content, host_block = self.staged[dst]
                assert host_block == src and self.ins_through is not None and step_id <= self.ins_through
                self.pool[dst * size : (dst + 1) * size] = content
            elif kind is MoveKind.COPY:
                self.pool[dst * size : (dst + 1) * size] = self.pool[src * size : (src + 1) * size]
            else:
                sent_in, content = self.host[src]
                assert self.outs_through is not None and sent_in <= self.outs_through, "it is not on the host yet"
                lost = self._fails(plan, move)
                self.staged[dst] = (plan.step_id, [None] * size if lost else list(content), src)
        through = -1 if self.ins_through is None else self.ins_through
        self.staged = {dst: entry for dst, entry in self.staged.items() if entry[0] > through}
        if any(move.kind is MoveKind.SWAP_OUT for move in moves):
            self._outs.append(plan.step_id)
        if any(move.kind is MoveKind.SWAP_IN for move in moves):
            self._ins.append(plan.step_id)

    def _fails(self, plan: StepPlan, move: BlockMove) -> bool:
        """Every `swap_failures`-th swap or so loses its block."""
        if not self.swap_failures or (plan.step_id * 7 + move.src * 3 + move.dst) % self.swap_failures:
            return False
        self._failed.append(FailedMove(plan.step_id, move))
        return True

    def _slot(self, row: int, position: int) -> int:
        return self.tables[row][position // self.block_size] * self.block_size + position % self.block_size

    def _compute(self, plan: StepPlan) -> StepResult:
        """Reads of all entries come before the writes of any: no entry may need what another writes in this step."""
        entries: list[Entry] = []
        for seq_id, row, position in zip(*plan.decodes, strict=True):
            assert position == len(self.history[row]) - 1, "a decode is not at the token drawn last"
            entries.append(Entry(seq_id, row, position, (self.history[row][position],), True))
        for chunk in plan.chunks:
            assert chunk.token_ids, "an empty chunk"
            entries.append(
                Entry(chunk.seq_id, chunk.row, chunk.start, chunk.token_ids, chunk.samples, chunk.num_drafts)
            )
        rows = [entry[1] for entry in entries]
        assert len(set(rows)) == len(rows), "a row computes twice in one step"
        seen: list[list[int]] = []
        for seq_id, row, start, ids, _, _ in entries:
            assert self.seq_ids[row] == seq_id, f"row {row} belongs to {self.seq_ids[row]}, not {seq_id}"
            before = [self.pool[self._slot(row, position)] for position in range(start)]
            known = [token_id for token_id in before if token_id is not None]
            assert len(known) == len(before), "KV that was never written is read"
            seen.append([*known, *ids])
        written: set[int] = set()
        for _, row, start, ids, _, _ in entries:
            for i, token_id in enumerate(ids):
                slot = self._slot(row, start + i)
                assert slot not in written, f"slot {slot} is written twice in one step"
                written.add(slot)
                self.pool[slot] = token_id
        return self._draw(plan, entries, seen)

    def _draw(self, plan: StepPlan, entries: list[Entry], seen: list[list[int]]) -> StepResult:
        token_ids: list[int] = []
        logprobs: dict[int, TokenLogprobs] = {}
        masks = {(row, draw): int.from_bytes(bits, "little") for row, bits, draw in plan.masks}
        assert {row for row, _ in masks} <= {row for _, row, _, _, samples, _ in entries if samples}, (
            "a mask for a row that draws nothing"
        )
        for (_, row, _, _, samples, num_drafts), known in zip(entries, seen, strict=True):
            for place in range(len(known) - num_drafts, len(known) + 1) if samples else ():
                ids = known[:place]
                mask = masks.get((row, place - len(known) + num_drafts))
                allowed = None if mask is None else {i for i in range(VOCAB) if mask >> i & 1}
                token_id = next_masked(ids, self.seeds[row], allowed)
                if self.wants[row][0]:
                    logprobs[len(token_ids)] = TokenLogprobs(-1.0, token_id + 1, ())
                token_ids.append(token_id)
                self.history[row] = [*ids, token_id]
        prompt_logprobs = {}
        for index, chunk in enumerate(plan.chunks):
            if self.wants[chunk.row][1]:
                after = self.history[chunk.row][: self.num_prompt[chunk.row]][chunk.start + 1 :][: len(chunk.token_ids)]
                prompt_logprobs[index] = tuple(TokenLogprobs(-2.0, token_id + 1, ()) for token_id in after)
        return StepResult(plan.step_id, tuple(token_ids), logprobs, prompt_logprobs)


@dataclass
class FakeWatcher:
    """Stops or intercepts on chosen tokens, and remembers what it was told."""

    stops: frozenset[int] = frozenset()
    calls: frozenset[int] = frozenset()
    turn_calls: bool = False  # whether the end of a turn is an interception
    raises_on: frozenset[int] = frozenset()
    masks: Sequence[int] | None = None  # see allowed_after
    rejected: int = 0
    last: int | None = None
    pushed: list[int] = field(default_factory=list)
    given: list[tuple[int, ...]] = field(default_factory=list)
    finished: int = 0

    def push(self, token_id: int) -> Verdict | None:
        assert not self.finished, "a token after the end"
        allowed = allowed_after(self.last, self.masks)
        if allowed is not None and token_id not in allowed:
            self.rejected += 1
            return REJECT
        self.last = token_id
        self.pushed.append(token_id)
        if token_id in self.raises_on:
            raise KeyError(token_id)
        if token_id in self.calls:
            return Verdict("intercept", "lookup", {"id": token_id})
        return Verdict("stop", f"<{token_id}>") if token_id in self.stops else None

    def mask(self) -> bytes | None:
        allowed = allowed_after(self.last, self.masks)
        return None if allowed is None else bits_of(allowed)

    def masks_behind(self, token_ids: Sequence[int]) -> Sequence[bytes | None]:
        masks: list[bytes | None] = []
        last = self.last
        for token_id in token_ids:
            allowed = allowed_after(last, self.masks)
            if allowed is not None and token_id not in allowed:
                break
            last = token_id
            behind = allowed_after(last, self.masks)
            masks.append(None if behind is None else bits_of(behind))
        return masks

    def forced(self) -> Sequence[int]:
        allowed = allowed_after(self.last, self.masks)
        return [min(allowed)] if allowed is not None and min(allowed) % 2 else []

    def end_of_turn(self) -> Verdict | None:
        return Verdict("intercept", "turn") if self.turn_calls else None

    def returned(self, token_ids: Sequence[int]) -> None:
        self.given.append(tuple(token_ids))
        self.last = None

    def finish(self) -> None:
        self.finished += 1


class Rig:
    """A scheduler, a fake device and a clock that ticks once a step, for tests that look at single plans."""

    def __init__(
        self, policy: Policy | None = None, depth: int = 0, speculation: Speculation | None = None, **config: Any
    ) -> None:
        sizes = {
            "num_blocks": 32,
            "block_size": 4,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 16,
            "max_model_len": 64,
        }
        self.config = SchedulerConfig(**{**sizes, "vocab_size": VOCAB, "watermark": 0.0, **config})
        self.scheduler = Scheduler(self.config, policy or Preserve(), speculation=speculation)
        self.runner = FakeRunner(self.config.num_blocks, self.config.block_size, self.config.max_num_seqs)
        self.clock = VirtualClock()
        self.engine = Engine(self.scheduler, self.runner, self.clock, Ledger(100), depth)
        self.events: list[Event] = []
        self.resumed: list[int] = []  # seq_ids, for tests that answer calls

    def add(self, name: str, prompt: Sequence[int], intercept: InterceptParams | None = None, **params: Any) -> int:
        """Queues a request; returns its first seq_id. Keywords of Request are told from those of SamplingParams."""
        names = {"cache_salt", "eos_token_ids", "seed_base", "watcher", "arrival", "priority"}
        own = {key: params.pop(key) for key in names & set(params)}
        request = Request(name, tuple(prompt), SamplingParams(**params), intercept or InterceptParams(), **own)
        return self.engine.add(request)[0]

    def step(self) -> StepPlan | None:
        """One step of the engine; the plan that it submitted, if any. Everything must hold afterwards."""
        before = len(self.runner.plans)
        self.events += self.engine.step()
        self.scheduler.check()
        self.clock.advance(1.0)
        return self.runner.plans[-1] if len(self.runner.plans) > before else None

    def run(self, limit: int = 500) -> None:
        """Until nothing can be computed."""
        while self.engine.has_work:
            self.step()
            limit -= 1
            assert limit, "the engine does not come to rest"

    def told(self, kind: type[T]) -> list[T]:
        """The events of this type so far."""
        return [event for event in self.events if isinstance(event, kind)]


def scripted(*counts: int, **params: Any) -> InterceptParams:
    """Interceptions after these numbers of generated tokens."""
    return InterceptParams(script=tuple(ScriptedTrigger(count) for count in counts), **params)
