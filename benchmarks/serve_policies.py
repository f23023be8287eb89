"""Two servers of the same model side by side, one under each policy, in one run: what does a tool's pause cost?

    python benchmarks/serve_policies.py [--rounds 4] [--out FILE.json]

24 conversations of 6 turns, a calculator called in each, with pauses before every turn, against `jaxcept serve` under
`prefix-lru` (an engine of today) and under `min-waste`, in turns. The KV pool is so small that the contexts need
--oversubscribed times its blocks. Tokens are the same; what differs is how many are computed again, and how long the
first token after a pause takes.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
from rich.console import Console
from rich.table import Table

POLICIES = ("prefix-lru", "min-waste")
BLOCK = 16
FIGURES = {
    "prefill": 'jaxcept:computed_tokens_total.*kind="prefill"',
    "returned": 'jaxcept:computed_tokens_total.*kind="returned"',
    "recomputed": 'jaxcept:computed_tokens_total.*kind="recomputed"',
    "swapped": "jaxcept:swap_bytes_total",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serve(policy: str, num_blocks: int, args: argparse.Namespace) -> tuple[subprocess.Popen[bytes], str]:
    """A server under one policy, ready."""
    port = free_port()
    command = [
        sys.executable, "-m", "jaxcept_serve.cli", "serve", "--port", str(port), "--intercept-policy", policy,
        "--num-gpu-blocks-override", str(num_blocks), "--max-model-len", "1024", "--max-num-seqs", "16",
        "--host-pool-gb", "0.25", "--tools", "none", "--uvicorn-log-level", "warning", *args.serve,
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    while True:
        try:
            if httpx2.get(f"{url}/ready").status_code == 200:
                return process, url
        except httpx2.TransportError:
            time.sleep(0.2)
        if process.poll() is not None:
            raise SystemExit(f"the server under {policy} did not start: exit status {process.returncode}")


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
    command = [
        sys.executable,
        "-m",
        "jaxcept_serve.cli",
        "bench",
        "serve",
        "--dataset",
        "calculator",
        "--random-pauses",
    ]
    command += [word for name, url in urls.items() for word in ("--url", f"{name}={url}")]
    command += ["--conversations", str(args.conversations), "--turns", str(args.turns), "--pause", str(args.pause)]
    command += ["--rounds", str(rounds), "--seed", str(args.seed), "--out", str(out)]
    subprocess.run(command, check=True)
    return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=24)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--pause", type=float, default=0.73, help="seconds, the mean of an exponential")
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
        urls: dict[str, str] = {}
        for policy in POLICIES:
            process, urls[policy] = serve(policy, num_blocks, args)
            stack.callback(process.wait)
            stack.callback(process.terminate)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        before = {policy: figures(url) for policy, url in urls.items()}
        measured = replay(urls, args, args.rounds, folder / "bench.json")
        after = {policy: figures(url) for policy, url in urls.items()}
    computed = {
        policy: {name: (after[policy][name] - before[policy][name]) / args.rounds for name in FIGURES}
        for policy in POLICIES
    }
    table = Table("policy", "prefilled, tokens a round", "of them again", "swapped, MB a round")
    for policy, each in computed.items():
        total = each["prefill"] + each["returned"] + each["recomputed"]
        table.add_row(policy, f"{total:,.0f}", f"{each['recomputed']:,.0f}", f"{each['swapped'] / 1e6:,.1f}")
    console.print(table)
    if args.out is not None:
        result = {"num_blocks": num_blocks, "args": {**vars(args), "out": str(args.out)}, "computed_a_round": computed}
        args.out.write_text(json.dumps({**result, "bench": measured}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
