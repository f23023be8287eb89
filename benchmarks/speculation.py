"""What drafts are worth: the shipped model on held-out conversations with tools, with and without, in one run.

    python benchmarks/speculation.py [--count 100] [--save benchmarks/results/speculation.json]

Rounds alternate. The tokens of both are compared. Tools answer at once, so that what is timed is the engine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import jax
from greedy_tokens import PARAMS, Tokens, tools_of
from rich.console import Console
from rich.table import Table

from examples.shipped_model import data, evaluate
from jaxcept import AsyncLLM

SPECULATION = {"method": "ngram", "num_speculative_tokens": 8}
FIGURES = ("steps", "generated_tokens", "draft_tokens", "accepted_draft_tokens")


@dataclass(frozen=True)
class Row:
    """Medians over the rounds at one number of conversations at once."""

    at_once: int
    tokens: int  # generated, of all conversations
    tokens_s: float  # per second, without drafts
    tokens_s_drafts: float
    steps: int
    steps_drafts: int
    drafts: int
    accepted: float  # share of them
    same: int  # conversations with the same tokens


@dataclass
class Runs:
    """What one engine did, round by round."""

    llm: AsyncLLM
    seconds: list[float]
    figures: list[dict[str, float]]
    tokens: Tokens

    def go(self, conversations: list[data.Conversation], at_once: int) -> None:
        """One round."""
        before = self.llm.session.engine.metrics()
        begin = time.perf_counter()
        self.tokens = asyncio.run(answer_all(self.llm, conversations, at_once))
        self.seconds.append(time.perf_counter() - begin)
        after = self.llm.session.engine.metrics()
        self.figures.append({name: after[name] - before[name] for name in FIGURES})

    def figure(self, name: str) -> float:
        """The median over the rounds."""
        return median(each[name] for each in self.figures)


async def answer_all(llm: AsyncLLM, conversations: list[data.Conversation], at_once: int) -> Tokens:
    """The tokens behind each prompt, so many conversations at a time."""
    places = asyncio.Semaphore(at_once)

    async def answer(conversation: data.Conversation) -> list[int]:
        async with places:
            async for delta in llm.chat(conversation.prompt, PARAMS, tools=tools_of(conversation, 0.0) or None):
                if delta.output is not None:
                    return [token for segment in delta.output.outputs[0].segments for token in segment.token_ids]
        raise RuntimeError("the stream ended without an output")

    return await asyncio.gather(*map(answer, conversations))


def measure(conversations: list[data.Conversation], at_once: int, rounds: int) -> Row:
    """Both engines, in turns. The prefix cache is off, so that every round computes the same."""

    def make(speculation: dict[str, Any] | None) -> Runs:
        sizes: dict[str, Any] = {"max_model_len": 1024, "max_num_seqs": 16, "max_num_batched_tokens": 256}
        return Runs(AsyncLLM(speculative_config=speculation, enable_prefix_caching=False, **sizes), [], [], [])

    plain, drafting = make(None), make(SPECULATION)
    for number in range(2 * rounds):
        (drafting if number % 4 in (1, 2) else plain).go(conversations, at_once)
    for runs in (plain, drafting):
        runs.llm.close()
    tokens = plain.figure("generated_tokens")
    return Row(
        at_once=at_once,
        tokens=int(tokens),
        tokens_s=tokens / median(plain.seconds),
        tokens_s_drafts=tokens / median(drafting.seconds),
        steps=int(plain.figure("steps")),
        steps_drafts=int(drafting.figure("steps")),
        drafts=int(drafting.figure("draft_tokens")),
        accepted=drafting.figure("accepted_draft_tokens") / max(1.0, drafting.figure("draft_tokens")),
        same=sum(ours == theirs for ours, theirs in zip(drafting.tokens, plain.tokens, strict=True)),
    )


def main() -> None:
    """Measures, prints, saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="conversations (default: %(default)s)")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=6, help="of each engine (default: %(default)s)")
    parser.add_argument("--save", type=Path)
    args = parser.parse_args()
    conversations = data.held_out(evaluate.TEST_SEED, args.count)
    rows = [measure(conversations, at_once, args.rounds) for at_once in args.at_once]
    table = Table(*(name.replace("_", " ") for name in Row.__dataclass_fields__))
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in asdict(row).values()))
    Console().print(table)
    if args.save is not None:
        about = {
            "command": f"python benchmarks/speculation.py --count {args.count} --rounds {args.rounds}",
            "device": f"{platform.machine()}, {jax.default_backend()}",
            "jax": jax.__version__,
            "date": datetime.now(UTC).date().isoformat(),
        }
        args.save.write_text(json.dumps(about | {"rows": [asdict(row) for row in rows]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
