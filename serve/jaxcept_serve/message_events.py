"""A turn's events as an Anthropic message: its stream events one by one, and the message as a whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from jaxcept_serve.api import usage_figures
from jaxcept_serve.conversion import SERVER_LABEL, input_object
from jaxcept_serve.turns import (
    CallDelta,
    TextDelta,
    ToolAnswered,
    TurnDone,
    TurnEvent,
    TurnFinished,
    TurnStarted,
    Usage,
)

Event = dict[str, Any]

_STOP_REASONS = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "tool_limit": "pause_turn",  # the server's own tools ran as often as allowed: sending the turn back goes on
}


@dataclass(slots=True)
class _ServerCall:
    name: str
    pieces: list[str] = field(default_factory=list)


class MessageBuilder:
    """Takes a turn's events in order; each gives the stream events that it makes.

    Calls that the server runs are `mcp_tool_use` blocks with an `mcp_tool_result` behind them: a client shows these
    and sends them back, where it would try to run a `tool_use`. Such a block comes whole, once its tool has answered.
    `shows_thoughts`: what the model thinks is told, in blocks without a signature.
    """

    def __init__(self, message_id: str, model: str, has_marks: bool = False, shows_thoughts: bool = False) -> None:
        self.content: list[dict[str, Any]] = []
        self.finished: TurnFinished | None = None
        self.done: TurnDone | None = None
        self._message_id = message_id
        self._has_marks = has_marks  # of the cache: what is written to it is told apart
        self._shows_thoughts = shows_thoughts
        self._model = model
        self._pieces: list[str] = []  # of the block that is open
        self._is_open = False
        self._server_calls: dict[str, _ServerCall] = {}

    def feed(self, event: TurnEvent) -> list[Event]:
        """The stream events of a turn's event."""
        match event:
            case TurnStarted():  # what of the prompt the cache has is not known yet: message_delta tells
                usage = usage_fields(None) | {"input_tokens": event.prompt_tokens}
                return [{"type": "message_start", "message": self._message([], None, None, usage)}, {"type": "ping"}]
            case TextDelta(text=text, thought=thought):
                thinking = self._thought(thought) if thought and self._shows_thoughts else []
                return thinking + (self._text(text) if text else [])
            case CallDelta():
                return self._server_call(event) if event.by_server else self._call(event)
            case ToolAnswered():
                return self._answer(event)
            case TurnFinished():
                self.finished = event
                return self._close()
            case TurnDone():
                self.done = event
        return []

    def end(self, diagnostics: dict[str, Any] | None = None) -> list[Event]:
        """The events that end the stream, once the turn is done."""
        reason, sequence = self.stop()
        delta: Event = {"stop_reason": reason, "stop_sequence": sequence}
        ending: Event = {"type": "message_delta", "delta": delta, "usage": usage_fields(self.usage, self._has_marks)}
        if diagnostics is not None:
            ending["diagnostics"] = diagnostics
        return [ending, {"type": "message_stop"}]

    def message(self, diagnostics: dict[str, Any] | None = None) -> dict[str, Any]:
        """The whole message, once the turn is done."""
        message = self._message(self.content, *self.stop(), usage_fields(self.usage, self._has_marks))
        return message if diagnostics is None else {**message, "diagnostics": diagnostics}

    @property
    def usage(self) -> Usage:
        """What the turn took."""
        assert self.done is not None, "the turn is done"
        return self.done.usage

    def stop(self) -> tuple[str, str | None]:
        """(stop_reason, stop_sequence) of the turn that finished."""
        assert self.finished is not None, "the turn is finished"
        if self.finished.finish_reason == "stop" and isinstance(self.finished.stop_reason, str):
            return "stop_sequence", self.finished.stop_reason
        return _STOP_REASONS.get(self.finished.finish_reason, "end_turn"), None

    def _message(
        self, content: list[dict[str, Any]], reason: str | None, sequence: str | None, usage: dict[str, Any]
    ) -> dict[str, Any]:
        return {
            "id": self._message_id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": sequence,
            "usage": usage,
        }

    def _text(self, text: str) -> list[Event]:
        events = []
        if not (self._is_open and self.content[-1]["type"] == "text"):
            events = self._close() + self._open({"type": "text", "text": "", "citations": None})
        self._pieces.append(text)
        return [*events, self._delta({"type": "text_delta", "text": text})]

    def _thought(self, thought: str) -> list[Event]:
        events = []
        if not (self._is_open and self.content[-1]["type"] == "thinking"):
            events = self._close() + self._open({"type": "thinking", "thinking": "", "signature": ""})
        self._pieces.append(thought)
        return [*events, self._delta({"type": "thinking_delta", "thinking": thought})]

    def _call(self, event: CallDelta) -> list[Event]:
        events = []
        if not (self._is_open and self.content[-1].get("id") == event.call_id):
            block = {"type": "tool_use", "id": event.call_id, "name": event.name or "", "input": {}}
            events = self._close() + self._open(block)
        if event.arguments:
            self._pieces.append(event.arguments)
            events.append(self._delta({"type": "input_json_delta", "partial_json": event.arguments}))
        return events

    def _server_call(self, event: CallDelta) -> list[Event]:
        call = self._server_calls.setdefault(event.call_id, _ServerCall(event.name or ""))
        call.pieces.append(event.arguments)
        return self._close()

    def _answer(self, event: ToolAnswered) -> list[Event]:
        call = self._server_calls.pop(event.call_id, _ServerCall(event.name))
        use = {
            "type": "mcp_tool_use",
            "id": event.call_id,
            "name": event.name,
            "server_name": SERVER_LABEL,
            "input": input_object("".join(call.pieces)),
        }
        answer = {
            "type": "mcp_tool_result",
            "tool_use_id": event.call_id,
            "is_error": event.is_error,
            "content": [{"type": "text", "text": event.text, "citations": None}],
        }
        return self._close() + self._open(use) + self._close() + self._open(answer) + self._close()

    def _open(self, block: dict[str, Any]) -> list[Event]:
        self.content.append(block)
        self._is_open = True
        return [{"type": "content_block_start", "index": len(self.content) - 1, "content_block": dict(block)}]

    def _delta(self, delta: Event) -> Event:
        return {"type": "content_block_delta", "index": len(self.content) - 1, "delta": delta}

    def _close(self) -> list[Event]:
        if not self._is_open:
            return []
        block = self.content[-1]
        if block["type"] in ("text", "thinking"):
            block[block["type"]] = "".join(self._pieces)
        elif block["type"] == "tool_use":
            block["input"] = input_object("".join(self._pieces))
        self._pieces = []
        self._is_open = False
        return [{"type": "content_block_stop", "index": len(self.content) - 1}]


def usage_fields(usage: Usage | None, has_marks: bool = False) -> dict[str, Any]:
    """Anthropic's usage: what was read from and, on request, written to the cache stands beside `input_tokens`."""
    if usage is None:
        return {"input_tokens": 0, "output_tokens": 0, "cache_read_input_tokens": 0, "cache_creation_input_tokens": 0}
    taken_in = usage.prompt_tokens + usage.returned_tokens - usage.cached_tokens
    written = min(usage.cache_write_tokens, taken_in) if has_marks else 0
    return {
        "input_tokens": taken_in - written,
        "output_tokens": usage.completion_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": written,
        "jaxcept": usage_figures(usage),
    }
