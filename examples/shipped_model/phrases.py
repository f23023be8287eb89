"""How people ask: every phrasing that the shipped model is trained with, and those kept back to measure it.

The held-out phrasings are never seen in training. `{e}` is an expression, `{x}` an entity, `{v} {u}` a value with its
unit, `{w}` the unit wanted, `{a}`, `{b}`, `{c}` numbers.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Phrases:
    """Phrasings of one request."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


OPENERS = Phrases(
    train=("", "", "", "", "", "hi, ", "hello, ", "ok, ", "please ", "hey, ", "so, ", "quick question: ", "thanks! "),
    held_out=("", "", "", "hey there, ", "ok, please ", "hi! ", "a question: "),
)
CLOSERS = Phrases(
    train=("?", "?", "?", "", "", ".", " please", ", please", "!"), held_out=("?", "?", "", " please?", ".")
)
SYSTEMS = Phrases(
    train=(
        "You are a helpful assistant.",
        "You are a careful assistant that uses tools.",
        "Answer the user.",
        "Be brief.",
        "You answer questions with the help of tools.",
        "You are jaxcept, a small model.",
    ),
    held_out=("You are a careful assistant. Be brief.", "Answer questions with the help of tools."),
)

# Around an expression, be it in signs ("3 * 4") or in words ("the sum of 3 and 4").
EXPRESSION = Phrases(
    train=(
        "what is {e}",
        "what is {e}",
        "what's {e}",
        "calculate {e}",
        "compute {e}",
        "how much is {e}",
        "tell me {e}",
        "work out {e}",
        "can you compute {e}",
        "can you tell me what {e} is",
        "solve {e}",
        "{e}",
        "{e} = ",
        "what does {e} equal",
        "give me {e}",
        "could you calculate {e}",
        "could you tell me how much {e} is",
        "i want to know {e}",
        "i need to know what {e} is",
        "i would like to know the result of {e}",
        "what do you get for {e}",
        "find {e}",
        "find the value of {e}",
        "help me with {e}",
        "do you know {e}",
        "what is the result of {e}",
        "evaluate {e}",
    ),
    held_out=(
        "can you work out {e}",
        "tell me what {e} is",
        "could you find {e}",
        "what is the value of {e}",
        "i need {e}",
        "i would like to know how much {e} is",
        "calculate the value of {e}",
    ),
)
# {a} and {b} in words, by operator.
IN_WORDS = {
    "+": Phrases(
        ("{a} plus {b}", "the sum of {a} and {b}", "{a} added to {b}", "the total of {a} and {b}"),
        ("the sum of {a} plus {b}",),
    ),
    "-": Phrases(
        ("{a} minus {b}", "the difference between {a} and {b}", "{a} less {b}", "{a} take away {b}"),
        ("the difference of {a} and {b}",),
    ),
    "*": Phrases(
        ("{a} times {b}", "the product of {a} and {b}", "{a} multiplied by {b}"), ("the product of {a} times {b}",)
    ),
    "/": Phrases(
        ("{a} divided by {b}", "the quotient of {a} and {b}", "{a} over {b}"), ("the quotient of {a} divided by {b}",)
    ),
}
# Whole requests with one operator; in a "-" request {a} is what {b} is taken from.
COMMANDS = {
    "+": Phrases(
        ("add {a} and {b}", "add {a} to {b}", "sum up {a} and {b}", "can you add {a} and {b}"),
        ("please add {a} to {b}", "could you add {a} and {b}"),
    ),
    "-": Phrases(
        ("subtract {b} from {a}", "take {b} away from {a}", "can you subtract {b} from {a}"),
        ("please subtract {b} from {a}", "could you take {b} away from {a}"),
    ),
    "*": Phrases(
        ("multiply {a} by {b}", "multiply {a} and {b}", "can you multiply {a} by {b}"),
        ("please multiply {a} by {b}", "could you multiply {a} and {b}"),
    ),
    "/": Phrases(
        ("divide {a} by {b}", "split {a} by {b}", "can you divide {a} by {b}"),
        ("please divide {a} by {b}", "could you divide {a} by {b}"),
    ),
}
POWERS = Phrases(
    ("{a} to the power of {b}", "{a} to the power {b}", "{a} raised to {b}"), ("{a} raised to the power of {b}",)
)
SQUARES = Phrases(("{a} squared", "the square of {a}"), ("{a} to the square",))
PERCENTS = Phrases(
    ("{a}% of {b}", "the result of {a}% of {b}", "the total of {a}% of {b}", "{a} percent of {b}", "{a} % of {b}"),
    ("the value of {a}% of {b}",),
)
# Nested, in words: what is asked, and the expression.
NESTED = Phrases(
    train=(
        "the sum of {a} and {b}, times {c} | ({a}+{b})*{c}",
        "the sum of {a} and {b}, multiplied by {c} | ({a}+{b})*{c}",
        "{a} plus {b}, all times {c} | ({a}+{b})*{c}",
        "{a} minus {b}, all times {c} | ({a}-{b})*{c}",
        "the difference between {a} and {b}, times {c} | ({a}-{b})*{c}",
        "the difference between {a} and {b}, divided by {c} | ({a}-{b})/{c}",
        "the product of {a} and {b}, plus {c} | {a}*{b}+{c}",
        "the product of {a} and {b}, minus {c} | {a}*{b}-{c}",
        "{a} times {b}, plus {c} | {a}*{b}+{c}",
        "{a} times {b}, minus {c} | {a}*{b}-{c}",
        "{a} divided by {b}, plus {c} | {a}/{b}+{c}",
        "{a} times {b}, less {c} | {a}*{b}-{c}",
        "{a} plus {b}, less {c} | {a}+{b}-{c}",
        "the sum of {a} and {b}, less {c} | {a}+{b}-{c}",
        "the sum of {a} and {b}, all multiplied by {c} | ({a}+{b})*{c}",
        "{a} minus {b}, multiplied by {c} | ({a}-{b})*{c}",
        "the product of {a} and {b}, divided by {c} | {a}*{b}/{c}",
        "{a} multiplied by {b}, minus {c} | {a}*{b}-{c}",
        "{a} divided by {b}, less {c} | {a}/{b}-{c}",
    ),
    held_out=(
        "the sum of {a} and {b}, all times {c} | ({a}+{b})*{c}",
        "{a} minus {b}, all multiplied by {c} | ({a}-{b})*{c}",
        "the product of {a} and {b}, less {c} | {a}*{b}-{c}",
        "{a} multiplied by {b}, plus {c} | {a}*{b}+{c}",
    ),
)
SYMBOLIC = (
    "({a}+{b})*{c}",
    "{a}*({b}+{c})",
    "{a}*{b}+{c}",
    "{a}*{b}-{c}",
    "{a}+{b}*{c}",
    "{a}+{b}+{c}",
    "{a}-{b}+{c}",
    "({a}-{b})*{c}",
    "({a}+{b})/{c}",
    "{a}*{b}*{c}",
    "({a}+{b})*({c}-{d})",
    "({a}-{b})*({c}+{d})",
    "{a}*{b}+{c}*{d}",
    "{a}+{b}-{c}+{d}",
)
# The second step of a chain or a follow-up: what is asked, and the expression on the last result {r}.
THEN = Phrases(
    train=(
        "add {a} | {r}+{a}",
        "add {a} to it | {r}+{a}",
        "add {a} to that | {r}+{a}",
        "add {a} to the result | {r}+{a}",
        "subtract {a} | {r}-{a}",
        "subtract {a} from it | {r}-{a}",
        "subtract {a} from that | {r}-{a}",
        "take {a} away from the result | {r}-{a}",
        "multiply it by {a} | {r}*{a}",
        "multiply that by {a} | {r}*{a}",
        "multiply the result by {a} | {r}*{a}",
        "multiply by {a} | {r}*{a}",
        "divide it by {a} | {r}/{a}",
        "divide that by {a} | {r}/{a}",
        "divide by {a} | {r}/{a}",
    ),
    held_out=(
        "take {a} away from that | {r}-{a}",
        "take {a} away from it | {r}-{a}",
        "subtract {a} from the result | {r}-{a}",
        "divide the result by {a} | {r}/{a}",
    ),
)
CHAIN = Phrases(
    train=(
        "{first}, then {then}",
        "{first} and then {then}",
        "{first}. then {then}",
        "first {first}, then {then}",
        "{first}? then {then}",
    ),
    held_out=("{first}, and then {then}", "first {first} and then {then}"),
)
FOLLOW = Phrases(
    train=("now {then}", "{then}", "then {then}", "ok, {then}", "and now {then}", "please {then}", "can you {then}"),
    held_out=("ok, now {then}", "and then {then}", "now please {then}"),
)

