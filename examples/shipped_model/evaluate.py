"""Measure the shipped model on held-out prompts: `python -m examples.shipped_model.evaluate`.

Each prompt is answered greedily, its tool calls are run, and the final text is right if it holds every expected string
and the tools called are those expected. `--engine transformers` answers with PyTorch, apart from all code of jaxcept.
"""

import argparse
import asyncio
import json
import re
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import track
from rich.table import Table

from examples.shipped_model import data, requests

TEST_SEED = 2
DEFAULT_MODEL = Path("models/jaxcept_models/shipped")
MAX_NEW_TOKENS = 200
MAX_ROUNDS = 4
BATCH_SIZE = 25
CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)


@dataclass(slots=True)
class Answer:
    """What an engine made of a conversation: the final text and the names of the tools called on the way."""

    text: str = ""
    tool_names: list[str] = field(default_factory=list)


class AnsweringEngine(Protocol):
    """Anything that answers a batch of conversations' prompts, tool calls included."""

    def answer(self, conversations: list[data.Conversation]) -> list[Answer]: ...


class TransformersEngine:
    """PyTorch on CPU; after each round of tool calls the whole conversation is rendered and encoded again."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415 (the other engine needs no torch)

        self._tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")

    def answer(self, conversations: list[data.Conversation]) -> list[Answer]:
        answers = [Answer() for _ in conversations]
        messages = [list(conversation.prompt) for conversation in conversations]
        active = list(range(len(conversations)))
        for _ in range(MAX_ROUNDS):
            if not active:
                break
            texts = self._complete([messages[i] for i in active], [conversations[i].tools for i in active])
            still_active = []
            for i, text in zip(active, texts, strict=True):
                calls = parse_calls(text)
                answers[i].text = text
                answers[i].tool_names += [name for name, _ in calls]
                if calls:
                    messages[i] += _call_messages(conversations[i], calls)
                    still_active.append(i)
            active = still_active
        return answers

    def _complete(self, messages: list[list[data.Message]], tools: list[list[dict[str, Any]]]) -> list[str]:
        render = self._tokenizer.apply_chat_template
        prompts = [
            render(m, tools=t, tokenize=False, add_generation_prompt=True) for m, t in zip(messages, tools, strict=True)
        ]
        encoded = self._tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        inputs = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
        output = self._model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        written = output[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self._tokenizer.batch_decode(written, skip_special_tokens=True)]


class JaxceptEngine:
    """The engine itself: a tool call intercepts its sequence, and the others of the batch go on."""

    def __init__(self, folder: Path, kv_cache_dtype: str = "auto") -> None:
        from jaxcept import AsyncLLM, SamplingParams  # noqa: PLC0415 (the other engine needs no jax)

        self._llm = AsyncLLM(folder, max_num_seqs=BATCH_SIZE, max_num_batched_tokens=256, kv_cache_dtype=kv_cache_dtype)
        self._params = SamplingParams(temperature=0, max_tokens=MAX_NEW_TOKENS)

    def answer(self, conversations: list[data.Conversation]) -> list[Answer]:
        async def all_of_them() -> list[Answer]:
            return await asyncio.gather(*(self._answer(conversation) for conversation in conversations))

        return asyncio.run(all_of_them())

    async def _answer(self, conversation: data.Conversation) -> Answer:
        from jaxcept import Tool  # noqa: PLC0415 (as above)

        def runner(name: str) -> Callable[..., str]:
            return lambda **arguments: run_tool(conversation, name, arguments)

        schemas = [Tool.from_schema(schema) for schema in conversation.tools]
        tools = [replace(schema, function=runner(schema.name)) for schema in schemas]
        async for delta in self._llm.chat(conversation.prompt, self._params, tools=tools or None):
            if delta.output is not None:
                completion = delta.output.outputs[0]
                names = [call.name for each in completion.interceptions for call in each.calls]
                return Answer(completion.answer, names)
        raise RuntimeError("the stream ended without an output")


ENGINES: dict[str, Callable[[Path], AnsweringEngine]] = {"transformers": TransformersEngine, "jaxcept": JaxceptEngine}


def parse_calls(text: str) -> list[tuple[str, dict[str, Any]]]:
    """The well-formed tool calls in a model's text."""
    calls = []
    for body in CALL.findall(text):
        try:
            call = json.loads(body)
            calls.append((str(call["name"]), dict(call["arguments"])))
        except (ValueError, TypeError, KeyError):
            continue
    return calls


def run_tool(conversation: data.Conversation, name: str, arguments: dict[str, Any]) -> str:
    """A built-in tool's answer; a made-up tool answers the call that the conversation expects."""
    if name in requests.BUILTINS:
        return requests.run(name, arguments)
    for call in conversation.calls:
        if (call.name, call.arguments) == (name, arguments):
            return call.response
    return f"Error: no such call of {name}"


def is_right(conversation: data.Conversation, answer: Answer) -> bool:
    """Whether each expected string stands in the final text as a word or number of its own, and the tools fit."""
    if set(answer.tool_names) != set(conversation.tool_names) or parse_calls(answer.text):
        return False
    return all(re.search(rf"(?<![\w.\-]){re.escape(text)}(?!\w|\.\d)", answer.text) for text in conversation.expected)


def measure(engine: AnsweringEngine, seed: int, count: int, show_wrong: int, console: Console) -> float:
    """Answer `count` held-out prompts, print the share of right answers by kind, and return that of all."""
    conversations = data.held_out(seed, count)
    started = time.monotonic()
    right: dict[str, list[bool]] = defaultdict(list)
    for start in track(range(0, count, BATCH_SIZE), "answering", console=console):
        batch = conversations[start : start + BATCH_SIZE]
        for conversation, answer in zip(batch, engine.answer(batch), strict=True):
            good = is_right(conversation, answer)
            right[conversation.kind].append(good)
            if not good and show_wrong > 0:
                show_wrong -= 1
                asked, expected = conversation.prompt[-1]["content"], ", ".join(conversation.expected)
                line = f"{conversation.kind}: {asked!r} expected {expected!r} got {answer.tool_names} {answer.text!r}"
                console.print(line, markup=False, soft_wrap=True)
    table = Table("kind", "prompts", "right", "share")
    for kind, goods in sorted(right.items()):
        table.add_row(kind, str(len(goods)), str(sum(goods)), f"{sum(goods) / len(goods):.1%}")
    everything = [good for goods in right.values() for good in goods]
    table.add_row("all", str(count), str(sum(everything)), f"{sum(everything) / count:.1%}")
    console.print(table)
    console.print(f"{time.monotonic() - started:.1f} s")
    return sum(everything) / count


def _call_messages(conversation: data.Conversation, calls: list[tuple[str, dict[str, Any]]]) -> list[data.Message]:
    return [
        data.call_message(calls),
        *({"role": "tool", "content": run_tool(conversation, name, args)} for name, args in calls),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=tuple(ENGINES), default="jaxcept")
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--seed", type=int, default=TEST_SEED)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--show-wrong", type=int, default=0, metavar="N", help="print the first N wrong answers")
    options = parser.parse_args()
    measure(ENGINES[options.engine](options.model), options.seed, options.count, options.show_wrong, Console())


if __name__ == "__main__":
    main()
