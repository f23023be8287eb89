"""Tools of MCP servers: one connection per server, kept up in the background, called from any toolbox.

Needs the `mcp` package (the extra `mcp`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import anyio
import mcp_types
from mcp import Client, MCPError
from mcp.client.streamable_http import streamable_http_client

from jaxcept.tools.definition import Tool
from jaxcept.tools.mcp_config import McpServerSpec
from jaxcept.tools.mcp_http import http_client
from jaxcept.tools.mcp_stdio import MAX_MESSAGE_BYTES, LastWords, stdio_transport
from jaxcept.tools.output import ToolError, ToolFailedError, output_text
from jaxcept.tools.workers import LoopThread

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 30.0
CALL_WAIT_S = 3.0  # how long a call waits for a connection that is being made
PROBE_TIMEOUT_S = 5.0
STEADY_S = 5.0  # a connection that lasted this long was a good one: the next attempt comes at once
FIRST_BACKOFF_S = 0.25
MAX_BACKOFF_S = 30.0
CLOSE_TIMEOUT_S = 6.0
MAX_TOOLS = 1000
MAX_DESCRIPTION_CHARS = 8_000


class McpServer:
    """One server. Everything but `health` and the tools' functions runs on the loop that it is given."""

    def __init__(self, spec: McpServerSpec, loop: LoopThread, on_tools: Callable[[], None]) -> None:
        self.spec = spec
        self.tools: tuple[Tool, ...] = ()
        self._loop = loop
        self._on_tools = on_tools
        self._client: Client | None = None
        self._error = "not tried yet"
        self._last_words = LastWords()
        self._num_connects = 0
        self._next_try_s = 0.0
        self._closing = asyncio.Event()
        self._is_probing = False
        self._up = asyncio.Event()
        self._changed = asyncio.Event()  # something for the keeper: the connection is lost, tools changed, closing
        self._is_lost = False
        self._first = asyncio.Event()  # the first attempt is over
        self._keeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Connect and list the tools. Raises ValueError with the server's last words if that fails."""
        self._keeper = asyncio.create_task(self._keep())
        await self._first.wait()
        if self._client is None:
            await self.close()
            raise ValueError(f"MCP server {self.spec.name!r}: {self._error}{self._words()}")

    async def close(self) -> None:
        """End the connection, and the server if it is ours."""
        self._closing.set()
        self._changed.set()
        if self._keeper is not None:
            if self._client is None:
                self._keeper.cancel()
            await asyncio.wait([self._keeper], timeout=CLOSE_TIMEOUT_S)
            self._keeper.cancel()

    def health(self) -> dict[str, Any]:
        """The server's name, kind and state, the number of its tools and what went wrong last."""
        is_up = self._client is not None
        return {
            "server": self.spec.name,
            "kind": "mcp-stdio" if self.spec.url is None else "mcp-http",
            "is_up": is_up,
            "tools": len(self.tools),
            "connects": self._num_connects,
            "error": "" if is_up else self._error,
        }

    async def call(self, name: str, arguments: Mapping[str, Any], *, is_pure: bool) -> str:
        """Call a tool, from any loop. Raises ToolError with the tool's words, ConnectionError where nobody answers."""
        try:
            return await asyncio.wrap_future(self._loop.submit(self._call(name, dict(arguments))))
        except ConnectionResetError:
            if not is_pure or self._closing.is_set():
                raise  # what the call did before the connection ended is not known
            return await asyncio.wrap_future(self._loop.submit(self._call(name, dict(arguments))))

    async def _call(self, name: str, arguments: dict[str, Any]) -> str:
        client = await self._connected()
        try:
            result = await client.call_tool(name, arguments)
        except MCPError as error:
            if client is not self._client or self._is_lost:
                raise ConnectionResetError(f"MCP server {self.spec.name!r} ended during the call") from error
            if error.code == mcp_types.CONNECTION_CLOSED:  # servers use this code for failures of their own too
                self._probe_soon(client)
                raise ConnectionError(f"MCP server {self.spec.name!r}: {error.message}") from error
            if error.code == mcp_types.INVALID_REQUEST:  # an HTTP server that was started anew knows no session of ours
                self._lose(client, error.message)
            if error.code in (mcp_types.INVALID_PARAMS, mcp_types.METHOD_NOT_FOUND):
                raise ToolError(error.message) from error
            raise ToolFailedError(f"MCP server {self.spec.name!r}: {error.message}") from error
        except asyncio.CancelledError:
            self._probe_soon(client)  # it ran out of time: is the server alive at all?
            raise
        text = result_text(result)
        if result.is_error:
            raise ToolError(text or "the tool failed and did not say why")
        return text

    async def _connected(self) -> Client:
        if self._client is None and self._next_try_s - time.monotonic() < CALL_WAIT_S:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._up.wait(), CALL_WAIT_S)
        if self._client is None:
            left_s = self._next_try_s - time.monotonic()
            when = f"it is tried again in {left_s:.0f} s" if left_s > 0 else "it is being tried"
            raise ConnectionError(f"MCP server {self.spec.name!r} is not connected: {self._error} ({when})")
        return self._client

    def _set_client(self, client: Client | None) -> None:
        self._client = client
        if client is None:
            self._up.clear()
        else:
            self._up.set()

    def _lose(self, client: Client | None, why: str) -> None:
        if client is self._client:
            self._is_lost, self._error = True, why
            self._changed.set()

    def _probe_soon(self, client: Client) -> None:
        if not self._is_probing and not self._closing.is_set() and client is self._client:
            self._is_probing = True
            self._probing = asyncio.create_task(self._probe(client))

    async def _probe(self, client: Client) -> None:
        try:
            await asyncio.wait_for(client.list_tools(cache_mode="bypass"), PROBE_TIMEOUT_S)
        except TimeoutError:
            self._lose(client, f"it did not answer in {PROBE_TIMEOUT_S:g} s")
        except MCPError as error:
            logger.debug("MCP server %r answers a probe with %s", self.spec.name, error)
        finally:
            self._is_probing = False

    async def _keep(self) -> None:
        """Connect, serve until the connection is lost, and again, waiting longer from one failure to the next."""
        backoff_s = 0.0
        while not self._closing.is_set():
            began_s = time.monotonic()
            try:
                await self._serve()
            except Exception as error:
                self._error = _reason(error)
            finally:
                self._set_client(None)
            self._first.set()
            if self._closing.is_set():
                return
            is_steady = time.monotonic() - began_s >= STEADY_S
            backoff_s = 0.0 if is_steady else min(MAX_BACKOFF_S, max(FIRST_BACKOFF_S, 2 * backoff_s))
            self._next_try_s = time.monotonic() + backoff_s
            words = self._words()  # for the log alone: what it prints is not for whoever talks to the model
            logger.warning("MCP server %r: %s%s; tried again in %.1f s", self.spec.name, self._error, words, backoff_s)
            await self._nap(backoff_s)

    async def _nap(self, seconds: float) -> None:
        until_s = time.monotonic() + seconds
        while not self._closing.is_set() and (left_s := until_s - time.monotonic()) > 0:
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left_s)

    async def _serve(self) -> None:
        """One connection, from its handshake to its end."""
        self._last_words = LastWords()
        with anyio.move_on_after(CONNECT_TIMEOUT_S) as scope:
            async with self._transport() as transport, Client(transport, message_handler=self._on_message) as client:
                self._is_lost = False
                await self._list_tools(client)
                scope.deadline = math.inf
                self._num_connects += 1
                self._set_client(client)
                self._first.set()
                while not (self._closing.is_set() or self._is_lost):
                    self._changed.clear()
                    await self._changed.wait()
                    if not (self._closing.is_set() or self._is_lost):
                        await asyncio.wait_for(self._list_tools(client), CONNECT_TIMEOUT_S)
                self._set_client(None)
        if scope.cancelled_caught:
            self._error = f"no connection in {CONNECT_TIMEOUT_S:g} s"

    @contextlib.asynccontextmanager
    async def _transport(self) -> AsyncIterator[Any]:
        """What the client enters to have its streams."""
        if self.spec.url is None:
            yield stdio_transport(self.spec, self._last_words, lambda: self._lose(self._client, "it ended"))
            return
        async with http_client(self.spec.headers, MAX_MESSAGE_BYTES) as client:
            yield streamable_http_client(self.spec.url, http_client=client, max_sse_event_size=MAX_MESSAGE_BYTES)

    async def _list_tools(self, client: Client) -> None:
        listed: list[mcp_types.Tool] = []
        cursor: str | None = None
        while len(listed) < MAX_TOOLS:
            page = await client.list_tools(cursor=cursor, cache_mode="bypass")
            listed += page.tools
            cursor = page.next_cursor
            if cursor is None:
                break
        known = {made.name: made for made in self.tools}
        made = [tool for each in listed[:MAX_TOOLS] if (tool := self._make_tool(each, known)) is not None]
        if tuple(made) != self.tools:
            self.tools = tuple(made)
            self._on_tools()

    def _make_tool(self, listed: mcp_types.Tool, known: Mapping[str, Tool]) -> Tool | None:
        hints = listed.annotations
        before = known.get(listed.name)
        is_pure = bool(hints and hints.read_only_hint and hints.idempotent_hint)
        try:
            made = Tool(
                name=listed.name,
                description=(listed.description or listed.title or "")[:MAX_DESCRIPTION_CHARS],
                parameters=listed.input_schema,
                function=self._function(listed.name, is_pure),
                is_pure=is_pure,
            )
        except ValueError as error:
            logger.warning("MCP server %r: %s; the tool is left out", self.spec.name, error)
            return None
        return before if before is not None and replace(made, function=before.function) == before else made

    def _function(self, name: str, is_pure: bool) -> Callable[..., Awaitable[str]]:
        async def call(**arguments: Any) -> str:
            return await self.call(name, arguments, is_pure=is_pure)

        return call

    async def _on_message(self, message: Any) -> None:
        if isinstance(message, mcp_types.ToolListChangedNotification):
            self._changed.set()

    def _words(self) -> str:
        words = str(self._last_words)
        return f" (it said: {words})" if words else ""


