"""A model's tokenizer: text to ids and back, its special tokens, its chat template."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxcept.text.control import ControlTokens, encode_ids
from jaxcept.text.folder import TextFiles, read_text_files
from jaxcept.text.messages import plain_messages
from jaxcept.text.pieces import PieceKind, Pieces
from jaxcept.text.returned import CallLike, PlainFormat, returned_text
from jaxcept.text.stream import StreamDecoder, TokenTexts
from jaxcept.text.template import ChatTemplate, Message, TemplateError

_ANCHOR = "\n"


class Tokenizer:
    """Encodes, decodes, renders. Thread-safe: nothing that changes a result changes after construction.

    `special_ids` are skipped in text by default; `stop_token_ids` end a generation: those of the generation settings,
    then the tokenizer's own end token. The files' backend is taken over: truncation and padding are switched off.
    """

    def __init__(self, files: TextFiles) -> None:
        backend = files.backend
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens = dict(files.special_tokens)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.max_token_chars = max(map(len, vocabulary), default=1)  # no token stands for more of a text
        self.bos_id = self._named_id("bos_token")
        self.eos_id = self._named_id("eos_token")
        stops = [*files.eos_token_ids, *([self.eos_id] if self.eos_id is not None else [])]
        self.stop_token_ids = tuple(dict.fromkeys(stops))
        self.chat_template = (
            ChatTemplate(files.chat_template, self.special_tokens, tool_source=files.tool_template)
            if files.chat_template is not None
            else None
        )
        self.control = ControlTokens(backend)
        self._pieces = Pieces(backend)
        self._texts: dict[frozenset[int], TokenTexts] = {}
        self._before, self._after = self._wrapping()
        first = backend.encode("a", add_special_tokens=False).tokens[:1]
        self._begins_with_space = bool(first) and first[0][:1] in ("▁", "Ġ")

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """The tokenizer of a Hugging Face model folder. Raises TokenizerError, naming the file at fault."""
        return cls(read_text_files(path))

    def encode(
        self, text: str, add_special_tokens: bool = True, *, allow_special: bool = True, continues: bool = False
    ) -> list[int]:
        """Ids of a text. Lone surrogates are encoded as U+FFFD.

        `add_special_tokens` adds what the tokenizer puts around a text (a beginning token, often). With `allow_special`
        False, control tokens that the text spells are text. `continues` says that the text goes on from other text: no
        space is put before it.
        """
        text = _valid(text)
        encode = self._encode if allow_special or not self.control.are_spelled(text) else self.control.encode_text
        ids = self._continue(encode, text) if continues else encode(text)
        return [*self._before, *ids, *self._after] if add_special_tokens else ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids; ids that the tokenizer does not have add nothing.

        In a run of byte tokens that is no UTF-8, whole characters are shown, and U+FFFD for each other byte.
        """
        if self._pieces.kind is not PieceKind.SENTENCE:
            return str(self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))
        stream = StreamDecoder(self, skip_special_tokens)
        return "".join([stream.push(token_id) for token_id in token_ids]) + stream.finish()

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text, as UTF-8 bytes that may be a part of a character."""
        return self._pieces.of(token_id)

    def token_text(self, token_id: int) -> str:
        """What a token adds to a text; U+FFFD for parts of characters."""
        return self._pieces.of(token_id).decode("utf-8", self._pieces.errors)

    def token_id(self, text: str) -> int | None:
        """The id of a token by its exact text, such as <|im_end|>; None where there is none."""
        found: int | None = self._backend.token_to_id(text)
        return found

    def ids_of(self, texts: Sequence[str]) -> tuple[int, ...]:
        """Ids of those of the texts that are tokens: for StreamDecoder's `keep`, from a parser's markers."""
        found = (self.token_id(text) for text in texts)
        return tuple(token_id for token_id in found if token_id is not None)

    def token_texts(self, skip_special_tokens: bool, keep: frozenset[int]) -> TokenTexts:
        """The table that streams with these settings share."""
        hidden = self.special_ids - keep if skip_special_tokens else frozenset()
        return self._texts.setdefault(hidden, TokenTexts(self._pieces, hidden))

    def encode_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        *,
        allow_special: bool = False,
        **kwargs: Any,
    ) -> list[int]:
        """Ids of a conversation, in the OpenAI form. The template's control tokens are control tokens; those that
        messages, tools or `kwargs` spell are text, unless `allow_special`. Raises TemplateError, naming the field at
        fault.
        """
        template = self.chat_template
        if template is None:
            raise TemplateError("the model has no chat template; give a prompt as text, or a template")
        messages = plain_messages(messages, template.takes_parts)
        if allow_special or not self.control.is_changed([messages, tools, kwargs]):
            return self.encode(template.render(messages, tools, add_generation_prompt, **kwargs), False)
        marked = [self.control.mark_message(message) for message in messages]
        tools, kwargs = self.control.mark(tools), self.control.mark(kwargs)
        return self.control.encode(_valid(template.render(marked, tools, add_generation_prompt, **kwargs)))

    def encode_returned(
        self,
        calls: Sequence[CallLike],
        results: Sequence[str],
        *,
        ended_turn: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
        plain: PlainFormat | None = None,
        allow_special: bool = False,
        **kwargs: Any,
    ) -> list[int]:
        """Ids that go on after the calls that a model wrote; see returned_text. Control tokens that a result spells are
        text, unless `allow_special`. `plain`, or the lack of a chat template, puts the results into plain text."""
        is_marked = not allow_special and self.control.is_changed(results)
        given: Sequence[str] = self.control.mark(results) if is_marked else results
        if plain is not None or self.chat_template is None:
            text = (plain or PlainFormat()).returned_text(given)
        else:
            text = returned_text(self.chat_template, calls, given, ended_turn=ended_turn, tools=tools, **kwargs)
        return self._continue(self.control.encode if is_marked else self._encode, _valid(text))

    def encode_following(
        self,
        calls: Sequence[CallLike],
        messages: Sequence[Message],
        *,
        ended_turn: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """Ids that go on after a turn that the model wrote, in which it made these calls: of any messages behind it.

        The results of the calls come first, in any order, one for each or none at all. Raises TemplateError, naming
        the message at fault, or where the template cannot render them so.
        """
        template = self.chat_template
        if template is None:
            raise TemplateError("the model has no chat template; give a prompt as text, or a template")
        plain = plain_messages(messages, template.takes_parts)
        results, then = _split_results(calls, plain)
        is_marked = self.control.is_changed([results, then])
        if is_marked:
            results, then = self.control.mark(results), [self.control.mark_message(message) for message in then]
        text = returned_text(template, calls, results, ended_turn=ended_turn, tools=tools, then=then, **kwargs)
        return self._continue(self.control.encode if is_marked else self._encode, _valid(text))

    def _encode(self, text: str) -> list[int]:
        return encode_ids(self._backend, text)

    def _continue(self, encode: Callable[[str], list[int]], text: str) -> list[int]:
        """Encodes behind a line break where the tokenizer puts a space before a text: the line break takes it."""
        if not self._begins_with_space:
            return encode(text)
        anchor, ids = encode(_ANCHOR), encode(_ANCHOR + text)
        return ids[len(anchor) :] if ids[: len(anchor)] == anchor else encode(text)

    def _wrapping(self) -> tuple[list[int], list[int]]:
        """The ids that the tokenizer puts before and after a text."""
        inner = self._backend.encode("a", add_special_tokens=False).ids
        whole = self._backend.encode("a", add_special_tokens=True).ids
        for start in range(len(whole) - len(inner) + 1):
            if whole[start : start + len(inner)] == inner:
                return whole[:start], whole[start + len(inner) :]
        return [], []

    def _named_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self.token_id(text)


def _split_results(
    calls: Sequence[CallLike], messages: Sequence[Mapping[str, Any]]
) -> tuple[list[str], list[Mapping[str, Any]]]:
    """The results of the calls, in the order of the calls, and the messages behind them."""
    count = next((i for i, message in enumerate(messages) if message["role"] != "tool"), len(messages))
    given = {message.get("tool_call_id"): message for message in messages[:count]}
    if count and (len(given) != count or set(given) != {call.id for call in calls}):
        raise TemplateError(
            f"messages: expected one tool message for each of the calls {[call.id for call in calls]}, got"
            f" {[message.get('tool_call_id') for message in messages[:count]]}"
        )
    texts = [given[call.id].get("content") for call in calls] if count else []
    if not all(isinstance(text, str) for text in texts):
        raise TemplateError("messages: expected the content of a tool message to be text")
    return [str(text) for text in texts], list(messages[count:])


def _valid(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
