"""Incremental search in text that arrives in pieces: a marker's first place, and the end of a bracketed value."""

from __future__ import annotations

import re

MAX_NESTING = 128


def held_back(text: str, markers: tuple[str, ...], start: int = 0) -> int:
    """How many characters at the end of text[start:] may be the beginning of a marker."""
    most = 0
    for marker in markers:
        at = text.find(marker[0], max(start, len(text) - len(marker) + 1))
        while at >= 0 and not marker.startswith(text[at:]):
            at = text.find(marker[0], at + 1)
        if at >= 0:
            most = max(most, len(text) - at)
    return most


class BracketScanner:
    """Finds where a value that starts with a bracket ends. Each character is looked at once, however it arrives.

    Brackets of all kinds count alike: whether they match is for the parser of the whole text to say. Characters of
    `foreign` cannot stand outside a string; meeting one ends the scan with `is_broken` set.
    """

    __slots__ = ("_escaped", "_inside", "_outside", "_quote", "deepest", "depth", "is_broken")

    def __init__(self, quotes: str = '"', foreign: str = "") -> None:
        self._outside = re.compile(f"[{re.escape(quotes + foreign)}(){{}}\\[\\]]")
        self._inside = {quote: re.compile(f"[\\\\{quote}]") for quote in quotes}
        self._quote = ""
        self._escaped = False
        self.depth = 0
        self.deepest = 0
        self.is_broken = False

    @property
    def is_in_string(self) -> bool:
        """Whether the text so far ends inside a string."""
        return bool(self._quote)

    def scan(self, text: str, start: int = 0) -> int | None:
        """Goes on from text[start]; the index after the value's end, or of the foreign character; None if not yet."""
        at = start
        while at < len(text):
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            found = (self._inside[self._quote] if self._quote else self._outside).search(text, at)
            if found is None:
                return None
            char, at = found[0], found.end()
            if self._quote:
                self._escaped = char == "\\"
                if char == self._quote:
                    self._quote = ""
            elif char in "([{":
                self.depth += 1
                self.deepest = max(self.deepest, self.depth)
            elif char in ")]}":
                self.depth -= 1
                if self.depth <= 0:
                    return at
            elif char in self._inside:
                self._quote = char
            else:
                self.is_broken = True
                return found.start()
        return None


def nesting(text: str) -> int:
    """The deepest nesting of brackets in a JSON text."""
    scanner, deepest, at = BracketScanner(), 0, 0
    while (end := scanner.scan(text, at)) is not None:
        deepest, at = max(deepest, scanner.deepest), end
        scanner = BracketScanner()
    return max(deepest, scanner.deepest)
