"""Watches one sequence as text: decodes its ids once, finds stop strings and tool calls, keeps what may be sent."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from jaxcept.constraint import Constraint
from jaxcept.scheduler.watcher import REJECT, Verdict, WatcherError
from jaxcept.text.reasoning import Thoughts
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
class Thinking:
    """Where a sequence stands in what it thinks. Nothing binds a thought: no grammar, no tool.

    `open_id` and `close_id` are the tags' tokens. Where they are several tokens, a turn that a grammar binds from its
    beginning on has no room for a thought.
    """

    thoughts: Thoughts
    open_id: int | None = None
    close_id: int | None = None

    def takes(self, token_id: int) -> bool:
        """Whether the next token belongs to a thought."""
        return self.thoughts.is_inside or (self.thoughts.may_open and token_id == self.open_id)

    def with_opening(self, mask: bytes) -> bytes:
        """The mask, and the token that opens a thought where one may begin."""
        if not self.thoughts.may_open or self.open_id is None:
            return mask
        byte, bit = divmod(self.open_id, 8)  # of little-endian words, as bytes
        return mask[:byte] + bytes([mask[byte] | 1 << bit]) + mask[byte + 1 :]

    def num_free(self, token_ids: Sequence[int]) -> int:
        """How many of these tokens are surely followed by one that nothing binds."""
        if not self.thoughts.is_inside or self.close_id is None:
            return 0
        return next((n for n, token_id in enumerate(token_ids) if token_id == self.close_id), len(token_ids))


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
        thinking: Thinking | None = None,
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
        self._thinking = thinking

    @property
    def tells_thoughts(self) -> bool:
        """Whether thoughts are told apart from what is said."""
        return self._thinking is not None

    def begin_after(self, prompt_end: Callable[[], str]) -> None:
        """The turn begins behind a prompt; its end is asked for where it matters."""
        if self._thinking is not None:
            self._thinking.thoughts.begin_turn(prompt_end())

    def push(self, token_id: int) -> Verdict | None:
        """Takes a generated token; says whether the text it completes stops or intercepts the sequence."""
        text = self._accepted(token_id)
        if text is None:
            return REJECT
        self._tokens_before_stops -= 1
        if not text:
            return None
        said = text if self._thinking is None else self._thinking.thoughts.feed(text).said
        self._read(said)
        # A stop string that is complete before min_tokens is no stop: the text passes unsearched.
        emitted, hit = self._stops.push(text) if self._tokens_before_stops < 0 else (text, None)
        self._emit(emitted)
        if hit is not None:
            return Verdict("stop", hit, None)
        if self._parser is not None:
            self._calls += self._parser.feed(said)
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
        constraint, thinking = self._constraint, self._thinking
        if constraint is None or (thinking is not None and thinking.thoughts.is_inside):
            return None
        try:
            mask = constraint.mask()
        except RuntimeError as error:
            raise WatcherError(str(error)) from error
        return mask if mask is None or thinking is None else thinking.with_opening(mask)

    def masks_behind(self, token_ids: Sequence[int]) -> Sequence[bytes | None]:
        """The masks behind each of these tokens, as far as they may come: see Watcher."""
        constraint, thinking = self._constraint, self._thinking
        if constraint is None:
            return [None] * len(token_ids)
        if thinking is not None and not thinking.thoughts.is_over:
            return [None] * thinking.num_free(token_ids)
        try:
            return constraint.masks_behind(token_ids)
        except RuntimeError as error:
            raise WatcherError(str(error)) from error

    def forced(self) -> Sequence[int]:
        """Tokens that the constraint leaves no choice about: see Watcher."""
        thinking = self._thinking
        if thinking is not None and not thinking.thoughts.is_over:
            return ()
        return self._constraint.forced() if self._constraint is not None else ()

    def _accepted(self, token_id: int) -> str | None:
        """The text that a token completes; None where the constraint refuses it. Thoughts are free."""
        is_free = self._thinking is not None and self._thinking.takes(token_id)
        try:
            if self._constraint is not None and not is_free and not self._constraint.accept(token_id):
                return None
        except RuntimeError as error:
            raise WatcherError(str(error)) from error
        return self._decoder.push(token_id)

    def _read(self, said: str) -> None:
        """What is said: a call may begin in it."""
        try:
            if self._constraint is not None and said:
                self._constraint.read(said)
        except RuntimeError as error:
            raise WatcherError(str(error)) from error

    def end_of_turn(self) -> Verdict | None:
        """The model generated a stop token: an interception if its turn holds tool calls."""
        if self._parser is not None:
            if self._thinking is not None:
                self._calls += self._parser.feed(self._thinking.thoughts.end_turn().said)
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
        if self._thinking is not None:
            self._thinking.thoughts.go_on(text)
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
