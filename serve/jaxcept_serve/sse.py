"""Answers that come in pieces: server-sent events, and turns that end when their client goes away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxcept_serve.turns import ServiceError
from jaxcept_serve.wire import to_json

logger = logging.getLogger(__name__)

T = TypeVar("T")
OnError = Callable[[ServiceError], bytes]

DONE = b"data: [DONE]\n\n"
KEEPALIVE = b": waiting\n\n"
INTERNAL_ERROR = "the server failed; the request id tells its operator where"


def event(value: object, name: str | None = None) -> bytes:
    """One server-sent event with a JSON value."""
    head = b"data: " if name is None else b"event: " + name.encode() + b"\ndata: "
    return head + to_json(value) + b"\n\n"


@asynccontextmanager
async def closing(events: AsyncIterator[T]) -> AsyncIterator[AsyncIterator[T]]:
    """Closes an iterator at the end, where it can be closed: a turn whose events nobody reads is aborted."""
    try:
        yield events
    finally:
        close: Callable[[], Awaitable[None]] | None = getattr(events, "aclose", None)
        if close is not None:
            await close()


async def until_gone(receive: Receive) -> None:
    """Returns once the client has gone. To be called after the body is read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes away (raises ClientDisconnect)."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(until_gone(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        await _end(task, watch)


async def _end(*tasks: asyncio.Future[Any]) -> None:
    """Cancels what still runs and waits until it has cleaned up."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Sends `chunks` as they come; the iterator is closed at the end, on errors and when the client goes away.

    Each answer waits for its own client alone: a client that takes nothing for `send_timeout_s` is cut off. A comment
    is sent after `keepalive_s` without a chunk, so that proxies see life while a tool runs. A ServiceError of the
    iterator is sent as `on_error` writes it; so is any other error, without its text.
    """

    media_type = "text/event-stream"

    def __init__(
        self, chunks: AsyncIterator[bytes], *, on_error: OnError, keepalive_s: float, send_timeout_s: float
    ) -> None:
        self.chunks = chunks
        self.on_error = on_error
        self.keepalive_s = keepalive_s
        self.send_timeout_s = send_timeout_s
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._num_sent = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pump = asyncio.ensure_future(self._pump(send))
        watch = asyncio.ensure_future(until_gone(receive))
        try:
            while not (pump.done() or watch.done()):
                before = self._num_sent
                await asyncio.wait((pump, watch), timeout=self.keepalive_s, return_when=asyncio.FIRST_COMPLETED)
                if self._num_sent == before and before > 0 and not (pump.done() or watch.done()):
                    await self._send(send, KEEPALIVE)
            if not pump.done():
                raise ClientDisconnect
            pump.result()
        finally:
            await _end(pump, watch)

    async def _pump(self, send: Send) -> None:
        async with closing(self.chunks) as chunks:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            self._num_sent = 1
            try:
                async for chunk in chunks:
                    await self._send(send, chunk)
            except ServiceError as error:
                await self._send(send, self.on_error(error))
            except ClientDisconnect:
                raise
            except Exception:
                logger.exception("a stream failed")
                await self._send(send, self.on_error(ServiceError(500, INTERNAL_ERROR)))
        await self._send(send, b"", more=False)

    async def _send(self, send: Send, chunk: bytes, more: bool = True) -> None:
        self._num_sent += 1
        try:
            async with asyncio.timeout(self.send_timeout_s):
                await send({"type": "http.response.body", "body": chunk, "more_body": more})
        except TimeoutError:
            raise ClientDisconnect from None
