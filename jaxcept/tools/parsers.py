"""Parsers of tool calls by the name of the format, and the guess which one a chat template teaches its model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from jaxcept.tools.calls import MakeId, ParsedCall
from jaxcept.tools.hermes import HermesParser
from jaxcept.tools.llama3_json import Llama3JsonParser
from jaxcept.tools.mistral import MistralParser
from jaxcept.tools.parser_base import MarkupParser
from jaxcept.tools.pythonic import PythonicParser


class ToolCallParser(Protocol):
    """Finds the calls in one assistant turn after another, from text that arrives in any pieces."""

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that the parser needs to see, though the tokenizer may count them as special."""

    @property
    def open_body(self) -> Sequence[str]:
        """The bracketed value of the call under way, in pieces, as far as it is read: empty where there is none."""

    def feed(self, text: str) -> list[ParsedCall]:
        """Take more text; the calls that it completes."""

    def finish(self) -> list[ParsedCall]:
        """End the turn; the calls that the end completes or breaks off. The next feed begins a turn."""

    def begin_turn(self) -> None:
        """Forget what was fed: the next feed begins a turn, as after an interception in the middle of one."""

    def take_content(self) -> str:
        """Text apart from calls that became certain since the last time."""


_CLASSES: dict[str, type[MarkupParser]] = {
    "hermes": HermesParser,
    "llama3_json": Llama3JsonParser,
    "mistral": MistralParser,
    "pythonic": PythonicParser,
}
PARSERS = tuple(_CLASSES)


def make_parser(name: str, make_id: MakeId | None = None) -> ToolCallParser:
    """A parser of the named format, for one sequence. `make_id` gives calls their ids (default: call00000, …).

    Raises ValueError on an unknown name.
    """
    if name not in _CLASSES:
        raise ValueError(f"tool call parser {name!r}: expected one of {', '.join(PARSERS)}")
    return _CLASSES[name](make_id)


def detect_parser(chat_template: str) -> str | None:
    """The format that a chat template renders calls in, or None where it shows none that is known here."""
    if "[TOOL_CALLS]" in chat_template:
        return "mistral"
    if "<tool_call>" in chat_template:
        # Qwen3-Coder and GLM put XML of their own into the same tag.
        return None if "<function=" in chat_template or "<arg_key>" in chat_template else "hermes"
    if "<|python_start|>" in chat_template or "[func_name1(" in chat_template:
        return "pythonic"
    if "<|python_tag|>" in chat_template or '"parameters": ' in chat_template:
        return "llama3_json"
    return None
