"""One turn under way: deltas of the engine to events of the turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from jaxcept.async_llm import Stream
from jaxcept.conversations import CallRef
from jaxcept.outputs import Delta, RequestOutput, Spent
from jaxcept.scheduler.params import SamplingParams
from jaxcept.scheduler.plan import TokenLogprobs
from jaxcept.text.reasoning import Split, Thoughts, ThoughtSpans
from jaxcept.tools.calls import ParsedCall, ToolCall
from jaxcept.tools.toolbox import Toolbox
from jaxcept_serve.call_stream import CallStream
from jaxcept_serve.turns import CallDelta, TextDelta, ToolAnswered, TurnDone, TurnEvent, TurnFinished, Usage


class RunService(Protocol):
    """What a run needs of its service."""

    def stream_calls(self, index: int, toolbox: Toolbox) -> CallStream:
        """A splitter for one completion's text."""

    def split_thoughts(self, prompt_ids: Sequence[int]) -> Thoughts | None:
        """A splitter for the turn that begins behind this prompt; None where thoughts are not told apart."""

    def opening_of(self, ids: Sequence[int]) -> int | None:
        """Where the tag that opens a thought stands at the end of these ids; None where that is not known."""

    @property
    def token_bytes(self) -> float:
        """Bytes of KV cache of one token."""


class Completion:
    """One completion of a run, as far as it has come."""

    def __init__(self, index: int, calls: CallStream | None, thoughts: Thoughts | None = None) -> None:
        self.index = index
        self.calls = calls
        self.thoughts = thoughts
        self.text: list[str] = []
        self.thought: list[str] = []
        self.num_thought = 0  # tokens
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.results: dict[str, tuple[str, bool]] = {}  # by the client's name of the call
        self.waiting: set[str] = set()  # server's calls of a turn that the client's answers end
        self.is_over = False
        self.spent = Spent()

    def finished(self, reason: str, stop_reason: str | int | None) -> TurnFinished:
        """The event that tells its end."""
        self.is_over = True
        calls = [
            replace(call, result=self.results[call.call_id][0], is_error=self.results[call.call_id][1])
            if call.call_id in self.results
            else call
            for call in (self.calls.calls if self.calls is not None else ())
        ]
        logprobs = tuple(self.logprobs) or None
        return TurnFinished(
            *(self.index, reason, stop_reason, "".join(self.text), tuple(calls), tuple(self.token_ids), logprobs),
            thought="".join(self.thought),
        )


