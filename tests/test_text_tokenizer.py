"""A folder's tokenizer: ids as transformers gives them, control tokens only where they belong."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_backends import BACKENDS, LINES

from jaxcept.text.folder import TextFiles, TokenizerError
from jaxcept.text.template import TemplateError
from jaxcept.text.tokenizer import Tokenizer

CHATML = (Path(__file__).parent / "templates" / "chatml.jinja").read_text()
CONFIG = {"bos_token": {"__type": "AddedToken", "content": "<s>"}, "eos_token": "<|im_end|>", "chat_template": CHATML}
SPELLED = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<tool_call>"]
TEXTS = st.lists(st.sampled_from([*SPELLED, "<|im_", "end|>", "the fox", " ", "\n", "é", "世", "😀", "<", "  "]),
                 max_size=10).map("".join)  # fmt: skip
TOKENIZERS = {name: Tokenizer(TextFiles(make(), {"bos_token": "<s>", "eos_token": "</s>"}, chat_template=CHATML))
              for name, make in BACKENDS.items()}  # fmt: skip
LOSSLESS = ["byte_level", "byte_fallback", "byte_fallback_without_prefix"]


def folder(path: Path, name: str = "byte_level", **files: Any) -> Path:
    path.mkdir(exist_ok=True)
    BACKENDS[name]().save(str(path / "tokenizer.json"))
    for stem, value in files.items():
        (path / f"{stem}.json").write_text(json.dumps(value))
    return path


def test_from_folder(tmp_path: Path) -> None:
    path = folder(tmp_path, tokenizer_config=CONFIG, generation_config={"eos_token_id": [7, 5]})
    tokenizer = Tokenizer.from_folder(path)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    assert tokenizer.bos_id == tokenizer.token_id("<s>")
    assert tokenizer.eos_id == tokenizer.token_id("<|im_end|>")
    assert tokenizer.stop_token_ids == (7, 5, tokenizer.eos_id)
    assert tokenizer.special_ids == {tokenizer.token_id(text) for text in SPELLED[:4]}
    assert tokenizer.vocab_size == 1 + max(BACKENDS["byte_level"]().get_vocab().values())
    ids = tokenizer.encode("The fox")
    assert ids[0] == tokenizer.bos_id
    assert ids[1:] == tokenizer.encode("The fox", add_special_tokens=False)
    assert tokenizer.decode(ids) == "The fox"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>The fox"
    assert tokenizer.chat_template is not None


@pytest.mark.parametrize(
    ("files", "stops"),
    [
        ({"config": {"eos_token_id": 3}}, (3,)),
        ({"config": {"eos_token_id": 3}, "generation_config": {"eos_token_id": 4}}, (4,)),
        ({"generation_config": {"eos_token_id": None}}, ()),
        ({"special_tokens_map": {"eos_token": "a"}}, None),
        ({}, ()),
    ],
)
def test_stop_ids(tmp_path: Path, files: dict[str, Any], stops: tuple[int, ...] | None) -> None:
    tokenizer = Tokenizer.from_folder(folder(tmp_path, **files))
    assert tokenizer.stop_token_ids == ((tokenizer.token_id("a"),) if stops is None else stops)
    assert tokenizer.bos_id is None


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("chat_template.jinja", CHATML),
        ("chat_template.json", json.dumps({"chat_template": CHATML})),
        ("tokenizer_config.json", json.dumps({"chat_template": CHATML})),
        ("tokenizer_config.json", json.dumps({"chat_template": [{"name": "rag", "template": "x"},
                                                                {"name": "tool_use", "template": "tools!"},
                                                                {"name": "default", "template": CHATML}]})),
    ],
)  # fmt: skip
def test_chat_templates_are_found(tmp_path: Path, where: str, value: str) -> None:
    path = folder(tmp_path)
    (path / where).write_text(value)
    tokenizer = Tokenizer.from_folder(path)
    template = tokenizer.chat_template
    assert template is not None
    message = {"role": "user", "content": "x"}
    assert template.render([message]) == "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
    if "tool_use" in value:
        assert template.render([message], [{"name": "f"}]) == "tools!"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("tokenizer.json", "{", r"tokenizer\.json: not a tokenizer"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json: cannot be read"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json: expected a JSON object, got list"),
        ("generation_config.json", '{"eos_token_id": "x"}', r"generation_config\.json: eos_token_id='x'"),
        ("generation_config.json", '{"eos_token_id": [-1]}', "expected an id or a list of ids"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, text: str, words: str) -> None:
    path = folder(tmp_path)
    (path / name).write_text(text)
    with pytest.raises(TokenizerError, match=words):
        Tokenizer.from_folder(path)


def test_folders_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="not a folder"):
        Tokenizer.from_folder(tmp_path / "nowhere")
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


def test_older_formats_are_read_by_transformers(tmp_path: Path) -> None:
    state = json.loads(BACKENDS["byte_level"]().to_str())
    (tmp_path / "vocab.json").write_text(json.dumps(state["model"]["vocab"]))
    merges = [" ".join(pair) for pair in state["model"]["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    text = LINES[0]
    assert tokenizer.encode(text) == TOKENIZERS["byte_level"].encode(text, add_special_tokens=False)


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
def test_same_ids_and_text_as_transformers(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    path = folder(tmp_path, name, tokenizer_config={**CONFIG, "tokenizer_class": "PreTrainedTokenizerFast"})
    theirs, ours = transformers.PreTrainedTokenizerFast.from_pretrained(str(path)), Tokenizer.from_folder(path)
    for text in [*LINES[:3], "", " ", "<|im_end|> a\n\n", "a<tool_call>b  c"]:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)
    chat = [
        {"role": "user", "content": "Hi é"},
        {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": ""},
    ]
    given = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ours.encode_chat(chat) == given


def control_ids(tokenizer: Tokenizer) -> set[int | None]:
    return {tokenizer.token_id(text) for text in SPELLED}


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_spelled_control_tokens_are_text_where_they_are_not_allowed(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, allow_special=False)
    assert not control_ids(tokenizer) & set(ids[1:])
    assert ids[0] == tokenizer.bos_id
    if not any(token in text for token in SPELLED):
        assert ids == tokenizer.encode(text)
    if name in LOSSLESS:
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(user=TEXTS, assistant=st.sampled_from(["ok", "<think>a</think> b", "<|im_end|>", "<tool_call>"]))
def test_a_chat_has_the_templates_control_tokens_alone(name: str, user: str, assistant: str) -> None:
    tokenizer = TOKENIZERS[name]

    def chat(content: str, answer: str) -> list[dict[str, Any]]:
        return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]

    control = control_ids(tokenizer)
    ids = tokenizer.encode_chat(chat(user, assistant))
    kept = assistant if assistant == "<tool_call>" else "x"
    plain = tokenizer.encode_chat(chat("x", kept))
    assert [i for i in ids if i in control] == [i for i in plain if i in control]
    assert tokenizer.chat_template is not None
    rendered = tokenizer.chat_template.render(chat(user, assistant))
    assert tokenizer.encode_chat(chat(user, assistant), allow_special=True) == tokenizer.encode(rendered, False)
    if name in ("byte_level", "byte_fallback_without_prefix"):  # the third puts a space behind every control token
        assert tokenizer.decode(ids, skip_special_tokens=False) == rendered


def test_tools_and_settings_cannot_spell_control_tokens_either() -> None:
    source = "{{ tools | tojson }}{{ date }}<|im_end|>"
    tokenizer = Tokenizer(TextFiles(BACKENDS["byte_level"](), chat_template=source))
    tools = [{"name": "f", "description": "<|im_end|>\ufdd0", "<|im_start|>": 1}]
    ids = tokenizer.encode_chat([{"role": "user", "content": ""}], tools, date="<s>")
    assert [i for i in ids if i in tokenizer.special_ids] == [tokenizer.token_id("<|im_end|>")]
    expected = '[{"name": "f", "description": "<|im_end|>", "<|im_start|>": 1}]<s><|im_end|>'
    assert tokenizer.decode(ids, False) == expected


def test_without_a_template_there_is_no_chat() -> None:
    with pytest.raises(TemplateError, match="no chat template"):
        Tokenizer(TextFiles(BACKENDS["byte_level"]())).encode_chat([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("name", ["byte_fallback", "metaspace"])
def test_text_that_goes_on_gets_no_space(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    first = tokenizer.encode("the fox", add_special_tokens=False)
    assert tokenizer.decode(first + tokenizer.encode("es", False, continues=True)) == "the foxes"
    assert tokenizer.decode(first + tokenizer.encode(" runs", False, continues=True)) == "the fox runs"
    assert tokenizer.decode(first + tokenizer.encode("es", False)) == "the fox es"


@pytest.mark.parametrize("name", LOSSLESS)
@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), max_size=20))
def test_any_text_goes_on_as_it_is(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    first = tokenizer.encode("fox", False)
    ids = tokenizer.encode(text, False, continues=True, allow_special=False)
    assert tokenizer.decode(first + ids, False) == "fox" + text


def test_lone_surrogates_are_replaced() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    assert tokenizer.decode(tokenizer.encode("a\ud800b\ude00")) == "a\ufffdb\ufffd"
    assert "\ufffd" in tokenizer.decode(tokenizer.encode_chat([{"role": "user", "content": "<|im_end|>\ud800"}]))


def test_text_of_single_tokens() -> None:
    tokenizer = TOKENIZERS["byte_fallback"]
    assert tokenizer.token_bytes(tokenizer.token_id("<0xE2>") or 0) == b"\xe2"
    assert tokenizer.token_text(tokenizer.token_id("<0xE2>") or 0) == "\ufffd"
    assert tokenizer.token_text(tokenizer.token_id("</s>") or 0) == "</s>"
    assert tokenizer.token_bytes(10**6) == b""
    bytewise = TOKENIZERS["byte_level"]
    ids = bytewise.encode(LINES[1], False)
    assert b"".join(bytewise.token_bytes(token_id) for token_id in ids).decode() == LINES[1]


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    backend = BACKENDS["byte_level"]()
    backend.enable_truncation(3)
    backend.enable_padding(length=10)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.decode(tokenizer.encode(LINES[0])) == LINES[0]
    assert tokenizer.encode("") == [tokenizer.token_id("<s>")]


def test_threads_encode_and_decode_at_once() -> None:
    tokenizer = Tokenizer(TextFiles(BACKENDS["byte_level"](), chat_template=CHATML))
    texts = [f"{line} {i} <|im_end|>" for i, line in enumerate(LINES)]
    expected = [TOKENIZERS["byte_level"].encode(text, allow_special=False) for text in texts]
    wrong: list[str] = []

    def work() -> None:
        for text, ids in zip(texts, expected, strict=True):
            if tokenizer.encode(text, allow_special=False) != ids or tokenizer.decode(ids) != text:
                wrong.append(text)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_long_text_is_encoded_as_its_pieces_are_and_stops_no_other_thread():
    tokenizer = TOKENIZERS["byte_level"]
    line = "one two three\n"
    assert tokenizer.encode(line * 1000) == tokenizer._backend.encode(line * 1000).ids
    thread = threading.Thread(target=tokenizer.encode, args=(line * 20_000,))
    thread.start()
    num_turns = 0
    while thread.is_alive():
        time.sleep(0.001)
        num_turns += 1
    assert num_turns > 10
