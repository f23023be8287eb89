"""/v1/completions: prompts as they stand, text or token ids, one or many."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from jaxcept.scheduler.params import MAX_LOGPROBS, MAX_N
from jaxcept_serve.api import HINT_FIELDS, MAX_NAME_CHARS, Api, all_fields, openai_usage, prewarms, usage_so_far
from jaxcept_serve.logprobs import completion_logprobs, prompt_logprobs
from jaxcept_serve.sampling import MAX_INT, SAMPLING_FIELDS, UNSUPPORTED, constraints_asked, read_sampling
from jaxcept_serve.sse import DONE, closing, event
from jaxcept_serve.turn_chunks import retold
from jaxcept_serve.turns import (
    Caller,
    PromptTurn,
    ServiceError,
    TextDelta,
    TurnDone,
    TurnEvent,
    TurnFinished,
    TurnStarted,
    Usage,
    require_whole,
)
from jaxcept_serve.wire import Body, Field, as_token_ids, bad, json_response, read_fields, refuse_fields, shown

_REFUSED = UNSUPPORTED | {"suffix": "insertion is not supported"}
_STREAM_OPTIONS = (Field("include_usage", "boolean", default=False), Field("continuous_usage_stats", "boolean"))
MAX_PROMPT_IDS = 1 << 22
_TEXT = {"type": "string", "minLength": 1}
_IDS = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": MAX_INT}}

COMPLETION_FIELDS = all_fields(
    (
        Field("model", "string", "Name of the model; absent: the first.", max_length=MAX_NAME_CHARS),
        Field("prompt", "any", "A text, token ids, or an array of either.", required=True,
              schema={"anyOf": [_TEXT, _IDS, {"type": "array", "minItems": 1, "items": {"anyOf": [_TEXT, _IDS]}}]}),
        Field("max_tokens", "integer", default=16, minimum=0, maximum=MAX_INT),
        Field("best_of", "integer", "Accepted where it equals n.", minimum=1, maximum=MAX_N),
        Field("echo", "boolean", "Give the prompt back before the completion.", default=False),
        Field("logprobs", "integer", minimum=0, maximum=MAX_LOGPROBS),
        Field("add_special_tokens", "boolean", default=True),
        Field("stream", "boolean", default=False),
        Field("stream_options", "object", read=lambda value, path: read_fields(value, _STREAM_OPTIONS, path),
              schema={"properties": {field.name: field.json_schema for field in _STREAM_OPTIONS}}),
        Field("user", "string", max_length=MAX_NAME_CHARS),
    ),
    SAMPLING_FIELDS,
    HINT_FIELDS,
)  # fmt: skip


def routes(api: Api) -> list[BaseRoute]:
    """POST /v1/completions."""
    return [Route("/v1/completions", Completions(api).create, methods=["POST"])]


def read_prompts(value: Any, max_prompts: int) -> list[str | list[int]]:
    """The prompts of a request. Raises ServiceError 400."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise bad("prompt", f"expected text, token ids, or a non-empty array of either, got {shown(value)}")
    if type(value[0]) is int:
        if len(value) > MAX_PROMPT_IDS:
            raise bad("prompt", f"expected at most {MAX_PROMPT_IDS} token ids, got {len(value)}")
        return [as_token_ids(value, "prompt")]
    if len(value) > max_prompts:
        raise bad("prompt", f"expected at most {max_prompts} prompts, got {len(value)}")
    prompts: list[str | list[int]] = []
    for i, prompt in enumerate(value):
        if isinstance(prompt, list):
            prompts.append(as_token_ids(prompt, f"prompt[{i}]"))
        elif isinstance(prompt, str):
            prompts.append(prompt)
        else:
            raise bad(f"prompt[{i}]", f"expected text or an array of token ids, got {shown(prompt)}")
    return prompts


@dataclass(frozen=True, slots=True)
class _Ask:
    """A request as it was understood. `only_echo`: nothing is to be generated."""

    turns: list[PromptTurn]
    request_id: str
    model: str
    echo: bool
    logprobs: int | None
    only_echo: bool
    tells_usage: bool
    tells_all_along: bool  # usage so far, with every chunk
    tells_prompt_logprobs: bool
    constraint: str  # the field of it

    @property
    def n(self) -> int:
        """Completions of a prompt."""
        return self.turns[0].params.n


