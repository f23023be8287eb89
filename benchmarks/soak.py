"""A long, rude load on a server: tools, disconnects, cancels, slow readers, malformed requests; then, what is left?

    python benchmarks/soak.py [--minutes 30] [--clients 64] [-- FLAGS OF jaxcept serve]

Starts `jaxcept serve` with tools that answer, fail, hang and crash, lets the clients loose, and in the end ends the
server by SIGTERM: it checks every invariant of the scheduler before it exits. The verdict is printed and, with --out,
written: every request answered or refused, no 5xx but 503, no leak of memory (in a run of 20 minutes or more),
descriptors or blocks, exit status 0.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import httpx2
from rich.console import Console
from servers import free_port

TOOLS = '''
import os, time
from jaxcept import tool
from jaxcept.tools.builtin import convert, lookup
from jaxcept.tools import builtin

COUNT = [0]

@tool(timeout_s=0.5)
def calculator(expression: str) -> str:
    """Computes an arithmetic expression.

    expression: what to compute
    """
    COUNT[0] += 1
    if COUNT[0] % 17 == 0:
        time.sleep(1.0)
    if COUNT[0] % 13 == 0:
        raise SystemExit("the tool crashes")
    return builtin.calculator(expression)
'''
_ASKED = b'{"messages": [{"role": "user", "content": "a"}], '
MALFORMED: tuple[bytes, ...] = (
    b"{",
    b"[]",
    b"null",
    b'{"messages": 7}',
    b'{"messages": []}',
    b'{"messages": [{"role": "nobody"}]}',
    _ASKED + b'"max_tokens": -1}',
    _ASKED + b'"n": 1e9}',
    _ASKED + b'"temperature": "hot"}',
    _ASKED + b'"stop": [""]}',
    b"[" * 5000 + b"]" * 5000,
    b"\xff\xfe",
    b'{"messages": [{"role": "tool", "content": "a"}], "tools": [{"type": "function"}]}',
)
SETTLE_S = 20.0
WARM_S = 600.0  # memory is judged behind it: caches fill until then


@dataclass(slots=True)
class Tally:
    """What the clients saw."""

    outcomes: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def status(self, response: httpx2.Response, what: str) -> None:
        """Notes an answer; a 5xx other than 503 is wrong."""
        self.statuses[response.status_code] += 1
        if response.status_code >= 500 and response.status_code != 503:
            self.wrong.append(f"{what}: {response.status_code} {response.text[:200]}")


@dataclass(frozen=True, slots=True)
class Reading:
    """The server's process at one moment."""

    at_s: float
    rss_mib: float
    num_fds: int


