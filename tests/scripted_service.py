"""A service that plays scripts: what an API asks of the engine is recorded, and what it answers is written down."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from jaxcept_serve.turns import (
    CallDelta,
    Caller,
    ChatTurn,
    FullCall,
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

Script = Sequence[TurnEvent | Exception | float]

USAGE = Usage(prompt_tokens=20, completion_tokens=7, cached_tokens=12, cache_write_tokens=5)


def said(*texts: str, finish: str = "stop", stop: str | None = None, usage: Usage = USAGE) -> Script:
    """A turn of text alone."""
    deltas = [TextDelta(0, text, (ord(text[0]),)) for text in texts]
    return [*deltas, TurnFinished(0, finish, stop, "".join(texts), (), ()), TurnDone(usage)]


def called(*calls: tuple[str, str, str], text: str = "", by_server: bool = False) -> list[TurnEvent]:
    """Calls (id, name, arguments), arguments in two pieces; without an end where the server runs them."""
    events: list[TurnEvent] = [TextDelta(0, text)] if text else []
    for number, (call_id, name, arguments) in enumerate(calls):
        half = len(arguments) // 2
        events.append(CallDelta(0, number, call_id, name, "", by_server))
        events += [
            CallDelta(0, number, call_id, None, part, by_server) for part in (arguments[:half], arguments[half:])
        ]
    if by_server:
        return events
    whole = tuple(FullCall(*call) for call in calls)
    return [*events, TurnFinished(0, "tool_calls", None, text, whole, ()), TurnDone(USAGE)]


def ran(call_id: str, name: str, arguments: str, answer: str, is_error: bool = False) -> list[TurnEvent]:
    """A call that the server ran."""
    return [*called((call_id, name, arguments), by_server=True), ToolAnswered(0, call_id, name, answer, is_error, 0.1)]


class Play:
    """The events of a script; counted as closed once, when it is closed, whether or not it was begun."""

    def __init__(self, script: Script, service: ScriptedService) -> None:
        self._script = list(script)
        self._service: ScriptedService | None = service

    def __aiter__(self) -> Play:
        return self

    async def __anext__(self) -> TurnEvent:
        await asyncio.sleep(0)
        while self._script:
            entry = self._script.pop(0)
            if isinstance(entry, Exception):
                raise entry
            if not isinstance(entry, float):
                return entry
            await asyncio.sleep(entry)
        raise StopAsyncIteration

    async def aclose(self) -> None:
        if self._service is not None:
            self._service.num_closed += 1
            self._service = None


class ScriptedService:
    """Plays one script per turn, in order; `turns` and `callers` are what was asked, `num_closed` the turns closed."""

    def __init__(self, *scripts: Script, max_model_len: int = 4096) -> None:
        self.model_names: Sequence[str] = ("tiny", "alias")
        self.max_model_len = max_model_len
        self.scripts = list(scripts)
        self.turns: list[ChatTurn] = []
        self.callers: list[Caller] = []
        self.num_started = 0
        self.num_closed = 0
        self.is_alive = True
        self.is_ready = True
        self.respond: Callable[[ChatTurn], Script] | None = None

    async def chat(self, turn: ChatTurn, caller: Caller) -> AsyncIterator[TurnEvent]:
        self.turns.append(turn)
        self.callers.append(caller)
        script = self.respond(turn) if self.respond else self.scripts.pop(0)
        if script and isinstance(script[0], ServiceError):
            raise script[0]
        self.num_started += 1
        return Play([TurnStarted(USAGE.prompt_tokens), *script], self)

    async def complete(self, turn: PromptTurn, caller: Caller) -> AsyncIterator[TurnEvent]:
        raise NotImplementedError

    def count_tokens(self, turn: ChatTurn) -> int:
        self.turns.append(turn)
        return sum(len(str(message.get("content") or "").split()) for message in turn.messages)

    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) for letter in text]

    def tokenize_chat(self, turn: ChatTurn) -> list[int]:
        return self.tokenize(str(turn.messages))

    def detokenize(self, token_ids: Sequence[int]) -> str:
        return "".join(chr(token_id) for token_id in token_ids)

    def tokenizer_info(self) -> dict[str, Any]:
        return {}

    def has_prefix(self, turn: ChatTurn, caller: Caller) -> bool:
        return False

    def metrics(self) -> dict[str, float]:
        return {}
