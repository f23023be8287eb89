"""A request to /v1/responses, read: its fields, and the turn of a conversation that it asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxcept.scheduler.params import MAX_LOGPROBS, SamplingParams
from jaxcept_serve.api import HINT_FIELDS, MAX_NAME_CHARS, all_fields, prewarms
from jaxcept_serve.client_tools import ToolLimits, constrained_to_json, constrained_to_schema, read_function
from jaxcept_serve.conversion import SERVER_LABEL, Message, messages_of_items, open_calls_of
from jaxcept_serve.limits import ServerOptions
from jaxcept_serve.turns import Hints
from jaxcept_serve.wire import Body, Field, as_array, as_object, as_text, bad, from_value_error, refuse_fields, shown

MAX_METADATA = 16
_INCLUDABLE = (
    "file_search_call.results", "web_search_call.results", "web_search_call.action.sources",
    "message.input_image.image_url", "computer_call_output.output.image_url", "code_interpreter_call.outputs",
    "reasoning.encrypted_content", "message.output_text.logprobs",
)  # fmt: skip
_REFUSED = {
    "background": "responses in the background are not supported; stream instead",
    "conversation": "stored conversations are not supported; use previous_response_id",
    "prompt": "stored prompts are not supported; send instructions and input",
    "moderation": "moderation is not supported",
}
# A model that never calls a hosted search answers as one that was not given it; Codex sends this tool to everybody.
_IGNORED_TOOLS = ("web_search", "web_search_preview")


def _read_metadata(value: Any, path: str) -> Body:
    for key, entry in as_object(value, path).items():
        if len(key) > 64:
            raise bad(f"{path}.{key[:64]}", "expected a key of at most 64 characters")
        if len(as_text(entry, f"{path}.{key}")) > 512:
            raise bad(f"{path}.{key}", "expected at most 512 characters")
    return dict(value)


PROMPT_FIELDS = all_fields(
    (
        Field("model", "string", "Name of the model; absent: the first.", max_length=MAX_NAME_CHARS),
        Field("input", "any", "A text, or items: messages, calls and their outputs.",
              schema={"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}),
        Field("instructions", "string", "A system message; of this response alone."),
        Field("previous_response_id", "string", "The response that this one goes on from.", max_length=MAX_NAME_CHARS),
        Field("tools", "array", "Functions of the client; which of the server's may be used.",
              items=Field("", "object", nullable=False)),
        Field("tool_choice", "any", "none, auto, required, or one tool.",
              schema={"anyOf": [{"enum": ["none", "auto", "required"]}, {"type": "object"}]}),
        Field("parallel_tool_calls", "boolean", default=True),
        Field("text", "object", "format: text, json_object or json_schema."),
        Field("truncation", "string", "auto drops the oldest turns where the prompt is too long.", default="disabled",
              choices=("auto", "disabled")),
        Field("reasoning", "object", "Accepted; how much a model thinks is its template's to say."),
    ),
    HINT_FIELDS,
)  # fmt: skip

RESPONSE_FIELDS = all_fields(
    PROMPT_FIELDS,
    (
        Field("stream", "boolean", "Answer as server-sent events.", default=False),
        Field("store", "boolean", "Keep the response, so that another may go on from it.", default=True),
        Field("max_output_tokens", "integer", "Most tokens to generate.", minimum=1, maximum=2**31 - 1),
        Field("max_tool_calls", "integer", "Most calls of the server's tools.", minimum=0, maximum=100_000),
        Field("temperature", "number", minimum=0, maximum=2, default=1.0),
        Field("top_p", "number", minimum=0, maximum=1, default=1.0),
        Field("top_logprobs", "integer", minimum=0, maximum=MAX_LOGPROBS),
        Field("metadata", "object", max_length=MAX_METADATA, read=_read_metadata),
        Field("include", "array", "message.output_text.logprobs is acted upon.", max_length=64,
              items=Field("", "string", nullable=False, choices=_INCLUDABLE)),
        Field("user", "string", max_length=MAX_NAME_CHARS),
        Field("safety_identifier", "string", max_length=MAX_NAME_CHARS),
        Field("service_tier", "string", max_length=64),
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ToolsAsked:
    """The tools of a request: the client's in the chat form, those of the server that may run, and how to show them."""

    client: list[dict[str, Any]]
    run_tools: tuple[str, ...] | None
    shown: list[dict[str, Any]]


