"""What a server has to withstand, against the engine with the shipped model, over a socket. After each case a good
request is answered, and another client, who asks all the time, is answered as before."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import socket
import statistics
import struct
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx2 as httpx
import pytest
from bad_bodies import (
    CHAT,
    COMPLETIONS,
    GENERATE,
    MESSAGES,
    RESPONSES,
    USER,
    Case,
    constraints,
    messages,
    names_and_salts,
    numbers,
    prompts,
    stops_and_biases,
    templates,
    too_hard_on_the_way,
    tools,
)
from bad_bodies import GOOD as GOOD_BODIES
from bad_tools import MOOD, calculator

from jaxcept.tools.parsers import PARSERS, make_parser
from jaxcept_serve.call_stream import CallStream
from tests.live_engine import GOOD, LiveEngine, live_engine
from tests.sizes import MAX_LEN

MIB = 1 << 20
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
POST = HEAD + b"x-api-key: mine\r\nContent-Type: application/json\r\n"
GET = b"GET /v1/models HTTP/1.1\r\nConnection: close\r\n"
SLOWER = 30.0  # times as long as before: the machine that runs the tests is busy with others
AT_LEAST_S = 4.0


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveEngine]:
    folder = tmp_path_factory.mktemp("live")
    limits = {"header_timeout_s": 1.0, "body_timeout_s": 1.0, "send_timeout_s": 1.0, "max_body_bytes": 4 * MIB}
    with live_engine(folder, [calculator], **limits) as server:
        MOOD.url = server.url
        assert all(server.client.post(CHAT, json=GOOD).status_code == 200 for _ in range(3))
        before = open_files()
        server.bystander.start()
        server.bystander.wait_for_one(10)
        yield server
        server.bystander.stop()
        assert not server.bystander.wrong
        check_at_rest(server, before)


@pytest.fixture(autouse=True)
def another_client(live: LiveEngine) -> Iterator[None]:
    """Another client's requests go on, and take about as long as before."""
    usual = max(AT_LEAST_S, SLOWER * statistics.median(live.bystander.seconds[:10]))
    since = len(live.bystander.seconds)
    yield
    live.bystander.wait_for_one(since)
    assert not live.bystander.wrong
    assert max(live.bystander.seconds[since:]) < usual
    is_well(live)


def is_well(live: LiveEngine) -> None:
    answer = live.client.post(CHAT, json=GOOD)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] > 0


def check_at_rest(live: LiveEngine, files_before: int) -> None:
    """Nothing is left of all that: no request, no context, no socket; the books add up."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        figures = live.ask(lambda session: session.engine.metrics())
        busy = sum(figures[name] for name in ("num_running", "num_waiting", "num_intercepted", "held_blocks"))
        if not busy and open_files() <= files_before + 5:
            break
        time.sleep(0.1)
    assert not busy, figures
    assert open_files() <= files_before + 5
    live.ask(lambda session: session.engine.scheduler.check())
    assert live.running.app.state.api.gate.num_in_flight == 0


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def refusal(path: str, answer: httpx.Response) -> str:
    """The field that an answer's error names."""
    error = answer.json()["error"]
    assert set(error) >= {"type", "message"} and "Traceback" not in answer.text
    return str(error["message"].split(": ")[0] if path.startswith(MESSAGES) else error["param"])


def check_cases(live: LiveEngine, cases: Iterable[Case]) -> None:
    for path, fields, param in cases:
        answer = live.client.post(path, json=GOOD_BODIES[path] | fields)
        what = (path, str(fields)[:400], answer.status_code, answer.text[:300])
        if param is None:
            assert answer.status_code == 200, what
        else:
            assert answer.status_code in (400, 404) and refusal(path, answer).startswith(param), (param, *what)


def talk(live: LiveEngine, data: bytes, timeout_s: float = 8.0) -> bytes:
    """What the server answers to bytes, until it closes the connection."""
    with socket.create_connection(("127.0.0.1", live.port), timeout=timeout_s) as client:
        answer = b""
        with suppress(ConnectionResetError, BrokenPipeError):
            client.sendall(data)
        with suppress(ConnectionResetError):
            while chunk := client.recv(65536):
                answer += chunk
        return answer


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


# 1. bodies


