"""What a follow-up computes: conversations with a tool call in every turn, each request's tokens counted.

    python benchmarks/resumes.py [--conversations 100] [--turns 6] [--out FILE.json] [-- FLAGS OF jaxcept serve]

A client that runs its own tools sends the whole history with every request. Of a request's prompt, the tokens behind
the turn before it are new; all others should need no computing. What is computed beyond the new ones is told apart:
what the policy had given up (recomputed), and the token that ended the turn, where its KV was not computed yet.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx2
from rich.console import Console
from servers import start_server

from jaxcept.tools.builtin import calculator
from jaxcept.tools.definition import tool

TOOL = tool(calculator).schema


@dataclass(slots=True)
class Tally:
    """Tokens of all requests but the first of each conversation."""

    resumes: int = 0
    prompt: int = 0
    new: int = 0
    computed: int = 0
    recomputed: int = 0
    ends: int = 0  # tokens that ended a turn
    right: int = 0  # answers
    answers: int = 0

    def take(self, before: dict[str, Any], usage: dict[str, Any]) -> None:
        """One follow-up: its usage, and that of the request before it."""
        new = usage["prompt_tokens"] - before["prompt_tokens"] - before["completion_tokens"]
        computed = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
        recomputed = usage["jaxcept"]["recomputed_tokens"]
        self.resumes += 1
        self.prompt += usage["prompt_tokens"]
        self.new += new
        self.computed += computed
        self.recomputed += recomputed
        self.ends += computed - new - recomputed


async def converse(http: httpx2.AsyncClient, number: int, args: argparse.Namespace, tally: Tally) -> None:
    """One conversation."""
    rng = random.Random(f"{args.seed}/{number}")
    messages: list[dict[str, Any]] = []
    before: dict[str, Any] | None = None
    for _ in range(args.turns):
        a, b = rng.randint(2, 99), rng.randint(2, 99)
        messages.append({"role": "user", "content": f"What is {a} * {b}?"})
        while True:
            await asyncio.sleep(rng.expovariate(1 / args.pause))
            body = {"messages": messages, "tools": [TOOL], "temperature": 0, "max_tokens": 120}
            answer = await http.post("/v1/chat/completions", json=body)
            answer.raise_for_status()
            message, usage = answer.json()["choices"][0]["message"], answer.json()["usage"]
            if before is not None:
                tally.take(before, usage)
            before = usage
            messages.append(message)
            if not message.get("tool_calls"):
                break
            for call in message["tool_calls"]:
                try:
                    result = calculator(**json.loads(call["function"]["arguments"]))
                except (TypeError, ValueError) as error:
                    result = f"error: {error}"
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
        tally.answers += 1
        tally.right += str(a * b) in (message["content"] or "").replace(",", "")


async def run(url: str, args: argparse.Namespace) -> Tally:
    """All conversations at once."""
    tally = Tally()
    async with httpx2.AsyncClient(base_url=url, timeout=300) as http:
        await asyncio.gather(*(converse(http, i, args, tally) for i in range(args.conversations)))
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=100)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--pause", type=float, default=0.3, help="seconds, the mean of an exponential")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("serve", nargs="*", help="flags of jaxcept serve, after --")
    args = parser.parse_args()
    flags = ["--tools", "none", "--uvicorn-log-level", "warning", "--max-model-len", "2048", *args.serve]
    process, url = start_server(flags)
    try:
        tally = asyncio.run(run(url, args))
    finally:
        process.terminate()
        process.wait()
    console = Console(width=120)
    console.print(asdict(tally))
    console.print(
        f"{tally.resumes:,} follow-ups with {tally.prompt:,} prompt tokens computed {tally.computed:,}: {tally.new:,}"
        f" new, {tally.recomputed:,} that the policy had given up, {tally.ends:,} that ended a turn;"
        f" {tally.right} of {tally.answers} answers right"
    )
    if args.out is not None:
        args.out.write_text(json.dumps({"args": [*sys.argv[1:]], **asdict(tally)}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
