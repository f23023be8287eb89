"""HTTP/1.1 on a socket, with the bounds that uvicorn and its parser leave out: time, bytes, number of connections."""

from __future__ import annotations

import asyncio
import contextlib

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from jaxcept_serve.limits import ServerOptions
from jaxcept_serve.turns import ServiceError
from jaxcept_serve.wire import error_body, to_json

LOOK_S = 2.0
MIN_FILES = 65_536
_REASONS = {408: b"Request Timeout", 431: b"Request Header Fields Too Large", 503: b"Service Unavailable"}


class GuardedProtocol(HttpToolsProtocol):
    """One connection. Cut off where its request's head is too long, where a request takes too long to arrive, where
    the client takes nothing of its answer, and at once where there are too many connections already."""

    options: ServerOptions

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        self._is_reading = True  # a request, or waiting for the first one
        self._is_in_head = True
        self._head_bytes = 0
        self._begun_at = self._moved_at = self.loop.time()
        self._unsent = 0
        self._look_s = min(LOOK_S, self.options.header_timeout_s, self.options.send_timeout_s)
        self._timer = self.loop.call_later(self._look_s, self._look)
        if len(self.connections) > self.options.max_connections:
            self._refuse(503, "the server has too many connections")

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of the client's."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self._is_in_head and not self.transport.is_closing():
            self._head_bytes += len(data)
            # What one read brings beside a long head may be the request before it.
            if self._head_bytes > 2 * self.options.max_header_bytes:
                self._refuse(431, f"the headers: expected at most {self.options.max_header_bytes} bytes altogether")

    def on_message_begin(self) -> None:
        """A request begins."""
        self._is_reading = self._is_in_head = True
        self._head_bytes = 0
        self._begun_at = self.loop.time()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header. Those behind the body are dropped: they would come to stand beside those that were checked."""
        if self._is_in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """A request's head is whole."""
        self._is_in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """A request is whole."""
        self._is_reading = False
        super().on_message_complete()

    def _look(self) -> None:
        """Looks, every few seconds, whether the connection is stuck."""
        options, now = self.options, self.loop.time()
        unsent = self.transport.get_write_buffer_size()
        if not unsent or unsent != self._unsent:
            self._unsent, self._moved_at = unsent, now
        allowed_s = options.header_timeout_s + (0 if self._is_in_head else options.body_timeout_s)
        if now - self._moved_at > options.send_timeout_s:
            self.transport.abort()  # close() would wait until the client takes what it does not take
        elif self._is_reading and now - self._begun_at > allowed_s and not self.transport.is_closing():
            self._refuse(408, "the request did not arrive in time")
        self._timer = self.loop.call_later(self._look_s, self._look)

    def _refuse(self, status: int, message: str) -> None:
        """Answers as far as that is possible, and closes. Under way, an answer can only be cut off."""
        if self.cycle is None or (self.cycle.response_complete and not self.pipeline):
            error = ServiceError(status, message, retry_after_s=1.0 if status == 503 else None)
            body = to_json(error_body(error, ""))
            retry = b"retry-after: 1\r\n" if status == 503 else b""
            head = b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n"
            self.transport.write(head % (status, _REASONS[status], len(body)) + retry + b"\r\n" + body)
        self.transport.close()


def guarded_protocol(options: ServerOptions) -> type[GuardedProtocol]:
    """The protocol for `uvicorn.Config(http=…)` under these limits."""
    return type("Protocol", (GuardedProtocol,), {"options": options})


def raise_file_limit() -> None:
    """As many open files (each connection is one) as the system lets this process have, as far as they are needed."""
    try:
        import resource  # noqa: PLC0415 (not on every system)
    except ImportError:  # there is no such limit on Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MIN_FILES if hard == resource.RLIM_INFINITY else min(MIN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
