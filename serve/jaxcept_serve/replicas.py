"""Several engines behind one server: turns go where their context is, and begin anew on another where that one dies.

Knows nothing of how engines are reached: `ray_engines` brings them.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from jaxcept.conversations import digests_of, extend_digest
from jaxcept.text.template import TemplateError
from jaxcept.text.tokenizer import Tokenizer
from jaxcept.tools.toolbox import Toolbox
from jaxcept_serve.conversion import with_server_calls
from jaxcept_serve.routing import Choice, Reason, Router
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
)

logger = logging.getLogger(__name__)

Turn = ChatTurn | PromptTurn


class EngineLostError(Exception):
    """The engine that was asked is gone."""


class RemoteEngine(Protocol):
    """An engine somewhere else."""

    @property
    def name(self) -> str:
        """What logs and the router call it; its successor has the same name."""
        ...

    async def start(self, turn: Turn, caller: Caller) -> AsyncGenerator[TurnEvent, None]:
        """Its events, once the turn is accepted. ServiceError where it is not; EngineLostError, here and later."""
        ...


@dataclass(frozen=True, slots=True)
class Described:
    """What an engine says of itself. `birth` is another one after every start."""

    birth: str
    max_model_len: int
    tools: Sequence[Mapping[str, Any]]
    figures: Mapping[str, float]


class ReplicaService:
    """The Service of several engines. Lives in one event loop; `report` is called from any thread."""

    def __init__(
        self,
        engines: Sequence[RemoteEngine],
        described: Sequence[Described],
        tokenizer: Tokenizer,
        names: Sequence[str],
    ) -> None:
        self.router = Router([engine.name for engine in engines])
        self.is_draining = False
        self._engines = {engine.name: engine for engine in engines}
        self._described = {engine.name: told for engine, told in zip(engines, described, strict=True)}
        self._reports: deque[tuple[str, Described]] = deque()
        self._tokenizer = tokenizer
        self._names = tuple(names)
        self._toolbox = Toolbox(described[0].tools)

    def report(self, name: str, told: Described) -> None:
        """An engine has said how it is."""
        self._reports.append((name, told))

    def close(self) -> None:
        """Ends the threads of what it owns."""
        self._toolbox.close()

    # What the server is.

    @property
    def model_names(self) -> Sequence[str]:
        """Names by which clients may ask for the model."""
        return self._names

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest sequence."""
        return min(told.max_model_len for told in self._described.values())

    @property
    def is_alive(self) -> bool:
        """Always: dead engines are replaced."""
        return True

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken."""
        self._take_reports()
        return bool(self.router.up) and not self.is_draining

    def metrics(self) -> dict[str, float]:
        """The figures of all engines that are up, added up, and how many engines are up."""
        self._take_reports()
        total: dict[str, float] = {}
        for name in self.router.up:
            for figure, value in self._described[name].figures.items():
                total[figure] = total.get(figure, 0.0) + value
        return {**total, "num_engines": float(len(self.router.up))}

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
        try:
            return self._tokenizer.encode_chat(
                with_server_calls(turn.messages),
                self._schemas(turn) or None,
                turn.add_generation_prompt,
                **turn.template_kwargs,
            )
        except TemplateError as error:
            raise ServiceError(400, str(error), param="messages") from None

    def count_tokens(self, turn: ChatTurn) -> int:
        """Tokens of the prompt that a turn makes."""
        return len(self.tokenize_chat(turn))

    def tokenizer_info(self) -> dict[str, Any]:
        """The tokenizer's special tokens and its chat template."""
        template, special = self._tokenizer.chat_template, self._tokenizer.special_tokens
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        return {
            "tokenizer_class": type(self._tokenizer).__name__,
            "vocab_size": self._tokenizer.vocab_size,
            **{name: special.get(name) for name in names},
            "model_max_length": self.max_model_len,
            "chat_template": template.source if template is not None else None,
        }

    def has_prefix(self, turn: ChatTurn, caller: Caller) -> bool:
        """Whether an earlier turn of this conversation is known."""
        return self.router.holds(self._digests(turn, caller))

    # Turns.

    async def chat(self, turn: ChatTurn, caller: Caller) -> AsyncIterator[TurnEvent]:
        """Starts a turn; returns once an engine has accepted it."""
        run = _Run(self, turn, caller, self._digests(turn, caller), _name_of(turn, caller))
        await run.start()
        return run

    async def complete(self, turn: PromptTurn, caller: Caller) -> AsyncIterator[TurnEvent]:
        """The same for a prompt as it stands."""
        digests = [b"", extend_digest(caller.salt.encode(), {"role": "prompt", "content": turn.prompt})]
        run = _Run(self, turn, caller, digests, _name_of(turn, caller))
        await run.start()
        return run

    def engine(self, name: str) -> RemoteEngine:
        """The engine of that name."""
        return self._engines[name]

    def choose(self, digests: Sequence[bytes], name: bytes | None) -> Choice:
        """The engine for a turn that begins. ServiceError 503 where there is none."""
        self._take_reports()
        if self.is_draining:
            raise ServiceError(503, "the server is shutting down", retry_after_s=5.0)
        choice = self.router.begin(digests, name)
        if choice is None:
            raise ServiceError(503, "no engine is there at the moment", retry_after_s=5.0)
        return choice

    def birth(self, name: str) -> str:
        """Which of an engine and its successors is there now."""
        return self._described[name].birth

    def lose(self, name: str, birth: str) -> None:
        """An engine is gone, until it or its successor reports. Its successor, if there is one, is not meant."""
        if name not in self.router.up or birth != self.birth(name):
            return
        count = self.router.down(name)
        logger.error("%s died, with the contexts of %d turns", name, count)
        reports = [self._reports.popleft() for _ in range(len(self._reports))]  # another thread may append
        kept = [(each, told) for each, told in reports if (each, told.birth) != (name, birth)]
        self._reports.extendleft(reversed(kept))  # what it said before is no sign of life

    def _take_reports(self) -> None:
        while self._reports:
            name, told = self._reports.popleft()
            if told.birth != self.birth(name):
                self.lose(name, self.birth(name))  # if nobody has noticed that it died
                self.router.up_again(name)
                logger.info("%s is there again", name)
            elif name not in self.router.up:
                self.router.up_again(name)
                logger.info("%s answers again", name)
            self._described[name] = told

    def _digests(self, turn: ChatTurn, caller: Caller) -> list[bytes]:
        settings = {"tools": self._schemas(turn), "template": dict(turn.template_kwargs)}
        return digests_of(caller.salt, settings, turn.messages)

    def _schemas(self, turn: ChatTurn) -> list[dict[str, Any]]:
        try:
            return self._toolbox.select(turn.run_tools, turn.tools).schemas()
        except ValueError as error:
            raise ServiceError(400, str(error), param="tools") from None