def test_bodies_that_are_none(live: LiveEngine):
    good = json.dumps(GOOD_BODIES[CHAT]).encode()
    wrong = [
        b"", b"{", b"[]", b'"x"', b"null", b"\xff\xfe", "{}".encode("utf-16"), good[:-1], good + b"}", b"\x00" + good,
        b'{"a": NaN}', b'{"a": Infinity}', b'{"a": 1e999}', b'{"a": "\\ud800"}', b'{"a": "\xed\xa0\x80"}',
        b"[" * 10_000 + b"]" * 10_000, b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
        b'{"a": ' + b"[" * 120 + b"]" * 120 + b"}",
    ]  # fmt: skip
    headers = {"content-type": "application/json"}
    for path in GOOD_BODIES:
        for body in wrong:
            answer = live.client.post(path, content=body, headers=headers)
            assert answer.status_code == 400, (path, body[:40], answer.text)
            assert path == MESSAGES or refusal(path, answer) == "body"
    twice = good[:-1] + b', "max_tokens": 3, "max_tokens": 1}'
    answer = live.client.post(CHAT, content=twice, headers=headers)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 1, "the last one counts"
    nul = live.client.post(CHAT, json={**GOOD, "messages": [{"role": "user", "content": "\x00" * 10}]})
    assert nul.status_code == 200
    for kind in ("application/json; charset=utf-16", "application/json; charset=latin-1", "text/plain", "",
                 "multipart/form-data; boundary=x"):  # fmt: skip
        assert live.client.post(CHAT, content=good, headers={"content-type": kind}).status_code == 415


def test_bodies_that_are_too_large(live: LiveEngine):
    large = json.dumps({**GOOD, "user": "x" * 5 * MIB}).encode()
    assert live.client.post(CHAT, content=large, headers={"content-type": "application/json"}).status_code == 413
    declared = talk(live, POST + b"Content-Length: %d\r\n\r\n" % (100 * MIB) + b"x" * MIB)
    assert status_of(declared) == 413
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    assert status_of(talk(live, POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 100)) == 413


def test_bodies_that_break_off(live: LiveEngine):
    body = json.dumps(GOOD).encode()
    head = POST + b"Content-Length: %d\r\n\r\n" % len(body)
    assert status_of(talk(live, head + body[:-5])) == 408
    with socket.create_connection(("127.0.0.1", live.port), timeout=5) as client:
        client.sendall(head + body[:-5])
        client.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):
            assert not client.recv(65536).startswith(b"HTTP/1.1 2")
    with socket.create_connection(("127.0.0.1", live.port), timeout=5) as client:
        client.sendall(head + body[:5])


# 2 to 8, 14: fields


def test_numbers(live: LiveEngine):
    check_cases(live, numbers())


def test_prompts(live: LiveEngine):
    check_cases(live, prompts(MAX_LEN, live.running.llm.session.tokenizer.vocab_size))


def test_stops_and_biases(live: LiveEngine):
    check_cases(live, stops_and_biases(live.running.llm.session.tokenizer.vocab_size))


def test_constraints(live: LiveEngine):
    check_cases(live, constraints())
    for path in (CHAT, COMPLETIONS):
        hard = {"guided_grammar": too_hard_on_the_way(), "tool_choice": "none", "max_tokens": 5}
        for stream in (False, True):
            answer = live.client.post(path, json=GOOD_BODIES[path] | hard | {"stream": stream})
            assert answer.status_code == (200 if stream else 400) and "cannot be followed" in answer.text, answer.text
    deep = (
        b'{"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_schema", "json_schema": '
    )
    deep += b'{"schema": ' + b'{"not": ' * 10_000 + b"{}" + b"}" * 10_000 + b"}}}"
    assert live.client.post(CHAT, content=deep, headers={"content-type": "application/json"}).status_code == 400


def test_tools_and_their_answers(live: LiveEngine):
    check_cases(live, tools())


def test_messages(live: LiveEngine):
    check_cases(live, messages())


def test_templates(live: LiveEngine):
    check_cases(live, templates())


