"""Workloads as plain data, the world that plays them against an engine, and the answer that must come out.

A workload is a dict of JSON values, so that one that found a bug can be kept in tests/traces.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from jaxcept.clock import VirtualClock
from jaxcept.engine import Engine
from jaxcept.metrics import Ledger
from jaxcept.scheduler.config import SchedulerConfig
from jaxcept.scheduler.events import Finished, FinishReason, Intercepted, PromptLogprobs, Resumed, Returned, Tokens
from jaxcept.scheduler.interception import Interception, Outcome
from jaxcept.scheduler.orders import ORDERS, make_order
from jaxcept.scheduler.params import InterceptParams, SamplingParams, ScriptedTrigger
from jaxcept.scheduler.plan import StepPlan
from jaxcept.scheduler.policies.discard import Discard
from jaxcept.scheduler.policies.preserve import Preserve
from jaxcept.scheduler.policy import BatchView, HostUse, InterceptedView, Placement, Policy, Traits
from jaxcept.scheduler.request import Request
from jaxcept.scheduler.scheduler import Scheduler, StateError
from jaxcept.scheduler.sequence import Sequence as Seq
from jaxcept.scheduler.speculation import Speculation, SpeculationConfig
from tests.costs import HAND
from tests.fakes import VOCAB, FakeRunner, FakeWatcher, allowed_after, next_masked

Workload = dict[str, Any]


class KeepSome(Preserve):
    """Keeps a share of each context, and less of it the longer the tool takes: placements block by block."""

    def __init__(self) -> None:
        super().__init__()
        self.name, self.traits = "keep-some", Traits(host=HostUse.NONE)

    def place(self, intercepted: Sequence[InterceptedView], batch: BatchView) -> Sequence[Placement]:
        return [Placement(max(0, view.num_blocks - 1 - int(view.elapsed) // 2)) for view in intercepted]


class SwapAll(Preserve):
    """Everything goes to the host, whatever it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.name, self.traits = "swap-all", Traits()

    def swap_budget(self, batch: BatchView) -> int | None:
        return None

    def place(self, intercepted: Sequence[InterceptedView], batch: BatchView) -> Sequence[Placement]:
        return [Placement(0, view.num_blocks) for view in intercepted]


