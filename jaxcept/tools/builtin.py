"""Three small tools that the shipped model was trained with: `calculator`, `lookup`, `convert`.

They are plain typed functions on the standard library. A bad argument raises a ValueError whose message a model can
repeat to its user; it starts with one short clause, and what helps further follows after a semicolon.
"""

import ast
import math
import operator
from collections.abc import Callable
from fractions import Fraction

MAX_EXPRESSION_CHARS = 200
MAX_BITS = 512
MAX_EXPONENT = 64
MIN_DECIMALS = 4
SIGNIFICANT_DIGITS = 4

_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda left, right: Fraction(left // right),
    ast.Mod: operator.mod,
}
_SPELLINGS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "^": "**"})

_COUNTRIES = {
    "Argentina": ("Buenos Aires", "46 million", "peso"),
    "Australia": ("Canberra", "27 million", "dollar"),
    "Austria": ("Vienna", "9 million", "euro"),
    "Belgium": ("Brussels", "12 million", "euro"),
    "Brazil": ("Brasilia", "212 million", "real"),
    "Canada": ("Ottawa", "41 million", "dollar"),
    "Chile": ("Santiago", "20 million", "peso"),
    "China": ("Beijing", "1409 million", "yuan"),
    "Denmark": ("Copenhagen", "6 million", "krone"),
    "Egypt": ("Cairo", "107 million", "pound"),
    "Ethiopia": ("Addis Ababa", "129 million", "birr"),
    "Finland": ("Helsinki", "5.6 million", "euro"),
    "France": ("Paris", "68 million", "euro"),
    "Germany": ("Berlin", "84 million", "euro"),
    "Ghana": ("Accra", "34 million", "cedi"),
    "Greece": ("Athens", "10 million", "euro"),
    "Iceland": ("Reykjavik", "0.4 million", "krona"),
    "India": ("New Delhi", "1438 million", "rupee"),
    "Ireland": ("Dublin", "5.3 million", "euro"),
    "Italy": ("Rome", "59 million", "euro"),
    "Japan": ("Tokyo", "124 million", "yen"),
    "Kenya": ("Nairobi", "55 million", "shilling"),
    "Mexico": ("Mexico City", "130 million", "peso"),
    "Morocco": ("Rabat", "37 million", "dirham"),
    "Nepal": ("Kathmandu", "30 million", "rupee"),
    "New Zealand": ("Wellington", "5.3 million", "dollar"),
    "Nigeria": ("Abuja", "228 million", "naira"),
    "Norway": ("Oslo", "5.5 million", "krone"),
    "Peru": ("Lima", "34 million", "sol"),
    "Poland": ("Warsaw", "37 million", "zloty"),
    "Portugal": ("Lisbon", "10.6 million", "euro"),
    "South Korea": ("Seoul", "52 million", "won"),
    "Spain": ("Madrid", "48 million", "euro"),
    "Sweden": ("Stockholm", "10.6 million", "krona"),
    "Switzerland": ("Bern", "9 million", "franc"),
    "Thailand": ("Bangkok", "66 million", "baht"),
    "Turkey": ("Ankara", "85 million", "lira"),
    "Vietnam": ("Hanoi", "100 million", "dong"),
}
_MOUNTAINS = {
    "Aconcagua": "6961 m",
    "Ben Nevis": "1345 m",
    "Denali": "6190 m",
    "Elbrus": "5642 m",
    "Etna": "3403 m",
    "Fuji": "3776 m",
    "K2": "8611 m",
    "Kilimanjaro": "5895 m",
    "Matterhorn": "4478 m",
    "Mont Blanc": "4806 m",
    "Mount Everest": "8849 m",
    "Olympus": "2918 m",
    "Zugspitze": "2962 m",
}
_RIVERS = {
    "Amazon": "6400 km",
    "Danube": "2850 km",
    "Elbe": "1094 km",
    "Ganges": "2525 km",
    "Mekong": "4350 km",
    "Mississippi": "3766 km",
    "Nile": "6650 km",
    "Rhine": "1233 km",
    "Thames": "346 km",
    "Volga": "3531 km",
    "Yangtze": "6300 km",
}

TABLE: dict[str, dict[str, str]] = {
    **{
        name: {"capital": capital, "population": population, "currency": currency}
        for name, (capital, population, currency) in _COUNTRIES.items()
    },
    **{name: {"height": height} for name, height in _MOUNTAINS.items()},
    **{name: {"length": length} for name, length in _RIVERS.items()},
}
_BY_LOWER_NAME = {name.lower(): name for name in TABLE}

# One unit of each, in the base unit of its dimension (metre, kilogram, litre, second); the first name is the usual one.
_UNIT_GROUPS: dict[str, tuple[tuple[str, str], ...]] = {
    "length": (
        ("m meter meters metre metres", "1"),
        ("km kilometer kilometers kilometre kilometres", "1000"),
        ("cm centimeter centimeters centimetre centimetres", "0.01"),
        ("mm millimeter millimeters millimetre millimetres", "0.001"),
        ("mi mile miles", "1609.344"),
        ("yd yard yards", "0.9144"),
        ("ft foot feet", "0.3048"),
        ("in inch inches", "0.0254"),
    ),
    "mass": (
        ("kg kilogram kilograms", "1"),
        ("g gram grams", "0.001"),
        ("lb lbs pound pounds", "0.45359237"),
        ("oz ounce ounces", "0.028349523125"),
        ("t ton tons tonne tonnes", "1000"),
    ),
    "volume": (
        ("l liter liters litre litres", "1"),
        ("ml milliliter milliliters millilitre millilitres", "0.001"),
        ("gal gallon gallons", "3.785411784"),
        ("cup cups", "0.2365882365"),
    ),
    "time": (
        ("s second seconds", "1"),
        ("min minute minutes", "60"),
        ("h hour hours", "3600"),
        ("d day days", "86400"),
        ("week weeks", "604800"),
    ),
}
UNITS: dict[str, tuple[str, Fraction]] = {
    name: (dimension, Fraction(size))
    for dimension, units in _UNIT_GROUPS.items()
    for names, size in units
    for name in names.split()
}
# Kelvin from a temperature: (t + shift) * scale.
_TEMPERATURES: dict[str, tuple[Fraction, Fraction]] = {
    **dict.fromkeys(("celsius", "c", "°c"), (Fraction("273.15"), Fraction(1))),
    **dict.fromkeys(("fahrenheit", "f", "°f"), (Fraction("459.67"), Fraction(5, 9))),
    **dict.fromkeys(("kelvin", "k"), (Fraction(0), Fraction(1))),
}


