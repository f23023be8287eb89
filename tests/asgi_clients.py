"""The official SDKs over an application in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import anthropic
import httpx2
import openai
from starlette.applications import Starlette

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
