"""Why a prompt did not go on from an earlier one: the first part that differs, told by digests of both."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import msgspec

ChangedPart = Literal["model", "key", "tools", "text_format", "system", "messages"]

GIVEN_UP = "the prompt goes on from it, but its context was given up: memory was short, or its hold over"
_WIDTH = 8  # bytes of a message's digest


@dataclass(frozen=True, slots=True)
class PromptDigest:
    """A prompt's parts as digests: enough to name what differs, nothing of what was said.

    `system` and `messages` are digests of messages in a row, `_WIDTH` bytes each; `system` are the leading ones.
    """

    model: str
    key: str | None
    tools: bytes
    text_format: bytes
    system: bytes
    messages: bytes

    @classmethod
    def of(
        cls,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        model: str = "",
        key: str | None = None,
        text_format: Any = None,
    ) -> PromptDigest:
        """The digest of a turn's messages and tools."""
        num_system = next((i for i, message in enumerate(messages) if message.get("role") != "system"), len(messages))
        system, rest = messages[:num_system], messages[num_system:]
        return cls(model, key, _digest(list(tools)), _digest(text_format), _digests(system), _digests(rest))

    def followed_by(self, messages: Sequence[Mapping[str, Any]]) -> PromptDigest:
        """This prompt with what was answered to it."""
        return replace(self, messages=self.messages + _digests(messages))


def first_change(before: PromptDigest, after: PromptDigest) -> tuple[ChangedPart, int | None] | None:
    """The first part of `after` that does not go on from `before`, with the index of a message; None if it does.

    The index counts messages behind the system's leading ones.
    """
    parts: tuple[ChangedPart, ...] = ("model", "key", "tools", "text_format", "system")
    for part in parts:
        if getattr(before, part) != getattr(after, part):
            return part, None
    for at in range(0, len(before.messages), _WIDTH):
        if before.messages[at : at + _WIDTH] != after.messages[at : at + _WIDTH]:
            return "messages", at // _WIDTH
    return None


class DigestBook:
    """The digests of the last answers by (caller's salt, id of the answer), bounded in count and bytes."""

    def __init__(self, max_entries: int = 4096, max_bytes: int = 16 * 2**20) -> None:
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._digests: OrderedDict[tuple[str, str], PromptDigest] = OrderedDict()

    def put(self, salt: str, answer_id: str, digest: PromptDigest) -> None:
        """Keeps a digest, and forgets the oldest where there are too many."""
        self._digests[salt, answer_id] = digest
        self._num_bytes += len(digest.messages)
        while len(self._digests) > self._max_entries or self._num_bytes > self._max_bytes:
            _, oldest = self._digests.popitem(last=False)
            self._num_bytes -= len(oldest.messages)

    def get(self, salt: str, answer_id: str) -> PromptDigest | None:
        """The digest of an answer, None where it is not known to this caller."""
        return self._digests.get((salt, answer_id))


def _digest(value: Any) -> bytes:
    return hashlib.blake2b(msgspec.json.encode(value), digest_size=_WIDTH).digest()


def _digests(messages: Sequence[Mapping[str, Any]]) -> bytes:
    return b"".join(_digest(message) for message in messages)