class Client:
    """One client: conversations with tools, and every kind of bad manners."""

    def __init__(self, http: httpx2.AsyncClient, tally: Tally, rng: random.Random) -> None:
        self.http, self.tally, self.rng = http, tally, rng

    async def run(self, until: float) -> None:
        """One thing after the other."""
        things = (
            (self.converse, 10), (self.stream, 6), (self.leave, 4), (self.give_up, 3), (self.dawdle, 1),
            (self.malformed, 1), (self.intercept, 3),
        )  # fmt: skip
        while time.monotonic() < until:
            (thing,) = self.rng.choices([f for f, _ in things], [weight for _, weight in things])
            try:
                await asyncio.wait_for(thing(), 120)
                self.tally.outcomes[thing.__name__] += 1
            except TimeoutError:
                self.tally.wrong.append(f"{thing.__name__}: no answer in 120 s")
            except httpx2.TransportError as error:
                self.tally.wrong.append(f"{thing.__name__}: {error!r}")

    def question(self) -> str:
        """Something that a tool answers."""
        a, b = self.rng.randint(2, 99), self.rng.randint(2, 99)
        return self.rng.choice((f"What is {a} * {b}?", "What is the capital of France?", f"Convert {a} km to m."))

    def body(self, **fields: Any) -> dict[str, Any]:
        """A chat request."""
        messages = [{"role": "user", "content": self.question()}]
        return {"messages": messages, "max_tokens": self.rng.randint(4, 160), "temperature": 0, **fields}

    async def converse(self) -> None:
        """Some turns, the history sent back each time."""
        body = self.body()
        for _ in range(self.rng.randint(1, 4)):
            answer = await self.http.post("/v1/chat/completions", json=body)
            self.tally.status(answer, "converse")
            if answer.status_code != 200:
                return
            message = answer.json()["choices"][0]["message"]
            body["messages"] += [
                {"role": "assistant", "content": message["content"] or ""},
                {"role": "user", "content": self.question()},
            ]
            await asyncio.sleep(self.rng.random() * 0.5)

    async def stream(self) -> None:
        """A stream, read to its end."""
        async with self.http.stream("POST", "/v1/chat/completions", json=self.body(stream=True)) as answer:
            self.tally.statuses[answer.status_code] += 1
            text = "".join([line async for line in answer.aiter_lines()])
            if answer.status_code == 200 and "[DONE]" not in text:
                self.tally.wrong.append(f"stream: it ends without [DONE]: {text[-200:]}")

    async def leave(self) -> None:
        """Gone in the middle of a stream."""
        async with self.http.stream("POST", "/v1/chat/completions", json=self.body(stream=True)) as answer:
            self.tally.statuses[answer.status_code] += 1
            count = self.rng.randint(0, 6)
            async for _ in answer.aiter_lines():
                count -= 1
                if count < 0:
                    return

    async def give_up(self) -> None:
        """Gone before the answer."""
        try:
            await asyncio.wait_for(self.http.post("/v1/chat/completions", json=self.body()), self.rng.random() * 0.3)
        except TimeoutError:
            return

    async def dawdle(self) -> None:
        """Reads slowly."""
        body = self.body(stream=True, max_tokens=20)
        async with self.http.stream("POST", "/v1/chat/completions", json=body) as answer:
            self.tally.statuses[answer.status_code] += 1
            async for _ in answer.aiter_lines():
                await asyncio.sleep(0.2)

    async def malformed(self) -> None:
        """What is no request."""
        content, headers = self.rng.choice(MALFORMED), {"content-type": "application/json"}
        path = self.rng.choice(("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"))
        answer = await self.http.post(path, content=content, headers=headers)
        self.tally.status(answer, f"malformed {path} {content[:60]!r}")
        if answer.status_code < 400:
            self.tally.wrong.append(f"malformed: {path} {content[:60]!r} was served")

    async def intercept(self) -> None:
        """An interception by id, answered, ended, or forgotten."""
        body = {"prompt": self.question(), "triggers": {"strings": ["a", "e", "1"]}, "max_tokens": 30, "timeout_s": 2}
        answer = await self.http.post("/v1/generate", json=body)
        self.tally.status(answer, "intercept")
        if answer.status_code != 200 or answer.json()["status"] != "intercepted":
            return
        path = f"/v1/interceptions/{answer.json()['interception']['id']}"
        what = self.rng.random()
        if what < 0.6:
            self.tally.status(await self.http.post(f"{path}/resume", json={"text": " 42"}), "resume")
        elif what < 0.8:
            self.tally.status(await self.http.delete(path), "delete")


