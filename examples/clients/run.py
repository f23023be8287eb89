"""Runs every client of this folder against a server of its own: python run.py [--python PATH] [NAME …]

The clients have packages of their own: `make check-clients` installs them.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

FOLDER = Path(__file__).parent
PLAIN = (
    "openai_chat", "openai_completions", "openai_responses", "anthropic_messages", "openai_agents", "langchain_agent",
    "pydantic_agent", "litellm_loop",
)  # fmt: skip
SERVED = ("server_tools", "mcp_tools")
LM_EVAL = "lm_eval"


@contextmanager
def server(flags: Sequence[str]) -> Iterator[str]:
    """A server's URL, while it runs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "jaxcept_serve.cli", "serve", "--port", str(port), "--max-model-len", "2048"]
    process = subprocess.Popen([*command, "--uvicorn-log-level", "warning", *flags])
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                with urllib.request.urlopen(f"{url}/ready", timeout=1):
                    break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                if process.poll() is not None:
                    raise SystemExit(f"the server did not start: exit status {process.returncode}") from None
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def lm_eval_command(python: str, url: str) -> list[str]:
    """A small task of lm-eval's that needs no download, through its local-completions model."""
    arguments = f"model=shipped,base_url={url}/v1/completions,tokenizer_backend=remote,max_length=2048,num_concurrent=4"
    return [
        python, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", arguments,
        "--tasks", "capitals", "--include_path", str(FOLDER / "lm_eval_task"), "--batch_size", "2",
    ]  # fmt: skip


def run(name: str, command: Sequence[str], url: str) -> bool:
    """Whether it succeeds; what it says is shown."""
    print(f"== {name}", flush=True)
    began = time.monotonic()
    environment = {**os.environ, "JAXCEPT_URL": url, "OPENAI_API_KEY": "none"}
    status = subprocess.run(command, cwd=FOLDER, env=environment, timeout=300, check=False).returncode
    print(
        f"== {name}: {'passed' if not status else f'FAILED ({status})'}, {time.monotonic() - began:.1f} s", flush=True
    )
    return not status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="the interpreter that has the clients' packages")
    parser.add_argument("names", nargs="*", default=[*PLAIN, *SERVED, LM_EVAL])
    args = parser.parse_args()
    passed: dict[str, bool] = {}
    plain = [name for name in args.names if name in PLAIN or name == LM_EVAL]
    if plain:
        with server(["--tools", "none"]) as url:
            for name in plain:
                script = lm_eval_command(args.python, url) if name == LM_EVAL else [args.python, f"{name}.py"]
                passed[name] = run(name, script, url)
    if "server_tools" in args.names:
        with server([]) as url:
            passed["server_tools"] = run("server_tools", [args.python, "server_tools.py"], url)
    if "mcp_tools" in args.names:
        with server(["--tools", "none", "--mcp", f"tools={args.python} {FOLDER / 'mcp_tools.py'}"]) as url:
            passed["mcp_tools"] = run("mcp_tools", [args.python, "server_tools.py"], url)
    print(f"{sum(passed.values())} of {len(passed)} passed")
    return 0 if all(passed.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
