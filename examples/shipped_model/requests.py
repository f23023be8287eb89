"""Requests of each kind, with the tool calls that they take and the answers that follow."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from examples.shipped_model import phrases, smalltalk
from examples.shipped_model.source import Source
from jaxcept.tools.builtin import calculator, convert, lookup

BUILTINS: dict[str, Callable[..., str]] = {"calculator": calculator, "lookup": lookup, "convert": convert}
UNITS = (
    (
        ("km", "kilometers"),
        ("m", "meters"),
        ("cm", "centimeters"),
        ("mm", "millimeters"),
        ("mi", "miles"),
        ("yards",),
        ("ft", "feet"),
        ("inches",),
    ),
    (("kg", "kilograms"), ("g", "grams"), ("lb", "pounds"), ("oz", "ounces"), ("tons",)),
    (("l", "liters"), ("ml", "milliliters"), ("gallons",), ("cups",)),
    (("s", "seconds"), ("min", "minutes"), ("h", "hours"), ("days",), ("weeks",)),
    (("celsius",), ("fahrenheit",), ("kelvin",)),
)
ERROR_PREFIXES = (
    "error: ValueError: ",
    "error: ValueError: ",
    "error: TimeoutError: ",
    "error: ",
    "Error: ",
    "ValueError: ",
    "Tool error: ",
    "{name} failed: ",
)
ERROR_TEXTS = (
    "division by zero",
    "not an arithmetic expression; use numbers and + - * /",
    "timed out after {n} s",
    "the tool took longer than {n} seconds",
    "no entry for '{word}'; known are countries, mountains and rivers",
    "unknown unit '{word}'; known are units of length and mass",
    "cannot convert {word} to {word2}; one is length, the other mass",
    "{word} has no '{word2}'; known: capital",
    "{word} is not available",
    "connection to {word} refused",
    "status {n} from {word}",
    "not allowed",
    "missing argument '{word}'",
    "{word} {word2} {n}",
)


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call and the tool's answer."""

    name: str
    arguments: dict[str, Any]
    response: str


@dataclass(frozen=True, slots=True)
class Exchange:
    """A user's request, the rounds of calls it takes and the final answer; `expected` must appear in that answer."""

    text: str
    rounds: tuple[tuple[Call, ...], ...]
    answer: str
    expected: tuple[str, ...]


def run(name: str, arguments: dict[str, Any]) -> str:
    """A built-in tool's answer; what went wrong comes back as text."""
    try:
        return BUILTINS[name](**arguments)
    except (ValueError, TypeError) as error:
        return f"error: {type(error).__name__}: {error}"


def _dress(source: Source, text: str) -> str:
    """The request as a user types it: an opening, a capital letter, a closing."""
    rng = source.rng
    text = source.phrase(phrases.OPENERS) + text
    if not source.held_out and rng.random() < 0.06:
        text = source.word() + rng.choice((" ", ", ")) + text
    if rng.random() < 0.7:
        text = text[0].upper() + text[1:]
    return text + source.phrase(phrases.CLOSERS)


def _dressed(source: Source, exchange: Exchange) -> Exchange:
    return Exchange(_dress(source, exchange.text), exchange.rounds, exchange.answer, exchange.expected)


def simple(source: Source, plain: bool = True) -> Exchange:
    makers = [_bare_arithmetic, _bare_lookup, _bare_convert]
    if plain and source.rng.random() < 0.15:
        return _plain(source)
    return _dressed(source, source.rng.choice(makers)(source))


def _calculated(text: str, expression: str, response: str | None = None) -> Exchange:
    result = run("calculator", {"expression": expression}) if response is None else response
    call = Call("calculator", {"expression": expression}, result)
    return Exchange(text, ((call,),), f"{_spaced(expression)} = {result}.", (result,))


def _spaced(expression: str) -> str:
    """Spaces around the binary operators: "(3+4)**2" to "(3 + 4) ** 2"."""
    return re.sub(r"(?<=[\d)])(\*\*|[-+*/])", r" \1 ", expression)


def _bare_arithmetic(source: Source) -> Exchange:
    rng = source.rng
    while True:
        sign = rng.choice("+-**/")
        a, b = source.numbers(2)
        expression = f"{a}{sign}{b}"
        form = rng.random()
        if form < 0.45:
            text = source.phrase(phrases.EXPRESSION).format(e=_written(source, expression))
        elif form < 0.65:
            words = source.phrase(phrases.IN_WORDS[sign]).format(a=a, b=b)
            text = source.phrase(phrases.EXPRESSION).format(e=words)
        elif form < 0.83:
            text = source.phrase(phrases.COMMANDS[sign]).format(a=a, b=b)
        else:
            words, expression = _power_or_percent(source)
            text = source.phrase(phrases.EXPRESSION).format(e=words)
        exchange = _calculated(text, expression)
        if len(exchange.expected[0]) <= 14 and "rror" not in exchange.answer:
            return exchange


def _written(source: Source, expression: str) -> str:
    """An expression in signs as a user may write it."""
    rng = source.rng
    text = _spaced(expression) if rng.random() < 0.6 else expression
    if rng.random() < 0.15:
        text = text.replace("*", rng.choice("x×"))
    return text.replace("/", "÷") if rng.random() < 0.1 else text