def refuse_unsupported(body: Body) -> None:
    """Raises ServiceError 400 for what cannot be honoured."""
    refuse_fields(body, _REFUSED)


def read_input(
    values: Body,
    resolve: Callable[[str], Mapping[str, Any] | None],
    options: ServerOptions,
    before: Sequence[Mapping[str, Any]] = (),
) -> tuple[list[Mapping[str, Any]], list[Message]]:
    """(the input's items, its messages). `before` are the messages that it goes on from."""
    given = values["input"]
    if given is None:
        if values["previous_response_id"] is None:
            raise bad("input", "is missing: expected a string or an array of items")
        given = []
    if isinstance(given, str):
        given = [{"type": "message", "role": "user", "content": given}]
    elif not isinstance(given, list):
        raise bad("input", f"expected a string or an array of items, got {shown(given)}")
    if len(given) > options.max_messages:
        raise bad("input", f"expected at most {options.max_messages} items, got {len(given)}")
    messages = messages_of_items(given, resolve, open_calls=open_calls_of(before))
    if not messages and values["previous_response_id"] is None and not values["instructions"]:
        raise bad("input", "expected at least one message")
    return given, messages


def stored_items(items: Sequence[Mapping[str, Any]], new_id: Callable[[str], str]) -> list[dict[str, Any]]:
    """Input items as they are listed: with ids, and with content as parts."""
    made = []
    for item in items:
        kind = item.get("type") or ("message" if "role" in item else "item_reference")
        if kind == "item_reference":
            continue
        prefix = {"message": "msg", "function_call": "fc", "function_call_output": "fco"}.get(kind, "item")
        entry = {"status": "completed", **item, "type": kind}
        if not isinstance(entry.get("id"), str) or not entry["id"]:
            entry["id"] = new_id(prefix)
        if kind == "message" and isinstance(entry["content"], str):
            is_said = entry["role"] == "assistant"
            part = {"type": "output_text" if is_said else "input_text", "text": entry["content"]}
            entry["content"] = [{**part, "annotations": []} if is_said else part]
        made.append(entry)
    return made


def read_tools(values: Body, options: ServerOptions) -> ToolsAsked:
    """The request's tools."""
    given = values["tools"] or []
    limits = ToolLimits(options.max_tools, options.max_schema_bytes)
    limits.check(given, "tools")
    client: list[dict[str, Any]] = []
    listed: list[dict[str, Any]] = []
    run_tools: tuple[str, ...] | None = None
    for i, tool in enumerate(given):
        kind = tool.get("type")
        if kind == "function":
            client.append(read_function(tool, f"tools[{i}]"))
            listed.append({"strict": None, "description": None, **tool, **client[-1]["function"]})
        elif kind == "mcp":
            run_tools = (run_tools or ()) + _server_tools(tool, f"tools[{i}]")
            listed.append(tool)
        elif not (isinstance(kind, str) and kind.startswith(_IGNORED_TOOLS)):
            raise bad(f"tools[{i}].type", f"tools of type {shown(kind)} are not supported; expected function")
    limits.check_names(client, "tools")
    ours = (values["jaxcept"] or {}).get("run_tools")
    return ToolsAsked(client, run_tools if ours is None else tuple(ours), listed)


def _server_tools(tool: Mapping[str, Any], path: str) -> tuple[str, ...]:
    if tool.get("server_label") != SERVER_LABEL or tool.get("server_url") or tool.get("connector_id"):
        problem = "with allowed_tools; the tools that this server runs are named when it is started (--tools, --mcp)"
        raise bad(f"{path}.server_label", f"expected {SERVER_LABEL!r} {problem}")
    allowed = tool.get("allowed_tools")
    names = allowed.get("tool_names") if isinstance(allowed, Mapping) else allowed
    return tuple(
        as_text(name, f"{path}.allowed_tools[{i}]") for i, name in enumerate(as_array(names, f"{path}.allowed_tools"))
    )


