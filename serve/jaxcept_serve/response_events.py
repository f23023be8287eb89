"""A turn's events as a response: its output items, and its stream events one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from jaxcept.scheduler.plan import TokenLogprobs
from jaxcept_serve.api import usage_figures
from jaxcept_serve.conversion import function_call_item, mcp_call_item
from jaxcept_serve.turns import (
    CallDelta,
    FullCall,
    TextDelta,
    ToolAnswered,
    TurnDone,
    TurnEvent,
    TurnFinished,
    Usage,
)

Event = dict[str, Any]
TokenText = Callable[[int], str]


@dataclass(slots=True)
class _Open:
    """An item that goes on: its place in the output, and its text or arguments so far."""

    index: int
    pieces: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    call: FullCall | None = None
    is_thought: bool = False

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class ResponseBuilder:
    """Takes a turn's events in order; each gives the stream events that it makes, with rising sequence numbers.

    `response` is the response object as the client sees it, without output; `new_id(prefix)` makes ids of items;
    `token_text` shows the tokens of log-probabilities. `is_silent` leaves all output out (a prewarmed prompt).
    """

    def __init__(
        self, response: dict[str, Any], new_id: Callable[[str], str], token_text: TokenText, is_silent: bool = False
    ) -> None:
        self.response = {**response, "status": "in_progress", "output": []}
        self.finished: TurnFinished | None = None
        self.done: TurnDone | None = None
        self._output: list[dict[str, Any]] = self.response["output"]
        self._new_id = new_id
        self._token_text = token_text
        self._is_silent = is_silent
        self._number = 0
        self._open: _Open | None = None  # the message or call that is being written
        self._running: dict[str, _Open] = {}  # calls that the server runs, by call_id
        self._held: list[dict[str, Any]] = []  # log-probabilities of tokens that completed no text yet

    def start(self) -> list[Event]:
        """The events that begin the stream."""
        return [self._lifecycle("response.created"), self._lifecycle("response.in_progress")]

    def feed(self, event: TurnEvent) -> list[Event]:
        """The stream events of a turn's event."""
        match event:
            case TurnFinished():
                self.finished = event
                return self._close("incomplete" if event.finish_reason == "length" else "completed") + self._abandon()
            case TurnDone():
                self.done = event
            case _ if self._is_silent:
                return []
            case TextDelta():
                return self._text(event)
            case CallDelta():
                return self._call(event)
            case ToolAnswered():
                return self._answer(event)
        return []

    def end(self, completed_at: float) -> list[Event]:
        """Completes the response, once the turn is done; the event that ends the stream."""
        assert self.finished is not None and self.done is not None, "the turn is done"
        reason = self.finished.finish_reason
        self.response["usage"] = usage_fields(self.done.usage)
        if reason in ("stop", "tool_calls") or self._is_silent:
            self.response |= {"status": "completed", "completed_at": completed_at}
        elif reason in ("length", "tool_limit"):
            # The SDK knows no reason for too many calls; of those that it knows, too many messages comes nearest.
            told = "max_output_tokens" if reason == "length" else "max_messages"
            self.response |= {"status": "incomplete", "incomplete_details": {"reason": told}}
        else:
            return self.fail(_FAILURES.get(reason, "The response could not be completed."))
        return [self._lifecycle(f"response.{self.response['status']}")]

    def fail(self, message: str, code: str = "server_error", param: str | None = None) -> list[Event]:
        """Ends the response with an error."""
        events = self._close("incomplete") + self._abandon()
        self.response |= {"status": "failed", "error": {"code": code, "message": message, "param": param}}
        return [*events, self._lifecycle("response.failed")]

    def cancel(self) -> list[Event]:
        """Ends a response that its client cancelled; what was written stays."""
        events = self._close("incomplete") + self._abandon()
        self.response |= {"status": "cancelled"}
        return [*events, self._lifecycle("response.incomplete")]

    def _event(self, kind: str, **fields: Any) -> Event:
        event = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return event

    def _lifecycle(self, kind: str) -> Event:
        return self._event(kind, response={**self.response, "output": list(self._output)})

    def _add(self, item: dict[str, Any]) -> tuple[_Open, Event]:
        self._output.append(item)
        at = _Open(len(self._output) - 1)
        return at, self._event("response.output_item.added", output_index=at.index, item=item)

    def _place(self, at: _Open) -> dict[str, Any]:
        return {"item_id": self._output[at.index]["id"], "output_index": at.index}

    def _text(self, delta: TextDelta) -> list[Event]:
        self._held += self._shown_logprobs(delta.token_ids, delta.logprobs)
        events = self._thought(delta.thought) if delta.thought else []
        if not delta.text:
            return events
        if self._open is None or self._open.call is not None or self._open.is_thought:
            events += self._close()
            item = {"id": self._new_id("msg"), "type": "message", "status": "in_progress", "role": "assistant"}
            self._open, added = self._add({**item, "content": []})
            part = _text_part("", [])
            events += [added, self._event("response.content_part.added", **self._place(self._open), content_index=0,
                                          part=part)]  # fmt: skip
        logprobs, self._held = self._held, []
        self._open.pieces.append(delta.text)
        self._open.logprobs += logprobs
        events.append(
            self._event("response.output_text.delta", **self._place(self._open), content_index=0, delta=delta.text,
                        logprobs=logprobs)
        )  # fmt: skip
        return events

    def _thought(self, thought: str) -> list[Event]:
        self._held = []  # log-probabilities are told of what is said
        events: list[Event] = []
        if self._open is None or not self._open.is_thought:
            events = self._close()
            item = {"id": self._new_id("rs"), "type": "reasoning", "status": "in_progress", "summary": []}
            self._open, added = self._add({**item, "content": []})
            self._open.is_thought = True
            part = _thought_part("")
            events += [added, self._event("response.content_part.added", **self._place(self._open), content_index=0,
                                          part=part)]  # fmt: skip
        self._open.pieces.append(thought)
        place = {**self._place(self._open), "content_index": 0}
        return [*events, self._event("response.reasoning_text.delta", **place, delta=thought)]

    def _call(self, delta: CallDelta) -> list[Event]:
        self._held = []  # of the call's markup
        events: list[Event] = []
        if self._open is None or self._open.call is None or self._open.call.call_id != delta.call_id:
            call = FullCall(delta.call_id, delta.name or "", "", delta.by_server)
            item = (
                mcp_call_item(call, "in_progress")
                if call.by_server
                else function_call_item(self._new_id("fc"), call, "in_progress")
            )
            events = self._close()
            self._open, added = self._add(item)
            self._open.call = call
            events.append(added)
            if call.by_server:
                events.append(self._event("response.mcp_call.in_progress", **self._place(self._open)))
        if delta.arguments:
            self._open.pieces.append(delta.arguments)
            events.append(
                self._event(f"response.{_kind(delta.by_server)}_arguments.delta", **self._place(self._open),
                            delta=delta.arguments)
            )  # fmt: skip
        return events

    def _answer(self, answer: ToolAnswered) -> list[Event]:
        events = self._close()
        at = self._running.pop(answer.call_id, None)
        if at is None:
            return events
        assert at.call is not None, "a call runs"
        call = replace(at.call, arguments=at.text, result=answer.text, is_error=answer.is_error)
        status = "failed" if answer.is_error else "completed"
        self._output[at.index] = mcp_call_item(call, status)
        events.append(self._event(f"response.mcp_call.{status}", **self._place(at)))
        return [*events, self._item_done(at)]

    def _close(self, status: str = "completed") -> list[Event]:
        """Ends what is being written; a call that the server runs stays until its tool has answered."""
        at, self._open = self._open, None
        if at is None:
            return []
        if at.call is None:
            return self._close_message(at, status)
        kind = _kind(at.call.by_server)
        events = [
            self._event(f"response.{kind}_arguments.done", **self._place(at), arguments=at.text, name=at.call.name)
        ]
        item = {**self._output[at.index], "arguments": at.text}
        self._output[at.index] = item
        if at.call.by_server:
            self._running[at.call.call_id] = at
            return events
        item["status"] = status
        return [*events, self._item_done(at)]

    def _close_message(self, at: _Open, status: str) -> list[Event]:
        part = _thought_part(at.text) if at.is_thought else _text_part(at.text, at.logprobs)
        place = {**self._place(at), "content_index": 0}
        self._output[at.index] = {**self._output[at.index], "status": status, "content": [part]}
        return [
            self._event("response.reasoning_text.done", **place, text=at.text)
            if at.is_thought
            else self._event("response.output_text.done", **place, text=at.text, logprobs=at.logprobs),
            self._event("response.content_part.done", **place, part=part),
            self._item_done(at),
        ]

    def _abandon(self) -> list[Event]:
        """Ends the calls whose tools never answered."""
        left, self._running = list(self._running.values()), {}
        for at in left:
            assert at.call is not None, "a call runs"
            self._output[at.index] = mcp_call_item(replace(at.call, arguments=at.text), "incomplete")
        return [self._item_done(at) for at in left]

    def _item_done(self, at: _Open) -> Event:
        return self._event("response.output_item.done", output_index=at.index, item=self._output[at.index])

    def _shown_logprobs(
        self, token_ids: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...] | None
    ) -> list[dict[str, Any]]:
        if logprobs is None:
            return []
        return [
            {
                **self._token(token_id, entry.logprob),
                "top_logprobs": [self._token(other, value) for other, value in entry.top],
            }
            for token_id, entry in zip(token_ids, logprobs, strict=True)
        ]

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._token_text(token_id)
        return {"token": text, "bytes": list(text.encode()), "logprob": logprob}


_FAILURES = {
    "tool_timeout": "A tool that the server runs did not answer in time.",
    "tool_failed": "A tool that the server runs failed.",
    "abort": "The response was stopped by the server.",
}


def usage_fields(usage: Usage) -> dict[str, Any]:
    """The usage of a response; what the server's tools returned is input."""
    return {
        "input_tokens": usage.prompt_tokens + usage.returned_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "cache_write_tokens": usage.cache_write_tokens,
        },
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.total_tokens,
        "jaxcept": usage_figures(usage),
    }


def _kind(by_server: bool) -> str:
    return "mcp_call" if by_server else "function_call"


def _thought_part(text: str) -> dict[str, Any]:
    return {"type": "reasoning_text", "text": text}


def _text_part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
