"""HTTP tools from an OpenAPI 3 document: one tool per operation, sent with bounds and to public addresses alone.

Needs the `httpcore2` package; documents in YAML need `pyyaml`.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from jaxcept.tools.addresses import AddressGuard, Resolve
from jaxcept.tools.definition import Tool
from jaxcept.tools.http_fetch import Answer, HttpFetch
from jaxcept.tools.openapi_operation import MAX_DESCRIPTION_CHARS, check_url, read_operation, server_url
from jaxcept.tools.openapi_request import Operation
from jaxcept.tools.openapi_schema import Document
from jaxcept.tools.output import ToolError, ToolFailedError
from jaxcept.tools.variables import expand, texts
from jaxcept.tools.workers import LoopThread

logger = logging.getLogger(__name__)

MAX_DOCUMENT_BYTES = 16 * 2**20
MAX_RESPONSE_BYTES = 2**20
MAX_OPERATIONS = 1000
DOCUMENT_TIMEOUT_S = 30.0
_METHODS = ("get", "put", "post", "delete", "options", "head", "patch")
_NAMED = re.compile(r"([A-Za-z0-9_-]{1,64})=(.+)")


@dataclass(frozen=True)
class OpenApiSpec:
    """One document and how its operations are reached.

    `document` is a file or a URL. `base_url` stands in for the servers that the document names. `headers` are sent with
    every call, to the base URL's host alone. `allow_hosts` may be private addresses.
    """

    name: str
    document: str
    base_url: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    allow_hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for url in (self.base_url, self.document if "://" in self.document else None):
            if url is not None:
                check_url(url.partition("?")[0])


def parse_openapi(text: str, allow_hosts: tuple[str, ...] = ()) -> list[OpenApiSpec]:
    """The documents that one `--openapi` names: `name=file or URL`, a file or URL alone, or a JSON file.

    The file holds `{"openApiServers": {name: {document, baseUrl, headers, allowHosts}}}`, with `${NAME}` for
    environment variables. Raises ValueError.
    """
    named = _NAMED.fullmatch(text)
    name, place = named.groups() if named else (re.sub(r"[^A-Za-z0-9_-]+", "_", Path(text).stem)[:64] or "http", text)
    path = Path(place).expanduser()
    if named is None and path.suffix == ".json" and path.is_file():
        try:
            content = msgspec.json.decode(path.read_bytes())
        except (OSError, msgspec.DecodeError) as error:
            raise ValueError(f"--openapi {text}: not a JSON file: {error}") from error
        if isinstance(content, dict) and isinstance(content.get("openApiServers"), dict):
            return [_entry(key, entry, f"--openapi {text}: {key}") for key, entry in content["openApiServers"].items()]
    return [OpenApiSpec(name, place, allow_hosts=allow_hosts)]


def _entry(name: str, entry: Any, where: str) -> OpenApiSpec:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected an object")
    document = expand(entry.get("document"), f"{where}: document")
    hosts = entry.get("allowHosts", [])
    if document is None or not isinstance(hosts, list):
        raise ValueError(f"{where}: expected document (a file or a URL) and, if any, allowHosts as a list")
    return OpenApiSpec(
        name,
        document,
        base_url=expand(entry.get("baseUrl"), f"{where}: baseUrl"),
        headers=texts(entry.get("headers", {}), f"{where}: headers"),
        allow_hosts=tuple(expand(host, f"{where}: allowHosts") or "" for host in hosts),
    )


class OpenApiTools:
    """The tools of one document. Raises ValueError on a document that cannot be read or has no operation to offer."""

    def __init__(self, spec: OpenApiSpec, *, resolve: Resolve | None = None) -> None:
        self.spec = spec
        self._loop = LoopThread("http-loop")
        self._guard = AddressGuard(spec.allow_hosts, resolve)
        self._fetch: HttpFetch | None = None
        self._error = ""
        try:
            self.tools = tuple(self._make_tools(Document(self._load())))
        except BaseException:
            self.close()
            raise

    def groups(self) -> list[tuple[str, Sequence[Tool]]]:
        """The document's name and its tools."""
        return [(self.spec.name, self.tools)]

    def health(self) -> list[dict[str, Any]]:
        """The document's name, the number of its tools, and why the last call failed if it found no server."""
        state = {"server": self.spec.name, "kind": "openapi", "is_up": not self._error}
        return [{**state, "tools": len(self.tools), "error": self._error}]

    def close(self) -> None:
        """End all connections and calls."""

        if self._fetch is not None:
            with contextlib.suppress(TimeoutError):
                self._loop.submit(self._fetch.aclose()).result(5.0)
        self._loop.close()

    def _load(self) -> Mapping[str, Any]:
        place, where = self.spec.document, f"--openapi {self.spec.document}"
        if place.startswith(("http://", "https://")):
            request = self._send("GET", place, [], None, MAX_DOCUMENT_BYTES)
            try:
                answer = self._loop.submit(asyncio.wait_for(request, DOCUMENT_TIMEOUT_S)).result()
            except (ToolError, OSError) as error:
                raise ValueError(f"{where}: {error or type(error).__name__}") from error
            if answer.status != 200 or answer.is_cut:
                raise ValueError(f"{where}: HTTP {answer.status}{', too long' if answer.is_cut else ''}")
            data = answer.data
        else:
            try:
                data = Path(place).expanduser().read_bytes()
            except OSError as error:
                raise ValueError(f"{where}: {error}") from error
        if len(data) > MAX_DOCUMENT_BYTES:
            raise ValueError(f"{where}: the document is over {MAX_DOCUMENT_BYTES:,} bytes")
        root = _decode(data, where)
        if not isinstance(root, dict) or not str(root.get("openapi", "")).startswith("3"):
            raise ValueError(f"{where}: expected an OpenAPI 3 document")
        return root

    def _make_tools(self, document: Document) -> list[Tool]:
        made: dict[str, Tool] = {}
        paths = document.root.get("paths")
        for path, item in paths.items() if isinstance(paths, dict) else ():
            item = document.resolve(item)  # noqa: PLW2901 (a path may be a reference)
            for method in _METHODS:
                operation = item.get(method) if isinstance(item, dict) else None
                if not isinstance(operation, dict) or len(made) >= MAX_OPERATIONS:
                    continue
                try:
                    tool = self._make_tool(document, str(path), item, method, operation)
                except (ValueError, KeyError, TypeError) as error:
                    logger.warning(
                        "--openapi %s: %s %s is left out: %s", self.spec.document, method.upper(), path, error
                    )
                    continue
                if tool.name in made:
                    logger.warning("--openapi %s: a second %r is left out", self.spec.document, tool.name)
                made.setdefault(tool.name, tool)
        if not made:
            raise ValueError(f"--openapi {self.spec.document}: it has no operation that could be a tool")
        return list(made.values())

    def _make_tool(
        self, document: Document, path: str, item: Mapping[str, Any], method: str, operation: Mapping[str, Any]
    ) -> Tool:
        base_url = self.spec.base_url or server_url(document, item, operation, self.spec.document)
        sent, schema = read_operation(document, path, item, method, operation, base_url)
        name = operation.get("operationId") or f"{method}_{path.strip('/')}"
        words = (operation.get("summary"), operation.get("description"))
        return Tool(
            name=re.sub(r"[^A-Za-z0-9_-]+", "_", str(name)).strip("_")[:64],
            description="\n".join(text for text in words if isinstance(text, str))[:MAX_DESCRIPTION_CHARS],
            parameters=schema,
            function=self._function(sent),
            is_pure=operation.get("x-pure") is True,
        )

    def _function(self, operation: Operation) -> Callable[..., Awaitable[str]]:
        async def call(**arguments: Any) -> str:
            url, headers, body = operation.request(arguments)
            request = self._send(operation.method, url, headers, body, MAX_RESPONSE_BYTES)
            try:
                answer = await asyncio.wrap_future(self._loop.submit(request))
            except (ConnectionError, TimeoutError) as error:
                self._error = str(error)
                raise
            self._error = ""
            return _answer_text(answer)

        return call

    async def _send(
        self, method: str, url: str, headers: list[tuple[str, str]], body: bytes | None, max_bytes: int
    ) -> Answer:
        """Send a request with the configured headers; runs on the loop."""
        if self._fetch is None:
            self._fetch = HttpFetch(self._guard)
        # Configured headers may be credentials: they go where the operator said, not where a document points.
        place = self.spec.base_url or self.spec.document
        if "://" not in place or urlsplit(place).netloc == urlsplit(url).netloc:
            own = {name.lower() for name in self.spec.headers}
            headers = [pair for pair in headers if pair[0].lower() not in own] + list(self.spec.headers.items())
        return await self._fetch.send(method, url, headers, body, max_bytes)


