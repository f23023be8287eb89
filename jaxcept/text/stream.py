"""Token ids to text as they come: never half a character, never a character taken back."""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import Iterable
from typing import Protocol

from jaxcept.text.pieces import PieceKind, Pieces

_MAX_WINDOW = 64  # tokens that a decoder of unknown kind may hold back


class TokenTexts:
    """Texts of the tokens that are whole by themselves, filled as they are met and shared by all streams.

    `hidden` ids add nothing, as special tokens that are skipped.
    """

    __slots__ = ("_bytes", "hidden", "pieces", "texts")

    def __init__(self, pieces: Pieces, hidden: frozenset[int]) -> None:
        self.pieces = pieces
        self.hidden = hidden
        self.texts: dict[int, str] = {}
        self._bytes: dict[int, bytes] = {}

    def bytes_of(self, token_id: int) -> bytes:
        """What the token adds; from the second time on without asking the tokenizer."""
        found = self._bytes.get(token_id)
        if found is None:
            found = b"" if token_id in self.hidden else self.pieces.of(token_id)
            self._bytes[token_id] = found
            if self.pieces.kind is not PieceKind.OTHER:
                with contextlib.suppress(UnicodeDecodeError):  # of those that begin or end inside a character
                    self.texts[token_id] = found.decode()
        return found


class DecodesIds(Protocol):
    """What a stream needs of a tokenizer."""

    def token_texts(self, skip_special_tokens: bool, keep: frozenset[int]) -> TokenTexts:
        """The shared table for these settings."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        """The text of the ids."""


class StreamDecoder:
    """One sequence's ids to text. All that `push` and `finish` give, joined, is what decoding all ids at once gives.

    `keep` names special ids that are shown though special tokens are skipped. `continues` says that the text goes on
    from other text, so that a space at its beginning is not the tokenizer's own and stays.
    """

    __slots__ = ("_decode", "_drop_first", "_is_other", "_is_slow", "_strip", "_table", "_texts", "_tokenizer",
                 "_window", "_window_text")  # fmt: skip

    def __init__(
        self,
        tokenizer: DecodesIds,
        skip_special_tokens: bool = True,
        *,
        keep: Iterable[int] = (),
        continues: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._table = tokenizer.token_texts(skip_special_tokens, frozenset(keep))
        pieces = self._table.pieces
        self._texts = self._table.texts
        self._decode = codecs.getincrementaldecoder("utf-8")(pieces.errors)
        self._strip = 0 if continues else pieces.strip
        self._drop_first = pieces.drops_first_space and not continues
        self._window: list[int] = []
        self._window_text = ""
        self._is_other = pieces.kind is PieceKind.OTHER
        self._is_slow = self._is_other or self._drop_first or self._strip > 0

    def push(self, token_id: int) -> str:
        """The text that this id completes, which may be none."""
        if not self._is_slow:
            text = self._texts.get(token_id)
            if text is not None:
                return text
        return self._push_window(token_id) if self._is_other else self._push_bytes(token_id)

    def finish(self) -> str:
        """What is left when no id follows: a character that was begun is shown as U+FFFD."""
        if self._is_other:
            return self._finish_window()
        text = self._decode.decode(b"", True)
        self._decode.reset()
        self._is_slow = self._drop_first or self._strip > 0
        return text

    def _push_bytes(self, token_id: int) -> str:
        data = self._table.bytes_of(token_id)
        if not data:
            return ""
        if self._drop_first:
            self._drop_first = False
            data = self._table.pieces.first(token_id)
        text = self._decode.decode(data)
        if self._strip and text:
            dropped = min(self._strip, len(text) - len(text.lstrip(" ")))
            self._strip = self._strip - dropped if dropped == len(text) else 0
            text = text[dropped:]
        self._is_slow = bool(self._decode.getstate()[0]) or self._strip > 0
        return text

    def _push_window(self, token_id: int) -> str:
        """For other decoders: decode the last ids with the ones before them, and give what was added."""
        if token_id in self._table.hidden:
            return ""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window, False)
        is_certain = text.startswith(self._window_text) and not text.endswith("\ufffd")
        if not is_certain and len(self._window) < _MAX_WINDOW:
            return ""
        added = text[len(self._window_text) :]
        self._window = self._window[-1:]
        self._window_text = self._tokenizer.decode(self._window, False)
        return added

    def _finish_window(self) -> str:
        text = self._tokenizer.decode(self._window, False)
        added = text[len(self._window_text) :]
        self._window_text = text
        return added
