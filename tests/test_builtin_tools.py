"""The built-in tools answer exactly, and refuse hostile input at once with a message that helps."""

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcept.tools.builtin import TABLE, UNITS, calculator, convert, format_number, lookup


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("37*91", "3367"),
        ("(12 + 30) * 4", "168"),
        ("0.1+0.2", "0.3"),
        ("2**64", "18446744073709551616"),
        ("2**-2", "0.25"),
        ("1/3", "0.3333"),
        ("-7/2", "-3.5"),
        ("7//2", "3"),
        ("-7%3", "2"),
        ("1/1000000", "0.000001"),
        ("2/3000000", "0.0000006667"),
        ("9999999*9999999", "99999980000001"),
        ("6 × 7 ÷ 2", "21"),
        ("3^2", "9"),
        ("1e3+1", "1001"),
        ("--5", "5"),
    ],
)
def test_calculator_is_exact(expression: str, value: str) -> None:
    assert calculator(expression) == value


@given(st.integers(-(10**12), 10**12), st.integers(-(10**12), 10**12))
def test_calculator_agrees_with_python_integers(a: int, b: int) -> None:
    assert [calculator(f"({a}){sign}({b})") for sign in "+-*"] == [str(a + b), str(a - b), str(a * b)]


@given(st.fractions(min_value=-(10**9), max_value=10**9))
def test_a_rounded_number_is_within_half_a_unit_of_its_last_digit(value: Fraction) -> None:
    text = format_number(value)
    decimals = len(text.partition(".")[2])
    assert abs(Fraction(text) - value) <= Fraction(1, 2) / 10 ** max(decimals, 4)
    assert text.count(".") == 0 or not text.endswith(("0", "."))


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("9**9**9", "exponent"),
        ("2**(10**9)", "exponent"),
        ("2**0.5", "exponent"),
        ("(((9**64)**64)**64)**64", "too large"),
        ("1e999", "too large"),
        ("1e308*1e308", "too large"),
        ("1/0", "division by zero"),
        ("0**-1", "division by zero"),
        ("5%0", "division by zero"),
        ("(" * 10_000 + "1" + ")" * 10_000, "too long"),
        ("(" * 99 + "1" + ")" * 100, "not an arithmetic expression"),
        ("-" * 199 + "x", "only arithmetic"),
        ("x", "only arithmetic"),
        ("(1).__class__", "only arithmetic"),
        ("__import__('os').system('ls')", "only arithmetic"),
        ("[1 for _ in 'ab']", "only arithmetic"),
        ("'a'*9", "only arithmetic"),
        ("True+1", "only arithmetic"),
        ("1j", "only arithmetic"),
        ("1<2", "only arithmetic"),
        ("lambda: 1", "only arithmetic"),
        ("(x:=1)", "only arithmetic"),
        ("1<<99999", "only arithmetic"),
        ("1is 1", "arithmetic"),
        ("", "not an arithmetic expression"),
        ("1+", "not an arithmetic expression"),
        ("1\0", "not an arithmetic expression"),
        ("\ud800", "not an arithmetic expression"),
        ("1;2", "not an arithmetic expression"),
    ],
)
def test_calculator_refuses_at_once(expression: str, message: str) -> None:
    started = time.thread_time()
    with pytest.raises(ValueError, match=message) as caught:
        calculator(expression)
    assert type(caught.value) is ValueError
    assert len(str(caught.value)) < 120
    assert time.thread_time() - started < 0.5


@given(st.text(max_size=60))
def test_any_text_gives_an_answer_or_a_value_error(text: str) -> None:
    for call in (lambda: calculator(text), lambda: lookup(text, text), lambda: convert(1, text, text)):
        try:
            assert isinstance(call(), str)
        except ValueError as error:
            assert str(error)


@given(st.text(alphabet="0123456789.+-*/%()e ", max_size=60))
def test_any_arithmetic_text_gives_an_answer_or_a_value_error(text: str) -> None:
    try:
        assert calculator(text)
    except ValueError as error:
        assert type(error) is ValueError


def test_lookup_ignores_case_and_outer_spaces() -> None:
    assert lookup("France", "capital") == "Paris"
    assert lookup(" mount everest ", "Height") == "8849 m"
    assert lookup("NILE", "length") == "6650 km"
    assert all(lookup(name, attribute) == value for name, facts in TABLE.items() for attribute, value in facts.items())


def test_lookup_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match="no entry for 'Atlantis'; known are countries"):
        lookup("Atlantis", "capital")
    with pytest.raises(ValueError, match="France has no 'height'; known: capital, population, currency"):
        lookup("France", "height")
    with pytest.raises(ValueError, match="no entry for") as caught:
        lookup("x" * 1_000_000, "capital")
    assert len(str(caught.value)) < 120


@pytest.mark.parametrize(
    ("value", "unit_from", "unit_to", "result"),
    [
        (5, "km", "m", "5000 m"),
        (1, "miles", "km", "1.6093 km"),
        (-40, "celsius", "fahrenheit", "-40 fahrenheit"),
        (0, "kelvin", "celsius", "-273.15 celsius"),
        (12.5, "feet", "inches", "150 inches"),
        (2, "weeks", "days", "14 days"),
        (1, "mm", "km", "0.000001 km"),
        (3, "Pounds", "KG", "1.3608 kg"),
    ],
)
def test_convert(value: float, unit_from: str, unit_to: str, result: str) -> None:
    assert convert(value, unit_from, unit_to) == result


@given(st.integers(-(10**6), 10**6), st.sampled_from(sorted(UNITS)))
def test_a_unit_converts_to_itself(value: int, unit: str) -> None:
    assert convert(value, unit, unit) == f"{value} {unit}"


@pytest.mark.parametrize(
    ("value", "unit_from", "unit_to", "message"),
    [
        (5, "km", "kg", "cannot convert km to kg; one is length, the other mass"),
        (5, "celsius", "m", "cannot convert celsius to m"),
        (5, "smoot", "m", "unknown unit 'smoot'; known"),
        (5, "m", "y" * 100_000, "unknown unit"),
        (float("nan"), "m", "km", "not a number"),
        (float("inf"), "m", "km", "not a number"),
        (1e300, "m", "km", "too large"),
        ("many", "m", "km", "not a number, 'many'"),
    ],
)
def test_convert_refuses(value: float, unit_from: str, unit_to: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        convert(value, unit_from, unit_to)
    assert len(str(caught.value)) < 160
