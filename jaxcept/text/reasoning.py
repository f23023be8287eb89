"""What a model thinks before it speaks, told apart from what it says: <think>…</think> at the beginning of a turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import Enum, auto
from typing import NamedTuple

OPEN, CLOSE = "<think>", "</think>"
MARKERS = (OPEN, CLOSE)


class Split(NamedTuple):
    """A piece of a turn."""

    thought: str = ""
    said: str = ""


class _At(Enum):
    BEGINNING = auto()  # nothing but white space so far
    THOUGHT = auto()
    GAP = auto()  # behind the closing tag, before the first word
    SPEECH = auto()


class Thoughts:
    """Splits one turn after another, from text that arrives in any pieces. Line breaks around the tags are left out.

    `begins_inside`: a turn is thought until a closing tag says otherwise, as the first models of this kind had it.
    """

    def __init__(self, begins_inside: bool = False) -> None:
        self._first = _At.THOUGHT if begins_inside else _At.BEGINNING
        self._at = self._first
        self._held = ""  # not certain yet what it belongs to
        self._has_begun = False  # a thought has, with a word

    def begin_turn(self, prompt_end: str = "") -> None:
        """What follows is a turn. The prompt's end may have opened a thought already, or closed an empty one."""
        end = prompt_end.rstrip()
        self._at = _At.THOUGHT if end.endswith(OPEN) else _At.SPEECH if end.endswith(CLOSE) else self._first
        self._held, self._has_begun = "", False

    def go_on(self, returned: str) -> None:
        """A tool's answer came in between: a new turn begins behind it, or a thought goes on."""
        if self.is_inside:
            self.feed(returned)
        else:
            self.begin_turn(returned)

    @property
    def is_inside(self) -> bool:
        """Whether what comes next is thought."""
        return self._at is _At.THOUGHT

    @property
    def may_open(self) -> bool:
        """Whether the turn may still begin with a thought."""
        return self._at is _At.BEGINNING

    @property
    def is_over(self) -> bool:
        """Whether what comes next is surely said."""
        return not (self.is_inside or self.may_open)

    def feed(self, text: str) -> Split:
        """Takes more text; as much of it as is certain."""
        text, self._held = self._held + text, ""
        thought = ""
        if self._at is _At.BEGINNING:
            text = self._begin(text)
        if self._at is _At.THOUGHT:
            thought, text = self._think(text)
        if self._at is _At.GAP:
            text = text.lstrip("\n")
            self._at = _At.SPEECH if text else _At.GAP
        return Split(thought, text)

    def end_turn(self) -> Split:
        """No more comes; what was held back."""
        held, self._held = self._held, ""
        return Split(thought=held.rstrip("\n")) if self.is_inside else Split(said=held)

    def _begin(self, text: str) -> str:
        words = text.lstrip()
        if words.startswith(OPEN):
            self._at = _At.THOUGHT
            return words[len(OPEN) :]
        if OPEN.startswith(words):
            self._held = text
            return ""
        self._at = _At.SPEECH
        return text

    def _think(self, text: str) -> tuple[str, str]:
        """(the thought, what comes behind it)"""
        text = text if self._has_begun else text.lstrip("\n")
        end = text.find(CLOSE)
        if end >= 0:
            self._at = _At.GAP
            return text[:end].rstrip("\n"), text[end + len(CLOSE) :]
        begun = next(n for n in reversed(range(len(CLOSE))) if text.endswith(CLOSE[:n]))  # of the tag, at the end
        known = text[: len(text) - begun].rstrip("\n")
        self._held = text[len(known) :]
        self._has_begun = self._has_begun or bool(known)
        return known, ""


_FORMATS: dict[str, Callable[[], Thoughts]] = {
    "qwen3": Thoughts,
    "deepseek_r1": lambda: Thoughts(begins_inside=True),
}
REASONING_PARSERS = tuple(_FORMATS)


def make_thoughts(name: str) -> Thoughts:
    """What splits the turns of one sequence. ValueError for an unknown name."""
    if name not in _FORMATS:
        raise ValueError(f"reasoning parser {name!r}: expected one of {', '.join(REASONING_PARSERS)}")
    return _FORMATS[name]()


def detect_reasoning(chat_template: str) -> str | None:
    """The format in which a chat template shows thoughts, None where it shows none."""
    return "qwen3" if CLOSE in chat_template else None


def split_turn(text: str) -> Split:
    """A whole turn that may hold a thought; where the prompt opened it, the closing tag alone tells."""
    before, closed, _ = text.partition(CLOSE)
    thoughts = Thoughts(begins_inside=bool(closed) and OPEN not in before)
    piece, rest = thoughts.feed(text), thoughts.end_turn()
    return Split(piece.thought + rest.thought, piece.said + rest.said)


class ThoughtSpans:
    """Which ids of a conversation are thoughts: from the opening tag to the first id of what is said.

    A thought whose end lies within one piece with speech is left out: nothing that was said may go with it.
    """

    def __init__(self) -> None:
        self.found: list[tuple[int, int]] = []  # (first id, behind the last)
        self._first = self._end = 0
        self._is_open = False  # nothing was said in this turn, as far as is known
        self._has_thought = False

    def begin_turn(self, first: int | None, end: int) -> None:
        """A turn's own ids begin at `end`; `first` is where its thought would, None where that is not known."""
        self._is_open, self._has_thought = first is not None, False
        self._first, self._end = first if first is not None else end, end

    def take(self, text: str, split: Split, was_speech: bool, is_inside: bool, end: int) -> None:
        """Text of ids up to `end`, and what became of it. `was_speech`: whether no thought was open, or might be."""
        if not self._is_open:
            return
        self._has_thought = self._has_thought or is_inside or bool(split.thought)
        if split.said:
            if was_speech and self._has_thought:
                self.found.append((self._first, self._end))
            self._is_open = False
        elif text:  # ids without text may be the beginning of a character that is said
            self._end = end


def without_spans(ids: Sequence[int], spans: Iterable[tuple[int, int]]) -> list[int]:
    """The ids that lie in none of the spans, which are in order."""
    kept: list[int] = []
    start = 0
    for first, end in spans:
        kept += ids[start:first]
        start = end
    return [*kept, *ids[start:]]
