"""A typed function becomes a schema, and a model's arguments become what the function expects."""

from __future__ import annotations

import asyncio
import enum
import functools
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcept.tools.arguments import ArgumentsError, check_arguments
from jaxcept.tools.definition import Tool, tool
from jaxcept.tools.output import error_text, output_text


class Unit(enum.Enum):
    KM = "km"
    MILE = "mi"


@dataclass
class Place:
    name: str
    height: float = 0.0


class Options(TypedDict):
    deep: bool
    limit: NotRequired[int]


class Node(TypedDict):
    children: list[Node]


@tool
def travel(
    start: Place,
    unit: Unit,
    mode: Literal["car", "train"] = "car",
    stops: list[str] | None = None,
    weights: dict[str, float] | None = None,
    options: Options | None = None,
    days: int = 1,
) -> str:
    """Plan a journey.

    It may take a while.

    Args:
        start: where it begins
        unit (Unit): of lengths;
            kilometres: the usual choice
        days: how many

    Returns:
        a plan
    """
    return f"{start} {unit} {mode} {stops} {weights} {options} {days}"


def test_schema_of_a_rich_signature() -> None:
    place = {"type": "object", "properties": {"name": {"type": "string"}, "height": {"type": "number"}},
             "required": ["name"], "additionalProperties": False}  # fmt: skip
    options = {"type": "object", "properties": {"deep": {"type": "boolean"}, "limit": {"type": "integer"}},
               "required": ["deep"], "additionalProperties": False}  # fmt: skip
    null = {"type": "null"}
    assert travel.schema == {
        "type": "function",
        "function": {
            "name": "travel",
            "description": "Plan a journey.\n\nIt may take a while.",
            "parameters": {
                "type": "object",
                "properties": {
                    "start": {**place, "description": "where it begins"},
                    "unit": {"type": "string", "enum": ["km", "mi"],
                             "description": "of lengths; kilometres: the usual choice"},
                    "mode": {"type": "string", "enum": ["car", "train"], "default": "car"},
                    "stops": {"anyOf": [{"type": "array", "items": {"type": "string"}}, null]},
                    "weights": {"anyOf": [{"type": "object", "additionalProperties": {"type": "number"}}, null]},
                    "options": {"anyOf": [options, null]},
                    "days": {"type": "integer", "description": "how many", "default": 1},
                },
                "required": ["start", "unit"],
            },
        },
    }  # fmt: skip


def test_arguments_become_python_values() -> None:
    given = {"start": {"name": "Bern", "height": 540}, "unit": "mi", "stops": ["a"], "weights": {"x": 1}, "days": "3"}
    bound = travel.bind({**given, "options": {"deep": True}})
    assert bound == {"start": Place("Bern", 540.0), "unit": Unit.MILE, "stops": ["a"], "weights": {"x": 1.0}, "days": 3,
                     "options": {"deep": True}}  # fmt: skip
    assert type(bound["weights"]["x"]) is float
    assert travel(**bound).startswith("Place(name='Bern', height=540.0) Unit.MILE car ['a']")


def test_sphinx_fields_and_annotated_describe_parameters() -> None:
    @tool
    def look(x: int, y: Annotated[str, "the place"], z: bool = False) -> None:
        """Look up.

        :param int x: the number,
            a small one
        :param z: whether
        :returns: nothing
        """

    properties = look.parameters["properties"]
    assert look.description == "Look up."
    assert properties["x"]["description"] == "the number, a small one"
    assert properties["y"]["description"] == "the place"
    assert properties["z"] == {"type": "boolean", "description": "whether", "default": False}


def test_a_tool_stays_a_function_and_may_be_named() -> None:
    @tool(name="sum-up", description="Adds.", timeout_s=2.5)
    async def add(a: int, b: int = 2) -> int:
        return a + b

    assert (add.name, add.description, add.timeout_s, add.is_async) == ("sum-up", "Adds.", 2.5, True)
    assert asyncio.run(add(1)) == 3
    assert not travel.is_async


def test_methods_and_callable_objects_are_tools() -> None:
    class Counter:
        def count(self, by: int = 1) -> int:
            """Count on."""
            return by

        async def __call__(self, text: str) -> str:
            """Say it."""
            return text

    assert tool(Counter().count)(by=3) == 3
    made = tool(name="say")(Counter())
    assert made.is_async
    assert made.parameters["required"] == ["text"]
    partial = tool(name="one")(functools.partial(Counter().count))
    assert partial(by=2) == 2


