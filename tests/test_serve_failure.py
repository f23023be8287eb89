"""A device that fails under a server: clients are told, the probes say so, and the process ends by itself."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import httpx2 as httpx
import pytest
import uvicorn

from jaxcept.config import EngineConfig
from jaxcept_serve.server import EXIT_ENGINE_DEAD, Running, ServeConfig, Server
from tests.costs import HAND
from tests.sizes import SHIPPED


@pytest.fixture
def running(tmp_path: Any):
    costs = tmp_path / "costs.json"
    HAND.save(costs)
    engine = EngineConfig(cost_model=costs, **SHIPPED)
    made = Running(ServeConfig(engine))
    yield made
    made.close()


def test_a_failing_step_ends_the_server_with_a_status_of_its_own(running: Running):
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        options = uvicorn.Config(
            running.app, log_level="critical", lifespan="off", ws="none", timeout_graceful_shutdown=1
        )
        server = Server(options, running)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        body = {
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": 100,
            "ignore_eos": True,
            "stream": True,
        }
        with httpx.Client(base_url=url, timeout=30) as client:
            assert client.get("/health").status_code == client.get("/ready").status_code == 200
            with client.stream("POST", "/v1/chat/completions", json=body) as stream:
                lines = stream.iter_lines()
                next(line for line in lines if '"content"' in line)

                def fail() -> Any:
                    raise RuntimeError("the device is gone")

                running.llm.session.engine.runner.collect = fail
                rest = "\n".join(lines)
            assert "[DONE]" in rest or "error" in rest, "the client is not left waiting"
            try:
                answers = [
                    client.get("/health").status_code,
                    client.post("/v1/chat/completions", json=body).status_code,
                ]
                assert answers == [503, 503]
            except httpx.TransportError:
                pass  # it has ended already
        thread.join(15)
        assert not thread.is_alive() and server.exit_status == EXIT_ENGINE_DEAD
