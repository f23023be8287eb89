"""One HTTP request of a tool: to addresses that are allowed, without redirects, its answer bounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpcore2

from jaxcept.tools.addresses import AddressGuard, GuardedBackend

_CONNECT_S = 10.0
_READ_S = 300.0  # between two pieces of an answer; the tool's timeout bounds the whole
_MAX_CONNECTIONS = 32
_ACCEPT = "application/json, text/*;q=0.9, */*;q=0.1"


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer: header names in lower case; `is_cut` where the body goes on beyond `data`."""

    status: int
    headers: dict[str, str]
    data: bytes
    is_cut: bool


class HttpFetch:
    """Connections of one event loop: all of its coroutines run on the same one."""

    def __init__(self, guard: AddressGuard) -> None:
        self._pool = httpcore2.AsyncConnectionPool(
            network_backend=GuardedBackend(guard), max_connections=_MAX_CONNECTIONS, keepalive_expiry=15.0
        )

    async def send(
        self, method: str, url: str, headers: Sequence[tuple[str, str]], body: bytes | None, max_bytes: int
    ) -> Answer:
        """Send a request and read at most `max_bytes` of its answer. A redirect is an answer like any other.

        Raises ToolError for an address that is refused, ConnectionError or TimeoutError where nobody answers.
        """
        if body is None and method in ("POST", "PUT", "PATCH"):
            body = b""  # some servers insist on a length
        parts = urlsplit(url)
        host = parts.hostname or ""
        given = {name.lower() for name, _ in headers}
        own = [("Host", parts.netloc.rpartition("@")[2]), ("Accept-Encoding", "identity")]
        own += [("Accept", _ACCEPT), ("User-Agent", "jaxcept")]
        timeouts = {"connect": _CONNECT_S, "pool": _CONNECT_S, "write": _READ_S, "read": _READ_S}
        try:
            async with self._pool.stream(
                method,
                url,
                headers=[pair for pair in own if pair[0].lower() not in given] + list(headers),
                content=body,
                extensions={"timeout": timeouts},
            ) as response:
                chunks, size = list[bytes](), 0
                async for chunk in response.aiter_stream():
                    chunks.append(chunk)
                    size += len(chunk)
                    if size > max_bytes:
                        break
        except httpcore2.TimeoutException as error:
            raise TimeoutError(f"no answer from {host}") from error
        except (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.UnsupportedProtocol, OSError) as error:
            raise ConnectionError(f"no answer from {host}: {error or type(error).__name__}") from error
        answered = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}
        return Answer(response.status, answered, b"".join(chunks)[:max_bytes], size > max_bytes)

    async def aclose(self) -> None:
        """End all connections."""
        await self._pool.aclose()
