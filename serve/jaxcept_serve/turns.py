"""The page between wire formats and the engine: what every API's request becomes, and the events that answer it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from jaxcept.scheduler.params import SamplingParams
from jaxcept.scheduler.plan import TokenLogprobs

ToolChoice = Literal["none", "auto", "required"]


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. `salt` separates callers: nobody finds blocks, conversations or interceptions of another salt."""

    key_name: str = "anonymous"
    salt: str = ""


@dataclass(frozen=True, slots=True)
class Hints:
    """What a client says about its conversation; a lying hint harms its sender alone.

    expected_tool_s: how long its tools will take. hold_ttl_s: how long the context may wait for the next turn, at most
    what the server allows; 0: this conversation is over. conversation: a name that the client gave (prompt_cache_key,
    previous_response_id's conversation, a session header), a further way to find its context.
    """

    expected_tool_s: float | None = None
    hold_ttl_s: float | None = None
    conversation: str | None = None
    priority: int = 0


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """One turn of a conversation. Messages and tools in the OpenAI chat form, whatever API they came by.

    `tools` are the client's own (schemas: {"type": "function", "function": {...}}); those that the server runs are the
    service's. `tool_choice` is a ToolChoice or the name of a tool. `run_tools`: names of the server's tools that this
    turn may use; None is all of them, () none. `max_tool_calls` bounds the calls that the server runs;
    with it, calls come one by one. `is_prewarm`: the prompt is computed, and what is generated is no one's.
    """

    request_id: str
    messages: Sequence[Mapping[str, Any]]
    params: SamplingParams
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: ToolChoice | str = "auto"
    parallel_tool_calls: bool = True
    run_tools: Sequence[str] | None = None
    max_tool_calls: int | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    hints: Hints = Hints()
    is_prewarm: bool = False


@dataclass(frozen=True, slots=True)
class PromptTurn:
    """A prompt to complete as it stands: text, or token ids."""

    request_id: str
    prompt: str | Sequence[int]
    params: SamplingParams
    add_special_tokens: bool = True
    hints: Hints = Hints()


@dataclass(frozen=True, slots=True)
class TurnStarted:
    """The first event: the prompt is encoded and accepted."""

    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text that the model wrote, call markup left out. Empty where a token completes no text. `thought` comes before
    `text`: what the model thinks, where that is told apart."""

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    thought: str = ""


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A piece of a tool call. The first piece of a call carries its name; arguments come as JSON text, in pieces.

    `number` counts the calls of this completion; `call_id` is unique. `by_server`: the server runs it.
    """

    index: int
    number: int
    call_id: str
    name: str | None
    arguments: str
    by_server: bool = False


@dataclass(frozen=True, slots=True)
class ToolAnswered:
    """A tool that the server ran has answered; the completion goes on."""

    index: int
    call_id: str
    name: str
    text: str
    is_error: bool
    duration_s: float


@dataclass(frozen=True, slots=True)
class FullCall:
    """A complete call; `arguments` is JSON text, an object."""

    call_id: str
    name: str
    arguments: str
    by_server: bool = False
    result: str | None = None  # where the server ran it
    is_error: bool = False


@dataclass(frozen=True, slots=True)
class TurnFinished:
    """One completion of the turn is whole.

    `finish_reason`: stop, length, tool_calls (the client's tools are called: its context is held), abort, error,
    tool_timeout, tool_failed, tool_limit. `stop_reason`: the stop string or id, where one ended it. `text` is all
    text without calls and thoughts; `calls` are all calls in order; `token_ids` what the model generated.
    """

    index: int
    finish_reason: str
    stop_reason: str | int | None
    text: str
    calls: tuple[FullCall, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    thought: str = ""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a turn took. Tokens of all completions together; `cached_tokens` of the prompt needed no computing."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    returned_tokens: int = 0  # of tools that the server ran
    swapped_tokens: int = 0
    recomputed_tokens: int = 0
    intercepted_s: float = 0.0
    held_byte_s: float = 0.0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0  # of the completions' tokens, those that were thought

    @property
    def total_tokens(self) -> int:
        """Prompt, completion and what the server's tools returned."""
        return self.prompt_tokens + self.completion_tokens + self.returned_tokens


@dataclass(frozen=True, slots=True)
class TurnDone:
    """The last event: every completion is whole."""

    usage: Usage
    prompt_token_ids: tuple[int, ...] = field(repr=False, default=())
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None


TurnEvent = TurnStarted | TextDelta | CallDelta | ToolAnswered | TurnFinished | TurnDone


class ServiceError(Exception):
    """A request that cannot be served, told in the client's terms; each API puts it into its own form.

    `status`: 400 bad value, 404 unknown, 409 wrong state, 410 expired, 413 too large, 429 and 503 overloaded (with
    retry_after_s). `param` names the field at fault.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s


_FAILURES = {
    "abort": ServiceError(503, "the server stopped the turn", code="aborted", retry_after_s=1.0),
    "error": ServiceError(500, "the server failed in the middle of the turn"),
    "tool_timeout": ServiceError(500, "a tool that the server runs did not answer in time"),
    "tool_failed": ServiceError(500, "a tool that the server runs failed"),
}


def require_whole(finished: TurnFinished | None) -> TurnFinished:
    """The completion, if it came to an end of its own; otherwise raises the ServiceError that says what happened."""
    reason = finished.finish_reason if finished is not None else "error"
    if finished is not None and reason == "error" and finished.stop_reason is not None:
        raise ServiceError(400, str(finished.stop_reason))
    if finished is None or reason in _FAILURES:
        raise _FAILURES[reason]
    return finished


class Service(Protocol):
    """What APIs ask of the engine. Every call may raise ServiceError."""

    @property
    def model_names(self) -> Sequence[str]:
        """Names by which clients may ask for the model, the first one preferred."""
        ...

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest sequence."""
        ...

    async def chat(self, turn: ChatTurn, caller: Caller) -> AsyncIterator[TurnEvent]:
        """Starts a turn: returns once it is accepted (bad requests raise here, before anything is sent).

        Closing the iterator early (aclose, cancellation) aborts the turn and frees everything.
        """
        ...

    async def complete(self, turn: PromptTurn, caller: Caller) -> AsyncIterator[TurnEvent]:
        """The same for a prompt as it stands."""
        ...

    def count_tokens(self, turn: ChatTurn) -> int:
        """Tokens of the prompt that a turn makes."""
        ...

    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text; control tokens that it spells are control tokens."""
        ...

    def tokenize_chat(self, turn: ChatTurn) -> list[int]:
        """Ids of the prompt that a turn makes."""
        ...

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of ids. ServiceError 400 for ids out of range."""
        ...

    def tokenizer_info(self) -> dict[str, Any]:
        """What /tokenizer_info tells: bos_token, eos_token, pad_token, chat_template, tokenizer_class and the like."""
        ...

    def has_prefix(self, turn: ChatTurn, caller: Caller) -> bool:
        """Whether an earlier turn of this conversation is known."""
        ...

    def metrics(self) -> dict[str, float]:
        """The engine's figures by name."""
        ...

    @property
    def is_alive(self) -> bool:
        """Whether the engine's thread lives and the device has not failed."""
        ...

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken: alive and not draining."""
        ...