class McpServers:
    """Several servers on one event loop. What `groups` gives changes as the servers' tools do."""

    def __init__(self, specs: Sequence[McpServerSpec], on_tools: Callable[[], None] = lambda: None) -> None:
        names = [spec.name for spec in specs]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two MCP servers are named {twice!r}; give one of them another name")
        self._loop = LoopThread("mcp-loop")
        self.servers = [McpServer(spec, self._loop, on_tools) for spec in specs]
        try:
            if specs:
                self._loop.submit(self._start()).result()
        except BaseException:
            self.close()
            raise

    def groups(self) -> list[tuple[str, Sequence[Tool]]]:
        """Every server's name and its tools."""
        return [(server.spec.name, server.tools) for server in self.servers]

    def health(self) -> list[dict[str, Any]]:
        """Every server's state."""
        return [server.health() for server in self.servers]

    def close(self) -> None:
        """End all connections and the servers that were started here; a few seconds at most."""

        async def close_all() -> None:
            await asyncio.gather(*(server.close() for server in self.servers))

        if self.servers:
            with contextlib.suppress(TimeoutError):
                self._loop.submit(close_all()).result(CLOSE_TIMEOUT_S + 1)
        self._loop.close()

    async def _start(self) -> None:
        started = await asyncio.gather(*(server.start() for server in self.servers), return_exceptions=True)
        failed = [error for error in started if isinstance(error, BaseException)]
        if failed:
            raise failed[0]


def result_text(result: mcp_types.CallToolResult) -> str:
    """A result's content as text; what is no text is named by its kind and size."""
    if not result.content and result.structured_content is not None:
        return output_text(result.structured_content)
    return "\n".join(_block_text(block) for block in result.content)


def _block_text(block: mcp_types.ContentBlock) -> str:
    match block:
        case mcp_types.TextContent():
            return block.text
        case mcp_types.EmbeddedResource(resource=mcp_types.TextResourceContents() as resource):
            return resource.text
        case mcp_types.EmbeddedResource(resource=resource):
            return f"[{resource.uri}: {resource.mime_type or 'binary'}, not shown]"
        case mcp_types.ResourceLink():
            return f"[{block.name}: {block.uri}]"
        case _:
            return f"[{block.type}: {block.mime_type}, about {len(block.data) * 3 // 4:,} bytes, not shown]"


def _reason(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