def no_annotation(a, b: int) -> None:  # type: ignore[no-untyped-def]
    """Lacks one."""


def star(*items: int) -> None:
    """Takes many."""


def two_stars(**items: int) -> None:
    """Takes any."""


def positional(a: int, /) -> None:
    """Cannot be named."""


def unsupported(a: set[int]) -> None:
    """Takes a set."""


def unsupported_key(a: dict[int, str]) -> None:
    """Takes numbered keys."""


def unknown(a: Nowhere) -> None:  # type: ignore[name-defined]  # noqa: F821
    """Takes what nobody knows."""


def recursive(a: Node) -> None:
    """Takes a tree."""


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (no_annotation, "tool 'no_annotation': parameter 'a' has no type annotation"),
        (star, r"tool 'star': parameter 'items' is \*items"),
        (two_stars, r"tool 'two_stars': parameter 'items' is \*\*items"),
        (positional, "tool 'positional': parameter 'a' is positional-only"),
        (unsupported, r"tool 'unsupported': parameter 'a': set\[int\] has no JSON schema"),
        (unsupported_key, "'unsupported_key': parameter 'a': .*keys of a JSON object are strings"),
        (unknown, "tool 'unknown': its type hints cannot be read: name 'Nowhere' is not defined"),
        (recursive, "tool 'recursive': parameter 'a': its type refers to itself"),
        (3, "expected a function, got 3"),
    ],
)
def test_what_has_no_schema_is_refused_at_the_border(function: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        tool(function)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "function", "function": {}}, "name is missing"),
        ({"type": "retrieval", "name": "x"}, "expected"),
        ({"name": "a\nb"}, "letters, digits"),
        ({"name": ""}, "letters, digits"),
        ({"name": 3}, "letters, digits"),
        ({"name": "x", "parameters": []}, "JSON schema of type object"),
        ({"name": "x", "parameters": {"type": "array"}}, "JSON schema of type object"),
        ({"name": "x", "parameters": {"properties": []}}, "properties: expected an object"),
        ({"name": "x", "parameters": {"required": "a"}}, "required: expected a list"),
        ({"name": "x", "description": 3}, "description=3"),
        ("x", "expected"),
    ],
)
def test_bad_dict_schemas_are_refused(schema: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Tool.from_schema(schema)


def test_a_dict_schema_is_a_tool_that_somebody_else_answers() -> None:
    made = Tool.from_schema({"name": "ask"})
    assert made.schema["function"] == {"name": "ask", "description": "",
                                       "parameters": {"type": "object", "properties": {}}}  # fmt: skip
    with pytest.raises(TypeError, match="somebody outside"):
        made()
    with pytest.raises(ValueError, match="timeout_s=0"):
        Tool("x", "", {}, timeout_s=0)


INTEGER = {"type": "integer"}


@pytest.mark.parametrize(
    ("schema", "value", "expected"),
    [
        (INTEGER, " 42 ", 42),
        (INTEGER, 3.0, 3),
        ({"type": "number"}, "1.5e3", 1500.0),
        ({"type": "boolean"}, "true", True),
        ({"type": "string"}, 12, "12"),
        ({"type": "array", "items": INTEGER}, '["1", 2]', [1, 2]),
        ({"type": "object"}, '{"a": 1}', {"a": 1}),
        ({"anyOf": [INTEGER, {"type": "null"}]}, "null", None),
        ({"anyOf": [INTEGER, {"type": "string"}]}, "3", "3"),
        ({"anyOf": [INTEGER, {"type": "null"}]}, "3", 3),
        ({"type": ["integer", "null"]}, None, None),
        ({"type": ["number", "integer"]}, 2.5, 2.5),
        ({"const": 1}, 1, 1),
        ({"enum": [1, "a"]}, "a", "a"),
        ({"unknown": "keyword"}, [object], [object]),
        (True, 1, 1),
    ],
)
def test_unambiguous_slips_are_mended(schema: Any, value: Any, expected: Any) -> None:
    checked = check_arguments({"properties": {"a": schema}}, {"a": value})["a"]
    assert checked == expected
    assert type(checked) is type(expected)


@pytest.mark.parametrize(
    ("schema", "value", "words"),
    [
        (INTEGER, "3.5", 'expected integer, got "3.5"'),
        (INTEGER, "0x10", "expected integer"),
        (INTEGER, True, "expected integer, got true"),
        (INTEGER, 2.5, "expected integer, got 2.5"),
        (INTEGER, None, "expected integer, got null"),
        ({"type": "number"}, "1e999", "expected number"),
        ({"type": "string"}, 2.5, "expected string, got 2.5"),
        ({"type": "array"}, "[1", "expected array"),
        ({"type": "boolean"}, 1, "expected boolean"),
        ({"enum": [1]}, True, r"expected one of \[1\], got true"),
        ({"const": "x"}, "y", 'expected "x", got "y"'),
        ({"anyOf": [INTEGER, {"type": "null"}]}, "x", "expected integer or null"),
        ({"type": "array", "items": INTEGER}, [1, "x"], r"argument 'a\[1\]': expected integer"),
        ({"type": "object", "required": ["b"]}, {}, r"missing argument 'a\.b'"),
        ({"type": "object", "additionalProperties": INTEGER}, {"k": "x"}, r"argument 'a\.k'"),
        ({"type": "string"}, {"x": 1}, "got an object"),
        ({"anyOf": [{"type": "object", "required": ["b"]}, {"type": "null"}]}, {}, r"missing argument 'a\.b'"),
    ],
)
def test_wrong_values_are_named(schema: Any, value: Any, words: str) -> None:
    with pytest.raises(ArgumentsError, match=words):
        check_arguments({"properties": {"a": schema}}, {"a": value})


def test_extra_arguments_pass_only_where_the_schema_says_so() -> None:
    with pytest.raises(ArgumentsError, match=r"unexpected argument 'b' \(it takes: a\)"):
        check_arguments({"properties": {"a": {}}}, {"b": 1})
    assert check_arguments({"properties": {"a": {}}, "additionalProperties": True}, {"b": 1}) == {"b": 1}
    assert check_arguments({}, {"b": 1}) == {"b": 1}


def test_many_problems_stay_short() -> None:
    properties = {f"p{i}": INTEGER for i in range(1000)}
    with pytest.raises(ArgumentsError) as raised:
        check_arguments({"properties": properties}, dict.fromkeys(properties, "x" * 1000))
    assert str(raised.value).endswith("and 992 more")
    assert len(str(raised.value)) < 2000


def test_schemas_of_any_depth_are_survived() -> None:
    schema: dict[str, Any] = INTEGER
    for _ in range(10_000):
        schema = {"anyOf": [schema, {"type": "null"}]}
    for value in ("x", {}, [1]):
        assert check_arguments({"properties": {"a": schema}}, {"a": value}) == {"a": value}


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(["start", "unit", "mode", "stops", "weights", "options", "days", "x"]), JSON))
def test_any_arguments_bind_or_are_refused_in_words(arguments: dict[str, Any]) -> None:
    try:
        travel(**travel.bind(arguments))
    except ArgumentsError as error:
        assert "argument" in str(error)


