"""Items of /v1/responses and blocks of /v1/messages as chat messages: every message has one form, whatever it came in.

The service finds a conversation again by its messages, so equal conversations become equal messages: what moves between
turns without meaning anything (cache marks, ids of items, thinking) is left out, one text part is a string, and what
was emitted as several items or blocks of one assistant's turn is one message again. Calls that the server ran in the
course of a turn stand beside its text, under SERVER_CALLS, for they are in the ids that the service goes on from;
`with_server_calls` makes messages of them where those ids are not known any more.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxcept_serve.turns import FullCall
from jaxcept_serve.wire import as_array, as_object, as_text, bad, shown

Message = dict[str, Any]
Object = Mapping[str, Any]

SERVER_CALLS = "server_calls"  # of an assistant message: the calls that this server ran in the course of it
SERVER_LABEL = "jaxcept"  # the "MCP server" under which calls that this server ran are shown
_ROLES = ("user", "assistant", "system", "developer")
# Claude Code's first system block: a checksum of the request, for the vendor's servers; another one in every request.
_BILLING_MARK = "x-anthropic-billing-header:"


def filled_text(value: Any, path: str) -> str:
    """The value, a string that is not empty. Raises ServiceError 400."""
    if not as_text(value, path):
        raise bad(path, "expected a string that is not empty")
    return str(value)


def content_of(texts: Sequence[str]) -> str | list[dict[str, str]]:
    """A message's content: one text is a string, several are text parts."""
    if len(texts) == 1:
        return texts[0]
    return [{"type": "text", "text": text} for text in texts] if texts else ""


def chat_call(call_id: str, name: str, arguments: str) -> Message:
    """A call as an entry of an assistant message's `tool_calls`."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def tool_message(call_id: str, text: str | list[dict[str, str]]) -> Message:
    """A tool's answer."""
    return {"role": "tool", "tool_call_id": call_id, "content": text}


class Conversation:
    """Collects the messages of a conversation in order; an assistant's texts and calls join into its turn.

    `open_calls` are ids of calls that what was said before left to be answered.
    """

    def __init__(self, open_calls: Iterable[str] = ()) -> None:
        self.messages: list[Message] = []
        self._open_calls = set(open_calls)
        self._turn: Message | None = None  # the assistant's turn that may go on

    def add(self, role: str, content: str | list[dict[str, str]]) -> None:
        """A message of its own."""
        self._turn = None
        self.messages.append({"role": role, "content": content})

    def begin_turn(self) -> None:
        """Begins a turn of the assistant."""
        self._turn = {"role": "assistant", "content": ""}
        self.messages.append(self._turn)

    def add_text(self, text: str, goes_on: bool = False) -> None:
        """Text of the assistant: behind a call, or where it `goes_on`, of the same turn; otherwise it begins one."""
        if not (self._turn is not None and (goes_on or "tool_calls" in self._turn or SERVER_CALLS in self._turn)):
            self.begin_turn()
        self._going_on()["content"] += text

    def add_call(self, call_id: str, name: str, arguments: str) -> None:
        """A call of the assistant for its client; it belongs to the text before it."""
        self._going_on().setdefault("tool_calls", []).append(chat_call(call_id, name, arguments))
        self._open_calls.add(call_id)

    def add_server_call(self, call_id: str, name: str, arguments: str, result: str) -> None:
        """A call that the server ran; the assistant's turn goes on behind it."""
        turn = self._going_on()
        call = {"after": len(turn["content"]), "id": call_id, "name": name, "arguments": arguments, "result": result}
        turn.setdefault(SERVER_CALLS, []).append(call)

    def _going_on(self) -> Message:
        if self._turn is None:
            self.begin_turn()
        assert self._turn is not None, "a turn has begun"
        return self._turn

    def add_answer(self, call_id: str, content: str | list[dict[str, str]], where: str) -> None:
        """A tool's answer. Raises ServiceError 400, naming `where`, unless the call is still to be answered."""
        if call_id not in self._open_calls:
            raise bad(where, f"{shown(call_id)} is no call that is still to be answered")
        self._open_calls.discard(call_id)
        self._turn = None
        self.messages.append(tool_message(call_id, content))


def open_calls_of(messages: Iterable[Object]) -> set[str]:
    """Ids of the calls that the messages leave to be answered."""
    found: set[str] = set()
    for message in messages:
        found |= {call["id"] for call in message.get("tool_calls", ())}
        found.discard(message.get("tool_call_id", ""))
    return found


def with_one_system(messages: Sequence[Object]) -> list[Object]:
    """The messages with the leading ones of the system as one: many templates take no second."""
    count = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    if count < 2:
        return list(messages)
    contents = [message["content"] for message in messages[:count]]
    texts = [text if isinstance(text, str) else "\n".join(part["text"] for part in text) for text in contents]
    return [{"role": "system", "content": "\n\n".join(texts)}, *messages[count:]]


