"""Runs the calls of an intercepted sequence outside the engine and turns their results into what it goes on with."""

from __future__ import annotations

import sys
import threading
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
    """An open interception by tool calls, and the results so far, which come from any thread."""

    interception: int
    turn: ToolTurn
    toolbox: Toolbox
    room: int  # ids that the results may have together
    results: list[ToolResult | None] = field(init=False)
    _lock: threading.Lock = field(init=False, default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.results = [None] * len(self.turn.calls)

    def take(self, i: int, result: ToolResult) -> bool:
        """Takes the result of a call; whether it was the last one."""
        with self._lock:
            self.results[i] = result
            return all(result is not None for result in self.results)

    def encode(self, tokenizer: Tokenizer) -> list[int] | Exception:
        """Ids of the results, or why there are none: ValueError where they do not fit. Long ones take their time."""
        texts = [result.text for result in self.results if result is not None]
        tools, ended_turn = self.toolbox.schemas(), self.turn.ended_turn
        try:
            return encode_answers(tokenizer, self.turn.calls, texts, ended_turn=ended_turn, tools=tools, room=self.room)
        except Exception as error:
            return error

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
    """Ids of the results in the chat template's form. Where they do not fit into `room` ids, the short ones stay whole
    and the long ones are cut to the same length; each says so.

    ValueError where not even that fits.
    """
    encode = partial(tokenizer.encode_returned, calls, ended_turn=ended_turn, tools=tools)
    max_chars = max(0, room) * tokenizer.max_token_chars  # a longer text has more ids than there is room for
    if all(len(text) <= max_chars for text in results) and len(ids := encode(results)) <= room:
        return ids
    texts = [_Text(tokenizer, text, max_chars) for text in results]
    note = len(tokenizer.encode(CUT_NOTE, add_special_tokens=False))
    frame = len(encode([""] * len(texts)))
    for _ in range(_MAX_CUTS):
        most = _fair_share([text.num_ids for text in texts], room - frame)
        ids = encode([text.cut(most, note) for text in texts])
        if len(ids) <= room:
            return ids
        frame += len(ids) - room  # texts side by side, and cut ones, may take more ids than alone
    raise ValueError(f"the tools' answer needs {len(ids)} tokens: the sequence has room for {max(room, 0)}")


class _Text:
    """A result that may be cut. Of one that is surely too long, no more is encoded than there is room for."""

    def __init__(self, tokenizer: Tokenizer, text: str, max_chars: int) -> None:
        self._tokenizer = tokenizer
        self._text = text
        self._ids = tokenizer.encode(text[:max_chars], add_special_tokens=False, allow_special=False)
        self.num_ids = len(self._ids) if len(text) <= max_chars else sys.maxsize

    def cut(self, most: int, note: int) -> str:
        """The whole text where it has at most so many ids, else what leaves room for the note, which has `note`."""
        if self.num_ids <= max(most, note):
            return self._text
        return self._tokenizer.decode(self._ids[: max(0, most - note)], skip_special_tokens=False) + CUT_NOTE


def _fair_share(sizes: Sequence[int], room: int) -> int:
    """The most that each may have, so that all of these fit where the larger ones are cut to it."""
    left = max(0, room)
    for i, size in enumerate(sorted(sizes)):
        share = left // (len(sizes) - i)
        if size > share:
            return share
        left -= size
    return max(sizes, default=0)


def probe_call(name: str = "tool") -> ToolCall:
    """A call that stands for any, for texts that are rendered before a call is made."""
    return ToolCall("call00000", name, {})
