"""Control tokens apart from text that spells them: what a user writes never becomes one."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import tokenizers

# Noncharacters of Unicode, meant for use inside a program: they cannot stand in text that is passed between programs.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_LOOKS_LIKE_MARKUP = re.compile(r"<.+>|\[.+\]", re.DOTALL)

LONG_TEXT = 2000  # characters


def encode_ids(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    """Ids of a text, without the tokenizer's own beginning and end.

    A text by itself is encoded under the interpreter's lock, a batch is not: a long one would stop every thread.
    """
    if len(text) < LONG_TEXT:
        return list(backend.encode(text, add_special_tokens=False).ids)
    return list(backend.encode_batch_fast([text], add_special_tokens=False)[0].ids)


class ControlTokens:
    """The added tokens that steer a model, and a tokenizer that sees them only where they are marked.

    Control tokens are the special ones, and others that look like markup, such as <tool_call>. `mark` wraps those that
    data spells; a template renders the marked data; `encode` then takes marked ones for text and the others, which the
    template wrote, for control tokens.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self.special = {token.content for token in added.values() if token.special and token.content}
        control = {token.content for token in added.values() if _LOOKS_LIKE_MARKUP.fullmatch(token.content)}
        self.control = control | self.special
        self._ids = {token.content: token_id for token_id, token in added.items()}
        self._any = _alternatives(self.control)
        self._any_special = _alternatives(self.special)
        self._rendered = re.compile(f"{_OPEN}({self._any.pattern}){_CLOSE}|({self._any.pattern})|[{_OPEN}{_CLOSE}]")
        self._marked: tuple[tokenizers.Tokenizer, dict[int, int]] | None = None

    def are_spelled(self, text: str) -> bool:
        """Whether the text spells a control token."""
        return self._any.search(text) is not None

    def mark(self, data: Any, *, special_only: bool = False) -> Any:
        """The same JSON data with control tokens in its strings, keys too, wrapped in marks.

        The characters that serve as marks are dropped from it.
        """
        if isinstance(data, str):
            data = data.replace(_OPEN, "").replace(_CLOSE, "")
            return (self._any_special if special_only else self._any).sub(f"{_OPEN}\\g<0>{_CLOSE}", data)
        if isinstance(data, Mapping):
            return {
                self.mark(name, special_only=special_only): self.mark(value, special_only=special_only)
                for name, value in data.items()
            }
        if isinstance(data, list | tuple):
            return [self.mark(value, special_only=special_only) for value in data]
        return data

    def mark_message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A message with marks. An assistant's own text may hold <think> and the like, which templates look for."""
        return dict(self.mark(message, special_only=message.get("role") == "assistant"))

    def is_changed(self, data: Any) -> bool:
        """Whether marking the data would change it."""
        if isinstance(data, str):
            return self.are_spelled(data)
        if isinstance(data, Mapping):
            return any(self.is_changed(name) or self.is_changed(value) for name, value in data.items())
        return isinstance(data, list | tuple) and any(self.is_changed(value) for value in data)

    def encode(self, rendered: str) -> list[int]:
        """Ids of a text rendered from marked data, without the tokenizer's own beginning and end."""
        tokenizer, ids = self._marked_tokenizer()
        encoded = encode_ids(tokenizer, self._rendered.sub(_swap, rendered))
        return [ids.get(token_id, token_id) for token_id in encoded] if ids else encoded

    def encode_text(self, text: str) -> list[int]:
        """Ids of a text that holds no control tokens, whatever it spells."""
        return self.encode(self.mark(text))

    def _marked_tokenizer(self) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
        """A twin of the tokenizer whose control tokens are spelled with marks, and its ids that differ.

        Built at the first use, as it takes a second for a large vocabulary; two threads may build it at once, and
        either is right.
        """
        if self._marked is None:
            state = json.loads(self._backend.to_str())
            state["post_processor"] = None
            for token in state["added_tokens"]:
                if token["content"] in self.control:
                    token["content"] = _OPEN + token["content"] + _CLOSE
            twin = _without_spellings(state, self.control)
            pairs = [(twin.token_to_id(_OPEN + text + _CLOSE), self._ids[text]) for text in self.control]
            self._marked = twin, {ours: theirs for ours, theirs in pairs if ours is not None and ours != theirs}
        return self._marked


def _without_spellings(state: dict[str, Any], control: set[str]) -> tokenizers.Tokenizer:
    """The tokenizer of a state, its vocabulary renamed too where the model's merges do not mention the tokens."""
    vocab = state["model"]["vocab"]
    control = control - {state["model"].get("unk_token")}  # which the model looks up by its text
    plain = json.dumps(state)
    if isinstance(vocab, dict):
        renamed: Any = {_OPEN + text + _CLOSE if text in control else text: number for text, number in vocab.items()}
    else:
        renamed = [[_OPEN + text + _CLOSE if text in control else text, score] for text, score in vocab]
    state["model"]["vocab"] = renamed
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(state))
    except Exception:  # the library raises bare Exception; the twin is right without renaming as well
        return tokenizers.Tokenizer.from_str(plain)


def _swap(found: re.Match[str]) -> str:
    """A marked token loses its marks, an unmarked one gets them, a mark that lost its token goes."""
    if found[1] is not None:
        return found[1]
    return f"{_OPEN}{found[2]}{_CLOSE}" if found[2] is not None else ""


def _alternatives(texts: set[str]) -> re.Pattern[str]:
    """Matches any of the texts, the longest first; nothing where there are none."""
    ordered = sorted(texts, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, ordered)) or "(?!)")