def with_server_calls(messages: Sequence[Object]) -> list[Object]:
    """The messages with the calls that this server ran as messages of their own: a call, its answer, what came next."""
    made: list[Object] = []
    for message in messages:
        calls = message.get(SERVER_CALLS)
        if not calls:
            made.append(message)
            continue
        conversation, told = Conversation(), 0
        for call in calls:
            conversation.add_text(message["content"][told : call["after"]])
            conversation.add_call(call["id"], call["name"], call["arguments"])
            conversation.add_answer(call["id"], call["result"], SERVER_CALLS)
            told = call["after"]
        rest = {name: value for name, value in message.items() if name != SERVER_CALLS}
        last = {**rest, "content": message["content"][told:]}
        made += [*conversation.messages, *([last] if last["content"] or "tool_calls" in last else [])]
    return made


# ---- /v1/responses


def messages_of_items(
    items: Sequence[Any],
    resolve: Callable[[str], Object | None],
    where: str = "input",
    open_calls: Iterable[str] = (),
) -> list[Message]:
    """The messages that items make. `resolve` finds the item of an item_reference, None where there is none;
    `open_calls` are the calls that the conversation before them left to be answered.

    Raises ServiceError, naming the field, for what a text model cannot take.
    """
    conversation = Conversation(open_calls)
    for i, item in enumerate(items):
        _add_item(conversation, as_object(item, f"{where}[{i}]"), resolve, f"{where}[{i}]")
    return conversation.messages


def _add_item(conversation: Conversation, item: Object, resolve: Callable[[str], Object | None], where: str) -> None:
    kind = item.get("type") or ("message" if "role" in item else "item_reference" if "id" in item else None)
    match kind:
        case "message":
            _add_message_item(conversation, item, where)
        case "function_call":
            conversation.add_call(*_call_fields(item, "call_id", where))
        case "function_call_output":
            call_id = filled_text(item.get("call_id"), f"{where}.call_id")
            conversation.add_answer(call_id, _texts(item.get("output"), f"{where}.output"), f"{where}.call_id")
        case "mcp_call":
            conversation.add_server_call(*_call_fields(item, "id", where), mcp_call_text(item))
        case "reasoning" | "mcp_list_tools":
            pass  # nothing that the model is shown again
        case "item_reference":
            found = resolve(filled_text(item.get("id"), f"{where}.id"))
            if found is None or found.get("type") == "item_reference":
                raise bad(f"{where}.id", f"there is no stored item {shown(item['id'])}", status=404)
            _add_item(conversation, found, resolve, where)
        case _:
            raise bad(
                f"{where}.type",
                f"items of type {shown(kind)} are not supported; expected message, function_call, "
                "function_call_output, mcp_call, reasoning or item_reference",
            )


def _call_fields(item: Object, id_field: str, where: str) -> tuple[str, str, str]:
    call_id = filled_text(item.get(id_field), f"{where}.{id_field}")
    name = filled_text(item.get("name"), f"{where}.name")
    return call_id, name, as_text(item.get("arguments"), f"{where}.arguments")


def _add_message_item(conversation: Conversation, item: Object, where: str) -> None:
    role = item.get("role")
    if role not in _ROLES:
        raise bad(f"{where}.role", f"expected one of {', '.join(_ROLES)}, got {shown(role)}")
    content = _texts(item.get("content"), f"{where}.content")
    if role == "assistant":
        conversation.add_text(content if isinstance(content, str) else "".join(part["text"] for part in content))
    else:
        conversation.add("system" if role == "developer" else role, content)


def _texts(content: Any, where: str) -> str | list[dict[str, str]]:
    """The content of a message or a tool's answer: a string, or parts with text."""
    if isinstance(content, str):
        return content
    texts = []
    for i, part in enumerate(as_array(content, where)):
        kind = as_object(part, f"{where}[{i}]").get("type")
        if kind not in ("input_text", "output_text", "text", "refusal"):
            raise bad(f"{where}[{i}].type", f"this model takes text only (input_text), got {shown(kind)}")
        field = "refusal" if kind == "refusal" else "text"
        texts.append(as_text(part.get(field), f"{where}[{i}].{field}"))
    return content_of(texts)


def mcp_call_text(item: Object) -> str:
    """What a call that the server ran gave, as the model saw it."""
    output, error = item.get("output"), item.get("error")
    if isinstance(output, str):
        return output
    parts = error.get("content") if isinstance(error, Mapping) else error
    if isinstance(parts, list):
        return "".join(str(part.get("text", "")) for part in parts if isinstance(part, Mapping))
    return parts if isinstance(parts, str) else ""


def function_call_item(item_id: str, call: FullCall, status: str = "completed") -> dict[str, Any]:
    """A call that the client is to run."""
    return {
        "id": item_id,
        "type": "function_call",
        "status": status,
        "call_id": call.call_id,
        "name": call.name,
        "arguments": call.arguments,
    }


