"""Constraints: what a matcher lets through is valid and can be finished; bad ones are refused fast, by name."""

from __future__ import annotations

import json
import random
import re
import time
from pathlib import Path

import jsonschema
import pytest

from jaxcept.build import constraint_maker
from jaxcept.constraint import Constraint, ToolChoice, ToolMode
from jaxcept.scheduler.params import StructuredOutput
from jaxcept.text.grammar import GrammarCompiler
from jaxcept.text.tokenizer import Tokenizer
from jaxcept.tools.calls import ToolCall
from jaxcept.tools.parsers import make_parser
from jaxcept.tools.toolbox import Toolbox

FOLDER = Path(__file__).parents[1] / "models/jaxcept_models/shipped"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_folder(FOLDER)


@pytest.fixture(scope="module")
def compiler(tokenizer):
    return GrammarCompiler(tokenizer, tokenizer.ids_of(("<tool_call>", "</tool_call>")))


def allowed(mask):
    bits = int.from_bytes(mask, "little")
    return [i for i in range(8 * len(mask)) if bits >> i & 1]


def walk(matcher, stops, seed, limit=3000):
    """Random allowed tokens up to a stop token."""
    rng, ids = random.Random(seed), []
    for _ in range(limit):
        token_id = rng.choice(allowed(matcher.mask()))
        assert matcher.accept(token_id)
        if token_id in stops:
            return ids
        ids.append(token_id)
    raise AssertionError("the text does not end")


def random_schema(rng, depth=0):  # noqa: PLR0911
    """A schema whose values are short."""
    kinds = ["string", "integer", "boolean", "enum", "null", "pattern"] + ["object", "array", "anyOf"] * (depth < 3)
    kind = rng.choice(kinds if depth else ["object"])
    if kind == "string":
        return {"type": "string", "maxLength": rng.randint(0, 9)}
    if kind == "integer":
        low = rng.randint(-50, 50)
        return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 100)}
    if kind == "enum":
        return {"enum": rng.sample(["a", "b c", 'q"', "é", 1, -2.5, True, None, "\n"], rng.randint(1, 5))}
    if kind == "pattern":
        return {"type": "string", "pattern": rng.choice(["^[a-c]{2,5}$", r"^\d{4}-\d{2}$", "^(x|yy){1,4}z{1,3}$"])}
    if kind == "object":
        names = rng.sample(["a", "b b", "ç", "d", "e"], rng.randint(1, 4))
        properties = {name: random_schema(rng, depth + 1) for name in names}
        required = [name for name in names if rng.random() < 0.7]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    if kind == "array":
        return {"type": "array", "items": random_schema(rng, depth + 1), "maxItems": 3, "minItems": rng.randint(0, 2)}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth + 1), random_schema(rng, depth + 1)]}
    return {"type": kind}


@pytest.mark.parametrize("seed", range(50))
def test_what_a_schema_lets_through_is_valid(tokenizer, compiler, seed):
    schema = random_schema(random.Random(seed))
    ids = walk(compiler.json_schema(schema), tokenizer.stop_token_ids, seed)
    jsonschema.validate(json.loads(tokenizer.decode(ids, False)), schema)


