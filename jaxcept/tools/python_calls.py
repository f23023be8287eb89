"""Calls written as a Python list of calls with keyword arguments, read without running or compiling anything."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from jaxcept.tools.call_json import MAX_NAME_CHARS, CallTextError
from jaxcept.tools.scan import MAX_NESTING

_TOKEN = re.compile(
    r"""\s*(?:(?P<name>[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*)
    |(?P<number>(?:[0-9][0-9_]*(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)
    |(?P<string>"[^"\\]*(?:\\.[^"\\]*)*"|'[^'\\]*(?:\\.[^'\\]*)*')
    |(?P<mark>[()\[\]{},:=+-]))""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPE = re.compile(r"\\(\n|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[0-7]{1,3}|.)", re.DOTALL)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v", "\n": ""}
_ESCAPES |= {char: char for char in "\\'\""}
_WORDS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}


def read_python_calls(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Names and arguments of `[f(a=1), g(b="x")]`. Values are literals. Raises CallTextError."""
    return _Reader(text).calls()


class _Reader:
    """Recursive descent over the tokens, as deep as MAX_NESTING."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._kind = ""
        self._token = ""
        self._next()

    def calls(self) -> list[tuple[str, dict[str, Any]]]:
        self._take("[")
        calls = self._sequence("]", self._call)
        if self._kind:
            raise self._error("the end")
        return calls

    def _call(self, depth: int) -> tuple[str, dict[str, Any]]:
        name = self._take_name("a function's name")
        self._take("(")
        pairs = self._sequence(")", self._argument, depth)
        arguments = dict(pairs)
        if len(arguments) < len(pairs):
            raise CallTextError(f"an argument of {name!r} is given twice")
        return name, arguments

    def _argument(self, depth: int) -> tuple[str, Any]:
        name = self._take_name("a named argument, such as f(a=1)")
        self._take("=")
        return name, self._value(depth)

    def _value(self, depth: int) -> Any:
        if depth > MAX_NESTING:
            raise CallTextError(f"the values are nested more than {MAX_NESTING} deep")
        kind, token = self._kind, self._token
        if kind == "string":
            return self._string()
        if kind == "name" and token in _WORDS:
            self._next()
            return _WORDS[token]
        if kind == "number" or (kind == "mark" and token in "+-"):
            return self._number()
        self._next()
        if token == "[":
            return self._sequence("]", self._value, depth)
        if token == "(":
            return self._sequence(")", self._value, depth)
        if token == "{":
            return dict(self._sequence("}", self._item, depth))
        raise CallTextError(f"expected a literal value, got {token[:40]!r}")

    def _item(self, depth: int) -> tuple[str, Any]:
        key = self._value(depth)
        if not isinstance(key, str):
            raise CallTextError("the keys of a dict must be strings")
        self._take(":")
        return key, self._value(depth)

    def _string(self) -> str:
        parts = []
        while self._kind == "string":  # adjacent strings are one, as in Python
            parts.append(_ESCAPE.sub(_unescape, self._token[1:-1]))
            self._next()
        text = "".join(parts)
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if "\\" in self._text else text

    def _number(self) -> int | float:
        negative = self._token == "-"
        if self._kind == "mark":
            self._next()
        text = self._token.replace("_", "")
        if self._kind != "number":
            raise self._error("a number")
        self._next()
        try:
            value: int | float = int(text) if text.isdigit() else float(text)
        except ValueError:
            raise CallTextError("a number is too long") from None
        if isinstance(value, float) and not math.isfinite(value):
            raise CallTextError("a number is out of range")
        return -value if negative else value

    def _sequence(self, closing: str, read: Callable[[int], Any], depth: int = 0) -> list[Any]:
        """Items separated by commas, up to the closing mark and over it."""
        items = []
        while not self._is_mark(closing):
            items.append(read(depth + 1))
            if not self._is_mark(closing):
                self._take(",")
        self._next()
        return items

    def _is_mark(self, mark: str) -> bool:
        return self._kind == "mark" and self._token == mark

    def _take(self, mark: str) -> None:
        if not self._is_mark(mark):
            raise self._error(repr(mark))
        self._next()

    def _take_name(self, expected: str) -> str:
        name = self._token
        if self._kind != "name" or len(name) > MAX_NAME_CHARS:
            raise self._error(expected)
        self._next()
        return name

    def _next(self) -> None:
        found = _TOKEN.match(self._text, self._at)
        if found is not None:
            self._kind = found.lastgroup or ""
            self._token = found[self._kind]
            self._at = found.end()
        elif self._text[self._at :].strip():
            raise CallTextError(f"cannot read {self._text[self._at : self._at + 40].strip()!r}")
        else:
            self._kind = self._token = ""

    def _error(self, expected: str) -> CallTextError:
        return CallTextError(f"expected {expected}, got {self._token[:40]!r} before character {self._at}")


def _unescape(found: re.Match[str]) -> str:
    code = found[1]
    if code in _ESCAPES:
        return _ESCAPES[code]
    if code[0] in "xuU" and len(code) > 1:
        number = int(code[1:], 16)
        return chr(number) if number <= 0x10FFFF else "\ufffd"
    if code.isdigit():
        return chr(int(code, 8)) if all(digit in "01234567" for digit in code) else found[0]
    return found[0]