def mcp_call_item(call: FullCall, status: str) -> dict[str, Any]:
    """A call that the server runs, with its result where there is one.

    An `mcp_call`, which says that the provider ran it: clients show it and send it back. A `function_call` would have
    the Agents SDK look for a function of its own, and fail. Its `id` is the call's, so that the item alone tells it.
    """
    failed = {"type": "mcp_tool_execution_error", "content": [{"type": "text", "text": call.result or ""}]}
    return {
        "id": call.call_id,
        "type": "mcp_call",
        "status": status,
        "server_label": SERVER_LABEL,
        "name": call.name,
        "arguments": call.arguments,
        "approval_request_id": None,
        "output": None if call.is_error else call.result,
        "error": failed if call.is_error else None,
    }


# ---- /v1/messages


def messages_of_anthropic(system: Any, messages: Any) -> list[Message]:
    """The chat messages of an Anthropic conversation. Raises ServiceError, naming the field."""
    conversation = Conversation()
    if system is not None:
        texts = [text for text in _block_texts(system, "system") if not text.startswith(_BILLING_MARK)]
        if any(texts):
            conversation.add("system", content_of(texts))
    for i, message in enumerate(as_array(messages, "messages")):
        _add_anthropic(conversation, as_object(message, f"messages[{i}]"), f"messages[{i}]")
    return conversation.messages


def _add_anthropic(conversation: Conversation, message: Object, where: str) -> None:
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise bad(f"{where}.role", f"expected user, assistant or system, got {shown(role)}")
    if content is None:
        raise bad(f"{where}.content", "expected a string or an array of blocks")
    if role == "system" or (role == "user" and isinstance(content, str)):
        conversation.add(role, content_of(_block_texts(content, f"{where}.content")))
    elif role == "user":
        _add_user_blocks(conversation, as_array(content, f"{where}.content"), f"{where}.content")
    else:
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        _add_assistant_blocks(conversation, as_array(blocks, f"{where}.content"), f"{where}.content")


def _add_user_blocks(conversation: Conversation, blocks: list[Any], where: str) -> None:
    """Tool results first, each a message: they answer the turn before; then the user's text as one message."""
    texts: list[str] = []
    num_results = 0
    for i, item in enumerate(blocks):
        block, at = as_object(item, f"{where}[{i}]"), f"{where}[{i}]"
        if block.get("type") != "tool_result":
            texts.append(_block_text(block, at))
            continue
        call_id = filled_text(block.get("tool_use_id"), f"{at}.tool_use_id")
        content = block.get("content")
        answers = _block_texts("" if content is None else content, f"{at}.content")
        if block.get("is_error") is True and not "".join(answers).lower().startswith("error"):
            answers = ["error: " + "".join(answers[:1]), *answers[1:]]  # as our own tools tell the model
        conversation.add_answer(call_id, content_of(answers), f"{at}.tool_use_id")
        num_results += 1
    if texts or not num_results:
        conversation.add("user", content_of(texts))


def _add_assistant_blocks(conversation: Conversation, blocks: list[Any], where: str) -> None:
    """One turn, with the calls that the server ran in the course of it."""
    conversation.begin_turn()
    results = {
        str(block.get("tool_use_id")): (block.get("content"), f"{where}[{i}].content")
        for i, block in enumerate(blocks)
        if isinstance(block, Mapping) and block.get("type") == "mcp_tool_result"
    }
    for i, item in enumerate(blocks):
        block, at = as_object(item, f"{where}[{i}]"), f"{where}[{i}]"
        kind = block.get("type")
        if kind in ("tool_use", "mcp_tool_use"):
            call_id, name = filled_text(block.get("id"), f"{at}.id"), filled_text(block.get("name"), f"{at}.name")
            arguments = json_text(as_object(block.get("input"), f"{at}.input"), f"{at}.input")
            if kind == "tool_use":
                conversation.add_call(call_id, name, arguments)
            else:
                answer, place = results.get(call_id, ("", ""))
                result = "".join(_block_texts("" if answer is None else answer, place))
                conversation.add_server_call(call_id, name, arguments, result)
        elif kind not in ("mcp_tool_result", "thinking", "redacted_thinking"):  # thinking is not shown again
            conversation.add_text(_block_text(block, at), goes_on=True)


def _block_texts(content: Any, where: str) -> list[str]:
    """The texts of a string or of text blocks."""
    if isinstance(content, str):
        return [content]
    return [
        _block_text(as_object(block, f"{where}[{i}]"), f"{where}[{i}]")
        for i, block in enumerate(as_array(content, where))
    ]


def _block_text(block: Object, where: str) -> str:
    if block.get("type") != "text":
        raise bad(
            f"{where}.type",
            f"this model takes text only; blocks of type {shown(block.get('type'))} are not supported here",
        )
    return as_text(block.get("text"), f"{where}.text")


def json_text(value: Any, where: str) -> str:
    """A value as JSON text, keys in their order."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise bad(where, "nested too deeply") from None


def input_object(arguments: str) -> dict[str, Any]:
    """A call's arguments as the object that a tool_use block carries; {} where a broken turn left no object."""
    try:
        value = json.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
