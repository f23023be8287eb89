"""Which MCP servers to use: `name=command args`, `name=https://…`, or a JSON file as desktop clients keep it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from jaxcept.tools.variables import expand, texts

_NAMED = re.compile(r"([A-Za-z0-9_.-]{1,64})=(.+)", re.DOTALL)


@dataclass(frozen=True)
class McpServerSpec:
    """One server: a command to start and talk to over its pipes, or the URL of one that runs (streamable HTTP)."""

    name: str
    command: str | None = None
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict, repr=False)  # added to a minimal environment (PATH, HOME, …)
    cwd: str | None = None
    url: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if (self.command is None) == (self.url is None):
            raise ValueError(f"MCP server {self.name!r}: expected either a command or a url")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"MCP server {self.name!r}: url={self.url!r}: expected http:// or https://")


def parse_mcp(text: str) -> list[McpServerSpec]:
    """The servers that one `--mcp` names. Raises ValueError saying what is wrong with it."""
    named = _NAMED.fullmatch(text.strip())
    if named:
        name, place = named.groups()
        if place.startswith(("http://", "https://")):
            return [McpServerSpec(name, url=place)]
        try:
            command, *args = shlex.split(place)
        except ValueError as error:
            raise ValueError(f"--mcp {text}: the command cannot be read: {error}") from error
        return [McpServerSpec(name, command=command, args=tuple(args))]
    path = Path(text).expanduser()
    if not path.is_file():
        raise ValueError(
            f"--mcp {text}: expected name=command with arguments, name=https://…, or a JSON file with mcpServers"
        )
    return read_mcp_file(path)


def read_mcp_file(path: Path) -> list[McpServerSpec]:
    """The servers of a JSON file `{"mcpServers": {name: {command, args, env, cwd} or {url, headers}}}`.

    `${NAME}`, `${env:NAME}` and `${NAME:-default}` in strings stand for environment variables; entries with `disabled`
    are left out. Raises ValueError naming the file and the entry.
    """
    try:
        content = msgspec.json.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError) as error:
        raise ValueError(f"--mcp {path}: not a JSON file: {error}") from error
    servers = content.get("mcpServers", content.get("servers")) if isinstance(content, dict) else None
    if not isinstance(servers, dict):
        raise ValueError(f'--mcp {path}: expected {{"mcpServers": {{name: {{"command": …}} or {{"url": …}}}}}}')
    return [
        _entry(name, entry, f"--mcp {path}: server {name!r}")
        for name, entry in servers.items()
        if not (isinstance(entry, dict) and entry.get("disabled"))
    ]


def _entry(name: str, entry: Any, where: str) -> McpServerSpec:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected an object")
    command, url, cwd = (expand(entry.get(key), f"{where}: {key}") for key in ("command", "url", "cwd"))
    args = entry.get("args", [])
    if not isinstance(args, list):
        raise ValueError(f"{where}: args: expected a list of strings")
    try:
        return McpServerSpec(
            name,
            command=command,
            args=tuple(expand(arg, f"{where}: args") or "" for arg in args),
            env=texts(entry.get("env", {}), f"{where}: env"),
            cwd=cwd,
            url=url,
            headers=texts(entry.get("headers", {}), f"{where}: headers"),
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
