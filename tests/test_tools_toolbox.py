"""Calls run side by side, end in time, and tell every failure as text."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from jaxcept.tools.calls import MalformedCall, Outcome, ToolCall, ToolResult
from jaxcept.tools.definition import Tool, tool
from jaxcept.tools.guard import ToolLimits
from jaxcept.tools.toolbox import Toolbox


def call(name: str, **arguments: Any) -> ToolCall:
    return ToolCall("call00000", name, arguments)


def run(box: Toolbox, *calls: ToolCall | MalformedCall, timeout_s: float | None = None) -> list[ToolResult]:
    async def run_all() -> list[ToolResult]:
        return list(await asyncio.gather(*(box.call(one, timeout_s) for one in calls)))

    with box:
        return asyncio.run(run_all())


def text_of(function: Callable[..., Any], **arguments: Any) -> str:
    made = function if isinstance(function, Tool) else tool(function)
    return run(Toolbox([made]), call(made.name, **arguments))[0].text


def test_sync_and_async_tools_answer() -> None:
    def add(a: int, b: int = 1) -> int:
        return a + b

    async def shout(text: str) -> str:
        await asyncio.sleep(0)
        return text.upper()

    results = run(Toolbox([add, shout]), call("add", a=2), call("shout", text="hé"), call("add", a="4", b=5))
    assert [(r.text, r.is_error) for r in results] == [("3", False), ("HÉ", False), ("9", False)]


@pytest.mark.parametrize("is_async", [False, True])
def test_calls_run_side_by_side(is_async: bool) -> None:
    everyone = threading.Barrier(4)

    def meet(i: int) -> int:
        everyone.wait(timeout=10)
        return i

    async def meet_async(i: int) -> int:
        await asyncio.to_thread(everyone.wait, 10)
        return i

    box = Toolbox([meet_async if is_async else meet])
    name = "meet_async" if is_async else "meet"
    assert [r.text for r in run(box, *(call(name, i=i) for i in range(4)))] == [str(i) for i in range(4)]


class OddError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(
    ("error", "text"),
    [
        (TypeError("bad"), "error: TypeError: bad"),
        (KeyboardInterrupt(), "error: KeyboardInterrupt"),
        (SystemExit(3), "error: SystemExit: 3"),
        (asyncio.CancelledError(), "error: Cancelled"),
        (StopIteration(), "error: StopIteration"),
        (OddError(), "error: OddError: (its message cannot be shown: RuntimeError)"),
    ],
)
def test_whatever_a_tool_raises_is_told_and_the_next_call_works(
    error: BaseException, text: str, is_async: bool
) -> None:
    def fail(ok: bool = False) -> str:
        if ok:
            return "fine"
        raise error

    async def fail_async(ok: bool = False) -> str:
        return fail(ok)

    box = Toolbox([fail_async if is_async else fail], max_threads=1)
    name = "fail_async" if is_async else "fail"
    results = run(box, call(name), call(name, ok=True))
    if isinstance(error, StopIteration) and is_async:  # Python itself turns it into a RuntimeError
        assert results[0].text.startswith("error: RuntimeError")
    else:
        assert results[0].text == text
    assert results[0].is_error
    assert (results[1].text, results[1].is_error) == ("fine", False)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_late_answer_is_ignored_and_its_thread_is_replaced(is_async: bool) -> None:
    release = threading.Event()

    @tool(timeout_s=0.05)
    def slow(wait: bool = True) -> str:
        if wait:
            release.wait(10)
        return "late"

    @tool(name="slow", timeout_s=0.05)
    async def slow_async(wait: bool = True) -> str:
        if wait:
            await asyncio.sleep(10)
        return "late"

    given: list[ToolResult] = []
    with Toolbox([slow_async if is_async else slow], max_threads=1) as box:
        first = run_in(box, call("slow"))
        assert first.is_error
        assert "no answer in 0.05 s" in first.text
        assert 0.04 < first.duration_s < 5
        assert run_in(box, call("slow", wait=False)).text == "late"
        box.submit(call("slow"), given.append, timeout_s=5.0).cancel()
        release.set()
        time.sleep(0.05)
    assert [r.text for r in given] == ["error: Cancelled: the call was given up"]
    assert not box.executor.num_pending


def run_in(box: Toolbox, one: ToolCall, timeout_s: float | None = None) -> ToolResult:
    return asyncio.run(box.call(one, timeout_s))


def test_a_coroutine_that_blocks_its_loop_still_times_out() -> None:
    async def block(seconds: float) -> str:
        time.sleep(seconds)
        return "done"

    box = Toolbox([block])
    assert "no answer" in run(box, call("block", seconds=0.4), timeout_s=0.05)[0].text


def test_a_function_that_returns_a_coroutine_is_awaited() -> None:
    async def answer() -> str:
        return "awaited"

    @tool
    def indirect() -> str:
        return answer()  # type: ignore[return-value]

    assert text_of(indirect) == "awaited"


def test_stuck_threads_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxcept.tools.toolbox.MAX_STUCK_THREADS", 2)
    release = threading.Event()

    def hang() -> None:
        release.wait(10)

    with Toolbox([hang], max_threads=4) as box:
        texts = [run_in(box, call("hang"), 0.03).text for _ in range(3)]
        release.set()
        deadline = time.monotonic() + 5
        while box.executor.num_stuck and time.monotonic() < deadline:
            time.sleep(0.01)
        assert box.executor.num_stuck == 0
        assert run_in(box, call("hang")).text == "null"
    assert "no answer" in texts[1]
    assert "still running" in texts[2]


def test_what_cannot_run_is_told_at_once() -> None:
    def add(a: int, b: int) -> int:
        return a + b

    outside = {"type": "function", "function": {"name": "ask_user", "parameters": {"type": "object"}}}
    box = Toolbox([add, outside])
    broken = MalformedCall("call00000", "add", "{", "the JSON is not closed")
    results = run(box, call("sub"), call("add", a="x", c=1), broken, call("ask_user"))
    assert [r.is_error for r in results] == [True] * 4
    assert results[0].text == "error: there is no tool 'sub'; the tools are: add, ask_user"
    assert "missing argument 'b'" in results[1].text
    assert "unexpected argument 'c' (it takes: a, b)" in results[1].text
    assert "argument 'a': expected integer, got \"x\"" in results[1].text
    assert results[2].text == "error: the call could not be read: the JSON is not closed"
    assert box.is_external(call("ask_user"))
    assert not box.is_external(call("add"))
    assert run_in(box, call("add", a=1, b=2)).text == "error: the tools are closed"


def test_a_name_may_be_used_once() -> None:
    def add(a: int) -> int:
        return a

    with pytest.raises(ValueError, match="two tools are named 'add'"):
        Toolbox([add, add])


def test_the_toolbox_is_a_read_only_collection_in_order() -> None:
    def b() -> None:
        """B."""

    def a() -> None:
        """A."""

    box = Toolbox([b, a])
    assert [made.name for made in box] == ["b", "a"]
    assert [schema["function"]["description"] for schema in box.schemas()] == ["B.", "A."]
    assert "a" in box
    assert "c" not in box
    assert box.get("c") is None
    assert box["a"].name == "a"
    assert len(box) == 2
    box.close()


def test_a_given_clock_stamps_the_result() -> None:
    now = 10.0

    def wait() -> None:
        nonlocal now
        now = 12.5

    result = run(Toolbox([wait], clock=lambda: now), call("wait"))[0]
    assert (result.started_s, result.duration_s) == (10.0, 2.5)


def test_close_ends_everything_that_waits() -> None:
    release = threading.Event()

    def hang() -> None:
        release.wait(10)

    async def hang_async() -> None:
        await asyncio.sleep(10)

    given: list[ToolResult] = []
    before = set(threading.enumerate())  # other tests' threads may end meanwhile
    box = Toolbox([hang, hang_async], max_threads=1)
    for name in ("hang", "hang", "hang_async"):
        box.submit(call(name), given.append)
    time.sleep(0.05)
    box.close()
    release.set()
    assert [r.is_error for r in given] == [True] * 3
    deadline = time.monotonic() + 5
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before


@pytest.mark.parametrize("refused", ["tool-timers", "tool-1", "tool-loop"])
def test_a_thread_that_cannot_be_started_fails_the_call_alone(monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    def noop() -> str:
        return "ok"

    async def noop_async() -> str:
        return "ok"

    start, is_refusing = threading.Thread.start, True

    def start_if_possible(thread: threading.Thread) -> None:
        if is_refusing and thread.name == refused:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_if_possible)
    given: list[ToolResult] = []
    with Toolbox([noop, noop_async], max_threads=1) as box:
        name = "noop_async" if refused == "tool-loop" else "noop"
        box.submit(call(name), given.append)
        (failed,) = given
        assert failed.outcome is Outcome.FAILED and "thread" in failed.text and box.executor.num_pending == 0
        is_refusing = False
        assert run_in(box, call(name)).text == "ok"
        assert len(given) == 1


def test_calls_wait_for_the_threads_there_are_where_no_more_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def wait() -> str:
        assert release.wait(10)
        return "ok"

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    given: list[ToolResult] = []
    with Toolbox([wait], max_threads=4) as box:
        box.submit(call("wait"), given.append)
        monkeypatch.setattr(threading.Thread, "start", refuse)
        box.submit(call("wait"), given.append)
        release.set()
        deadline = time.monotonic() + 5
        while len(given) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert [result.text for result in given] == ["ok", "ok"]


def test_a_receiver_that_raises_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    def noop() -> str:
        return "ok"

    def broken(result: ToolResult) -> None:
        raise RuntimeError("receiver")

    with Toolbox([noop], max_threads=1) as box:
        box.submit(call("noop"), broken)
        assert run_in(box, call("noop")).text == "ok"
    assert "the receiver of a result of tool 'noop' raised" in caplog.text


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*fork.*:RuntimeWarning")
def test_a_tool_that_forks_answers_once() -> None:
    children: list[int] = []

    def fork() -> str:
        child = os.fork()
        if child:
            children.append(child)
        return "parent" if child else "child"

    assert text_of(fork) == "parent"
    for _ in range(500):
        ended, status = os.waitpid(children[0], os.WNOHANG)
        if ended:
            break
        time.sleep(0.01)
    else:
        os.kill(children[0], signal.SIGKILL)
        os.waitpid(children[0], 0)
        pytest.fail("the child went on to live in the toolbox's thread")
    assert os.waitstatus_to_exitcode(status) == 0


def test_many_calls_with_long_timeouts_leave_nothing_behind() -> None:
    def noop(i: int) -> int:
        return i

    with Toolbox([noop], limits=ToolLimits(timeout_s=3600.0)) as box:

        async def run_all() -> list[ToolResult]:
            return await asyncio.gather(*(box.call(call("noop", i=i)) for i in range(2000)))

        results = asyncio.run(run_all())
        assert [r.text for r in results] == [str(i) for i in range(2000)]
        assert not box.executor.num_pending
