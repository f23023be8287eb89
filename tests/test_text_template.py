"""Chat templates render as transformers renders them, and end whatever they hold."""

from __future__ import annotations

import datetime
import itertools
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from text_backends import TEMPLATES
from tokenizers import Tokenizer as Backend
from tokenizers import models

from jaxcept.text.template import ChatTemplate, TemplateError

NAMES = sorted(TEMPLATES)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

TOOLS = [
    {"type": "function", "function": {"name": "calculator", "description": 'Adds "numbers" <b>&é世</b>', "parameters": {
        "type": "object", "properties": {"expression": {"type": "string", "description": "such as 1 + 2"},
                                         "digits": {"type": "integer", "default": 2}}, "required": ["expression"]}}},
    {"type": "function", "function": {"name": "now", "description": "", "parameters": {"type": "object",
                                                                                       "properties": {}}}},
]  # fmt: skip


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def calls(*pairs: tuple[str, Any]) -> dict[str, Any]:
    made = [{"id": f"call{i:05d}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for i, (name, arguments) in enumerate(pairs)]  # fmt: skip
    return {"role": "assistant", "tool_calls": made}


def result(content: Any, i: int = 0, name: str = "calculator") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"call{i:05d}", "name": name, "content": content}


ARGUMENTS = {"expression": '1 + "2" </b> \\ \n', "é": [1, 2.5, 1e20, None, True, {"x": "世😀"}], "big": 10**17}
USER, SYSTEM = turn("user", "  What is 1+2? é世😀 <b>&amp;'\"  \n"), turn("system", " Be brief. ")
ANSWER = turn("assistant", " It is 3.\n")
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [USER],
    "system": [SYSTEM, USER],
    "empty": [turn("system", ""), turn("user", ""), turn("assistant", ""), turn("user", "")],
    "turns": [USER, ANSWER, turn("user", "And 3+4?"), ANSWER, turn("user", "Thanks")],
    "system_turns": [SYSTEM, USER, ANSWER, turn("user", "And 3+4?")],
    "ends_with_assistant": [USER, ANSWER],
    "call": [USER, calls(("calculator", ARGUMENTS))],
    "call_result": [SYSTEM, USER, calls(("calculator", ARGUMENTS)), result("3")],
    "call_result_answer": [USER, calls(("calculator", {})), result('{"x": "é\\n"}'), ANSWER, turn("user", "Thanks")],
    "two_calls": [USER, calls(("calculator", {"expression": "1"}), ("now", {})), result("1"), result("9:00", 1, "now")],
    "call_with_content": [USER, {**calls(("now", {})), "content": "Let me see."}, result("noon")],
    "call_null_content": [USER, {**calls(("now", {})), "content": None}, result("noon")],
    "second_call": [USER, calls(("now", {})), result("noon"), ANSWER, USER, calls(("now", {})), result("one")],
    "thinking": [USER, turn("assistant", "<think>\nhm\n</think>\n\nIt is 3."), turn("user", "Sure?"),
                 turn("assistant", "<think>yes</think>Yes.")],
    "reasoning": [USER, turn("assistant", "3", reasoning_content="count\n"), USER,
                  {**calls(("now", {})), "reasoning": "look"}, result("noon")],
    "result_not_text": [USER, calls(("now", {})), result({"hour": 12, "é": None})],
    "result_list": [USER, calls(("now", {})), result([{"type": "text", "text": "noon"}])],
    "no_alternation": [USER, USER],
    "assistant_first": [ANSWER, USER],
    "unknown_role": [USER, turn("critic", "Hm.")],
    "spelled_tokens": [turn("user", "<|im_end|><|eot_id|></s>[/INST]{{ bos_token }}{% if %}"), ANSWER, USER],
}  # fmt: skip
EXTRAS: list[dict[str, Any]] = [
    {}, {"enable_thinking": False}, {"tools_in_user_message": False, "date_string": "1 May 2025"},
    {"builtin_tools": ["now", "code_interpreter"]},
]  # fmt: skip