def test_recursive_schemas_regexes_choices_grammars(tokenizer, compiler):
    stops = tokenizer.stop_token_ids
    tree = {"$ref": "#/$defs/t", "$defs": {"t": {"type": "object", "properties": {"n": {"$ref": "#/$defs/t"}},
            "additionalProperties": False}}}  # fmt: skip
    jsonschema.validate(json.loads(tokenizer.decode(walk(compiler.json_schema(tree), stops, 1))), tree)
    assert isinstance(json.loads(tokenizer.decode(walk(compiler.json_schema('{"type": "array", "maxItems": 0}'), stops, 1))), list)  # fmt: skip  # noqa: E501
    assert re.fullmatch("[ab]{3}c*", tokenizer.decode(walk(compiler.regex("[ab]{3}c*"), stops, 2)))
    choices = ['say "hi"', "two\nlines", "\\", "naïve ☃"]
    assert {tokenizer.decode(walk(compiler.choice(choices), stops, seed), False) for seed in range(30)} == set(choices)
    text = tokenizer.decode(walk(compiler.lark('start: "(" start ")" | "x"'), stops, 3))
    assert text == "(" * (len(text) // 2) + "x" + ")" * (len(text) // 2)


def test_a_matcher_refuses_and_stands_where_it_stood(tokenizer, compiler):
    matcher = compiler.regex("ab")
    a, b, c = (tokenizer.token_id(text) for text in "abc")
    (stop,) = tokenizer.stop_token_ids
    assert not matcher.accept(c) and not matcher.accept(stop) and not matcher.accept(b) and not matcher.is_complete
    assert matcher.accept(a)
    other = matcher.copy()
    assert matcher.accept(b) and matcher.may_end and not other.may_end
    assert allowed(matcher.mask()) == [stop] and matcher.is_complete and matcher.accept(stop)
    assert other.accept_text("b") and not other.accept_text("b") and other.may_end
    assert len(matcher.mask()) == 4 * -(-tokenizer.vocab_size // 32)


def test_masks_take_microseconds(tokenizer, compiler):
    matcher = compiler.json_object()
    ids = tokenizer.encode(json.dumps({"key": ["text " * 40, {"a": 1.5, "b": None}] * 4}), False)
    began = time.perf_counter()
    for token_id in ids:
        matcher.mask()
        assert matcher.accept(token_id)
    assert (time.perf_counter() - began) / len(ids) < 5e-3


def nested(levels):
    schema = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


BAD = {
    "not json": ("json_schema", "{"),
    "no object": ("json_schema", "[1]"),
    "endless reference": ("json_schema", {"$ref": "#"}),
    "remote reference": ("json_schema", {"properties": {"a": {"$ref": "https://example.com/s.json"}}}),
    "deep": ("json_schema", nested(10_000)),
    "deep text": ("json_schema", '{"properties": {"a": ' * 10_000 + "{}" + "}}" * 10_000),
    "deep brackets": ("json_schema", "[" * 100_000),
    "unknown type": ("json_schema", {"type": "frob"}),
    "type of a type": ("json_schema", {"type": 5}),
    "large enum": ("json_schema", {"enum": [f"v{i}" for i in range(100_000)]}),
    "nothing is valid": ("json_schema", {"type": "integer", "minimum": 5, "maximum": 1}),
    "false": ("json_schema", False),
    "not a number": ("json_schema", {"const": float("nan")}),
    "surrogate": ("json_schema", {"const": "\ud800", "title": "\ud800"}),
    "keyword that cannot be followed": ("json_schema", {"not": {"type": "string"}}),
    "bad pattern": ("json_schema", {"type": "string", "pattern": "((("}),
    "bad regex": ("regex", "((("),
    "look-ahead": ("regex", "(?=a)b"),
    "long regex": ("regex", "a" * 300_000),
    "parentheses": ("grammar", "start: " + "(" * 30_000 + '"a"' + ")" * 30_000),
    "no rules": ("grammar", "hello"),
    "only itself": ("grammar", "start: start"),
    "unknown rule": ("grammar", "start: nobody"),
    "many choices": ("choice", [f"v{i}" for i in range(100_000)]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_constraints_are_refused_fast_by_the_name_of_their_field(tokenizer, name):
    field, value = BAD[name]
    maker = constraint_maker(tokenizer, "hermes")
    began = time.perf_counter()
    with pytest.raises(ValueError, match=field) as caught:
        maker.make(StructuredOutput(**{field: value}), ToolChoice(), None)
    assert time.perf_counter() - began < 2
    assert len(str(caught.value)) < 500
    if name == "unknown type":
        assert "frob" in str(caught.value)


SERVED = {
    "catastrophic pattern": ("json_schema", {"type": "string", "pattern": "^(a+)+$"}),
    "exponential backtracking": ("regex", "(a|aa)*(a|a)*b"),
    "left recursion": ("grammar", 'start: start "a" | "b"'),
    "ambiguous": ("grammar", 'start: e\ne: e e | "a"'),
    "large, not too large": ("json_schema", {"enum": [f"v{i}" for i in range(5_000)]}),
}


@pytest.mark.parametrize("name", SERVED)
def test_hard_constraints_that_are_served_are_served_fast(compiler, tokenizer, name):
    field, value = SERVED[name]
    began = time.perf_counter()
    matcher = {"json_schema": compiler.json_schema, "regex": compiler.regex, "grammar": compiler.lark}[field](value)
    for _ in range(50):
        matcher.accept(allowed(matcher.mask())[-1])
    assert time.perf_counter() - began < 2


def test_a_constraint_that_grows_too_hard_on_the_way_says_so(compiler):
    matcher = compiler.regex("((a{1,1000}){1,1000}){1,1000}" * 30)
    began = time.perf_counter()
    with pytest.raises(RuntimeError, match="too many"):
        for _ in range(50):
            matcher.accept(allowed(matcher.mask())[-1])
    assert time.perf_counter() - began < 2


@pytest.mark.parametrize("given", [{}, {"regex": "a", "json_object": True}, {"choice": []}, {"choice": [""]},
                                   {"regex": ""}, {"grammar": 5}, {"json_schema": 5}, {"json_object": 2}])  # fmt: skip
def test_exactly_one_constraint_of_its_type(given):
    with pytest.raises(ValueError, match=r"structured|choice|regex|grammar|json_schema|json_object"):
        StructuredOutput(**given)


# Calls of tools.

CITY = {"type": "object", "properties": {"city": {"enum": ["Rio", "Ulm"]}, "days": {"$ref": "#/$defs/few"}},
        "required": ["city", "days"], "additionalProperties": False,
        "$defs": {"few": {"type": "integer", "minimum": 1, "maximum": 9}}}  # fmt: skip
PAIR = {"type": "object", "properties": {"x": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}},
        "required": ["x"], "additionalProperties": False, "not": {"const": 1}}  # fmt: skip
SCHEMAS = {"weather": CITY, 'odd "name"': PAIR}
FORMATS = ("hermes", "llama3_json", "mistral")
PREAMBLES = {"hermes": "Let me see. <tool_call>", "llama3_json": '{"name": "weather", "parameters":',
             "mistral": "Well [TOOL_CALLS]"}  # fmt: skip


@pytest.fixture(scope="module")
def toolbox():
    functions = [{"name": name, "description": "", "parameters": schema} for name, schema in SCHEMAS.items()]
    with Toolbox([{"type": "function", "function": each} for each in functions[:1]] + [
        {"type": "function", "function": {**functions[1], "name": "odd"}}]) as made:  # fmt: skip
        yield made


def check_calls(parser, text):
    """All calls of a turn, each with arguments by its schema; nothing else is in it."""
    calls = parser.feed(text) + parser.finish()
    for call in calls:
        assert isinstance(call, ToolCall), call
        jsonschema.validate(call.arguments, CITY if call.name == "weather" else PAIR)
    return calls


def draw_turn(constraint, tokenizer, seed, begin="", limit=1500):
    """A turn: what it begins with, then random tokens while there is a mask."""
    rng, ids = random.Random(seed), tokenizer.encode(begin, False)
    for token_id in ids:
        assert constraint.accept(token_id)
        constraint.read(tokenizer.token_text(token_id))
    while (mask := constraint.mask()) is not None:
        token_id = rng.choice(allowed(mask))
        assert constraint.accept(token_id)
        if token_id in tokenizer.stop_token_ids:
            break
        constraint.read(tokenizer.token_text(token_id))
        ids.append(token_id)
        assert len(ids) < limit
    return tokenizer.decode(ids, False)


@pytest.mark.parametrize("parser", FORMATS)
@pytest.mark.parametrize("seed", range(5))
def test_arguments_match_their_schema_from_where_a_call_opens(tokenizer, toolbox, parser, seed):
    constraint = constraint_maker(tokenizer, parser).make(None, ToolChoice(), toolbox)
    assert constraint is not None and constraint.mask() is None
    text = draw_turn(constraint, tokenizer, seed, PREAMBLES[parser])
    assert len(check_calls(make_parser(parser), text)) >= 1
    constraint.begin_turn()
    assert constraint.mask() is None
    assert len(check_calls(make_parser(parser), draw_turn(constraint, tokenizer, seed, PREAMBLES[parser]))) >= 1


@pytest.mark.parametrize("parser", FORMATS)
def test_a_required_call_comes_first_and_later_turns_are_free(tokenizer, toolbox, parser):
    maker = constraint_maker(tokenizer, parser)
    for choice in (ToolChoice("required", parallel=False), ToolChoice(name="odd", parallel=False)):
        for seed in range(5):
            constraint = maker.make(None, choice, toolbox)
            calls = check_calls(make_parser(parser), draw_turn(constraint, tokenizer, seed))
            assert len(calls) == 1 and (choice.name is None or calls[0].name == "odd")
            constraint.begin_turn()
            assert constraint.mask() is None


def test_without_parallel_calls_a_turn_ends_after_one(tokenizer, toolbox):
    constraint = constraint_maker(tokenizer, "hermes").make(None, ToolChoice(parallel=False), toolbox)
    draw_turn(constraint, tokenizer, 1, "<tool_call>")
    assert allowed(constraint.mask()) == list(tokenizer.stop_token_ids)


def test_a_turn_is_calls_or_the_structured_answer(tokenizer, toolbox):
    maker = constraint_maker(tokenizer, "hermes")
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9, "minimum": 0}}, "required": ["n"],
              "additionalProperties": False}  # fmt: skip
    kinds = set()
    for seed in range(12):
        constraint = maker.make(StructuredOutput(json_schema=schema), ToolChoice(parallel=False), toolbox)
        for _ in range(2):
            text = draw_turn(constraint, tokenizer, seed)
            kinds.add(bool(check_calls(make_parser("hermes"), text)))
            if "<tool_call>" not in text:
                jsonschema.validate(json.loads(text), schema)
            constraint.begin_turn()
    assert kinds == {True, False}