def _decode(data: bytes, where: str) -> Any:
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        try:
            yaml: Any = importlib.import_module("yaml")
        except ImportError:
            raise ValueError(f"{where}: not JSON ({error}); to read YAML, install pyyaml") from error
        try:
            return yaml.safe_load(data)
        except (yaml.YAMLError, RecursionError, UnicodeError) as broken:
            raise ValueError(f"{where}: neither JSON nor YAML: {broken}") from broken


def _answer_text(answer: Answer) -> str:
    """An answer as text for the model. Raises ToolError if the server refuses the call, ToolFailedError if it fails."""
    kind = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
    is_text = kind == "" or kind.startswith("text/") or kind.endswith(("json", "xml", "javascript", "yaml"))
    if answer.headers.get("content-encoding", "identity").lower() != "identity":
        text = f"[{kind or 'an answer'}, compressed though that was not asked for, not shown]"
    elif is_text and b"\0" not in answer.data[:512]:
        text = answer.data.decode("utf-8", "replace")
        text += f"\n[cut: the answer had over {MAX_RESPONSE_BYTES:,} bytes]" if answer.is_cut else ""
    else:
        text = f"[{kind or 'binary'}, {'over ' if answer.is_cut else ''}{len(answer.data):,} bytes, not shown]"
    if 200 <= answer.status < 300:
        return text or f"HTTP {answer.status}, without content"
    if 300 <= answer.status < 400:
        target = answer.headers.get("location", "")[:200]
        raise ToolError(f"HTTP {answer.status}: a redirect to {target!r}, which is not followed")
    told = f"HTTP {answer.status}: {text[:1000]}"
    if answer.status == 429 or answer.status >= 500:
        raise ToolFailedError(told)
    raise ToolError(told)
