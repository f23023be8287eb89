"""What each token adds to the text, as bytes: the decoders of the common tokenizers, taken apart token by token."""

from __future__ import annotations

import codecs
import json
import re
from enum import StrEnum
from typing import Any

import tokenizers

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
EACH_BYTE = "jaxcept-each-byte"


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError), "registered for decoding alone"
    return "\ufffd" * (error.end - error.start), error.end


# Sentencepiece shows each byte that is no part of a character as a U+FFFD of its own; Python's "replace" shows one for
# as many bytes as begin a character.
codecs.register_error(EACH_BYTE, _replace_each_byte)


class PieceKind(StrEnum):
    """How a token's text follows from the token."""

    BYTE_LEVEL = "byte_level"  # its characters stand for bytes
    SENTENCE = "sentence"  # text with a sign for the space, and byte tokens such as <0x0A>
    OTHER = "other"  # depends on the tokens around it


class Pieces:
    """The bytes of each token of a tokenizer. For PieceKind.OTHER, those of the token decoded by itself.

    `strip` is how many spaces are dropped at the beginning of a text, `errors` how bytes that are no UTF-8 are shown.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._space = "▁"
        self.strip = 0
        self.drops_first_space = False  # all space signs of the first token, as Metaspace does
        self.has_byte_tokens = False
        self.kind = self._read_decoder()
        self.errors = "replace" if self.kind is PieceKind.BYTE_LEVEL else EACH_BYTE

    def of(self, token_id: int) -> bytes:
        """The token's bytes; b"" for an id that the tokenizer does not have."""
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self.kind is PieceKind.BYTE_LEVEL:
            return _byte_level(token)
        if self.kind is PieceKind.OTHER:
            return str(self._backend.decode([token_id], skip_special_tokens=False)).encode()
        found = _BYTE_TOKEN.fullmatch(token) if self.has_byte_tokens else None
        return bytes([int(found[1], 16)]) if found else token.replace(self._space, " ").encode()

    def first(self, token_id: int) -> bytes:
        """The token's bytes at the beginning of a text."""
        token = self._backend.id_to_token(token_id)
        return token.replace(self._space, "").encode() if self.drops_first_space and token else self.of(token_id)

    def _read_decoder(self) -> PieceKind:
        decoder = self._backend.decoder
        steps = _steps(json.loads(decoder.__getstate__())) if decoder is not None else []
        names = [step["type"] for step in steps]
        if "ByteLevel" in names and set(names) <= {"ByteLevel", "Fuse"}:
            return PieceKind.BYTE_LEVEL
        if names == ["Metaspace"]:
            self._space = steps[0]["replacement"]
            self.drops_first_space = steps[0].get("prepend_scheme", "always") != "never"
            return PieceKind.SENTENCE
        if names[:3] != ["Replace", "ByteFallback", "Fuse"] or not self._read_replace(steps[0]):
            return PieceKind.OTHER
        self.has_byte_tokens = True
        if names[3:] == ["Strip"] and steps[3]["content"] == " " and not steps[3]["stop"]:
            self.strip = steps[3]["start"]
        elif names[3:]:
            return PieceKind.OTHER
        return PieceKind.SENTENCE

    def _read_replace(self, step: dict[str, Any]) -> bool:
        pattern = step["pattern"].get("String")
        self._space = pattern or self._space
        return bool(pattern) and step["content"] == " "


def _steps(state: dict[str, Any]) -> list[dict[str, Any]]:
    if state["type"] == "Sequence":
        return [step for inner in state["decoders"] for step in _steps(inner)]
    return [state]


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level tokenizers write bytes as: printable ones as they are, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_alphabet()


def _byte_level(token: str) -> bytes:
    try:
        return bytes(_BYTES[char] for char in token)
    except KeyError:  # an added token with characters outside the alphabet is plain text
        return token.encode()