class _Run:
    """One turn, on one engine after another if need be: its events, once it is started."""

    def __init__(
        self, service: ReplicaService, turn: Turn, caller: Caller, digests: Sequence[bytes], name: bytes | None
    ) -> None:
        self._service, self._turn, self._caller = service, turn, caller
        self._digests, self._name = digests, name
        self._engine = self._birth = ""
        self._stream: AsyncGenerator[TurnEvent, None]
        self._sent: list[TurnEvent] = []  # behind its start
        self._has_started = False
        self._held: bytes | None = None
        self._is_started = False
        self._events = self._write()

    def __aiter__(self) -> _Run:
        return self

    async def __anext__(self) -> TurnEvent:
        self._is_started = True
        return await anext(self._events)

    async def aclose(self) -> None:
        """Ends the turn, if it has not ended. A generator would not, where nobody asked for its first event."""
        await self._events.aclose()
        if not self._is_started:
            self._is_started = True
            self._service.router.end(self._engine)
            await self._stream.aclose()

    async def start(self) -> None:
        """Returns once an engine has accepted the turn. ServiceError."""
        while True:
            choice = self._service.choose(self._digests, self._name)
            self._engine, self._birth = choice.engine, self._service.birth(choice.engine)
            request_id = self._turn.request_id
            if choice.reason is Reason.RECOMPUTED:
                logger.warning("%s: its conversation was on %s, which died: recomputed on %s", request_id,
                               choice.instead_of, choice.engine)  # fmt: skip
            else:
                logger.debug("%s: on %s (%s, %d messages known)", request_id, choice.engine, choice.reason,
                             choice.num_known)  # fmt: skip
            try:
                self._stream = await self._service.engine(choice.engine).start(self._turn, self._caller)
                return
            except EngineLostError:
                self._end()
            except BaseException:
                self._service.router.end(choice.engine)
                raise

    async def _write(self) -> AsyncGenerator[TurnEvent, None]:
        """The turn's events. ServiceError 503 where its engine died and it cannot begin anew unnoticed."""
        is_running = True
        try:
            while True:
                try:
                    async for event in self._stream:
                        if isinstance(event, TurnStarted):
                            if self._has_started:
                                continue
                            self._has_started = True
                        else:
                            self._sent.append(event)
                        self._note(event)
                        yield event
                    return
                except EngineLostError:
                    is_running = False
                    self._end()
                await self._begin_anew()
                is_running = True
        finally:
            if is_running:
                self._service.router.end(self._engine, self._held, self._name)
                await self._stream.aclose()

    def _end(self) -> None:
        self._service.lose(self._engine, self._birth)
        self._service.router.end(self._engine)

    async def _begin_anew(self) -> None:
        """Another engine writes the same again, and what the client has is skipped."""
        while True:
            self._require_repeatable()
            lost = self._engine
            await self.start()
            logger.warning("%s: %s died: begun anew on %s", self._turn.request_id, lost, self._engine)
            try:
                ids = await self._skip()
            except EngineLostError:
                self._end()
                continue
            except BaseException:
                self._service.router.end(self._engine)
                await self._stream.aclose()
                raise
            self._stream = _renamed(self._stream, ids)
            return

    async def _skip(self) -> dict[str, str]:
        """Reads as many events as were sent; how calls are to be renamed. ServiceError 503 where the events differ."""
        ids: dict[str, str] = {}
        for old in self._sent:
            new = await anext(self._stream, None)
            if isinstance(new, TurnStarted):
                new = await anext(self._stream, None)
            if new is None or not _same(old, new, ids):
                self._engine_gone()
        return ids

    def _require_repeatable(self) -> None:
        params = self._turn.params
        is_determined = params.n == 1 and (params.temperature == 0 or params.seed is not None)
        has_acted = any(isinstance(event, ToolAnswered) for event in self._sent)
        if self._sent and (has_acted or not is_determined):
            self._engine_gone()

    def _engine_gone(self) -> None:
        raise ServiceError(503, "the engine that wrote this answer died; ask again", retry_after_s=1.0)

    def _note(self, event: TurnEvent) -> None:
        if not isinstance(event, TurnFinished) or isinstance(self._turn, PromptTurn) or self._turn.params.n > 1:
            return
        outside = [call for call in event.calls if not call.by_server] if event.finish_reason == "tool_calls" else []
        calls = [{"id": call.call_id, "function": {"name": call.name, "arguments": call.arguments}} for call in outside]
        message = {"role": "assistant", "content": event.text, "tool_calls": calls}
        self._held = extend_digest(self._digests[-1], message)


