"""The engine against transformers' generate, in one run on one machine.

A Llama of 4 layers, width 512, 8 heads, 4 KV heads, vocabulary 32,000, random weights, float32 (by default); 128 prompt
and 128 output tokens; batch 1 and 16. Both sides generate greedily from the same checkpoint and the same prompts; runs
alternate, and the table gives medians of output tokens per second, and the ratio of the medians.

    python benchmarks/throughput.py [--rounds 5] [--save results/throughput-cpu.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

PROMPT_TOKENS = 128
OUTPUT_TOKENS = 128


@dataclass(frozen=True)
class Row:
    """Output tokens per second of one batch size."""

    batch: int
    jaxcept: list[float]
    transformers: list[float]
    same_tokens: bool

    @property
    def ratio(self) -> float:
        return statistics.median(self.jaxcept) / statistics.median(self.transformers)


def build_checkpoint(folder: Path) -> None:
    """Writes the benchmark's Llama with random weights."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    pieces = [chr(i) for i in range(32, 127)] + [f"<{i}>" for i in range(config.vocab_size - 95)]
    tokenizer = Tokenizer(WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<0>"))
    tokenizer.save(str(folder / "tokenizer.json"))


def prompts(batch: int, seed: int) -> list[list[int]]:
    """Token ids no two of which share a prefix, so that no prefix cache helps."""
    return np.random.default_rng([seed, batch]).integers(0, 32_000, size=(batch, PROMPT_TOKENS)).tolist()


class Transformers:
    """PyTorch CPU, all threads."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._model.eval()

    def generate(self, batch: list[list[int]]) -> list[list[int]]:
        ids = self._torch.tensor(batch)
        with self._torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=self._torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=OUTPUT_TOKENS,
                min_new_tokens=OUTPUT_TOKENS,
                pad_token_id=0,
            )
        return out[:, PROMPT_TOKENS:].tolist()


class Jaxcept:
    """The engine through its Python API."""

    def __init__(self, folder: Path, max_num_seqs: int) -> None:
        from jaxcept import LLM, SamplingParams

        self._params = SamplingParams(temperature=0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
        self._llm = LLM(
            folder,
            dtype="float32",
            max_model_len=512,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=2048,
            progress=False,
        )

    def generate(self, batch: list[list[int]]) -> list[list[int]]:
        outputs = self._llm.generate(batch, self._params)
        return [output.outputs[0].token_ids for output in outputs]


def timed(generate, batch: list[list[int]]) -> tuple[float, list[list[int]]]:
    start = time.perf_counter()
    out = generate(batch)
    return len(batch) * OUTPUT_TOKENS / (time.perf_counter() - start), out


def measure(batch: int, rounds: int, engine: Jaxcept, reference: Transformers) -> Row:
    ours, theirs, same = [], [], True
    for round_index in range(rounds + 1):  # the first warms both up and is not counted
        ids = prompts(batch, round_index)
        our_rate, our_tokens = timed(engine.generate, ids)
        their_rate, their_tokens = timed(reference.generate, ids)
        same &= our_tokens == their_tokens
        if round_index:
            ours.append(our_rate)
            theirs.append(their_rate)
    return Row(batch, ours, theirs, same)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--save", type=Path)
    parser.add_argument("--write-model", type=Path, metavar="FOLDER", help="write the model there and do nothing else")
    args = parser.parse_args()
    if args.write_model is not None:
        build_checkpoint(args.write_model)
        return
    with tempfile.TemporaryDirectory() as folder:
        build_checkpoint(Path(folder))
        engine, reference = Jaxcept(Path(folder), max(args.batches)), Transformers(Path(folder))
        rows = [measure(batch, args.rounds, engine, reference) for batch in args.batches]
    report(rows, args.save)


def report(rows: list[Row], save: Path | None) -> None:
    import torch
    import transformers

    device = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores"
    table = Table(title=f"output tokens/s, medians ({device})")
    for column in ("batch", "jaxcept", "transformers", "ratio", "same greedy tokens"):
        table.add_column(column, justify="right")
    for row in rows:
        medians = (statistics.median(row.jaxcept), statistics.median(row.transformers))
        rates = [f"{median:.0f}" for median in medians]
        table.add_row(str(row.batch), *rates, f"{row.ratio:.2f}", str(row.same_tokens))
    Console().print(table)
    if save is not None:
        versions = {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
        record = {
            "command": "python benchmarks/throughput.py",
            "device": device,
            "machine": platform.platform(),
            "date": time.strftime("%Y-%m-%d"),
            "versions": versions,
            "rows": [
                {"batch": r.batch, "jaxcept": r.jaxcept, "transformers": r.transformers, "ratio": r.ratio}
                | {"same_tokens": r.same_tokens}
                for r in rows
            ],
        }
        save.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
