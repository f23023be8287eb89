"""Constrained output: what may come next, as a bit for each token, for a JSON schema, a regex, a grammar or a choice.

A constraint is compiled once, in whichever thread asks, and bounded in size and time; a matcher then walks along one
text token by token, in microseconds.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark
from llguidance._tokenizer import TokenizerWrapper

MAX_CHARS = 256 * 1024  # of a schema, a regex, a grammar or all choices
MAX_DEPTH = 64  # of a schema
MAX_VALUES = 20_000  # in a schema, whatever their kind
MAX_CHOICES = 1_000
MAX_CACHED = 256  # compiled constraints
SPACES = r" |\n[ \t]{0,20}"  # between the parts of a JSON value: without a bound a model may write nothing else
_DATA = frozenset({"const", "enum", "default", "examples"})  # keywords whose value is no schema

_LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    max_grammar_size=100_000,
    max_lexer_states=50_000,
    step_lexer_fuel=500_000,
    step_max_items=50_000,
    verbose_errors=False,
)


class GrammarError(ValueError):
    """A constraint that cannot be compiled, or that nothing matches; says which field it came from."""


class TokenSource(Protocol):
    """What a compiler needs of a tokenizer."""

    vocab_size: int
    special_ids: frozenset[int]
    stop_token_ids: tuple[int, ...]

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text."""

    def encode(
        self, text: str, add_special_tokens: bool = True, *, allow_special: bool = True, continues: bool = False
    ) -> list[int]:
        """Ids of a text."""


class Matcher:
    """Where one text stands in its constraint. A matcher that cannot go on raises RuntimeError."""

    __slots__ = ("_mask", "_matcher", "_num_bytes", "_stops", "_tokens")

    def __init__(self, matcher: LLMatcher, tokens: LLTokenizer, num_bytes: int, stops: frozenset[int]) -> None:
        self._matcher = matcher
        self._tokens = tokens
        self._num_bytes = num_bytes
        self._stops = stops
        self._mask: bytes | None = None

    def mask(self) -> bytes:
        """The tokens that may come next: bit i % 32 of the little-endian uint32 word i // 32 for token i.

        Stop tokens are allowed where the text may end; where it must end, nothing else is.
        """
        if self._mask is None:
            mask = self._matcher.compute_bitmask()
            self._require()
            self._mask = mask[: self._num_bytes]
        return self._mask

    def accept(self, token_id: int) -> bool:
        """Takes the next token if the constraint allows it; otherwise nothing changes."""
        if token_id in self._stops:
            return self._matcher.is_accepting()
        if self._matcher.validate_tokens([token_id]) != 1:
            self._require()
            return False
        self._matcher.consume_token(token_id)
        self._require()
        self._mask = None
        return True

    def accept_text(self, text: str) -> bool:
        """Takes a piece of text that came in no tokens of its own, if the constraint allows it."""
        ids = self._tokens.greedy_tokenize(text)
        if self._matcher.validate_tokens(ids) != len(ids):
            return False
        self._matcher.consume_tokens(ids)
        self._require()
        self._mask = None
        return True

    def forced(self) -> list[int]:
        """The tokens of the text that must come next, if it must."""
        return list(self._matcher.compute_ff_tokens())

    @property
    def may_end(self) -> bool:
        """Whether the text may end here."""
        return bool(self._matcher.is_accepting())

    @property
    def is_complete(self) -> bool:
        """Whether the text must end here."""
        return bool(self._matcher.is_stopped()) and self.may_end

    def copy(self) -> Matcher:
        """A matcher that stands at the same place."""
        return Matcher(self._matcher.deep_copy(), self._tokens, self._num_bytes, self._stops)

    def _require(self) -> None:
        if self._matcher.is_error():
            raise RuntimeError(f"the constraint cannot be followed: {_first_line(self._matcher.get_error())}")


class _Source(NamedTuple):
    """A constraint as a user gave it: what compiled constraints are remembered by."""

    kind: str
    text: str


