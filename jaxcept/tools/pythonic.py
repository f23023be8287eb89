"""Calls as Llama 4 and some Llama 3.2 models write them: [f(a=1), g(b="x")] as the whole turn."""

from __future__ import annotations

import re

from jaxcept.tools.call_json import MAX_NAME_CHARS, CallTextError
from jaxcept.tools.calls import ToolCall
from jaxcept.tools.parser_base import NOT_CLOSED, MarkupParser
from jaxcept.tools.python_calls import read_python_calls

OPEN, CLOSE = "<|python_start|>", "<|python_end|>"
_CALL = re.compile(r"([A-Za-z_][A-Za-z0-9_.]*)\s*\(")


class PythonicParser(MarkupParser):
    """A list of calls at the beginning of a turn, or after <|python_start|>; complete together, at its end."""

    markers = (OPEN, CLOSE)
    quotes = "'\""

    def _start(self, text: str, at: int) -> int:
        at = self._skip_space(text, at)
        if at == len(text):
            return at
        if text[at] == "[":
            self._scan_body("[", 0, foreign="")
            self._state = self._call
            return at + 1
        if text.startswith(OPEN, at):
            self._raw.append(OPEN)
            self._state = self._lead
            return at + len(OPEN)
        if not OPEN.startswith(text[at : at + len(OPEN)]):
            self._raw_to_content()
            self._state = self._text
        return at

    def _text(self, text: str, at: int) -> int:
        at = self._text_until(text, at, OPEN)
        self._state = self._lead if self._raw else self._text
        return at

    def _lead(self, text: str, at: int) -> int:
        at = self._skip_space(text, at)
        if at == len(text):
            return at
        if text[at] != "[":
            self._raw_to_content()
            self._state = self._text
            return at
        self._scan_body("[", 0, foreign="")
        self._state = self._call
        return at + 1

    def _call(self, text: str, at: int) -> int:
        """Behind the bracket: a name and a parenthesis make it calls. What is not certain is left unread."""
        end = self._skip_space(text, at)
        self._body_text.append(text[at:end])
        if _CALL.match(text, end, end + MAX_NAME_CHARS):
            self._state = self._body
        elif end < len(text) and (
            len(text) - end >= MAX_NAME_CHARS or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.]*\s*", text[end:])
        ):
            self._raw_to_content()
            self._state = self._text
        return end

    def _body(self, text: str, at: int) -> int:
        at, is_over = self._scan_body(text, at, foreign="")
        if is_over:
            self._add_calls()
            self._state = self._after
        return at

    def _after(self, text: str, at: int) -> int:
        """Behind the list: the closing marker, if there is one, belongs to it."""
        at = self._skip_space(text, at)
        if text.startswith(CLOSE, at):
            self._reset_call()
            self._state = self._text
            return at + len(CLOSE)
        if at < len(text) and not CLOSE.startswith(text[at : at + len(CLOSE)]):
            self._raw_to_content()
            self._state = self._text
        return at

    def _add_calls(self) -> None:
        raw, body = "".join(self._raw), "".join(self._body_text)
        self._reset_call()
        try:
            calls = read_python_calls(body)
        except CallTextError as error:
            self._report(raw, str(error))
            return
        self._found.extend(ToolCall(self._next_id(), name, arguments, raw) for name, arguments in calls)

    def _report(self, raw: str, reason: str) -> None:
        found = _CALL.search(raw)
        self._add_malformed(raw, reason, found[1] if found else "")

    def _end(self) -> None:
        if self._state == self._body:
            self._report("".join(self._raw), NOT_CLOSED)
        else:
            self._raw_to_content()
