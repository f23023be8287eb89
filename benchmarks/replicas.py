"""Two engines behind one server, and one of them killed: do all conversations end right?

    python benchmarks/replicas.py --out benchmarks/results

Starts `jaxcept serve --replicas 2` with the shipped model. Conversations ask sums; the model calls a calculator, which
the client runs, so that every context waits for its client between two requests. They run once undisturbed; then again,
and in the middle one engine's process is killed with SIGKILL. Answers are to be the same, letter by letter. What the
server's log says of recomputed conversations goes into the report. Needs the extra `ray`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
from servers import free_port

CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluate an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}
SUM = re.compile(r"[\d+*. ()-]+")
ATTEMPTS = 8


@dataclass
class Conversation:
    """One conversation's questions, and what came of them."""

    number: int
    questions: list[str]
    said: list[str] = field(default_factory=list)  # calls and answers, in order
    num_retries: int = 0
    error: str | None = None


@dataclass
class Pass:
    """All conversations, once."""

    conversations: list[Conversation]
    seconds: float
    num_requests: int


def questions(count: int, each: int) -> list[list[str]]:
    draw = random.Random(0)
    return [[f"What is {draw.randint(11, 99)} * {draw.randint(11, 99)}?" for _ in range(each)] for _ in range(count)]


def calculate(arguments: str) -> str:
    """The client's tool: products and sums of numbers."""
    try:
        expression = str(json.loads(arguments)["expression"])
    except (ValueError, KeyError, TypeError):
        return "error: no expression"
    return str(eval(expression)) if SUM.fullmatch(expression) and "**" not in expression else "error: no sum"


