"""What the examples share: where the server is, three tools, three questions, and what the answers must hold."""

from __future__ import annotations

import json
import os
import sys

BASE_URL = os.environ.get("JAXCEPT_URL", "http://127.0.0.1:8000")
MODEL = "shipped"
CITIES = {"france": "Paris", "japan": "Tokyo", "italy": "Rome"}
QUESTIONS = (
    ("What is 37 * 91?", "3367"),
    ("What is the capital of France?", "Paris"),
    ("What is 12 * 12?", "144"),
)


def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression."""
    numbers = expression.replace(" ", "").split("*")
    return str(int(numbers[0]) * int(numbers[1]))


def lookup(entity: str, attribute: str) -> str:
    """Look up an attribute of an entity."""
    return CITIES.get(entity.lower(), "unknown") if attribute == "capital" else "unknown"


FUNCTIONS = {"calculator": calculator, "lookup": lookup}
PARAMETERS = {
    "calculator": {
        "type": "object",
        "properties": {"expression": {"type": "string"}},
        "required": ["expression"],
    },
    "lookup": {
        "type": "object",
        "properties": {"entity": {"type": "string"}, "attribute": {"type": "string"}},
        "required": ["entity", "attribute"],
    },
}
DESCRIPTIONS = {name: str(function.__doc__) for name, function in FUNCTIONS.items()}
CALLED: list[str] = []


def run_tool(name: str, arguments: str | dict[str, str]) -> str:
    """What a client does with a call."""
    CALLED.append(name)
    given = json.loads(arguments) if isinstance(arguments, str) else arguments
    return FUNCTIONS[name](**given)


def check(answers: list[str], calls: int | None = None) -> None:
    """Every answer is right, and tools were called on the way."""
    num_calls = len(CALLED) if calls is None else calls
    for (question, expected), answer in zip(QUESTIONS, answers, strict=True):
        print(f"{question} -> {answer.strip()}")
        if expected not in answer:
            sys.exit(f"expected {expected!r} in the answer")
    if num_calls < len(QUESTIONS):
        sys.exit(f"{num_calls} tool calls: expected at least {len(QUESTIONS)}")
    print(f"right, with {num_calls} tool calls")