def calculator(expression: str) -> str:
    """Work out an arithmetic expression exactly, such as "(12+30)*4" or "2**10".

    Args:
        expression: numbers, parentheses and the operators + - * / // % **.

    Returns the result in decimal digits; a fraction is rounded to four decimals, or to four digits where it is small.

    Raises:
        ValueError: the expression is too long, not arithmetic, divides by zero, or its value is too large.
    """
    if len(expression) > MAX_EXPRESSION_CHARS:
        raise ValueError(f"expression too long; at most {MAX_EXPRESSION_CHARS} characters, got {len(expression)}")
    try:
        tree = ast.parse(expression.translate(_SPELLINGS).strip(), mode="eval")
        return format_number(_evaluate(tree.body))
    except ZeroDivisionError:
        raise ValueError("division by zero") from None
    except (SyntaxError, UnicodeError, RecursionError, MemoryError):
        raise ValueError("not an arithmetic expression; use numbers, parentheses and + - * / // % **") from None


def lookup(entity: str, attribute: str) -> str:
    """Look up a fact about a country, a mountain or a river in a small table.

    Args:
        entity: the name, such as "France", "Mount Everest" or "Nile".
        attribute: one of capital, population, currency (countries), height (mountains), length (rivers).

    Raises:
        ValueError: the table does not hold the entity, or not this attribute of it.
    """
    name = _BY_LOWER_NAME.get(entity.strip().lower())
    if name is None:
        raise ValueError(f"no entry for {_clip(entity)}; known are countries, mountains and rivers")
    facts = TABLE[name]
    value = facts.get(attribute.strip().lower())
    if value is None:
        raise ValueError(f"{name} has no {_clip(attribute)}; known: {', '.join(facts)}")
    return value


def convert(value: float, unit_from: str, unit_to: str) -> str:
    """Convert a value between units of length, mass, volume, time or temperature.

    Args:
        value: how many of `unit_from`.
        unit_from: the unit to convert from, such as "km", "pounds" or "celsius".
        unit_to: the unit to convert to.

    Returns the converted value and `unit_to`, such as "3.1069 miles".

    Raises:
        ValueError: the value is no finite number, a unit is unknown, or the units measure different things.
    """
    try:
        amount = Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"not a number, {_clip(str(value))}") from None
    if _num_bits(amount) > MAX_BITS:
        raise ValueError("number too large to convert")
    source, target = unit_from.strip().lower(), unit_to.strip().lower()
    for unit in (source, target):
        if unit not in UNITS and unit not in _TEMPERATURES:
            raise ValueError(f"unknown unit {_clip(unit)}; known are units of length, mass, volume, time, temperature")
    return f"{format_number(_convert(amount, source, target))} {target}"


def format_number(value: Fraction) -> str:
    """The value in decimal digits: whole numbers in full, others rounded to four decimals or four digits."""
    if value.denominator == 1:
        return str(value.numerator)
    decimals = MIN_DECIMALS
    while abs(value) * 10**decimals < 10 ** (SIGNIFICANT_DIGITS - 1):
        decimals += 1
    scaled = round(abs(value) * 10**decimals)
    whole, rest = divmod(scaled, 10**decimals)
    digits = f"{whole}.{rest:0{decimals}d}".rstrip("0").rstrip(".")
    return f"-{digits}" if value < 0 else digits


def _evaluate(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            result = Fraction(str(number)) if math.isfinite(number) else None
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            result = -_evaluate(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            result = _evaluate(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            result = _power(_evaluate(left), _evaluate(right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            result = _OPERATORS[type(op)](_evaluate(left), _evaluate(right))
        case _:
            raise ValueError("only arithmetic is allowed; use numbers, parentheses and + - * / // % **")
    if result is None or _num_bits(result) > MAX_BITS:
        raise ValueError("number too large; the calculator works with up to 150 digits")
    return result


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1 or abs(exponent) > MAX_EXPONENT:
        raise ValueError(f"exponent not allowed; it must be a whole number from -{MAX_EXPONENT} to {MAX_EXPONENT}")
    return Fraction(base**exponent.numerator)


def _convert(amount: Fraction, source: str, target: str) -> Fraction:
    if source in _TEMPERATURES and target in _TEMPERATURES:
        shift, scale = _TEMPERATURES[source]
        target_shift, target_scale = _TEMPERATURES[target]
        return (amount + shift) * scale / target_scale - target_shift
    dimension, size = UNITS.get(source, ("temperature", Fraction(1)))
    target_dimension, target_size = UNITS.get(target, ("temperature", Fraction(1)))
    if dimension != target_dimension:
        raise ValueError(f"cannot convert {source} to {target}; one is {dimension}, the other {target_dimension}")
    return amount * size / target_size


def _num_bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _clip(text: str) -> str:
    """A user's text, quoted and short enough for an error message."""
    return repr(text if len(text) <= 40 else text[:40] + "…")


TOOLS = (calculator, lookup, convert)