class GrammarCompiler:
    """Compiles constraints for one tokenizer. Thread-safe; remembers the last MAX_CACHED.

    `reserved` are ids that stand for no text, beside the tokenizer's special ids: the markers of tool calls. A lark
    grammar names them as <[id]>.
    """

    def __init__(self, tokenizer: TokenSource, reserved: Iterable[int] = ()) -> None:
        self._tokens = _make_tokens(tokenizer, frozenset(reserved))
        self._num_bytes = 4 * -(-tokenizer.vocab_size // 32)
        self._stops = frozenset(tokenizer.stop_token_ids)
        self._cache: OrderedDict[_Source, Matcher] = OrderedDict()
        self._lock = threading.Lock()

    def json_schema(self, schema: Mapping[str, Any] | str | bool, field: str = "json_schema") -> Matcher:
        """A matcher of JSON that is valid by the schema. GrammarError, naming `field`, where that cannot be."""
        return self._matcher(_Source("schema", schema_rule(schema, field)), field)

    def json_object(self) -> Matcher:
        """A matcher of any JSON object."""
        return self.json_schema({"type": "object"})

    def regex(self, pattern: str, field: str = "regex") -> Matcher:
        """A matcher of texts that the regex matches whole (Rust's syntax: no look-around, no back references)."""
        return self._matcher(_Source("regex", _text(pattern, field)), field)

    def lark(self, grammar: str, field: str = "grammar") -> Matcher:
        """A matcher of texts of a context-free grammar in Lark's syntax, which begins at `start`."""
        return self._matcher(_Source("lark", _text(grammar, field)), field)

    def choice(self, choices: Sequence[str], field: str = "choice") -> Matcher:
        """A matcher of one of these texts."""
        if not 1 <= len(choices) <= MAX_CHOICES:
            raise GrammarError(f"{field} has {len(choices)} entries: expected 1 to {MAX_CHOICES}")
        each = [quoted(_text(choice, field)) for choice in choices]
        return self._matcher(_Source("lark", _text("start: " + " | ".join(each), field)), field)

    def tool_schema(self, schema: Mapping[str, Any] | None) -> str:
        """The schema of a tool's arguments for a rule of a lark grammar, as exactly as can be followed.

        Keywords that no mask can follow are left out, and a schema that cannot be read stands for any object: the
        arguments are checked when the tool is called.
        """
        whole: dict[str, Any] = {"type": "object", **(schema or {})}
        for is_lenient in (False, True):
            try:
                text = schema_rule(whole, "parameters", is_lenient)
                self._matcher(_Source("lark", f"start: %json {text}"), "parameters")
            except GrammarError:
                continue
            return text
        return schema_rule({"type": "object"}, "parameters")

    def _matcher(self, source: _Source, field: str) -> Matcher:
        with self._lock:
            found = self._cache.get(source)
            if found is not None:
                self._cache.move_to_end(source)
                return found.copy()
        made = self._compile(source, field)
        with self._lock:
            self._cache[source] = made
            while len(self._cache) > MAX_CACHED:
                self._cache.popitem(last=False)
            return made.copy()

    def _compile(self, source: _Source, field: str) -> Matcher:
        kind, text = source
        if kind == "schema":
            grammar = LLMatcher.grammar_from_lark(f"start: %json {text}")
        elif kind == "regex":
            grammar = LLMatcher.grammar_from_regex(text)
        else:
            grammar = LLMatcher.grammar_from_lark(text)
        found = LLMatcher(self._tokens, grammar, log_level=0, limits=_LIMITS)
        if not found.is_error():
            found.compute_bitmask()
        if found.is_error():
            reason = _first_line(found.get_error())
            raise GrammarError(f"{field}: {'no text matches it' if 'NoExtension' in reason else reason}")
        return Matcher(found, self._tokens, self._num_bytes, self._stops)


def schema_text(schema: Mapping[str, Any] | str | bool, field: str) -> str:
    """The schema as JSON text; GrammarError where it is no JSON, too large, too deep, or refers to other documents."""
    if isinstance(schema, str):
        text = _text(schema, field)
        try:
            schema = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise GrammarError(f"{field}: expected JSON: {_first_line(str(error))}") from None
    _check_schema(schema, field)
    if not isinstance(schema, Mapping | bool):
        raise GrammarError(f"{field}: expected a schema, which is an object, got {type(schema).__name__}")
    try:
        return _text(json.dumps(schema, allow_nan=False, default=dict), field)
    except (TypeError, ValueError, RecursionError) as error:
        raise GrammarError(f"{field}: expected JSON values: {_first_line(str(error))}") from None


def schema_rule(schema: Mapping[str, Any] | str | bool, field: str, is_lenient: bool = False) -> str:
    """The schema as the JSON text behind %json in a lark grammar. `is_lenient` leaves unknown keywords out."""
    value = json.loads(schema_text(schema, field))
    if value is False:
        raise GrammarError(f"{field}: no value is valid by it")
    options: dict[str, Any] = {"whitespace_pattern": SPACES}
    if is_lenient:
        options["lenient"] = True
    return json.dumps(({} if value is True else value) | {"x-guidance": options})


def regex_rule(pattern: str) -> str:
    """The regex as a terminal of a lark grammar."""
    return f"/{regex_to_lark(pattern, '')}/"


def quoted(text: str) -> str:
    """A text as a literal of a lark grammar."""
    return json.dumps(text, ensure_ascii=False)


def _check_schema(schema: object, field: str) -> None:
    """Walks the schema without recursion. A keyword whose value is data holds no references."""
    open_values: list[Iterator[tuple[object, bool]]] = [iter([(schema, True)])]
    count = 0
    while open_values:
        entry = next(open_values[-1], None)
        if entry is None:
            open_values.pop()
            continue
        value, may_refer = entry
        count += 1
        if count > MAX_VALUES:
            raise GrammarError(f"{field} has too many values: expected at most {MAX_VALUES}")
        if isinstance(value, Mapping):
            target = value.get("$ref")
            if may_refer and isinstance(target, str) and not target.startswith("#"):
                raise GrammarError(f"{field}: $ref {target[:80]!r}: expected a reference within the schema (#…)")
            open_values.append(iter([(each, may_refer and key not in _DATA) for key, each in value.items()]))
        elif isinstance(value, list | tuple):
            open_values.append(iter([(each, may_refer) for each in value]))
        if len(open_values) > MAX_DEPTH + 1:
            raise GrammarError(f"{field} is too deep: expected at most {MAX_DEPTH} levels")


def _text(text: object, field: str) -> str:
    if not isinstance(text, str) or not text:
        raise GrammarError(f"{field}: expected a text that is not empty")
    if len(text) > MAX_CHARS:
        raise GrammarError(f"{field} has {len(text)} characters: expected at most {MAX_CHARS}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise GrammarError(f"{field}: expected Unicode text without lone surrogates") from None
    return text


def _first_line(message: str) -> str:
    lines = message.splitlines()
    if len(lines) > 1 and lines[0].endswith("failed to compile JSON schema"):
        del lines[0]  # what is wrong comes behind it
    return lines[0][:300] if lines else "it cannot be compiled"


def _make_tokens(tokenizer: TokenSource, reserved: frozenset[int]) -> LLTokenizer:
    class Wrapped:
        """The tokenizer in the form that the library asks for."""

        eos_token_id = tokenizer.stop_token_ids[0] if tokenizer.stop_token_ids else 0
        bos_token_id = None
        tokens = tuple(tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size))
        special_token_ids = tuple(sorted(tokenizer.special_ids | reserved | set(tokenizer.stop_token_ids)))

        def __call__(self, text: str) -> list[int]:
            return tokenizer.encode(text, False, allow_special=False, continues=True)  # TypeError on bytes: wanted

    stops = list(tokenizer.stop_token_ids) or [0]
    return LLTokenizer(TokenizerWrapper(Wrapped()), n_vocab=tokenizer.vocab_size, eos_token=stops)
