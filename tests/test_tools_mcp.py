"""Tools of real MCP servers: over pipes and over HTTP, killed, stopped, silent and talking nonsense."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from jaxcept.tools.calls import Outcome, ToolCall, ToolResult
from jaxcept.tools.mcp_config import McpServerSpec, parse_mcp
from jaxcept.tools.toolbox import Toolbox

mcp = pytest.importorskip("jaxcept.tools.mcp", reason="needs the extra mcp")
stdio = pytest.importorskip("jaxcept.tools.mcp_stdio", reason="needs the extra mcp")

SERVER = '''
import os, sys, time
from mcp.server.mcpserver import Image, MCPServer
from mcp.types import ToolAnnotations

app = MCPServer("demo", log_level="CRITICAL")
folder = sys.argv[1]

@app.tool(annotations=ToolAnnotations(read_only_hint=True, idempotent_hint=True))
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b

@app.tool()
def pid() -> int:
    return os.getpid()

@app.tool()
def die() -> str:
    os._exit(3)

@app.tool(structured_output=False)
def big(n: int) -> str:
    return "x" * n

@app.tool()
def refuse() -> str:
    raise ValueError("not today")

@app.tool()
def picture() -> Image:
    return Image(data=b"0123456789", format="png")

@app.tool()
def noise() -> str:
    print("this is not JSON-RPC", flush=True)
    print(b"\\xff\\xfe".decode("latin-1"), flush=True)
    return "fine"

if os.path.exists(os.path.join(folder, "more")):
    @app.tool()
    def more() -> str:
        return "more"

if len(sys.argv) > 2:
    app.run("streamable-http", host="127.0.0.1", port=int(sys.argv[2]))
else:
    app.run()
'''

OLD_SERVER = """
import json, sys

names = ["grow", "add"]

def send(**message):
    print(json.dumps({"jsonrpc": "2.0", **message}), flush=True)

for line in sys.stdin:
    asked = json.loads(line)
    method, params, id = asked["method"], asked.get("params", {}), asked.get("id")
    if method == "initialize":
        info = {"name": "old", "version": "1"}
        send(id=id, result={"protocolVersion": "2024-11-05", "capabilities": {"tools": {}}, "serverInfo": info})
    elif method == "tools/list":  # one tool a page
        i = int(params.get("cursor", 0))
        page = {"tools": [{"name": names[i], "inputSchema": {"type": "object"}}]}
        send(id=id, result={**page, "nextCursor": str(i + 1)} if i + 1 < len(names) else page)
    elif method == "tools/call" and params["name"] == "grow":
        names.append("a name that no model may write")
        names.append("grown")
        send(method="notifications/tools/list_changed")
        send(id=id, result={"content": [{"type": "text", "text": "ok"}]})
    elif method == "tools/call" and params["name"] == "add":
        send(id=id, error={"code": -32602, "message": "b is missing"})
    elif id is not None:
        send(id=id, error={"code": -32601, "message": "no such method"})
"""


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short where a test would only wait, long where a slow machine may need it."""
    monkeypatch.setattr(stdio, "_EXIT_WAIT_S", 0.3)
    monkeypatch.setattr(mcp, "CALL_WAIT_S", 20.0)


@pytest.fixture
def server_file(tmp_path: Path) -> Path:
    path = tmp_path / "server.py"
    path.write_text(SERVER)
    return path


def spec_of(path: Path) -> McpServerSpec:
    return McpServerSpec("demo", command=sys.executable, args=(str(path), str(path.parent)))


@contextmanager
def opened(*specs: McpServerSpec) -> Iterator[tuple[Any, Toolbox]]:
    servers = mcp.McpServers(specs)
    try:
        with Toolbox([tool for _, tools in servers.groups() for tool in tools]) as box:
            yield servers, box
    finally:
        servers.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Toolbox]]:
    """A server for the tests that do it no harm."""
    path = tmp_path_factory.mktemp("shared") / "server.py"
    path.write_text(SERVER)
    with opened(spec_of(path)) as both:
        yield both


def call(box: Toolbox, name: str, timeout_s: float = 20.0, **arguments: Any) -> ToolResult:
    return asyncio.run(box.call(ToolCall("call00000", name, arguments), timeout_s))


