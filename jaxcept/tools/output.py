"""What a tool returned or raised, as bounded text for the model."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from jaxcept.tools.calls import Outcome

MAX_OUTPUT_CHARS = 100_000
MAX_ERROR_CHARS = 2_000


class ToolError(Exception):
    """Raised by a tool that works and cannot do what this call asks: its message goes to the model as it is."""


class ToolFailedError(Exception):
    """Raised by a tool that does not work at present: its message goes to the model as it is."""


def output_text(value: Any, max_chars: int = MAX_OUTPUT_CHARS) -> str:
    """A tool's return value as text: strings as they are, bytes as UTF-8, the rest (None too) as compact JSON.

    Invalid UTF-8 and lone surrogates become U+FFFD; what JSON cannot hold becomes its str(). Text over `max_chars` is
    cut, with a note that says so. Raises RecursionError on a value nested too deeply to be shown.
    """
    if isinstance(value, bytes | bytearray | memoryview):
        # Four bytes hold at least one character: what is dropped here would be cut below in any case.
        head = bytes(value[: 4 * max_chars + 4])
        text, total = head.decode("utf-8", "replace"), f"{len(value):,} bytes"
        return text if len(text) <= max_chars and len(head) == len(value) else _cut(text, max_chars, total)
    if not isinstance(value, str):
        value = _json_text(value)
    text = _valid(value[: max_chars + 1])
    return text if len(text) <= max_chars else _cut(text, max_chars, f"{len(value):,} characters")


def error_text(error: BaseException) -> str:
    """An exception as text for the model: "error: TypeError: …"; a ToolError or ToolFailedError without its type."""
    try:
        detail = str(error)
    except Exception as broken:  # an exception's own __str__ may raise, and the model is still owed an answer
        detail = f"(its message cannot be shown: {type(broken).__name__})"
    if isinstance(error, ToolError | ToolFailedError) and detail:
        return output_text(f"error: {detail}", MAX_ERROR_CHARS)
    name = "Cancelled" if isinstance(error, asyncio.CancelledError) else type(error).__name__
    return output_text(f"error: {name}: {detail}" if detail else f"error: {name}", MAX_ERROR_CHARS)


def error_outcome(error: BaseException) -> Outcome:
    """Whether an exception speaks of the call's arguments (ERROR) or of a tool that is broken (FAILED).

    ToolError, ValueError, LookupError and ArithmeticError are what a function raises over its arguments; a model that
    writes nonsense must not be able to take a tool away from everybody else.
    """
    return (
        Outcome.ERROR if isinstance(error, ToolError | ValueError | LookupError | ArithmeticError) else Outcome.FAILED
    )


def _json_text(value: Any) -> str:
    try:
        return msgspec.json.encode(value, enc_hook=str).decode("utf-8")
    except (TypeError, ValueError, RecursionError, OverflowError):
        return str(value)


def _valid(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if _has_surrogates(text) else text


def _has_surrogates(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _cut(text: str, max_chars: int, total: str) -> str:
    return f"{text[:max_chars]}\n[cut: the output had {total}, the first {max_chars:,} characters are shown]"
