"""Stop strings are found in any pieces of text as in the whole."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcept.text.stop import StopDelta, StopStrings

LETTERS = st.text("abc.", max_size=40)


def expected(stops: list[str], text: str, include: bool) -> tuple[str, str | None]:
    """By looking for each stop string in all of the text: the one that ends first, then the longest."""
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not ends:
        return text, None
    end, _, stop = min(ends)
    return text[: end if include else end - len(stop)], stop


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.text("abc.", min_size=1, max_size=5), max_size=5), LETTERS, st.sets(st.integers(0, 40)), st.booleans()
)
def test_any_cut_finds_what_the_whole_text_holds(stops: list[str], text: str, cuts: set[int], include: bool) -> None:
    checker = StopStrings(stops, include)
    places = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    shown, hit = "", None
    for a, b in pairwise(places):
        delta = checker.push(text[a:b])
        assert hit is None or delta == ("", None), "nothing is shown after a stop"
        shown, hit = shown + delta.text, hit or delta.stop
        assert expected(stops, text, include)[0].startswith(shown), "nothing is shown that a stop would take back"
    assert (shown + checker.flush(), hit) == expected(stops, text, include)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4), st.text("abc", max_size=20))
def test_no_more_is_held_back_than_can_become_a_stop(stops: list[str], text: str) -> None:
    checker = StopStrings(stops)
    shown = "".join(checker.push(char).text for char in text)
    if expected(stops, text, False)[1] is None:
        held = text[len(shown) :]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_examples() -> None:
    checker = StopStrings(["\nUser:", "###"])
    assert checker.push("Hello\n") == StopDelta("Hello", None)
    assert checker.push("Us") == StopDelta("", None)
    assert checker.push("eful #") == StopDelta("\nUseful ", None)
    assert checker.push("##rest") == StopDelta("", "###")
    assert checker.push("more") == StopDelta("", None)
    assert StopStrings(["é😀"], True).push("aé😀b") == StopDelta("aé😀", "é😀")
    assert StopStrings(()).push("x") == StopDelta("x", None)


def test_the_search_begins_anew_after_a_flush() -> None:
    checker = StopStrings(["abc"])
    assert checker.push("ab").text == ""
    assert checker.flush() == "ab"
    assert checker.push("c") == StopDelta("c", None)
    assert checker.push("abc") == StopDelta("", "abc")


@pytest.mark.parametrize("stops", [["a", ""], "abc", [3]])
def test_bad_stops(stops: object) -> None:
    with pytest.raises(ValueError, match="not empty"):
        StopStrings(stops)  # type: ignore[arg-type]


def test_special_characters_of_patterns_are_themselves() -> None:
    for char in "]^-\\[.*+?(){}|$ \n":
        assert StopStrings([char]).push(f"ab{char}c") == StopDelta("ab", char)


def test_long_repetitive_text_is_linear() -> None:
    stops = ["a" * n + "b" for n in range(961, 1024)]
    start = time.thread_time()
    checker = StopStrings(stops)
    shown = sum(len(checker.push("a" * 10).text) for _ in range(4_000))
    assert shown == 40_000 - 1023
    assert time.thread_time() - start < 3.0
