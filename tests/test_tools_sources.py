"""Tools from functions, MCP servers and HTTP services in one toolbox."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from jaxcept.tools.calls import Outcome, ToolCall, ToolResult
from jaxcept.tools.definition import Tool, tool
from jaxcept.tools.guard import ToolLimits
from jaxcept.tools.sources import ToolSource, distinct, open_tools

SERVER = """
import os
from mcp.server.mcpserver import MCPServer

app = MCPServer("demo", log_level="CRITICAL")

@app.tool()
def calculator(expression: str) -> str:
    return "from the server"

@app.tool()
def die() -> str:
    os._exit(3)

app.run()
"""


def call(source: ToolSource, name: str, **arguments: Any) -> ToolResult:
    return asyncio.run(source.toolbox.call(ToolCall("call00000", name, arguments), 20.0))


def api_file(tmp_path: Path, *names: str) -> str:
    paths = {f"/{name}": {"get": {"operationId": name}} for name in names}
    path = tmp_path / "web.json"
    path.write_text(json.dumps({"openapi": "3.1.0", "servers": [{"url": "http://127.0.0.1:9"}], "paths": paths}))
    return str(path)


def test_everything_in_one_toolbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mcp = pytest.importorskip("jaxcept.tools.mcp", reason="needs the extra mcp")
    pytest.importorskip("httpcore2")
    monkeypatch.setattr(mcp, "CALL_WAIT_S", 20.0)
    server = tmp_path / "server.py"
    server.write_text(SERVER)

    @tool(pure=True)
    def lookup(entity: str) -> str:
        return f"mine: {entity}"

    with open_tools(
        ["jaxcept.tools.builtin:calculator", lookup],
        mcp=[f"demo={sys.executable} {server}"],
        openapi=[api_file(tmp_path, "lookup", "other")],
        limits=ToolLimits(cache_ttl_s=60.0),
    ) as source:
        assert [made.name for made in source.toolbox] == [
            "calculator", "lookup", "web__lookup", "other", "demo__calculator", "die",
        ]  # fmt: skip
        assert call(source, "calculator", expression="2*3").text == "6"
        assert call(source, "demo__calculator", expression="2*3").text == "from the server"
        assert call(source, "lookup", entity="x").outcome is Outcome.ANSWERED
        assert call(source, "lookup", entity="x").outcome is Outcome.CACHED
        assert "not a public address" in call(source, "other").text
        assert [(state["server"], state["kind"], state["is_up"], state["tools"]) for state in source.health()] == [
            ("functions", "python", True, 2),
            ("web", "openapi", True, 2),
            ("demo", "mcp-stdio", True, 2),
        ]
        assert {state["tool"] for state in source.tool_states()} == {
            "calculator", "demo__calculator", "lookup", "other",
        }  # fmt: skip
        before = source.toolbox
        server.write_text(SERVER.replace("def calculator", "def renamed"))
        call(source, "die")
        assert call(source, "die").is_error, "the second one waits for the connection, and with it for the new list"
        assert [made.name for made in source.toolbox][-2:] == ["renamed", "die"]
        assert [made.name for made in before][-2:] == ["demo__calculator", "die"], "who holds a toolbox keeps its names"
        assert call(source, "renamed", expression="1").text == "from the server"
    assert call(source, "calculator", expression="2*3").text == "error: the tools are closed"


def test_the_allow_list_takes_patterns(tmp_path: Path) -> None:
    pytest.importorskip("httpcore2")
    api = api_file(tmp_path, "get_a", "get_b", "post_a")
    with open_tools(["jaxcept.tools.builtin"], openapi=[api], allow=["get_*", "lookup"]) as source:
        assert [made.name for made in source.toolbox] == ["lookup", "get_a", "get_b"]
        assert "there is no tool 'calculator'" in call(source, "calculator", expression="1").text
    with pytest.raises(ValueError, match="--allow-tools Lookup: no tool has such a name; the tools are: calculator"):
        open_tools(["jaxcept.tools.builtin"], allow=["Lookup"])


def test_what_cannot_be_opened_leaves_nothing_running(tmp_path: Path) -> None:
    pytest.importorskip("mcp")
    server = tmp_path / "server.py"
    server.write_text(SERVER)
    before = set(threading.enumerate())
    with pytest.raises(ValueError, match="MCP server 'bad'"):
        open_tools(mcp=[f"demo={sys.executable} {server}", "bad=no-such-program-here"])
    assert [thread.name for thread in threading.enumerate() if thread not in before and "loop" in thread.name] == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"functions": ["no_such_module"]}, "--tools no_such_module"),
        ({"functions": ["json:nothing"]}, "no function 'nothing'"),
        ({"functions": ["json"]}, "neither @tool functions nor a list TOOLS"),
        ({"functions": ["nowhere.py"]}, "no such file"),
        ({"functions": ["jaxcept.tools.builtin", "jaxcept.tools.builtin:lookup"]}, "two tools are named 'lookup'"),
        ({"mcp": ["nonsense"]}, "--mcp nonsense: expected name=command"),
        ({"openapi": ["nowhere.json"]}, "--openapi nowhere.json"),
    ],
)
def test_wrong_flags_are_told(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        open_tools(**options)


def test_files_and_lists_of_functions(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from jaxcept.tools.definition import tool\n"
        "def a() -> str:\n    return 'a'\n"
        "@tool\ndef b() -> str:\n    return 'b'\n"
        "both = [a, b]\n"
    )
    for spec, names in ((f"{path}", ["b"]), (f"{path}:a", ["a"]), (f"{path}:both", ["a", "b"])):
        with open_tools([spec]) as source:
            assert [made.name for made in source.toolbox] == names
    path.write_text("1 / 0")
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        open_tools([str(path)])


def test_names_are_kept_apart() -> None:
    def named(name: str) -> Tool:
        return Tool(name, "", {"type": "object"}, lambda: None)

    groups = [("", [named("a")]), ("x", [named("a"), named("b")]), ("y", [named("a"), named("b")]), ("y", [named("b")])]
    assert [made.name for made in distinct(groups)] == ["a", "x__a", "b", "y__a", "y__b"]


def test_without_the_packages_only_their_flags_fail() -> None:
    program = (
        "import sys; sys.modules['mcp'] = sys.modules['httpcore2'] = sys.modules['httpx2'] = None\n"
        "from jaxcept.tools.sources import open_tools\n"
        "open_tools(['jaxcept.tools.builtin']).close()\n"
        "for flags in ({'mcp': ['a=b']}, {'openapi': ['a=b']}):\n"
        "    try: open_tools(**flags)\n"
        "    except ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "--mcp needs the mcp package" in done.stdout
    assert "--openapi needs httpcore2" in done.stdout
