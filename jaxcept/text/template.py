"""Chat templates: conversations as the text a model was trained on, rendered under a step limit."""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import minijinja

Message = Mapping[str, Any]

MAX_STEPS = 20_000_000
_GENERATION_TAG = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
_REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")


class TemplateError(ValueError):
    """The template refused the conversation, or cannot be rendered."""


class _RefusedError(Exception):
    """What a template's own raise_exception raises."""


class ChatTemplate:
    """A chat template in the dialect of Hugging Face tokenizers. Rendering is thread-safe.

    `special_tokens` are the names that templates use (bos_token, eos_token, …) and their texts. `tool_source` is
    rendered instead of `source` where tools are given. `now` is what strftime_now tells. Templates belong to the model:
    the step limit ends loops, but does not bound what a hostile template allocates, so never take one from a request.
    Raises TemplateError on a template that cannot be read.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        *,
        tool_source: str | None = None,
        now: Callable[[], datetime.datetime] = datetime.datetime.now,
        max_steps: int = MAX_STEPS,
    ) -> None:
        self.source = source
        self.special_tokens = dict(special_tokens or {})
        self._environment = minijinja.Environment(
            filters={"tojson": _to_json},
            globals={"raise_exception": _raise, "strftime_now": lambda form: now().strftime(str(form))},
            auto_escape_callback=lambda name: False,
            trim_blocks=True,
            lstrip_blocks=True,
            fuel=max_steps,
        )
        try:
            self._environment.add_template("chat", _plain_tags(source))
            self._environment.add_template("tools", _plain_tags(tool_source if tool_source is not None else source))
        except minijinja.TemplateError as error:
            raise TemplateError(_explain(error)) from None

    @functools.cached_property
    def takes_parts(self) -> bool:
        """Whether the template renders a content that is a list of parts, found by trying."""
        word = "jaxcept0part"
        try:
            text = self.render([{"role": "user", "content": [{"type": "text", "text": word}]}])
        except TemplateError:
            return False
        before, found, _ = text.partition(word)
        return bool(found) and before[-1:] not in ("'", '"')  # in quotes the list was printed as it is

    @functools.cached_property
    def drops_thoughts(self) -> bool:
        """Whether a user's next message makes the template leave out what the model thought before, found by trying."""
        word = "jaxcept0thought"
        said = {"role": "assistant", "content": f"<think>\n{word}\n</think>\n\nyes"}
        user = {"role": "user", "content": "x"}
        try:
            return word not in self.render([user, said, user])
        except TemplateError:
            return False

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """The conversation as text; `tools` in the OpenAI form, `kwargs` as the template reads them.

        Keys of a message whose value is None are left out. Raises TemplateError, with the template's own words where
        it has some.
        """
        if not messages:
            raise TemplateError("the conversation has no messages")
        context = {
            **self.special_tokens,
            "messages": [_message(message, index) for index, message in enumerate(messages)],
            "tools": list(tools) if tools is not None else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **kwargs,
        }
        try:
            context = {name: _plain_data(value) for name, value in context.items()}
            return str(self._environment.render_template("tools" if tools else "chat", **context))
        except _RefusedError as error:
            raise TemplateError(str(error)) from None
        except minijinja.TemplateError as error:
            raise TemplateError(_explain(error)) from None
        except TemplateError:
            raise
        except Exception as error:  # methods of lists and dicts, which templates call, raise what they like
            raise TemplateError(f"the chat template cannot render this conversation: {error}") from error


def _message(message: Message, index: int) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise TemplateError(f"messages[{index}]: expected an object, got {type(message).__name__}")
    kept = {name: value for name, value in message.items() if value is not None}
    reasoning = next((kept[name] for name in _REASONING_NAMES if name in kept), None)
    return kept if reasoning is None else {"thinking": reasoning, **kept, "reasoning_content": reasoning}


def _plain_data(value: Any) -> Any:
    """A copy made of plain types alone: a template can call the methods of what it is given, and change lists."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain_data(name): _plain_data(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        copy = [_plain_data(item) for item in value]
        return copy if isinstance(value, list) else tuple(copy)
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    raise TemplateError(f"a {type(value).__name__} cannot be rendered; expected JSON data")


def _plain_tags(source: str) -> str:
    """Without {% generation %}, which only marks text for training; `with` keeps its scope and its white space."""
    return _GENERATION_TAG.sub(lambda tag: f"{{%{tag[1]} {tag[2] or ''}with {tag[3]}%}}", source)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter as templates expect it: no HTML escapes, and spaces after commas and colons."""
    if separators is not None:
        separators = (separators[0], separators[1])
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: object) -> NoReturn:
    raise _RefusedError(message)


def _explain(error: minijinja.TemplateError) -> str:
    where = f" (line {error.line})" if error.line else ""
    if "out of fuel" in error.message:
        return f"the chat template ran for too long and was stopped{where}"
    return f"the chat template cannot be rendered: {error.message}{where}"