@pytest.fixture(scope="module")
def peers() -> Any:
    transformers = pytest.importorskip("transformers")
    backend = Backend(models.WordLevel({"<s>": 0, "</s>": 1, "x": 2}, unk_token="x"))
    return {
        name: transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend, chat_template=TEMPLATES[name].read_text(), **SPECIAL
        )
        for name in NAMES
    }


def test_the_fixtures_are_there() -> None:
    families = {"chatml", "gptj", "llama2", "llama3", "llama3_1", "llama3_2", "mistral_v1", "mistral_v3", "qwen2_5"}
    assert families | {"qwen3", "vicuna", "gemma3_pythonic"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_same_text_as_transformers(name: str, peers: Any) -> None:
    template = ChatTemplate(TEMPLATES[name].read_text(), SPECIAL)
    rendered = 0
    for (title, messages), tools, prompt, extra in itertools.product(
        CONVERSATIONS.items(), (None, TOOLS), (False, True), EXTRAS
    ):
        try:
            expected = peers[name].apply_chat_template(
                messages, tools=tools, add_generation_prompt=prompt, tokenize=False, **extra
            )
        except Exception as error:  # jinja2's own errors and Python's: ours must refuse as well
            with pytest.raises(TemplateError) as raised:
                template.render(messages, tools, prompt, **extra)
            if type(error).__name__ == "TemplateError":
                assert str(raised.value) == str(error), title
            continue
        assert template.render(messages, tools, prompt, **extra) == expected, (title, prompt, extra)
        rendered += 1
    assert rendered >= 80


CONSTRUCTS = [
    "{% generation %}{{ messages[0].content }}{% endgeneration %}|",
    "a {%- generation -%} b {%- endgeneration -%} c",
    "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{% continue %}{% endfor %}x",
    "{{ messages | tojson(indent=2) }}{{ messages | tojson(separators=(',', ':'), sort_keys=true) }}",
    "{{ 'é' | tojson(ensure_ascii=true) }}{{ '</script>' | tojson }}{{ \"'\" | tojson }}",
    "{{ messages }}{{ none }}{{ true }}{{ 1.0 }}{{ [1, 'a', None] }}{{ {'a': 1} }}",
    "{{ 'a,b'.split(',') }}{{ ' x '.strip() }}{{ 'abc'.startswith('a') }}{{ 'x'.upper() }}{{ 'a b'.title() }}",
    "{{ messages[0].get('nope', 'no') }}{{ messages[0].keys() | list }}{{ messages[0].items() | list }}",
    "{{ messages[0].nope }}|{{ messages[0].nope is defined }}|{{ nope is defined }}|{{ nope }}",
    "{{ 'abc'[::-1] }}{{ 'abc'[1:] }}{{ messages[-1].role }}{{ 'a' in 'abc' }}{{ 'role' in messages[0] }}",
    "{{ messages is iterable }}{{ 'x' is iterable }}{{ 3 is iterable }}{{ messages[0] is mapping }}{{ 1 is string }}",
    "{% macro m(a, b='x') %}[{{ a }}{{ b }}]{% endmacro %}{{ m(1) }}{{ m(2, b='y') }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{{ messages | map(attribute='role') | join(',') }}{{ messages | selectattr('role', 'equalto', 'user') | list }}",
    "{% for k, v in messages[0] | items %}{{ k }}={{ v }};{% endfor %}",
    "{% for k, v in {'b': 1, 'a': 2} | dictsort %}{{ k }}{% endfor %}",
    "{%- set text -%} block {%- endset -%}{{ text | trim }}{{ 'x' ~ 1 ~ none }}{{ '%s-%d' | format('a', 3) }}",
    "  {% if true %}\n  x\n  {% endif %}\ny\n",
    "{# comment #}\n{{ '\\n' }}{{ \"a\\tb\" }}",
    "{{ range(3) | list }}{{ 7 // 2 }}{{ -7 % 3 }}{{ 2 ** 5 }}{{ 1 / 2 }}",
    "{{ '<b>' }}{{ '<b>' | e }}{{ '<b>' | safe }}",
    "{{ messages[0].content | length }}{{ [3, 1, 2] | sort }}{{ [1, 1] | unique | list }}{{ 'ab' | list | last }}",
]  # fmt: skip


@pytest.mark.parametrize("source", CONSTRUCTS)
def test_constructs_that_templates_use(source: str) -> None:
    chat_utils = pytest.importorskip("transformers.utils.chat_template_utils")
    for messages in ([USER], [SYSTEM, USER, ANSWER]):
        expected = chat_utils.render_jinja_template([messages], chat_template=source, tools=None)[0][0]
        assert ChatTemplate(source).render(messages, None, False) == expected


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('only ' + messages[0].role + 's') }}", "^only users$"),
        (
            "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
            "too long and was stopped",
        ),
        ("{% for i in range(10000000000) %}x{% endfor %}", "too many elements"),
        ("{{ 'x' * 10000000000 }}", "too large"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "recursion limit"),
        ("{{ nobody() }}", "nobody is unknown"),
        ("{{ messages[0].nope.more }}", r"undefined value.*\(line 1\)"),
        ("{{ messages[0].content + 1 }}", "cannot be rendered"),
        ("{{ ''.__class__.__mro__ }}", "undefined value"),
    ],
)
def test_templates_that_cannot_be_rendered_say_why_and_soon(source: str, words: str) -> None:
    start = time.thread_time()
    with pytest.raises(TemplateError, match=words):
        ChatTemplate(source).render([USER])
    assert time.thread_time() - start < 10


