"""Stop strings in text that arrives in pieces: what may be shown, what may yet become a stop string, what was found."""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from typing import NamedTuple


class StopDelta(NamedTuple):
    """Text that may be shown, and the stop string that ended it, if one did."""

    text: str
    stop: str | None


class StopStrings:
    """Finds the stop string that is complete first; of several that end at one place, the longest.

    Text that may be the beginning of a stop string is held back until it is known. With `include` the stop string
    belongs to the text, and nothing is held back. The search is that of Knuth, Morris and Pratt (1977), side by side
    for all stop strings: linear in the text, four bytes per character of them. Raises ValueError on an empty one.
    """

    __slots__ = ("_fails", "_first", "_held", "_include", "_is_stopped", "_matched", "_most", "_stops")

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        if isinstance(stops, str) or not all(isinstance(stop, str) and stop for stop in stops):
            raise ValueError(f"stops={stops!r}: expected a sequence of strings that are not empty")
        self._include = include
        self._is_stopped = False
        self._held = ""
        self._stops = sorted(set(stops), key=lambda stop: (-len(stop), stop))
        self._fails = [_borders(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)  # per stop string, how much of it the text ends with
        self._most = 0
        firsts = sorted({stop[0] for stop in self._stops})
        self._first = re.compile("[" + "".join(map(re.escape, firsts)) + "]") if firsts else None

    def push(self, text: str) -> StopDelta:
        """Take more text. After a stop string nothing more is shown."""
        if self._is_stopped:
            return StopDelta("", None)
        if self._first is None or not (self._most or self._first.search(text)):
            return StopDelta(text, None)
        return self._search(text, self._first)

    def flush(self) -> str:
        """The text held back, which no more text follows. The search begins anew."""
        held, self._held, self._most = self._held, "", 0
        self._matched = [0] * len(self._stops)
        return held

    def _search(self, text: str, first: re.Pattern[str]) -> StopDelta:
        at, length = 0, len(text)
        while at < length:
            if not self._most:
                start = first.search(text, at)
                if start is None:
                    break
                at = start.start()
            stop = self._step(text[at])
            at += 1
            if stop is not None:
                return self._stop(text[:at], stop)
        if self._include:
            return StopDelta(text, None)
        text = self._held + text
        keep = len(text) - self._most
        self._held = text[keep:]
        return StopDelta(text[:keep], None)

    def _step(self, char: str) -> str | None:
        """Moves all searches on by one character; the longest stop string that it completes."""
        matched, most = self._matched, 0
        for i, stop in enumerate(self._stops):
            count = matched[i]
            while count and stop[count] != char:
                count = self._fails[i][count - 1]
            if stop[count] == char:
                count += 1
                if count == len(stop):
                    return stop
            matched[i] = count
            most = max(most, count)
        self._most = most
        return None

    def _stop(self, text: str, stop: str) -> StopDelta:
        self._is_stopped = True
        shown = self._held + text
        self._held = ""
        return StopDelta(shown if self._include else shown[: len(shown) - len(stop)], stop)


def _borders(stop: str) -> array[int]:
    """Per prefix, the length of its longest proper prefix that is also its suffix."""
    borders = array("I", bytes(4 * len(stop)))
    count = 0
    for i in range(1, len(stop)):
        while count and stop[i] != stop[count]:
            count = borders[count - 1]
        if stop[i] == stop[count]:
            count += 1
        borders[i] = count
    return borders