class Mixture(Preserve):
    """Some of everything, by a hash: blocks kept, given up in the middle and swapped, within a small budget."""

    def __init__(self) -> None:
        super().__init__()
        self.name, self.traits = "mixture", Traits(recompute_tokens=6, swaps_partial_blocks=False)

    def swap_budget(self, batch: BatchView) -> int | None:
        return int(batch.now) % 4

    def place(self, intercepted: Sequence[InterceptedView], batch: BatchView) -> Sequence[Placement]:
        placements, budget = [], min(batch.swap_budget or 0, batch.num_available_host_blocks)
        for view in intercepted:
            draw = zlib.crc32(f"{view.seq_id}/{view.since}/{batch.now}".encode())
            swap = min(draw % 4, view.num_blocks, budget)
            budget -= swap
            left = view.num_blocks - swap
            placements.append(Placement(left if draw & 64 else draw // 8 % (left + 1), swap))
        return placements


class Offload(Discard):
    """An engine of today with a second tier on the host."""

    def __init__(self) -> None:
        super().__init__("offload", Traits(host=HostUse.CACHE))


class DiscardToTail(Discard):
    """An engine of 2023: a returned sequence queues at the tail."""

    def __init__(self) -> None:
        super().__init__("discard-to-tail", Traits(host=HostUse.NONE, prefix_caching=False, head_start_s=0.0))


_POLICIES = (Preserve, Discard, KeepSome, SwapAll, Mixture, Offload, DiscardToTail)
POLICIES: dict[str, Callable[[], Policy]] = {policy().name: policy for policy in _POLICIES}


class Guesses(Speculation):
    """Guesses what the fake model draws, but for every `wrong`-th token or so."""

    def __init__(self, wrong: int) -> None:
        super().__init__(SpeculationConfig(), HAND)
        self._wrong = wrong

    def guess(self, seq: Seq, limit: int) -> tuple[int, ...]:
        ids, watcher = list(seq.token_ids), seq.watcher
        last, masks = (watcher.last, watcher.masks) if isinstance(watcher, FakeWatcher) else (None, None)
        for place in range(limit):
            error = int((len(ids) * 7 + seq.seq_id + place) % self._wrong == 0)
            last = (next_masked(ids, seq.seed, allowed_after(last, masks)) + error) % VOCAB
            ids.append(last)
        return tuple(ids[len(seq.token_ids) :])


def answer_ids(request: int, index: int, interception: int, length: int) -> tuple[int, ...]:
    """What a tool answers: a function of the call alone, whatever the engine did in between."""
    digest = hashlib.sha256(f"{request}/{index}/{interception}".encode()).digest()
    return tuple(digest[i % 32] % VOCAB for i in range(length))


def make_request(number: int, spec: Workload, watchers: dict[tuple[int, int], FakeWatcher]) -> Request:
    """The request that a workload describes."""

    def watcher(index: int) -> FakeWatcher:
        watchers[number, index] = FakeWatcher(
            stops=frozenset(spec["watch"]["stops"]),
            calls=frozenset(spec["watch"]["calls"]),
            turn_calls=spec["watch"]["turn_calls"],
            raises_on=frozenset(spec["watch"]["raises_on"]),
            masks=spec["watch"].get("masks"),
        )
        return watchers[number, index]

    return Request(
        request_id=f"r{number}",
        prompt_ids=tuple(spec["prompt"]),
        params=SamplingParams(**spec["params"]),
        intercept=InterceptParams(
            **{
                **spec["intercept"],
                "token_ids": tuple(spec["intercept"]["token_ids"]),
                "failure_ids": tuple(spec["intercept"]["failure_ids"]),
                "script": tuple(ScriptedTrigger(count) for count in spec["intercept"]["script"]),
            }
        ),
        eos_token_ids=tuple(spec["eos"]),
        cache_salt=spec["salt"],
        seed_base=number,
        watcher=watcher if spec["watch"] is not None else None,
    )


def busy_workload(seed: int) -> Workload:
    """A seeded workload: almost every request calls tools, memory is short, and swaps may fail."""
    rng = random.Random(seed)
    block_size = rng.choice((1, 2, 4))
    num_blocks = rng.randint(10, 40) * 4 // block_size
    max_len = min(64, num_blocks * block_size)
    requests = []
    masked = {"stops": [], "calls": [], "turn_calls": False, "raises_on": [], "masks": [1 + seed % 4, seed % 2]}
    for _ in range(rng.randint(3, 10)):
        length = rng.randint(1, max_len // 2)
        first = rng.choice((0, 0, rng.randrange(VOCAB)))  # many prompts begin alike
        script = [rng.randint(1, 5) for _ in range(rng.randint(0, 4))]
        answers = [[rng.choice(("return",) * 6 + ("fail",)), rng.randint(0, 9), rng.randint(0, 8)] for _ in range(3)]
        requests.append(
            {
                "at": rng.randint(0, 10),
                "prompt": [(first + 3 * i) % VOCAB for i in range(length)],
                "params": {"n": rng.choice((1, 1, 1, 2)), "max_tokens": rng.randint(2, 20)},
                "intercept": {
                    "token_ids": [],
                    "script": script,
                    "timeout_s": rng.choice((4.0, 1000.0, 1000.0)),
                    "max_interceptions": 64,
                    "max_returned_tokens": None,
                    "on_failure": rng.choice(("tell", "fail")),
                    "failure_ids": [3, 4],
                },
                "eos": [],
                "salt": rng.choice(("", "", "other")),
                "watch": masked if seed % 3 == 0 else None,
                "abort_at": rng.choice((None, None, None, rng.randint(1, 30))),
                "answers": answers,
            }
        )
        requests[-1]["params"] |= {
            "min_tokens": 0,
            "stop_token_ids": [],
            "ignore_eos": True,
            "seed": rng.choice((None, 1)),
        }
    return {
        "config": {
            "num_blocks": num_blocks,
            "block_size": block_size,
            "max_num_seqs": rng.randint(2, 5),
            "max_num_batched_tokens": rng.choice((4, 16, 64)),
            "max_model_len": max_len,
            "enable_prefix_caching": rng.random() < 0.5,
            "watermark": 0.01,
            "num_host_blocks": rng.choice((num_blocks // 4, num_blocks, 4 * num_blocks)),
        },
        "policy": rng.choice(sorted(POLICIES)),
        "order": rng.choice(ORDERS),
        "depth": rng.randint(0, 2),
        "swaps": [rng.randint(0, 4), rng.choice((0, 0, 0, 3, 11))],
        "requests": requests,
    }


class World:
    """Plays a workload, one step a second, and checks everything on the way."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.config = SchedulerConfig(vocab_size=VOCAB, **workload["config"])
        self.scheduler = Scheduler(
            self.config,
            POLICIES[workload["policy"]](),
            order=make_order(workload.get("order", "fcfs")),
            speculation=Guesses(workload["wrong"]) if workload.get("wrong") else None,
        )
        self.runner = FakeRunner(self.config.num_blocks, self.config.block_size, self.config.max_num_seqs)
        self.runner.swap_delay, self.runner.swap_failures = workload.get("swaps", (1, 0))
        self.clock = VirtualClock()
        self.engine = Engine(self.scheduler, self.runner, self.clock, Ledger(1), workload["depth"])
        self.watchers: dict[tuple[int, int], FakeWatcher] = {}
        self.finished: dict[tuple[int, int], Finished] = {}
        self.streamed: dict[int, list[int]] = {}
        self.prompt_logprobs: dict[str, int] = {}
        self.opened: dict[int, list[str]] = {}
        self.resumed: dict[int, int] = {}
        self._arrivals = sorted((spec["at"], number) for number, spec in enumerate(workload["requests"]))
        self._aborts = sorted(
            (s["abort_at"], n) for n, s in enumerate(workload["requests"]) if s["abort_at"] is not None
        )
        self._answers: list[tuple[float, int, int, int, int]] = []  # (time, seq_id, request, index, interception)

    def run(self) -> list[StepPlan]:
        """Until everyone has finished; returns the plans."""
        idle = 0
        while True:
            self._act()
            assert self.scheduler.num_unfinished == 0 or self.engine.has_work or self._next_moment() is not None
            if not self.engine.has_work:
                moment = self._next_moment()
                if moment is None:
                    break
                self.clock.advance_to(moment)
                if self.engine.next_deadline() is None or moment < (self.engine.next_deadline() or 0):
                    continue
            before = len(self.runner.plans), self.engine.num_in_flight, len(self.finished)
            self._watch()
            for plan in self.runner.plans[before[0] :]:
                assert plan.num_tokens <= self.config.max_num_batched_tokens, "over the token budget"
            idle = idle + 1 if before == (len(self.runner.plans), self.engine.num_in_flight, len(self.finished)) else 0
            assert idle < 5, "the engine has work and does none"
            assert len(self.runner.plans) < 5000, "the workload does not end"
            self.clock.advance(1.0)
        self._check_end()
        return self.runner.plans

    def _next_moment(self) -> float | None:
        moments = [queue[0][0] for queue in (self._arrivals, self._aborts, self._answers) if queue]
        deadline = self.engine.next_deadline()
        return min(moments + ([deadline] if deadline is not None else []), default=None)

    def _act(self) -> None:
        now = self.clock.now()
        while self._arrivals and self._arrivals[0][0] <= now:
            _, number = self._arrivals.pop(0)
            seq_ids = self.engine.add(make_request(number, self.workload["requests"][number], self.watchers))
            self.streamed.update({seq_id: [] for seq_id in seq_ids})
        while self._aborts and self._aborts[0][0] <= now:
            _, number = self._aborts.pop(0)
            self.engine.abort(f"r{number}")
        while self._answers and self._answers[0][0] <= now:
            self._answer(*self._answers.pop(0)[1:])
        self.scheduler.check()

    def _answer(self, seq_id: int, number: int, index: int, interception: int) -> None:
        answers = self.workload["requests"][number]["answers"]
        kind, _, length = answers[interception % len(answers)]
        try:
            room = self.engine.room(seq_id, interception)
            ids = answer_ids(number, index, interception, min(length, room))
            if kind == "fail":
                self.engine.fail(seq_id, ids, interception)
            else:
                self.engine.resume(seq_id, ids, interception)
        except StateError:
            pass  # aborted, or timed out, before the tool answered

    def _watch(self) -> None:
        events = self.engine.step()
        if self.engine.is_dead:
            self.engine.step()  # raises, and names the cause
        for event in events:
            if isinstance(event, Tokens):
                for seq_id, token_id in zip(event.seq_ids, event.token_ids, strict=True):
                    self.streamed[seq_id].append(token_id)
                assert all(entry.rank == self.streamed[seq_id][-1] + 1 for seq_id, entry in event.logprobs.items())
            elif isinstance(event, Intercepted):
                self._call(event)
            elif isinstance(event, Finished):
                self.finished[int(event.request_id[1:]), event.index] = event
                assert event.seq_id in self.streamed
                self._check_finished(event)
            elif isinstance(event, PromptLogprobs):
                assert event.request_id not in self.prompt_logprobs, "prompt logprobs are sent twice"
                self.prompt_logprobs[event.request_id] = len(event.entries)
                prompt = self.workload["requests"][int(event.request_id[1:])]["prompt"]
                assert [entry.rank - 1 for entry in event.entries] == prompt[1:]
            elif isinstance(event, Returned):
                assert self.opened[event.seq_id][event.interception] == "open"
                self.opened[event.seq_id][event.interception] = event.outcome
            elif isinstance(event, Resumed):
                record = event.interception
                assert self.opened[event.seq_id][record.index] == record.outcome
                self.resumed[event.seq_id] = self.resumed.get(event.seq_id, 0) + 1
                assert (
                    record.num_recomputed + record.num_cached_on_return <= record.context_tokens + record.num_returned
                )
        self.scheduler.check()

    def _call(self, event: Intercepted) -> None:
        number = int(event.request_id[1:])
        calls = self.opened.setdefault(event.seq_id, [])
        assert event.interception == len(calls)
        calls.append("open")
        answers = self.workload["requests"][number]["answers"]
        kind, delay, _ = answers[event.interception % len(answers)]
        if kind == "hang":
            return
        call = (event.seq_id, number, event.index, event.interception)
        if delay == 0:
            self._answer(*call)
        else:
            self._answers.append((self.clock.now() + delay, *call))
            self._answers.sort()

    def _check_finished(self, event: Finished) -> None:
        generated = [event.token_ids[i] for start, stop in event.output_spans for i in range(start, stop)]
        assert self.streamed[event.seq_id] == generated, "what was streamed is not what the sequence holds"
        assert event.num_generated == len(generated)
        number = int(event.request_id[1:])
        watcher = self.watchers.get((number, event.index))
        if watcher is not None:
            assert watcher.finished == 1 and watcher.pushed == generated
            assert sum(map(len, watcher.given)) == event.num_returned
        expected, reason = expected_end(number, self.workload["requests"][number], event, self.config)
        assert list(event.token_ids) == expected
        assert event.reason == reason

    def _check_end(self) -> None:
        requests = self.workload["requests"]
        assert set(self.finished) == {(n, i) for n, spec in enumerate(requests) for i in range(spec["params"]["n"])}
        self.scheduler.check()
        host = self.scheduler.swaps.host.pool
        assert host.num_available == host.num_blocks and not self.scheduler.swaps.loading
        assert self.scheduler.num_held_blocks == 0 and self.scheduler.num_idle_blocks == 0
        assert self.scheduler.num_unfinished == 0 and self.engine.num_in_flight == 0
        for number, spec in enumerate(requests):
            wants = spec["params"].get("prompt_logprobs") is not None
            if wants and self.finished[number, 0].num_generated:
                assert self.prompt_logprobs[f"r{number}"] == len(spec["prompt"]) - 1
            assert wants or f"r{number}" not in self.prompt_logprobs


def expected_end(
    number: int, spec: Workload, event: Finished, config: SchedulerConfig
) -> tuple[list[int], FinishReason]:
    """What the sequence must hold and why it ended, from its request and the outcomes of its calls alone."""
    request = make_request(number, {**spec, "watch": None}, {})
    ids, num_output = list(request.prompt_ids), 0
    records = list(event.interceptions)
    count, since = 0, 0
    last: int | None = None  # token of the turn
    masks = (spec["watch"] or {}).get("masks")
    max_tokens = request.params.max_tokens or 10**9
    while True:
        if event.reason is FinishReason.ABORT and len(ids) == len(event.token_ids) and count == len(records):
            return ids, FinishReason.ABORT
        last = token_id = next_masked(ids, request.seed(event.index), allowed_after(last, masks))
        ids.append(token_id)
        num_output, since = num_output + 1, since + 1
        ruling = _expected_ruling(
            spec=spec,
            request=request,
            token_id=token_id,
            num_output=num_output,
            since=since,
            length=len(ids),
            count=count,
            max_len=config.max_len,
        )
        if isinstance(ruling, FinishReason):
            return ids, ruling
        if ruling:
            record = records[count]
            assert record.context_tokens == len(ids) and record.index == count and record.tool == ruling
            count, since, last = count + 1, 0, None
            if record.outcome is Outcome.ABORTED:
                return ids, FinishReason.ABORT
            ending = _expected_return(number=number, spec=spec, event=event, record=record, ids=ids, config=config)
            if ending is not None:
                return ids, ending
            if num_output >= max_tokens or len(ids) >= config.max_len:
                return ids, FinishReason.LENGTH


def _expected_ruling(
    *,
    spec: Workload,
    request: Request,
    token_id: int,
    num_output: int,
    since: int,
    length: int,
    count: int,
    max_len: int,
) -> FinishReason | str | None:
    """A reason to end, the tool that is called, or neither."""
    watch = spec["watch"] or {"stops": [], "calls": [], "turn_calls": False, "raises_on": []}
    script = spec["intercept"]["script"]
    may_stop = num_output >= request.params.min_tokens
    if token_id in watch["raises_on"]:
        return FinishReason.ERROR
    tool = None
    if token_id in spec["intercept"]["token_ids"]:
        tool = "lookup" if token_id in watch["calls"] else f"token:{token_id}"
    elif token_id in request.stop_token_ids and may_stop:
        tool = "lookup" if token_id in watch["calls"] else "turn" if watch["turn_calls"] else None
        if tool is None:
            return FinishReason.STOP
    elif token_id in watch["calls"]:
        tool = "lookup"
    elif token_id in watch["stops"] and may_stop:
        return FinishReason.STOP
    elif count < len(script) and since >= script[count]:
        tool = "scripted"
    elif num_output >= (request.params.max_tokens or 10**9) or length >= max_len:
        return FinishReason.LENGTH
    if tool is not None and count >= spec["intercept"]["max_interceptions"]:
        return FinishReason.TOOL_LIMIT
    return tool


def _expected_return(
    *,
    number: int,
    spec: Workload,
    event: Finished,
    record: Interception,
    ids: list[int],
    config: SchedulerConfig,
) -> FinishReason | None:
    """Appends what came back; a reason where the sequence ends instead."""
    intercept, outcome = spec["intercept"], record.outcome
    limit = intercept["max_returned_tokens"]
    given = sum(record.num_returned for record in event.interceptions[: record.index])
    room = max(0, min(config.max_len - 1 - len(ids), 10**9 if limit is None else limit - given))
    answers = spec["answers"]
    length = min(room, answers[record.index % len(answers)][2])
    if outcome is Outcome.RETURNED or (outcome is Outcome.FAILED and intercept["on_failure"] == "tell"):
        assert record.num_returned == length
        ids.extend(answer_ids(number, event.index, record.index, length))
        return None
    if intercept["on_failure"] == "fail":
        return FinishReason.TOOL_TIMEOUT if outcome is Outcome.TIMEOUT else FinishReason.TOOL_FAILED
    if len(intercept["failure_ids"]) > room:
        return FinishReason.LENGTH
    ids.extend(intercept["failure_ids"])
    return None


def without_times(workload: Workload, **changes: Any) -> Workload:
    """The same workload where nothing that a client gets depends on time: no aborts, no hanging tools."""
    requests = []
    for spec in workload["requests"]:
        answers = [["return" if kind == "hang" else kind, delay, length] for kind, delay, length in spec["answers"]]
        intercept = {**spec["intercept"], "timeout_s": 1e6}
        requests.append({**spec, "abort_at": None, "answers": answers, "intercept": intercept})
    return {**workload, "requests": requests, **changes}


def outputs(world: World) -> dict[tuple[int, int], tuple[Any, ...]]:
    """What clients got."""
    return {key: (event.token_ids, event.reason) for key, event in sorted(world.finished.items())}


def plan_digest(plans: list[StepPlan]) -> str:
    """Names the plans, byte for byte."""
    return hashlib.sha256(repr([dataclasses.astuple(plan) for plan in plans]).encode()).hexdigest()
