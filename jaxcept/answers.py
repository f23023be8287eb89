"""Runs the calls of an intercepted sequence outside the engine and turns their results into what it goes on with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from jaxcept.outputs import CallRecord
from jaxcept.text.tokenizer import Tokenizer
from jaxcept.tools.calls import ParsedCall, ToolCall, ToolResult
from jaxcept.tools.toolbox import Toolbox
from jaxcept.watcher import ToolTurn

CUT_NOTE = " … (cut to fit)"
_MAX_CUTS = 8


@dataclass(slots=True)
class OpenTurn:
    """An open interception by tool calls, and the results so far."""

    interception: int
    turn: ToolTurn
    results: list[ToolResult | None] = field(init=False)

    def __post_init__(self) -> None:
        self.results = [None] * len(self.turn.calls)

    @property
    def is_complete(self) -> bool:
        return all(result is not None for result in self.results)

    @property
    def has_failed(self) -> bool:
        """Whether any call gave an error."""
        return any(result is not None and result.is_error for result in self.results)

    def records(self) -> tuple[CallRecord, ...]:
        """The calls that have a result."""
        return tuple(call_record(result) for result in self.results if result is not None)


def call_record(result: ToolResult) -> CallRecord:
    """A call and its answer, as a completion tells it."""
    return CallRecord(result.call.name, dict(result.call.arguments), result.text, result.is_error, result.duration_s)


def start_calls(turn: ToolTurn, toolbox: Toolbox, timeout_s: float, done: Callable[[int, ToolResult], None]) -> None:
    """Starts every call that this process can answer; `done(i, result)` comes from any thread, once for each."""
    for i, call in enumerate(turn.calls):
        if toolbox.is_external(call):
            continue
        tool = toolbox.get(call.name)
        own = tool.timeout_s if tool is not None else None
        limit = timeout_s if own is None else min(own, timeout_s)
        toolbox.submit(call, partial(done, i), limit)


def encode_answers(
    tokenizer: Tokenizer,
    calls: Sequence[ParsedCall],
    results: Sequence[str],
    *,
    ended_turn: bool,
    tools: Sequence[Mapping[str, Any]],
    room: int,
) -> list[int]:
    """Ids of the results in the chat template's form, the longest result cut until they fit into `room` ids.

    ValueError where not even empty results fit.
    """
    texts = list(results)
    for _ in range(_MAX_CUTS):
        ids = tokenizer.encode_returned(calls, texts, ended_turn=ended_turn, tools=tools)
        if len(ids) <= room:
            return ids
        longest = max(range(len(texts)), key=lambda i: len(texts[i]))
        own = tokenizer.encode(texts[longest], add_special_tokens=False, allow_special=False)
        note = tokenizer.encode(CUT_NOTE, add_special_tokens=False)
        keep = max(0, len(own) - (len(ids) - room) - len(note))
        texts[longest] = tokenizer.decode(own[:keep], skip_special_tokens=False) + CUT_NOTE if keep else ""
    ids = tokenizer.encode_returned(calls, [""] * len(texts), ended_turn=ended_turn, tools=tools)
    if len(ids) > room:
        raise ValueError(f"the tools' answer needs {len(ids)} tokens: the sequence has room for {max(room, 0)}")
    return ids


def probe_call(name: str = "tool") -> ToolCall:
    """A call that stands for any, for texts that are rendered before a call is made."""
    return ToolCall("call00000", name, {})