def test_names_salts_and_unknown_fields(live: LiveEngine):
    check_cases(live, names_and_salts())
    theirs = {"authorization": "Bearer theirs"}
    kept = live.client.post(
        RESPONSES, json={"input": "Keep this.", "max_output_tokens": 2, "prompt_cache_key": "k"}
    ).json()
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")):
        assert live.client.request(method, f"{RESPONSES}/{kept['id']}{path}", headers=theirs).status_code == 404
    follow = {"input": "x", "previous_response_id": kept["id"], "max_output_tokens": 2}
    assert live.client.post(RESPONSES, json=follow, headers=theirs).status_code == 404
    prompt = {**GOOD, "messages": [{"role": "user", "content": "a secret that is long enough for blocks " * 4}],
              "prompt_cache_key": "k"}  # fmt: skip
    cached = [
        live.client.post(CHAT, json={**prompt, "cache_salt": "me"}, headers={**who, "x-session-id": "k"}).json()[
            "usage"
        ]
        for who in ({}, {}, theirs)
    ]
    found = [usage["prompt_tokens_details"]["cached_tokens"] for usage in cached]
    assert found[1] > 0 and found[2] == 0, "nobody can tell what another's prompt was"


# 9. interceptions


def start(live: LiveEngine, **fields: Any) -> dict[str, Any]:
    """A generation that is intercepted soon."""
    body = {"prompt": "The number is", "temperature": 0, "ignore_eos": True, "max_tokens": 8, **fields}
    answer = live.client.post(GENERATE, json={"triggers": {"strings": list("aeiou 0123456789")}, **body})
    assert answer.status_code == 200, answer.text
    assert answer.json()["status"] == "intercepted", answer.text
    return dict(answer.json()["interception"])


def test_resumes(live: LiveEngine):
    def resume(interception_id: str, status: int, field: str | None = None, **body: Any) -> None:
        headers = body.pop("headers", {})
        answer = live.client.post(f"/v1/interceptions/{interception_id}/resume", json=body, headers=headers)
        assert answer.status_code == status, (body, answer.text)
        assert field is None or refusal(GENERATE, answer).startswith(field), answer.text

    for unknown in ("absent", "int_" + "0" * 32, "x" * 5000, "%F0%9F%98%80", "%FF"):
        resume(unknown, 404, text="x")
    opened = start(live)["id"]
    resume(opened, 404, text="x", headers={"authorization": "Bearer theirs"})
    resume(opened, 400, "text")
    resume(opened, 400, "text", text="x", token_ids=[1])
    resume(opened, 400, "text", text=7)
    for ids in ([-1], [768], [2**63], ["a"], [None], [1.5], [True], [[1]], {}, "x"):
        resume(opened, 400, "token_ids", token_ids=ids)
    resume(opened, 400, "token_ids", token_ids=[5] * MAX_LEN)
    resume(opened, 400, "text", text="word " * 1000)
    resume(opened, 400, "more", text="x", more=3)
    assert live.client.get(f"/v1/interceptions/{opened}").json()["status"] == "open", "none of that was an answer"
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(live.client.post, f"/v1/interceptions/{opened}/resume", json={"text": "7"})
                   for _ in range(4)]  # fmt: skip
        assert sorted(answer.result(20).status_code for answer in answers) == [200, 409, 409, 409]
    resume(opened, 409, text="x")
    aborted = start(live)["id"]
    assert live.client.delete(f"/v1/interceptions/{aborted}").status_code == 200
    resume(aborted, 410, text="x")
    assert live.client.delete(f"/v1/interceptions/{aborted}").status_code == 410
    late = start(live, timeout_s=0.05, on_timeout="end")["id"]
    time.sleep(0.3)
    resume(late, 410, text="x")
    for left in live.ask(lambda session: [*session._records]):
        if left.startswith("gen-"):
            live.running.llm.abort(left)


# 10. tools


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*fork.*:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(("mood", "told"), [
    ("well", "3367"), ("huge", "x"), ("bytes", ""), ("surrogates", ""), ("never", "time"), ("slow", "time"),
    ("base", "error"), ("exit", "error"), ("none", ""), ("recursive", ""), ("markers", ""), ("fork", "3367|time"),
    ("calls back", "status 200"),
])  # fmt: skip
def test_what_a_tool_may_answer(live: LiveEngine, mood: str, told: str):
    MOOD.name = mood
    try:
        asked = {"messages": [USER], "max_tokens": 100, "temperature": 0, "jaxcept": {"hold_ttl_s": 0}}
        answer = live.client.post(CHAT, json=asked)
    finally:
        MOOD.is_over.set()
    assert answer.status_code == 200, answer.text
    [call] = answer.json()["choices"][0]["message"]["jaxcept_tools"][:1]
    assert re.search(told, call["result"].lower()) and len(call["result"]) < 100_100, str(call)[:300]
    assert "/etc/passwd" not in answer.text or mood != "exit"
    MOOD.is_over.clear()