def _name_of(turn: Turn, caller: Caller) -> bytes | None:
    """The name that the client gave the conversation, as this caller's."""
    conversation = turn.hints.conversation
    return None if conversation is None else f"{caller.salt}\0{conversation}".encode()


def _same(old: TurnEvent, new: TurnEvent, ids: dict[str, str]) -> bool:
    """Whether an event says again what was said; `ids` learns the old ids of calls by their new ones."""
    match old, new:
        case TextDelta(), TextDelta():
            said = [(each.index, each.thought, each.text, each.token_ids) for each in (old, new)]
            return said[0] == said[1]
        case CallDelta(), CallDelta():
            ids[new.call_id] = old.call_id
            return replace(new, call_id=old.call_id) == old
        case TurnFinished(), TurnFinished():
            return (old.finish_reason, old.text, old.token_ids) == (new.finish_reason, new.text, new.token_ids)
    return False


async def _renamed(stream: AsyncGenerator[TurnEvent, None], ids: dict[str, str]) -> AsyncGenerator[TurnEvent, None]:
    """The events with the ids of calls that the client knows already."""
    try:
        async for event in stream:
            match event:
                case CallDelta() | ToolAnswered():
                    yield replace(event, call_id=ids.get(event.call_id, event.call_id))
                case TurnFinished():
                    calls = [replace(call, call_id=ids.get(call.call_id, call.call_id)) for call in event.calls]
                    yield replace(event, calls=tuple(calls))
                case TurnStarted() | TextDelta() | TurnDone():
                    yield event
    finally:
        await stream.aclose()
