"""Servers of the same model side by side, one under each policy, in one run: what does a tool's pause cost?

    python benchmarks/serve_policies.py --context 230 [--rounds 4] [--out FILE.json]
    python benchmarks/serve_policies.py --model llama --context 3950 --host-pool-gb 2 [--rate 0.6]

24 conversations of 6 turns with pauses between them, against `jaxcept serve` under `prefix-lru` (an engine of
today), `prefix-lru-offload` (one with a tier of host memory) and `min-waste`, in turns. The KV pool is so small that
the contexts need --oversubscribed times its blocks. Tokens are the same; what differs is how many are computed again,
and how long the first token after a pause takes. The shipped model calls a calculator in each turn and costs next to
nothing to compute; `--model llama` has 4 layers of width 512, drawn at random; each of its turns is a call of a search,
as its grammar makes it be, and what the search answers is long.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from typing import Any

import httpx2
import jax
from rich.console import Console
from rich.table import Table
from servers import start_server

from jaxcept.config import shipped_model

BLOCK = 16
FIGURES = {
    "prefill": 'jaxcept:computed_tokens_total.*kind="prefill"',
    "returned": 'jaxcept:computed_tokens_total.*kind="returned"',
    "recomputed": 'jaxcept:computed_tokens_total.*kind="recomputed"',
    "swapped": "jaxcept:swap_bytes_total",
}


SEARCH = {  # each turn is one call: the next message answers it
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "search",
                "description": "Searches.",
                "parameters": {
                    "type": "object",
                    "properties": {"query": {"type": "string", "maxLength": 12}},
                    "required": ["query"],
                    "additionalProperties": False,
                },
            },
        }
    ],
    "tool_choice": {"type": "function", "function": {"name": "search"}},
    "parallel_tool_calls": False,
}


def write_llama(folder: Path) -> Path:
    """The configuration of a larger model, with the shipped one's tokenizer: its weights are drawn at load."""
    shipped = shipped_model()
    config = json.loads((shipped / "config.json").read_text(encoding="utf-8"))
    config |= {
        "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 8192,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for path in shipped.iterdir():
        if path.name.startswith(("tokenizer", "chat_template", "generation", "special")):
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def serve(
    policy: str, num_blocks: int, model: list[str], args: argparse.Namespace
) -> tuple[subprocess.Popen[bytes], str]:
    """A server under one policy, ready."""
    name, _, head_start = policy.partition("@")
    flags = [
        *model, "--intercept-policy", name, "--num-gpu-blocks-override", str(num_blocks),
        "--max-model-len", str(max(1024, 2 * args.context)), "--max-num-seqs", "16",
        "--host-pool-gb", str(args.host_pool_gb), "--tools", "none", "--uvicorn-log-level", "warning",
        *(["--return-head-start", head_start] if head_start else []), *args.serve,
    ]  # fmt: skip
    return start_server(flags, stderr=subprocess.DEVNULL)


def figures(url: str) -> dict[str, float]:
    """What the engine computed so far."""
    text = httpx2.get(f"{url}/metrics").text
    found = {}
    for name, pattern in FIGURES.items():
        values = re.findall(rf"^{pattern}[^\n]* ([0-9.e+]+)$", text, re.MULTILINE)
        found[name] = sum(map(float, values))
    return found


def replay(urls: dict[str, str], args: argparse.Namespace, rounds: int, out: Path) -> Any:
    """`jaxcept bench serve` against all of them, in turns."""
    command = [sys.executable, "-m", "jaxcept_serve.cli", "bench", "serve", "--random-pauses"]
    if args.model == "llama":
        command += ["--dataset", "words", "--words-first", str(args.words_first), "--words-later"]
        command += [str(args.words_later), "--max-tokens", "64", "--extra-body", json.dumps(SEARCH)]
    else:
        command += ["--dataset", "calculator"]
    command += [word for name, url in urls.items() for word in ("--url", f"{name}={url}")]
    command += ["--conversations", str(args.conversations), "--turns", str(args.turns), "--pause", str(args.pause)]
    if args.rate is not None:
        command += ["--rate", str(args.rate)]
    command += ["--rounds", str(rounds), "--seed", str(args.seed), "--out", str(out)]
    subprocess.run(command, check=True)
    return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--policies",
        nargs="+",
        default=["prefix-lru", "prefix-lru-offload", "min-waste"],
        help="policies; min-waste@10 is min-waste with --return-head-start 10 (default: %(default)s)",
    )
    parser.add_argument("--model", choices=["shipped", "llama"], default="shipped")
    parser.add_argument("--words-first", type=int, default=400, help="of llama's prompts (default: %(default)s)")
    parser.add_argument("--words-later", type=int, default=120, help="of its later messages (default: %(default)s)")
    parser.add_argument("--host-pool-gb", type=float, default=0.25)
    parser.add_argument("--conversations", type=int, default=24)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--pause", type=float, default=0.73, help="seconds, the mean of an exponential")
    parser.add_argument("--rate", type=float, help="new conversations per second, Poisson (default: all at once)")
    parser.add_argument("--oversubscribed", type=float, default=2.3)
    parser.add_argument("--context", type=int, required=True, help="tokens of a conversation at its end")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("serve", nargs="*", help="further flags of jaxcept serve, after --")
    args = parser.parse_args()
    num_blocks = math.ceil(args.conversations * args.context / BLOCK / args.oversubscribed)
    console = Console(width=120)
    console.print(f"{num_blocks} blocks of {BLOCK} tokens for {args.conversations} x {args.context} tokens")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = [str(write_llama(folder / "llama")), "--load-format", "dummy"] if args.model == "llama" else []
        urls: dict[str, str] = {}
        for policy in args.policies:
            process, urls[policy] = serve(policy, num_blocks, model, args)
            stack.callback(process.wait)
            stack.callback(process.terminate)
        before = {policy: figures(url) for policy, url in urls.items()}
        measured = replay(urls, args, args.rounds, folder / "bench.json")
        after = {policy: figures(url) for policy, url in urls.items()}
    computed = {
        policy: {name: (after[policy][name] - before[policy][name]) / args.rounds for name in FIGURES}
        for policy in args.policies
    }
    table = Table("policy", "prefilled, tokens a round", "of them again", "swapped, MB a round")
    for policy, each in computed.items():
        total = each["prefill"] + each["returned"] + each["recomputed"]
        table.add_row(policy, f"{total:,.0f}", f"{each['recomputed']:,.0f}", f"{each['swapped'] / 1e6:,.1f}")
    console.print(table)
    if args.out is not None:
        for server in measured["servers"].values():
            del server["rounds"]  # every request by itself
        result = {
            "command": shlex.join(["python", *sys.argv]),
            "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
            "jax": jax.__version__,
            "date": date.today().isoformat(),
            "num_blocks": num_blocks,
            "computed_a_round": computed,
            "bench": measured,
        }
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
