"""Thoughts apart from speech, in any pieces; and what they mean for calls, grammars and drafts."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from jaxcept.build import constraint_maker, watcher_factory
from jaxcept.constraint import ToolChoice, ToolMode
from jaxcept.scheduler.params import SamplingParams, StructuredOutput
from jaxcept.session import InterceptOptions
from jaxcept.text.folder import TextFiles
from jaxcept.text.reasoning import (
    MARKERS,
    Thoughts,
    ThoughtSpans,
    detect_reasoning,
    make_thoughts,
    split_turn,
    without_spans,
)
from jaxcept.text.tokenizer import Tokenizer
from jaxcept.tools.definition import tool
from jaxcept.tools.toolbox import Toolbox
from jaxcept.watcher import TextWatcher

TURNS = [
    ("<think>\nhm, so\n\nit is\n</think>\n\nIt is 3.", "hm, so\n\nit is", "It is 3."),
    ("\n <think>hm</think>3", "hm", "3"),
    ("<think>\n\n</think>\n\n3", "", "3"),
    ("<think>\nfor ever\n", "for ever", ""),
    ("It is <think>3</think>.", "", "It is <think>3</think>."),
    ("<thinking> aloud", "", "<thinking> aloud"),
    ("<think>a</thin></think>b<think>c</think>", "a</thin>", "b<think>c</think>"),
    ("<tool_call>\n{}", "", "<tool_call>\n{}"),
    ("  \n", "", "  \n"),
    ("<thi", "", "<thi"),
    ("", "", ""),
]


def split(thoughts: Thoughts, pieces: Sequence[str]) -> tuple[str, str]:
    parts = [*(thoughts.feed(piece) for piece in pieces), thoughts.end_turn()]
    return "".join(part.thought for part in parts), "".join(part.said for part in parts)


@pytest.mark.parametrize(("text", "thought", "said"), TURNS)
@given(data=st.data())
def test_a_turn_in_any_pieces(text: str, thought: str, said: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=len(text))))
    pieces = [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert split(Thoughts(), pieces) == (thought, said)
    assert split_turn(text) == (thought, said)


def test_the_prompt_may_have_opened_the_thought_or_closed_it() -> None:
    thoughts = Thoughts()
    thoughts.begin_turn("<|im_start|>assistant\n<think>\n")
    assert thoughts.is_inside and split(thoughts, ["hm", "</thi", "nk>\n", "\n3"]) == ("hm", "3")
    thoughts.begin_turn("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not thoughts.is_inside and not thoughts.may_open
    assert split(thoughts, ["<think>", "3"]) == ("", "<think>3")
    thoughts.begin_turn("<|im_start|>assistant\n")
    assert thoughts.may_open and split(thoughts, ["<think>hm"]) == ("hm", "")
    assert split_turn("hm\n</think>\n\n3") == ("hm", "3")


def test_an_answer_in_the_midst_of_a_thought_leaves_it_open() -> None:
    thoughts = Thoughts()
    thoughts.feed("<think>let me see: ")
    thoughts.go_on("42, ")
    assert thoughts.is_inside and split(thoughts, ["so</think>42"]) == ("so", "42")
    thoughts.go_on("<tool_response>42</tool_response><|im_start|>assistant\n")
    assert thoughts.may_open


def test_formats() -> None:
    assert split(make_thoughts("deepseek_r1"), ["hm</think>3"]) == ("hm", "3")
    assert split(make_thoughts("qwen3"), ["hm</think>3"]) == ("", "hm</think>3")
    with pytest.raises(ValueError, match="expected one of qwen3, deepseek_r1"):
        make_thoughts("gpt")
    assert detect_reasoning("{% if '</think>' in content %}") == "qwen3"
    assert detect_reasoning("{{ content }}") is None


@pytest.fixture(scope="module", params=[True, False], ids=["tags are tokens", "tags are text"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_end|>"])
    if request.param:
        backend.add_tokens([AddedToken(marker, special=False) for marker in MARKERS])
    return Tokenizer(TextFiles(backend, {"eos_token": "<|im_end|>"}))


@tool
def shout(word: str) -> str:
    """Say it loudly."""
    return word.upper()


def make_watcher(
    tokenizer: Tokenizer, structured: StructuredOutput | None, choice: ToolChoice, toolbox: Toolbox | None = None
) -> TextWatcher:
    make = watcher_factory(tokenizer, "hermes", constraint_maker(tokenizer, "hermes"), "qwen3")
    return make(SamplingParams(structured=structured), InterceptOptions(tool_choice=choice), toolbox)


def allows(mask: bytes | None, token_id: int) -> bool:
    return mask is None or bool(mask[token_id // 8] >> token_id % 8 & 1)


def write(watcher: TextWatcher, tokenizer: Tokenizer, text: str) -> list[bytes | None]:
    """The masks before each token; every token must be allowed by its own."""
    masks = []
    for token_id in tokenizer.encode(text, add_special_tokens=False):
        masks.append(watcher.mask())
        assert allows(masks[-1], token_id), text
        assert watcher.push(token_id) is None
    return masks


NUMBER = StructuredOutput(json_schema={"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]})


def test_a_schema_binds_what_is_said(tokenizer: Tokenizer) -> None:
    tags = [tokenizer.token_id(marker) for marker in MARKERS]
    letter, brace = tokenizer.encode("x", False)[0], tokenizer.encode("{", False)[0]
    straight = make_watcher(tokenizer, NUMBER, ToolChoice())
    assert allows(straight.mask(), brace) and not allows(straight.mask(), letter)
    assert list(straight.forced()) == [], "it may still think"
    write(straight, tokenizer, '{"n": 3')
    if tags[0] is None:  # no single token opens a thought, so there is no room for one
        return
    assert tags[1] is not None
    thinker = make_watcher(tokenizer, NUMBER, ToolChoice())
    assert allows(thinker.mask(), tags[0]) and not allows(thinker.mask(), tags[1])
    assert write(thinker, tokenizer, '<think>x or {"n": y}?')[1:] == [None] * 14
    assert list(thinker.masks_behind([letter, letter])) == [None, None] and list(thinker.forced()) == []
    assert list(thinker.masks_behind([letter, tags[1], letter])) == [None], "what binds behind the tag is not known yet"
    write(thinker, tokenizer, "</think>")
    assert allows(thinker.mask(), brace) and not allows(thinker.mask(), letter) and not allows(thinker.mask(), tags[0])
    write(thinker, tokenizer, '{"n": 3')
    closing = tokenizer.encode("}", False)[0]
    assert allows(thinker.mask(), closing)


def test_a_call_in_a_thought_is_none(tokenizer: Tokenizer) -> None:
    call = '<tool_call>\n{"name": "shout", "arguments": {"word": "hi"}}\n</tool_call>'
    with Toolbox([shout]) as toolbox:
        watcher = make_watcher(tokenizer, None, ToolChoice(), toolbox)
        masks = write(watcher, tokenizer, f"<think>I could write {call} or <tool_call> nothing</think>No.")
        assert set(masks) == {None}, "no grammar binds a thought"
        assert watcher.end_of_turn() is None
        watcher = make_watcher(tokenizer, None, ToolChoice(), toolbox)
        masks = write(watcher, tokenizer, f"<think>{call}</think>\n\n{call}")
        assert any(masks), "the arguments are bound by their schema"
        verdict = watcher.end_of_turn()
        assert verdict is not None and len(verdict.payload.calls) == 1
        assert json.loads(json.dumps(verdict.payload.calls[0].arguments)) == {"word": "hi"}


def test_a_required_call_may_be_thought_about_first(tokenizer: Tokenizer) -> None:
    call = '<tool_call>\n{"name": "shout", "arguments": {"word": "hi"}}\n</tool_call>'
    with Toolbox([shout]) as toolbox:
        watcher = make_watcher(tokenizer, None, ToolChoice(ToolMode.REQUIRED), toolbox)
        if tokenizer.token_id(MARKERS[0]) is not None:
            write(watcher, tokenizer, "<think>hm</think>")
        assert not allows(watcher.mask(), tokenizer.encode("x", False)[0])
        write(watcher, tokenizer, call)
        assert watcher.end_of_turn() is not None


def spans_of(pieces: Sequence[str], begins_inside: bool = False) -> list[tuple[int, int]]:
    """The spans of one turn behind ten ids, of which the last one may be the tag; each piece is an id."""
    thoughts, spans = Thoughts(begins_inside), ThoughtSpans()
    spans.begin_turn(9 if begins_inside else 10, 10)
    for end, piece in enumerate(pieces, 11):
        was_speech = thoughts.is_over
        spans.take(piece, thoughts.feed(piece), was_speech, thoughts.is_inside, end)
    return spans.found


def test_spans_hold_the_thought_and_nothing_that_is_said() -> None:
    assert spans_of(["<think>", "hm", "</think>", "\n\n", "It", " is"]) == [(10, 14)]
    assert spans_of(["hm", "</think>", "It"], begins_inside=True) == [(9, 12)]
    assert spans_of(["<think>", "\n\n", "</think>", "\n\nIt"]) == [(10, 13)], "the break comes with a word"
    assert spans_of(["<think>", "hm", "</think>", "", "", "é"]) == [(10, 13)], "of three ids for one character"
    assert spans_of(["<think>", "hm", "</think>It"]) == [], "the tag comes with a word"
    assert spans_of(["<think>", "hm"]) == [], "it never ended"
    assert spans_of(["It", " is"]) == []
    assert without_spans(range(10), [(1, 3), (5, 6)]) == [0, 3, 4, 6, 7, 8, 9]
    assert without_spans([1, 2], []) == [1, 2]