class Completions:
    """The route's handler."""

    def __init__(self, api: Api) -> None:
        self._api = api

    async def create(self, request: Request) -> Response:
        """POST /v1/completions."""
        api, caller = self._api, self._api.caller(request)
        body = await api.read_body(request)
        refuse_fields(body, _REFUSED)
        values = read_fields(body, COMPLETION_FIELDS)
        ask = self._read(values, request)
        api.admit(len(ask.turns) * ask.n)
        if values["stream"]:
            if ask.echo:
                raise bad("echo", "expected stream to be false with it")
            started = await self._start(ask, caller)
            return api.stream(request, _Closing(self._chunks(started, ask), started))
        return json_response(await api.collect(request, self._whole(ask, caller)))

    def _read(self, values: Body, request: Request) -> _Ask:
        api = self._api
        if values["best_of"] is not None and values["best_of"] != values["n"]:
            raise bad("best_of", f"expected n={values['n']}, or nothing")
        if prewarms(values):
            raise bad("prompt_cache_options.prewarm", "is for conversations: use /v1/chat/completions or /v1/responses")
        only_echo = values["max_tokens"] == 0
        if only_echo and not values["echo"]:
            raise bad("max_tokens", "expected 1 or more where the prompt is not echoed")
        params = read_sampling(
            values, api.options, max_tokens=max(1, values["max_tokens"]), logprobs=values["logprobs"]
        )
        if values["echo"] and values["logprobs"] is not None:
            params = replace(params, prompt_logprobs=values["logprobs"])
        prompts = read_prompts(values["prompt"], api.options.max_prompts)
        if len(prompts) * params.n > api.options.max_completions:
            raise bad("n", f"expected at most {api.options.max_completions} completions, prompts times n")
        request_id, hints = uuid.uuid4().hex, api.hints(values, request)
        turns = [
            PromptTurn(f"cmpl-{request_id}-{i}", prompt, params, values["add_special_tokens"], hints)
            for i, prompt in enumerate(prompts)
        ]
        asked: Mapping[str, Any] = values["stream_options"] or {}
        tells_usage = bool(asked.get("include_usage"))
        model = api.check_model(values["model"])
        return _Ask(
            turns=turns,
            request_id=f"cmpl-{request_id}",
            model=model,
            echo=values["echo"],
            logprobs=values["logprobs"],
            only_echo=only_echo,
            tells_usage=tells_usage,
            tells_prompt_logprobs=values["prompt_logprobs"] is not None,
            tells_all_along=tells_usage and bool(asked.get("continuous_usage_stats")),
            constraint=next(iter(constraints_asked(values)), "response_format"),
        )

    async def _start(self, ask: _Ask, caller: Caller) -> list[AsyncIterator[TurnEvent]]:
        """All of them, or none."""
        started: list[AsyncIterator[TurnEvent]] = []
        try:
            for turn in ask.turns:
                started.append(await self._api.service.complete(turn, caller))
        except BaseException as error:
            for events in started:
                async with closing(events):
                    pass
            if isinstance(error, ServiceError):
                raise retold(error, "prompt", ask.constraint) from None
            raise
        return started

    async def _whole(self, ask: _Ask, caller: Caller) -> Body:
        started = await self._start(ask, caller)
        tasks = [asyncio.ensure_future(self._collect(events, ask, i)) for i, events in enumerate(started)]
        try:
            made = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        choices = [choice for part, _ in made for choice in part]
        usage = _sum([usage for _, usage in made])
        usage = replace(usage, completion_tokens=0) if ask.only_echo else usage
        return {**_head(ask), "choices": choices, "usage": openai_usage(usage)}

    async def _collect(self, events: AsyncIterator[TurnEvent], ask: _Ask, number: int) -> tuple[list[Body], Usage]:
        finished: list[TurnFinished] = []
        done: TurnDone | None = None
        async with closing(events):
            async for item in events:
                if isinstance(item, TurnFinished):
                    finished.append(require_whole(item))
                elif isinstance(item, TurnDone):
                    done = item
        if done is None:
            raise ServiceError(500, "the completion broke off")
        finished.sort(key=lambda item: item.index)
        return [self._choice(item, done, ask, number) for item in finished], done.usage

    def _choice(self, item: TurnFinished, done: TurnDone, ask: _Ask, number: int) -> Body:
        text, ids = ("", ()) if ask.only_echo else (item.text, item.token_ids)
        entries: list[Any] = [] if ask.only_echo else list(item.logprobs or ())
        if ask.echo:
            prompt = ask.turns[number].prompt
            text = (prompt if isinstance(prompt, str) else self._api.service.detokenize(done.prompt_token_ids)) + text
            ids = (*done.prompt_token_ids, *ids)
            entries = [*(done.prompt_logprobs or ()), *entries]
        choice: Body = {"index": number * ask.n + item.index, "text": text, "logprobs": None}
        if ask.logprobs is not None:
            choice["logprobs"] = completion_logprobs(ids, entries, self._token_text)
        if ask.tells_prompt_logprobs and done.prompt_logprobs is not None:
            told = prompt_logprobs(done.prompt_token_ids, done.prompt_logprobs, self._token_text)
            choice["prompt_logprobs"] = told
        return choice | _finish(item)

    async def _chunks(self, started: Sequence[AsyncIterator[TurnEvent]], ask: _Ask) -> AsyncGenerator[bytes, None]:
        usages: list[Usage] = []
        offsets: dict[int, int] = {}
        prompt_tokens = completion_tokens = 0
        async for number, item in _merged(started):
            if isinstance(item, TurnStarted):
                prompt_tokens += item.prompt_tokens
                continue
            if isinstance(item, TurnDone):
                usages.append(item.usage)
                continue
            index = number * ask.n + getattr(item, "index", 0)
            completion_tokens += len(item.token_ids) if isinstance(item, TextDelta) else 0
            usage = usage_so_far(prompt_tokens, completion_tokens) if ask.tells_all_along else None
            if isinstance(item, TextDelta) and (item.text or item.logprobs):
                logprobs = None
                if ask.logprobs is not None and item.logprobs:
                    at = offsets.get(index, 0)
                    logprobs = completion_logprobs(item.token_ids, item.logprobs, self._token_text, at)
                    offsets[index] = at + sum(len(token) for token in logprobs["tokens"])
                yield _chunk(
                    ask, {"index": index, "text": item.text, "logprobs": logprobs, "finish_reason": None}, usage
                )
            elif isinstance(item, TurnFinished):
                end = _finish(require_whole(item))
                yield _chunk(ask, {"index": index, "text": "", "logprobs": None} | end, usage)
        if ask.tells_usage:
            yield event({**_head(ask), "choices": [], "usage": openai_usage(_sum(usages))})
        yield DONE

    def _token_text(self, token_id: int) -> str:
        return self._api.service.detokenize([token_id])


