"""Requests that take over a waiting context, and answers and prompts that come in pieces."""

import random
from collections.abc import Sequence

import pytest

from jaxcept.scheduler.events import Finished, FinishReason, Intercepted, Resumed, Tokens
from jaxcept.scheduler.interception import Residency
from jaxcept.scheduler.params import InterceptParams, SamplingParams
from jaxcept.scheduler.request import Request
from jaxcept.scheduler.scheduler import StateError
from tests.fakes import VOCAB, FakeWatcher, Rig, next_token, scripted
from tests.workloads import POLICIES

PROMPT = tuple(range(10, 16))
SEED = Request("r", PROMPT).seed(0)


def generated(ids: Sequence[int], count: int) -> tuple[int, ...]:
    """What the fake model writes after these ids."""
    known = list(ids)
    for _ in range(count):
        known.append(next_token(known, SEED))
    return tuple(known[len(ids) :])


def until_intercepted(rig: Rig, count: int) -> Intercepted:
    while len(rig.told(Intercepted)) < count:
        rig.step()
    return rig.told(Intercepted)[-1]


def request(name: str, ids: Sequence[int], intercept: InterceptParams | None = None, **params: object) -> Request:
    return Request(name, tuple(ids), SamplingParams(**{"max_tokens": 4, **params}), intercept or InterceptParams())


def test_a_later_request_goes_on_with_the_context():
    rig = Rig(depth=1)
    seq = rig.add("first", PROMPT, scripted(3), max_tokens=9)
    until_intercepted(rig, 1)
    held = (*PROMPT, *generated(PROMPT, 3))
    rig.clock.advance(5.0)
    follower, ended = rig.engine.follow("first", request("second", (*held, 7, 8)))
    assert follower == seq and ended.reason is FinishReason.CONTINUED and ended.request_id == "first"
    assert ended.token_ids == held and ended.num_generated == 3
    before = len(rig.runner.plans)
    rig.run()
    (end,) = rig.told(Finished)
    assert end.request_id == "second" and end.reason is FinishReason.LENGTH and end.num_prompt == len(held) + 2
    assert end.token_ids == (*held, 7, 8, *generated((*held, 7, 8), 4)) and end.num_generated == 4
    (record,) = end.interceptions
    assert record.residency is Residency.PRESERVED and record.num_recomputed == 0 and record.duration_s == 6.0
    chunk = rig.runner.plans[before].chunks[0]
    assert len(chunk.token_ids) == 3, "its last token and the two that are new"
    assert end.timing.arrival > record.started_at and end.timing.first_token_at is not None
    with pytest.raises(StateError, match=r"first' is finished .continued"):
        rig.engine.resume("first", (1,))


def test_a_follower_has_its_own_parameters_and_the_old_deadline_is_forgotten():
    rig = Rig()
    rig.add("first", PROMPT, scripted(2, timeout_s=8.0), max_tokens=9)
    until_intercepted(rig, 1)
    held = (*PROMPT, *generated(PROMPT, 2))
    stop = generated((*held, 5), 2)[-1]
    rig.engine.follow("first", request("second", (*held, 5), scripted(1, timeout_s=1000.0), stop_token_ids=[stop]))
    until_intercepted(rig, 2)
    rig.clock.advance(50.0)
    rig.step()
    assert rig.scheduler.num_intercepted == 1, "the first request's timeout is not the second's"
    rig.engine.resume("second", ())
    rig.run()
    (end,) = rig.told(Finished)
    assert end.reason is FinishReason.STOP and end.stop_reason == stop


def test_what_cannot_be_followed():
    rig = Rig()
    rig.add("first", PROMPT, scripted(2), max_tokens=9)
    held = (*PROMPT, *generated(PROMPT, 2))
    with pytest.raises(StateError):
        rig.engine.follow("first", request("second", (*held, 5)))
    until_intercepted(rig, 1)
    with pytest.raises(ValueError, match="expected to begin with the 8 ids"):
        rig.engine.follow("first", request("second", (1, *held)))
    with pytest.raises(ValueError, match="one completion"):
        rig.engine.follow("first", request("second", (*held, 5), n=2))
    with pytest.raises(ValueError, match="prompt_logprobs"):
        rig.engine.follow("first", request("second", (*held, 5), prompt_logprobs=1))
    with pytest.raises(ValueError, match="request_id"):
        rig.engine.follow("first", request("first", (*held, 5)))
    with pytest.raises(StateError, match="unknown"):
        rig.engine.follow("first", Request("second", (*held, 5), cache_salt="somebody else's"))
    with pytest.raises(ValueError, match="max_model_len"):
        rig.engine.follow("first", request("second", (*held, *[1] * 64)))
    rig.scheduler.check()
    rig.engine.resume("first", ())
    rig.run()
    assert rig.told(Finished)[0].reason is FinishReason.LENGTH


def test_a_follower_whose_watcher_cannot_be_made_changes_nothing():
    def refuse(_: int) -> FakeWatcher:
        raise ValueError("a grammar that cannot be compiled")

    rig = Rig()
    rig.add("first", PROMPT, scripted(2, timeout_s=8.0), max_tokens=9)
    until_intercepted(rig, 1)
    held = (*PROMPT, *generated(PROMPT, 2))
    with pytest.raises(ValueError, match="cannot be compiled"):
        rig.engine.follow("first", Request("second", (*held, 5), watcher=refuse))
    rig.scheduler.check()
    assert rig.scheduler.num_intercepted == 1
    rig.clock.advance(50.0)
    rig.step()
    rig.run()
    (end,) = rig.told(Finished)
    assert end.request_id == "first" and end.interceptions[0].outcome == "timeout", "its deadline is as it was"
    rig.engine.add(request("second", (*held, 5)))
    rig.run()
    assert rig.told(Finished)[-1].request_id == "second"


