"""A runner and a world that one can check by hand.

The fake device keeps one token id per KV slot. The next token of a sequence is a weighted sum of the ids that it reads
back through its row's block table, so a wrong table, a missing copy or a block that somebody else wrote into changes
tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from jaxcept.clock import VirtualClock
from jaxcept.engine import Engine
from jaxcept.metrics import Ledger
from jaxcept.scheduler.config import SchedulerConfig
from jaxcept.scheduler.events import Event
from jaxcept.scheduler.params import InterceptParams, SamplingParams, ScriptedTrigger
from jaxcept.scheduler.plan import StepPlan, StepResult, TokenLogprobs
from jaxcept.scheduler.policies.preserve import Preserve
from jaxcept.scheduler.policy import Policy
from jaxcept.scheduler.request import Request
from jaxcept.scheduler.scheduler import Scheduler
from jaxcept.scheduler.watcher import Verdict

VOCAB = 251
T = TypeVar("T")


def next_token(ids: Sequence[int], seed: int = 0) -> int:
    """The fake model: sum over positions of (position + 1) * (id + 1), plus the seed."""
    return (sum(i * (token_id + 1) for i, token_id in enumerate(ids, 1)) + seed) % VOCAB


class Entry(NamedTuple):
    """What one row computes in a step."""

    seq_id: int
    row: int
    start: int
    token_ids: tuple[int, ...]
    samples: bool


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
        self._results: deque[StepResult] = deque()

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
        self._results.append(self._compute(plan))

    def collect(self) -> StepResult:
        """The oldest result."""
        return self._results.popleft()

    def _move(self, plan: StepPlan) -> None:
        size = self.block_size
        for i, move in enumerate(plan.moves):
            assert move.src not in [before.dst for before in plan.moves[:i]], "a move needs what another one wrote"
        contents = [self.pool[move.src * size : (move.src + 1) * size] for move in plan.moves]
        for move, content in zip(plan.moves, contents, strict=True):
            self.pool[move.dst * size : (move.dst + 1) * size] = content

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
            entries.append(Entry(chunk.seq_id, chunk.row, chunk.start, chunk.token_ids, chunk.samples))
        rows = [entry[1] for entry in entries]
        assert len(set(rows)) == len(rows), "a row computes twice in one step"
        seen: list[list[int]] = []
        for seq_id, row, start, ids, _ in entries:
            assert self.seq_ids[row] == seq_id, f"row {row} belongs to {self.seq_ids[row]}, not {seq_id}"
            before = [self.pool[self._slot(row, position)] for position in range(start)]
            known = [token_id for token_id in before if token_id is not None]
            assert len(known) == len(before), "KV that was never written is read"
            seen.append([*known, *ids])
        written: set[int] = set()
        for _, row, start, ids, _ in entries:
            for i, token_id in enumerate(ids):
                slot = self._slot(row, start + i)
                assert slot not in written, f"slot {slot} is written twice in one step"
                written.add(slot)
                self.pool[slot] = token_id
        return self._draw(plan, entries, seen)

    def _draw(self, plan: StepPlan, entries: list[Entry], seen: list[list[int]]) -> StepResult:
        token_ids: list[int] = []
        logprobs: dict[int, TokenLogprobs] = {}
        for (_, row, _, _, samples), ids in zip(entries, seen, strict=True):
            if samples:
                token_id = next_token(ids, self.seeds[row])
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
    pushed: list[int] = field(default_factory=list)
    given: list[tuple[int, ...]] = field(default_factory=list)
    finished: int = 0

    def push(self, token_id: int) -> Verdict | None:
        assert not self.finished, "a token after the end"
        self.pushed.append(token_id)
        if token_id in self.raises_on:
            raise KeyError(token_id)
        if token_id in self.calls:
            return Verdict("intercept", "lookup", {"id": token_id})
        return Verdict("stop", f"<{token_id}>") if token_id in self.stops else None

    def end_of_turn(self) -> Verdict | None:
        return Verdict("intercept", "turn") if self.turn_calls else None

    def returned(self, token_ids: Sequence[int]) -> None:
        self.given.append(tuple(token_ids))

    def finish(self) -> None:
        self.finished += 1


class Rig:
    """A scheduler, a fake device and a clock that ticks once a step, for tests that look at single plans."""

    def __init__(self, policy: Policy | None = None, depth: int = 0, **config: Any) -> None:
        sizes = {
            "num_blocks": 32,
            "block_size": 4,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 16,
            "max_model_len": 64,
        }
        self.config = SchedulerConfig(**{**sizes, "vocab_size": VOCAB, "watermark": 0.0, **config})
        self.scheduler = Scheduler(self.config, policy or Preserve())
        self.runner = FakeRunner(self.config.num_blocks, self.config.block_size, self.config.max_num_seqs)
        self.clock = VirtualClock()
        self.engine = Engine(self.scheduler, self.runner, self.clock, Ledger(100), depth)
        self.events: list[Event] = []

    def add(self, name: str, prompt: Sequence[int], intercept: InterceptParams | None = None, **params: Any) -> int:
        """Queues a request; returns its first seq_id. Keywords of Request are told from those of SamplingParams."""
        names = {"cache_salt", "eos_token_ids", "seed_base", "watcher", "arrival"}
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