class Odd:
    def __str__(self) -> str:
        return "odd"


def test_output_becomes_text() -> None:
    assert output_text("as it is\n") == "as it is\n"
    assert output_text(None) == "null"
    assert output_text({"a": [1, 2.5, True, None, "é"]}) == '{"a":[1,2.5,true,null,"é"]}'
    assert output_text(Place("x")) == '{"name":"x","height":0.0}'
    assert output_text(Unit.KM) == '"km"'
    assert output_text({1, 2}) in ("[1,2]", "[2,1]")
    assert output_text(Odd()) == '"odd"'
    assert output_text({(1, 2): 3}) == '{"(1, 2)":3}'
    assert output_text(b"h\xc3\xa9\xff") == "hé\ufffd"
    assert output_text("a\ud800b") == "a\ufffdb"


def test_output_is_cut_with_a_note() -> None:
    assert output_text("x" * 10, 10) == "x" * 10
    text = output_text("é" * 100_000_000)
    assert text.startswith("é" * 100_000 + "\n[cut: the output had 100,000,000 characters")
    assert output_text(b"\xff" * 100, 10).startswith("\ufffd" * 10 + "\n[cut: the output had 100 bytes")
    assert output_text("é".encode() * 10, 10) == "é" * 10
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(RecursionError):
        output_text(nested)
    assert len(error_text(ValueError("x" * 10_000))) < 2_200
