"""Calls as Llama 3 writes them: {"name": …, "parameters": {…}} as the whole turn, several separated by semicolons."""

from __future__ import annotations

from typing import Any

from jaxcept.tools.call_json import CallTextError, load_json
from jaxcept.tools.parser_base import NOT_CLOSED, MarkupParser

TAG = "<|python_tag|>"
_KEYS = ('"name"', '"parameters"', '"arguments"', '"type"', '"function"', '"id"')
_MAX_KEY_CHARS = max(map(len, _KEYS))


class Llama3JsonParser(MarkupParser):
    """JSON at the beginning of a turn, or anywhere after <|python_tag|>.

    Without the tag, JSON is a call only if it has a name and parameters: otherwise it is the model's answer.
    """

    markers = (TAG,)

    def begin_turn(self) -> None:
        """See MarkupParser.begin_turn."""
        self._is_tagged = False
        super().begin_turn()

    def _start(self, text: str, at: int) -> int:
        return self._between(text, at, "")

    def _after(self, text: str, at: int) -> int:
        """Behind a call, where another may follow."""
        return self._between(text, at, ";")

    def _between(self, text: str, at: int, separators: str) -> int:
        at = self._skip_space(text, at, separators)
        if at == len(text):
            return at
        if text[at] == "{":
            self._state = self._body if self._is_tagged else self._brace
        elif text.startswith(TAG, at):
            self._raw.append(TAG)
            self._is_tagged = True
            self._state = self._lead
            return at + len(TAG)
        elif not TAG.startswith(text[at : at + len(TAG)]):
            self._raw_to_content()
            self._state = self._text
        return at

    def _text(self, text: str, at: int) -> int:
        at = self._text_until(text, at, TAG)
        if self._raw:
            self._is_tagged = True
            self._state = self._lead
        return at

    def _lead(self, text: str, at: int) -> int:
        at = self._skip_space(text, at)
        if at < len(text):
            self._state = self._body
            if text[at] != "{":  # code for an interpreter, not a call
                self._raw_to_content()
                self._state = self._text
        return at

    def _brace(self, text: str, at: int) -> int:
        """Over the opening brace: the first key says whether to hold the text back."""
        self._scan_body(text[at], 0)
        self._state = self._key
        return at + 1

    def _key(self, text: str, at: int) -> int:
        end = self._skip_space(text, at)
        self._body_text.append(text[at:end])
        key = text[end : end + _MAX_KEY_CHARS]
        if any(key.startswith(known) for known in _KEYS):
            self._state = self._body
        elif key and not any(known.startswith(key) for known in _KEYS):
            self._raw_to_content()
            self._state = self._text
        return end

    def _body(self, text: str, at: int) -> int:
        at, is_over = self._scan_body(text, at)
        if not is_over:
            return at
        self._state = self._after
        if self._scanner.is_broken:
            self._drop("the JSON breaks off")
            self._state = self._text
        elif self._is_tagged:
            self._add_body()
        elif not self._add_bare():
            self._state = self._text
        return at

    def _add_bare(self) -> bool:
        """Adds a call without tag; JSON that is none is content."""
        body = "".join(self._body_text)
        try:
            value = load_json(body, self._scanner.deepest)
        except CallTextError as error:
            return self._drop(str(error))
        if not _is_call(value):
            self._raw_to_content()
            return False
        raw = "".join(self._raw)
        self._reset_call()
        self._add_value(value, raw)
        return True

    def _drop(self, reason: str) -> bool:
        """Reports the text of a call that cannot be read; if it is not certain to be one, it is content."""
        raw = "".join(self._raw)
        is_call = self._is_tagged or ('"name"' in raw and ('"parameters"' in raw or '"arguments"' in raw))
        if is_call:
            self._add_malformed(raw, reason)
            self._reset_call()
        else:
            self._raw_to_content()
        return is_call

    def _end(self) -> None:
        if self._state in (self._body, self._key):
            self._drop(NOT_CLOSED)
        else:
            self._raw_to_content()


def _is_call(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    inner = value.get("function")
    call = inner if isinstance(inner, dict) else value
    return isinstance(call.get("name"), str) and ("parameters" in call or "arguments" in call)
