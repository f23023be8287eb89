"""Sampling as the OpenAI APIs and vLLM's extensions of them ask for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxcept.scheduler.params import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_N,
    MAX_STOP_STRING_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
)
from jaxcept_serve.client_tools import constrained, constrained_to_json, constrained_to_schema
from jaxcept_serve.limits import ServerOptions
from jaxcept_serve.turns import ServiceError
from jaxcept_serve.wire import (
    Body,
    Field,
    as_array,
    as_object,
    as_text,
    as_token_ids,
    bad,
    decode_body,
    from_value_error,
    shown,
)

MAX_INT = 2**31 - 1
MAX_CHOICES = 1024
MAX_SCHEMA_DEPTH = 100
MAX_REGEX_CHARS = 8192
MAX_GRAMMAR_CHARS = 65_536


def _read_stop(value: Any, path: str) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else as_array(value, path, MAX_STOP_STRINGS)
    for index, text in enumerate(stops):
        if not 0 < len(as_text(text, f"{path}[{index}]")) <= MAX_STOP_STRING_CHARS:
            raise bad(f"{path}[{index}]", f"expected a text of 1 to {MAX_STOP_STRING_CHARS} characters")
    return tuple(stops)


def _read_bias(value: Any, path: str) -> dict[int, float]:
    if len(as_object(value, path)) > MAX_LOGIT_BIAS:
        raise bad(path, f"expected at most {MAX_LOGIT_BIAS} entries, got {len(value)}")
    biases = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise bad(f"{path}.{key[:40]}", "expected a token id as the key")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise bad(f"{path}.{key}", f"expected a number of -100 to 100, got {shown(bias)}")
        biases[int(key)] = float(bias)
    return biases


SAMPLING_FIELDS = (
    Field("n", "integer", "Completions of the prompt.", default=1, minimum=1, maximum=MAX_N),
    Field("temperature", "number", default=1.0, minimum=0, maximum=2),
    Field("top_p", "number", default=1.0, minimum=0, maximum=1),
    Field("top_k", "integer", "0 and -1 are off.", default=0, minimum=-1, maximum=MAX_INT),
    Field("min_p", "number", default=0.0, minimum=0, maximum=1),
    Field("presence_penalty", "number", default=0.0, minimum=-2, maximum=2),
    Field("frequency_penalty", "number", default=0.0, minimum=-2, maximum=2),
    Field("repetition_penalty", "number", default=1.0, minimum=0.001, maximum=100),
    Field("logit_bias", "object", "Biases by token id.", read=_read_bias),
    Field("seed", "integer", minimum=-(2**63), maximum=2**63 - 1),
    Field("stop", "any", "Texts that end a completion.", default=(), read=_read_stop,
          schema={"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
    Field("stop_token_ids", "any", "Tokens that end a completion.", default=(),
          schema={"type": "array", "items": {"type": "integer"}},
          read=lambda value, path: tuple(as_token_ids(as_array(value, path, MAX_STOP_TOKEN_IDS), path))),
    Field("include_stop_str_in_output", "boolean", default=False),
    Field("ignore_eos", "boolean", default=False),
    Field("min_tokens", "integer", default=0, minimum=0, maximum=MAX_INT),
    Field("skip_special_tokens", "boolean", default=True),
    Field("prompt_logprobs", "integer", "Of the prompt's tokens; not in streams.", minimum=0, maximum=MAX_LOGPROBS),
    Field("response_format", "object", "text, json_object or json_schema."),
    Field("structured_outputs", "object", "One of json, regex, choice, grammar, json_object."),
    Field("guided_json", "any", "A JSON schema, or its text."),
    Field("guided_regex", "string"),
    Field("guided_choice", "array", items=Field("", "string", nullable=False)),
    Field("guided_grammar", "string"),
)  # fmt: skip
# What changes the output and is not done: silence about it would be a lie.
UNSUPPORTED = {
    "use_beam_search": "beam search is not supported",
    "bad_words": "is not supported; use logit_bias",
    "allowed_token_ids": "is not supported; use guided_choice or logit_bias",
    "logits_processors": "is not supported",
    "truncate_prompt_tokens": "prompts are not truncated; send fewer tokens",
    "prompt_embeds": "the model takes text and token ids alone",
    "guided_whitespace_pattern": "is not supported; use guided_grammar",
    "structural_tag": "is not supported; use guided_grammar",
}
_PLAIN = (
    "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "logit_bias", "seed", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens",
    "skip_special_tokens", "prompt_logprobs",
)  # fmt: skip


def read_sampling(
    values: Body, options: ServerOptions, *, max_tokens: int | None, logprobs: int | None
) -> SamplingParams:
    """SAMPLING_FIELDS as SamplingParams. Raises ServiceError 400."""
    if values["top_p"] == 0:
        raise bad("top_p", "expected a number above 0, at most 1")
    if max_tokens is not None and values["min_tokens"] > max_tokens:
        raise bad("min_tokens", f"expected at most max_tokens={max_tokens}, got {values['min_tokens']}")
    if values.get("stream") and values["prompt_logprobs"] is not None:
        raise bad("prompt_logprobs", "expected stream to be false with it")
    fields = {name: values[name] for name in _PLAIN}
    fields |= {"max_tokens": max_tokens, "logprobs": logprobs} | _structured(values, options)
    try:
        return SamplingParams(**fields)
    except ValueError as error:
        raise from_value_error(error) from None


def constraints_asked(values: Body) -> list[str]:
    """The fields of a request that constrain its output."""
    names = ("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")
    return [
        name
        for name in names
        if values[name] is not None and not (name == "response_format" and values[name].get("type") == "text")
    ]


def _structured(values: Body, options: ServerOptions) -> dict[str, Any]:
    """What the output is constrained to, by whichever name it was asked for; one at most."""
    asked = constraints_asked(values)
    if len(asked) > 1:
        raise bad(asked[1], f"expected one constraint of the output, got {asked[0]} too")
    if not asked:
        return {}
    name = asked[0]
    value = values[name]
    if name == "response_format":
        return _response_format(value, options)
    if name == "structured_outputs":
        given = [key for key in ("json", "regex", "choice", "grammar", "json_object") if value.get(key)]
        if len(given) != 1:
            raise bad(name, "expected one of json, regex, choice, grammar, json_object")
        return _constraint(given[0], value[given[0]], f"{name}.{given[0]}", options)
    return _constraint(name.removeprefix("guided_"), value, name, options)


def _response_format(value: Mapping[str, Any], options: ServerOptions) -> dict[str, Any]:
    kind = value.get("type")
    if kind == "json_object":
        return constrained_to_json("response_format.type")
    if kind == "json_schema":
        wanted = as_object(value.get("json_schema"), "response_format.json_schema")
        path = "response_format.json_schema.schema"
        return constrained_to_schema(wanted.get("schema"), path, options.max_schema_bytes)
    raise bad("response_format.type", f"expected text, json_object or json_schema, got {shown(kind)}")


def _constraint(kind: str, value: Any, path: str, options: ServerOptions) -> dict[str, Any]:
    if kind == "json_object":
        return constrained_to_json(path)
    if kind == "json":
        return constrained_to_schema(_schema(value, path), path, options.max_schema_bytes)
    if kind == "choice":
        choices = [as_text(text, f"{path}[{i}]") for i, text in enumerate(as_array(value, path, MAX_CHOICES))]
        if not choices:
            raise bad(path, "expected at least one choice")
        return constrained(path, choice=tuple(choices))
    limit = MAX_REGEX_CHARS if kind == "regex" else MAX_GRAMMAR_CHARS
    if not 0 < len(as_text(value, path)) <= limit:
        raise bad(path, f"expected a text of 1 to {limit} characters")
    return constrained(path, **{kind: value})


def _schema(value: Any, path: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return decode_body(value.encode(), MAX_SCHEMA_DEPTH)
    except ServiceError as error:
        raise bad(path, error.message) from None