def _power_or_percent(source: Source) -> tuple[str, str]:
    rng = source.rng
    form = rng.randrange(3)
    if form == 0:
        a, b = source.number(2, decimals=False), str(rng.randint(2, 9))
        return source.phrase(phrases.POWERS).format(a=a, b=b), f"{a}**{b}"
    if form == 1:
        a = source.numbers(1, 4)[0]
        return source.phrase(phrases.SQUARES).format(a=a), f"{a}**2"
    a, b = source.number(2, decimals=False), source.numbers(1)[0]
    return source.phrase(phrases.PERCENTS).format(a=a, b=b), f"{b}*{a}/100"


def _nested(source: Source) -> Exchange:
    rng = source.rng
    while True:
        values = dict(zip("abcd", source.numbers(4, 4), strict=True))
        if rng.random() < 0.5:
            words, expression = source.phrase(phrases.NESTED).format(**values).split(" | ")
        else:
            expression = rng.choice(phrases.SYMBOLIC).format(**values)
            words = _written(source, expression)
        text = source.phrase(phrases.EXPRESSION).format(e=words)
        exchange = _calculated(_dress(source, text), expression)
        if len(exchange.expected[0]) <= 14 and "rror" not in exchange.answer:
            return exchange


def _then(source: Source, result: str) -> tuple[str, Exchange]:
    """A request that goes on from an earlier result."""
    words, expression = source.phrase(phrases.THEN).format(a=source.number(4), r=result).split(" | ")
    return words, _calculated(words, expression)


def _chained(source: Source) -> Exchange:
    while True:
        first = _bare_arithmetic(source)
        words, second = _then(source, first.expected[0])
        if len(second.expected[0]) > 14:
            continue
        text = source.phrase(phrases.CHAIN).format(first=first.text, then=words)
        return Exchange(_dress(source, text), first.rounds + second.rounds, second.answer, second.expected)


def _looked_up(source: Source, text: str, entity: str, attribute: str) -> Exchange:
    """In training made-up entities, and a third of the others, have made-up values: the answer comes from the tool."""
    rng = source.rng
    arguments = {"entity": entity, "attribute": attribute}
    result = run("lookup", arguments)
    if not source.held_out and (result.startswith("error") or rng.random() < 0.35):
        result = _made_up_value(source, attribute)
    answer = f"The {attribute} of {entity} is {result}."
    return Exchange(text, ((Call("lookup", arguments, result),),), answer, (result,))


def _made_up_value(source: Source, attribute: str) -> str:
    match attribute:
        case "population":
            return f"{source.number(4)} million"
        case "height":
            return f"{source.number(5)} m"
        case "length":
            return f"{source.number(5)} km"
        case "capital":
            return " ".join(source.word(capital=True) for _ in range(source.rng.choice((1, 1, 2))))
        case _:
            return source.word()


def _bare_lookup(source: Source) -> Exchange:
    entity, attribute = source.entity()
    if source.rng.random() < 0.08:
        entity = entity.lower()
    text = source.phrase(phrases.LOOKUPS[attribute]).format(x=entity)
    return _looked_up(source, text, entity, attribute)


def _converted(source: Source, text: str, value: str, unit_from: str, unit_to: str) -> Exchange:
    number = float(value) if "." in value else int(value)
    arguments = {"value": number, "unit_from": unit_from, "unit_to": unit_to}
    result = run("convert", arguments)
    return Exchange(text, ((Call("convert", arguments, result),),), f"{value} {unit_from} is {result}.", (result,))


def _two_units(source: Source) -> tuple[str, str]:
    group = source.rng.choice(UNITS)
    first, second = source.rng.sample(group, 2)
    return source.rng.choice(first), source.rng.choice(second)


def _bare_convert(source: Source) -> Exchange:
    rng = source.rng
    unit_from, unit_to = _two_units(source)
    value = source.numbers(1)[0]
    if unit_from in ("celsius", "fahrenheit") and rng.random() < 0.2:
        value = f"-{value}"
    template = source.phrase(phrases.CONVERSIONS)
    if unit_from in ("celsius", "fahrenheit") and rng.random() < 0.4:
        template = template.replace("{v} {u}", "{v} degrees {u}")
    elif len(unit_from) <= 2 and rng.random() < 0.2:
        template = template.replace("{v} {u}", "{v}{u}")
    text = template.format(v=value, u=unit_from, w=unit_to)
    return _converted(source, text, value, unit_from, unit_to)


def _plain(source: Source) -> Exchange:
    intent = source.rng.choice(smalltalk.INTENTS)
    text = source.phrase(intent.asked)
    if source.rng.random() < 0.7:
        text = text[0].upper() + text[1:]
    return Exchange(text + source.phrase(phrases.CLOSERS), (), intent.answer, (intent.answer,))


