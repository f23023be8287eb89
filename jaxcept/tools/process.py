"""Tools in processes of their own: what a function does to its process it does not do to ours."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import msgspec

from jaxcept.tools.definition import Tool
from jaxcept.tools.output import MAX_OUTPUT_CHARS, ToolError, ToolFailedError
from jaxcept.tools.process_worker import Ask, Hello, Reply
from jaxcept.tools.workers import LoopThread

Message = TypeVar("Message")

START_TIMEOUT_S = 60.0  # a module may import what takes long
MAX_MESSAGE_BYTES = 64 * 2**20
MAX_IDLE = 4
_CLOSE_TIMEOUT_S = 5.0
_NOTE_CHARS = 120  # room for the note that an output was cut, which must not be cut itself


class ProcessTools:
    """The tools that `spec` names (see load_tools), each call in a process that does nothing else meanwhile.

    A call that is given up kills its process, with all that it started. At most `max_processes` run; further calls
    wait. The module is not imported here. Raises ValueError where the tools cannot be loaded.
    """

    def __init__(self, spec: str, *, max_processes: int = 8, max_output_chars: int = MAX_OUTPUT_CHARS) -> None:
        self._spec = spec
        self._max_output_chars = max(1, max_output_chars - _NOTE_CHARS)
        self._loop = LoopThread("process-loop")
        self._places = asyncio.Semaphore(max_processes)
        self._idle: list[_Process] = []
        self._all: dict[int, _Process] = {}
        self._num_started = 0
        try:
            hello = self._loop.submit(self._first()).result()
        except BaseException:
            self.close()
            raise
        self.tools = tuple(
            Tool(
                name=about.name,
                description=about.description,
                parameters=about.parameters,
                function=self._function(about.name),
                timeout_s=about.timeout_s,
                is_pure=about.is_pure,
            )
            for about in hello.tools
        )

    def groups(self) -> list[tuple[str, Sequence[Tool]]]:
        """The tools, which are named as functions of this process are."""
        return [("", self.tools)]

    def health(self) -> list[dict[str, Any]]:
        """What the processes were started from, how many run and how many were started."""
        state = {"server": self._spec, "kind": "process", "is_up": True, "tools": len(self.tools), "error": ""}
        return [{**state, "processes": len(self._all), "started": self._num_started}]

    def close(self) -> None:
        """Kill all processes."""
        with contextlib.suppress(TimeoutError):
            self._loop.submit(self._kill_all()).result(_CLOSE_TIMEOUT_S)
        self._loop.close()

    def _function(self, name: str) -> Callable[..., Awaitable[str]]:
        async def call(**arguments: Any) -> str:
            return await asyncio.wrap_future(self._loop.submit(self._call(name, arguments)))

        return call

    async def _first(self) -> Hello:
        process = await self._start()
        self._idle.append(process)
        return process.hello

    async def _call(self, name: str, arguments: dict[str, Any]) -> str:
        async with self._places:
            process = await self._take()
            try:
                reply = await process.ask(Ask(name, arguments, self._max_output_chars))
            except (EOFError, OSError) as error:
                how = await self._end(process)
                raise ToolFailedError(f"the tool's process ended during the call ({how})") from error
            except BaseException:
                await self._end(process)
                raise
            if len(self._idle) < MAX_IDLE:
                self._idle.append(process)
            else:
                await self._end(process)
        if reply.outcome.is_error:
            told = reply.text.removeprefix("error: ")
            raise ToolFailedError(told) if reply.outcome.value == "failed" else ToolError(told)
        return reply.text

    async def _take(self) -> _Process:
        while self._idle:
            process = self._idle.pop()
            if process.is_alive:
                return process
            await self._end(process)
        return await self._start()

    async def _start(self) -> _Process:
        process = await _Process.start(self._spec)
        self._num_started += 1
        self._all[process.process_id] = process
        try:
            process.hello = await asyncio.wait_for(process.receive(Hello), START_TIMEOUT_S)
        except TimeoutError as error:
            await self._end(process)
            raise ValueError(f"--tools {self._spec}: not loaded in {START_TIMEOUT_S:g} s") from error
        except (EOFError, OSError) as error:
            raise ValueError(f"--tools {self._spec}: its process ended ({await self._end(process)})") from error
        except BaseException:
            await self._end(process)
            raise
        if process.hello.error:
            await self._end(process)
            raise ValueError(process.hello.error)
        return process

    async def _end(self, process: _Process) -> str:
        self._all.pop(process.process_id, None)
        return await process.end()

    async def _kill_all(self) -> None:
        self._idle.clear()
        await asyncio.gather(*(self._end(process) for process in list(self._all.values())))


class _Process:
    """One process, which answers one message after the other."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None and process.stdout is not None, "it is started with pipes"
        self._process = process
        self._stdin = process.stdin
        self._stdout = process.stdout
        self.hello = Hello()

    @classmethod
    async def start(cls, spec: str) -> _Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "jaxcept.tools.process_worker",
            spec,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(place for place in sys.path if place)},
            start_new_session=True,
        )
        return cls(process)

    @property
    def process_id(self) -> int:
        return self._process.pid

    async def ask(self, message: Ask) -> Reply:
        body = msgspec.json.encode(message)
        self._stdin.write(len(body).to_bytes(4, "big") + body)
        await self._stdin.drain()
        return await self.receive(Reply)

    async def receive(self, kind: type[Message]) -> Message:
        """The next message. Raises EOFError where the process has ended."""
        size = int.from_bytes(await self._stdout.readexactly(4), "big")
        if size > MAX_MESSAGE_BYTES:
            raise EOFError("not a message")
        return msgspec.json.decode(await self._stdout.readexactly(size), type=kind)

    @property
    def is_alive(self) -> bool:
        """Whether it has not been seen to end."""
        return self._process.returncode is None and not self._stdout.at_eof()

    async def end(self) -> str:
        """Kill the process and all that it started, unless it has ended; says how it ended."""
        if self._stdout.at_eof():
            await self._wait(0.5)
        code = self._process.returncode
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process_id, signal.SIGKILL)
        self._stdin.close()
        await self._wait(_CLOSE_TIMEOUT_S / 2)
        if code is None:
            return "killed"
        return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"

    async def _wait(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):  # what it started may hold its pipes open
            await asyncio.wait_for(self._process.wait(), seconds)