def is_gone(process_id: int, within_s: float = 5.0) -> bool:
    """Whether the process ends in time; a zombie that nobody has reaped counts as ended."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


def test_tools_are_listed_and_answer(shared: tuple[Any, Toolbox]) -> None:
    servers, box = shared
    add = box["add"]
    assert (add.description, add.is_pure, box["pid"].is_pure) == ("Add two numbers.", True, False)
    assert add.parameters["required"] == ["a", "b"]
    assert call(box, "add", a=2, b=3).text == "5"
    assert call(box, "add", a="2", b=3).text == "5", "arguments are mended as for any tool"
    wrong = call(box, "add", a="two")
    assert wrong.outcome is Outcome.REFUSED
    assert "argument 'a': expected integer" in wrong.text
    refused = call(box, "refuse")
    assert (refused.outcome, refused.text) == (Outcome.ERROR, "error: Error executing tool refuse")
    assert call(box, "picture").text == "[image: image/png, about 12 bytes, not shown]"
    assert servers.health() == [
        {"server": "demo", "kind": "mcp-stdio", "is_up": True, "tools": 7, "connects": 1, "error": ""}
    ]


def test_a_server_that_dies_in_a_call_is_told_and_started_again(server_file: Path) -> None:
    with opened(spec_of(server_file)) as (servers, box):
        began_s = time.monotonic()
        died = call(box, "die")
        assert time.monotonic() - began_s < 5
        assert (died.outcome, died.text) == (
            Outcome.FAILED,
            "error: ConnectionResetError: MCP server 'demo' ended during the call",
        )
        assert call(box, "add", a=1, b=1).text == "2"
        assert servers.health()[0]["connects"] == 2


def test_a_server_killed_between_calls_is_started_again_before_the_next(server_file: Path) -> None:
    with opened(spec_of(server_file)) as (_, box):
        os.kill(int(call(box, "pid").text), signal.SIGKILL)
        assert call(box, "add", a=1, b=1).text == "2"


def test_a_server_that_cannot_come_back_is_told_at_once(server_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcp, "CALL_WAIT_S", 0.5)
    with opened(spec_of(server_file)) as (servers, box):
        server_file.write_text("raise SystemExit('broken on purpose')")
        call(box, "die")
        began_s = time.monotonic()
        told = call(box, "add", a=1, b=1)
        assert time.monotonic() - began_s < 5
        assert told.outcome is Outcome.FAILED
        assert told.text.startswith("error: ConnectionError: MCP server 'demo' is not connected")
        assert "on purpose" not in told.text
        assert not servers.health()[0]["is_up"]
        server_file.write_text(SERVER)
        deadline = time.monotonic() + 15
        while not servers.health()[0]["is_up"] and time.monotonic() < deadline:
            time.sleep(0.05)
        assert call(box, "add", a=1, b=1).text == "2"


def test_a_server_that_stops_answering_is_replaced(server_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcp, "PROBE_TIMEOUT_S", 0.3)
    with opened(spec_of(server_file)) as (_, box):
        process_id = int(call(box, "pid").text)
        os.kill(process_id, signal.SIGSTOP)
        assert call(box, "add", timeout_s=0.3, a=1, b=1).outcome is Outcome.TIMEOUT
        deadline = time.monotonic() + 15
        while (again := call(box, "pid", 2.0)).is_error and time.monotonic() < deadline:
            time.sleep(0.1)
        assert int(again.text) != process_id
        assert is_gone(process_id)


def test_an_answer_over_the_limit_harms_only_its_own_call(shared: tuple[Any, Toolbox]) -> None:
    servers, box = shared

    async def both() -> list[ToolResult]:
        calls = [ToolCall("call00000", "big", {"n": 100_000_000}), ToolCall("call00001", "add", {"a": 1, "b": 2})]
        return await asyncio.gather(*(box.call(each, 20.0) for each in calls))

    big, added = asyncio.run(both())
    assert big.text == "error: MCP server 'demo': the answer was over 8,388,608 bytes"
    assert added.text == "3"
    cut = call(box, "big", n=500_000).text
    assert cut.endswith("[cut: the output had 500,000 characters, the first 100,000 characters are shown]")
    assert servers.health()[0]["connects"] == 1


def test_what_a_server_prints_beside_its_messages_is_ignored(shared: tuple[Any, Toolbox]) -> None:
    servers, box = shared
    assert call(box, "noise").text == "fine"
    assert call(box, "add", a=1, b=1).text == "2"
    assert servers.health()[0]["connects"] == 1


def test_changed_tools_are_listed_again(server_file: Path) -> None:
    changes = threading.Semaphore(0)
    servers = mcp.McpServers([spec_of(server_file)], changes.release)
    try:
        assert changes.acquire(timeout=0)
        before = dict.fromkeys(tool.name for _, tools in servers.groups() for tool in tools)
        kept = next(tool for _, tools in servers.groups() for tool in tools if tool.name == "add")
        (server_file.parent / "more").touch()
        with Toolbox(servers.groups()[0][1]) as box:
            call(box, "die")
        assert changes.acquire(timeout=10)
        after = {tool.name: tool for _, tools in servers.groups() for tool in tools}
        assert set(after) - set(before) == {"more"}
        assert after["add"] is kept, "a tool that did not change stays the same object"
    finally:
        servers.close()


def test_an_old_server_is_listed_page_by_page_and_again_when_it_says_so(tmp_path: Path) -> None:
    path = tmp_path / "old.py"
    path.write_text(OLD_SERVER)
    changes = threading.Semaphore(0)
    servers = mcp.McpServers([McpServerSpec("old", command=sys.executable, args=(str(path),))], changes.release)
    try:
        assert changes.acquire(timeout=0)
        with Toolbox(servers.groups()[0][1]) as box:
            assert [made.name for made in box] == ["grow", "add"]
            assert call(box, "add", a=1).text == "error: b is missing"
            assert call(box, "grow").text == "ok"
        assert changes.acquire(timeout=10)
        assert [made.name for made in servers.groups()[0][1]] == ["grow", "add", "grown"]
        assert servers.health()[0]["connects"] == 1
    finally:
        servers.close()


BAD_COMMANDS = {
    "no such program": (("no-such-program-here",), "FileNotFoundError"),
    "ends at once": ((sys.executable, "-c", "import sys; sys.exit('no licence')"), "it said: no licence"),
    "prints nonsense": (
        (sys.executable, "-c", "while True: print('hello', flush=True); input()"),
        "no connection in 1 s",
    ),
    "says nothing": ((sys.executable, "-c", "input(); import time; time.sleep(60)"), "no connection in 1 s"),
    "an endless line": ((sys.executable, "-c", "while True: print('x' * 10000, end='')"), ""),
}


@pytest.mark.parametrize("name", BAD_COMMANDS)
def test_a_server_that_does_not_start_is_an_error_with_its_reason(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    monkeypatch.setattr(mcp, "CONNECT_TIMEOUT_S", 1.0)
    (command, *args), reason = BAD_COMMANDS[name]
    began_s = time.monotonic()
    with pytest.raises(ValueError, match="MCP server 'bad'") as raised:
        mcp.McpServers([McpServerSpec("bad", command=command, args=tuple(args))])
    assert reason in str(raised.value)
    assert time.monotonic() - began_s < 8


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def http_server(path: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, str(path), str(path.parent), str(port)], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_server_over_http_that_is_killed_and_started_again(
    server_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mcp, "CALL_WAIT_S", 1.0)
    port = free_port()
    with http_server(server_file, port):
        servers = mcp.McpServers(parse_mcp(f"web=http://127.0.0.1:{port}/mcp"))
        box = Toolbox(servers.groups()[0][1])
        assert call(box, "add", a=2, b=3).text == "5"
        assert call(box, "refuse").outcome is Outcome.ERROR
        assert call(box, "big", n=200_000).text.endswith("the first 100,000 characters are shown]")
    began_s = time.monotonic()
    told = call(box, "add", a=2, b=3)
    assert time.monotonic() - began_s < 5
    assert told.outcome is Outcome.FAILED
    assert told.text.startswith("error: ConnectionError: MCP server 'web'")
    try:
        with http_server(server_file, port):
            deadline = time.monotonic() + 15
            while (again := call(box, "add", a=2, b=3)).is_error and time.monotonic() < deadline:
                time.sleep(0.1)
            assert again.text == "5"
            assert servers.health()[0]["connects"] == 2
    finally:
        servers.close()
        box.close()


def test_closing_ends_the_server_and_calls_after_it_are_told(server_file: Path) -> None:
    servers = mcp.McpServers([spec_of(server_file)])
    with Toolbox(servers.groups()[0][1]) as box:
        process_id = int(call(box, "pid").text)
        servers.close()
        assert is_gone(process_id)
        assert call(box, "add", a=1, b=1).is_error


def test_specs_as_the_command_line_gives_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [files] = parse_mcp("files=npx -y server-filesystem '/my documents'")
    assert (files.name, files.command, files.args) == ("files", "npx", ("-y", "server-filesystem", "/my documents"))
    [web] = parse_mcp("web=https://example.com/mcp?a=b")
    assert (web.name, web.url, web.command) == ("web", "https://example.com/mcp?a=b", None)
    monkeypatch.setenv("TOKEN", "secret")
    config = tmp_path / "mcp.json"
    servers = {
        "one": {"command": "uvx", "args": ["one", "${HOME_DIR:-/home}"], "env": {"KEY": "${env:TOKEN}"}, "cwd": "/tmp"},
        "two": {"type": "http", "url": "https://two.example/mcp", "headers": {"Authorization": "Bearer ${TOKEN}"}},
        "off": {"command": "x", "disabled": True},
    }
    config.write_text(json.dumps({"mcpServers": servers}))
    one, two = parse_mcp(str(config))
    assert (one.command, one.args, one.env, one.cwd) == ("uvx", ("one", "/home"), {"KEY": "secret"}, "/tmp")
    assert (two.url, two.headers) == ("https://two.example/mcp", {"Authorization": "Bearer secret"})
    assert "secret" not in repr([one, two])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "not a JSON file"),
        ("[]", "expected"),
        ('{"mcpServers": {"a": 1}}', "server 'a': expected an object"),
        ('{"mcpServers": {"a": {}}}', "either a command or a url"),
        ('{"mcpServers": {"a": {"command": "x", "url": "http://x"}}}', "either a command or a url"),
        ('{"mcpServers": {"a": {"url": "file:///etc/passwd"}}}', "expected http:// or https://"),
        ('{"mcpServers": {"a": {"command": "x", "args": "y"}}}', "args: expected a list"),
        ('{"mcpServers": {"a": {"command": "x", "env": {"K": 1}}}}', "env.K: expected a string"),
        ('{"mcpServers": {"a": {"command": "${NOT_SET_ANYWHERE}"}}}', "NOT_SET_ANYWHERE is not set"),
    ],
)
def test_a_wrong_file_is_an_error_that_says_where(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "mcp.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"mcp\.json") as raised:
        parse_mcp(str(path))
    assert reason in str(raised.value)


@pytest.mark.parametrize("text", ["", "nonsense", "no/such/file.json", "a='unclosed", "=x"])
def test_a_wrong_spec_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="--mcp"):
        parse_mcp(text)


def test_two_servers_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two MCP servers are named 'a'"):
        mcp.McpServers([McpServerSpec("a", command="x"), McpServerSpec("a", command="y")])


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_lines_come_whole_however_they_are_cut(size: int) -> None:
    text = b'{"a":1}\n\n{"id":7,"b":"' + b"x" * 1000 + b'"}\r\n{"c":' + b"1" * 5000 + b',"id":"k-9"}\nrest'
    splitter = stdio.LineSplitter(2000)
    lines = [line for i in range(0, len(text), size) for line in splitter.feed(text[i : i + size])]
    assert [is_whole for _, is_whole in lines] == [True, True, False]
    assert lines[0][0] == b'{"a":1}'
    assert len(lines[2][0]) <= 2 * 256 + 1000
    told = stdio._too_long(lines[2][0])
    assert told.message.id == "k-9"
