"""Bodies, fields and streams, without a route."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import ClientDisconnect

from jaxcept_serve.sse import KEEPALIVE, EventStream, event, while_connected
from jaxcept_serve.turns import ServiceError
from jaxcept_serve.wire import (
    Field,
    check_content_type,
    decode_body,
    depth_exceeds,
    error_body,
    error_response,
    from_value_error,
    read_fields,
    refuse_fields,
    shown,
)


def refusal(run: Any) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        run()
    return caught.value


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"a": NaN}', "not valid JSON"),
        (b'{"a": Infinity}', "not valid JSON"),
        (b'{"a": 1e400}', "not valid JSON"),
        (b'{"a": "\\ud800"}', "not valid JSON"),
        (b'{"a": "\x00"}', "not valid JSON"),
        (b'{"a": 1} {"b": 2}', "not valid JSON"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"\xff\xfe{\x00}\x00", "not valid JSON"),
        (b"[1]", "expected a JSON object, got array"),
        (b"null", "expected a JSON object, got null"),
        (b'"text"', "expected a JSON object, got string"),
        (b"[" * 100_000, "nested deeper than 10"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested deeper than 10"),
        (b'{"a":' * 11 + b"1" + b"}" * 11, "nested deeper than 10"),
        (b'{"a": %s}' % (b"1" * 5000), "not valid JSON"),
    ],
)
def test_bodies_that_are_none(data: bytes, part: str):
    error = refusal(lambda: decode_body(data, 10))
    assert error.status == 400 and error.param == "body" and part in error.message


def test_bodies_that_are():
    assert decode_body(b'{"a": 1, "a": 2, "b": "\\u0000"}', 10) == {"a": 2, "b": "\0"}
    assert decode_body(b'{"a":' * 10 + b"1" + b"}" * 10, 10)
    assert decode_body(json.dumps({"a": [[i] for i in range(1000)]}).encode(), 3)


@given(
    st.recursive(st.none(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3))
)
def test_depth(value: Any):
    def depth(each: Any) -> int:
        items = each.values() if isinstance(each, dict) else each if isinstance(each, list) else None
        return 0 if items is None else 1 + max(map(depth, items), default=0)

    for limit in range(5):
        assert depth_exceeds(value, limit) == (depth(value) > limit)


@pytest.mark.parametrize("value", [
    "", "text/plain", "application/x-www-form-urlencoded", "application/json; charset=utf-16",
    "application/json; charset=latin-1", "multipart/form-data; boundary=x",
])  # fmt: skip
def test_content_types_that_are_refused(value: str):
    assert refusal(lambda: check_content_type(value)).status == 415


@pytest.mark.parametrize("value", [
    "application/json", "Application/JSON; charset=UTF-8", 'application/json;charset="utf-8"',
    "application/vnd.api+json", "application/json; charset=utf8; x=y",
])  # fmt: skip
def test_content_types_that_are_taken(value: str):
    check_content_type(value)


TABLE = (
    Field("count", "integer", default=1, minimum=1, maximum=4),
    Field("heat", "number", minimum=0, maximum=2),
    Field("name", "string", max_length=3, choices=("a", "bb")),
    Field("names", "array", max_length=2, items=Field("", "string", nullable=False)),
    Field("map", "object", max_length=1),
    Field("on", "boolean", default=False),
    Field("must", "string", required=True),
)


def test_fields_that_are_right():
    values = read_fields({"must": "x", "count": 3.0, "heat": 1, "names": ["p"], "on": None, "other": 1}, TABLE)
    assert values == {"must": "x", "count": 3, "heat": 1, "name": None, "names": ["p"], "map": None, "on": False}
    assert type(values["count"]) is int


@pytest.mark.parametrize(
    ("given_fields", "param"),
    [
        ({"count": 0}, "count"), ({"count": 5}, "count"), ({"count": 1.5}, "count"), ({"count": True}, "count"),
        ({"count": "1"}, "count"), ({"count": [1]}, "count"), ({"count": 2**63}, "count"), ({"count": 1e300}, "count"),
        ({"heat": -0.1}, "heat"), ({"heat": 1e308}, "heat"), ({"heat": False}, "heat"), ({"heat": "hot"}, "heat"),
        ({"name": "c"}, "name"), ({"name": 1}, "name"), ({"name": "aaaa"}, "name"),
        ({"names": "p"}, "names"), ({"names": ["p", None]}, "names[1]"), ({"names": ["p", 2]}, "names[1]"),
        ({"names": ["p"] * 3}, "names"), ({"map": []}, "map"), ({"map": {"a": 1, "b": 2}}, "map"),
        ({"on": 1}, "on"), ({"on": "true"}, "on"), ({"must": None}, "must"), ({"must": 1}, "must"),
    ],
)  # fmt: skip
def test_fields_name_themselves(given_fields: dict[str, Any], param: str):
    error = refusal(lambda: read_fields({"must": "x"} | given_fields, TABLE))
    assert (error.status, error.param) == (400, param) and error.message.startswith(param)


def test_a_missing_field_and_one_that_cannot_be_honoured():
    assert refusal(lambda: read_fields({}, TABLE, "at")).param == "at.must"
    refuse_fields({"audio": None, "images": []}, {"audio": "no sound", "images": "no pictures"})
    assert refusal(lambda: refuse_fields({"audio": {}, "images": [1]}, {"images": "no pictures"})).param == "images"


def test_the_document_says_what_the_parser_takes():
    by_name = {field.name: field.json_schema for field in TABLE}
    assert by_name["count"] == {"type": ["integer", "null"], "minimum": 1, "maximum": 4, "default": 1}
    assert by_name["name"] == {"type": ["string", "null"], "maxLength": 3, "enum": ["a", "bb", None]}
    assert by_name["names"] == {"type": ["array", "null"], "maxItems": 2, "items": {"type": "string"}}
    assert by_name["must"] == {"type": "string"}


def test_messages_show_values_harmlessly():
    assert shown("\x1b[31m\n\u202e") == r"'\x1b[31m\n\u202e'"
    assert len(shown("x" * 1000)) < 100 and shown([1, 2]) == "an array of 2"


def test_errors_have_the_form_of_their_api():
    error = ServiceError(429, "slow down", param="n", code="c", retry_after_s=0.2)
    assert error_body(error, "/v1/chat/completions") == {
        "error": {"message": "slow down", "type": "rate_limit_error", "param": "n", "code": "c"}
    }
    assert error_body(error, "/v1/messages", "id") == {
        "type": "error", "error": {"type": "rate_limit_error", "message": "slow down"}, "request_id": "id",
    }  # fmt: skip
    assert error_response(error, "/").headers["retry-after"] == "1"
    assert error_response(ServiceError(401, "who"), "/").headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("text", "param"),
    [
        ("top_p=2: expected 0 to 1", "top_p"),
        ("tools[0].name='x': expected y", "tools[0].name"),
        ("nothing to see", None),
    ],
)
def test_our_own_checks_name_their_field(text: str, param: str | None):
    assert from_value_error(ValueError(text)).param == param


class Peer:
    """The other side of one answer."""

    def __init__(self, *, takes_s: float = 0.0, goes_after: int | None = None) -> None:
        self.body = b""
        self.status = 0
        self.is_over = False
        self._takes_s, self._goes_after, self._count = takes_s, goes_after, 0
        self._gone = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            return
        await asyncio.sleep(self._takes_s)
        self.body += message["body"]
        self.is_over |= not message["more_body"]
        self._count += 1
        if self._count == self._goes_after:
            self._gone.set()


class Source:
    """Events, one every `every_s`; knows whether it was closed."""

    def __init__(self, count: int, *, every_s: float = 0.0, error: Exception | None = None) -> None:
        self.is_closed = False
        self.num_made = 0
        self._count, self._every_s, self._error = count, every_s, error

    async def chunks(self) -> AsyncIterator[bytes]:
        try:
            for i in range(self._count):
                await asyncio.sleep(self._every_s)
                self.num_made += 1
                yield event(i)
            if self._error is not None:
                raise self._error
        finally:
            self.is_closed = True


async def play(source: Source, peer: Peer, keepalive_s: float = 5.0, send_timeout_s: float = 5.0) -> None:
    stream = EventStream(
        source.chunks(),
        on_error=lambda error: event(error.message, "error"),
        keepalive_s=keepalive_s,
        send_timeout_s=send_timeout_s,
    )
    await stream({"type": "http"}, peer.receive, peer.send)


def test_a_stream_is_sent_whole():
    source, peer = Source(2), Peer()
    asyncio.run(play(source, peer))
    assert (peer.status, peer.body, peer.is_over) == (200, b"data: 0\n\ndata: 1\n\n", True) and source.is_closed


def test_a_client_that_goes_away_closes_the_source():
    async def check() -> None:
        source, peer = Source(10_000, every_s=0.001), Peer(goes_after=3)
        with pytest.raises(ClientDisconnect):
            await play(source, peer)
        assert source.is_closed and source.num_made < 100 and not peer.is_over

    asyncio.run(check())


def test_a_client_that_takes_nothing_is_cut_off():
    async def check() -> None:
        source, peer = Source(5), Peer(takes_s=10)
        with pytest.raises(ClientDisconnect):
            await play(source, peer, send_timeout_s=0.05)
        assert source.is_closed and source.num_made == 1

    asyncio.run(check())


def test_a_slow_reader_holds_up_nobody():
    async def check() -> None:
        slow = asyncio.ensure_future(play(Source(50), Peer(takes_s=1)))
        peer = Peer()
        await asyncio.wait_for(play(Source(200), peer), 1)
        assert peer.is_over and not slow.done()
        slow.cancel()
        await asyncio.gather(slow, return_exceptions=True)

    asyncio.run(check())


def test_silence_is_filled_with_comments():
    source, peer = Source(2, every_s=0.2), Peer()
    asyncio.run(play(source, peer, keepalive_s=0.05))
    assert peer.body.count(KEEPALIVE) >= 2 and peer.body.replace(KEEPALIVE, b"") == b"data: 0\n\ndata: 1\n\n"


@pytest.mark.parametrize(
    ("error", "told"), [(ServiceError(503, "dead"), b"dead"), (RuntimeError("secret"), b"the server failed")]
)
def test_an_error_in_the_midst_is_told(error: Exception, told: bytes):
    source, peer = Source(1, error=error), Peer()
    asyncio.run(play(source, peer))
    assert peer.is_over and b"event: error" in peer.body and told in peer.body and b"secret" not in peer.body


def test_an_answer_in_one_piece_is_given_up_where_nobody_waits_for_it():
    async def check() -> None:
        is_cancelled = False

        async def work() -> int:
            nonlocal is_cancelled
            try:
                await asyncio.sleep(10)
            except asyncio.CancelledError:
                is_cancelled = True
                raise
            return 1

        async def gone() -> dict[str, Any]:
            await asyncio.sleep(0.01)
            return {"type": "http.disconnect"}

        with pytest.raises(ClientDisconnect):
            await while_connected(gone, work())
        assert is_cancelled

    asyncio.run(check())