def read(process: subprocess.Popen[bytes], start: float) -> Reading:
    """Memory and file descriptors of the server."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    rss = int(re.search(r"VmRSS:\s+(\d+)", status)[1])  # type: ignore[index]  # every Linux has it
    return Reading(time.monotonic() - start, rss / 1024, len(os.listdir(f"/proc/{process.pid}/fd")))


async def load(url: str, process: subprocess.Popen[bytes], args: argparse.Namespace) -> tuple[Tally, list[Reading]]:
    """The clients, until time is up, and readings of the process meanwhile."""
    tally, readings, start = Tally(), [], time.monotonic()
    limits = httpx2.Limits(max_connections=args.clients * 2)
    async with httpx2.AsyncClient(base_url=url, timeout=150, limits=limits) as http:
        until = start + args.minutes * 60
        clients = [Client(http, tally, random.Random(f"{args.seed}/{i}")) for i in range(args.clients)]
        tasks = [asyncio.create_task(client.run(until)) for client in clients]
        while not all(task.done() for task in tasks):
            await asyncio.wait(tasks, timeout=max(1.0, args.minutes * 60 / 60))
            readings.append(read(process, start))
            if process.poll() is not None:
                tally.wrong.append(f"the server is gone: exit status {process.returncode}")
                break
        await asyncio.gather(*tasks, return_exceptions=True)
        await _settle(http, tally)
    readings.append(read(process, start))
    return tally, readings


async def _settle(http: httpx2.AsyncClient, tally: Tally) -> None:
    """Once all clients are gone, nothing runs, and in time nothing is held either."""
    end = time.monotonic() + SETTLE_S
    left: dict[str, float] = {}
    while time.monotonic() < end:
        left = gauges((await http.get("/metrics")).text)
        if not left["running"] + left["waiting"] + left["intercepted"]:
            return
        await asyncio.sleep(0.25)
    tally.wrong.append(f"{SETTLE_S:g} s after the last client left there is still something: {left}")


def gauges(text: str) -> dict[str, float]:
    """What the engine is at, from its metrics."""
    names = {
        "running": "vllm:num_requests_running",
        "waiting": "vllm:num_requests_waiting",
        "intercepted": "jaxcept:num_requests_intercepted",
    }
    found = {}
    for name, metric in names.items():
        values = re.findall(rf"^{re.escape(metric)}(?:\{{[^}}]*\}})? ([0-9.e+-]+)$", text, re.MULTILINE)
        found[name] = sum(map(float, values))
    return found


def verdict(tally: Tally, readings: list[Reading], status: int) -> list[str]:
    """What is wrong."""
    wrong = list(tally.wrong)
    middle, last = readings[len(readings) // 2], readings[-1]
    if middle.at_s > WARM_S and last.rss_mib > 1.03 * middle.rss_mib:
        wrong.append(f"memory grew from {middle.rss_mib:.0f} to {last.rss_mib:.0f} MiB in the second half")
    if last.num_fds > middle.num_fds + 8 and last.num_fds > 64:
        wrong.append(f"file descriptors grew from {middle.num_fds} to {last.num_fds}")
    if status:
        wrong.append(f"the server's exit status is {status}")
    return wrong


async def ready(url: str, process: subprocess.Popen[bytes]) -> None:
    """Until the server takes requests."""
    async with httpx2.AsyncClient(base_url=url) as http:
        while True:
            try:
                if (await http.get("/ready")).status_code == 200:
                    return
            except httpx2.TransportError:
                await asyncio.sleep(0.1)
            if process.poll() is not None:
                raise SystemExit(f"the server did not start: exit status {process.returncode}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("serve", nargs="*", help="flags of jaxcept serve, after --")
    args = parser.parse_args()
    console, port = Console(), free_port()
    with tempfile.TemporaryDirectory() as folder:
        tools = Path(folder) / "soak_tools.py"
        tools.write_text(TOOLS)
        command = [
            sys.executable, "-m", "jaxcept_serve.cli", "serve", "--port", str(port), "--tools", str(tools),
            "--hold-ttl", "5", "--conversation-memory-mb", "16", "--uvicorn-log-level", "warning", *args.serve,
        ]  # fmt: skip
        log = Path(folder) / "server.log"
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            url = f"http://127.0.0.1:{port}"
            asyncio.run(ready(url, process))
            tally, readings = asyncio.run(load(url, process, args))
            process.send_signal(signal.SIGTERM)
            status = process.wait(60)
        finally:
            if process.poll() is None:
                process.kill()
            if process.wait() != 0:
                console.print(log.read_text(errors="replace")[-4000:], markup=False)
    wrong = verdict(tally, readings, status)
    result = {
        "command": shlex.join(["python", *sys.argv]), "cores": os.cpu_count(), "date": date.today().isoformat(),
        "minutes": args.minutes, "clients": args.clients, "outcomes": dict(tally.outcomes),
        "statuses": {str(key): count for key, count in sorted(tally.statuses.items())},
        "readings": [asdict(reading) for reading in readings], "wrong": wrong[:50],
    }  # fmt: skip
    console.print({key: value for key, value in result.items() if key != "readings"})
    first, middle, last = readings[0], readings[len(readings) // 2], readings[-1]
    console.print(f"memory, MiB: {first.rss_mib:.0f}, {middle.rss_mib:.0f} at half time, {last.rss_mib:.0f} at the end")
    console.print(f"file descriptors: {first.num_fds}, {middle.num_fds}, {last.num_fds}")
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.print("FAILED" if wrong else "passed")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
