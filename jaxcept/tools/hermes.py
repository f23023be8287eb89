"""Calls as Hermes and Qwen write them: <tool_call>{"name": …, "arguments": {…}}</tool_call>, anywhere in the text."""

from __future__ import annotations

import re

from jaxcept.tools.call_json import CallTextError, load_json
from jaxcept.tools.parser_base import NOT_CLOSED, MarkupParser
from jaxcept.tools.scan import held_back

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_TAG = re.compile("</?tool_call>")


class HermesParser(MarkupParser):
    """One call per <tool_call> block; complete at its closing tag, which may also stand inside a JSON string."""

    markers = (OPEN, CLOSE)

    def begin_turn(self) -> None:
        """See MarkupParser.begin_turn."""
        self._reason = ""
        super().begin_turn()

    def _start(self, text: str, at: int) -> int:
        return self._text(text, at)

    def _text(self, text: str, at: int) -> int:
        at = self._text_until(text, at, OPEN)
        self._state = self._lead if self._raw else self._text
        return at

    def _lead(self, text: str, at: int) -> int:
        at = self._skip_space(text, at)
        if at < len(text):
            self._reason = ""  # no JSON was begun: this may be prose about the tag
            self._state = self._body if text[at] == "{" else self._skip
        return at

    def _body(self, text: str, at: int) -> int:
        at, is_over = self._scan_body(text, at)
        if is_over:
            self._reason = "the JSON breaks off"
            self._state = self._skip if self._scanner.is_broken else self._tail
        return at

    def _tail(self, text: str, at: int) -> int:
        at = self._skip_space(text, at)
        if text.startswith(CLOSE, at):
            self._raw.append(CLOSE)
            self._add_body()
            self._state = self._text
            return at + len(CLOSE)
        if at < len(text) and not CLOSE.startswith(text[at : at + len(CLOSE)]):
            self._reason = f"after the JSON comes something else than {CLOSE}"
            self._state = self._skip
        return at

    def _skip(self, text: str, at: int) -> int:
        """Over a block that is no call, to its closing tag or the next opening one."""
        found = _TAG.search(text, at)
        if found is None:
            end = len(text) - held_back(text, self.markers, at)
            self._raw.append(text[at:end])
            return end
        if found[0] == CLOSE:
            self._raw.append(text[at : found.end()])
            self._add_malformed("".join(self._raw), self._reason or f"{OPEN} must be followed by a JSON object")
            self._reset_call()
            self._state = self._text
        else:
            self._raw.append(text[at : found.start()])
            self._drop_block()
            self._raw.append(OPEN)
            self._state = self._lead
        return found.end()

    def _drop_block(self) -> None:
        """Ends a block that is no call and has no closing tag."""
        if self._reason:
            self._add_malformed("".join(self._raw), self._reason)
            self._reset_call()
        else:
            self._raw_to_content()

    def _end(self) -> None:
        if self._state in (self._start, self._text):
            self._raw_to_content()
        elif self._state == self._skip:
            self._drop_block()
        elif self._state == self._tail:
            self._add_body()
        else:
            self._recover("".join(self._raw))

    def _recover(self, raw: str) -> None:
        """An open string has swallowed the text to the end of the turn: read it block by block, tags first."""
        for block in raw.split(OPEN)[1:]:
            body, closed, rest = block.partition(CLOSE)
            text = OPEN + body + closed
            try:
                if not closed:
                    raise CallTextError(NOT_CLOSED)
                self._add_value(load_json(body), text)
            except CallTextError as error:
                self._add_malformed(text, str(error))
            self._content.append(rest)
