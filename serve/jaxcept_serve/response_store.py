"""Stored responses: what /v1/responses keeps of each, bounded in count, bytes and time, each caller's own."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec


@dataclass(slots=True)
class StoredResponse:
    """One response with what made it. `messages` are the whole conversation behind it, without instructions.

    `num_bytes` counts what this response alone adds: the messages before it are shared with those that it follows.
    """

    response: dict[str, Any]
    input_items: Sequence[Mapping[str, Any]]
    messages: tuple[Mapping[str, Any], ...]
    conversation: str
    prompt: Any = None  # what a later response's prompt is compared with
    cancel: Callable[[], None] | None = field(default=None, repr=False)
    num_bytes: int = 0
    stored_at: float = 0.0

    @property
    def response_id(self) -> str:
        """The id of the response."""
        return str(self.response["id"])


class ResponseStore:
    """Responses by (caller's salt, id). A full store drops the oldest of the caller who holds the most bytes."""

    def __init__(
        self,
        max_responses: int = 4096,
        max_bytes: int = 256 * 2**20,
        ttl_s: float = 24 * 3600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if max_responses < 1 or max_bytes < 1 or not ttl_s > 0:
            raise ValueError(f"response store of {max_responses} responses, {max_bytes} bytes, {ttl_s} s: expected 1+")
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._clock = clock
        self._by_caller: dict[str, OrderedDict[str, StoredResponse]] = {}  # oldest first
        self._items: dict[tuple[str, str], Mapping[str, Any]] = {}
        self._bytes: dict[str, int] = {}

    def __len__(self) -> int:
        return sum(len(stored) for stored in self._by_caller.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of everything that is kept, as JSON."""
        return sum(self._bytes.values())

    def put(self, salt: str, stored: StoredResponse, own_messages: Sequence[Mapping[str, Any]] = ()) -> None:
        """Keeps a response, in the place of one with its id; `own_messages` are those that it added."""
        self.delete(salt, stored.response_id)
        stored.stored_at = self._clock()
        stored.num_bytes = _num_bytes([stored.response, stored.input_items, own_messages])
        self._by_caller.setdefault(salt, OrderedDict())[stored.response_id] = stored
        self._bytes[salt] = self._bytes.get(salt, 0) + stored.num_bytes
        for item in _items(stored):
            self._items[salt, item["id"]] = item
        self._trim()

    def get(self, salt: str, response_id: str) -> StoredResponse | None:
        """The response, None where this caller has none of that id."""
        self._expire()
        return self._of(salt).get(response_id)

    def item(self, salt: str, item_id: str) -> Mapping[str, Any] | None:
        """An input or output item of the caller's responses."""
        self._expire()
        return self._items.get((salt, item_id))

    def delete(self, salt: str, response_id: str) -> bool:
        """Forgets a response; whether there was one."""
        stored = self._of(salt).pop(response_id, None)
        if stored is None:
            return False
        for item in _items(stored):
            if self._items.get((salt, item["id"])) is item:  # ids of input items are the client's
                del self._items[salt, item["id"]]
        self._bytes[salt] -= stored.num_bytes
        if not self._by_caller[salt]:
            del self._by_caller[salt], self._bytes[salt]
        return True

    def check(self) -> None:
        """Asserts that counts and bytes add up and stay within bounds."""
        for salt, stored in self._by_caller.items():
            assert self._bytes[salt] == sum(entry.num_bytes for entry in stored.values()), "bytes of a caller add up"
        assert self._bytes.keys() == self._by_caller.keys(), "nobody is counted who holds nothing"
        assert len(self) <= self._max_responses and self.num_bytes <= self._max_bytes, "the store is within bounds"

    def _of(self, salt: str) -> OrderedDict[str, StoredResponse]:
        return self._by_caller.get(salt) or OrderedDict()

    def _trim(self) -> None:
        self._expire()
        while self._by_caller and (len(self) > self._max_responses or self.num_bytes > self._max_bytes):
            heaviest = max(self._bytes, key=lambda salt: self._bytes[salt])
            self.delete(heaviest, next(iter(self._by_caller[heaviest])))

    def _expire(self) -> None:
        horizon = self._clock() - self._ttl_s
        for salt in list(self._by_caller):
            while (stored := self._by_caller.get(salt)) and next(iter(stored.values())).stored_at < horizon:
                self.delete(salt, next(iter(stored)))


def _items(stored: StoredResponse) -> list[Mapping[str, Any]]:
    return [item for item in (*stored.input_items, *stored.response["output"]) if "id" in item]


def _num_bytes(value: Any) -> int:
    return len(msgspec.json.encode(value))
