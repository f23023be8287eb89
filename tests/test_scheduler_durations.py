"""Estimators of the remaining time, against truths that are known."""

import itertools
import math
import random
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcept.scheduler.durations import (
    ESTIMATORS,
    MAX_TOOLS,
    DurationEstimator,
    Oracle,
    Profile,
    Survival,
    make_estimator,
)
from jaxcept.scheduler.survival import FEW, WINDOW, SurvivalCurve

SEQ_IDS = itertools.count(1000)


def at(estimator: DurationEstimator, tool: str, elapsed: float, **truth: float | None) -> float:
    """The estimate for a call of the tool that has taken so long, and goes on."""
    seq_id = next(SEQ_IDS)
    estimator.begin(seq_id, tool, 0.0, truth.get("expected_s"), truth.get("actual_s"))
    return estimator.remaining(seq_id, elapsed)


def teach(estimator: DurationEstimator, tool: str, calls: Iterator[tuple[float, bool]]) -> None:
    """Calls one after the other: (seconds, whether it returned)."""
    for seconds, has_returned in calls:
        estimator.begin(0, tool, 0.0, None, None)
        estimator.end(0, seconds, has_returned)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_without_any_knowledge_it_takes_as_long_again(name: str):
    estimator = make_estimator(name)
    assert estimator.name == name
    assert at(estimator, "search", 0.0) == 0.0
    assert at(estimator, "search", 4.0) == 4.0


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_hint_decides_while_it_lasts(name: str):
    estimator = make_estimator(name, {"search": 100.0})
    assert at(estimator, "search", 4.0, expected_s=10.0) == 6.0
    if name == "oracle":
        assert at(estimator, "search", 4.0, expected_s=10.0, actual_s=5.0) == 1.0
    else:
        assert at(estimator, "search", 12.0, expected_s=10.0) in (12.0, 88.0)


def test_an_unknown_estimator_is_named():
    with pytest.raises(ValueError, match=r"guess.*elapsed, survival, profile, oracle"):
        make_estimator("guess")


def test_the_oracle_knows():
    assert at(Oracle(), "search", 4.0, actual_s=10.0) == 6.0
    assert at(Oracle(), "search", 11.0, actual_s=10.0) == 0.0


def test_a_profile_is_a_table_of_means():
    profile = Profile({"QA": 0.69, "Chatbot": 28.6})
    assert at(profile, "Chatbot", 8.6) == pytest.approx(20.0)
    assert at(profile, "QA", 1.0) == 1.0, "past the mean, what has elapsed"
    assert at(profile, "calculator", 3.0) == 3.0


def brute_mean_left(calls: list[tuple[float, bool]], elapsed: float) -> float | None:
    """The textbook: product limit over distinct times, integrated rectangle by rectangle."""
    times = sorted({seconds for seconds, has_returned in calls if has_returned})
    last = max(seconds for seconds, _ in calls)
    if sum(has_returned and seconds > elapsed for seconds, has_returned in calls) < FEW:
        return None

    def survival(moment: float) -> float:
        alive = 1.0
        for time in times:
            if time <= moment:
                at_risk = sum(seconds >= time for seconds, _ in calls)
                alive *= 1 - calls.count((time, True)) / at_risk
        return alive

    edges = [elapsed, *(time for time in times if time > elapsed), last]
    area = sum((end - begin) * survival(begin) for begin, end in itertools.pairwise(edges))
    return (area + survival(last) * last) / survival(elapsed)


CALLS = st.lists(st.tuples(st.integers(1, 12).map(float), st.booleans()), min_size=1, max_size=40)


@given(CALLS, st.floats(0, 14, allow_subnormal=False))
def test_the_curve_is_that_of_kaplan_and_meier(calls: list[tuple[float, bool]], elapsed: float):
    curve = SurvivalCurve()
    for seconds, has_returned in calls:
        curve.add(seconds, has_returned)
    curve.rebuild()
    expected = brute_mean_left(calls, elapsed)
    got = curve.mean_left(elapsed)
    assert got == expected if expected is None else got == pytest.approx(expected)


@given(CALLS, st.lists(st.integers(1, 12).map(float), max_size=10))
def test_calls_in_flight_are_censored_ones(calls: list[tuple[float, bool]], in_flight: list[float]):
    curve, other = SurvivalCurve(), SurvivalCurve()
    for seconds, has_returned in calls:
        curve.add(seconds, has_returned)
    for seconds, has_returned in [*calls, *((seconds, False) for seconds in in_flight)]:
        other.add(seconds, has_returned)
    curve.rebuild(in_flight)
    other.rebuild()
    assert curve.mean_left(2.5) == other.mean_left(2.5)


