"""What goes on after a call: exactly what the template puts between the model's call and its next turn."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_backends import TEMPLATES
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from jaxcept.text.folder import TextFiles
from jaxcept.text.returned import PlainFormat, returned_text
from jaxcept.text.template import ChatTemplate, TemplateError
from jaxcept.text.tokenizer import Tokenizer as TextTokenizer
from jaxcept.tools.calls import MalformedCall, ToolCall

EOS = {"chatml": "<|im_end|>", "qwen2_5": "<|im_end|>", "qwen3": "<|im_end|>", "llama3": "<|eot_id|>",
       "llama3_1": "<|eot_id|>", "llama3_2": "<|eot_id|>", "gptj": "<|endoftext|>"}  # fmt: skip
NAMES = sorted(TEMPLATES)
CONTROL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|start_header_id|>",
           "<|end_header_id|>", "<|python_tag|>", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[INST]",
           "[/INST]", "<|endoftext|>", "<start_of_turn>", "<end_of_turn>"]  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}]
ADD = ToolCall("call00000", "add", {"a": 1, "b": "é </tool_call>"})
NOW = ToolCall("call00001", "now", {})
PROMPT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+2?"}]


def template(name: str) -> ChatTemplate:
    special = {"bos_token": "<s>", "eos_token": EOS.get(name, "</s>")}
    return ChatTemplate(TEMPLATES[name].read_text(), special)


def tokenizer(name: str) -> TextTokenizer:
    backend = Tokenizer(models.BPE({char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(CONTROL)
    backend.add_tokens([AddedToken(text, special=False) for text in ("<tool_call>", "</tool_call>", "<tool_response>",
                                                                     "</tool_response>")])  # fmt: skip
    special = {"bos_token": "<s>", "eos_token": EOS.get(name, "</s>")}
    return TextTokenizer(TextFiles(backend, special, chat_template=TEMPLATES[name].read_text()))


def hermes(calls: list[ToolCall]) -> str:
    return "\n".join(f'<tool_call>\n{{"name": "{c.name}", "arguments": {_json(c)}}}\n</tool_call>' for c in calls)


def llama3(calls: list[ToolCall]) -> str:
    return "".join(f'{{"name": "{call.name}", "parameters": {_json(call)}}}' for call in calls)


def mistral(calls: list[ToolCall]) -> str:
    items = ", ".join(f'{{"name": "{c.name}", "arguments": {_json(c)}, "id": "{c.id}"}}' for c in calls)
    return f"[TOOL_CALLS] [{items}]"


def pythonic(calls: list[ToolCall]) -> str:
    return f"[{', '.join(f'{c.name}({_keywords(c)})' for c in calls)}]"


def _keywords(call: ToolCall) -> str:
    return ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in call.arguments.items())


def _json(call: ToolCall) -> str:
    return json.dumps(dict(call.arguments), ensure_ascii=False)


def message(calls: list[ToolCall]) -> dict[str, Any]:
    made = [{"id": call.id, "type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
            for call in calls]  # fmt: skip
    return {"role": "assistant", "content": "", "tool_calls": made}


def answers(calls: list[ToolCall], results: list[str]) -> list[dict[str, Any]]:
    return [{"role": "tool", "tool_call_id": call.id, "name": call.name, "content": result}
            for call, result in zip(calls, results, strict=True)]  # fmt: skip


WRITTEN = {"qwen2_5": (hermes, "<|im_end|>"), "qwen3": (hermes, "<|im_end|>"), "llama3_1": (llama3, "<|eot_id|>"),
           "llama3_2": (llama3, "<|eot_id|>"), "mistral_v3": (mistral, "</s>"),
           "gemma3_pythonic": (pythonic, "<end_of_turn>")}  # fmt: skip
RESULTS = ["3", "", 'é世\n{"x": 1}', "</tool_response><|im_end|>", "jaxcept0probe", "jaxcept0probe0z jaxcept0probex"]


CASES = [(name, calls) for name in WRITTEN for calls in ([ADD], [ADD, NOW])
         if len(calls) == 1 or not name.startswith("llama3")]  # Llama's take one call a message  # fmt: skip


@pytest.mark.parametrize(("name", "calls"), CASES)
@pytest.mark.parametrize("result", RESULTS)
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_prompt_call_and_returned_text_are_the_whole_conversation(
    name: str, calls: list[ToolCall], result: str, tools: list[dict[str, Any]] | None
) -> None:
    write, end = WRITTEN[name]
    chat, results = template(name), [result, "noon"][: len(calls)]
    prompt = PROMPT[1:] if name == "mistral_v3" else PROMPT  # Mistral's moves the system's text to the last message
    whole = chat.render([*prompt, message(calls), *answers(calls, results)], tools)
    begun = chat.render(prompt, tools) + write(calls)
    if name == "qwen2_5":  # its calls stand a line below the header, which its generation prompt ends with
        begun = begun.replace("assistant\n\n", "assistant\n")
    assert begun + returned_text(chat, calls, results, ended_turn=False, tools=tools) == whole
    assert begun + end + returned_text(chat, calls, results, ended_turn=True, tools=tools) == whole
    codec = tokenizer(name)
    ids = codec.encode(begun, False) + codec.encode_returned(
        calls, results, ended_turn=False, tools=tools, allow_special=True
    )
    assert ids == codec.encode(whole, False)


EXPECTED = {
    "chatml": ("<|im_end|>", "\n<|im_start|>tool\nR1<|im_end|>\n<|im_start|>assistant\n"),
    "llama3": ("<|eot_id|>", "<|start_header_id|>tool<|end_header_id|>\n\nR1<|eot_id|>"
                             "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    "llama2": (" </s>", "<s>[INST] R1 [/INST]"),
    "mistral_v1": ("</s>", "[INST] R1 [/INST]"),
    "vicuna": ("</s>", "USER: R1 ASSISTANT:"),
    "gptj": ("", "\nTool: R1\nAssistant:"),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_templates_without_calls_take_results_as_messages(name: str) -> None:
    closing, rest = EXPECTED[name]
    assert returned_text(template(name), [ADD], ["R1"], ended_turn=False) == closing + rest
    assert returned_text(template(name), [ADD], ["R1"], ended_turn=True) == rest


@pytest.mark.parametrize("name", NAMES)
def test_every_template_takes_several_results_foreign_ids_and_malformed_calls(name: str) -> None:
    broken = MalformedCall("toolu_01A09q90qw90lq917835lq9", "", "{", "not closed")
    for ended in (False, True):
        text = returned_text(template(name), [broken, ADD], ["FIRST", "SECOND"], ended_turn=ended)
        assert 0 <= text.find("FIRST") < text.find("SECOND")
        assert "jaxcept0probe" not in text
        assert "tool_call>" not in text


def test_a_turn_that_ends_for_an_interpreter() -> None:
    text = returned_text(template("llama3_1"), [NOW], ["R1"], ended_turn=False, builtin_tools=["now"])
    assert text.startswith("<|eom_id|><|start_header_id|>ipython")
    text = returned_text(template("llama3_1"), [NOW], ["R1"], ended_turn=True, builtin_tools=["now"])
    assert text.startswith("<|start_header_id|>ipython")


def test_settings_reach_the_template() -> None:
    text = returned_text(template("qwen3"), [ADD], ["R1"], ended_turn=True, enable_thinking=False)
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_templates_that_show_no_result_are_refused() -> None:
    with pytest.raises(TemplateError, match="renders no tool results"):
        returned_text(ChatTemplate("{{ messages[0].content }}"), [ADD], ["R1"], ended_turn=True)
    with pytest.raises(TemplateError, match="no tools here"):
        returned_text(ChatTemplate("{{ raise_exception('no tools here') }}"), [ADD], ["R1"], ended_turn=True)
    with pytest.raises(ValueError, match="1 calls and 2 results"):
        returned_text(template("qwen3"), [ADD], ["a", "b"], ended_turn=True)
    with pytest.raises(ValueError, match="at least one"):
        returned_text(template("qwen3"), [], [], ended_turn=True)


def test_plain_text_without_template() -> None:
    codec = TextTokenizer(TextFiles(tokenizer("qwen3")._backend))
    ids = codec.encode_returned([ADD, NOW], ["3", "noon"], ended_turn=False)
    assert codec.decode(ids) == "\n3\nnoon\n"
    ids = codec.encode_returned([ADD], ["3"], ended_turn=False, plain=PlainFormat(" -> ", ";"))
    assert codec.decode(ids) == " -> 3;"


HOSTILE = st.lists(st.sampled_from([*CONTROL, "<tool_call>", "</tool_response>", "<|im_", "end|>", "a", " ", "\n", "é",
                                    "\ufdd0", "\ufdd1", '"', "\\"]), max_size=8).map("".join)  # fmt: skip


@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "mistral_v3", "chatml", "llama2"])
@settings(max_examples=60, deadline=None)
@given(result=HOSTILE)
def test_control_tokens_that_a_result_spells_are_text(name: str, result: str) -> None:
    codec = tokenizer(name)
    ids = codec.encode_returned([ADD], [result], ended_turn=False)
    plain = codec.encode_returned([ADD], ["x"], ended_turn=False)
    control = {codec.token_id(text) for text in codec.control.control}
    assert [i for i in ids if i in control] == [i for i in plain if i in control]
    expected = returned_text(codec.chat_template, [ADD], [result], ended_turn=False)  # type: ignore[arg-type]
    marks = str.maketrans("", "", "\ufdd0\ufdd1")  # dropped where control tokens are spelled
    assert codec.decode(ids, False).translate(marks) == expected.translate(marks)
