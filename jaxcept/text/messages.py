"""Messages as clients send them, in the shapes that templates take."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxcept.text.template import Message, TemplateError


def plain_messages(messages: Sequence[Message], keep_parts: bool = False) -> list[dict[str, Any]]:
    """The messages with the arguments of calls as objects (clients send JSON in a string) and text parts as one text.

    `keep_parts` leaves lists of parts to the template. Raises TemplateError, naming the field that no text model can
    take.
    """
    return [_plain(message, f"messages[{i}]", keep_parts) for i, message in enumerate(messages)]


def _plain(message: Message, where: str, keep_parts: bool) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise TemplateError(f"{where}: expected an object with a role")
    plain = dict(message)
    content = plain.get("content")
    if isinstance(content, list | tuple):
        texts = [_part_text(part, f"{where}.content[{i}]") for i, part in enumerate(content)]
        plain["content"] = list(content) if keep_parts else "\n".join(texts)
    calls = plain.get("tool_calls")
    if calls is not None:
        if not isinstance(calls, list | tuple):
            raise TemplateError(f"{where}.tool_calls: expected a list, got {type(calls).__name__}")
        plain["tool_calls"] = [_plain_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
        if not calls:
            del plain["tool_calls"]
    return plain


def _part_text(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        return str(part["text"])
    raise TemplateError(f'{where}: a text model takes parts of the form {{"type": "text", "text": …}}, got {kind!r}')


def _plain_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise TemplateError(f"{where}: expected an object with function.name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _arguments(arguments)
    return {**call, "function": {**function, "arguments": {} if arguments is None else arguments}}


def _arguments(text: str) -> Any:
    """The object that the text is as JSON; a text that is none stays, as what a model once wrote."""
    try:
        value = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text
