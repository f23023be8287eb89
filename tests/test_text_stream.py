"""A stream of ids gives the text of all ids, whole characters at a time, and cheaply."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_backends import BACKENDS, LINES

from jaxcept.text.folder import TextFiles
from jaxcept.text.pieces import PieceKind, Pieces
from jaxcept.text.stream import StreamDecoder
from jaxcept.text.tokenizer import Tokenizer

TOKENIZERS = {name: Tokenizer(TextFiles(make())) for name, make in BACKENDS.items()}
EXACT = [name for name in TOKENIZERS if name != "word_piece"]
IDS = st.lists(st.integers(0, 460), max_size=30)
TEXTS = st.text(st.characters(codec="utf-8") | st.sampled_from("abc é世😀\u0301\u200d<>/"), max_size=30)


def stream(tokenizer: Tokenizer, ids: list[int], skip: bool = True) -> str:
    decoder = StreamDecoder(tokenizer, skip)
    return "".join([decoder.push(token_id) for token_id in ids]) + decoder.finish()


def test_the_kinds_are_known() -> None:
    kinds = {name: Pieces(make()).kind for name, make in BACKENDS.items()}
    sentence, other = PieceKind.SENTENCE, PieceKind.OTHER
    assert kinds == {"byte_level": PieceKind.BYTE_LEVEL, "byte_fallback": sentence, "word_piece": other,
                     "byte_fallback_without_prefix": sentence, "metaspace": sentence}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
@settings(max_examples=300, deadline=None)
@given(ids=IDS, skip=st.booleans())
def test_any_ids_give_the_text_of_the_whole(name: str, ids: list[int], skip: bool) -> None:
    tokenizer = TOKENIZERS[name]
    whole = tokenizer.decode(ids, skip)
    assert stream(tokenizer, ids, skip) == whole
    theirs = tokenizer._backend.decode(ids, skip_special_tokens=skip)
    if tokenizer._pieces.has_byte_tokens and "\ufffd" in theirs:
        # In a run of bytes that is no UTF-8 theirs shows no character at all; ours shows those that are whole.
        assert "\ufffd" in whole
    else:
        assert whole == theirs


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_any_text_comes_back_from_its_stream(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, add_special_tokens=False)
    for skip in (True, False):
        theirs = tokenizer._backend.decode(ids, skip_special_tokens=skip)
        assert stream(tokenizer, ids, skip) == theirs
    if name == "byte_level":
        assert tokenizer.decode(ids, False) == text


@pytest.mark.parametrize("name", EXACT)
@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_no_character_is_shown_before_it_is_whole(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    if "\ufffd" in text:
        return
    decoder = StreamDecoder(tokenizer, False)
    for token_id in tokenizer.encode(text, add_special_tokens=False):
        assert "\ufffd" not in decoder.push(token_id)
    assert decoder.finish() == ""


def test_half_characters() -> None:
    tokenizer = TOKENIZERS["byte_fallback"]
    euro = [tokenizer.token_id(f"<0x{byte:02X}>") or 0 for byte in "€".encode()]
    line = tokenizer.token_id("<0x0A>") or 0
    decoder = StreamDecoder(tokenizer, continues=True)
    assert [decoder.push(i) for i in [*euro, line, euro[0], euro[1], line]] == [
        "",
        "",
        "€",
        "\n",
        "",
        "",
        "\ufffd\ufffd\n",
    ]
    assert decoder.push(euro[0]) == ""
    assert decoder.finish() == "\ufffd"
    assert [decoder.push(i) for i in euro] == ["", "", "€"], "the stream may go on"
    bytes_alone = TOKENIZERS["byte_level"]
    ids = bytes_alone.encode("👍", add_special_tokens=False)
    decoder = StreamDecoder(bytes_alone)
    assert "".join(decoder.push(i) for i in ids[:-1]) == ""
    assert decoder.finish() == "\ufffd"


@pytest.mark.parametrize("name", ["byte_fallback", "metaspace"])
def test_the_first_space_is_the_tokenizers_own_unless_the_text_goes_on(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode("the fox", add_special_tokens=False)
    for continues, expected in ((False, "the fox"), (True, " the fox")):
        decoder = StreamDecoder(tokenizer, continues=continues)
        assert "".join(decoder.push(i) for i in ids) + decoder.finish() == expected


def test_special_tokens_are_skipped_but_for_those_kept() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("a<|im_end|>b<tool_call>c<|im_start|>", add_special_tokens=False)
    kept = tokenizer.ids_of(["<|im_start|>", "<nobody>"])
    for decoder, expected in (
        (StreamDecoder(tokenizer), "ab<tool_call>c"),
        (StreamDecoder(tokenizer, False), "a<|im_end|>b<tool_call>c<|im_start|>"),
        (StreamDecoder(tokenizer, keep=kept), "ab<tool_call>c<|im_start|>"),
    ):
        assert "".join(decoder.push(i) for i in ids) == expected


def test_ids_outside_of_the_vocabulary_add_nothing() -> None:
    for tokenizer in TOKENIZERS.values():
        assert stream(tokenizer, [tokenizer.vocab_size, 10**6]) == ""


def test_streams_of_other_decoders_hold_no_more_than_a_window() -> None:
    tokenizer = TOKENIZERS["word_piece"]
    ids = tokenizer.encode(LINES[0], add_special_tokens=False)
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(i) for i in ids]
    assert all(pieces)
    assert "".join(pieces) + decoder.finish() == tokenizer.decode(ids)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_push_costs_microseconds_however_long_the_text(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(" ".join(LINES), add_special_tokens=False) * 20
    decoder = StreamDecoder(tokenizer)
    start = time.perf_counter()
    for token_id in ids:
        decoder.push(token_id)
    per_push = (time.perf_counter() - start) / len(ids)
    assert per_push < (200e-6 if name == "word_piece" else 20e-6), "a loose bound: machines differ"
