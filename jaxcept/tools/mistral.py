"""Calls as Mistral models write them: [TOOL_CALLS][{"name": …, "arguments": …}, …], or [TOOL_CALLS]name[ARGS]{…}."""

from __future__ import annotations

import re

from jaxcept.tools.call_json import CallTextError, load_json
from jaxcept.tools.parser_base import NOT_CLOSED, MarkupParser

MARKER = "[TOOL_CALLS]"
_MAX_HEAD_CHARS = 400
_HEAD = re.compile(r"([A-Za-z0-9_.:/-]{1,256})\s*(?:\[CALL_ID\]([A-Za-z0-9]{1,64}))?\s*(?:\[ARGS\])?\s*")


class MistralParser(MarkupParser):
    """The calls of an array are complete together, at its end; a named call at the end of its object."""

    markers = (MARKER, "[CALL_ID]", "[ARGS]")

    def begin_turn(self) -> None:
        """See MarkupParser.begin_turn."""
        self._head: tuple[str, str | None] | None = None
        super().begin_turn()

    def _start(self, text: str, at: int) -> int:
        return self._text(text, at)

    def _text(self, text: str, at: int) -> int:
        at = self._text_until(text, at, MARKER)
        self._state = self._lead if self._raw else self._text
        return at

    def _lead(self, text: str, at: int) -> int:
        at = self._skip_space(text, at)
        if at == len(text):
            return at
        self._head = None
        if text.startswith(MARKER, at):
            self._raw_to_content()
            self._state = self._text
        elif text[at] in "[{" and not MARKER.startswith(text[at : at + len(MARKER)]):
            self._state = self._body
        elif text[at] != "[":
            self._state = self._name
        return at

    def _name(self, text: str, at: int) -> int:
        """Over name, call id and [ARGS], left unread until the object begins or it is clear that none does."""
        brace = text.find("{", at, at + _MAX_HEAD_CHARS)
        if brace < 0 and len(text) - at < _MAX_HEAD_CHARS and MARKER not in text[at:]:
            return at
        head = _HEAD.fullmatch(text, at, brace) if brace >= 0 else None
        if head is None:
            self._raw_to_content()
            self._state = self._text
            return at
        self._head = (head[1], head[2])
        self._raw.append(head[0])
        self._state = self._body
        return brace

    def _body(self, text: str, at: int) -> int:
        at, is_over = self._scan_body(text, at)
        if is_over:
            if self._scanner.is_broken:
                self._add_malformed("".join(self._raw), "the JSON breaks off", self._head[0] if self._head else "")
                self._reset_call()
            else:
                self._add_block()
            self._state = self._text
        return at

    def _add_block(self) -> None:
        raw, body, deepest = "".join(self._raw), "".join(self._body_text), self._scanner.deepest
        self._reset_call()
        try:
            value = load_json(body, deepest)
        except CallTextError as error:
            self._add_malformed(raw, str(error), self._head[0] if self._head else "")
            return
        if self._head is not None:
            name, given = self._head
            self._add_value({"name": name, "arguments": value, "id": given}, raw)
        elif isinstance(value, list) and value:
            for item in value:
                self._add_value(item, raw)
        else:
            self._add_value(value, raw)

    def _end(self) -> None:
        if self._state == self._body:
            self._add_malformed("".join(self._raw), NOT_CLOSED, self._head[0] if self._head else "")
        else:
            self._raw_to_content()