def _parallel(source: Source) -> Exchange:
    makers = (_bare_arithmetic, _bare_lookup, _bare_convert)
    parts = [source.rng.choice(makers)(source) for _ in range(source.rng.choice((2, 2, 2, 2, 3)))]
    text = parts[0].text
    for part in parts[1:]:
        text = source.phrase(phrases.JOIN).format(a=text, b=part.text)
    calls = tuple(part.rounds[0][0] for part in parts)
    answer = " ".join(part.answer for part in parts)
    return Exchange(_dress(source, text), (calls,), answer, tuple(part.expected[0] for part in parts))


def follow_up(source: Source) -> list[Exchange]:
    """A request and one that only makes sense after it."""
    rng = source.rng
    form = rng.choices(("then", "entity", "unit", "value"), (50, 25, 12, 13))[0]
    if form == "then":
        first = _bare_arithmetic(source)
        words, second = _then(source, first.expected[0])
        text = source.phrase(phrases.FOLLOW).format(then=words)
    elif form == "entity":
        first = _bare_lookup(source)
        attribute = first.rounds[0][0].arguments["attribute"]
        entity, _ = source.entity(attribute)
        text = source.phrase(phrases.AND_OTHER).format(x=entity)
        second = _looked_up(source, text, entity, attribute)
    else:
        first = _bare_convert(source)
        unit_from = first.rounds[0][0].arguments["unit_from"]
        unit_to = first.rounds[0][0].arguments["unit_to"]
        value = first.answer.split()[0]
        if form == "value":
            value = source.numbers(1)[0]
            text = source.phrase(phrases.AND_VALUE).format(v=value)
        else:
            group = next(group for group in UNITS if any(unit_from in names for names in group))
            unit_to = rng.choice([name for names in group for name in names if unit_from not in names])
            text = source.phrase(phrases.AND_UNIT).format(w=unit_to)
        second = _converted(source, text, value, unit_from, unit_to)
    second = Exchange(text, second.rounds, second.answer, second.expected)
    return [_dressed(source, first), _dressed(source, second)]


def _error(source: Source) -> Exchange:
    """A request whose tool fails: by itself, or in training with any error text."""
    rng = source.rng
    form = rng.randrange(4) if not source.held_out else rng.randrange(3)
    if form == 0:
        a = source.numbers(1)[0]
        text = source.phrase(phrases.EXPRESSION).format(e=_written(source, f"{a}/0"))
        call = Call("calculator", {"expression": f"{a}/0"}, "")
    elif form == 1:
        entity, attribute = source.word(capital=True), rng.choice(tuple(phrases.LOOKUPS))
        text = source.phrase(phrases.LOOKUPS[attribute]).format(x=entity)
        call = Call("lookup", {"entity": entity, "attribute": attribute}, "")
    elif form == 2:
        value, (group, other) = source.numbers(1)[0], rng.sample(UNITS, 2)
        unit_from, unit_to = rng.choice(rng.choice(group)), rng.choice(rng.choice(other))
        text = source.phrase(phrases.CONVERSIONS).format(v=value, u=unit_from, w=unit_to)
        call = _converted(source, text, value, unit_from, unit_to).rounds[0][0]
    else:
        drawn = rng.choice((_bare_arithmetic, _bare_lookup, _bare_convert))(source)
        text, call = drawn.text, drawn.rounds[0][0]
    response = run(call.name, call.arguments)
    if form == 3 or (not source.held_out and rng.random() < 0.3):
        prefix = rng.choice(ERROR_PREFIXES).format(name=call.name)
        values = {"n": source.number(3), "word": source.word(), "word2": source.word()}
        response = prefix + rng.choice(ERROR_TEXTS).format(**values)
    reason = re.sub(r"^(\w+ ?\w*: )+", "", response).split(";")[0]
    answered = Call(call.name, call.arguments, response)
    return Exchange(_dress(source, text), ((answered,),), f"Sorry, that failed: {reason}.", (reason,))


def custom_tool(source: Source) -> tuple[str, tuple[str, ...]]:
    """A tool that the model knows from its system turn alone."""
    name = "_".join(source.word() for _ in range(source.rng.choice((1, 2))))
    return name, tuple(source.word() for _ in range(source.rng.choice((1, 1, 2))))


def custom(source: Source, name: str, parameters: tuple[str, ...]) -> Exchange:
    rng = source.rng
    arguments = {p: rng.choice((source.word, source.number))() for p in parameters}
    spelled = " and ".join(f"{parameter} {value}" for parameter, value in arguments.items())
    text = source.phrase(phrases.CUSTOM).format(name=name, args=spelled)
    result = " ".join(rng.choice((source.word, source.number))() for _ in range(rng.choice((1, 2, 3))))
    return Exchange(_dress(source, text), ((Call(name, arguments, result),),), f"{name} says: {result}.", (result,))


MAKERS: dict[str, Callable[[Source], Exchange]] = {
    "arithmetic": lambda source: _dressed(source, _bare_arithmetic(source)),
    "nested": _nested,
    "chained": _chained,
    "lookup": lambda source: _dressed(source, _bare_lookup(source)),
    "convert": lambda source: _dressed(source, _bare_convert(source)),
    "plain": _plain,
    "parallel": _parallel,
    "error": _error,
}
