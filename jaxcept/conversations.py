"""Which ids a conversation is, though its messages come back as text.

A client sends the whole history with every turn. Encoded again it may differ from the ids that the model wrote, and the
context would be lost. So each turn that a model ended is remembered by its messages: a later request that begins with
the same ones goes on from the very ids, and from the sequence that holds their context, where it still waits.
"""

from __future__ import annotations

import json
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

TURN_OVERHEAD = 256  # ids that take as much memory as what is kept of a turn beside its ids
MAX_VARIANTS = 8  # turns with the same messages, as of clients that ask the same

Digest = bytes


@dataclass(frozen=True, slots=True)
class CallRef:
    """A call of a turn by the id under which the client knows it."""

    id: str
    name: str
    arguments: Mapping[str, Any]


@dataclass(slots=True)
class IdBuffer:
    """The ids of a conversation as far as it has come, for all of its turns."""

    ids: array[int]
    num_turns: int = 0  # those that are remembered


@dataclass(slots=True)
class KnownTurn:
    """A turn that the model ended: the ids of its conversation from the beginning to there.

    `request_id` is the request whose sequence waits with the context, None where none does. `answers` are results of
    calls that need no client: tools of the server, called in the same turn as the client's. `ended_turn` says that the
    last id ends the turn, `thoughts` which spans of the ids are thoughts. The ids are the first `num_ids` of a buffer,
    which turns of the conversation share.
    """

    buffer: IdBuffer
    num_ids: int
    calls: tuple[CallRef, ...] = ()
    answers: Mapping[str, str] = field(default_factory=dict)
    ended_turn: bool = True
    request_id: str | None = None
    conversation: str | None = None
    thoughts: tuple[tuple[int, int], ...] = ()

    @property
    def ids(self) -> array[int]:
        """A copy of the ids."""
        return self.buffer.ids[: self.num_ids]


@dataclass(frozen=True, slots=True)
class Match:
    """A known turn that a conversation begins with, and how many of its messages it covers."""

    turn: KnownTurn
    num_messages: int


class Conversations:
    """Known turns, the least recently used forgotten first where they take more than `max_ids` ids (of 4 bytes)."""

    def __init__(self, max_ids: int = 32_000_000, max_held: int = 4096) -> None:
        if max_ids < 1 or max_held < 0:
            raise ValueError(f"max_ids={max_ids}, max_held={max_held}: expected 1 or more, and 0 or more")
        self._max_ids = max_ids
        self._max_held = max_held
        self._num_ids = 0
        self._turns: OrderedDict[Digest, list[KnownTurn]] = OrderedDict()
        self._held: OrderedDict[str, KnownTurn] = OrderedDict()  # by request_id

    @property
    def num_held(self) -> int:
        """Requests that wait for a later one, as far as is known here: some may have timed out."""
        return len(self._held)

    @property
    def num_ids(self) -> int:
        """Ids that are remembered, shared ones once, and the overhead of turns."""
        return self._num_ids

    def remember(self, digest: Digest, turn: KnownTurn, before: KnownTurn | None = None) -> list[str]:
        """Takes a turn under the digest of all its messages; the requests whose contexts are to be given up for it.

        `before` is the turn that it goes on from, whose buffer it extends where no other turn has gone on differently.
        """
        variants = self._turns.setdefault(digest, [])
        variants.append(turn)
        self._store(turn, before)
        self._turns.move_to_end(digest)
        if turn.request_id is not None:
            self._held[turn.request_id] = turn
        given_up = self._forget(variants.pop(0)) if len(variants) > MAX_VARIANTS else []
        while self._num_ids > self._max_ids and len(self._turns) > 1:
            for old in self._turns.popitem(last=False)[1]:
                given_up += self._forget(old)
        while len(self._held) > self._max_held:
            given_up.append(self._release(next(iter(self._held.values()))))
        return given_up

    def find(self, digests: Sequence[Digest], conversation: str | None = None) -> Match | None:
        """The longest beginning that is known; digests[i] is that of the first i messages.

        Among turns with the same messages: one of the same named conversation, one whose context waits, the last one.
        """
        for count in range(len(digests) - 1, 0, -1):
            variants = self._turns.get(digests[count])
            if variants:
                self._turns.move_to_end(digests[count])
                ranked = enumerate(variants)
                best = max(
                    ranked,
                    key=lambda entry: (
                        conversation is not None and entry[1].conversation == conversation,
                        entry[1].request_id is not None,
                        entry[0],
                    ),
                )
                return Match(best[1], count)
        return None

    def take(self, turn: KnownTurn) -> str | None:
        """The request that holds the turn's context, for one taker; None for whoever comes after."""
        return self._release(turn) if turn.request_id is not None else None

    def _store(self, turn: KnownTurn, before: KnownTurn | None) -> None:
        """Ids are counted by the buffer, which is kept until the last of its turns is forgotten."""
        own = turn.buffer
        shared = before.buffer if before is not None and before.buffer.num_turns else None
        if shared is not None and own.ids[: len(shared.ids)] == shared.ids:
            self._num_ids += len(own.ids) - len(shared.ids)
            shared.ids.extend(own.ids[len(shared.ids) :])
            turn.buffer = shared
        else:
            self._num_ids += len(own.ids)
        turn.buffer.num_turns += 1
        self._num_ids += TURN_OVERHEAD

    def _forget(self, turn: KnownTurn) -> list[str]:
        turn.buffer.num_turns -= 1
        self._num_ids -= TURN_OVERHEAD + (0 if turn.buffer.num_turns else len(turn.buffer.ids))
        return [self._release(turn)] if turn.request_id is not None else []

    def _release(self, turn: KnownTurn) -> str:
        request_id = turn.request_id
        assert request_id is not None, "the turn holds no context"
        turn.request_id = None
        self._held.pop(request_id, None)
        return request_id


def digests_of(
    salt: str,
    settings: Mapping[str, Any],
    messages: Sequence[Mapping[str, Any]],
) -> list[Digest]:
    """A digest for each beginning of a conversation: of nothing, of the first message, of the first two, and so on.

    `settings` are what else the prompt depends on: tools, arguments of the template.
    """
    return list(_digests(salt, settings, messages))


def _digests(salt: str, settings: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> Iterator[Digest]:
    digest = blake2b(_bytes([salt, settings]), digest_size=16).digest()
    yield digest
    for message in messages:
        digest = extend_digest(digest, message)
        yield digest


def extend_digest(digest: Digest, message: Mapping[str, Any]) -> Digest:
    """The digest of a conversation with one more message."""
    return blake2b(digest + _bytes(_canonical(message)), digest_size=16).digest()


def _canonical(message: Mapping[str, Any]) -> list[Any]:
    """What makes a message another one, in one form: clients send null for "", and write the same JSON differently."""
    role, content = message.get("role"), message.get("content")
    calls = message.get("tool_calls") or ()
    text = _text(content)
    return [
        role,
        text.strip() if role == "assistant" and isinstance(text, str) else text,
        [_call(call) for call in calls],
        message.get("tool_call_id"),
        message.get("name") if role != "tool" else None,
    ]


def _text(content: Any) -> Any:
    if content is None:
        return ""
    if isinstance(content, list | tuple):
        texts: list[Any] = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        return "\n".join(texts) if all(isinstance(text, str) for text in texts) else list(content)
    return content


def _call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return call
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):  # what a model once wrote stays text
            arguments = json.loads(arguments) if arguments.strip() else {}
    return [call.get("id"), function.get("name"), arguments]


def _bytes(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=repr).encode("utf-8", "surrogatepass")