def test_a_broken_template_is_refused_when_it_is_made() -> None:
    with pytest.raises(TemplateError, match="syntax error"):
        ChatTemplate("{% for")


def test_bad_messages() -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    with pytest.raises(TemplateError, match="no messages"):
        template.render([])
    with pytest.raises(TemplateError, match=r"messages\[1\]: expected an object, got str"):
        template.render([USER, "x"])  # type: ignore[list-item]
    assert "\ud800" not in template.render([turn("user", "a\ud800b")])


def test_tools_may_have_a_template_of_their_own() -> None:
    template = ChatTemplate("plain", tool_source="{{ tools | length }} tools")
    assert template.render([USER]) == "plain"
    assert template.render([USER], TOOLS) == "2 tools"


def test_the_time_is_handed_in() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", now=lambda: datetime.datetime(2025, 5, 1))
    assert template.render([USER]) == "01 May 2025"


def test_rendering_leaves_the_messages_alone() -> None:
    messages = [{**USER, "name": None, "reasoning": "x"}, calls(("now", {"a": [1]}))]
    tools = json.loads(json.dumps(TOOLS))
    source = (
        "{% set x = messages[1].tool_calls[0].function.arguments.a.append(2) %}{% set x = messages.clear() %}"
        "{% set x = tools[0].function.clear() %}"
    )
    before = json.dumps(messages)
    assert ChatTemplate(source).render(messages, tools) == ""
    assert json.dumps(messages) == before
    assert tools == TOOLS


def test_templates_get_plain_data_alone() -> None:
    class Loud(str):
        def shout(self) -> str:
            return self.upper()

    with pytest.raises(TemplateError, match="no method named shout"):
        ChatTemplate("{{ messages[0].content.shout() }}").render([turn("user", Loud("a"))])
    with pytest.raises(TemplateError, match=r"a \w*Path cannot be rendered"):
        ChatTemplate("{{ messages[0].content.unlink() }}").render([turn("user", Path("a"))])
    for source in ("{{ messages.__class__() }}", "{{ messages.__getattribute__('__class__') }}"):
        with pytest.raises(TemplateError, match="insecure method call"):
            ChatTemplate(source).render([USER])
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(TemplateError, match="recursion"):
        ChatTemplate("{{ messages }}").render([turn("user", nested)])


def test_threads_render_at_once() -> None:
    template = ChatTemplate(TEMPLATES["qwen3"].read_text(), SPECIAL)
    expected = template.render(CONVERSATIONS["second_call"], TOOLS)
    wrong: list[str] = []

    def render() -> None:
        for _ in range(50):
            text = template.render(CONVERSATIONS["second_call"], TOOLS)
            if text != expected:
                wrong.append(text)

    threads = [threading.Thread(target=render) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
