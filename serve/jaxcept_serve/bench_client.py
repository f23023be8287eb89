"""Conversations replayed against an OpenAI-compatible server, request by request, with the time that each took."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2

from jaxcept_serve.bench_scripts import Message, Script, answers


@dataclass(frozen=True, slots=True)
class Load:
    """How conversations come: `concurrency` at a time, or `rate` new ones a second; `pause_s` before each turn."""

    pause_s: float = 0.73
    is_pause_random: bool = False  # exponential with this mean
    concurrency: int | None = None
    rate: float | None = None  # Poisson
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Ask:
    """What every request asks for."""

    model: str
    api: str = "chat"  # or "completions"
    max_tokens: int = 64
    temperature: float = 0.0
    is_streamed: bool = True
    ignore_eos: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sample:
    """One request. Seconds; tokens as the server's usage tells them, None where it does not."""

    conversation: int
    turn: int  # 0 for the first
    started_s: float
    seconds: float
    ttft_s: float | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    error: str | None = None


@dataclass(slots=True)
class _Reply:
    """An answer as it comes."""

    text: str = ""
    calls: dict[int, dict[str, Any]] = field(default_factory=dict)  # by index
    usage: Mapping[str, Any] | None = None
    first_at: float | None = None

    @property
    def message(self) -> Message:
        """The model's turn, to be sent back."""
        message: Message = {"role": "assistant", "content": self.text}
        if self.calls:
            message["tool_calls"] = [self.calls[index] for index in sorted(self.calls)]
        return message

    def take(self, choice: Mapping[str, Any]) -> None:
        """A whole choice, or a piece of one."""
        delta = choice.get("delta") or choice.get("message") or {}
        text = choice.get("text") or delta.get("content") or ""
        pieces = delta.get("tool_calls") or []
        thought = delta.get("reasoning_content") or delta.get("reasoning")
        if self.first_at is None and (text or pieces or thought):
            self.first_at = time.perf_counter()
        self.text += text
        for number, piece in enumerate(pieces):
            call = self.calls.setdefault(
                piece.get("index", number),
                {"id": "", "type": "function", "function": {"name": "", "arguments": ""}},
            )
            call["id"] = call["id"] or piece.get("id") or ""
            function = piece.get("function") or {}
            call["function"]["name"] += function.get("name") or ""
            call["function"]["arguments"] += function.get("arguments") or ""


