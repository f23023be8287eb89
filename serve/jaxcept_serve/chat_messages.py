"""Messages and tools in the OpenAI chat form: what is read, and what the OpenAPI document says of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxcept_serve.client_tools import ToolLimits, read_function
from jaxcept_serve.wire import as_object, as_text, bad, shown

ROLES = ("system", "developer", "user", "assistant", "tool")

_TEXT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["type", "text"],
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
            },
        },
    ]
}
MESSAGE_SCHEMA = {
    "anyOf": [
        {
            "type": "object",
            "required": ["role", "content"],
            "properties": {"role": {"enum": list(ROLES[:-1])}, "content": _TEXT_SCHEMA, "name": {"type": "string"}},
        },
        {
            "type": "object",
            "required": ["role", "tool_call_id", "content"],
            "properties": {"role": {"const": "tool"}, "tool_call_id": {"type": "string"}, "content": _TEXT_SCHEMA},
        },
        {
            "type": "object",
            "required": ["role", "tool_calls"],
            "properties": {
                "role": {"const": "assistant"},
                "tool_calls": {"type": "array", "items": {"type": "object"}},
            },
        },
    ]
}
TOOL_SCHEMA = {
    "type": "object",
    "required": ["type", "function"],
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "required": ["name"],
            "properties": {
                "name": {"type": "string", "pattern": "^[A-Za-z0-9_.:/-]{1,128}$"},
                "description": {"type": ["string", "null"]},
                "parameters": {"type": ["object", "null"], "properties": {"type": {"const": "object"}}},
            },
        },
    },
}


def read_messages(given: Sequence[Mapping[str, Any]], max_messages: int) -> list[dict[str, Any]]:
    """Messages, checked. Every tool message answers a call of the assistant's turn before it, once."""
    if len(given) > max_messages:
        raise bad("messages", f"expected at most {max_messages}, got {len(given)}")
    messages: list[dict[str, Any]] = []
    open_calls: set[str] = set()
    for i, message in enumerate(given):
        path = f"messages[{i}]"
        role = message.get("role")
        if role not in ROLES:
            raise bad(f"{path}.role", f"expected one of {', '.join(ROLES)}, got {shown(role)}")
        content = _content(message.get("content"), f"{path}.content")
        read: dict[str, Any] = {"role": "system" if role == "developer" else role, "content": content}
        if role == "tool":
            call_id = as_text(message.get("tool_call_id"), f"{path}.tool_call_id")
            if call_id not in open_calls:
                raise bad(f"{path}.tool_call_id", f"{shown(call_id)} is no call that is still to be answered")
            open_calls.discard(call_id)
            read["tool_call_id"] = call_id
        elif role == "assistant":
            calls = _calls(message.get("tool_calls"), f"{path}.tool_calls")
            open_calls = {call["id"] for call in calls}
            if calls:
                read["tool_calls"] = calls
            for name in ("reasoning_content", "reasoning"):
                if isinstance(message.get(name), str):
                    read["reasoning_content"] = message[name]
        else:
            open_calls = set()
        if content is None and not (role == "assistant" and (read.get("tool_calls") or "reasoning_content" in read)):
            raise bad(f"{path}.content", "expected text, or parts of text")
        if message.get("name") is not None:
            read["name"] = as_text(message["name"], f"{path}.name")
        messages.append(read)
    return messages


def _content(value: Any, path: str) -> Any:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise bad(path, f"expected text, or an array of parts, got {shown(value)}")
    parts = []
    for i, part in enumerate(value):
        kind = as_object(part, f"{path}[{i}]").get("type")
        if kind == "refusal":
            parts.append({"type": "text", "text": as_text(part.get("refusal"), f"{path}[{i}].refusal")})
        elif kind != "text":
            raise bad(f"{path}[{i}].type", f"the model takes text alone, got {shown(kind)}")
        else:
            parts.append({"type": "text", "text": as_text(part.get("text"), f"{path}[{i}].text")})
    return parts


def _calls(value: Any, path: str) -> list[dict[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise bad(path, f"expected an array, got {shown(value)}")
    calls, seen = [], set()
    for i, call in enumerate(value):
        at = f"{path}[{i}]"
        call_id = as_text(as_object(call, at).get("id"), f"{at}.id")
        function = as_object(call.get("function"), f"{at}.function")
        if call_id in seen:
            raise bad(f"{at}.id", f"{shown(call_id)} names two calls")
        seen.add(call_id)
        name = as_text(function.get("name"), f"{at}.function.name")
        arguments = function.get("arguments")
        if not isinstance(arguments, str | dict):
            raise bad(f"{at}.function.arguments", f"expected JSON in a string, got {shown(arguments)}")
        calls.append({"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}})
    return calls


def read_tools(given: Sequence[Mapping[str, Any]], limits: ToolLimits) -> list[dict[str, Any]]:
    """The client's tools, checked."""
    limits.check(given, "tools")
    tools = []
    for i, tool in enumerate(given):
        if tool.get("type") != "function":
            raise bad(f"tools[{i}].type", f"expected function, got {shown(tool.get('type'))}")
        tools.append(read_function(as_object(tool.get("function"), f"tools[{i}].function"), f"tools[{i}].function"))
    limits.check_names(tools, "tools")
    return tools


def read_tool_choice(choice: Any) -> str:
    """ChatTurn.tool_choice."""
    if choice is None:
        return "auto"
    if isinstance(choice, str):
        if choice not in ("none", "auto", "required"):
            raise bad("tool_choice", f"expected none, auto, required or an object, got {shown(choice)}")
        return choice
    if as_object(choice, "tool_choice").get("type") != "function":
        raise bad("tool_choice.type", f"expected function, got {shown(choice.get('type'))}")
    function = as_object(choice.get("function"), "tool_choice.function")
    return as_text(function.get("name"), "tool_choice.function.name")
