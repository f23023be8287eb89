"""Who gets in, and what is left outside: keys, limits, draining, and sockets that misbehave."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2 as httpx
import pytest
import uvicorn
from fake_service import FakeService

from jaxcept_serve.app import create_app
from jaxcept_serve.limits import ApiKey, Gate, ServerOptions
from jaxcept_serve.protocol import guarded_protocol
from jaxcept_serve.turns import ServiceError

CHAT = {"messages": [{"role": "user", "content": "hello there"}]}
KEYS = (ApiKey("ann", "key-ann"), ApiKey("bob", "key-bob"))


def ask(service: FakeService, options: ServerOptions, *requests: tuple[str, str, Any]) -> list[httpx.Response]:
    """Answers to (method, path, keywords), one after the other."""

    async def run() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=create_app(service, options))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return [await client.request(method, path, **rest) for method, path, rest in requests]

    return asyncio.run(run())


@pytest.mark.parametrize("headers", [
    {}, {"authorization": "Bearer"}, {"authorization": "Bearer "}, {"authorization": "Bearer wrong"},
    {"authorization": "key-ann"}, {"authorization": "Basic key-ann"}, {"authorization": "Bearer key-ann2"},
    {"authorization": "Bearer ключ".encode()}, {"authorization": b"Bearer \xff\xfe"}, {"x-api-key": "key-an"},
    [("authorization", "Bearer key-ann"), ("authorization", "Bearer wrong")], {"cookie": "key=key-ann"},
])  # fmt: skip
def test_without_the_key_nothing_but_the_probes_answers(headers: Any):
    paths = ["/v1/models", "/version", "/tokenizer_info", "/v1/chat/completions?api_key=key-ann", "/nowhere",
             "/metrics", "/health/", "/openapi.json"]  # fmt: skip
    service = FakeService()
    wrong = ask(service, ServerOptions(api_keys=KEYS), *(("GET", path, {"headers": headers}) for path in paths))
    assert {response.status_code for response in wrong} == {401}
    assert wrong[0].json()["error"]["code"] == "invalid_api_key" and "key-" not in wrong[0].text
    posted = ask(
        service, ServerOptions(api_keys=KEYS), ("POST", "/v1/chat/completions", {"headers": headers, "json": CHAT})
    )
    assert posted[0].status_code == 401 and not service.turns
    probes = ask(service, ServerOptions(api_keys=KEYS), *(("GET", path, {}) for path in ("/health", "/ready", "/ping")))
    assert [response.status_code for response in probes] == [200] * 3


def test_the_key_is_taken_in_both_headers_and_salts_differ():
    service, other = FakeService(), FakeService()
    options = ServerOptions(api_keys=KEYS)
    for headers in ({"authorization": "Bearer key-ann"}, {"authorization": "bearer key-ann"}, {"x-api-key": "key-bob"}):
        [response] = ask(service, options, ("POST", "/v1/chat/completions", {"headers": headers, "json": CHAT}))
        assert response.status_code == 200, response.text
    names = [caller.key_name for caller in service.callers]
    salts = [caller.salt for caller in service.callers]
    assert names == ["ann", "ann", "bob"] and len(set(salts)) == 3  # a secret of each process's own
    fixed = ServerOptions(api_keys=KEYS, salt_secret=b"s")
    for _ in range(2):
        for key in ("key-ann", "key-bob"):
            ask(other, fixed, ("POST", "/v1/chat/completions", {"headers": {"x-api-key": key}, "json": CHAT}))
    again = [caller.salt for caller in other.callers]
    assert again[:2] == again[2:] and again[0] != again[1] and "key-ann" not in "".join(again)


def test_a_host_header_does_not_move_the_path():
    options = ServerOptions(api_keys=KEYS)
    responses = ask(FakeService(), options, *(("GET", "/v1/models", {"headers": {"host": host}}) for host in
                    ("localhost/health?", "a/health#", "health", "a@b", "a b", "")))  # fmt: skip
    assert {response.status_code for response in responses} <= {400, 401}


def test_names_that_are_not_this_servers():
    options = ServerOptions(allowed_hosts=("localhost",))
    hosts = {
        "localhost": 200,
        "localhost:8000": 200,
        "127.0.0.1": 200,
        "[::1]:80": 200,
        "evil.example": 403,
        "LOCALHOST": 200,
    }
    responses = ask(FakeService(), options, *(("GET", "/v1/models", {"headers": {"host": host}}) for host in hosts))
    assert [response.status_code for response in responses] == list(hosts.values())


def test_headers_without_measure():
    options = ServerOptions(max_headers=20, max_header_bytes=1000)
    many = {f"x-{i}": "1" for i in range(30)}
    requests = [{"headers": many}, {"headers": {"x": "1" * 2000}}, {"params": {"q": "1" * 2000}}]
    responses = ask(FakeService(), options, *(("GET", "/v1/models", each) for each in requests))
    assert [response.status_code for response in responses] == [431] * 3


def test_paths_and_methods():
    wanted = {
        ("GET", "/nowhere"): 404, ("GET", "/v1/chat/completions"): 405, ("BREW", "/v1/models"): 405,
        ("GET", "/%00"): 400, ("GET", "/v1/models/%00"): 400, ("GET", "/v1/models/..%2f..%2fetc"): 400,
        ("GET", "/v1/models/absent"): 404, ("GET", "/v1/models/fake"): 200, ("DELETE", "/health"): 405,
    }  # fmt: skip
    responses = ask(FakeService(), ServerOptions(), *((method, path, {}) for method, path in wanted))
    assert [response.status_code for response in responses] == list(wanted.values())
    assert all("error" in response.json() for response in responses if response.status_code != 200)


def test_bodies_that_are_too_large_or_of_another_kind():
    options = ServerOptions(max_body_bytes=1000)
    path = "/v1/chat/completions"

    async def dribble() -> Any:
        for _ in range(100):
            yield b" " * 100

    responses = ask(
        FakeService(), options,
        ("POST", path, {"json": {**CHAT, "user": "x" * 2000}}),
        ("POST", path, {"content": dribble(), "headers": {"content-type": "application/json"}}),
        ("POST", path, {"content": b"{}", "headers": {"content-type": "application/json", "content-length": "9" * 30}}),
        ("POST", path, {"content": b"{}", "headers": {"content-type": "application/json", "content-length": "-1"}}),
        ("POST", path, {"content": b"{}", "headers": {"content-type": "text/plain"}}),
        ("POST", path, {"content": b"{}"}),
        ("POST", path, {"json": CHAT}),
    )  # fmt: skip
    assert [response.status_code for response in responses] == [413, 413, 413, 400, 415, 415, 200]


def test_a_body_that_never_ends():
    async def check() -> None:
        app = create_app(FakeService(), ServerOptions(body_timeout_s=0.05))

        async def slowly() -> Any:
            while True:
                await asyncio.sleep(0.02)
                yield b" "

        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost") as client:
            headers = {"content-type": "application/json"}
            response = await client.post("/v1/chat/completions", content=slowly(), headers=headers)
        assert response.status_code == 408

    asyncio.run(check())


def test_an_error_of_ours_leaks_nothing(caplog: pytest.LogCaptureFixture):
    class Broken(FakeService):
        async def chat(self, turn: Any, caller: Any) -> Any:
            raise RuntimeError("secret path /etc/x")

    headers = {"x-request-id": "my-id"}
    [response] = ask(Broken(), ServerOptions(), ("POST", "/v1/chat/completions", {"json": CHAT, "headers": headers}))
    assert response.status_code == 500 and "secret" not in response.text
    assert response.headers["x-request-id"] == "my-id" and "my-id" in caplog.text and "secret path" in caplog.text
    [response] = ask(FakeService(), ServerOptions(), ("GET", "/health", {"headers": {"x-request-id": "a\tb" * 50}}))
    assert len(response.headers["x-request-id"]) == 32


def test_cors_is_off_unless_asked_for():
    headers = {"origin": "https://page.example", "access-control-request-method": "POST"}
    [closed] = ask(FakeService(), ServerOptions(), ("OPTIONS", "/v1/chat/completions", {"headers": headers}))
    assert "access-control-allow-origin" not in closed.headers
    options = ServerOptions(cors_origins=("https://page.example",), api_keys=KEYS)
    allowed, refused = ask(FakeService(), options, ("OPTIONS", "/v1/chat/completions", {"headers": headers}),
                           ("POST", "/v1/chat/completions", {"headers": headers, "json": CHAT}))  # fmt: skip
    assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == "https://page.example"
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "https://page.example"


def test_too_many_requests_of_one_key():
    async def check() -> None:
        service = FakeService(delay_s=0.05)
        app = create_app(service, ServerOptions(api_keys=KEYS, max_concurrent_per_key=1))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost") as client:

            async def post(key: str) -> httpx.Response:
                return await client.post("/v1/chat/completions", json=CHAT, headers={"x-api-key": key})

            first, second, other = await asyncio.gather(post("key-ann"), post("key-ann"), post("key-bob"))
            again = await post("key-ann")
        assert [each.status_code for each in (first, second, other, again)] == [200, 429, 200, 200]
        assert second.headers["retry-after"] == "1" and second.json()["error"]["type"] == "rate_limit_error"
        assert app.state.api.gate.num_in_flight == 0

    asyncio.run(check())


def test_the_rate_of_a_key():
    now = 0.0
    gate = Gate(ServerOptions(requests_per_s=2, burst=3), lambda: now)

    def enter() -> float:
        try:
            gate.enter("k")
        except ServiceError as error:
            assert error.status == 429 and error.retry_after_s is not None
            return error.retry_after_s
        gate.leave("k")
        return 0.0

    assert [enter() for _ in range(4)] == [0, 0, 0, 0.5]
    now = 0.5
    assert [enter() for _ in range(2)] == [0, 0.5]
    now = 1000.0
    assert [enter() for _ in range(4)] == [0, 0, 0, 0.5]


def test_a_full_queue_and_a_server_that_ends():
    service = FakeService()
    options = ServerOptions(max_num_queued_reqs=4, max_num_queued_tokens=100, retry_after_s=3)
    post = ("POST", "/v1/completions", {"json": {"prompt": ["a b", "c"]}})
    for figures, status in (({}, 200), ({"num_waiting": 2}, 200), ({"num_waiting": 3}, 503), ({"num_waiting": 9}, 503)):
        service.figures = dict(figures)
        [response] = ask(service, options, post)
        assert response.status_code == status
        assert status == 200 or response.headers["retry-after"] == "3"
    gate = Gate(options)
    gate.admit({"num_waiting_tokens": 99}, 1)
    with pytest.raises(ServiceError, match="tokens wait"):
        gate.admit({"num_waiting_tokens": 100}, 1)

    async def drain() -> list[int]:
        app = create_app(FakeService(), ServerOptions(retry_after_s=3))
        app.state.api.gate.is_draining = True
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost") as client:
            posted = await client.post("/v1/chat/completions", json=CHAT)
            assert posted.headers["retry-after"] == "3"
            return [posted.status_code, *[(await client.get(path)).status_code for path in ("/ready", "/health")]]

    assert asyncio.run(drain()) == [503, 503, 200]


def test_a_dead_engine_is_no_healthy_server():
    service = FakeService()
    service.is_alive = service.is_ready = False
    responses = ask(service, ServerOptions(), *(("GET", path, {}) for path in ("/health", "/ready", "/ping")))
    assert [response.status_code for response in responses] == [503] * 3


@pytest.mark.parametrize("wrong", [
    {"max_body_bytes": 0}, {"requests_per_s": 0}, {"requests_per_s": float("inf")}, {"send_timeout_s": 0},
    {"api_keys": (ApiKey("a", "x"), ApiKey("a", "y"))}, {"max_connections": 0},
])  # fmt: skip
def test_options_that_cannot_be(wrong: dict[str, Any]):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ServerOptions(**wrong)


# -- over a socket


@contextmanager
def serving(service: FakeService, **limits: Any) -> Iterator[int]:
    """A server on a port of this machine."""
    options = ServerOptions(**limits)
    config = uvicorn.Config(
        create_app(service, options),
        http=guarded_protocol(options),
        ws="none",
        loop="uvloop",
        lifespan="off",
        log_config=None,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
        assert not thread.is_alive()


def talk(port: int, data: bytes, timeout_s: float = 5.0) -> bytes:
    """What a server answers to bytes, until it closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as client:
        client.sendall(data)
        answer = b""
        try:
            while chunk := client.recv(65536):
                answer += chunk
        except ConnectionResetError:
            pass
        return answer


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def is_well(port: int) -> bool:
    """Whether a good request is served, soon."""
    begun = time.monotonic()
    response = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=CHAT, timeout=5)
    return response.status_code == 200 and time.monotonic() - begun < 2