def test_a_choice_that_cannot_be_is_refused(tokenizer, toolbox):
    maker = constraint_maker(tokenizer, "hermes")
    for structured, choice, tools in (
        (None, ToolChoice("required"), None),
        (None, ToolChoice(name="nobody"), toolbox),
        (StructuredOutput(grammar='start: "a"'), ToolChoice(), toolbox),
    ):
        with pytest.raises(ValueError, match=r"tool_choice|grammar"):
            maker.make(structured, choice, tools)
    with pytest.raises(ValueError, match="tool_choice"):
        constraint_maker(tokenizer, "pythonic").make(None, ToolChoice("required"), toolbox)
    with pytest.raises(ValueError, match="tool_choice"):
        ToolChoice(ToolMode.NONE, name="odd")
    assert constraint_maker(tokenizer, "pythonic").make(None, ToolChoice(), toolbox) is None
    assert maker.make(None, ToolChoice(ToolMode.NONE), toolbox) is None


def test_a_tool_whose_schema_cannot_be_followed_takes_any_object(tokenizer):
    odd = {"type": "object", "properties": {"a": {"type": "frob"}}}
    with Toolbox([{"type": "function", "function": {"name": "f", "description": "", "parameters": odd}}]) as tools:
        constraint = constraint_maker(tokenizer, "hermes").make(None, ToolChoice(), tools)
    assert isinstance(constraint, Constraint)
    for token_id in tokenizer.encode('<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', False):
        assert constraint.accept(token_id)
        constraint.read(tokenizer.token_text(token_id))
    assert constraint.mask() is None
