"""What a client asks of one request: how tokens are drawn, when to stop, and what an interception may cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 64
MAX_STOP_TOKEN_IDS = 128
MAX_STOP_STRING_CHARS = 1024
MAX_N = 128
MAX_LOGIT_BIAS = 512


class OnToolFailure(StrEnum):
    """What happens to a sequence whose tool failed or ran out of time."""

    TELL = "tell"  # the model is told, as the tool's answer, and goes on
    FAIL = "fail"  # the sequence ends with finish reason "tool_failed"


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name}={value!r}: expected {expected}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return (isinstance(value, float) or _is_int(value)) and math.isfinite(value)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class StructuredOutput:
    """What the text of each turn must be: exactly one of these.

    `json_schema` is an object, or JSON text; `regex` has Rust's syntax, `grammar` Lark's, with a rule `start`;
    `choice` is one of some texts; `json_object` any JSON object. They are compiled where the request is added.
    """

    json_schema: Mapping[str, Any] | str | bool | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: tuple[str, ...] | list[str] | None = None
    json_object: bool = False

    def __post_init__(self) -> None:
        given = [name for name in self.__slots__ if getattr(self, name) not in (None, False)]
        if self.json_schema is False:
            given.append("json_schema")
        _require(len(given) == 1, "structured", given, "exactly one of " + ", ".join(self.__slots__))
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            _require(value is None or (isinstance(value, str) and bool(value)), name, str(value)[:40], "a text")
        schema = self.json_schema  # of any depth: it is not shown
        _require(isinstance(schema, Mapping | str | bool | None), "json_schema", type(schema).__name__,
                 "an object, or JSON text")  # fmt: skip
        _require(isinstance(self.json_object, bool), "json_object", self.json_object, "True or False")
        if self.choice is not None:
            is_list = isinstance(self.choice, tuple | list) and bool(self.choice)
            _require(is_list and all(isinstance(text, str) and text for text in self.choice), "choice",
                     str(self.choice)[:40], "a list of texts that are not empty")  # fmt: skip
            object.__setattr__(self, "choice", tuple(self.choice))


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn and when a completion ends. Every field is checked; a ValueError names the field.

    temperature 0 is greedy. top_k 0 (or -1) is off. `seed` makes a request's draws its own: they depend on the seed and
    on the position alone, never on who shares the batch. `max_tokens` counts generated tokens over all interceptions;
    None means up to the model's context length.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop: tuple[str, ...] | list[str] | str = ()
    stop_token_ids: tuple[int, ...] | list[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    structured: StructuredOutput | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        _require(isinstance(stop, tuple | list), "stop", self.stop, "a string or a list of strings")
        _require(len(stop) <= MAX_STOP_STRINGS, "stop", len(stop), f"at most {MAX_STOP_STRINGS} strings")
        for text in stop:
            _require(isinstance(text, str) and 0 < len(text) <= MAX_STOP_STRING_CHARS, "stop", str(text)[:40],
                     f"non-empty strings of at most {MAX_STOP_STRING_CHARS} characters")  # fmt: skip
        object.__setattr__(self, "stop", tuple(stop))
        _require(isinstance(self.stop_token_ids, tuple | list), "stop_token_ids", self.stop_token_ids, "a list of ids")
        _require(len(self.stop_token_ids) <= MAX_STOP_TOKEN_IDS, "stop_token_ids", len(self.stop_token_ids),
                 f"at most {MAX_STOP_TOKEN_IDS} ids")  # fmt: skip
        for token_id in self.stop_token_ids:
            _require(_is_int(token_id) and token_id >= 0, "stop_token_ids", token_id, "ids of 0 or more")
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        self._check_numbers()
        self._check_limits()

    def _check_numbers(self) -> None:
        for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"):
            _require(_is_finite(getattr(self, name)), name, getattr(self, name), "a finite number")
        _require(0 <= self.temperature <= 100, "temperature", self.temperature, "0 to 100")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0, at most 1")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "0 to 1")
        _require(-2 <= self.presence_penalty <= 2, "presence_penalty", self.presence_penalty, "-2 to 2")
        _require(-2 <= self.frequency_penalty <= 2, "frequency_penalty", self.frequency_penalty, "-2 to 2")
        _require(0 < self.repetition_penalty <= 100, "repetition_penalty", self.repetition_penalty, "above 0")
        if self.logit_bias is not None:
            _require(isinstance(self.logit_bias, dict), "logit_bias", self.logit_bias, "a dict of id to bias")
            _require(len(self.logit_bias) <= MAX_LOGIT_BIAS, "logit_bias", len(self.logit_bias),
                     f"at most {MAX_LOGIT_BIAS} entries")  # fmt: skip
            for token_id, bias in self.logit_bias.items():
                _require(_is_int(token_id) and token_id >= 0, "logit_bias", token_id, "ids of 0 or more")
                _require(_is_finite(bias) and -100 <= bias <= 100, "logit_bias", bias, "values of -100 to 100")

    def _check_limits(self) -> None:
        _require(_is_int(self.n) and 1 <= self.n <= MAX_N, "n", self.n, f"1 to {MAX_N}")
        _require(_is_int(self.top_k) and self.top_k >= -1, "top_k", self.top_k, "0 (off) or more")
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        _require(self.seed is None or (_is_int(self.seed) and -(2**63) <= self.seed < 2**64), "seed", self.seed,
                 "an int of 64 bits, or None")  # fmt: skip
        _require(self.max_tokens is None or (_is_int(self.max_tokens) and self.max_tokens >= 1), "max_tokens",
                 self.max_tokens, "1 or more, or None")  # fmt: skip
        _require(_is_int(self.min_tokens) and self.min_tokens >= 0, "min_tokens", self.min_tokens, "0 or more")
        _require(self.max_tokens is None or self.min_tokens <= self.max_tokens, "min_tokens", self.min_tokens,
                 f"at most max_tokens={self.max_tokens}")  # fmt: skip
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _require(value is None or (_is_int(value) and 0 <= value <= MAX_LOGPROBS), name, value,
                     f"0 to {MAX_LOGPROBS}, or None")  # fmt: skip
        _require(self.structured is None or isinstance(self.structured, StructuredOutput), "structured",
                 type(self.structured).__name__, "a StructuredOutput, or None")  # fmt: skip
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            _require(isinstance(getattr(self, name), bool), name, getattr(self, name), "True or False")

    @property
    def uses_history(self) -> bool:
        """Whether a draw depends on the tokens before it (penalties)."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1


