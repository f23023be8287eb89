"""What the APIs ask of the engine: turns in, events out, and between two turns the context waits where it is."""

from __future__ import annotations

import asyncio
import re
import secrets
from array import array
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from jaxcept.async_llm import AsyncLLM, Stream
from jaxcept.constraint import ToolChoice, ToolMode
from jaxcept.conversations import CallRef, Conversations, Digest, IdBuffer, KnownTurn, digests_of, extend_digest
from jaxcept.engine import EngineDeadError
from jaxcept.outputs import Delta, RequestOutput, Spent
from jaxcept.scheduler.params import SamplingParams
from jaxcept.scheduler.plan import TokenLogprobs
from jaxcept.session import PROMPT_END, InterceptOptions
from jaxcept.text.reasoning import Split, Thoughts
from jaxcept.text.template import TemplateError
from jaxcept.tools.calls import ParsedCall, ToolCall
from jaxcept.tools.parsers import ToolCallParser
from jaxcept.tools.toolbox import Toolbox
from jaxcept_serve.call_stream import CallStream
from jaxcept_serve.conversion import with_server_calls
from jaxcept_serve.turns import (
    CallDelta,
    Caller,
    ChatTurn,
    PromptTurn,
    ServiceError,
    TextDelta,
    ToolAnswered,
    TurnDone,
    TurnEvent,
    TurnFinished,
    TurnStarted,
    Usage,
)

LONG_TEXT = 20_000  # characters from which on a text is encoded beside the event loop
_FIELD = re.compile(r"^([a-z_]+)[=:\[ ]")


@dataclass(frozen=True, slots=True)
class HoldOptions:
    """How contexts wait between two turns. Seconds; `max_held`: contexts that wait, at most. `memory_bytes`: for the
    ids of turns, so that no turn is encoded again."""

    ttl_s: float = 300.0
    max_ttl_s: float = 3600.0
    max_held: int = 1024
    memory_bytes: int = 256 << 20
    intercept_timeout_s: float = 120.0


@dataclass(frozen=True, slots=True)
class _Prompt:
    """What a turn's messages are in ids."""

    ids: list[int]
    digests: list[Digest]
    known: KnownTurn | None  # the turn that the ids go on from
    follows: str | None = None  # the request whose context waits


