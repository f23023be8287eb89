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
from jaxcept.conversations import Conversations, Digest, IdBuffer, KnownTurn, digests_of, extend_digest
from jaxcept.engine import EngineDeadError
from jaxcept.scheduler.params import SamplingParams
from jaxcept.session import PROMPT_END, InterceptOptions
from jaxcept.text.reasoning import OPEN, Thoughts, without_spans
from jaxcept.text.template import TemplateError
from jaxcept.tools.parsers import ToolCallParser
from jaxcept.tools.toolbox import Toolbox
from jaxcept_serve.call_stream import CallStream
from jaxcept_serve.conversion import with_server_calls
from jaxcept_serve.turn_run import TurnRun
from jaxcept_serve.turns import (
    Caller,
    ChatTurn,
    PromptTurn,
    ServiceError,
    TurnEvent,
    TurnFinished,
    TurnStarted,
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
    thoughts: tuple[tuple[int, int], ...] = ()  # spans of the ids
    is_cut: bool = False  # the turn's thoughts are left out


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
        if follows is not None and prompt.is_cut:
            self.llm.abort(follows)  # what lies before the first thought stays in the prefix cache
            follows = None
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
        run = TurnRun(self, turn.params, prompt.ids, calls, stream, holds=hold_s is not None, is_chat=True)
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
        return _Watched(self._watch(TurnRun(self, turn.params, ids, None, stream), lambda finished: None), stream)

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

    async def _watch(self, run: TurnRun, on_held: Callable[[TurnFinished], None]) -> AsyncGenerator[TurnEvent, None]:
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

    def _remember(self, turn: ChatTurn, prompt: _Prompt, run: TurnRun, finished: TurnFinished) -> None:
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
            thoughts=(*prompt.thoughts, *run.spans.found),
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
            if ids is not None and self._drops_thoughts(known, rest):
                return _Prompt([*without_spans(known.ids, known.thoughts), *ids], digests, known, is_cut=True)
            if ids is not None:
                return _Prompt([*known.ids, *ids], digests, known, known.thoughts)
        return _Prompt(self._encode_whole(turn, toolbox), digests, None)

    def _drops_thoughts(self, known: KnownTurn, rest: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the template would leave out what the model thought so far, were it to render it all."""
        template = self._tokenizer.chat_template
        asks = any(message.get("role") == "user" for message in rest)
        return asks and bool(known.thoughts) and template is not None and template.drops_thoughts

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

    def opening_of(self, ids: Sequence[int]) -> int | None:
        """Where the tag that opens a thought stands at the end of these ids; None where that is not known."""
        end = list(ids[-PROMPT_END:])
        tag = self._tokenizer.token_id(OPEN)
        return len(ids) - 1 - end[::-1].index(tag) if tag in end else None

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
