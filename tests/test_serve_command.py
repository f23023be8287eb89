"""The command `jaxcept serve`: where its settings come from, and how the process ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from jaxcept_serve.cli import make_parser
from jaxcept_serve.serve import apply_settings, make_config

SIZES = (
    "--max-model-len",
    "256",
    "--max-num-seqs",
    "2",
    "--max-num-batched-tokens",
    "32",
    "--num-gpu-blocks-override",
    "64",
)
COSTS = {
    "name": "test", "device": "cpu", "model": "shipped", "dtype": "float32", "overhead_s": 0.001, "floor_s": 0.0,
    "token_s": 1e-4, "context_token_s": 0.0, "pair_s": 0.0, "saturation_tokens": 32, "kv_token_bytes": 1024,
    "swap_out_latency_s": 0.0, "swap_out_token_s": 1e-6, "swap_in_latency_s": 0.0, "swap_in_token_s": 1e-6,
}  # fmt: skip


def config(*words: str, environment: dict[str, str] | None = None) -> Any:
    args = make_parser().parse_args(["serve", *words])
    return make_config(apply_settings(args, environment or {}))


def test_the_command_line_goes_before_the_environment_and_that_before_the_file(tmp_path: Path):
    file = tmp_path / "serve.yaml"
    file.write_text(
        "port: 1\nhost: file\nmax-model-len: 100\nhold_ttl: 7\napi-key: [a=first, second]\nlog-format: json\n"
    )
    environment = {"JAXCEPT_HOST": "environment", "JAXCEPT_MAX_MODEL_LEN": "200", "HOME": "/", "JAXCEPT_OTHER": "x"}
    made = config("--config", str(file), "--max-model-len", "300", environment=environment)
    assert (made.port, made.host, made.engine.max_model_len, made.hold.ttl_s) == (1, "environment", 300, 7)
    assert [(key.name, key.key) for key in made.options.api_keys] == [("a", "first"), ("key-2", "second")]
    assert made.log_format == "json" and "first" not in repr(made)
    made = config(environment={"JAXCEPT_ENABLE_PREFIX_CACHING": "no", "JAXCEPT_MCP": "a=b,c=d"})
    assert not made.engine.enable_prefix_caching and list(made.tools.mcp) == ["a=b", "c=d"]
    assert config("folder").engine.model == "folder" and config().tools.functions == ["jaxcept.tools.builtin"]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("prot: 1", "no setting 'prot'"),
        ("- 1", "expected names and values"),
        ("a: [", "while parsing"),
        ("config: x", "config"),
    ],
)
def test_a_config_file_that_is_none(tmp_path: Path, text: str, error: str):
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=error):
        config("--config", str(file))


def test_settings_that_cannot_be():
    for words, error in (
        (("--hold-ttl", "-1"), "--hold-ttl"),
        (("folder", "--model", "other"), "given twice"),
        (("--api-key", "a=b", "--api-key", "a=c"), "same name"),
        (("--max-body-bytes", "0"), "max_body_bytes"),
    ):
        with pytest.raises(ValueError, match=error):
            config(*words)
    with pytest.raises(ValueError, match="true or false"):
        config(environment={"JAXCEPT_TOOL_PROCESS": "perhaps"})


@contextmanager
def served(tmp_path: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    """A server of its own process, ready."""
    costs, log = tmp_path / "costs.json", tmp_path / "log"
    costs.write_text(json.dumps(COSTS))
    command = [
        sys.executable,
        "-m",
        "jaxcept_serve.cli",
        "serve",
        "--port",
        "0",
        "--cost-model",
        str(costs),
        *SIZES,
        *flags,
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stderr=output, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    try:
        end = time.monotonic() + 120
        while "running on http" not in log.read_text():
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        url = log.read_text().split("running on ")[1].split()[0]
        with httpx.Client(base_url=url, timeout=60) as client:
            yield process, client
    finally:
        process.kill()
        process.wait()


def test_sigterm_under_load_drains_then_gives_up_what_is_left_and_exits_with_0(tmp_path: Path):
    with served(tmp_path, "--tools", "none", "--grace-s", "6") as (process, client):
        waiting = {"prompt": "The", "triggers": {"strings": ["e", "a", "i", "o", " "]}, "timeout_s": 60}
        assert client.post("/v1/generate", json={**waiting, "max_tokens": 100}).json()["status"] == "intercepted"
        waits = client.stream("POST", "/v1/generate", json={**waiting, "max_tokens": 100, "stream": True})
        body = {"prompt": "The", "temperature": 0, "ignore_eos": True, "max_tokens": 200, "stream": True}
        with waits as left, client.stream("POST", "/v1/generate", json=body) as stream:
            left_lines = left.iter_lines()  # kept: the stream ends with it
            next(line for line in left_lines if "intercepted" in line)
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            refused = client.post("/v1/generate", json={"prompt": "The"})
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
            assert "[DONE]" in "".join(lines), "who was served goes on"
            assert process.poll() is None
            assert process.wait(20) == 0, "an interception that nobody answers does not keep it"
