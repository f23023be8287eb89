"""Requests drawn from the server's own OpenAPI document, valid and not: is any answered with a 5xx, or not at all?

    make check-openapi          # installs schemathesis into a place of its own, then runs this

Starts `jaxcept serve` with the shipped model, lets schemathesis draw requests for every operation, negative cases
included, and asks one good question before and after. Exit status 1 where something is wrong.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import httpx2
from rich.console import Console
from servers import start_server

KEY = "a-key-for-this-run"
CHECKS = "not_a_server_error,content_type_conformance,response_schema_conformance,ignored_auth"
GOOD = {"messages": [{"role": "user", "content": "What is 37 * 91?"}], "max_tokens": 100, "temperature": 0}


def answer(url: str) -> str:
    """What it says to the good question."""
    headers = {"Authorization": f"Bearer {KEY}"}
    told = httpx2.post(f"{url}/v1/chat/completions", json=GOOD, headers=headers, timeout=60).raise_for_status()
    return str(told.json()["choices"][0]["message"]["content"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemathesis", required=True, metavar="COMMAND")
    parser.add_argument("--max-examples", type=int, default=50, help="of each operation and phase")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    flags = ["--api-key", f"check={KEY}", "--uvicorn-log-level", "error"]
    process, url = start_server(flags, stderr=subprocess.DEVNULL)
    try:
        before = answer(url)
        status = subprocess.run(
            [args.schemathesis, "run", f"{url}/openapi.json", "--header", f"Authorization: Bearer {KEY}",
             "--mode", "all", "--checks", CHECKS, "--max-examples", str(args.max_examples),
             "--seed", str(args.seed), "--workers", "1", "--request-timeout", "60"],
            check=False,
        ).returncode  # fmt: skip
        after = answer(url)
    finally:
        process.terminate()
        ended = process.wait(60)
    is_well = not status and before == after and not ended
    Console().print(f"the same answer before and after: {before == after}; the server's exit status: {ended}")
    return int(not is_well)


if __name__ == "__main__":
    sys.exit(main())
