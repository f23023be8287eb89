"""The shipped model is a Hugging Face folder, its data keep training and test apart, and it uses tools rightly."""

import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import minijinja
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from examples.shipped_model import data, evaluate, phrases
from examples.shipped_model.network import Shape, forward
from examples.shipped_model.source import is_reserved
from examples.shipped_model.tokenizer import MARKERS, TEMPLATE_FILE
from examples.shipped_model.train import Encoder, load_checkpoint, make_optimizer, save_checkpoint
from jaxcept.tools.builtin import TABLE

FOLDER = Path(__file__).parents[1] / "models/jaxcept_models/shipped"
WEATHER = data.tool_schema("weather", ("city",))
CALL = {
    "id": "1",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Rio", "days": 2, "now": True}},
}
CONVERSATIONS: list[tuple[list[data.Message], list[dict[str, Any]] | None]] = [
    ([{"role": "user", "content": "hi"}], None),
    ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}], None),
    ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}], [WEATHER]),
    (
        [{"role": "user", "content": "naïve <b>'quotes'</b> & \"more\"\n\n  🙂 "}],
        [WEATHER, data.tool_schema("now", ())],
    ),
    ([{"role": "user", "content": "hi"}], [{"type": "function", "function": {"name": "bare"}}]),
    (
        [
            {"role": "user", "content": "weather"},
            {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
            {"role": "tool", "tool_call_id": "1", "content": "sun"},
            {"role": "tool", "tool_call_id": "1", "content": "rain"},
            {"role": "assistant", "content": "Sun, then rain."},
            {"role": "user", "content": "thanks"},
        ],
        [WEATHER],
    ),
    (
        [
            {"role": "user", "content": "weather"},
            {
                "role": "assistant",
                "content": "Let me see.",
                "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rio"}'}}],
            },
            {"role": "tool", "content": "sun"},
        ],
        [WEATHER],
    ),
    (
        [
            {"role": "user", "content": "nested"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"function": {"name": "f", "arguments": {"a": ['"\\', 1.5, None, {"b": "x\ny"}], "c": {}}}}
                ],
            },
        ],
        None,
    ),
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER)


def test_the_folder_is_small() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 12_000_000
    num_parameters = sum(array.size for array in load_file(FOLDER / "model.safetensors").values())
    assert 2_000_000 <= num_parameters <= 4_000_000


@given(text=st.text())
def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == text
    assert all(0 <= token_id < len(tokenizer) for token_id in token_ids)


