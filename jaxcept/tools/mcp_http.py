"""The HTTP side of MCP servers elsewhere: a client whose answers are bounded."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping

import httpx2

_TIMEOUT = httpx2.Timeout(30.0, read=300.0)  # a server may think for minutes before it streams an answer


def http_client(headers: Mapping[str, str], max_bytes: int) -> httpx2.AsyncClient:
    """A client that sends these headers, follows no redirect and cuts off answers over `max_bytes`.

    Event streams are let through: who reads them bounds each event.
    """
    transport = _LimitedTransport(httpx2.AsyncHTTPTransport(), max_bytes)
    return httpx2.AsyncClient(transport=transport, headers=dict(headers), timeout=_TIMEOUT)


class _LimitedTransport(httpx2.AsyncBaseTransport):
    def __init__(self, inner: httpx2.AsyncBaseTransport, max_bytes: int) -> None:
        self._inner = inner
        self._max_bytes = max_bytes

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        response = await self._inner.handle_async_request(request)
        if not response.headers.get("content-type", "").startswith("text/event-stream"):
            assert isinstance(response.stream, httpx2.AsyncByteStream), "an asynchronous transport answers so"
            response.stream = _LimitedStream(response.stream, self._max_bytes)
        return response

    async def aclose(self) -> None:
        await self._inner.aclose()


class _LimitedStream(httpx2.AsyncByteStream):
    def __init__(self, inner: httpx2.AsyncByteStream, max_bytes: int) -> None:
        self._inner = inner
        self._max_bytes = max_bytes

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for chunk in self._inner:
            size += len(chunk)
            if size > self._max_bytes:
                raise httpx2.StreamError(f"the answer was over {self._max_bytes:,} bytes")
            yield chunk

    async def aclose(self) -> None:
        await self._inner.aclose()