def test_a_memoryless_tool_takes_as_long_whatever_it_has_taken():
    rng, survival = random.Random(3), Survival()
    teach(survival, "dice", ((rng.expovariate(1 / 8.0), True) for _ in range(WINDOW)))
    for elapsed in (0.0, 2.0, 5.0, 10.0):
        assert at(survival, "dice", elapsed) == pytest.approx(8.0, rel=0.2)


def test_a_heavy_tail_makes_a_long_call_longer():
    """Pareto with exponent 3 from 1 s on: the mean of what is left after t seconds is t / 2."""
    rng, survival = random.Random(7), Survival()
    teach(survival, "crawl", ((rng.paretovariate(3), True) for _ in range(WINDOW)))
    left = [at(survival, "crawl", elapsed) for elapsed in (1.0, 1.5, 2.0)]
    assert left == pytest.approx([0.5, 0.75, 1.0], rel=0.2)
    assert at(survival, "crawl", 100.0) == 100.0, "beyond all that was seen, as long again"


def test_what_was_cut_short_counts():
    """Calls of 10 s in the mean, half of them given up before: those that returned are the short ones, whose mean alone
    says half the truth."""
    rng, survival = random.Random(5), Survival()
    returned: list[float] = []

    def calls() -> Iterator[tuple[float, bool]]:
        for _ in range(WINDOW):
            seconds, given_up = rng.expovariate(0.1), rng.expovariate(0.1)
            if seconds < given_up:
                returned.append(seconds)
            yield min(seconds, given_up), seconds < given_up

    teach(survival, "flaky", calls())
    assert sum(returned) / len(returned) == pytest.approx(5.0, rel=0.15)
    assert at(survival, "flaky", 0.0) == pytest.approx(10.0, rel=0.15)


def test_what_is_in_flight_counts():
    """Thirty calls began together; the ten that are back took 1 s, the others have taken 100 s so far."""
    survival = Survival()
    for seq_id in range(30):
        survival.begin(seq_id, "sleepy", 0.0, None, None)
    for seq_id in range(10):
        survival.end(seq_id, 1.0, has_returned=True)
    # None were seen to last as long as these, and those that began with them are no sign of an end.
    assert survival.remaining(20, 100.0) == 100.0
    # Of 31 in the curve 10 took 1 s, 20 last 100 s at least and, taken to last as long again, 200 s.
    survival.begin(99, "sleepy", 100.0, None, None)
    survival.end(10, 100.0, has_returned=True)
    assert survival.remaining(99, 100.0) > 100.0, "returned calls alone say (10 · 1 + 100) / 11 = 10 s"


def test_tools_are_told_apart_and_few_calls_say_nothing():
    survival = Survival()
    teach(survival, "fast", iter([(0.1, True)] * 20))
    teach(survival, "slow", iter([(50.0, True)] * (FEW - 1)))
    assert at(survival, "fast", 0.05) == pytest.approx(0.05)
    assert at(survival, "fast", 0.2) == 0.2
    assert at(survival, "slow", 1.0) == 1.0
    teach(survival, "slow", iter([(50.0, True)]))
    assert at(survival, "slow", 1.0) == pytest.approx(49.0)


def test_old_calls_are_forgotten():
    survival = Survival()
    teach(survival, "drift", iter([(1.0, True)] * 5000 + [(9.0, True)] * WINDOW))
    assert at(survival, "drift", 0.0) == pytest.approx(9.0)


def test_tools_that_nobody_calls_any_more_are_forgotten():
    survival = Survival()
    for name in ("asked", "called", "gone"):
        teach(survival, name, iter([(50.0, True)] * FEW))
    for i in range(MAX_TOOLS - 1):
        teach(survival, f"tool {i}", iter([(1.0, True)]))
        assert at(survival, "asked", 1.0) == pytest.approx(49.0)
        teach(survival, "called", iter([(50.0, True)]))
    assert at(survival, "called", 1.0) == pytest.approx(49.0)
    assert at(survival, "gone", 1.0) == 1.0, "nothing is known of it"


def test_asking_is_cheap_however_much_is_known(monkeypatch: pytest.MonkeyPatch):
    """With thousands of calls behind it, the curve is drawn again once in a while alone."""
    rng, survival, drawn = random.Random(2), Survival(), []
    rebuild = SurvivalCurve.rebuild
    monkeypatch.setattr(SurvivalCurve, "rebuild", lambda self, flying: (drawn.append(1), rebuild(self, flying))[1])
    survival.begin(7, "busy", 0.0, None, None)
    for _ in range(4096):
        teach(survival, "busy", iter([(rng.expovariate(1.0), True)]))
        assert math.isfinite(survival.remaining(7, 0.5))
    assert len(drawn) < 300
