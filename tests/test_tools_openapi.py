"""HTTP tools from OpenAPI documents, against a real server on loopback; and the addresses that they may not reach."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from jaxcept.tools.calls import Outcome, ToolCall, ToolResult
from jaxcept.tools.openapi_request import Operation, Parameter
from jaxcept.tools.openapi_schema import MAX_NODES, Document
from jaxcept.tools.output import ToolError
from jaxcept.tools.toolbox import Toolbox

openapi = pytest.importorskip("jaxcept.tools.openapi", reason="needs httpcore2")
addresses = pytest.importorskip("jaxcept.tools.addresses", reason="needs httpcore2")


class Handler(BaseHTTPRequestHandler):
    """Says what it was asked, but for a few paths that misbehave."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def answer(self) -> None:
        seen = json.dumps(
            {
                "method": self.command,
                "path": self.path,
                "headers": {name.lower(): value for name, value in self.headers.items()},
                "body": self.rfile.read(int(self.headers.get("Content-Length", 0))).decode(),
            }
        ).encode()
        match self.path:
            case "/api.json" if self.server.document:  # type: ignore[attr-defined]
                self.say(200, json.dumps(self.server.document).encode(), "application/json")  # type: ignore[attr-defined]
            case "/gone":
                self.say(404, b"no such pet", "text/plain")
            case "/broken":
                self.say(503, b"try later", "text/plain")
            case "/moved":
                self.send_response(302)
                self.send_header("Location", "http://169.254.169.254/latest/meta-data/")
                self.send_header("Content-Length", "0")
                self.end_headers()
            case "/picture":
                self.say(200, b"\x89PNG\0\0", "image/png")
            case "/invalid":
                self.say(200, b"a\xff\xfeb", "text/plain")
            case "/empty":
                self.say(204, b"", "text/plain")
            case "/gzip":
                self.say(200, b"\x1f\x8b", "text/plain", ("Content-Encoding", "gzip"))
            case "/endless" | "/slow":
                self.stream(b"x" * 65536 if self.path == "/endless" else b"x", 0.0 if self.path == "/endless" else 0.05)
            case "/silent":
                self.server.release.wait(10)  # type: ignore[attr-defined]
                self.close_connection = True
            case "/nonsense":
                self.wfile.write(b"this is not HTTP\r\n\r\n")
                self.close_connection = True
            case _:
                self.say(200, seen, "application/json")

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = answer  # noqa: N815

    def say(self, status: int, body: bytes, kind: str, *more: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in (("Content-Type", kind), ("Content-Length", str(len(body))), *more):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def stream(self, chunk: bytes, pause_s: float) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.end_headers()
        self.close_connection = True
        try:
            while not self.server.release.wait(pause_s) if pause_s else True:  # type: ignore[attr-defined]
                self.wfile.write(chunk)
        except OSError:
            self.server.hung_up.set()  # type: ignore[attr-defined]


class Server(ThreadingHTTPServer):
    """Remembers whether a client hung up on a stream."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.document: dict[str, Any] | None = None
        self.release = threading.Event()
        self.hung_up = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server()
    thread = threading.Thread(target=running.serve_forever, args=(0.05,))
    thread.start()
    yield running
    running.release.set()
    running.shutdown()
    thread.join()
    running.server_close()


def document(url: str, **paths: Any) -> dict[str, Any]:
    return {"openapi": "3.1.0", "info": {"title": "t", "version": "1"}, "servers": [{"url": url}], "paths": paths}


def get(name: str) -> dict[str, Any]:
    return {f"/{name}": {"get": {"operationId": name}}}


def opened(tmp_path: Path, content: dict[str, Any], **options: Any) -> Any:
    path = tmp_path / "api.json"
    path.write_text(json.dumps(content))
    resolve = options.pop("resolve", None)
    options.setdefault("allow_hosts", ("127.0.0.1",))
    return openapi.OpenApiTools(openapi.OpenApiSpec("api", str(path), **options), resolve=resolve)


def call(tools: Any, name: str, timeout_s: float = 10.0, **arguments: Any) -> ToolResult:
    with Toolbox(tools.tools) as box:
        return asyncio.run(box.call(ToolCall("call00000", name, arguments), timeout_s))


PET_PATHS: dict[str, Any] = {
    "/pets/{petId}/toys/{toy}": {
        "parameters": [
            {"name": "petId", "in": "path", "required": True, "schema": {"type": "integer"}},
            {"name": "limit", "in": "query", "schema": {"type": "integer"}},
        ],
        "put": {
            "operationId": "put.toy!",
            "summary": "Give a toy.",
            "description": "To a pet.",
            "parameters": [
                {"name": "toy", "in": "path", "required": True, "schema": {"type": "string"}},
                {"name": "limit", "in": "query", "description": "How many.", "schema": {"type": "integer"}},
                {"name": "tags", "in": "query", "schema": {"type": "array", "items": {"type": "string"}}},
                {"name": "ids", "in": "query", "explode": False, "schema": {"type": "array", "items": {}}},
                {"name": "where", "in": "query", "style": "deepObject", "schema": {"type": "object"}},
                {"name": "filter", "in": "query", "content": {"application/json": {"schema": {"type": "object"}}}},
                {"name": "X-Trace", "in": "header", "schema": {"type": "string"}},
                {"name": "Authorization", "in": "header", "schema": {"type": "string"}},
                {"name": "session", "in": "cookie", "schema": {"type": "string"}},
                {"name": "petId", "in": "query", "schema": {"type": "boolean"}},
            ],
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Toy"}}},
            },
        },
    }
}


def test_an_operation_is_a_tool_and_its_arguments_go_where_they_belong(tmp_path: Path, server: Server) -> None:
    content = document(f"{server.url}/v1/", **PET_PATHS)
    toy = {
        "type": "object",
        "properties": {"name": {"type": "string", "nullable": True}, "id": {"type": "integer", "readOnly": True}},
        "required": ["name"],
        "xml": {"name": "toy"},
    }
    content["components"] = {"schemas": {"Toy": toy}}
    tools = opened(tmp_path, content, headers={"Authorization": "Bearer secret"})
    [made] = tools.tools
    assert (made.name, made.description, made.is_pure) == ("put_toy", "Give a toy.\nTo a pet.", False)
    properties = made.parameters["properties"]
    assert list(properties) == [
        "petId", "limit", "toy", "tags", "ids", "where", "filter", "X-Trace", "query_petId", "body",
    ]  # fmt: skip
    assert properties["limit"] == {"type": "integer", "description": "How many."}
    assert properties["body"] == {
        "type": "object",
        "properties": {"name": {"type": ["string", "null"]}},
        "required": ["name"],
    }
    assert made.parameters["required"] == ["petId", "toy", "body"]
    result = call(
        tools,
        "put_toy",
        petId="7",
        toy="../ball & chain?",
        tags=["a b", "c"],
        ids=[1, 2],
        where={"age": 3},
        filter={"x": True},
        query_petId=True,
        body={"name": "é"},
        **{"X-Trace": "abc"},
    )
    seen = json.loads(result.text)
    assert seen["method"] == "PUT"
    path, _, query = seen["path"].partition("?")
    assert path == "/v1/pets/7/toys/..%2Fball%20%26%20chain%3F"
    assert query == "tags=a+b&tags=c&ids=1%2C2&where%5Bage%5D=3&filter=%7B%22x%22%3Atrue%7D&petId=true"
    assert seen["body"] == '{"name":"é"}'
    assert {name: seen["headers"][name] for name in ("authorization", "x-trace", "content-type", "host")} == {
        "authorization": "Bearer secret",
        "x-trace": "abc",
        "content-type": "application/json",
        "host": f"127.0.0.1:{server.server_port}",
    }
    assert tools.health() == [{"server": "api", "kind": "openapi", "is_up": True, "tools": 1, "error": ""}]
    tools.close()


def test_configured_headers_go_to_the_configured_host_alone(tmp_path: Path, server: Server) -> None:
    content = document("http://elsewhere.test", **get("echo"), **get("other"))
    content["paths"]["/other"]["get"]["servers"] = [{"url": server.url}]
    secret = {"Authorization": "Bearer secret"}

    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    allowed = ("127.0.0.1", "elsewhere.test")
    tools = opened(tmp_path, content, headers=secret, base_url=server.url, allow_hosts=allowed, resolve=resolve)
    assert json.loads(call(tools, "echo").text)["headers"]["authorization"] == "Bearer secret"
    tools.close()
    server.document = content
    spec = openapi.OpenApiSpec(
        "api", f"http://elsewhere.test:{server.server_port}/api.json", headers=secret, allow_hosts=allowed
    )
    tools = openapi.OpenApiTools(spec, resolve=resolve)
    assert "authorization" not in json.loads(call(tools, "other").text)["headers"]
    tools.close()


@pytest.mark.parametrize(
    ("name", "outcome", "text"),
    [
        ("gone", Outcome.ERROR, "error: HTTP 404: no such pet"),
        ("broken", Outcome.FAILED, "error: HTTP 503: try later"),
        ("picture", Outcome.ANSWERED, "[image/png, 6 bytes, not shown]"),
        ("invalid", Outcome.ANSWERED, "a\ufffd\ufffdb"),
        ("empty", Outcome.ANSWERED, "HTTP 204, without content"),
        ("gzip", Outcome.ANSWERED, "[text/plain, compressed though that was not asked for, not shown]"),
        ("nonsense", Outcome.FAILED, "error: ConnectionError: no answer from 127.0.0.1"),
        (
            "moved",
            Outcome.ERROR,
            "error: HTTP 302: a redirect to 'http://169.254.169.254/latest/meta-data/', which is not followed",
        ),
    ],
)
def test_answers_as_text(tmp_path: Path, server: Server, name: str, outcome: Outcome, text: str) -> None:
    tools = opened(tmp_path, document(server.url, **get(name)))
    result = call(tools, name)
    assert (result.outcome, result.text[: len(text)]) == (outcome, text)
    assert tools.health()[0]["is_up"] is (name != "nonsense")
    tools.close()


def test_an_endless_answer_is_cut_off(tmp_path: Path, server: Server) -> None:
    tools = opened(tmp_path, document(server.url, **get("endless")))
    server.hung_up.clear()
    began_s = time.monotonic()
    result = call(tools, "endless")
    assert time.monotonic() - began_s < 5
    assert result.text.startswith("xxx")
    assert len(result.text) < 101_000
    assert server.hung_up.wait(5)
    tools.close()


@pytest.mark.parametrize("name", ["slow", "silent"])
def test_an_answer_that_takes_too_long_times_out_and_hangs_up(tmp_path: Path, server: Server, name: str) -> None:
    tools = opened(tmp_path, document(server.url, **get(name)))
    server.hung_up.clear()
    result = call(tools, name, timeout_s=0.3)
    assert result.outcome is Outcome.TIMEOUT
    if name == "slow":
        assert server.hung_up.wait(5)
    tools.close()


def test_a_server_that_is_not_there_is_told(tmp_path: Path) -> None:
    tools = opened(tmp_path, document("http://127.0.0.1:9", **get("echo")))
    result = call(tools, "echo")
    assert result.text.startswith("error: ConnectionError: no answer from 127.0.0.1")
    assert not tools.health()[0]["is_up"]
    tools.close()


REFUSED = [
    "127.0.0.1", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "017700000001", "0.0.0.0", "localhost", "[::1]",
    "[::]", "[::ffff:127.0.0.1]", "[::ffff:a9fe:a9fe]", "[64:ff9b::7f00:1]", "[64:ff9b:1::1]", "[fe80::1]",
    "[2002:7f00:1::]", "[2001:db8::1]", "[fec0::1]", "[100::1]", "[3fff::1]", "[fd00:ec2::254]", "169.254.169.254",
    "10.0.0.1", "172.16.5.4", "192.168.1.1", "100.100.100.200", "168.63.129.16", "192.0.0.192", "224.0.0.1",
    "255.255.255.255", "[ff02::1]",
]  # fmt: skip


@pytest.mark.parametrize("host", REFUSED)
def test_addresses_that_are_not_public_are_refused(tmp_path: Path, server: Server, host: str) -> None:
    tools = opened(tmp_path, document(f"http://{host}:{server.server_port}", **get("echo")), allow_hosts=())
    result = call(tools, "echo")
    assert result.outcome is Outcome.ERROR
    assert "is not a public address" in result.text
    tools.close()


@pytest.mark.parametrize(
    "found",
    [["127.0.0.1"], ["169.254.169.254"], ["::1"], ["8.8.8.8", "10.0.0.1"], ["fe80::1%eth0"], ["not an address"]],
)
def test_a_name_is_judged_by_every_address_that_it_resolves_to(
    tmp_path: Path, server: Server, found: list[str]
) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        assert host == "innocent.example"
        return found

    content = document(f"http://innocent.example:{server.server_port}", **get("echo"))
    tools = opened(tmp_path, content, allow_hosts=(), resolve=resolve)
    result = call(tools, "echo")
    assert result.outcome is Outcome.ERROR, "a refused address says nothing about the tool's health"
    assert result.text == (
        "error: 'innocent.example' is not a public address, and tools may connect to public ones alone "
        "(whoever runs this server can allow the host)"
    )
    tools.close()


def test_the_address_that_was_judged_is_the_one_that_is_used(tmp_path: Path, server: Server) -> None:
    answers = iter([["127.0.0.1"], ["10.0.0.1"]])
    asked: list[str] = []

    async def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        return next(answers)

    content = document(f"http://Inner.example:{server.server_port}", **get("echo"))
    tools = opened(tmp_path, content, allow_hosts=("INNER.example.",), resolve=resolve)
    seen = json.loads(call(tools, "echo").text)
    assert seen["headers"]["host"] == f"Inner.example:{server.server_port}"
    assert len(asked) == 1, "one lookup: the connection goes to what it gave"
    tools.close()


@pytest.mark.parametrize(
    ("allowed", "is_refused"),
    [((), True), (("inner.example",), True), (("169.254.169.254",), False), (("inner.example", "10.0.0.1"), True)],
)
def test_metadata_addresses_need_to_be_named_themselves(allowed: tuple[str, ...], is_refused: bool) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        return ["169.254.169.254"]

    guard = addresses.AddressGuard(allowed, resolve)
    if is_refused:
        with pytest.raises(ToolError, match="not a public address"):
            asyncio.run(guard.addresses("inner.example", 80))
    else:
        assert asyncio.run(guard.addresses("inner.example", 80)) == ["169.254.169.254"]


def test_public_addresses_are_let_through() -> None:
    async def resolve(host: str, port: int) -> list[str]:
        return ["8.8.8.8", "2001:4860:4860::8888"]

    assert len(asyncio.run(addresses.AddressGuard((), resolve).addresses("dns.google", 443))) == 2


def test_local_sockets_are_refused() -> None:
    backend = addresses.GuardedBackend(addresses.AddressGuard())
    with pytest.raises(ToolError, match="local sockets"):
        asyncio.run(backend.connect_unix_socket("/var/run/docker.sock"))


def test_a_document_is_read_from_a_url_and_in_yaml(tmp_path: Path, server: Server) -> None:
    pytest.importorskip("yaml")
    path = tmp_path / "api.yaml"
    path.write_text(
        "openapi: 3.0.3\nservers: [{url: '" + server.url + "/{v}', variables: {v: {default: v2}}}]\n"
        "paths:\n  /a/{b}:\n    get:\n      parameters:\n        - {name: b, in: path, schema: {type: string}}\n"
    )
    tools = openapi.OpenApiTools(openapi.OpenApiSpec("api", str(path), allow_hosts=("127.0.0.1",)))
    assert json.loads(call(tools, "get_a_b", b="c").text)["path"] == "/v2/a/c"
    tools.close()
    with pytest.raises(ValueError, match="not a public address"):
        openapi.OpenApiTools(openapi.OpenApiSpec("api", f"{server.url}/other.json"))
    with pytest.raises(ValueError, match="expected an OpenAPI 3 document"):
        openapi.OpenApiTools(openapi.OpenApiSpec("api", f"{server.url}/other.json", allow_hosts=("127.0.0.1",)))
    with pytest.raises(ValueError, match="HTTP 404"):
        openapi.OpenApiTools(openapi.OpenApiSpec("api", f"{server.url}/gone", allow_hosts=("127.0.0.1",)))


BAD_DOCUMENTS: dict[str, tuple[Any, str]] = {
    "not a mapping": ([], "expected an OpenAPI 3 document"),
    "swagger 2": ({"swagger": "2.0", "paths": {}}, "expected an OpenAPI 3 document"),
    "no paths": ({"openapi": "3.1.0"}, "no operation"),
    "a wrong server": (document("ftp://x", **get("a")), "no operation"),
    "a password in the server": (document("http://a:b@x", **get("a")), "no operation"),
    "a server that is relative to a file": (document("/v1", **get("a")), "no operation"),
    "a reference outside": (
        document("http://x", **{"/a": {"get": {"parameters": [{"$ref": "http://evil/x.json"}]}}}),
        "no operation",
    ),
    "a reference in a circle": (
        document("http://x", **{"/a": {"get": {"parameters": [{"$ref": "#/loop"}]}}}) | {"loop": {"$ref": "#/loop"}},
        "no operation",
    ),
    "a file to upload": (
        document("http://x", **{"/a": {"post": {"requestBody": {"content": {"multipart/form-data": {}}}}}}),
        "no operation",
    ),
    "a header that is none": (
        document("http://x", **{"/a": {"get": {"parameters": [{"in": "header", "name": "a\r\nb"}]}}}),
        "no operation",
    ),
    "parameters of the wrong shape": (document("http://x", **{"/a": {"get": {"parameters": [1]}}}), "no operation"),
}


@pytest.mark.parametrize("name", BAD_DOCUMENTS)
def test_a_wrong_document_is_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    caplog.set_level(logging.CRITICAL)
    content, reason = BAD_DOCUMENTS[name]
    with pytest.raises(ValueError, match=reason):
        opened(tmp_path, content)


@pytest.mark.parametrize("text", ["{", "\0", "[" * 100_000, "a: &a [*a, *a"])
def test_a_file_that_is_no_document_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "api.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="--openapi"):
        openapi.OpenApiTools(openapi.OpenApiSpec("api", str(path)))


def test_one_wrong_operation_does_not_take_the_others_away(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wrong = {"/b": {"get": {"operationId": "b", "parameters": [{"$ref": "#/nowhere"}]}}}
    tools = opened(tmp_path, document("http://x", **get("a"), **wrong))
    assert [made.name for made in tools.tools] == ["a"]
    assert "GET /b is left out: $ref '#/nowhere' leads nowhere" in caplog.text
    tools.close()


def test_recursive_and_huge_schemas_are_cut_to_size() -> None:
    node = {"type": "object", "properties": {"left": {"$ref": "#/node"}, "right": {"$ref": "#/node"}}}
    wide = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(5 * MAX_NODES)}}
    for schema in (node, wide):
        text = json.dumps(Document({"node": node}).schema(schema))
        assert len(text) < 60 * 5 * MAX_NODES
        assert "$ref" not in text


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        ("path", "..", "cannot be part of a path"),
        ("path", "", "cannot be part of a path"),
        ("path", None, "needed"),
        ("header", "a\r\nX-Evil: 1", "printable ASCII"),
        ("header", "é", "printable ASCII"),
    ],
)
def test_values_that_would_mean_something_else_are_refused(place: str, value: Any, reason: str) -> None:
    parameter = Parameter("x", "x", place, "simple", explode=False, is_json=False)
    operation = Operation("GET", "http://host/base", "/a/{x}/b" if place == "path" else "/a", (parameter,), None)
    with pytest.raises(ToolError, match=reason):
        operation.request({"x": value})


@pytest.mark.parametrize(
    ("media_type", "value", "body"),
    [
        ("application/x-www-form-urlencoded", {"a": [1, 2], "b": "c d"}, b"a=1&a=2&b=c+d"),
        ("text/plain; charset=utf-8", "é", "é".encode()),
        ("application/merge-patch+json", {"a": None}, b'{"a":null}'),
    ],
)
def test_bodies(media_type: str, value: Any, body: bytes) -> None:
    operation = Operation("POST", "http://host", "/a", (), media_type)
    assert operation.request({"body": value}) == ("http://host/a", [("Content-Type", media_type)], body)


def test_specs_as_the_command_line_gives_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [named] = openapi.parse_openapi("pets=https://x.test/api.json", ("inner",))
    assert (named.name, named.document, named.allow_hosts) == ("pets", "https://x.test/api.json", ("inner",))
    assert openapi.parse_openapi("some/pet store.yaml")[0].name == "pet_store"
    monkeypatch.setenv("TOKEN", "secret")
    entry = {"document": "a.json", "baseUrl": "http://b", "headers": {"A": "${TOKEN}"}, "allowHosts": ["b"]}
    config = tmp_path / "servers.json"
    config.write_text(json.dumps({"openApiServers": {"pets": entry}}))
    [spec] = openapi.parse_openapi(str(config))
    assert (spec.name, spec.document, spec.base_url, spec.headers, spec.allow_hosts) == (
        "pets", "a.json", "http://b", {"A": "secret"}, ("b",),
    )  # fmt: skip
    assert "secret" not in repr(spec)
    config.write_text(json.dumps({"openApiServers": {"pets": {}}}))
    with pytest.raises(ValueError, match="expected document"):
        openapi.parse_openapi(str(config))
    with pytest.raises(ValueError, match="password in its URL"):
        openapi.OpenApiSpec("x", "https://user:pass@x.test/api.json")
