"""The tools of one model by name, and how their calls are run: every failure is told as text."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from jaxcept.tools.arguments import ArgumentsError
from jaxcept.tools.calls import MalformedCall, Outcome, ParsedCall, ToolCall, ToolResult
from jaxcept.tools.definition import Tool, tool
from jaxcept.tools.executor import MAX_STUCK_THREADS, Executor
from jaxcept.tools.guard import DEFAULT_TIMEOUT_S, ToolLimits
from jaxcept.tools.output import error_outcome, error_text
from jaxcept.tools.pending import Done, PendingCall

MAX_THREADS = 32
_MAX_NAMES_SHOWN = 50


class Toolbox:
    """Tools by name. Functions run on threads, coroutines on an event loop that the toolbox owns.

    `tools` holds Tools, plain functions (made Tools of) and schemas in the OpenAI form, which somebody outside answers.
    `limits` hold for each tool by itself. A toolbox made with another's `executor` shares its threads and its limits'
    counts, and leaves closing to it. Raises ValueError on a name used twice.
    """

    def __init__(
        self,
        tools: Sequence[Tool | Callable[..., Any] | Mapping[str, Any]] = (),
        *,
        clock: Callable[[], float] = time.monotonic,
        limits: ToolLimits | None = None,
        max_threads: int = MAX_THREADS,
        executor: Executor | None = None,
    ) -> None:
        if max_threads < 1:
            raise ValueError(f"max_threads={max_threads}: expected 1 or more")
        self._tools: dict[str, Tool] = {}
        for given in tools:
            made = _as_tool(given)
            if made.name in self._tools:
                raise ValueError(f"two tools are named {made.name!r}; give one of them another name")
            self._tools[made.name] = made
        self._owns_executor = executor is None
        self.executor = executor or Executor(clock, limits or ToolLimits(), max_threads)

    def schemas(self) -> list[dict[str, Any]]:
        """The tools in the OpenAI form, in the order given."""
        return [made.schema for made in self._tools.values()]

    def __contains__(self, name: object) -> bool:
        return name in self._tools

    def __getitem__(self, name: str) -> Tool:
        return self._tools[name]

    def __len__(self) -> int:
        return len(self._tools)

    def __iter__(self) -> Iterator[Tool]:
        return iter(self._tools.values())

    def get(self, name: str) -> Tool | None:
        """The tool of that name, or None."""
        return self._tools.get(name)

    def is_external(self, call: ParsedCall) -> bool:
        """Whether a well-formed call names a tool that somebody outside answers."""
        made = self._tools.get(call.name)
        return isinstance(call, ToolCall) and made is not None and made.function is None

    def select(self, names: Collection[str] | None = None, external: Sequence[Mapping[str, Any]] = ()) -> Toolbox:
        """A toolbox of these tools alone (None: all) and of tools that somebody outside answers, on the same threads.

        Closing it does nothing. Raises ValueError on a name that is unknown or used twice.
        """
        unknown = [name for name in names or () if name not in self._tools]
        if unknown:
            raise ValueError(f"there is no tool {unknown[0][:80]!r}; {self._names()}")
        kept = [made for made in self if names is None or made.name in names]
        return Toolbox([*kept, *map(Tool.from_schema, external)], executor=self.executor)

    async def call(self, call: ParsedCall, timeout_s: float | None = None) -> ToolResult:
        """Run a call. Never raises for what the tool does; cancelling the awaiting task gives the call up."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[ToolResult] = loop.create_future()

        def give(result: ToolResult) -> None:
            if not future.done():
                future.set_result(result)

        def done(result: ToolResult) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(give, result)

        pending = self.submit(call, done, timeout_s)
        try:
            return await future
        finally:
            pending.cancel()

    def submit(self, call: ParsedCall, done: Done, timeout_s: float | None = None) -> PendingCall:
        """Run a call and hand its result to `done`, once, on whichever thread: it must be quick and thread-safe.

        The least of `timeout_s`, the tool's own and the limits' bounds it, counted from now. A call that cannot run
        (unknown tool, wrong arguments, malformed) gives its result before this returns.
        """
        pending = PendingCall(call, done, self.executor.clock)
        try:
            made, kwargs = self._resolve(call)
        except ArgumentsError as error:
            pending.settle(f"error: {error}", Outcome.REFUSED)
            return pending
        except Exception as error:  # a converter of the tool's own types (a dataclass's checks) may raise anything
            pending.settle(error_text(error), error_outcome(error))
            return pending
        given = [each for each in (timeout_s, made.timeout_s, self.executor.limits.timeout_s) if each is not None]
        self.executor.run(pending, made, kwargs, min(given, default=DEFAULT_TIMEOUT_S))
        return pending

    def close(self) -> None:
        """Give up all calls and end the threads. Functions that still run are left to end by themselves."""
        if self._owns_executor:
            self.executor.close()

    def __enter__(self) -> Toolbox:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _resolve(self, call: ParsedCall) -> tuple[Tool, dict[str, Any]]:
        """The tool and its keyword arguments. Raises ArgumentsError with what to tell the model."""
        made = self._tools.get(call.name)
        if self.executor.is_closed:
            raise ArgumentsError("the tools are closed")
        if isinstance(call, MalformedCall):
            raise ArgumentsError(f"the call could not be read: {call.reason}")
        if made is None:
            raise ArgumentsError(f"there is no tool {call.name[:80]!r}; {self._names()}")
        if made.function is None:
            raise ArgumentsError(f"tool {made.name!r} is answered outside this process")
        if not made.is_async and self.executor.num_stuck >= MAX_STUCK_THREADS:
            raise ArgumentsError(f"{MAX_STUCK_THREADS} earlier calls ran out of time and are still running")
        return made, made.bind(call.arguments)

    def _names(self) -> str:
        names = list(self._tools)
        shown = ", ".join(names[:_MAX_NAMES_SHOWN]) + (", …" if len(names) > _MAX_NAMES_SHOWN else "")
        return f"the tools are: {shown}" if names else "there are no tools"


def _as_tool(given: Tool | Callable[..., Any] | Mapping[str, Any]) -> Tool:
    if isinstance(given, Tool):
        return given
    if isinstance(given, Mapping):
        return Tool.from_schema(given)
    return tool(given)
