"""All the tools that a process runs by itself: Python functions, MCP servers, HTTP services, in one toolbox."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, Protocol

from jaxcept.tools.definition import Tool, tool
from jaxcept.tools.executor import Executor
from jaxcept.tools.guard import ToolLimits
from jaxcept.tools.load import load_tools
from jaxcept.tools.process import ProcessTools
from jaxcept.tools.toolbox import MAX_THREADS, Toolbox

logger = logging.getLogger(__name__)

# For tools that many clients share: one that is slow or broken must not take the others' threads with it.
SERVER_LIMITS = ToolLimits(timeout_s=60.0, max_concurrency=16, breaker_failures=5, breaker_reset_s=30.0)

Group = tuple[str, Sequence[Tool]]


class _Source(Protocol):
    """Where tools come from, beyond this process."""

    def groups(self) -> list[Group]:
        """Servers' names and their tools."""
        ...

    def health(self) -> list[dict[str, Any]]:
        """One dict per server."""
        ...

    def close(self) -> None:
        """End connections."""
        ...


class ToolSource:
    """Tools from everywhere. `toolbox` is the present one: an MCP server's tools may change while it runs."""

    def __init__(self, functions: Sequence[Tool], allow: Sequence[str], limits: ToolLimits) -> None:
        self._executor = Executor(time.monotonic, limits, MAX_THREADS)
        self._functions = tuple(functions)
        self._allow = tuple(allow)
        self._sources: list[_Source] = []
        self._lock = threading.Lock()
        self._toolbox = Toolbox(executor=self._executor)

    @property
    def toolbox(self) -> Toolbox:
        """The tools as they are; ask anew for each request. `toolbox.select` narrows it; closing is the source's."""
        return self._toolbox

    def health(self) -> list[dict[str, Any]]:
        """One dict per place that tools come from: server, kind, is_up, tools, error."""
        mine = {"server": "functions", "kind": "python", "is_up": True, "tools": len(self._functions), "error": ""}
        others = [state for source in self._sources for state in source.health()]
        return [mine, *others] if self._functions else others

    def tool_states(self) -> list[dict[str, Any]]:
        """One dict per tool that was called: tool, running, waiting, failures in a row, is_open (it is refused)."""
        return [guard.state() for guard in self._executor.guards()]

    def close(self) -> None:
        """Give up all calls, end connections and the servers that were started; some seconds at most."""
        self._executor.close()
        for source in self._sources:
            source.close()

    def __enter__(self) -> ToolSource:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def add(self, source: _Source) -> None:
        """Take the tools of a source, which is closed with this one."""
        self._sources.append(source)
        self.refresh()

    def refresh(self) -> None:
        """Make the toolbox anew from what the sources offer."""
        with self._lock:
            allowed = [made for made in distinct(self._groups()) if self._is_allowed(made.name)]
            self._toolbox = Toolbox(allowed, executor=self._executor)

    def check_allowed(self) -> None:
        """Raises ValueError on an allow-list pattern that fits no tool: it is a slip that would hide one."""
        names = [made.name for made in distinct(self._groups())]
        for pattern in self._allow:
            if not any(fnmatchcase(name, pattern) for name in names):
                shown = ", ".join(names)[:1000] or "none"
                raise ValueError(f"--allow-tools {pattern}: no tool has such a name; the tools are: {shown}")

    def check_functions(self) -> None:
        """Raises ValueError on a name that two functions have."""
        names = [made.name for group, tools in self._groups() if group == "" for made in tools]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"--tools: two tools are named {twice!r}; give one of them another name")

    def _groups(self) -> list[Group]:
        return [("", self._functions), *(group for source in self._sources for group in source.groups())]

    def _is_allowed(self, name: str) -> bool:
        return not self._allow or any(fnmatchcase(name, pattern) for pattern in self._allow)


def open_tools(
    functions: Sequence[str | Tool | Callable[..., Any]] = (),
    mcp: Sequence[str] = (),
    openapi: Sequence[str] = (),
    allow: Sequence[str] = (),
    limits: ToolLimits = SERVER_LIMITS,
    *,
    allow_hosts: Sequence[str] = (),
    isolate: bool = False,
) -> ToolSource:
    """Open everything that `--tools`, `--mcp` and `--openapi` name, and connect; to be closed by the caller.

    `functions` holds "module:attr" and the like (load_tools), Tools or functions; `mcp` what parse_mcp reads, `openapi`
    what parse_openapi reads. `allow` are glob patterns of the names to offer; none offers all. HTTP services on
    `allow_hosts` may have private addresses. `isolate` runs the functions that are given by name in processes of their
    own, which a call that runs out of time ends. A name that is taken gets its server's in front: server__name. Raises
    ValueError, in words for whoever wrote the flags, on anything that cannot be opened.
    """
    apart = [given for given in functions if isolate and isinstance(given, str)]
    source = ToolSource(
        [made for given in functions if given not in apart for made in _functions(given)], allow, limits
    )
    try:
        source.refresh()
        for spec in apart:
            source.add(ProcessTools(spec, max_output_chars=limits.max_output_chars))
        source.check_functions()
        for text in openapi:
            for service in _open_services(text, tuple(allow_hosts)):
                source.add(service)
        if mcp:
            source.add(_open_servers(mcp, source.refresh))
        source.check_allowed()
    except BaseException:
        source.close()
        raise
    return source


def distinct(groups: Sequence[Group]) -> list[Tool]:
    """The tools of all groups in order. One whose name is taken is called group__name, or left out if that is too."""
    made: dict[str, Tool] = {}
    for group, tools in groups:
        for each in tools:
            name = each.name
            if name in made and group:
                name = f"{group}__{name}"[:128]
            if name in made:
                logger.warning("a second tool named %r is left out", name)
                continue
            made[name] = each if name == each.name else replace(each, name=name)
    return list(made.values())


def _functions(given: str | Tool | Callable[..., Any]) -> list[Tool]:
    found = load_tools(given) if isinstance(given, str) else [given]
    return [each if isinstance(each, Tool) else tool(each) for each in found]


def _open_servers(texts: Sequence[str], on_tools: Callable[[], None]) -> _Source:
    from jaxcept.tools.mcp_config import parse_mcp  # noqa: PLC0415

    specs = [spec for text in texts for spec in parse_mcp(text)]
    try:
        from jaxcept.tools.mcp import McpServers  # noqa: PLC0415 (optional dependency, slow to import)
    except ImportError as error:
        raise ValueError(f"--mcp needs the mcp package: pip install 'jaxcept[serve]' ({error})") from error
    return McpServers(specs, on_tools)


def _open_services(text: str, allow_hosts: tuple[str, ...]) -> Iterator[_Source]:
    try:
        from jaxcept.tools.openapi import OpenApiTools, parse_openapi  # noqa: PLC0415 (optional dependency)
    except ImportError as error:
        raise ValueError(f"--openapi needs httpcore2: pip install 'jaxcept[serve]' ({error})") from error
    for spec in parse_openapi(text, allow_hosts):
        yield OpenApiTools(spec)
