"""Tool calls are found in text however it is cut, and text that only looks like a call does no harm."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from text_backends import TEMPLATES

from jaxcept.text.template import ChatTemplate
from jaxcept.tools.calls import MalformedCall, ParsedCall, ToolCall
from jaxcept.tools.parsers import PARSERS, detect_parser, make_parser
from jaxcept.tools.python_calls import read_python_calls
from jaxcept.tools.scan import MAX_NESTING, nesting


@dataclass
class Parsed:
    """What one turn gave: calls, content, and how many calls were known before the turn ended."""

    calls: list[ParsedCall] = field(default_factory=list)
    content: str = ""
    num_before_end: int = 0

    @property
    def pairs(self) -> list[tuple[str, Any]]:
        return [(c.name, dict(c.arguments)) for c in self.calls if isinstance(c, ToolCall)]

    @property
    def reasons(self) -> list[str]:
        return [c.reason for c in self.calls if isinstance(c, MalformedCall)]


def parse(name: str, pieces: list[str]) -> Parsed:
    parser, parsed = make_parser(name), Parsed()
    for piece in pieces:
        parsed.calls += parser.feed(piece)
        parsed.content += parser.take_content()
    parsed.num_before_end = len(parsed.calls)
    parsed.calls += parser.finish()
    parsed.content += parser.take_content()
    return parsed


ADD = {"a": 1, "b": [2, {"c": "}]\"'\\ é😀 </tool_call>"}]}
ADD_JSON = json.dumps(ADD)
ADD_RAW = json.dumps(ADD, ensure_ascii=False)

WELL_FORMED = [
    ("hermes", f'<tool_call>{{"name": "add", "arguments": {ADD_JSON}}}</tool_call>', [("add", ADD)], ""),
    ("hermes", f'<tool_call>\n{{"name": "add", "arguments": {ADD_RAW}}}\n</tool_call>', [("add", ADD)], ""),
    ("hermes", 'Hi.\n<tool_call>{"name": "f", "arguments": {}}</tool_call> <tool_call> {"name": "g"} </tool_call>!',
     [("f", {}), ("g", {})], "Hi.\n !"),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', [("f", {"x": 1})], ""),
    ("hermes", '<tool_call>{"type": "function", "function": {"name": "f", "parameters": {"x": null}}}</tool_call>',
     [("f", {"x": None})], ""),
    ("llama3_json", f'{{"name": "add", "parameters": {ADD_JSON}}}', [("add", ADD)], ""),
    ("llama3_json", f'<|python_tag|>{{"name": "add", "parameters": {ADD_RAW}}}', [("add", ADD)], ""),
    ("llama3_json", '{"name": "f", "parameters": {}}; {"name": "g", "parameters": {"x": 1}}',
     [("f", {}), ("g", {"x": 1})], ""),
    ("llama3_json", '\n\n { "type": "function", "name": "f", "parameters": {}}', [("f", {})], ""),
    ("llama3_json", 'Let me see. <|python_tag|>{"name": "f"}', [("f", {})], "Let me see. "),
    ("mistral", f'[TOOL_CALLS][{{"name": "add", "arguments": {ADD_JSON}}}]', [("add", ADD)], ""),
    ("mistral", 'Yes [TOOL_CALLS] [{"name": "f", "arguments": {}}, {"name": "g", "arguments": {"x": 1}}] so',
     [("f", {}), ("g", {"x": 1})], "Yes  so"),
    ("mistral", f"[TOOL_CALLS]add[ARGS]{ADD_JSON}", [("add", ADD)], ""),
    ("mistral", '[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"x": 1}[TOOL_CALLS]g{}', [("f", {"x": 1}), ("g", {})], ""),
    ("pythonic", "[f(a=1), g.h(b='x]\\'', c=[1, {'k': (True, None)}], d=-2.5e3)]",
     [("f", {"a": 1}), ("g.h", {"b": "x]'", "c": [1, {"k": [True, None]}], "d": -2500.0})], ""),
    ("pythonic", '<|python_start|>[f()]<|python_end|> ok', [("f", {})], " ok"),
    ("pythonic", ' [ f ( a = "é\\u00e9\\n" "z" , ) ] ', [("f", {"a": "éé\nz"})], " "),
]  # fmt: skip

PLAIN = [
    ("hermes", "a < b <tool> <tool_cal"),
    ("hermes", "The tag <tool_call> begins a call, it is said."),
    ("llama3_json", '{"answer": 3}'),
    ("llama3_json", '{"name": "Bob", "age": 3} is what I know'),
    ("llama3_json", '{"name": "Bo'),
    ("llama3_json", "  Use {braces} and <|python"),
    ("llama3_json", "<|python_tag|>print(1)"),
    ("llama3_json", "{ 1"),
    ("mistral", "see [TOOL_CALLS and [1]"),
    ("mistral", "the marker [TOOL_CALLS] is not a call"),
    ("mistral", "[TOOL_CALLS]"),
    ("pythonic", "[1] is a citation, [f(a=1)] comes too late"),
    ("pythonic", "[not a call]"),
    ("pythonic", "[f"),
]

MALFORMED = [
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>', "breaks off"),
    ("hermes", '<tool_call>{"name": "f", "arguments": {a: 1}}</tool_call>', "not valid"),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "1}}</tool_call>', "not valid"),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>', "NaN is not JSON"),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "not a JSON object"),
    ("hermes", '<tool_call>{"arguments": {}}</tool_call>', 'no "name"'),
    ("hermes", '<tool_call>{"name": "f"}}</tool_call>', "something else"),
    ("hermes", "<tool_call>f(1)</tool_call>", "must be followed by a JSON object"),
    ("hermes", '<tool_call>{"name": "f", "arg', "not closed"),
    ("hermes", '<tool_call>{"name": "f", "arguments": ' + "[" * 10_000 + "]" * 10_000 + "}</tool_call>", "nested"),
    ("hermes", '<tool_call>{"name": "f", "arguments": "' + "[" * 10_000 + '"}</tool_call>', "nested"),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": ' + "9" * 5000 + "}}</tool_call>", "not valid"),
    ("llama3_json", '{"name": "f", "parameters": {"a": 1', "not closed"),
    ("llama3_json", '<|python_tag|>{"name": "f"', "not closed"),
    ("llama3_json", '<|python_tag|>{"nam": "f"}', 'no "name"'),
    ("llama3_json", '{"name": "f", "parameters": {' + '"a": {' * 10_000 + "}" * 10_002, "nested"),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {}', "not closed"),
    ("mistral", "[TOOL_CALLS][]", "a call is a JSON object"),
    ("mistral", "[TOOL_CALLS]f[ARGS]{a}", "not valid"),
    ("pythonic", "[f(1)]", "named argument"),
    ("pythonic", "[f(a=1, a=2)]", "given twice"),
    ("pythonic", "[f(a=1", "not closed"),
    ("pythonic", "[f(a=__import__('os'))]", "literal"),
    ("pythonic", "[f(a=" + "(" * 10_000 + ")" * 10_000 + ")]", "nested"),
    ("pythonic", "[f(a=" + "9" * 5000 + ")]", "too long"),
    ("pythonic", "[f(a=1e999)]", "out of range"),
]


@pytest.mark.parametrize(("name", "text", "calls", "content"), WELL_FORMED)
def test_calls_are_found_whole_and_character_by_character(
    name: str, text: str, calls: list[tuple[str, Any]], content: str
) -> None:
    whole, split = parse(name, [text]), parse(name, list(text))
    assert whole.pairs == calls
    assert not whole.reasons
    assert whole.num_before_end == len(calls), "calls are known before the turn ends"
    assert whole.content == content
    assert split == whole
    assert [call.id for call in whole.calls][-1:] in ([f"call{len(calls) - 1:05d}"], ["call00000"])


@pytest.mark.parametrize(("name", "text"), PLAIN)
def test_text_that_is_no_call_is_content(name: str, text: str) -> None:
    for pieces in ([text], list(text)):
        parsed = parse(name, pieces)
        assert parsed.calls == []
        assert parsed.content == text


@pytest.mark.parametrize(("name", "text", "reason"), MALFORMED)
def test_a_malformed_call_is_reported_with_its_reason(name: str, text: str, reason: str) -> None:
    whole, split = parse(name, [text]), parse(name, list(text))
    assert len(whole.reasons) == 1 == len(whole.calls)
    assert reason in whole.reasons[0]
    assert split == whole
    assert whole.calls[0].name in ("f", "")


@pytest.mark.parametrize("name", PARSERS)
def test_after_a_malformed_call_the_next_turn_is_read(name: str) -> None:
    parser = make_parser(name)
    good = next(text for form, text, _, _ in WELL_FORMED if form == name)
    bad = next(text for form, text, _ in MALFORMED if form == name)
    first = parser.feed(bad) + parser.finish()
    parser.take_content()
    second = parser.feed(good)
    assert [type(call) for call in first + second[:1]] == [MalformedCall, ToolCall]
    assert first[0].id != second[0].id
    parser.feed("{" if name == "llama3_json" else "<tool_call>")
    parser.begin_turn()
    assert [c.name for c in parser.feed(good)] == [c.name for c in second]


def test_blocks_behind_an_unclosed_string_are_recovered() -> None:
    good = '<tool_call>{"name": "g", "arguments": {}}</tool_call>'
    parsed = parse("hermes", list('<tool_call>{"name": "f", "arguments": {"a": "}}</tool_call>' + "\n" + good))
    assert [(c.name, type(c)) for c in parsed.calls] == [("f", MalformedCall), ("g", ToolCall)]
    assert parsed.content == "\n"


def test_a_closing_tag_that_the_model_forgot() -> None:
    parsed = parse("hermes", ['<tool_call>{"name": "f", "arguments": {"a": 1}}\n'])
    assert parsed.pairs == [("f", {"a": 1})]
    assert parsed.num_before_end == 0


def test_ids_that_the_model_wrote_are_kept_once() -> None:
    block = '[TOOL_CALLS][{"name": "f", "arguments": {}, "id": "abc123DEF"}]'
    assert [c.id for c in parse("mistral", [block, block]).calls] == ["abc123DEF", "call00000"]


def test_given_ids() -> None:
    parser = make_parser("hermes", iter(["x", "y"]).__next__)
    assert [c.id for c in parser.feed('<tool_call>{"name": "f"}</tool_call>' * 2)] == ["x", "y"]


def test_lone_surrogates_do_not_come_through() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"\\udc00": ["a\\ud83d", "\\ud83d\\ude00"]}}</tool_call>'
    assert parse("hermes", [text]).pairs == [("f", {"\ufffd": ["a\ufffd", "😀"]})]
    assert read_python_calls("[f(a='\\ud83d')]") == [("f", {"a": "\ufffd"})]


FRAGMENTS = st.sampled_from(
    ["<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_start|>",
     "<|python_end|>", "{", "}", "[", "]", '"', "'", "\\", '\\"', ":", ",", ";", " ", "\n", "<", "(", ")", "=", "f",
     '{"name": "f", "arguments": {"a": "b"}}', '{"name": "f", "parameters": {}}', '"name"', '"arguments": {}',
     "f(a=1)", '[f(a="x")]', "1", "null", "é", "😀"]
)  # fmt: skip
TEXTS = st.lists(FRAGMENTS, max_size=24).map("".join)
CALLS = st.sampled_from([text for _, text, _, _ in WELL_FORMED])


@settings(max_examples=400, deadline=None)
@given(
    name=st.sampled_from(PARSERS), text=st.tuples(TEXTS, st.one_of(CALLS, TEXTS), TEXTS).map("".join), data=st.data()
)
@example(name="mistral", text="[TOOL_CALLS][TOOL_CALLS]f{}", data=None)
@example(name="hermes", text='<tool_call>{"a": "</tool_call>\n<tool_call>{"name": "f"}</tool_call>', data=None)
def test_any_cut_gives_the_same_calls_and_the_same_content(name: str, text: str, data: st.DataObject | None) -> None:
    whole = parse(name, [text])
    assert parse(name, list(text)) == whole
    if data is not None and text:
        cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert parse(name, pieces) == whole
    # Nothing is lost: whatever is neither content nor in a call's text is a separator or a closing marker.
    assert all(call.raw in text for call in whole.calls)
    assert len(whole.content) <= len(text)
    if not whole.calls:
        assert whole.content == text


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
ARGUMENTS = st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), VALUES, max_size=4)


@settings(max_examples=200, deadline=None)
@given(ARGUMENTS, st.booleans())
def test_every_json_value_comes_through(arguments: dict[str, Any], ascii_only: bool) -> None:
    body = json.dumps(arguments, ensure_ascii=ascii_only)
    for name, text in (
        ("hermes", f'<tool_call>{{"name": "f", "arguments": {body}}}</tool_call>'),
        ("llama3_json", f'{{"name": "f", "parameters": {body}}}'),
        ("mistral", f"[TOOL_CALLS]f[ARGS]{body}"),
    ):
        assert parse(name, list(text)).pairs == [("f", arguments)]


@settings(max_examples=200, deadline=None)
@given(ARGUMENTS)
def test_every_python_literal_comes_through(arguments: dict[str, Any]) -> None:
    text = "[f(" + ", ".join(f"{name}={value!r}" for name, value in arguments.items()) + ")]"
    assert read_python_calls(text) == [("f", arguments)]


MANY = 200_000
LONG = [
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "' + "x" * MANY + '"}}</tool_call>'),
    ("hermes", "<tool_call>{" * (MANY // 12)),
    ("hermes", "<tool_call>x" * (MANY // 12)),
    ("hermes", '<tool_call>{\\"</tool_call>' * (MANY // 26)),
    ("hermes", "<" * MANY),
    ("hermes", "<tool_call>" + " " * MANY),
    ("llama3_json", '{"name": "f", "parameters": {"a": "' + "\\n" * (MANY // 2) + '"}}'),
    ("llama3_json", '{"name": "f", "parameters": {}};' * (MANY // 32)),
    ("llama3_json", "{" + " " * MANY),
    ("mistral", "[TOOL_CALLS][" + '{"name": "f", "arguments": {}},' * (MANY // 31)),
    ("mistral", "[TOOL_CALLS]" * (MANY // 12)),
    ("mistral", "[TOOL_CALLS]" + "f" * MANY),
    ("pythonic", "[f(a='" + "x" * MANY + "')]"),
    ("pythonic", "[" + "f" * MANY),
    ("pythonic", "[f(a=" + "-" * MANY + "1)]"),
    ("pythonic", "[" + "f(a=1)," * (MANY // 7) + "]"),
]


@pytest.mark.parametrize(("name", "text"), LONG, ids=[f"{name}-{text[:20]}-{i}" for i, (name, text) in enumerate(LONG)])
def test_long_text_takes_a_moment_however_it_is_cut(name: str, text: str) -> None:
    for pieces in ([text], [text[i : i + 7] for i in range(0, len(text), 7)]):
        start = time.thread_time()
        parse(name, pieces)
        assert time.thread_time() - start < 3.0


def test_a_megabyte_split_at_every_character() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": "' + "x" * 1_000_000 + '"}}</tool_call>'
    start = time.thread_time()
    assert len(parse("hermes", list(text)).pairs) == 1
    assert time.thread_time() - start < 10.0


def test_nesting_counts_over_several_values() -> None:
    assert nesting('[] {"a": [[]]} "[[[["') == 3
    deep = "[" * MAX_NESTING + "]" * MAX_NESTING
    assert parse("llama3_json", [f'{{"name": "f", "parameters": {{"a": {deep}}}}}']).reasons
    deep = deep[2:-2]
    assert parse("llama3_json", [f'{{"name": "f", "parameters": {{"a": {deep}}}}}']).pairs


def test_unknown_format() -> None:
    with pytest.raises(ValueError, match="expected one of hermes, llama3_json, mistral, pythonic"):
        make_parser("xml")


def test_formats_are_detected_from_templates() -> None:
    assert detect_parser("{{ '<tool_call>' }}") == "hermes"
    assert detect_parser("{{ '<tool_call>\n<function=' }}") is None
    assert detect_parser("{{ '[TOOL_CALLS]' }}") == "mistral"
    assert detect_parser("{{ '<|python_start|>' }}") == "pythonic"
    assert detect_parser("{{ '<|python_tag|>' }}") == "llama3_json"
    assert detect_parser("{{ messages }}") is None


def test_calls_in_the_template_for_gemma_are_read_as_they_were_made() -> None:
    source = TEMPLATES["gemma3_pythonic"].read_text()
    name = detect_parser(source)
    assert name == "pythonic"
    arguments = {"word": 'say "é"\n</end>', "n": [1, -2.5, None, True], "deep": {"a b": {"c": False}}}
    made = [{"function": {"name": "shout", "arguments": arguments}}, {"function": {"name": "now", "arguments": {}}}]
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": made}]
    written = ChatTemplate(source, {"bos_token": "<bos>"}).render(turns, add_generation_prompt=False)
    text = written.rpartition("<start_of_turn>model\n")[2].removesuffix("<end_of_turn>\n")
    parsed = parse(name, [text])
    assert [(call.name, call.arguments) for call in parsed.calls if isinstance(call, ToolCall)] == [
        ("shout", arguments),
        ("now", {}),
    ]
    assert not parsed.content.strip()
