"""Conversations for the shipped model, generated from a seed.

Training and held-out conversations differ in their phrasings (`phrases.py` keeps some back), in their numbers of two
digits or more and in their entities and made-up names (`source.is_reserved` keeps an eighth back). A held-out prompt
uses reserved phrasings, numbers and names only.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from examples.shipped_model import phrases, requests
from examples.shipped_model.requests import Call, Exchange
from examples.shipped_model.source import Source

Message = dict[str, Any]
PARAMETERS = {
    "calculator": ("expression",),
    "lookup": ("entity", "attribute"),
    "convert": ("value", "unit_from", "unit_to"),
}
DISTRACTORS = {"weather": ("city",), "search": ("query",), "clock": ("timezone",), "translate": ("text", "language")}
NO_TOOL = "Sorry, I have no tool for that."
# Shares of the kinds of conversation; the last request of a conversation decides its kind.
KINDS = {
    "arithmetic": 20,
    "nested": 10,
    "chained": 10,
    "lookup": 12,
    "convert": 12,
    "plain": 7,
    "parallel": 7,
    "follow_up": 6,
    "error": 5,
    "no_tool": 3,
    "custom": 1,
}
# Training sees more of what is hard to learn; held-out conversations keep the shares above.
TRAINING_KINDS = KINDS | {"lookup": 16, "parallel": 24, "custom": 3}


@dataclass(frozen=True, slots=True)
class Conversation:
    """A whole conversation; `prompt` is what comes before the answer to its last request.

    `expected` are the strings that this answer must hold, `calls` the tool calls on the way to it.
    """

    kind: str
    messages: list[Message]
    tools: list[dict[str, Any]]
    num_prompt_messages: int
    expected: tuple[str, ...]
    calls: tuple[Call, ...]
    phrasings: frozenset[str]

    @property
    def prompt(self) -> list[Message]:
        return self.messages[: self.num_prompt_messages]

    @property
    def tool_names(self) -> tuple[str, ...]:
        return tuple(call.name for call in self.calls)


def training(seed: int) -> Iterator[Conversation]:
    """Endless training conversations."""
    rng = random.Random(f"train-{seed}")
    while True:
        yield _conversation(Source(rng, held_out=False))


def held_out(seed: int, count: int) -> list[Conversation]:
    """`count` conversations of phrasings, numbers and names that training never shows."""
    rng = random.Random(f"held-out-{seed}")
    return [_conversation(Source(rng, held_out=True)) for _ in range(count)]


def call_message(calls: list[tuple[str, dict[str, Any]]]) -> Message:
    """An assistant message that calls tools, in the form of the OpenAI API."""
    functions = [{"name": name, "arguments": arguments} for name, arguments in calls]
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": f} for f in functions]}


def tool_schema(name: str, parameters: tuple[str, ...]) -> dict[str, Any]:
    """A tool in the form of the OpenAI API."""
    properties = {parameter: {"type": "number" if parameter == "value" else "string"} for parameter in parameters}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": name, "parameters": schema}}


def _conversation(source: Source) -> Conversation:
    rng = source.rng
    kinds = KINDS if source.held_out else TRAINING_KINDS
    kind = rng.choices(tuple(kinds), tuple(kinds.values()))[0]
    earlier = rng.choices((0, 1, 2, 3), (76, 15, 6, 3))[0]
    tools = {name: PARAMETERS[name] for name in requests.BUILTINS}
    exchanges = [requests.simple(source) for _ in range(earlier)]
    match kind:
        case "follow_up":
            exchanges += requests.follow_up(source)
        case "no_tool":
            last = requests.simple(source, plain=False)
            exchanges = [Exchange(last.text, (), NO_TOOL, (NO_TOOL,))]
            tools = {} if rng.random() < 0.3 else {k: v for k, v in tools.items() if k != last.rounds[0][0].name}
        case "custom":
            name, parameters = requests.custom_tool(source)
            tools[name] = parameters
            exchanges.append(requests.custom(source, name, parameters))
        case _:
            exchanges.append(requests.MAKERS[kind](source))
    return _assemble(source, kind, exchanges, tools)


def _assemble(source: Source, kind: str, exchanges: list[Exchange], tools: dict[str, tuple[str, ...]]) -> Conversation:
    rng = source.rng
    last = exchanges[-1]
    if kind != "no_tool":
        called = {call.name for exchange in exchanges for calls in exchange.rounds for call in calls}
        tools = {name: parameters for name, parameters in tools.items() if name in called or rng.random() < 0.8}
        if kind == "plain" and rng.random() < 0.3 and not called:
            tools = {}
    if tools and rng.random() < 0.1:
        extra = rng.choice(tuple(DISTRACTORS))
        tools[extra] = DISTRACTORS[extra]
        if rng.random() < 0.4:
            tools.update([requests.custom_tool(source)])
    order = rng.sample(list(tools), len(tools)) if rng.random() < 0.6 else list(tools)
    messages: list[Message] = []
    if rng.random() < 0.3:
        messages.append({"role": "system", "content": source.phrase(phrases.SYSTEMS)})
    num_prompt_messages = 0
    for exchange in exchanges:
        messages.append({"role": "user", "content": exchange.text})
        num_prompt_messages = len(messages)
        messages.extend(_assistant_messages(exchange))
    return Conversation(
        kind=kind,
        messages=messages,
        tools=[tool_schema(name, tools[name]) for name in order],
        num_prompt_messages=num_prompt_messages,
        expected=last.expected,
        calls=tuple(call for calls in last.rounds for call in calls),
        phrasings=frozenset(source.used),
    )


def _assistant_messages(exchange: Exchange) -> Iterator[Message]:
    for calls in exchange.rounds:
        yield call_message([(call.name, call.arguments) for call in calls])
        for call in calls:
            yield {"role": "tool", "content": call.response}
    yield {"role": "assistant", "content": exchange.answer}
