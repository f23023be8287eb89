"""The official SDKs over an application in this process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

import anthropic
import httpx2
import openai
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect

T = TypeVar("T")

URL = "http://testserver"


class SyncTransport(httpx2.BaseTransport):
    """An application for clients without an event loop."""

    def __init__(self, app: Starlette) -> None:
        self._transport = httpx2.ASGITransport(app=app)

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        async def send() -> httpx2.Response:
            response = await self._transport.handle_async_request(
                httpx2.Request(request.method, request.url, headers=request.headers, content=request.read())
            )
            return httpx2.Response(response.status_code, headers=response.headers, content=await response.aread())

        return asyncio.run(send())


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result, which has 20 s."""

    async def bounded() -> T:
        return await asyncio.wait_for(coroutine, 20)

    return asyncio.run(bounded())


def http(app: Starlette) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url=URL)


def openai_sync(app: Starlette) -> openai.OpenAI:
    client = httpx2.Client(transport=SyncTransport(app))
    return openai.OpenAI(base_url=f"{URL}/v1", api_key="none", http_client=client, max_retries=0)


def openai_async(app: Starlette) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key="none", http_client=http(app), max_retries=0)


def anthropic_sync(app: Starlette) -> anthropic.Anthropic:
    client = httpx2.Client(transport=SyncTransport(app))
    return anthropic.Anthropic(base_url=URL, api_key="none", http_client=client, max_retries=0)


def anthropic_async(app: Starlette) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=URL, api_key="none", http_client=http(app), max_retries=0)


async def gone_after(app: Starlette, path: str, body: dict[str, Any], num_chunks: int) -> None:
    """A client that goes away after so many pieces of the answer (0: at once)."""
    sent, gone = 0, asyncio.Event()
    asked = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
    if not num_chunks:
        gone.set()

    async def receive() -> dict[str, Any]:
        if asked:
            return asked.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        nonlocal sent
        await asyncio.sleep(0.001)
        sent += message["type"] == "http.response.body"
        if sent >= num_chunks:
            gone.set()

    headers = [(b"host", b"testserver"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
             "headers": headers, "http_version": "1.1", "scheme": "http", "client": ("127.0.0.1", 1),
             "server": ("testserver", 80), "asgi": {"version": "3.0"}}  # fmt: skip
    with suppress(ClientDisconnect):
        await asyncio.wait_for(app(scope, receive, send), 10)  # type: ignore[arg-type]
