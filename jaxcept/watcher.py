"""Watches one sequence as text: decodes its ids once, finds stop strings and tool calls, keeps what may be sent."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from jaxcept.constraint import Constraint
from jaxcept.scheduler.watcher import REJECT, Verdict, WatcherError
from jaxcept.text.stop import StopStrings
from jaxcept.text.stream import StreamDecoder
from jaxcept.tools.calls import ParsedCall, ToolCall
from jaxcept.tools.parsers import ToolCallParser

NEXT_TURN = "user"  # what answers where the model ended its turn without a call


class CallTrigger(StrEnum):
    """When tool calls in the stream intercept the sequence."""

    TURN = "turn"  # when the model ends its turn: several calls run side by side
    CALL = "call"  # as soon as one call is complete


@dataclass(frozen=True, slots=True)
class ToolTurn:
    """The calls that stopped a sequence, none where it waits for the next turn, and whether the model had already ended
    its turn."""

    calls: tuple[ParsedCall, ...]
    ended_turn: bool


@dataclass(frozen=True, slots=True)
class Hold:
    """The sequence waits for a later request to go on with it, at most `seconds`: where the model ends its turn, and
    where it calls a tool of these names, which somebody outside answers."""

    seconds: float
    outside: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class TextRun:
    """Text that may be sent; `returned_ids` where a tool returned it, None where the model generated it."""

    text: str
    returned_ids: tuple[int, ...] | None = None


class TextWatcher:
    """One sequence's text. The text handed out, run by run, is what decoding all of its ids at once gives."""

    def __init__(
        self,
        decoder: StreamDecoder,
        stops: StopStrings,
        parser: ToolCallParser | None = None,
        trigger: CallTrigger = CallTrigger.TURN,
        intercept_strings: Sequence[str] = (),
        min_tokens: int = 0,
        hold: Hold | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        self._decoder = decoder
        self._stops = stops
        self._parser = parser
        self._trigger = trigger
        self._intercepts = StopStrings(tuple(intercept_strings), True) if intercept_strings else None
        self._intercept_strings = tuple(intercept_strings)
        self._calls: list[ParsedCall] = []
        self._runs: deque[TextRun] = deque()
        self._tokens_before_stops = min_tokens
        self._hold = hold
        self._constraint = constraint

    def push(self, token_id: int) -> Verdict | None:
        """Takes a generated token; says whether the text it completes stops or intercepts the sequence."""
        text = self._accepted(token_id)
        if text is None:
            return REJECT
        self._tokens_before_stops -= 1
        if not text:
            return None
        # A stop string that is complete before min_tokens is no stop: the text passes unsearched.
        emitted, hit = self._stops.push(text) if self._tokens_before_stops < 0 else (text, None)
        self._emit(emitted)
        if hit is not None:
            return Verdict("stop", hit, None)
        if self._parser is not None:
            self._calls += self._parser.feed(text)
            if self._calls and self._trigger is CallTrigger.CALL:
                return self._tool_verdict(ended_turn=False)
        if self._intercepts is not None:
            _, hit = self._intercepts.push(text)
            if hit is not None:
                self._intercepts = StopStrings(self._intercept_strings, True)
                return Verdict("intercept", hit, None)
        return None

    def mask(self) -> bytes | None:
        """Which tokens may come next, None where all may: see Watcher."""
        try:
            return self._constraint.mask() if self._constraint is not None else None
        except RuntimeError as error:
            raise WatcherError(str(error)) from error

    def masks_behind(self, token_ids: Sequence[int]) -> Sequence[bytes | None]:
        """The masks behind each of these tokens, as far as they may come: see Watcher."""
        try:
            return [None] * len(token_ids) if self._constraint is None else self._constraint.masks_behind(token_ids)
        except RuntimeError as error:
            raise WatcherError(str(error)) from error

    def forced(self) -> Sequence[int]:
        """Tokens that the constraint leaves no choice about: see Watcher."""
        return self._constraint.forced() if self._constraint is not None else ()

    def _accepted(self, token_id: int) -> str | None:
        """The text that a token completes; None where the constraint refuses it."""
        if self._constraint is None:
            return self._decoder.push(token_id)
        try:
            if not self._constraint.accept(token_id):
                return None
            text = self._decoder.push(token_id)
            if text:
                self._constraint.read(text)
        except RuntimeError as error:
            raise WatcherError(str(error)) from error
        return text

    def end_of_turn(self) -> Verdict | None:
        """The model generated a stop token: an interception if its turn holds tool calls."""
        if self._parser is not None:
            self._calls += self._parser.finish()
        if self._calls:
            return self._tool_verdict(ended_turn=True)
        return Verdict("intercept", NEXT_TURN, ToolTurn((), True), self._hold.seconds) if self._hold else None

    def returned(self, token_ids: Sequence[int]) -> None:
        """Takes the tokens that a tool returned."""
        self._emit(self._stops.flush())
        if self._parser is not None:
            self._parser.begin_turn()
        if self._constraint is not None:
            self._constraint.begin_turn()
        text = "".join(self._decoder.push(token_id) for token_id in token_ids)
        self._runs.append(TextRun(text, tuple(token_ids)))

    def finish(self) -> None:
        """No token follows: everything held back is handed out."""
        emitted, _ = self._stops.push(self._decoder.finish())
        self._emit(emitted + self._stops.flush())

    def take_generated(self) -> str:
        """Generated text that may be sent, up to the next returned run."""
        texts = []
        while self._runs and self._runs[0].returned_ids is None:
            texts.append(self._runs.popleft().text)
        return "".join(texts)

    def take_returned(self) -> TextRun:
        """The returned run that comes next; the generated text before it must have been taken."""
        return self._runs.popleft()

    def _emit(self, text: str) -> None:
        if text:
            self._runs.append(TextRun(text))

    def _tool_verdict(self, ended_turn: bool) -> Verdict:
        calls, self._calls = tuple(self._calls), []
        names = ", ".join(call.name if isinstance(call, ToolCall) else "malformed call" for call in calls)
        hold = self._hold
        is_held = hold and any(isinstance(call, ToolCall) and call.name in hold.outside for call in calls)
        hold_s = hold.seconds if hold and is_held else None
        return Verdict("intercept", names, ToolTurn(calls, ended_turn), hold_s)
