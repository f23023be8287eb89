"""`jaxcept serve` as a process of its own, for benchmarks that ask it over loopback."""

from __future__ import annotations

import socket
import subprocess
import sys
import time

import httpx2


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_server(flags: list[str], stderr: int | None = None) -> tuple[subprocess.Popen[bytes], str]:
    """A server with these flags, ready, and its URL. SystemExit where it ends before."""
    port = free_port()
    command = [sys.executable, "-m", "jaxcept_serve.cli", "serve", *flags, "--port", str(port)]
    process, url = subprocess.Popen(command, stderr=stderr), f"http://127.0.0.1:{port}"
    while process.poll() is None:
        try:
            if httpx2.get(f"{url}/ready").status_code == 200:
                return process, url
        except httpx2.TransportError:
            time.sleep(0.2)
    raise SystemExit(f"the server did not start: exit status {process.returncode}")
