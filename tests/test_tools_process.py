"""Tools in processes of their own: whatever they do there, the server goes on."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxcept.tools.calls import Outcome, ToolCall, ToolResult
from jaxcept.tools.process import ProcessTools
from jaxcept.tools.sources import open_tools
from jaxcept.tools.toolbox import Toolbox

MODULE = '''
import ctypes, enum, os, subprocess, sys, time
from jaxcept.tools.definition import tool

class Color(enum.Enum):
    RED = "red"

@tool(pure=True, timeout_s=30)
def add(a: int, b: int = 1) -> int:
    """Add."""
    print("a print harms nothing")
    os.write(1, b"nor does a write")
    return a + b

@tool
async def slowly(seconds: float) -> str:
    import asyncio
    await asyncio.sleep(seconds)
    return "done"

@tool
def where() -> str:
    return f"{os.getpid()} {os.getpgid(0)}"

@tool
def paint(color: Color) -> str:
    if color is not Color.RED:
        raise RuntimeError("not the enum")
    return color.name

@tool
def leave(code: int) -> str:
    os._exit(code)

@tool
def crash() -> str:
    ctypes.string_at(0)

@tool
def fork() -> str:
    return "child" if os.fork() == 0 else "parent"

@tool
def spin_in_c(path: str) -> str:
    child = subprocess.Popen(["sleep", "600"])
    with open(path, "w") as file:
        file.write(f"{os.getpid()} {child.pid}")
    "ab" * 10  # the line above is what a timeout must clean up
    ctypes.PyDLL(None).sleep(600)  # holds the interpreter's lock: no thread of this process runs

@tool
def fail(kind: str) -> str:
    raise {"value": ValueError, "os": OSError, "exit": SystemExit}[kind]("because")

@tool
def huge() -> bytes:
    return b"\\xff" * 100_000_000

@tool
def nothing() -> None:
    pass
'''


@pytest.fixture(scope="module")
def module_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tools") / "mine.py"
    path.write_text(MODULE)
    return path


@pytest.fixture(scope="module")
def tools(module_file: Path) -> Iterator[ProcessTools]:
    opened = ProcessTools(str(module_file))
    yield opened
    opened.close()


@pytest.fixture
def box(tools: ProcessTools) -> Iterator[Toolbox]:
    with Toolbox(tools.tools) as box:
        yield box


def call(box: Toolbox, name: str, timeout_s: float = 20.0, **arguments: object) -> ToolResult:
    return asyncio.run(box.call(ToolCall("call00000", name, arguments), timeout_s))


def is_gone(process_id: int) -> bool:
    for _ in range(250):
        try:
            if Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


def test_tools_are_described_and_answer_elsewhere(box: Toolbox) -> None:
    add = box["add"]
    assert (add.description, add.is_pure, add.timeout_s, box["fork"].is_pure) == ("Add.", True, 30.0, False)
    assert add.parameters["required"] == ["a"]
    assert [call(box, "add", a=1).text, call(box, "add", a="2", b=3).text] == ["2", "5"]
    process_id, group_id = map(int, call(box, "where").text.split())
    assert process_id != os.getpid()
    assert group_id == process_id
    assert call(box, "where").text == f"{process_id} {group_id}", "a process serves call after call"
    assert call(box, "slowly", seconds=0.01).text == "done"
    assert call(box, "paint", color="red").text == "RED", "a value becomes the function's own type over there"
    assert call(box, "nothing").text == "null"


def test_errors_keep_their_words_and_their_kind(box: Toolbox) -> None:
    results = [call(box, "fail", kind=kind) for kind in ("value", "os", "exit")]
    assert [(result.text, result.outcome) for result in results] == [
        ("error: ValueError: because", Outcome.ERROR),
        ("error: OSError: because", Outcome.FAILED),
        ("error: SystemExit: because", Outcome.FAILED),
    ]
    assert call(box, "add", a="x").outcome is Outcome.REFUSED


@pytest.mark.parametrize(
    ("name", "arguments", "how"),
    [("leave", {"code": 3}, "exit code 3"), ("leave", {"code": 0}, "exit code 0"), ("crash", {}, "signal SIGSEGV")],
)
def test_a_process_that_ends_is_told_and_the_next_call_has_another(
    box: Toolbox, name: str, arguments: dict[str, int], how: str
) -> None:
    died = call(box, name, **arguments)
    assert (died.text, died.outcome) == (f"error: the tool's process ended during the call ({how})", Outcome.FAILED)
    assert call(box, "add", a=1).text == "2"


def test_a_call_that_runs_out_of_time_ends_its_process_and_all_it_started(box: Toolbox, tmp_path: Path) -> None:
    path = tmp_path / "ids"
    assert call(box, "spin_in_c", timeout_s=1.5, path=str(path)).outcome is Outcome.TIMEOUT
    assert all(is_gone(int(each)) for each in path.read_text().split())
    assert call(box, "add", a=1).text == "2"


def test_a_fork_answers_once(box: Toolbox) -> None:
    assert call(box, "fork").text == "parent"
    assert call(box, "add", a=1).text == "2"


def test_a_huge_output_is_cut_over_there(box: Toolbox) -> None:
    text = call(box, "huge").text
    assert text.startswith("\ufffd" * 99_880 + "\n[cut: the output had 100,000,000 bytes")


def test_calls_run_side_by_side_and_the_rest_wait(module_file: Path) -> None:
    tools = ProcessTools(str(module_file), max_processes=2)
    try:
        with Toolbox(tools.tools) as box:

            async def run() -> list[ToolResult]:
                calls = [ToolCall("call00000", "slowly", {"seconds": 0.05}) for _ in range(6)]
                return await asyncio.gather(*(box.call(each, 20.0) for each in calls))

            assert [result.text for result in asyncio.run(run())] == ["done"] * 6
        assert tools.health()[0]["started"] == 2
    finally:
        tools.close()


def test_an_idle_process_that_was_killed_is_replaced(tools: ProcessTools, box: Toolbox) -> None:
    process_id = int(call(box, "where").text.split()[0])
    os.kill(process_id, 9)
    assert is_gone(process_id)
    time.sleep(0.05)
    assert call(box, "add", a=1).text == "2"


def test_closing_kills_what_runs(module_file: Path) -> None:
    tools = ProcessTools(str(module_file))
    with Toolbox(tools.tools) as box:
        process_id = int(call(box, "where").text.split()[0])
    tools.close()
    assert is_gone(process_id)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("import os; os._exit(7)", "exit code 7"), ("1 / 0", "ZeroDivisionError"), ("x = 1", "neither @tool functions")],
)
def test_tools_that_cannot_be_loaded_are_told(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "bad.py"
    path.write_text(text)
    with pytest.raises(ValueError, match=reason):
        ProcessTools(str(path))


def test_a_source_runs_named_functions_apart(module_file: Path) -> None:
    def mine() -> int:
        return os.getpid()

    with open_tools([f"{module_file}:where", mine], isolate=True) as source:
        assert [made.name for made in source.toolbox] == ["mine", "where"]
        assert call(source.toolbox, "mine").text == str(os.getpid())
        assert not call(source.toolbox, "where").text.startswith(f"{os.getpid()} ")
        assert [state["kind"] for state in source.health()] == ["python", "process"]
    with pytest.raises(ValueError, match="two tools are named 'where'"):
        open_tools([f"{module_file}:where", str(module_file)], isolate=True)
