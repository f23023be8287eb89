"""The text that goes on after a model's calls: the end of its turn, the results, the beginning of its next turn."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jaxcept.text.template import ChatTemplate, Message, TemplateError

_SENTINEL = "jaxcept0probe"
_MARKUP = re.compile(r"<\|?[^<>\s]+\|?>")
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


class CallLike(Protocol):
    """A call that the model made."""

    @property
    def id(self) -> str:
        """What the result refers to."""

    @property
    def name(self) -> str:
        """The tool."""

    @property
    def arguments(self) -> Mapping[str, Any]:
        """What it was given."""


@dataclass(frozen=True, slots=True)
class PlainFormat:
    """How results stand in a text without chat template: prefix, the results joined, suffix."""

    prefix: str = "\n"
    suffix: str = "\n"
    separator: str = "\n"

    def returned_text(self, results: Sequence[str]) -> str:
        """The text that goes on after the calls."""
        return self.prefix + self.separator.join(results) + self.suffix


def returned_text(
    template: ChatTemplate,
    calls: Sequence[CallLike],
    results: Sequence[str],
    *,
    ended_turn: bool,
    tools: Sequence[Mapping[str, Any]] | None = None,
    then: Sequence[Message] = (),
    **kwargs: Any,
) -> str:
    """The text between what the model wrote and what it writes next, one result per call, as the template has it.

    `then` are messages behind the results. With them there may be no results, and no calls.

    `ended_turn` says that the model's last token ended its turn; otherwise the text begins with what ends it. Nothing
    that the model wrote is in the text: a conversation with the calls is rendered and cut behind the last of them.
    Where the template knows no calls, the results are messages of their own: of the tool, or else of the user. Raises
    TemplateError where the template refuses all of these.
    """
    if not (results or then) or (results and len(calls) != len(results)):
        raise ValueError(f"{len(calls)} calls and {len(results)} results: expected one result per call, at least one")
    sentinel, shown_texts = _SENTINEL, repr([*results, *then])
    while sentinel in shown_texts:
        sentinel += "x"
    words = [f"{sentinel}{i}z" for i in range(len(results))]
    settings = {"tools": tools, **kwargs}
    refusals: list[str] = []
    for trial, probe in zip(
        _probes(calls, words, then, sentinel), _probes(calls, results, then, sentinel), strict=True
    ):
        try:
            ends = _ends(template, trial[:2], sentinel, settings)
            shown = _behind(template.render(trial, add_generation_prompt=True, **settings), sentinel)
            if ends is None or not shown.startswith(ends[0]) or not all(word in shown for word in words):
                continue
            text = _behind(template.render(probe, add_generation_prompt=True, **settings), sentinel)
        except TemplateError as error:
            refusals.append(str(error))
            continue
        written, closing = ends
        return _without_end(template, text.removeprefix(written), closing) if ended_turn else text.removeprefix(written)
    detail = f": {refusals[0]}" if refusals else ""
    raise TemplateError(f"the chat template renders no tool results, neither as the tool's nor as the user's{detail}")


def _probes(
    calls: Sequence[CallLike], results: Sequence[str], then: Sequence[Message], sentinel: str
) -> Iterator[list[Message]]:
    """Conversations that end in the results and what follows, the most faithful first: calls as they are, with ids of
    nine letters and digits (some templates take no others), one call a message (some take no more), text alone.

    The sentinel stands in the last call, or is the assistant's text.
    """
    user = {"role": "user", "content": "x"}
    for shorten in (False, True) if calls else ():
        ids = [_short_id(call.id) if shorten else call.id for call in calls]
        answers = [
            {"role": "tool", "tool_call_id": call_id, "name": call.name, "content": result}
            for call_id, call, result in zip(ids, calls, results, strict=False)
        ]
        made = [
            {"id": call_id, "type": "function", "function": {"name": call.name, "arguments": {"probe": sentinel}}}
            for call_id, call in zip(ids, calls, strict=True)
        ]
        yield [user, {"role": "assistant", "content": "", "tool_calls": made}, *answers, *then]
        yield [user, {"role": "assistant", "content": "", "tool_calls": made[-1:]}, *answers, *then]
    said = {"role": "assistant", "content": sentinel}
    yield [user, said, *({"role": "tool", "content": result} for result in results), *then]
    if results:
        yield [user, said, {"role": "user", "content": "\n".join(results)}, *then]


def _short_id(call_id: str) -> str:
    digest = hashlib.sha256(call_id.encode("utf-8", "replace")).digest()
    return "".join(_LETTERS[byte % len(_LETTERS)] for byte in digest[:9])


def _behind(text: str, sentinel: str) -> str:
    """What follows the sentinel where it stands for what the model wrote; results hold it with a number behind it."""
    parts = re.split(f"{sentinel}(?![0-9x])", text)
    return parts[-1] if len(parts) > 1 else ""


def _ends(
    template: ChatTemplate, probe: Sequence[Message], sentinel: str, settings: Mapping[str, Any]
) -> tuple[str, str] | None:
    """Of a conversation that ends with the assistant's turn: the rest of what the model wrote behind the sentinel (its
    last call's end), and what the template closes the turn with. None where the sentinel is not shown."""
    text = template.render(probe, add_generation_prompt=False, **settings)
    if sentinel not in text:
        return None
    tail = _behind(text, sentinel)
    if "tool_calls" not in probe[1]:
        return "", tail
    said = [probe[0], {"role": "assistant", "content": sentinel}]
    closing = _behind(template.render(said, add_generation_prompt=False, **settings), sentinel)
    if closing and tail.endswith(closing):
        return tail.removesuffix(closing), closing
    end = _end_token(template, tail)
    return (tail[: tail.index(end)], tail[tail.index(end) :]) if end else None


def _without_end(template: ChatTemplate, text: str, closing: str) -> str:
    """The text without the token that ends a turn, which the model has written itself, and what stands before it."""
    end = _end_token(template, closing)
    return text.removeprefix(closing[: closing.index(end) + len(end)]) if end else text


def _end_token(template: ChatTemplate, text: str) -> str | None:
    """The control token in a text that ends a turn."""
    eos = template.special_tokens.get("eos_token")
    if eos and eos in text:
        return eos
    found = [match[0] for match in _MARKUP.finditer(text) if not match[0].startswith("</")]
    return found[0] if found else None