# 11. heads


@pytest.mark.parametrize(("data", "statuses"), [
    (GET + b"x-api-key: mine\r\nHost: a\r\n\r\n", {200}),
    (GET + b"x-api-key: mine\r\n\r\n", {400}),
    (GET + b"x-api-key: mine\r\nHost: a\r\nHost: b\r\n\r\n", {400}),
    (GET + b"x-api-key: mine\r\nHost: a/health\r\n\r\n", {400}),
    (GET + b"Host: a\r\nX: " + b"1" * MIB + b"\r\n\r\n", {431}),
    (GET + b"Host: a\r\n" + b"X: 1\r\n" * 5000 + b"\r\n", {431}),
    (b"GET /" + b"a" * MIB + b" HTTP/1.1\r\nHost: a\r\n\r\n", {431}),
    (POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", {400}),
    (POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", {400}),
    (POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n", {400}),
    (POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n", {400}),
    (POST + b"Content-Length: -1\r\n\r\n", {400}),
    (POST + b"Content-Length: 2x\r\n\r\n{}", {400}),
    (POST + b"Content-Length: 1\r\n\r\n{}GET /v1/models HTTP/1.1\r\n\r\n", {400}),
    (b"BREW /v1/models HTTP/1.1\r\nHost: a\r\n\r\n", {400}),
    (b"TRACE /v1/models HTTP/1.1\r\nHost: a\r\nx-api-key: mine\r\nConnection: close\r\n\r\n", {405}),
    (b"GET /v1/../../etc/passwd HTTP/1.1\r\nHost: a\r\nx-api-key: mine\r\nConnection: close\r\n\r\n", {400}),
    (b"GET /v1/models/..%2f..%2fetc HTTP/1.1\r\nHost: a\r\nx-api-key: mine\r\nConnection: close\r\n\r\n", {400}),
    (b"GET /v1/models/%00 HTTP/1.1\r\nHost: a\r\nx-api-key: mine\r\nConnection: close\r\n\r\n", {400}),
    (GET + b"Host: a\r\n\r\n", {401}),
    (GET + b"Host: a\r\nx-api-key: min\r\n\r\n", {401}),
    (GET + b"Host: a\r\nAuthorization: Bearer mine\r\nAuthorization: Bearer x\r\n\r\n", {401}),
    (GET + b"Host: a\r\nAuthorization: Bearer \xff\xfe\r\n\r\n", {400, 401}),
    (b"GET /v1/models?api_key=mine HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", {401}),
    (HEAD + b"Content-Length: 2\r\n\r\n{}", {401}),
    (b"GET /v1/models\r\n\r\n", {400}),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 100, {400}),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {400}),
])  # fmt: skip
def test_heads(live: LiveEngine, data: bytes, statuses: set[int]):
    assert status_of(talk(live, data)) in statuses


# 12. clients


def post_bytes(path: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = b"POST %s HTTP/1.1\r\nHost: a\r\nx-api-key: mine\r\nContent-Type: application/json\r\n" % path.encode()
    return head + b"Content-Length: %d\r\n\r\n%s" % (len(data), data)


LONG: dict[str, dict[str, Any]] = {
    CHAT: {**GOOD_BODIES[CHAT], "max_tokens": 400, "ignore_eos": True, "n": 2},
    COMPLETIONS: {**GOOD_BODIES[COMPLETIONS], "max_tokens": 400, "ignore_eos": True, "prompt": ["The", "A"]},
    RESPONSES: {**GOOD_BODIES[RESPONSES], "max_output_tokens": 400},
    MESSAGES: {**GOOD_BODIES[MESSAGES], "max_tokens": 400},
    GENERATE: {**GOOD_BODIES[GENERATE], "max_tokens": 400, "ignore_eos": True},
}


@pytest.mark.parametrize("is_reset", [False, True])
def test_clients_that_go_away(live: LiveEngine, is_reset: bool):
    """Before the first byte and in the midst, streaming or not: what they asked for ends."""
    for path, body in LONG.items():
        for stream, num_reads in ((False, 0), (True, 0), (True, 1), (True, 3)):
            client = socket.create_connection(("127.0.0.1", live.port), timeout=10)
            client.sendall(post_bytes(path, {**body, "stream": stream}))
            for _ in range(num_reads):
                client.recv(200)
            if is_reset:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
    figures = live.settled()
    assert figures["num_running"] + figures["num_waiting"] <= 1


def test_clients_that_go_away_while_intercepted(live: LiveEngine):
    triggers = {"strings": list("aeiou 0123456789")}
    body = {"prompt": "The number is", "temperature": 0, "ignore_eos": True, "max_tokens": 50, "timeout_s": 0.5}
    for stream in (False, True):
        with socket.create_connection(("127.0.0.1", live.port), timeout=10) as client:
            client.sendall(post_bytes(GENERATE, {**body, "triggers": triggers, "stream": stream}))
            seen = b""
            while b"intercepted" not in seen:
                seen += client.recv(4096)
    MOOD.name = "slow"
    chat = {"messages": [USER], "max_tokens": 100, "temperature": 0, "stream": True, "jaxcept": {"hold_ttl_s": 0}}
    with socket.create_connection(("127.0.0.1", live.port), timeout=10) as client:
        client.sendall(post_bytes(CHAT, chat))
        time.sleep(0.3)
    MOOD.name = "well"
    deadline = time.monotonic() + 10
    while live.ask(lambda session: session.engine.metrics())["num_intercepted"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_clients_that_read_nothing(live: LiveEngine):
    readers = []
    for path, asked in (
        (CHAT, {"logprobs": True, "top_logprobs": 20}),
        (COMPLETIONS, {"prompt": "The", "logprobs": 20}),
    ):
        fields = {**LONG[path], "stream": True, "n": 1, **asked}
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(("127.0.0.1", live.port))
        client.sendall(post_bytes(path, fields))
        readers.append(client)
    try:
        assert live.settled()["num_running"] <= 1
    finally:
        for client in readers:
            client.close()


def test_many_connections_and_slow_bytes(live: LiveEngine):
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = min(2000, (files - open_files() - 200) // 2)
    clients = [socket.create_connection(("127.0.0.1", live.port), timeout=10) for _ in range(count)]
    try:
        is_well(live)
        slow = random.Random(0).sample(clients, 50)
        begun = time.monotonic()
        while time.monotonic() - begun < 0.5:  # a request that would take minutes
            for client in slow:
                with suppress(OSError):
                    client.send(b"G")
            time.sleep(0.1)
        is_well(live)
    finally:
        for client in clients:
            client.close()


# 13. texts


@pytest.mark.parametrize("name", PARSERS)
def test_text_that_looks_like_a_call(name: str, live: LiveEngine):
    """Not closed, a megabyte, 10,000 braces, split at every byte: text, or a call that is told to be broken."""
    opening = "<tool_call>" if name != "mistral" else "[TOOL_CALLS]"
    call = opening + '{"name": "f", "arguments": {"a": '
    begun = time.monotonic()
    for text in (call, call + "1" * MIB, call + '{"b": ' * 10_000, call + "[" * 10_000 + "]" * 10_000, opening * 1000,
                 call + '"' + "\\" * 10_001):  # fmt: skip
        whole, pieces = CallStream(make_parser(name), 0, lambda: "id", lambda _: False), 4096
        said = "".join(whole.feed(text[i : i + pieces])[0] for i in range(0, len(text), pieces)) + whole.end_turn()[0]
        assert len(said) <= len(text) and len(whole.calls) <= 1000
    split = CallStream(make_parser(name), 0, lambda: "id", lambda _: False)
    for char in call + '"' + "é" * 5000 + '"}}</tool_call>':
        split.feed(char)
    split.end_turn()
    assert time.monotonic() - begun < 20


def texts(answer: str) -> str:
    """The text of a completion, streamed or not."""
    bodies = [line.removeprefix("data: ") for line in answer.splitlines() if line.startswith(("{", "data: {"))]
    return "".join(choice["text"] for body in bodies for choice in json.loads(body)["choices"])


def test_the_model_writes_what_looks_like_a_call(live: LiveEngine):
    for pattern in (
        r"<tool_call>\{{50}",
        r'<tool_call>\{"name": "calculator", "arguments": \{"a": ',
        "(<tool_call>){9}",
    ):
        for stream in (False, True):
            body = {**GOOD_BODIES[COMPLETIONS], "guided_regex": pattern, "max_tokens": 60, "stream": stream,
                    "skip_special_tokens": False}  # fmt: skip
            answer = live.client.post(COMPLETIONS, json=body)
            assert answer.status_code == 200 and "<tool_call>" in texts(answer.text)
