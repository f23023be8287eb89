"""What a benchmark's conversations say: made up, or read from a file. The model's own turns are its own."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxcept.tools.builtin import calculator

Message = dict[str, Any]

DATASETS = ("words", "calculator")
_WORDS = [
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state",
    "family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week", "company", "system",
    "program", "question", "work", "government", "number", "night", "point", "home", "water", "room", "mother", "area",
    "money", "story", "fact", "month", "lot", "right", "study", "book", "eye", "job", "word", "business", "issue",
    "side", "kind", "head", "house", "service", "friend",
]  # fmt: skip

CALCULATOR: Mapping[str, Any] = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluate an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string", "description": "such as 37 * 91"}},
            "required": ["expression"],
        },
    },
}


@dataclass(frozen=True, slots=True)
class Shape:
    """How long made-up conversations are: words of the beginning (half of them shared by all) and of each later
    message."""

    turns: int = 6
    words_first: int = 200
    words_later: int = 40


@dataclass(frozen=True, slots=True)
class Script:
    """One conversation: `opening` is sent first, `steps[i]` after the model's i-th turn.

    Where the model's turn calls tools, each call gets an answer: the calculator's, or the texts of the next step.
    """

    opening: tuple[Message, ...]
    steps: tuple[tuple[Message, ...], ...]
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def num_requests(self) -> int:
        """Turns of the model."""
        return 1 + len(self.steps)


def make_scripts(dataset: str, count: int, shape: Shape, seed: int) -> list[Script]:
    """`dataset`: words, calculator, or a JSONL file of {"messages": [...], "tools": [...]}. ValueError says what a
    file lacks."""
    if dataset == "words":
        return [_words(shape, seed, i) for i in range(count)]
    if dataset == "calculator":
        return [_calculator(shape, seed, i) for i in range(count)]
    scripts = read_scripts(Path(dataset), shape.turns)
    first = random.Random(seed).randrange(len(scripts))
    return [scripts[(first + i) % len(scripts)] for i in range(count)]


def _words(shape: Shape, seed: int, index: int) -> Script:
    shared, own = random.Random(f"{seed}"), random.Random(f"{seed}-{index}")
    system = " ".join(shared.choices(_WORDS, k=max(1, shape.words_first // 2)))
    first = " ".join(own.choices(_WORDS, k=max(1, shape.words_first // 2)))
    later = [" ".join(own.choices(_WORDS, k=max(1, shape.words_later))) for _ in range(shape.turns - 1)]
    opening: tuple[Message, ...] = ({"role": "system", "content": system}, {"role": "user", "content": first})
    return Script(opening, tuple(({"role": "user", "content": text},) for text in later))


def _calculator(shape: Shape, seed: int, index: int) -> Script:
    """Questions that need the tool: a call and its answer are two turns of the model."""
    own = random.Random(f"{seed}-{index}")

    def question() -> tuple[Message, ...]:
        return ({"role": "user", "content": f"What is {own.randint(11, 99)} * {own.randint(11, 99)}?"},)

    return Script(question(), tuple(question() for _ in range(shape.turns - 1)), (CALCULATOR,))


def read_scripts(path: Path, turns: int) -> list[Script]:
    """Recorded conversations, of at most so many turns of the model. Their assistant messages only separate turns."""
    scripts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            scripts.append(_script(row["messages"], row.get("tools", ()), turns))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f'{path}:{number}: expected {{"messages": [...]}} of a conversation: {error}') from error
    if not scripts:
        raise ValueError(f"{path}: expected a conversation a line, found none")
    return scripts


def _script(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], turns: int) -> Script:
    runs: list[list[Message]] = [[]]
    for message in messages:
        if message["role"] != "assistant":
            runs[-1].append({"role": message["role"], "content": message["content"]})
        elif runs[-1]:
            runs.append([])
    runs = [run for run in runs if run][:turns]
    if not runs:
        raise ValueError("a conversation without a message of its user")
    return Script(tuple(runs[0]), tuple(tuple(run) for run in runs[1:]), tuple(tools))


def answers(step: Sequence[Message], calls: Sequence[Mapping[str, Any]]) -> tuple[list[Message], bool]:
    """(what follows a turn of the model, whether that used the step up).

    The calculator's calls are computed, and the step waits for the next turn; other calls are answered with the step's
    texts. Without calls a recorded tool's answer is said by the user.
    """
    if not calls:
        return [{**message, "role": _spoken(message["role"])} for message in step], True
    if all(call["function"]["name"] == "calculator" for call in calls):
        return [_answer(call, _compute(call)) for call in calls], False
    texts = [str(message["content"]) for message in step] or ["done"]
    return [_answer(call, texts[min(i, len(texts) - 1)]) for i, call in enumerate(calls)], True


def _spoken(role: str) -> str:
    return "user" if role == "tool" else role


def _answer(call: Mapping[str, Any], text: str) -> Message:
    return {"role": "tool", "tool_call_id": call["id"], "content": text}


def _compute(call: Mapping[str, Any]) -> str:
    try:
        return str(calculator(json.loads(call["function"]["arguments"])["expression"]))
    except (ValueError, KeyError, TypeError) as error:
        return f"error: {error}"
