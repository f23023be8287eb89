"""What keys and values in eight bits cost in accuracy, on the shipped model and its held-out conversations.

    python benchmarks/kv_accuracy.py [--count 500] [--save benchmarks/results/kv-int8.json]

For every dtype of the KV cache: the share of prompts that end with the right answer (as
`examples.shipped_model.evaluate` counts), and the loss over what follows each request, tool calls, results and answer;
against the first dtype, by token, how far the log-probability moves and how often the likeliest token is the same.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from examples.shipped_model import data, evaluate
from jaxcept import LLM, SamplingParams
from jaxcept.config import KV_CACHE_DTYPES, EngineConfig

MAX_MODEL_LEN = 1024


@dataclass(frozen=True)
class Row:
    """One dtype."""

    kv_cache_dtype: str
    token_bytes: int  # of KV, all layers
    right: float  # share of the prompts
    tokens: int  # scored
    loss: float  # nats per token
    moved: float  # mean |log p - log p of the first dtype|
    moved_99: float  # its 99th percentile
    same_best: float  # share of tokens with the same likeliest token


@dataclass(frozen=True)
class Scores:
    """By scored token of all conversations."""

    logprobs: np.ndarray
    best: np.ndarray
    token_bytes: int


def score(kv_cache_dtype: str, conversations: list[data.Conversation]) -> Scores:
    """Log-probabilities of what follows the requests, each conversation computed as one prompt."""
    llm = LLM(kv_cache_dtype=kv_cache_dtype, max_model_len=MAX_MODEL_LEN, enable_prefix_caching=False)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    tokenizer = llm.session.tokenizer
    starts = [len(tokenizer.encode_chat(each.prompt, each.tools or None)) for each in conversations]
    prompts = [tokenizer.encode_chat(each.messages, each.tools or None, False) for each in conversations]
    logprobs, best = [], []
    for start, output in zip(starts, llm.generate(prompts, params), strict=True):
        for entry in (output.prompt_logprobs or [])[start:]:
            assert entry is not None
            logprobs.append(entry.logprob)
            best.append(entry.top[0][0])
    token_bytes = int(llm.session.engine.ledger.block_bytes / EngineConfig().block_size)
    return Scores(np.array(logprobs), np.array(best), token_bytes)


def measure(count: int, console: Console) -> list[Row]:
    """A row for every dtype, the first one exact."""
    conversations = data.held_out(evaluate.TEST_SEED, count)
    exact = score(KV_CACHE_DTYPES[0], conversations)
    rows = []
    for name in KV_CACHE_DTYPES:
        scores = exact if name == KV_CACHE_DTYPES[0] else score(name, conversations)
        moved = np.abs(scores.logprobs - exact.logprobs)
        console.print(f"kv_cache_dtype {name}")
        engine = evaluate.JaxceptEngine(evaluate.DEFAULT_MODEL, name)
        right = evaluate.measure(engine, evaluate.TEST_SEED, count, 0, console)
        rows.append(
            Row(
                kv_cache_dtype=name,
                token_bytes=scores.token_bytes,
                right=right,
                tokens=len(scores.logprobs),
                loss=float(-scores.logprobs.mean()),
                moved=float(moved.mean()),
                moved_99=float(np.quantile(moved, 0.99)),
                same_best=float((scores.best == exact.best).mean()),
            )
        )
    return rows


def main() -> None:
    """Measures, prints, saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    console = Console()
    rows = measure(options.count, console)
    table = Table(*(name.replace("_", " ") for name in Row.__dataclass_fields__))
    for row in rows:
        table.add_row(*(f"{value:.6g}" if isinstance(value, float) else str(value) for value in asdict(row).values()))
    console.print(table)
    if options.save is not None:
        about = {
            "command": f"python benchmarks/kv_accuracy.py --count {options.count}",
            "device": f"{platform.machine()}, {jax.default_backend()}",
            "jax": jax.__version__,
            "date": datetime.now(UTC).date().isoformat(),
        }
        options.save.write_text(json.dumps(about | {"rows": [asdict(row) for row in rows]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
