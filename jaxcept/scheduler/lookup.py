"""What followed the last tokens of a sequence where they stood before."""

from __future__ import annotations

from array import array

MAX_SEARCHED = 1 << 16  # tokens, the latest ones
_BYTES = 4  # of a token id


class Lookup:
    """One sequence's tokens as bytes, which are searched faster than a list, and how well its guesses went."""

    __slots__ = ("_ids", "width")

    def __init__(self) -> None:
        self._ids = bytearray()
        self.width = 4  # of the next guess: two more than twice what was right last time

    def guess(self, token_ids: list[int], longest: int, shortest: int, limit: int) -> tuple[int, ...]:
        """At most `limit` tokens: what came after the last `longest` ones, or fewer, where they stood last before."""
        ids, limit = self._ids, min(limit, self.width)
        ids += array("I", token_ids[len(ids) // _BYTES :]).tobytes()
        first = max(0, len(ids) - _BYTES * MAX_SEARCHED)
        for size in range(min(longest, len(token_ids) - 1), shortest - 1, -1):
            begin = _rfind(ids, ids[-_BYTES * size :], first)
            if begin is not None:
                after = begin + _BYTES * size
                return tuple(array("I", bytes(ids[after : after + _BYTES * limit])))
        return ()

    def learn(self, num_right: int, most: int) -> None:
        """So many of the last guess were right."""
        self.width = min(most, 2 * num_right + 2)


def _rfind(ids: bytearray, pattern: bytearray, first: int) -> int | None:
    """Where the pattern begins last, but for the end itself: a whole number of ids behind the begin."""
    end = len(ids) - 1
    while (begin := ids.rfind(pattern, first, end)) >= 0:
        if begin % _BYTES == 0:
            return begin
        end = begin + len(pattern) - 1
    return None
