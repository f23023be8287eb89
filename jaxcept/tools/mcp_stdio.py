"""The pipes to an MCP server that we start: bounded messages, its last words on stderr, and an end that is noticed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from mcp.client.stdio import get_default_environment
from mcp.shared.message import SessionMessage
from mcp_types import CONNECTION_CLOSED, ErrorData, JSONRPCError, jsonrpc_message_adapter

from jaxcept.tools.mcp_config import McpServerSpec

MAX_MESSAGE_BYTES = 8 * 2**20
_EXIT_WAIT_S = 1.0  # after closing its stdin, and again after SIGTERM
_CHUNK_BYTES = 2**16
_EDGE_BYTES = 256
_ID = re.compile(rb'"id"\s*:\s*(?:(\d{1,15})|"([^"\\]{1,64})")')

Incoming = SessionMessage | Exception


class LineSplitter:
    """Bytes as they come, cut into lines. Of a line over the limit only its two ends are kept."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._parts: list[bytes] = []
        self._size = 0

    def feed(self, chunk: bytes) -> Iterator[tuple[bytes, bool]]:
        """The lines that a chunk completes, and whether each is whole."""
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            self._add(end)
            line, is_whole = b"".join(self._parts), self._size <= self._max_bytes
            self._parts, self._size = [], 0
            if line.strip():
                yield line, is_whole
        self._add(rest)

    def _add(self, part: bytes) -> None:
        self._size += len(part)
        self._parts.append(part)
        if self._size > self._max_bytes:
            joined = b"".join(self._parts)
            self._parts = [joined[:_EDGE_BYTES], joined[-_EDGE_BYTES:]]


class LastWords:
    """The last lines that a server wrote to its stderr, for error messages."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=5)

    def __str__(self) -> str:
        return " | ".join(self._lines)

    async def read(self, stream: asyncio.StreamReader) -> None:
        """Read to the end, keeping little."""
        splitter = LineSplitter(4096)
        while chunk := await stream.read(_CHUNK_BYTES):
            self._lines += [line.decode("utf-8", "replace").strip()[:300] for line, _ in splitter.feed(chunk)]


@asynccontextmanager
async def stdio_transport(
    spec: McpServerSpec, last_words: LastWords, on_closed: Callable[[], None]
) -> AsyncIterator[tuple[MemoryObjectReceiveStream[Incoming], MemoryObjectSendStream[SessionMessage]]]:
    """Start the server and give the streams that an MCP client session speaks through.

    `on_closed` is called when the server closes its side, as it does by ending. On leaving, the server is asked to end
    (stdin closed, then SIGTERM) and killed with all that it started if it does not. Raises OSError if it cannot start.
    """
    assert spec.command is not None, "a server on pipes has a command"
    process = await asyncio.create_subprocess_exec(
        spec.command,
        *spec.args,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=get_default_environment() | dict(spec.env),
        cwd=spec.cwd,
        start_new_session=True,
    )
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    to_session, from_server = anyio.create_memory_object_stream[Incoming](0)
    to_server, from_session = anyio.create_memory_object_stream[SessionMessage](0)
    # Plain tasks, not a task group: a server's end must close the session's stream, never cancel its caller.
    tasks = [
        asyncio.create_task(_read(process.stdout, to_session, on_closed)),
        asyncio.create_task(_write(process.stdin, from_session)),
        asyncio.create_task(last_words.read(process.stderr)),
    ]
    try:
        yield from_server, to_server
    finally:
        with anyio.CancelScope(shield=True):
            process.stdin.close()
            await _end(process)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for stream in (to_session, from_server, to_server, from_session):
                await stream.aclose()


async def _read(
    stdout: asyncio.StreamReader, to_session: MemoryObjectSendStream[Incoming], on_closed: Callable[[], None]
) -> None:
    splitter = LineSplitter(MAX_MESSAGE_BYTES)
    try:
        async with to_session:
            while chunk := await stdout.read(_CHUNK_BYTES):
                for line, is_whole in splitter.feed(chunk):
                    message = _parse(line) if is_whole else _too_long(line)
                    if message is None:
                        return  # whose answer was too long is not known: all that wait must be told
                    await to_session.send(message)
    except (anyio.BrokenResourceError, anyio.ClosedResourceError, OSError):
        pass  # the session, or the server, is gone; closing is all there is to say
    finally:
        on_closed()


def _parse(line: bytes) -> Incoming:
    try:
        return SessionMessage(jsonrpc_message_adapter.validate_json(line, by_name=False))
    except ValueError as error:  # a server that prints to its stdout; the session notes it and goes on
        return error


def _too_long(line: bytes) -> SessionMessage | None:
    """An error in place of an answer over the limit, found by the id at either end of its text."""
    found = _ID.search(line[:_EDGE_BYTES]) or _ID.search(line[-_EDGE_BYTES:])
    if found is None:
        return None
    request_id = int(found[1]) if found[1] else found[2].decode("utf-8", "replace")
    told = ErrorData(code=CONNECTION_CLOSED - 99, message=f"the answer was over {MAX_MESSAGE_BYTES:,} bytes")
    return SessionMessage(JSONRPCError(jsonrpc="2.0", id=request_id, error=told))


async def _write(stdin: asyncio.StreamWriter, from_session: MemoryObjectReceiveStream[SessionMessage]) -> None:
    with contextlib.suppress(OSError, anyio.BrokenResourceError, anyio.ClosedResourceError):
        async for item in from_session:
            stdin.write(item.message.model_dump_json(by_alias=True, exclude_unset=True).encode() + b"\n")
            await stdin.drain()


async def _end(process: asyncio.subprocess.Process) -> None:
    """Wait for the server to end by itself, then end its whole process group."""
    for number in (None, signal.SIGTERM, signal.SIGKILL):
        if number is not None:
            _signal_group(process, number)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), _EXIT_WAIT_S)
            break
    _signal_group(process, signal.SIGKILL)  # what it started and left behind


def _signal_group(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
