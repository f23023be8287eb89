"""What clients send becomes what templates take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from text_backends import BACKENDS

from jaxcept.text.folder import TextFiles
from jaxcept.text.messages import plain_messages
from jaxcept.text.template import ChatTemplate, TemplateError
from jaxcept.text.tokenizer import Tokenizer

TEMPLATES = Path(__file__).parent / "templates"
PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
LOOPS = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "[{{ p.text }}]{% endfor %}{% endif %}{% endfor %}"
)


def call(arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"id": "1", "type": "function",
                                                 "function": {"name": "f", "arguments": arguments}}]}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "expected"),
    [('{"a": 1}', {"a": 1}), ({"a": 1}, {"a": 1}), ("", {}), (None, {}), ("{", "{"), ("[1]", "[1]"),
     ("[" * 100_000, "[" * 100_000)],
)  # fmt: skip
def test_arguments_become_objects(given: Any, expected: Any) -> None:
    message = call(given)
    plain = plain_messages([message])[0]
    assert plain["tool_calls"][0]["function"] == {"name": "f", "arguments": expected}
    assert message == call(given), "the client's message is left alone"


def test_parts_become_text() -> None:
    assert plain_messages([{"role": "user", "content": [*PARTS, "c"]}])[0]["content"] == "a\nb\nc"
    assert plain_messages([{"role": "user", "content": PARTS}], keep_parts=True)[0]["content"] == PARTS
    assert plain_messages([{"role": "user", "content": []}])[0]["content"] == ""
    assert "tool_calls" not in plain_messages([{"role": "assistant", "content": "x", "tool_calls": []}])[0]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("x", r"messages\[0\]: expected an object with a role"),
        ({"content": "x"}, r"messages\[0\]: expected an object with a role"),
        ({"role": "user", "content": [{"type": "image_url"}]}, r"messages\[0\]\.content\[0\]: .* got 'image_url'"),
        ({"role": "user", "content": [{"type": "text"}]}, r"content\[0\]"),
        ({"role": "user", "content": [3]}, r"content\[0\]: .* got None"),
        ({"role": "assistant", "tool_calls": {}}, r"messages\[0\]\.tool_calls: expected a list, got dict"),
        ({"role": "assistant", "tool_calls": [{}]}, r"tool_calls\[0\]: expected an object with function\.name"),
    ],
)
def test_what_no_template_takes_is_named(message: Any, words: str) -> None:
    with pytest.raises(TemplateError, match=words):
        plain_messages([message])


def test_templates_that_take_parts_are_told_from_those_that_do_not() -> None:
    assert ChatTemplate(LOOPS).takes_parts
    for path in sorted(TEMPLATES.glob("*.jinja")):
        assert not ChatTemplate(path.read_text(), {"bos_token": "<s>", "eos_token": "</s>"}).takes_parts, path.name


@pytest.mark.parametrize(("source", "text"), [(LOOPS, "[a][b]"), ("{{ messages[0].content }}", "a\nb")])
def test_a_chat_in_parts_is_encoded(source: str, text: str) -> None:
    tokenizer = Tokenizer(TextFiles(BACKENDS["byte_level"](), chat_template=source))
    assert tokenizer.decode(tokenizer.encode_chat([{"role": "user", "content": PARTS}])) == text


def test_calls_that_a_client_sends_back_are_rendered_once() -> None:
    source = (TEMPLATES / "qwen2_5.jinja").read_text()
    tokenizer = Tokenizer(TextFiles(BACKENDS["byte_level"](), chat_template=source))
    for arguments in ('{"a": "é"}', {"a": "é"}):
        text = tokenizer.decode(tokenizer.encode_chat([{"role": "user", "content": "x"}, call(arguments)]), False)
        assert '{"name": "f", "arguments": {"a": "é"}}' in text
