"""Limits around a tool: places, the breaker, the cache and shared runs, on a clock that only the test moves."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from jaxcept.tools.calls import Outcome, ToolCall, ToolResult
from jaxcept.tools.definition import Tool, tool
from jaxcept.tools.guard import MAX_CACHE_CHARS, Breaker, ToolGuard, ToolLimits, argument_key
from jaxcept.tools.output import ToolError
from jaxcept.tools.pending import PendingCall
from jaxcept.tools.toolbox import Toolbox


class Bench:
    """One guard, a clock, the runs that it started and the results that it gave."""

    def __init__(self, *, pure: bool = False, **limits: Any) -> None:
        self.now = 0.0
        self.started: list[PendingCall] = []
        made = Tool("t", "", {"type": "object", "properties": {}}, lambda: None, is_pure=pure)
        self.guard = ToolGuard(made, ToolLimits(**limits), lambda: self.now)

    def call(self, **arguments: Any) -> tuple[PendingCall, list[ToolResult]]:
        results: list[ToolResult] = []
        pending = PendingCall(ToolCall("call00000", "t", arguments), results.append, lambda: self.now)
        self.guard.submit(pending, self.started.append)
        return pending, results

    def fail(self, times: int = 1) -> None:
        for _ in range(times):
            self.call()
            self.started[-1].settle("error: x", Outcome.FAILED)


def test_calls_past_the_limit_wait_in_order() -> None:
    bench = Bench(max_concurrency=2)
    calls = [bench.call(i=i) for i in range(4)]
    assert [run.call.arguments["i"] for run in bench.started] == [0, 1]
    assert bench.guard.state()["waiting"] == 2
    bench.started[1].settle("one", Outcome.ANSWERED)
    bench.started[0].settle("zero", Outcome.ANSWERED)
    assert [run.call.arguments["i"] for run in bench.started] == [0, 1, 2, 3]
    assert [results[0].text for _, results in calls[:2]] == ["zero", "one"]
    bench.started[2].settle("two", Outcome.ANSWERED)
    bench.started[3].settle("three", Outcome.ANSWERED)
    assert bench.guard.state() == {"tool": "t", "running": 0, "waiting": 0, "failures": 0, "is_open": False}


def test_a_call_that_is_given_up_leaves_its_place_or_its_wait() -> None:
    bench = Bench(max_concurrency=1)
    (first, _), (second, _), (third, _) = bench.call(i=0), bench.call(i=1), bench.call(i=2)
    assert bench.guard.explain_wait(second) == " (it waited for a free place: 1 calls run at once)"
    assert bench.guard.explain_wait(first) == ""
    second.cancel()
    first.settle("late", Outcome.TIMEOUT)
    assert bench.started[0].outcome is Outcome.CANCELLED, "the run is told that nobody waits for it"
    assert [run.call.arguments["i"] for run in bench.started] == [0, 2]
    third.cancel()
    assert bench.started[1].outcome is Outcome.CANCELLED
    assert bench.guard.state()["running"] == 0


def test_the_breaker_opens_refuses_tries_and_closes() -> None:
    bench = Bench(breaker_failures=3, breaker_reset_s=10.0)
    bench.fail(2)
    bench.call()
    bench.started[-1].settle("fine", Outcome.ANSWERED)
    bench.fail(3)
    _, refused = bench.call()
    assert refused[0].outcome is Outcome.REFUSED
    assert refused[0].text == (
        "error: tool 't' failed 3 times in a row and is not called for the next 10 s; go on without it"
    )
    bench.now = 10.0
    _, tried = bench.call()
    _, meanwhile = bench.call()
    assert (tried, meanwhile[0].outcome) == ([], Outcome.REFUSED), "one call tries, the others are still refused"
    bench.started[-1].settle("error: x", Outcome.TIMEOUT)
    bench.now = 19.0
    assert bench.call()[1][0].outcome is Outcome.REFUSED, "the failed try opened it anew"
    bench.now = 20.0
    bench.call()
    bench.started[-1].settle("fine", Outcome.ANSWERED)
    assert not bench.guard.state()["is_open"]
    assert bench.call()[1] == []


def test_a_try_that_is_given_up_lets_the_next_one_try() -> None:
    bench = Bench(breaker_failures=1, breaker_reset_s=1.0)
    bench.fail()
    bench.now = 1.0
    bench.call()[0].cancel()
    num_started = len(bench.started)
    bench.call()
    assert len(bench.started) == num_started + 1


def test_callers_in_a_hurry_do_not_open_the_breaker() -> None:
    bench = Bench(max_concurrency=1, breaker_failures=2, timeout_s=10.0)
    for _ in range(5):
        caller, _ = bench.call()
        bench.now += 1.0
        caller.settle("error: late", Outcome.TIMEOUT)
    assert bench.guard.state()["failures"] == 0
    for _ in range(2):
        caller, _ = bench.call()
        bench.now += 10.0
        caller.settle("error: late", Outcome.TIMEOUT)
    assert bench.guard.state()["is_open"]


def test_the_least_timeout_holds() -> None:
    async def sleep() -> None:
        await asyncio.sleep(5)

    quick = Tool("quick", "", {"type": "object"}, sleep, timeout_s=0.05)
    call_quick, call_sleep = ToolCall("call00000", "quick", {}), ToolCall("call00000", "sleep", {})
    with Toolbox([quick, sleep], limits=ToolLimits(timeout_s=0.1)) as box:
        assert "in 0.05 s" in asyncio.run(box.call(call_quick, 5.0)).text
        assert "in 0.1 s" in asyncio.run(box.call(call_sleep, 5.0)).text
        assert "in 0.02 s" in asyncio.run(box.call(call_quick, 0.02)).text


def test_an_opening_breaker_tells_those_who_wait() -> None:
    bench = Bench(max_concurrency=1, breaker_failures=1)
    bench.call()
    _, waiting = bench.call()
    bench.started[0].settle("error: x", Outcome.FAILED)
    assert waiting[0].outcome is Outcome.REFUSED
    assert len(bench.started) == 1


def test_answers_that_blame_the_arguments_do_not_open_the_breaker() -> None:
    def divide(a: int, b: int) -> float:
        if b == 1:
            raise ToolError("b is one")
        if b == 2:
            raise OSError("gone")
        return a / b

    call_0, call_1, call_2 = (ToolCall("call00000", "divide", {"a": 1, "b": b}) for b in (0, 1, 2))
    with Toolbox([divide], limits=ToolLimits(breaker_failures=2)) as box:
        results = [asyncio.run(box.call(each)) for each in [call_0, call_1, call_0, call_2, call_2, call_2]]
    assert [result.outcome.value for result in results] == ["error"] * 3 + ["failed"] * 2 + ["refused"]
    assert results[1].text == "error: b is one"


def test_a_pure_tool_answers_from_its_cache_until_the_time_is_over() -> None:
    bench = Bench(pure=True, cache_ttl_s=60.0)
    bench.call(a=1, b=2)
    bench.started[0].settle("three", Outcome.ANSWERED)
    bench.now = 59.0
    _, again = bench.call(b=2, a=1)
    assert (again[0].text, again[0].outcome, again[0].is_error) == ("three", Outcome.CACHED, False)
    bench.call(a=1, b=3)
    bench.now = 60.0
    bench.call(a=1, b=2)
    assert len(bench.started) == 3


@pytest.mark.parametrize("outcome", [Outcome.ERROR, Outcome.FAILED])
def test_errors_are_not_kept(outcome: Outcome) -> None:
    bench = Bench(pure=True, cache_ttl_s=60.0)
    bench.call()
    bench.started[0].settle("error: x", outcome)
    bench.call()
    assert len(bench.started) == 2


@pytest.mark.parametrize(("pure", "ttl_s"), [(False, 60.0), (True, 0.0)])
def test_nothing_is_kept_unless_the_tool_is_pure_and_the_limits_say_so(pure: bool, ttl_s: float) -> None:
    bench = Bench(pure=pure, cache_ttl_s=ttl_s)
    for _ in range(2):
        bench.call()
        bench.started[-1].settle("x", Outcome.ANSWERED)
    assert len(bench.started) == 2


def test_the_cache_is_bounded_and_forgets_the_least_recent() -> None:
    bench = Bench(pure=True, cache_ttl_s=60.0)
    size = MAX_CACHE_CHARS // 5
    for i in range(5):
        bench.call(i=i)
        bench.started[-1].settle("x" * size, Outcome.ANSWERED)
    assert bench.call(i=4)[1][0].outcome is Outcome.CACHED
    assert bench.call(i=0)[1] == []


def test_equal_calls_of_a_pure_tool_share_one_run() -> None:
    bench = Bench(pure=True)
    (first, first_results), (_, second_results), (_, third_results) = (bench.call(a=1) for _ in range(3))
    assert len(bench.started) == 1
    first.cancel()
    assert not bench.started[0].is_settled, "two still wait for it"
    bench.started[0].settle("shared", Outcome.ANSWERED)
    assert [r[0].text for r in (second_results, third_results)] == ["shared", "shared"]
    assert first_results[0].outcome is Outcome.CANCELLED
    bench.call(a=1)
    assert len(bench.started) == 2, "without a cache the next call runs anew"


def test_a_shared_run_ends_when_the_last_caller_has_left() -> None:
    bench = Bench(pure=True)
    calls = [bench.call(a=1)[0] for _ in range(3)]
    for each in calls:
        each.cancel()
    assert bench.started[0].outcome is Outcome.CANCELLED
    bench.call(a=1)
    assert len(bench.started) == 2


def test_argument_keys_tell_values_apart_and_orders_not() -> None:
    keys = [argument_key(each) for each in ({"a": 1}, {"a": 1.5}, {"a": "1"}, {"a": True}, {"a": None}, {"a": [1]}, {})]
    assert len(set(keys)) == len(keys)
    assert argument_key({"a": 1, "b": {"c": 2, "d": 3}}) == argument_key({"b": {"d": 3, "c": 2}, "a": 1})
    assert argument_key({"a": object()}) is None


def test_a_slow_tool_holds_no_threads_of_the_others() -> None:
    release = threading.Event()

    def slow() -> str:
        release.wait(10)
        return "slow"

    def quick() -> str:
        return "quick"

    async def run(box: Toolbox) -> list[str]:
        slow_calls = [asyncio.create_task(box.call(ToolCall("call00000", "slow", {}))) for _ in range(6)]
        await asyncio.sleep(0.02)
        quick_text = (await box.call(ToolCall("call00000", "quick", {}), 5.0)).text
        release.set()
        return [quick_text, *[(await each).text for each in slow_calls]]

    with Toolbox([slow, quick], limits=ToolLimits(max_concurrency=2), max_threads=3) as box:
        assert asyncio.run(run(box)) == ["quick"] + ["slow"] * 6


def test_waiting_counts_against_the_timeout_and_says_so() -> None:
    release = threading.Event()

    @tool
    def slow() -> str:
        release.wait(10)
        return "slow"

    async def run(box: Toolbox) -> list[ToolResult]:
        first = asyncio.create_task(box.call(ToolCall("call00000", "slow", {}), 5.0))
        await asyncio.sleep(0.02)
        second = await box.call(ToolCall("call00001", "slow", {}), 0.1)
        release.set()
        return [await first, second]

    with Toolbox([slow], limits=ToolLimits(max_concurrency=1)) as box:
        first, second = asyncio.run(run(box))
    assert first.text == "slow"
    assert second.outcome is Outcome.TIMEOUT
    assert second.text.endswith("in 0.1 s (it waited for a free place: 1 calls run at once)")


def test_selected_toolboxes_share_threads_and_limits() -> None:
    def a() -> str:
        return "a"

    def b() -> str:
        raise OSError("gone")

    outside = {"type": "function", "function": {"name": "ask_user", "parameters": {"type": "object"}}}
    call_b = ToolCall("call00000", "b", {})
    with Toolbox([a, b], limits=ToolLimits(breaker_failures=1)) as box:
        with box.select(["b"], [outside]) as chosen:
            assert [made.name for made in chosen] == ["b", "ask_user"]
            assert chosen.is_external(ToolCall("call00000", "ask_user", {}))
            assert asyncio.run(chosen.call(call_b)).outcome is Outcome.FAILED
        assert asyncio.run(box.call(call_b)).outcome is Outcome.REFUSED
        assert asyncio.run(box.call(ToolCall("call00000", "a", {}))).text == "a", "closing the selection closed nothing"
        with pytest.raises(ValueError, match="there is no tool 'c'"):
            box.select(["c"])
        with pytest.raises(ValueError, match="two tools are named 'a'"):
            box.select(None, [{"type": "function", "function": {"name": "a"}}])


@pytest.mark.parametrize(
    "wrong",
    [
        {"timeout_s": 0},
        {"max_output_chars": 0},
        {"max_concurrency": 0},
        {"breaker_failures": 0},
        {"breaker_reset_s": 0},
        {"cache_ttl_s": -1},
        {"cache_ttl_s": float("nan")},
    ],
)
def test_limits_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ToolLimits(**wrong)


def test_a_breaker_without_a_limit_never_opens() -> None:
    breaker = Breaker(None, 1.0, lambda: 0.0)
    for _ in range(100):
        assert breaker.admit()
        breaker.record(is_failure=True)
    assert not breaker.is_open


BAD_OUTPUTS: dict[str, tuple[Any, str]] = {
    "100 MB of text": ("x" * 100_000_000, "x" * 50 + "\n[cut: the output had 100,000,000 characters"),
    "100 MB of bytes": (b"x" * 100_000_000, "x" * 50 + "\n[cut: the output had 100,000,000 bytes"),
    "invalid UTF-8": (b"a\xff\xfeb", "a\ufffd\ufffdb"),
    "a lone surrogate": ("a\ud800b", "a\ufffdb"),
    "none": (None, "null"),
}


@pytest.mark.parametrize("name", BAD_OUTPUTS)
def test_any_output_becomes_bounded_text(name: str) -> None:
    value, text = BAD_OUTPUTS[name]

    @tool
    def give() -> str:
        return value  # type: ignore[no-any-return]

    with Toolbox([give], limits=ToolLimits(max_output_chars=50)) as box:
        result = asyncio.run(box.call(ToolCall("call00000", "give", {})))
    assert result.text.startswith(text)
    assert len(result.text) < 200
    assert not result.is_error