class EngineService:
    """The Service of one engine. Lives in one event loop; the engine has a thread of its own.

    `tools` gives the tools that the server runs, as they are at the moment. `make_parser` makes a parser of the model's
    calls, None where its template shows no format that is known; `make_thoughts` what tells its thoughts apart.
    """

    def __init__(
        self,
        llm: AsyncLLM,
        model_names: Sequence[str],
        *,
        tools: Callable[[], Toolbox] | None = None,
        make_parser: Callable[[], ToolCallParser] | None = None,
        make_thoughts: Callable[[], Thoughts] | None = None,
        hold: HoldOptions | None = None,
    ) -> None:
        self.llm = llm
        none = Toolbox()
        self._tools = tools if tools is not None else lambda: none
        self.hold = hold or HoldOptions()
        self.conversations = Conversations(max(1, self.hold.memory_bytes // 4), self.hold.max_held)
        self.is_draining = False
        self._names = tuple(model_names)
        self._make_parser = make_parser
        self._make_thoughts = make_thoughts
        self._tokenizer = llm.session.tokenizer
        self._token_bytes = llm.session.engine.ledger.block_bytes / llm.session.engine.scheduler.config.block_size

    @property
    def toolbox(self) -> Toolbox:
        """The tools that the server runs."""
        return self._tools()

    # What the server is.

    @property
    def model_names(self) -> Sequence[str]:
        """Names by which clients may ask for the model."""
        return self._names

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest sequence."""
        return self.llm.session.engine.scheduler.config.max_len

    @property
    def is_alive(self) -> bool:
        """Whether the engine's thread lives and the device has not failed."""
        return self.llm.is_alive

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken."""
        return self.is_alive and not self.is_draining

    def metrics(self) -> dict[str, float]:
        """The engine's figures by name, and the conversations that are held."""
        return {**self.llm.session.engine.metrics(), "held_conversations": self.conversations.num_held}

    # Text and ids.

    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text."""
        return self._tokenizer.encode(text, add_special_tokens)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of ids. ServiceError 400 for ids out of range."""
        for token_id in token_ids:
            if not 0 <= token_id < self._tokenizer.vocab_size:
                limit = self._tokenizer.vocab_size - 1
                raise ServiceError(400, f"tokens has id {token_id}: expected 0 to {limit}", param="tokens")
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)

    def tokenize_chat(self, turn: ChatTurn) -> list[int]:
        """Ids of the prompt that a turn makes, as it stands."""
        return self._encode_whole(turn, self._tools_of(turn))

    def count_tokens(self, turn: ChatTurn) -> int:
        """Tokens of the prompt that a turn makes."""
        return len(self.tokenize_chat(turn))

    def tokenizer_info(self) -> dict[str, Any]:
        """The tokenizer's special tokens and its chat template."""
        template = self._tokenizer.chat_template
        return {
            "tokenizer_class": type(self._tokenizer).__name__,
            "vocab_size": self._tokenizer.vocab_size,
            "bos_token": self._tokenizer.special_tokens.get("bos_token"),
            "eos_token": self._tokenizer.special_tokens.get("eos_token"),
            "pad_token": self._tokenizer.special_tokens.get("pad_token"),
            "unk_token": self._tokenizer.special_tokens.get("unk_token"),
            "model_max_length": self.max_model_len,
            "chat_template": template.source if template is not None else None,
        }

    def has_prefix(self, turn: ChatTurn, caller: Caller) -> bool:
        """Whether an earlier turn of this conversation is known."""
        digests = digests_of(caller.salt, _settings(turn, self._tools_of(turn)), turn.messages)
        return self.conversations.find(digests, turn.hints.conversation) is not None

    # Turns.

    async def chat(self, turn: ChatTurn, caller: Caller) -> AsyncIterator[TurnEvent]:
        """Starts a turn; returns once it is accepted."""
        self.require_ready()
        toolbox = self._tools_of(turn)
        num_chars = sum(len(str(message.get("content"))) for message in turn.messages)
        self._require_fit(num_chars)
        long = num_chars > LONG_TEXT
        prompt = (
            await asyncio.to_thread(self._encode, turn, toolbox, caller)
            if long
            else self._encode(turn, toolbox, caller)
        )
        hold_s = self._hold_s(turn)
        calls = toolbox if toolbox is not None and len(toolbox) and turn.tool_choice != "none" else None
        options = self._options(turn, hold_s)
        await self._check(turn.params, options, calls)
        follows = self.conversations.take(prompt.known) if prompt.known is not None and turn.params.n == 1 else None
        try:
            stream = await self.llm.submit(
                prompt.ids,
                turn.params,
                request_id=turn.request_id,
                toolbox=calls,
                intercept=options,
                cache_salt=caller.salt,
                follows=follows,
                priority=turn.hints.priority,
            )
        except (ValueError, EngineDeadError) as error:
            if follows is not None and prompt.known is not None and not isinstance(error, EngineDeadError):
                self.llm.abort(follows)
            refuse(error)
        run = _Run(self, turn.params, prompt.ids, calls, stream, holds=hold_s is not None, is_chat=True)
        return _Watched(self._watch(run, lambda finished: self._remember(turn, prompt, run, finished)), stream)

    async def complete(self, turn: PromptTurn, caller: Caller) -> AsyncIterator[TurnEvent]:
        """Starts a completion of a prompt as it stands."""
        self.require_ready()
        ids = await self.ids_of(turn.prompt, turn.add_special_tokens)
        await self._check(turn.params, None, None)
        try:
            stream = await self.llm.submit(
                ids,
                turn.params,
                request_id=turn.request_id,
                cache_salt=caller.salt,
                add_special_tokens=False,
                priority=turn.hints.priority,
            )
        except (ValueError, EngineDeadError) as error:
            refuse(error)
        return _Watched(self._watch(_Run(self, turn.params, ids, None, stream), lambda finished: None), stream)

    async def _check(self, params: SamplingParams, options: InterceptOptions | None, calls: Toolbox | None) -> None:
        """Compiles what the output is bound to beside the event loop, before the engine needs it."""
        if params.structured is None and calls is None:
            return
        try:
            await asyncio.to_thread(self.llm.session.check, params, options, calls)
        except ValueError as error:
            refuse(error)

    async def ids_of(self, prompt: str | Sequence[int], add_special_tokens: bool = True) -> list[int]:
        """Ids of a prompt that is given as it stands; a long one is encoded beside the event loop."""
        if not isinstance(prompt, str):
            return list(prompt)
        self._require_fit(len(prompt))
        if len(prompt) > LONG_TEXT:
            return await asyncio.to_thread(self._tokenizer.encode, prompt, add_special_tokens)
        return self._tokenizer.encode(prompt, add_special_tokens)

    def _require_fit(self, num_chars: int) -> None:
        """Refuses a text that cannot fit before it is encoded, which takes seconds for megabytes."""
        at_least = num_chars // self._tokenizer.max_token_chars
        if at_least >= self.max_model_len:
            limit = self.max_model_len - 1
            raise ServiceError(400, f"prompt_ids has at least {at_least} ids: expected at most {limit}", param="prompt")

    async def _watch(self, run: _Run, on_held: Callable[[TurnFinished], None]) -> AsyncGenerator[TurnEvent, None]:
        """The events of a turn; whoever closes them early aborts it."""
        with closing(run.stream):
            yield TurnStarted(len(run.prompt_ids))
            try:
                async for delta in run.stream:
                    for event in run.take(delta):
                        if isinstance(event, TurnFinished) and run.params.n == 1:
                            on_held(event)
                        yield event
                    if run.is_over:
                        break
            except EngineDeadError as error:
                refuse(error)
            if run.is_held:
                run.stream.detach()
            yield run.done()

    def _remember(self, turn: ChatTurn, prompt: _Prompt, run: _Run, finished: TurnFinished) -> None:
        """Remembers a turn by its messages, so that the next one goes on from its ids."""
        is_whole = finished.finish_reason in ("stop", "length", "tool_calls") and finished.stop_reason is None
        if not is_whole or turn.is_prewarm:
            return
        calls = finished.calls if finished.finish_reason == "tool_calls" else ()
        outside = [call for call in calls if not call.by_server]
        message = {
            "role": "assistant",
            "content": finished.text,
            "tool_calls": [
                {"id": call.call_id, "function": {"name": call.name, "arguments": call.arguments}} for call in outside
            ],
        }
        known = KnownTurn(
            buffer=IdBuffer(array("i", run.all_ids)),
            num_ids=len(run.all_ids),
            calls=run.open_calls,
            answers=dict(run.answers),
            ended_turn=run.has_ended_turn,
            request_id=turn.request_id if run.is_held else None,
            conversation=turn.hints.conversation,
        )
        digest = extend_digest(prompt.digests[-1], message)
        for request_id in self.conversations.remember(digest, known, prompt.known):
            self.llm.abort(request_id)

    def _hold_s(self, turn: ChatTurn) -> float | None:
        """How long the context may wait for the next turn; None: it does not."""
        wanted = self.hold.ttl_s if turn.hints.hold_ttl_s is None else turn.hints.hold_ttl_s
        seconds = min(wanted, self.hold.max_ttl_s)
        may_hold = turn.params.n == 1 and not turn.params.stop_token_ids and self.hold.max_held > 0
        ends = turn.is_prewarm or turn.params.prompt_logprobs is not None  # these are told at a sequence's end
        return seconds if seconds > 0 and may_hold and not ends else None

    def _options(self, turn: ChatTurn, hold_s: float | None) -> InterceptOptions:
        expected = turn.hints.expected_tool_s
        names = [str(tool.get("function", {}).get("name")) for tool in turn.tools] if expected is not None else []
        options = InterceptOptions(
            timeout_s=self.hold.intercept_timeout_s,
            hold_s=hold_s,
            expected_s={name: expected for name in names if expected is not None},
            tool_choice=_tool_choice(turn),
        )
        return options if turn.max_tool_calls is None else replace(options, max_interceptions=turn.max_tool_calls)

    def _tools_of(self, turn: ChatTurn) -> Toolbox | None:
        """The server's tools that the turn may use, and the client's."""
        try:
            toolbox = self.toolbox.select(turn.run_tools, turn.tools)
        except ValueError as error:
            raise ServiceError(400, str(error), param="tools") from None
        if turn.tool_choice not in ("none", "auto", "required") and turn.tool_choice not in toolbox:
            raise ServiceError(
                400, f"tool_choice names {turn.tool_choice!r}, which is no tool here", param="tool_choice"
            )
        if turn.tool_choice == "required" and not len(toolbox):
            raise ServiceError(400, "tool_choice is 'required', but there are no tools", param="tool_choice")
        return toolbox if len(toolbox) else None

    # Prompts.

    def _encode(self, turn: ChatTurn, toolbox: Toolbox | None, caller: Caller) -> _Prompt:
        """The turn's ids: those of its longest known beginning as they were, and the rest encoded."""
        digests = digests_of(caller.salt, _settings(turn, toolbox), turn.messages)
        match = self.conversations.find(digests, turn.hints.conversation) if turn.add_generation_prompt else None
        if match is not None:
            known, rest = match.turn, turn.messages[match.num_messages :]
            ids = self._encode_rest(known, rest, turn, toolbox) if rest else None
            if ids is not None:
                return _Prompt([*known.ids, *ids], digests, known)
        return _Prompt(self._encode_whole(turn, toolbox), digests, None)

    def _encode_rest(
        self, known: KnownTurn, rest: Sequence[Mapping[str, Any]], turn: ChatTurn, toolbox: Toolbox | None
    ) -> list[int] | None:
        """Ids of the messages behind a known turn; None where the template cannot render them by themselves."""
        answers = [
            {"role": "tool", "tool_call_id": call_id, "content": text} for call_id, text in known.answers.items()
        ]
        messages = with_server_calls([*answers, *rest] if rest[0].get("role") == "tool" else rest)
        try:
            return self._tokenizer.encode_following(
                known.calls,
                messages,
                ended_turn=known.ended_turn,
                tools=toolbox.schemas() if toolbox is not None else None,
                **turn.template_kwargs,
            )
        except TemplateError:
            return None

    def _encode_whole(self, turn: ChatTurn, toolbox: Toolbox | None) -> list[int]:
        try:
            return self._tokenizer.encode_chat(
                with_server_calls(turn.messages),
                toolbox.schemas() if toolbox is not None else None,
                turn.add_generation_prompt,
                **turn.template_kwargs,
            )
        except TemplateError as error:
            raise ServiceError(400, str(error), param="messages") from None

    # What runs use.

    def stream_calls(self, index: int, toolbox: Toolbox) -> CallStream:
        """A splitter for one completion's text. A call of a tool that nobody has is the server's: the model is told."""
        if self._make_parser is None:
            raise ServiceError(
                400, "tools: the model's chat template shows no known format of tool calls", param="tools"
            )
        prefix, count = secrets.token_hex(10), iter(range(1 << 30))

        def is_of_server(name: str) -> bool:
            made = toolbox.get(name)
            return made is None or made.function is not None

        return CallStream(self._make_parser(), index, lambda: f"call_{prefix}{next(count):04d}", is_of_server)

    def split_thoughts(self, prompt_ids: Sequence[int]) -> Thoughts | None:
        """A splitter for the turn that begins behind this prompt; None where thoughts are not told apart."""
        if self._make_thoughts is None:
            return None
        thoughts = self._make_thoughts()
        thoughts.begin_turn(self.detokenize(prompt_ids[-PROMPT_END:]))
        return thoughts

    @property
    def token_bytes(self) -> float:
        """Bytes of KV cache of one token."""
        return self._token_bytes

    def require_ready(self) -> None:
        """ServiceError 503 where no request is taken."""
        if self.is_draining:
            raise ServiceError(503, "the server is shutting down", retry_after_s=5.0)
        if not self.is_alive:
            raise ServiceError(503, "the engine has failed", retry_after_s=30.0)


class _Watched:
    """A turn's events. Closing them ends the turn even where nobody asked for the first: a generator that was never
    started would not."""

    def __init__(self, events: AsyncGenerator[TurnEvent, None], stream: Stream) -> None:
        self._events = events
        self._stream = stream

    def __aiter__(self) -> _Watched:
        return self

    async def __anext__(self) -> TurnEvent:
        return await anext(self._events)

    async def aclose(self) -> None:
        """Ends the turn, if it has not ended."""
        await self._events.aclose()
        self._stream.close()


class _Completion:
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


class _Run:
    """One turn under way: deltas of the engine to events of the turn."""

    def __init__(
        self,
        service: EngineService,
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
            _Completion(
                i,
                service.stream_calls(i, toolbox) if toolbox is not None else None,
                service.split_thoughts(prompt_ids) if is_chat else None,
            )
            for i in range(params.n)
        ]

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

    def _on_text(self, own: _Completion, delta: Delta) -> list[TurnEvent]:
        own.token_ids += delta.token_ids
        if not own.index:
            self.all_ids += delta.token_ids
        own.logprobs += delta.logprobs or ()
        thought, text = own.thoughts.feed(delta.text) if own.thoughts is not None else Split(said=delta.text)
        own.thought.append(thought)
        if thought or (own.thoughts is not None and own.thoughts.is_inside):
            own.num_thought += len(delta.token_ids)
        said, pieces = own.calls.feed(text) if own.calls is not None else (text, [])
        own.text.append(said)
        return [TextDelta(own.index, said, delta.token_ids, delta.logprobs, thought), *pieces]

    def _end_turn(self, own: _Completion) -> list[TurnEvent]:
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

    def _on_intercepted(self, own: _Completion, delta: Delta) -> list[TurnEvent]:
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

    def _on_answered(self, own: _Completion, delta: Delta) -> list[TurnEvent]:
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

    def _end_if_answered(self, own: _Completion) -> list[TurnEvent]:
        if own.waiting:
            return []
        self.is_held = self.holds
        return [own.finished("tool_calls", None)]

    def _on_finished(self, own: _Completion, delta: Delta) -> list[TurnEvent]:
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


def _tool_choice(turn: ChatTurn) -> ToolChoice:
    modes = {mode.value: mode for mode in ToolMode}
    mode = modes.get(turn.tool_choice)
    name = turn.tool_choice if mode is None else None
    one_by_one = turn.max_tool_calls is not None  # rounds of calls are counted: one call each
    return ToolChoice(ToolMode.AUTO if mode is None else mode, name, turn.parallel_tool_calls and not one_by_one)


def _settings(turn: ChatTurn, toolbox: Toolbox | None) -> dict[str, Any]:
    """What the prompt depends on beside its messages."""
    return {"tools": toolbox.schemas() if toolbox is not None else None, "template": dict(turn.template_kwargs)}


def refuse(error: Exception) -> NoReturn:
    """Raises the ServiceError that says what an error of the engine means to its client."""
    if isinstance(error, EngineDeadError):
        raise ServiceError(503, "the engine has failed", retry_after_s=30.0) from error
    text = str(error)
    found = _FIELD.match(text)
    names = {"prompt_ids": "prompt", "token_ids": "prompt"}
    field = found[1] if found is not None else None
    raise ServiceError(400, text, param=names.get(field, field) if field is not None else None) from None