LOOKUPS = {
    "capital": Phrases(
        train=(
            "what is the capital of {x}",
            "what is the capital of {x}",
            "what's the capital of {x}",
            "which city is the capital of {x}",
            "name the capital of {x}",
            "tell me the capital of {x}",
            "the capital of {x}",
            "capital of {x}",
            "{x}'s capital",
            "do you know the capital of {x}",
            "can you look up the capital of {x}",
            "what is the capital city of {x}",
            "look up the capital of {x}",
        ),
        held_out=("which is the capital city of {x}", "can you tell me {x}'s capital", "i need the capital of {x}"),
    ),
    "population": Phrases(
        train=(
            "what is the population of {x}",
            "what's the population of {x}",
            "how many people live in {x}",
            "how many people are in {x}",
            "how many inhabitants does {x} have",
            "population of {x}",
            "{x}'s population",
            "tell me the population of {x}",
            "how big is the population of {x}",
            "can you tell me how many people {x} has",
            "do you know the population of {x}",
            "look up the population of {x}",
        ),
        held_out=(
            "tell me how many people live in {x}",
            "how many people does {x} have",
            "i need the population of {x}",
        ),
    ),
    "currency": Phrases(
        train=(
            "what is the currency of {x}",
            "what's the currency of {x}",
            "what currency does {x} use",
            "which currency is used in {x}",
            "what currency do people use in {x}",
            "currency of {x}",
            "{x}'s currency",
            "tell me the currency of {x}",
            "what money do people use in {x}",
            "do you know the currency of {x}",
            "look up the currency of {x}",
        ),
        held_out=("what currency is used in {x}", "which currency does {x} use", "i need the currency of {x}"),
    ),
    "height": Phrases(
        train=(
            "how high is {x}",
            "how tall is {x}",
            "what is the height of {x}",
            "what's the height of {x}",
            "height of {x}",
            "tell me the height of {x}",
            "can you tell me how high {x} is",
            "do you know how tall {x} is",
            "look up the height of {x}",
        ),
        held_out=("tell me how high {x} is", "can you look up the height of {x}", "do you know how high {x} is"),
    ),
    "length": Phrases(
        train=(
            "how long is the {x}",
            "how long is {x}",
            "what is the length of the {x}",
            "what's the length of the {x}",
            "what is the length of {x}",
            "length of the {x}",
            "tell me the length of the {x}",
            "can you tell me how long the {x} is",
            "do you know how long the {x} is",
            "look up the length of the {x}",
        ),
        held_out=(
            "tell me how long the {x} is",
            "can you look up the length of the {x}",
            "i need the length of the {x}",
        ),
    ),
}
AND_OTHER = Phrases(
    train=("and {x}", "what about {x}", "and for {x}", "the same for {x}", "and what about {x}"),
    held_out=("and the same for {x}", "ok, what about {x}"),
)

