"""Greedy tokens of conversations with tools, under several policies, in float32: written to a file, or held to one.

    JAX_PLATFORMS=cpu python benchmarks/greedy_tokens.py --implementation xla --policies preserve --save tokens.json
    python benchmarks/greedy_tokens.py --policies preserve swap discard min-waste --against tokens.json

The shipped model answers held-out prompts side by side. Their tools take a moment and the KV pool holds a few contexts
only, so that contexts are swapped or recomputed where the policy does so. `--against` fails where any token differs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from examples.shipped_model import data, evaluate
from jaxcept import AsyncLLM, SamplingParams, Tool
from jaxcept.scheduler.policies.catalog import POLICIES

TOOL_S = 0.05
NUM_BLOCKS = 96  # of 16 tokens: four contexts or so
PARAMS = SamplingParams(temperature=0, max_tokens=evaluate.MAX_NEW_TOKENS)

Tokens = list[list[int]]  # what the model generated and its tools returned, by conversation


def generate(conversations: list[data.Conversation], policy: str, implementation: str) -> tuple[Tokens, dict[str, int]]:
    """The tokens behind each prompt, and how many blocks moved and tokens were computed again on the way."""
    llm = AsyncLLM(
        dtype="float32",
        implementation=implementation,
        intercept_policy=policy,
        num_blocks=NUM_BLOCKS,
        max_model_len=512,
        max_num_seqs=8,
        max_num_batched_tokens=128,
    )

    async def answer(conversation: data.Conversation) -> list[int]:
        async for delta in llm.chat(conversation.prompt, PARAMS, tools=tools_of(conversation) or None):
            if delta.output is not None:
                return [token for segment in delta.output.outputs[0].segments for token in segment.token_ids]
        raise RuntimeError("the stream ended without an output")

    async def everyone() -> Tokens:
        return await asyncio.gather(*(answer(each) for each in conversations))

    try:
        tokens = asyncio.run(everyone())
        metrics = llm.session.engine.metrics()
    finally:
        llm.close()
    return tokens, {name: int(metrics[name]) for name in ("swapped_in_blocks", "recomputed_tokens")}


def tools_of(conversation: data.Conversation, seconds: float = TOOL_S) -> list[Tool]:
    """The conversation's tools, each of which takes so long."""

    def runner(name: str) -> Callable[..., str]:
        def run(**arguments: object) -> str:
            time.sleep(seconds)
            return evaluate.run_tool(conversation, name, arguments)

        return run

    schemas = [Tool.from_schema(schema) for schema in conversation.tools]
    return [replace(schema, function=runner(schema.name)) for schema in schemas]


def main() -> int:
    """1 where tokens differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=["preserve", "swap", "discard", "min-waste"])
    parser.add_argument("--implementation", default="auto")
    parser.add_argument("--count", type=int, default=100, help="conversations (default: %(default)s)")
    parser.add_argument("--save", type=Path, help="file for the tokens of the first policy")
    parser.add_argument("--against", type=Path, help="file of tokens that these must equal")
    args = parser.parse_args()
    conversations = data.held_out(evaluate.TEST_SEED, args.count)
    expected: Tokens | None = json.loads(args.against.read_text()) if args.against else None
    differing = 0
    for policy in args.policies:
        tokens, moved = generate(conversations, policy, args.implementation)
        if args.save is not None and policy == args.policies[0]:
            args.save.write_text(json.dumps(tokens))
        told = {"policy": policy, "conversations": len(tokens), "tokens": sum(map(len, tokens)), **moved}
        if expected is not None:
            unequal = [i for i, (ours, theirs) in enumerate(zip(tokens, expected, strict=True)) if ours != theirs]
            differing += len(unequal)
            told["equal"] = len(tokens) - len(unequal)
        print(json.dumps(told), flush=True)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