class Clients:
    """Holds conversations side by side."""

    def __init__(self, url: str, kill_after: int | None, kill: Any) -> None:
        self._client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)
        self._kill_after, self._kill = kill_after, kill
        self.num_requests = 0

    async def run(self, asked: list[list[str]]) -> Pass:
        begin = time.perf_counter()
        conversations = [Conversation(i, texts) for i, texts in enumerate(asked)]
        await asyncio.gather(*map(self._hold, conversations))
        await self._client.close()
        return Pass(conversations, time.perf_counter() - begin, self.num_requests)

    async def _hold(self, conversation: Conversation) -> None:
        messages: list[dict[str, Any]] = []
        pause = random.Random(conversation.number)
        try:
            for question in conversation.questions:
                messages.append({"role": "user", "content": question})
                while True:
                    text, calls = await self._ask(messages, conversation)
                    messages.append({"role": "assistant", "content": text, **({"tool_calls": calls} if calls else {})})
                    conversation.said.append(text)
                    if not calls:
                        break
                    await asyncio.sleep(pause.uniform(0.1, 1.0))  # the tool's time, in which the context waits
                    for call in calls:
                        conversation.said.append(f"{call['function']['name']}({call['function']['arguments']})")
                        answer = calculate(call["function"]["arguments"])
                        messages.append({"role": "tool", "tool_call_id": call["id"], "content": answer})
        except (openai.APIError, openai.OpenAIError) as error:
            conversation.error = f"{type(error).__name__}: {error}"

    async def _ask(self, messages: list[dict[str, Any]], conversation: Conversation) -> tuple[str, list[Any]]:
        """One request; asked again, as clients do, where the server says that it should be."""
        for attempt in range(ATTEMPTS):
            try:
                answer = await self._request(messages, streams=conversation.number % 2 == 1)
            except (openai.InternalServerError, openai.APIConnectionError, openai.APIError):
                if attempt == ATTEMPTS - 1:
                    raise
                conversation.num_retries += 1
                await asyncio.sleep(0.5 * 2**attempt)
                continue
            self.num_requests += 1
            if self.num_requests == self._kill_after:
                self._kill()
            return answer
        raise AssertionError("unreachable")

    async def _request(self, messages: list[dict[str, Any]], streams: bool) -> tuple[str, list[Any]]:
        options: dict[str, Any] = {"model": "shipped", "messages": messages, "tools": [CALCULATOR], "temperature": 0,
                                   "max_tokens": 100}  # fmt: skip
        if not streams:
            message = (await self._client.chat.completions.create(**options)).choices[0].message
            return message.content or "", [
                call.model_dump(include={"id", "type", "function"}) for call in message.tool_calls or ()
            ]
        text, calls = "", {}
        async for chunk in await self._client.chat.completions.create(stream=True, **options):
            for choice in chunk.choices:
                text += choice.delta.content or ""
                for piece in choice.delta.tool_calls or ():
                    call = calls.setdefault(
                        piece.index, {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
                    )
                    call["id"] = piece.id or call["id"]
                    call["function"]["name"] += piece.function.name or ""
                    call["function"]["arguments"] += piece.function.arguments or ""
        return text, [calls[i] for i in sorted(calls)]


def descendants(pid: int) -> Iterator[int]:
    """Processes that this one started, and theirs."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int(entry.joinpath("stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    for child, parent in parents.items():
        ancestor: int | None = parent
        while ancestor:
            if ancestor == pid:
                yield child
                break
            ancestor = parents.get(ancestor)


def kill_engine(server: int, name: str) -> int:
    """Kills the process of an engine of this server with SIGKILL; its pid."""
    for pid in descendants(server):
        if f"-{name}:" in Path(f"/proc/{pid}/cmdline").read_text():
            os.kill(pid, signal.SIGKILL)
            return pid
    raise RuntimeError(f"no process of {name}")


def wait_until_ready(url: str, server: subprocess.Popen[Any], log: Path, timeout_s: float) -> None:
    client, deadline = openai.OpenAI(base_url=url, api_key="none", max_retries=0), time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with {server.returncode}:\n{log.read_text()[-4000:]}")
        try:
            client.models.list()
            return
        except openai.APIError:
            time.sleep(0.5)
    raise TimeoutError(f"the server is not there after {timeout_s} s:\n{log.read_text()[-4000:]}")


def wait_for(log: Path, text: str, timeout_s: float) -> float:
    """Seconds until the log has the text."""
    begin = time.monotonic()
    while text not in log.read_text():
        if time.monotonic() - begin > timeout_s:
            raise TimeoutError(f"after {timeout_s} s the log does not say {text!r}:\n{log.read_text()[-4000:]}")
        time.sleep(0.5)
    return time.monotonic() - begin


def report(calm: Pass, disturbed: Pass, killed: int, log: str) -> dict[str, Any]:
    """What is kept. `is_right`: every conversation said the same in both passes."""
    pairs = list(zip(calm.conversations, disturbed.conversations, strict=True))
    after = log[log.index(" died, with the contexts of") - 200 :] if " died, with the contexts of" in log else ""
    told = [
        re.sub(r" \[[0-9a-f]{32}\]| _ray_timestamp_ns=\d+", "", line)
        for line in after.splitlines()
        if "jaxcept_serve.replicas" in line
    ]
    kinds = Counter(
        next(kind for kind in ("recomputed on", "begun anew on", "there again", "died, with") if kind in line)
        for line in told
        if re.search(r"recomputed on|begun anew on|there again|died, with", line)
    )
    return {
        "device": f"cpu, {os.cpu_count()} cores",
        "num_conversations": len(pairs),
        "num_requests": disturbed.num_requests,
        "num_right": sum(b.error is None and a.said == b.said for a, b in pairs),
        "errors": [b.error for _, b in pairs if b.error is not None],
        "num_retries_of_clients": sum(b.num_retries for _, b in pairs),
        "seconds_calm": round(calm.seconds, 1),
        "seconds_disturbed": round(disturbed.seconds, 1),
        "killed_pid": killed,
        "log_counts": dict(kinds),
        "log": told,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=64)
    parser.add_argument("--questions", type=int, default=3, help="of each conversation")
    parser.add_argument("--out", type=Path, help="folder for replicas.json")
    args = parser.parse_args()
    asked = questions(args.conversations, args.questions)
    port = free_port()
    url = f"http://127.0.0.1:{port}/v1"
    command = [sys.executable, "-m", "jaxcept_serve.cli", "serve", "--replicas", "2", "--port", str(port), "--tools",
               "none", "--served-model-name", "shipped", "--max-num-seqs", "16", "--max-model-len", "1024",
               "--max-num-batched-tokens", "128"]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "server.log"
        with path.open("w") as log:
            server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_until_ready(url, server, path, 300)
            calm = asyncio.run(Clients(url, None, None).run(asked))
            killed: list[int] = []
            clients = Clients(url, calm.num_requests // 3, lambda: killed.append(kill_engine(server.pid, "engine-0")))
            disturbed = asyncio.run(clients.run(asked))
            replaced_s = wait_for(path, "engine-0 is there again", 120)
            again = asyncio.run(Clients(url, None, None).run(asked[:8]))
        finally:
            server.terminate()
            server.wait(60)
        made = report(calm, disturbed, killed[0], path.read_text())
        made["seconds_from_the_end_to_the_replacement"] = round(replaced_s, 1)
        made["right_after_the_replacement"] = sum(
            a.said == b.said for a, b in zip(calm.conversations, again.conversations, strict=False)
        )
    print(json.dumps(made, indent=1))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "replicas.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return 0 if made["num_right"] == made["num_conversations"] else 1


if __name__ == "__main__":
    sys.exit(main())