CONVERSIONS = Phrases(
    train=(
        "convert {v} {u} to {w}",
        "convert {v} {u} to {w}",
        "convert {v} {u} into {w}",
        "how many {w} are {v} {u}",
        "how many {w} are in {v} {u}",
        "what is {v} {u} in {w}",
        "what's {v} {u} in {w}",
        "how much is {v} {u} in {w}",
        "{v} {u} in {w}",
        "{v} {u} to {w}",
        "change {v} {u} into {w}",
        "can you convert {v} {u} to {w}",
        "tell me how many {w} {v} {u} are",
        "give me {v} {u} in {w}",
        "i need {v} {u} in {w}",
    ),
    held_out=(
        "how many {w} is {v} {u}",
        "change {v} {u} to {w}",
        "could you convert {v} {u} into {w}",
        "tell me {v} {u} in {w}",
        "i want to know how much {v} {u} is in {w}",
    ),
)
AND_UNIT = Phrases(
    train=("and in {w}", "what about {w}", "what is that in {w}", "now in {w}"),
    held_out=("and what is that in {w}", "and now in {w}"),
)
AND_VALUE = Phrases(
    train=("and {v}", "what about {v}", "and for {v}", "the same for {v}"),
    held_out=("and what about {v}", "and the same for {v}"),
)

JOIN = Phrases(
    train=("{a} and {b}", "{a}, and {b}", "{a}? and {b}", "{a}, also {b}", "{a}? also, {b}", "{a}; {b}", "{a}? {b}"),
    held_out=("{a}, and also {b}", "{a} and also {b}"),
)
CUSTOM = Phrases(
    train=(
        "use {name} with {args}",
        "call {name} with {args}",
        "run {name} with {args}",
        "ask {name} for {args}",
        "please use {name} for {args}",
    ),
    held_out=("please call {name} with {args}", "can you run {name} for {args}", "use {name} for {args}"),
)
