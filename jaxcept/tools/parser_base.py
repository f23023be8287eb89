"""What the incremental parsers share: a state that eats text, the call under way, content apart from calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxcept.tools.call_json import CallTextError, guess_name, load_json, read_call
from jaxcept.tools.calls import CountedIds, MakeId, MalformedCall, ParsedCall, ToolCall
from jaxcept.tools.scan import BracketScanner, held_back

State = Callable[[str, int], int]
NOT_CLOSED = "the call is not closed"


class MarkupParser:
    """A parser as a state machine. A state takes (text, start) and returns how far it read.

    A state that returns `start` and stays the state waits for more text; what it leaves unread is kept, so it must be
    short, or the parser is no longer linear. Text of a call goes to `_raw`, other text to `_content`.
    """

    markers: tuple[str, ...] = ()
    quotes = '"'

    def __init__(self, make_id: MakeId | None = None) -> None:
        self._make_id = make_id if make_id is not None else CountedIds()
        self._used_ids: set[str] = set()
        self.begin_turn()

    def begin_turn(self) -> None:
        """Forget the text so far: what follows is the beginning of an assistant's turn. Ids go on counting."""
        self._unread = ""
        self._content: list[str] = []
        self._found: list[ParsedCall] = []
        self._reset_call()
        self._state: State = self._start

    def feed(self, text: str) -> list[ParsedCall]:
        """Take more of the model's text; the calls that it completes, in order."""
        text = self._unread + text
        at = 0
        while at < len(text):
            state = self._state
            reached = state(text, at)
            if reached == at and self._state == state:
                break
            at = reached
        self._unread = text[at:]
        return self._take_found()

    def finish(self) -> list[ParsedCall]:
        """End the turn: calls that the end completes, or that are not closed. The parser is ready for the next turn."""
        self._raw.append(self._unread)
        self._unread = ""
        self._end()
        content, found = self._content, self._take_found()
        self.begin_turn()
        self._content = content
        return found

    def take_content(self) -> str:
        """Text that belongs to no call, as far as it is certain, since the last time."""
        content, self._content = "".join(self._content), []
        return content

    @property
    def open_body(self) -> Sequence[str]:
        """The bracketed value of the call under way, in pieces, as far as it is read: empty where there is none."""
        return self._body_text

    def _start(self, text: str, at: int) -> int:
        raise NotImplementedError

    def _text(self, text: str, at: int) -> int:
        raise NotImplementedError

    def _end(self) -> None:
        """Settle what the last state left, all of it in `_raw`."""
        raise NotImplementedError

    def _reset_call(self) -> None:
        self._raw: list[str] = []
        self._body_text: list[str] = []
        self._scanner = BracketScanner(self.quotes)

    def _take_found(self) -> list[ParsedCall]:
        found, self._found = self._found, []
        return found

    def _skip_space(self, text: str, at: int, also: str = "") -> int:
        """Moves white space into the call's text; the index of the first character that is none."""
        end = at
        while end < len(text) and (text[end].isspace() or text[end] in also):
            end += 1
        self._raw.append(text[at:end])
        return end

    def _text_until(self, text: str, at: int, marker: str) -> int:
        """Reads content up to a marker and over it, which begins a call's text; `_raw` tells whether it was found."""
        found = text.find(marker, at)
        if found >= 0:
            self._content.append(text[at:found])
            self._raw.append(marker)
            return found + len(marker)
        end = len(text) - held_back(text, (marker,), at)
        self._content.append(text[at:end])
        return end

    def _scan_body(self, text: str, at: int, foreign: str = "<") -> tuple[int, bool]:
        """Reads on in the bracketed value under way: (how far, whether it ended or broke)."""
        if not self._body_text:
            self._scanner = BracketScanner(self.quotes, foreign)
        end = self._scanner.scan(text, at)
        piece = text[at:end]
        self._raw.append(piece)
        self._body_text.append(piece)
        return (len(text), False) if end is None else (end, True)

    def _raw_to_content(self) -> None:
        self._content.extend(self._raw)
        self._reset_call()

    def _next_id(self, given: Any = None) -> str:
        """The id that the model wrote, if it is one that it did not write before; otherwise one of ours."""
        if isinstance(given, str) and 0 < len(given) <= 64 and given.isalnum() and given not in self._used_ids:
            made = given
        else:
            made = self._make_id()
            while made in self._used_ids:
                made = self._make_id()
        self._used_ids.add(made)
        return made

    def _add_malformed(self, raw: str, reason: str, name: str = "") -> None:
        self._found.append(MalformedCall(self._next_id(), name or guess_name(raw), raw, reason))

    def _add_value(self, value: Any, raw: str) -> None:
        """Adds the call that a decoded JSON value is."""
        try:
            name, arguments = read_call(value)
        except CallTextError as error:
            self._add_malformed(raw, str(error))
            return
        given = value.get("id") if isinstance(value, dict) else None
        self._found.append(ToolCall(self._next_id(given), name, arguments, raw))

    def _add_body(self) -> None:
        """Adds the call whose JSON was scanned to its end, and begins anew."""
        raw, body, deepest = "".join(self._raw), "".join(self._body_text), self._scanner.deepest
        self._reset_call()
        try:
            value = load_json(body, deepest)
        except CallTextError as error:
            self._add_malformed(raw, str(error))
            return
        self._add_value(value, raw)