def test_each_digit_is_a_token(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.tokenize("1234567890") == list("1234567890")
    assert [token for token in tokenizer.get_vocab() if len(token) > 1 and any(c.isdigit() for c in token)] == []


def test_markers_are_one_visible_token_each(tokenizer: PreTrainedTokenizerBase) -> None:
    for marker in MARKERS:
        token_ids = tokenizer.encode(f"1{marker}2", add_special_tokens=False)
        assert len(token_ids) == 3
        assert tokenizer.decode(token_ids, skip_special_tokens=True) == f"1{marker}2"


def test_the_shipped_template_is_the_one_of_the_training(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.chat_template == TEMPLATE_FILE.read_text(encoding="utf-8")
    assert tokenizer.eos_token == "<|im_end|>"
    assert json.loads((FOLDER / "generation_config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize(("messages", "tools"), CONVERSATIONS)
def test_the_template_renders_equal_in_minijinja(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[data.Message],
    tools: list[dict[str, Any]] | None,
    add_generation_prompt: bool,
) -> None:
    values = {"tools": tools, "add_generation_prompt": add_generation_prompt}
    expected = tokenizer.apply_chat_template(messages, tokenize=False, **values)
    environment = minijinja.Environment(trim_blocks=True, lstrip_blocks=True)
    assert environment.render_str(tokenizer.chat_template, messages=messages, **values) == expected


def test_a_rendered_conversation_reads_as_it_should(tokenizer: PreTrainedTokenizerBase) -> None:
    messages, tools = CONVERSATIONS[5]
    assert tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nTools: weather(city)<|im_end|>\n"
        "<|im_start|>user\nweather<|im_end|>\n"
        "<|im_start|>assistant\n"
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Rio", "days": 2, "now": true}}\n</tool_call>\n'
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Rio", "days": 2, "now": true}}\n</tool_call>'
        "<|im_end|>\n"
        "<|im_start|>tool\n<tool_response>\nsun\n</tool_response>\n<tool_response>\nrain\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\nSun, then rain.<|im_end|>\n"
        "<|im_start|>user\nthanks<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    nested, _ = CONVERSATIONS[7]
    body = (
        tokenizer.apply_chat_template(nested, tokenize=False)
        .partition("<tool_call>\n")[2]
        .partition("\n</tool_call>")[0]
    )
    assert json.loads(body) == nested[1]["tool_calls"][0]["function"]


def test_held_out_and_training_data_share_no_phrasing_number_or_name() -> None:
    kept_back = data.held_out(evaluate.TEST_SEED, 500)
    trained = list(itertools.islice(data.training(0), 3000))
    empty = {"", "?", "."}
    used = frozenset().union(*(c.phrasings for c in trained)) - empty
    held_out_used = frozenset().union(*(c.phrasings for c in kept_back)) - empty
    assert len(used) > 300
    assert len(held_out_used) > 80
    assert not used & held_out_used
    assert not {c.prompt[-1]["content"] for c in trained} & {c.prompt[-1]["content"] for c in kept_back}
    for conversations, reserved in ((trained, False), (kept_back, True)):
        names = [a["entity"].lower() for c in conversations for a in _arguments(c) if "entity" in a]
        assert len(names) > 50
        assert all(is_reserved(word) == reserved for name in names for word in _names(name))


def test_numbers_of_two_digits_or_more_are_on_one_side_only() -> None:
    for conversations, reserved in ((itertools.islice(data.training(3), 2000), False), (data.held_out(3, 500), True)):
        values = [str(a["value"]) for c in conversations for a in _arguments(c) if "value" in a]
        long_values = [text.lstrip("-") for text in values if len(text.lstrip("-")) > 1]
        assert len(long_values) > 50
        assert all(is_reserved(text) == reserved for text in long_values)


def test_every_kind_of_request_is_held_out_too() -> None:
    conversations = data.held_out(evaluate.TEST_SEED, 500)
    assert {c.kind for c in conversations} == set(data.KINDS)
    assert conversations == data.held_out(evaluate.TEST_SEED, 500)
    assert conversations != data.held_out(evaluate.TEST_SEED + 1, 500)
    for conversation in conversations:
        assert conversation.prompt[-1]["role"] == "user"
        final = conversation.messages[-1]["content"]
        assert evaluate.is_right(conversation, evaluate.Answer(final, list(conversation.tool_names)))
        assert not evaluate.is_right(conversation, evaluate.Answer("42 is it", list(conversation.tool_names)))
        for call in conversation.calls:
            assert evaluate.run_tool(conversation, call.name, call.arguments) == call.response


@pytest.mark.parametrize(
    ("expected", "text", "right"),
    [
        ("3367", "37 * 91 = 3367.", True),
        ("3367", "37 * 91 = 33670.", False),
        ("3367", "37 * 91 = 3367.5.", False),
        ("3367", "37 * 91 = -3367.", False),
        ("3367", "37 * 91 = 1.3367.", False),
        ("-54", "400 - 454 = -54.", True),
    ],
)
def test_a_number_is_right_only_as_a_whole(expected: str, text: str, right: bool) -> None:
    conversation = data.Conversation("arithmetic", [], [], 0, (expected,), (), frozenset())
    assert evaluate.is_right(conversation, evaluate.Answer(text)) is right


def test_only_what_the_assistant_writes_is_trained(tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = Encoder(tokenizer.backend_tokenizer)
    conversation = next(c for c in data.training(0) if c.kind == "chained" and c.num_prompt_messages == 1)
    ((token_ids, written, _),) = encoder.rows([conversation])
    first, second = (
        f'{{"name": "calculator", "arguments": {json.dumps(call.arguments)}}}' for call in conversation.calls
    )
    expected = "".join(f"<tool_call>\n{call}\n</tool_call><|im_end|>" for call in (first, second))
    final = f"{conversation.messages[-1]['content']}<|im_end|>"
    assert tokenizer.decode(token_ids[written], skip_special_tokens=False) == expected + final


def test_the_training_forward_pass_agrees_with_transformers() -> None:
    weights = {name: jnp.asarray(array) for name, array in load_file(FOLDER / "model.safetensors").items()}
    config = json.loads((FOLDER / "config.json").read_text())
    shape = Shape(**{name: config[name] for name in Shape.__slots__})
    token_ids = np.random.default_rng(0).integers(0, shape.vocab_size, (2, 96)).astype(np.int32)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="float32")
    with torch.no_grad():
        expected = model(torch.from_numpy(token_ids.astype(np.int64))).logits.numpy()
    logits = np.asarray(jax.jit(forward, static_argnums=2)(weights, jnp.asarray(token_ids), shape))
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_a_checkpoint_comes_back_whole(tmp_path: Path) -> None:
    weights = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3)}
    state = make_optimizer(1e-3, 100).init(weights)
    empty = jax.tree.map(jnp.zeros_like, (weights, state))
    save_checkpoint(tmp_path / "checkpoint.npz", weights, state, {"step": 7})
    *loaded, position = load_checkpoint(tmp_path / "checkpoint.npz", *empty)
    assert position == {"step": 7}
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), tuple(loaded), (weights, state)))


def test_held_out_prompts_are_answered_rightly() -> None:
    conversations = data.held_out(evaluate.TEST_SEED, 12)
    answers = evaluate.TransformersEngine(FOLDER).answer(conversations)
    right = [evaluate.is_right(c, a) for c, a in zip(conversations, answers, strict=True)]
    assert sum(right) >= 10, [a.text for a, good in zip(answers, right, strict=True) if not good]


def _arguments(conversation: data.Conversation) -> list[dict[str, Any]]:
    calls = [call for message in conversation.messages for call in message.get("tool_calls", [])]
    return [call["function"]["arguments"] for call in calls]


def _names(entity: str) -> list[str]:
    """A real name counts as a whole, a made-up one by its words."""
    return [entity] if entity in {name.lower() for name in TABLE} else entity.split()


def test_phrasings_are_kept_apart() -> None:
    for choice in vars(phrases).values():
        for one in choice.values() if isinstance(choice, dict) else (choice,):
            if isinstance(one, phrases.Phrases) and one is not phrases.OPENERS and one is not phrases.CLOSERS:
                assert not set(one.train) & set(one.held_out)