def read_tool_choice(choice: Any, tools: ToolsAsked) -> tuple[str, ToolsAsked]:
    """(ChatTurn.tool_choice, the tools that may be chosen from)."""
    if choice is None:
        return "auto", tools
    if isinstance(choice, str):
        if choice not in ("none", "auto", "required"):
            raise bad("tool_choice", f"expected none, auto, required or an object, got {shown(choice)}")
        return choice, tools
    kind = as_object(choice, "tool_choice").get("type")
    if kind == "allowed_tools":
        return _allowed_tools(choice, tools)
    if kind == "mcp" and choice.get("server_label") == SERVER_LABEL:
        return as_text(choice.get("name"), "tool_choice.name"), tools
    if kind != "function":
        raise bad("tool_choice.type", f"expected function or allowed_tools, got {shown(kind)}")
    name = as_text(choice.get("name"), "tool_choice.name")
    if name not in [tool["function"]["name"] for tool in tools.client]:
        raise bad("tool_choice.name", f"there is no tool {shown(name)} in tools")
    return name, tools


def _allowed_tools(choice: Mapping[str, Any], tools: ToolsAsked) -> tuple[str, ToolsAsked]:
    mode = choice.get("mode")
    if mode not in ("auto", "required"):
        raise bad("tool_choice.mode", f"expected auto or required, got {shown(mode)}")
    known = [tool["function"]["name"] for tool in tools.client]
    names = []
    for i, entry in enumerate(as_array(choice.get("tools"), "tool_choice.tools")):
        path = f"tool_choice.tools[{i}]"
        names.append(as_text(as_object(entry, path).get("name"), f"{path}.name"))
        if names[-1] not in known:
            raise bad(f"{path}.name", f"there is no tool {shown(names[-1])} in tools")
    allowed = [tool for tool in tools.client if tool["function"]["name"] in names]
    return str(mode), replace(tools, client=allowed)


def read_params(values: Body, options: ServerOptions) -> SamplingParams:
    """Sampling as asked for; for counting alone, any."""
    if "max_output_tokens" not in values:
        return SamplingParams()
    if values["top_p"] == 0:
        raise bad("top_p", "expected a number above 0, at most 1")
    prewarm = prewarms(values)
    fields: dict[str, Any] = {
        "max_tokens": 1 if prewarm else values["max_output_tokens"],
        "temperature": values["temperature"],
        "top_p": values["top_p"],
        "logprobs": values["top_logprobs"] or (0 if wants_logprobs(values) else None),
    }
    if not prewarm:
        fields |= _text_format(values["text"] or {}, options)
    try:
        return SamplingParams(**fields)
    except ValueError as error:
        raise from_value_error(error) from None


def wants_logprobs(values: Body) -> bool:
    """Whether the response is to carry log-probabilities."""
    return bool(values["top_logprobs"]) or "message.output_text.logprobs" in (values["include"] or ())


def _text_format(text: Mapping[str, Any], options: ServerOptions) -> dict[str, Any]:
    """Fields of SamplingParams for text.format."""
    wanted = text.get("format")
    if wanted is None:
        return {}
    kind = as_object(wanted, "text.format").get("type")
    if kind == "text":
        return {}
    if kind == "json_object":
        return constrained_to_json("text.format.type")
    if kind == "json_schema":
        as_text(wanted.get("name"), "text.format.name")
        return constrained_to_schema(wanted.get("schema"), "text.format.schema", options.max_schema_bytes)
    raise bad("text.format.type", f"expected text, json_object or json_schema, got {shown(kind)}")


def read_hints(hints: Hints, values: Body, conversation: str) -> Hints:
    """The hints of a response of this conversation; explicit cache breakpoints say how long it is kept."""
    options = values["prompt_cache_options"] or {}
    ttl_s = hints.hold_ttl_s
    if options.get("mode") not in (None, "implicit", "explicit"):
        raise bad("prompt_cache_options.mode", f"expected implicit or explicit, got {shown(options['mode'])}")
    if options.get("mode") == "explicit" and not _has_breakpoint(values["input"]):
        ttl_s = 0.0  # nothing of this prompt is to be kept
    return replace(hints, conversation=conversation, hold_ttl_s=ttl_s)


def _has_breakpoint(given: Any) -> bool:
    items = given if isinstance(given, list) else []
    contents = [item.get("content") for item in items if isinstance(item, Mapping)]
    return any(
        part.get("prompt_cache_breakpoint")
        for content in contents
        if isinstance(content, list)
        for part in content
        if isinstance(part, Mapping)
    )