class TurnRun:
    """One turn under way: deltas of the engine to events of the turn."""

    def __init__(
        self,
        service: RunService,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        toolbox: Toolbox | None,
        stream: Stream,
        holds: bool = False,
        is_chat: bool = False,
    ) -> None:
        self.service = service
        self.params = params
        self.stream = stream
        self.toolbox = toolbox
        self.prompt_ids = prompt_ids
        self.all_ids = list(prompt_ids)  # of the first completion: the prompt, what it wrote, what tools returned
        self.holds = holds
        self.is_held = False
        self.has_ended_turn = True
        self.open_calls: tuple[CallRef, ...] = ()  # those that the client answers, and the server's beside them
        self.answers: dict[str, str] = {}
        self._num_returned = 0
        self._output: RequestOutput | None = None
        self._completions = [
            Completion(
                i,
                service.stream_calls(i, toolbox) if toolbox is not None else None,
                service.split_thoughts(prompt_ids) if is_chat else None,
            )
            for i in range(params.n)
        ]
        self.spans = ThoughtSpans()  # of all_ids
        self._begin_turn(self._completions[0], prompt_ids)

    def _begin_turn(self, own: Completion, before: Sequence[int]) -> None:
        """The first completion's next turn begins behind these ids, the last of all so far."""
        if own.thoughts is not None and not own.index:
            end = len(self.all_ids)
            opening = self.service.opening_of(before) if own.thoughts.is_inside else len(before)
            self.spans.begin_turn(None if opening is None else end - len(before) + opening, end)

    @property
    def is_over(self) -> bool:
        """Whether every completion is."""
        return all(completion.is_over for completion in self._completions)

    def take(self, delta: Delta) -> list[TurnEvent]:
        """The events that a delta is."""
        own = self._completions[delta.index]
        if own.is_over:
            self._output = delta.output or self._output
            return []
        if delta.spent is not None:
            own.spent = delta.spent
        match delta.kind:
            case "generated":
                return self._on_text(own, delta)
            case "returned":
                events = self._end_turn(own)
                if own.calls is not None:
                    own.calls.begin_turn()
                if own.thoughts is not None:
                    own.thoughts.go_on(delta.text)
                self._num_returned += len(delta.token_ids)
                if not own.index:
                    self.all_ids += delta.token_ids
                    self._begin_turn(own, delta.token_ids)
                return events
            case "intercepted":
                return self._on_intercepted(own, delta)
            case "answered":
                return self._on_answered(own, delta)
            case "finished":
                return self._on_finished(own, delta)

    def done(self) -> TurnDone:
        """The last event."""
        spent = [completion.spent for completion in self._completions]
        cached = min(spent[0].cached_tokens, len(self.prompt_ids))
        usage = Usage(
            prompt_tokens=len(self.prompt_ids),
            completion_tokens=sum(len(completion.token_ids) for completion in self._completions),
            cached_tokens=cached,
            returned_tokens=self._num_returned,
            swapped_tokens=sum(each.swapped_tokens for each in spent),
            recomputed_tokens=sum(each.recomputed_tokens for each in spent),
            intercepted_s=sum(each.intercepted_s for each in spent),
            held_byte_s=sum(each.held_token_s for each in spent) * self.service.token_bytes,
            cache_write_tokens=len(self.prompt_ids) - cached,
            reasoning_tokens=sum(completion.num_thought for completion in self._completions),
        )
        logprobs = self._output.prompt_logprobs if self._output is not None else None
        return TurnDone(usage, tuple(self.prompt_ids), tuple(logprobs) if logprobs is not None else None)

    def _on_text(self, own: Completion, delta: Delta) -> list[TurnEvent]:
        own.token_ids += delta.token_ids
        if not own.index:
            self.all_ids += delta.token_ids
        own.logprobs += delta.logprobs or ()
        thought, text = self._split(own, delta.text)
        own.thought.append(thought)
        if thought or (own.thoughts is not None and own.thoughts.is_inside):
            own.num_thought += len(delta.token_ids)
        said, pieces = own.calls.feed(text) if own.calls is not None else (text, [])
        own.text.append(said)
        return [TextDelta(own.index, said, delta.token_ids, delta.logprobs, thought), *pieces]

    def _split(self, own: Completion, text: str) -> Split:
        thoughts = own.thoughts
        if thoughts is None:
            return Split(said=text)
        was_speech = thoughts.is_over
        split = thoughts.feed(text)
        if not own.index:
            self.spans.take(text, split, was_speech, thoughts.is_inside, len(self.all_ids))
        return split

    def _end_turn(self, own: Completion) -> list[TurnEvent]:
        """What the end of a turn sets free of what was held back."""
        thought, said = own.thoughts.end_turn() if own.thoughts is not None else Split()
        pieces: list[CallDelta] = []
        if own.calls is not None:
            (before, first), (behind, last) = own.calls.feed(said), own.calls.end_turn()
            said, pieces = before + behind, [*first, *last]
        own.thought.append(thought)
        own.text.append(said)
        events: list[TurnEvent] = [TextDelta(own.index, said, thought=thought)] if said or thought else []
        return [*events, *pieces]

    def _on_intercepted(self, own: Completion, delta: Delta) -> list[TurnEvent]:
        turn = delta.turn
        if turn is None:
            return []
        events = self._end_turn(own)
        if not turn.calls:
            self.is_held = True
            return [*events, own.finished("stop", None)]
        if not any(self._is_outside(call) for call in turn.calls):
            return events  # the server answers, and the completion goes on
        assert own.calls is not None, "calls without a parser"
        refs = [CallRef(own.calls.ids[call.id], call.name, call.arguments) for call in turn.calls if _is_whole(call)]
        self.open_calls = tuple(refs)
        self.has_ended_turn = turn.ended_turn
        own.waiting = {own.calls.ids[call.id] for call in turn.calls if _is_whole(call) and not self._is_outside(call)}
        return [*events, *self._end_if_answered(own)]

    def _on_answered(self, own: Completion, delta: Delta) -> list[TurnEvent]:
        record = delta.call
        if record is None or own.calls is None or delta.call_id not in own.calls.ids:
            return []  # a call that could not be read: the model is told, the client was not
        call_id = own.calls.ids[delta.call_id]
        own.results[call_id] = (record.result, record.is_error)
        event = ToolAnswered(own.index, call_id, record.name, record.result, record.is_error, record.duration_s)
        if call_id not in own.waiting:
            return [event]
        own.waiting.discard(call_id)
        self.answers[call_id] = record.result
        return [event, *self._end_if_answered(own)]

    def _end_if_answered(self, own: Completion) -> list[TurnEvent]:
        if own.waiting:
            return []
        self.is_held = self.holds
        return [own.finished("tool_calls", None)]

    def _on_finished(self, own: Completion, delta: Delta) -> list[TurnEvent]:
        events: list[TurnEvent] = []
        if delta.text:
            events += self._on_text(own, replace(delta, token_ids=(), logprobs=None))
        events += self._end_turn(own)
        self._output = delta.output or self._output
        self.has_ended_turn = delta.finish_reason == "stop"
        return [*events, own.finished(str(delta.finish_reason), delta.stop_reason)]

    def _is_outside(self, call: ParsedCall) -> bool:
        return self.toolbox is not None and self.toolbox.is_external(call)


def _is_whole(call: ParsedCall) -> bool:
    return isinstance(call, ToolCall)