GET = b"GET /v1/models HTTP/1.1\r\nConnection: close\r\n"
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with serving(
        FakeService(), max_headers=50, max_header_bytes=8192, header_timeout_s=0.4, body_timeout_s=0.4
    ) as found:
        yield found


@pytest.mark.parametrize(("data", "status"), [
    (GET + b"Host: a\r\n\r\n", 200),
    (GET + b"\r\n", 400),
    (GET + b"Host: a\r\nHost: b\r\n\r\n", 400),
    (GET + b"Host: a\r\nX: \x01\r\n\r\n", 400),
    (GET + b"Host: a\r\n" + b"X: 1\r\n" * 100 + b"\r\n", 431),
    (GET + b"Host: a\r\nX: " + b"1" * 10_000 + b"\r\n\r\n", 431),
    (GET + b"Host: a\r\nX: " + b"1" * 1_000_000, 431),
    (b"GET /" + b"a" * 1_000_000, 431),
    (b"GET /v1/models\r\n\r\n", 400),
    (b"\x00\x01\x02\x03\r\n\r\n", 400),
    (b"FLY /v1/models HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    (b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    (b"GET /%00 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", 400),
    (b"GET /../../etc/passwd HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", 400),
    (b"GET http://b/v1/models HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", 200),
    (POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 400),
    (POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    (POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n", 400),
    (POST + b"Content-Length: -1\r\n\r\n", 400),
    (POST + b"Content-Length: 99999999999999999999999\r\n\r\n", 400),
    (POST + b"Content-Length: 1000000000\r\n\r\n{", 413),
    (POST + b"Content-Length: 100\r\n\r\n{", 408),
    (POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
    (GET + b"Host: a\r\nX: unfinished", 408),
    (b"", 408),
])  # fmt: skip
def test_bytes_that_are_no_request(port: int, data: bytes, status: int):
    begun = time.monotonic()
    assert status_of(talk(port, data)) == status
    assert time.monotonic() - begun < 4 and is_well(port)


def test_trailers_do_not_become_headers():
    service = FakeService()
    with serving(service, api_keys=KEYS) as port:
        body = b'{"messages": [{"role": "user", "content": "x"}]}'
        chunked = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n" % (len(body), body)
        assert status_of(talk(port, POST + chunked + b"Authorization: Bearer key-ann\r\n\r\n")) == 401
        assert not service.turns


def test_paths_that_lead_around_the_key():
    with serving(FakeService(), api_keys=KEYS) as port:
        for path in (b"//health", b"/health/../v1/models", b"/v1/models;/health", b"/%68ealth/..%2fv1/models",
                     b"/./health", b"http://x/v1/models"):  # fmt: skip
            answer = talk(port, b"GET %s HTTP/1.1\r\nHost: a/health\r\nConnection: close\r\n\r\n" % path)
            assert status_of(answer) in (400, 401)
            answer = talk(port, b"GET %s HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" % path)
            assert status_of(answer) in (400, 401)


def test_too_many_connections():
    with serving(FakeService(), max_connections=20) as port:
        held = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
        time.sleep(0.2)
        answer = talk(port, GET + b"Host: a\r\n\r\n")
        assert status_of(answer) == 503 and b"retry-after" in answer
        for each in held:
            each.close()
        time.sleep(0.2)
        assert is_well(port)


def test_a_client_that_reads_nothing_is_cut_off_and_leaves_nothing_behind():
    service = FakeService(max_model_len=100_000)
    with serving(service, send_timeout_s=0.3) as port:
        body = b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 50000, "stream": true}'
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.sendall(POST + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
            deadline = time.monotonic() + 10
            while not service.open and time.monotonic() < deadline:
                time.sleep(0.01)
            assert service.open and is_well(port)
            while service.open and time.monotonic() < deadline:
                time.sleep(0.02)
            assert not service.open and is_well(port)


def test_a_client_that_goes_away_ends_its_turn():
    service = FakeService(delay_s=0.02, max_model_len=10_000)
    with serving(service) as port:
        for is_streamed in (b"true", b"false"):
            body = b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 5000, "stream": %s}' % is_streamed
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(POST + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
                deadline = time.monotonic() + 5
                while not service.open and time.monotonic() < deadline:
                    time.sleep(0.01)
                assert service.open
            while service.open and time.monotonic() < deadline:
                time.sleep(0.01)
            assert not service.open