class _Closing:
    """Chunks that close all turns, also where none was asked for yet."""

    def __init__(self, chunks: AsyncGenerator[bytes, None], started: Sequence[AsyncIterator[TurnEvent]]) -> None:
        self._chunks = chunks
        self._started = started

    def __aiter__(self) -> _Closing:
        return self

    async def __anext__(self) -> bytes:
        return await anext(self._chunks)

    async def aclose(self) -> None:
        """Ends what has not ended."""
        await self._chunks.aclose()
        for events in self._started:
            async with closing(events):
                pass


async def _merged(started: Sequence[AsyncIterator[TurnEvent]]) -> AsyncGenerator[tuple[int, TurnEvent], None]:
    """The events of several turns as they come, each with its turn's number."""
    if len(started) == 1:
        async for item in started[0]:
            yield 0, item
        return
    queue: asyncio.Queue[tuple[int, TurnEvent | BaseException | None]] = asyncio.Queue()

    async def pump(number: int, events: AsyncIterator[TurnEvent]) -> None:
        try:
            async for item in events:
                queue.put_nowait((number, item))
        except BaseException as error:
            queue.put_nowait((number, error))
            raise
        queue.put_nowait((number, None))

    tasks = [asyncio.ensure_future(pump(i, events)) for i, events in enumerate(started)]
    try:
        left = len(tasks)
        while left:
            number, arrived = await queue.get()
            if isinstance(arrived, BaseException):
                raise arrived
            if arrived is None:
                left -= 1
            else:
                yield number, arrived
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _head(ask: _Ask) -> Body:
    return {"id": ask.request_id, "object": "text_completion", "created": int(time.time()), "model": ask.model}


def _chunk(ask: _Ask, choice: Mapping[str, Any], usage: Body | None) -> bytes:
    told = {"usage": usage} if ask.tells_usage else {}
    return event({**_head(ask), "choices": [choice], **told})


def _finish(finished: TurnFinished) -> Body:
    reason = finished.finish_reason
    is_known = reason in ("stop", "length")
    told: Body = {"finish_reason": reason if is_known else "stop"}
    if finished.stop_reason is not None:
        told["stop_reason"] = finished.stop_reason
    return told if is_known else {**told, "jaxcept_finish_reason": reason}


def _sum(usages: Sequence[Usage]) -> Usage:
    """What all prompts took together."""
    return Usage(*(sum(getattr(usage, name) for usage in usages) for name in Usage.__slots__))