def test_an_answer_in_pieces_is_computed_as_it_comes():
    rig = Rig(depth=1)
    seq = rig.add("r", PROMPT, scripted(2, max_interceptions=1), max_tokens=6)
    until_intercepted(rig, 1)
    known = [*PROMPT, *generated(PROMPT, 2)]
    for number, piece in enumerate(((1, 2, 3), (4,), (5, 6)), 2):
        rig.engine.extend(seq, piece)
        known += piece
        event = until_intercepted(rig, number)
        assert event.tool == "more"
        computed = rig.runner.plans[-1].chunks[0]
        assert computed.start + len(computed.token_ids) == len(known)
    with pytest.raises(ValueError, match="at least one id"):
        rig.engine.extend(seq, ())
    rig.engine.resume(seq, ())
    rig.run()
    (end,) = rig.told(Finished)
    assert end.reason is FinishReason.LENGTH and end.token_ids == (*known, *generated(known, 4))
    assert end.num_returned == 6 and len(end.interceptions) == 4
    assert [token for event in rig.told(Tokens) for token in event.token_ids] == [
        *generated(PROMPT, 2),
        *generated(known, 4),
    ]


def test_a_prompt_in_pieces():
    rig = Rig(depth=1)
    (seq,) = rig.engine.add(Request("r", PROMPT, SamplingParams(max_tokens=3), is_open=True))
    until_intercepted(rig, 1)
    assert not rig.told(Tokens)
    rig.engine.extend(seq, (20, 21))
    until_intercepted(rig, 2)
    rig.engine.resume(seq, (30,))
    rig.run()
    (end,) = rig.told(Finished)
    known = (*PROMPT, 20, 21, 30)
    assert end.token_ids == (*known, *generated(known, 3))
    assert end.timing.first_token_at is not None and end.timing.first_token_at > 2
    with pytest.raises(ValueError, match="expected 1 for a prompt"):
        Request("r", PROMPT, SamplingParams(n=2), is_open=True)


@pytest.mark.parametrize("seed", range(60))
def test_conversations_are_the_same_under_every_policy(seed: int):
    """Turns taken over by later requests, answers in pieces, memory short, swaps that are late or fail."""
    rng = random.Random(seed)
    policy = rng.choice(sorted(POLICIES))
    rig = Rig(
        POLICIES[policy](),
        depth=rng.randint(0, 2),
        num_blocks=rng.randint(17, 40),
        num_host_blocks=rng.choice((4, 30)),
        enable_prefix_caching=rng.random() < 0.5,
        max_num_batched_tokens=rng.choice((4, 16)),
    )
    rig.runner.swap_delay, rig.runner.swap_failures = rng.randint(0, 3), rng.choice((0, 0, 3))
    conversations = {f"c{i}": Conversation(rig, f"c{i}", rng) for i in range(rng.randint(2, 6))}
    for _ in range(3000):
        if all(conversation.is_over for conversation in conversations.values()):
            break
        seen = len(rig.events)
        rig.step()
        for event in rig.events[seen:]:
            if isinstance(event, Intercepted | Finished):
                conversations[event.request_id.split("/")[0]].on(event)
        for conversation in conversations.values():
            conversation.act()
        rig.scheduler.check()
    assert all(conversation.is_over for conversation in conversations.values())
    while rig.engine.has_work:
        rig.step()
    assert rig.scheduler.num_unfinished == 0 and rig.scheduler.num_held_blocks == 0
    assert len(rig.told(Resumed)) >= len(conversations)


class Conversation:
    """Some turns, each a request of its own; some of their contexts are given up by the client in between."""

    def __init__(self, rig: Rig, name: str, rng: random.Random) -> None:
        self.rig, self.name, self.rng = rig, name, rng
        self.turn, self.turns = 0, rng.randint(2, 4)
        self.known = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 9))]
        self.pieces = 0
        self.wait = 0
        self.is_held = self.is_over = False
        self.count = self._draw()
        rig.engine.add(self._request())

    def _draw(self) -> int:
        return self.rng.randint(1, 4)

    def _request(self) -> Request:
        script = scripted(self.count) if self.turn + 1 < self.turns else InterceptParams()
        return request(f"{self.name}/{self.turn}", self.known, script, max_tokens=self.count + 1 - (not script.script))

    def on(self, event: Intercepted | Finished) -> None:
        """The engine has done its part: what it wrote must be what the model writes."""
        if isinstance(event, Finished):
            assert event.reason is FinishReason.LENGTH
            assert list(event.token_ids[-self.count :]) == list(generated(self.known, self.count))
            self.is_over = True
            return
        if event.tool != "more":
            self.known += generated(self.known, self.count)
            self.pieces = self.rng.choice((0, 0, 1, 2))
        self.is_held, self.wait = True, self.rng.randint(0, 6)

    def act(self) -> None:
        """The client's part, after some steps."""
        self.wait -= 1
        if not self.is_held or self.wait > 0:
            return
        self.is_held = False
        ids = [self.rng.randrange(VOCAB) for _ in range(self.rng.randint(1, 4))]
        held = f"{self.name}/{self.turn}"
        if self.pieces:
            self.pieces -= 1
            self.known += ids
            self.rig.engine.extend(held, ids)
            return
        self.turn += 1
        self.known += ids
        self.count = self._draw()
        if self.rng.random() < 0.2:
            self.rig.engine.abort(held)
            self.rig.events[:] = [e for e in self.rig.events if not isinstance(e, Finished)]
            self.rig.engine.scheduler.drain()
            self.rig.engine.add(self._request())
        else:
            self.rig.engine.follow(held, self._request())