@dataclass(frozen=True, slots=True)
class ScriptedTrigger:
    """Intercept after `after_tokens` tokens generated since the start or the last resume: for traces and tests.

    `duration_s` is how long the tool will take, where a replay knows it; only an oracle may look.
    """

    after_tokens: int
    tool: str = "scripted"
    duration_s: float | None = None

    def __post_init__(self) -> None:
        _require(_is_int(self.after_tokens) and self.after_tokens >= 1, "after_tokens", self.after_tokens, "1 or more")


@dataclass(frozen=True, slots=True)
class InterceptParams:
    """When a sequence stops for something outside, and what that may cost.

    `token_ids` intercept when generated; `script` intercepts by count, one entry per interception, in order. Text
    triggers (strings, tool calls) live in the request's Watcher, which sees the decoded stream.
    `timeout_s` bounds each interception, in seconds. `expected_s` hints at how long a tool takes, by its name.
    """

    token_ids: tuple[int, ...] = ()
    script: tuple[ScriptedTrigger, ...] = ()
    timeout_s: float = 120.0
    max_interceptions: int = 64
    max_returned_tokens: int | None = None
    on_failure: OnToolFailure = OnToolFailure.TELL
    failure_ids: tuple[int, ...] = field(default=(), repr=False)  # returned in the tool's place on a timeout
    expected_s: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(_is_finite(self.timeout_s) and self.timeout_s > 0, "timeout_s", self.timeout_s, "seconds above 0")
        _require(_is_int(self.max_interceptions) and self.max_interceptions >= 0, "max_interceptions",
                 self.max_interceptions, "0 or more")  # fmt: skip
        value = self.max_returned_tokens
        _require(value is None or (_is_int(value) and value >= 0), "max_returned_tokens", value, "0 or more, or None")
        object.__setattr__(self, "on_failure", OnToolFailure(self.on_failure))
        for tool, seconds in self.expected_s.items():
            _require(_is_finite(seconds) and seconds >= 0, f"expected_s[{tool!r}]", seconds, "seconds, 0 or more")