class Replay:
    """Replays scripts against one server. `on_request` is called after each request."""

    def __init__(
        self,
        client: httpx2.AsyncClient,
        ask: Ask,
        load: Load,
        on_request: Callable[[Sample], object] = lambda sample: None,
    ) -> None:
        self._client = client
        self._ask = ask
        self._load = load
        self._on_request = on_request
        self._began = 0.0

    async def run(self, scripts: list[Script]) -> list[Sample]:
        """All conversations; the samples in the order in which they ended."""
        self._began = time.perf_counter()
        samples: list[Sample] = []
        arrivals, gate = (
            random.Random(f"arrivals-{self._load.seed}"),
            asyncio.Semaphore(self._load.concurrency or 2**30),
        )

        async def converse(number: int, script: Script) -> None:
            async with gate:
                async for sample in self._converse(number, script):
                    samples.append(sample)
                    self._on_request(sample)

        async with asyncio.TaskGroup() as group:
            for number, script in enumerate(scripts):
                group.create_task(converse(number, script))
                if self._load.rate is not None:
                    await asyncio.sleep(arrivals.expovariate(self._load.rate))
        return samples

    async def _converse(self, number: int, script: Script) -> AsyncIterator[Sample]:
        pauses, messages, steps = (
            random.Random(f"pauses-{self._load.seed}-{number}"),
            [*script.opening],
            [*script.steps],
        )
        for turn in range(script.num_requests):
            if turn:
                mean = self._load.pause_s
                await asyncio.sleep(pauses.expovariate(1 / mean) if self._load.is_pause_random and mean else mean)
            sample, reply = await self._request(number, turn, messages, script)
            yield sample
            if sample.error is not None:
                return
            messages.append(reply.message)
            more, is_used = answers(steps[0] if steps else (), reply.message.get("tool_calls", ()))
            messages += more
            if is_used and steps:
                steps.pop(0)
            if not more:
                return

    async def _request(self, number: int, turn: int, messages: list[Message], script: Script) -> tuple[Sample, _Reply]:
        reply, error = _Reply(), None
        start = time.perf_counter()
        try:
            await self._send(self._body(messages, script), reply)
        except (httpx2.HTTPError, ServerError, ValueError) as caught:
            error = f"{type(caught).__name__}: {caught}"[:500]
        end = time.perf_counter()
        usage = reply.usage or {}
        details = usage.get("prompt_tokens_details") or {}
        first = reply.first_at if self._ask.is_streamed else None
        sample = Sample(
            conversation=number,
            turn=turn,
            started_s=start - self._began,
            seconds=end - start,
            ttft_s=first - start if first is not None and error is None else None,
            prompt_tokens=usage.get("prompt_tokens"),
            cached_tokens=details.get("cached_tokens"),
            completion_tokens=usage.get("completion_tokens"),
            error=error,
        )
        return sample, reply

    def _body(self, messages: list[Message], script: Script) -> dict[str, Any]:
        ask = self._ask
        body: dict[str, Any] = {
            "model": ask.model,
            "max_tokens": ask.max_tokens,
            "temperature": ask.temperature,
            "stream": ask.is_streamed,
            **ask.extra,
        }
        if ask.is_streamed:
            body["stream_options"] = {"include_usage": True}
        if ask.ignore_eos:
            body["ignore_eos"] = True
        if ask.api == "completions":
            return {**body, "prompt": "".join(_as_text(message) for message in messages)}
        if script.tools:
            body["tools"] = list(script.tools)
        return {**body, "messages": messages}

    async def _send(self, body: dict[str, Any], reply: _Reply) -> None:
        path = "completions" if self._ask.api == "completions" else "chat/completions"
        if not self._ask.is_streamed:
            response = await self._client.post(path, json=body)
            _require_good(response.status_code, response.text)
            _take(json.loads(response.text), reply)
            return
        async with self._client.stream("POST", path, json=body) as response:
            if response.status_code >= 400:
                await response.aread()
                _require_good(response.status_code, response.text)
            async for line in response.aiter_lines():
                data = line[5:].strip() if line.startswith("data:") else ""
                if data and data != "[DONE]":
                    _take(json.loads(data), reply)


class ServerError(Exception):
    """The server refused a request, or failed in the middle of one."""


def _require_good(status: int, text: str) -> None:
    if status >= 400:
        raise ServerError(f"{status}: {text[:300]}")


def _take(data: Mapping[str, Any], reply: _Reply) -> None:
    if data.get("error"):
        raise ServerError(str(data["error"])[:300])
    reply.usage = data.get("usage") or reply.usage
    for choice in data.get("choices") or ():
        reply.take(choice)


def _as_text(message: Message) -> str:
    """A message as a plain prompt has it: what the model wrote goes on as it was."""
    return str(message["content"]) if message["role"] == "assistant" else f"\n{message['content']}\n"


async def first_model(client: httpx2.AsyncClient) -> str:
    """The name of the model that a server offers first. ServerError where it offers none."""
    response = await client.get("models")
    _require_good(response.status_code, response.text)
    models = response.json().get("data") or []
    if not models:
        raise ServerError("the server offers no model")
    return str(models[0]["id"])


def open_client(url: str, api_key: str | None, timeout_s: float) -> httpx2.AsyncClient:
    """A client whose paths are relative to a server's /v1."""
    base = url.rstrip("/")
    base = base if base.endswith("/v1") else f"{base}/v1"
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=1024)
    return httpx2.AsyncClient(base_url=base, headers=headers, timeout=timeout_s, limits=limits)
