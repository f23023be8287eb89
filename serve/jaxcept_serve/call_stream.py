"""One completion's text taken apart as it comes: what is said, and calls in pieces."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from jaxcept.tools.calls import ParsedCall, ToolCall
from jaxcept.tools.parsers import ToolCallParser
from jaxcept_serve.turns import CallDelta, FullCall

# What stands before the arguments where a call is an object that names its tool first.
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_MAX_HEAD = 4096


class CallStream:
    """Splits what one completion writes, turn by turn. `make_id` names calls; `is_server` tells whose tool it is."""

    def __init__(
        self, parser: ToolCallParser, index: int, make_id: Callable[[], str], is_server: Callable[[str], bool]
    ) -> None:
        self._parser = parser
        self._index = index
        self._make_id = make_id
        self._is_server = is_server
        self._open: _OpenCall | None = None
        self.calls: list[FullCall] = []
        self.ids: dict[str, str] = {}  # the client's name of a call by the parser's

    def feed(self, text: str) -> tuple[str, list[CallDelta]]:
        """Takes text; what is said in it, and pieces of calls."""
        found = self._parser.feed(text)
        pieces = [piece for call in found for piece in self._complete(call)]
        pieces += self._go_on()
        return self._parser.take_content(), pieces

    def end_turn(self) -> tuple[str, list[CallDelta]]:
        """The turn is over; what was held back."""
        found = self._parser.finish()
        pieces = [piece for call in found for piece in self._complete(call)]
        self._open = None
        return self._parser.take_content(), pieces

    def begin_turn(self) -> None:
        """After an answer: what follows is a new turn."""
        self._parser.begin_turn()
        self._open = None

    def _go_on(self) -> Iterator[CallDelta]:
        """What is new of the arguments of the call under way."""
        body = self._parser.open_body
        if not body:
            return
        if self._open is None:
            self._open = _OpenCall()
        arguments = self._open.read(body)
        if self._open.name is None:
            return
        if self._open.call_id is None:
            self._open.call_id = self._make_id()
            yield self._delta(self._open.call_id, self._open.name, arguments)
        elif arguments:
            yield self._delta(self._open.call_id, None, arguments, self._open.name)

    def _complete(self, call: ParsedCall) -> Iterator[CallDelta]:
        opened, self._open = self._open, None
        if not isinstance(call, ToolCall):
            if opened is not None and opened.call_id is not None:  # a part of it was told already
                self._add(call, opened.call_id, opened.sent)
            return
        if opened is None or opened.call_id is None or opened.name != call.name:
            call_id, arguments = self._make_id(), json.dumps(dict(call.arguments), ensure_ascii=False)
            self._add(call, call_id, arguments)
            yield self._delta(call_id, call.name, arguments, number=len(self.calls) - 1)
            return
        rest = opened.rest_of(call.raw)
        self._add(call, opened.call_id, opened.sent)
        if rest:
            yield self._delta(opened.call_id, None, rest, call.name, number=len(self.calls) - 1)

    def _add(self, call: ParsedCall, call_id: str, arguments: str) -> None:
        self.ids[call.id] = call_id
        self.calls.append(FullCall(call_id, call.name, arguments, self._is_server(call.name)))

    def _delta(
        self, call_id: str, name: str | None, arguments: str, tool: str | None = None, number: int | None = None
    ) -> CallDelta:
        at = len(self.calls) if number is None else number
        return CallDelta(self._index, at, call_id, name, arguments, self._is_server(name or tool or ""))


class _OpenCall:
    """A call that is being written: {"name": …, "arguments": {…}}, as far as it has come."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.call_id: str | None = None
        self.sent = ""
        self._head = ""
        self._num_read = 0  # pieces of the body
        self._scan = _ObjectScan()

    def read(self, body: Any) -> str:
        """The arguments' text that is new."""
        text = "".join(body[self._num_read :])
        self._num_read = len(body)
        return self._take(text)

    def rest_of(self, raw: str) -> str:
        """What of the arguments was not told yet, given the whole call's text."""
        start = raw.find("{")
        fresh = _OpenCall()
        whole = fresh._take(raw[start:]) if start >= 0 else ""
        rest = whole[len(self.sent) :] if whole.startswith(self.sent) else ""
        self.sent += rest
        return rest

    def _take(self, text: str) -> str:
        if self.name is None:
            if len(self._head) > _MAX_HEAD:
                return ""
            self._head += text
            found = _HEAD.match(self._head)
            if found is None:
                return ""
            try:
                name = json.loads(found[1])
            except ValueError:
                return ""
            self.name, text = str(name), self._head[found.end() :]
        new = self._scan.take(text)
        self.sent += new
        return new


class _ObjectScan:
    """Reads one JSON object and nothing behind it."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._is_escaped = self._is_over = False

    def take(self, text: str) -> str:
        """As much of the text as belongs to the object."""
        if self._is_over:
            return ""
        for at, char in enumerate(text):
            if self._is_escaped:
                self._is_escaped = False
            elif self._in_string:
                self._is_escaped = char == "\\"
                self._in_string = char != '"'
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if not self._depth:
                    self._is_over = True
                    return text[: at + 1]
        return text
