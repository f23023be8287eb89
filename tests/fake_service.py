"""A service whose model counts: the completion of any prompt is " 1 2 3 …". It knows which turns are open."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from jaxcept.scheduler.params import SamplingParams
from jaxcept.scheduler.plan import TokenLogprobs
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

VOCABULARY = 1000
DEFAULT_TOKENS = 4


class FakeService:
    """One token is one word; id i is " i". A prompt's ids are the lengths of its words.

    `delay_s` passes before each token. A chat with tools of the client's calls the first one, {"x": 1}, where
    tool_choice asks for it; a chat whose last message is "server tool" has the server run one in its midst.
    """

    UNCOMPILABLE = "(("

    def __init__(self, *, max_model_len: int = 64, delay_s: float = 0.0) -> None:
        self.model_names: Sequence[str] = ("fake", "alias")
        self.max_model_len = max_model_len
        self.delay_s = delay_s
        self.turns: list[ChatTurn | PromptTurn] = []
        self.callers: list[Caller] = []
        self.open: set[str] = set()
        self.is_alive = True
        self.is_ready = True
        self.figures: dict[str, float] = {}
        self.finish_reason = "length"
        self.error: Exception | None = None  # raised in the midst of a turn

    async def chat(self, turn: ChatTurn, caller: Caller) -> AsyncIterator[TurnEvent]:
        return self._begin(turn, caller, self.tokenize_chat(turn))

    async def complete(self, turn: PromptTurn, caller: Caller) -> AsyncIterator[TurnEvent]:
        ids = self.tokenize(turn.prompt) if isinstance(turn.prompt, str) else list(turn.prompt)
        return self._begin(turn, caller, ids)

    def _begin(self, turn: ChatTurn | PromptTurn, caller: Caller, ids: list[int]) -> AsyncIterator[TurnEvent]:
        if not ids:
            raise ServiceError(400, "prompt: expected at least one token", param="prompt")
        if len(ids) >= self.max_model_len:
            raise ServiceError(400, f"prompt_ids has {len(ids)} ids: expected at most {self.max_model_len - 1}",
                               param="prompt")  # fmt: skip
        if any(token_id >= VOCABULARY for token_id in ids):
            raise ServiceError(400, f"prompt: expected ids of 0 to {VOCABULARY - 1}", param="prompt")
        structured = turn.params.structured
        for kind in ("regex", "grammar"):
            if structured is not None and getattr(structured, kind) == self.UNCOMPILABLE:
                raise ServiceError(400, f"{kind}: cannot be compiled", param=kind)
        self.turns.append(turn)
        self.callers.append(caller)
        return self._play(turn, ids)

    async def _play(self, turn: ChatTurn | PromptTurn, ids: list[int]) -> AsyncIterator[TurnEvent]:
        self.open.add(turn.request_id)
        count = turn.params.max_tokens or DEFAULT_TOKENS
        try:
            yield TurnStarted(len(ids))
            for index in range(turn.params.n):
                async for event in self._completion(turn, index, count):
                    yield event
            if self.error is not None:
                raise self.error
            wanted = turn.params.prompt_logprobs
            told = None if wanted is None else (None, *(_logprobs(each, wanted) for each in ids[1:]))
            usage = Usage(len(ids), turn.params.n * count, len(ids) - 1, 0, 2, 3, 0.5, 7.0, 1)
            yield TurnDone(usage, tuple(ids), told)
        finally:
            self.open.discard(turn.request_id)

    async def _completion(self, turn: ChatTurn | PromptTurn, index: int, count: int) -> AsyncIterator[TurnEvent]:
        params: SamplingParams = turn.params
        calls: list[FullCall] = []
        text = ""
        if isinstance(turn, ChatTurn):
            if turn.messages[-1].get("content") == "server tool":
                yield CallDelta(index, 0, "s1", "clock", "{}", by_server=True)
                yield ToolAnswered(index, "s1", "clock", "noon", False, 0.25)
                calls.append(FullCall("s1", "clock", "{}", True, "noon"))
            if turn.tools and turn.tool_choice not in ("none", "auto"):
                name, number = turn.tools[0]["function"]["name"], len(calls)
                for piece, part in ((name, ""), (None, '{"x"'), (None, ": 1}")):
                    yield CallDelta(index, number, f"c{index}", piece, part)
                calls.append(FullCall(f"c{index}", name, '{"x": 1}'))
                yield TurnFinished(index, "tool_calls", None, "", tuple(calls), ())
                return
        ids = tuple(range(1, count + 1))
        for token_id in ids:
            await asyncio.sleep(self.delay_s)
            logprobs = None if params.logprobs is None else (_logprobs(token_id, params.logprobs),)
            text += f" {token_id}"
            yield TextDelta(index, f" {token_id}", (token_id,), logprobs)
        every = None if params.logprobs is None else tuple(_logprobs(token_id, params.logprobs) for token_id in ids)
        yield TurnFinished(index, self.finish_reason, None, text, tuple(calls), ids, every)

    def count_tokens(self, turn: ChatTurn) -> int:
        return len(self.tokenize_chat(turn))

    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [len(word) % VOCABULARY for word in text.split()]

    def tokenize_chat(self, turn: ChatTurn) -> list[int]:
        return self.tokenize(" ".join(json.dumps(message.get("content")) for message in turn.messages))

    def detokenize(self, token_ids: Sequence[int]) -> str:
        if any(token_id >= VOCABULARY for token_id in token_ids):
            raise ServiceError(400, f"tokens: expected ids of 0 to {VOCABULARY - 1}", param="tokens")
        return "".join(f" {token_id}" for token_id in token_ids)

    def tokenizer_info(self) -> dict[str, Any]:
        return {"tokenizer_class": "FakeTokenizer", "vocab_size": VOCABULARY, "eos_token": " 0"}

    def has_prefix(self, turn: ChatTurn, caller: Caller) -> bool:
        return False

    def metrics(self) -> dict[str, float]:
        return self.figures


def _logprobs(token_id: int, count: int) -> TokenLogprobs:
    return TokenLogprobs(-0.5, 1, tuple((token_id + i, -0.5 - i) for i in range(count)))
