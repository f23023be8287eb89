"""Who may ask, and the outer wall: middleware that every request passes before any route sees it."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import uuid

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxcept_serve.limits import Gate, ServerOptions
from jaxcept_serve.sse import INTERNAL_ERROR
from jaxcept_serve.turns import Caller, ServiceError
from jaxcept_serve.wire import error_response, shown

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/ping"})  # at / is the page, which asks for the key by itself
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_IP_ADDRESS = re.compile(r"\d{1,3}(\.\d{1,3}){3}|\[[0-9A-Fa-f:.]+\]")
_HOST = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]{1,255})(:\d{1,5})?")


class Keyring:
    """The API keys. Which one was shown is found out in a time that tells nothing of the keys."""

    def __init__(self, options: ServerOptions) -> None:
        secret = options.salt_secret or secrets.token_bytes(32)
        self._pepper = secrets.token_bytes(32)
        self._callers = [
            (self._digest(each.key.encode()), Caller(each.name, hmac.digest(secret, each.key.encode(), "sha256").hex()))
            for each in options.api_keys
        ]

    def _digest(self, key: bytes) -> bytes:
        return hmac.digest(self._pepper, key, hashlib.sha256)

    def find(self, headers: list[tuple[bytes, bytes]]) -> Caller:
        """Who asks, by `Authorization: Bearer KEY` or `x-api-key: KEY`. Raises ServiceError 401."""
        if not self._callers:
            return Caller()
        shown_key = self._shown_key(headers)
        digest = self._digest(shown_key)
        found: Caller | None = None
        for expected, caller in self._callers:  # all of them, whichever fits
            if hmac.compare_digest(expected, digest):
                found = caller
        if found is None or not shown_key:
            raise ServiceError(401, "the API key is missing or wrong; send it as `Authorization: Bearer KEY`",
                               code="invalid_api_key")  # fmt: skip
        return found

    @staticmethod
    def _shown_key(headers: list[tuple[bytes, bytes]]) -> bytes:
        given = [value for name, value in headers if name == b"authorization"]
        if given:
            scheme, _, key = given[0].partition(b" ")
            return key.strip() if len(given) == 1 and scheme.lower() == b"bearer" else b""
        given = [value for name, value in headers if name == b"x-api-key"]
        return given[0].strip() if len(given) == 1 else b""


class Wall:
    """Checks what comes before a route: form, host, key, limits. Makes of every error an answer that leaks nothing."""

    def __init__(self, app: ASGIApp, options: ServerOptions, gate: Gate) -> None:
        self._app = app
        self._options = options
        self._gate = gate
        self._keyring = Keyring(options)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        has_started = False

        async def watched_send(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        try:
            await self._pass(scope, receive, watched_send, request_id)
        except ClientDisconnect:
            return
        except ServiceError as error:
            if has_started:
                raise
            await error_response(error, scope["path"], request_id)(scope, receive, watched_send)
        except Exception:
            logger.exception("request %s: %s %s failed", request_id, scope["method"], shown(scope["path"]))
            if has_started:
                raise
            internal = ServiceError(500, INTERNAL_ERROR, code="internal_error")
            await error_response(internal, scope["path"], request_id)(scope, receive, watched_send)

    async def _pass(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        check_form(scope, self._options)
        path = scope["path"]
        caller = Caller()
        if path not in OPEN_PATHS:
            caller = self._keyring.find(scope["headers"])
        scope.setdefault("state", {})
        scope["state"] |= {"caller": caller, "request_id": request_id}
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        self._gate.enter(caller.key_name)
        try:
            await self._app(scope, receive, send)
        finally:
            self._gate.leave(caller.key_name)


def check_form(scope: Scope, options: ServerOptions) -> None:
    """Raises ServiceError for what no well-meant client sends: headers without measure, a doubtful host or length."""
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    num_bytes = sum(len(name) + len(value) for name, value in headers) + len(scope.get("raw_path") or b"")
    num_bytes += len(scope["query_string"])
    if len(headers) > options.max_headers or num_bytes > options.max_header_bytes:
        raise ServiceError(431, f"the headers: expected at most {options.max_headers} of {options.max_header_bytes} "
                           "bytes altogether")  # fmt: skip
    if scope["http_version"] in ("0.9", "0"):
        raise ServiceError(400, "HTTP/0.9 is not spoken here")
    names = [name for name, _ in headers]
    if names.count(b"content-length") + names.count(b"transfer-encoding") > 1:
        raise ServiceError(400, "Content-Length: expected one of it, or Transfer-Encoding", param="Content-Length")
    if "\x00" in scope["path"] or any(part in (".", "..") for part in scope["path"].split("/")):
        raise ServiceError(400, "the path holds NUL or dots")
    _check_host(scope, options)


def _check_host(scope: Scope, options: ServerOptions) -> None:
    hosts = [value for name, value in scope["headers"] if name == b"host"]
    if len(hosts) != 1:
        if not hosts and scope["http_version"] == "1.0":
            return
        raise ServiceError(400, f"Host: expected it once, got {len(hosts)}", param="Host")
    found = _HOST.fullmatch(hosts[0].decode("latin-1"))
    if found is None:
        raise ServiceError(400, f"Host: expected a name and a port, got {shown(hosts[0].decode('latin-1'))}",
                           param="Host")  # fmt: skip
    name = found["name"].lower()
    if options.allowed_hosts and name not in options.allowed_hosts and not _IP_ADDRESS.fullmatch(name):
        raise ServiceError(403, f"Host: {shown(name)} is not a name of this server; --allowed-hosts adds some",
                           param="Host")  # fmt: skip


def _request_id(scope: Scope) -> str:
    """The id that the client gave (X-Request-Id), where it is fit to be logged, or one of our own."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value.decode("latin-1")):
            return str(value.decode("latin-1"))
    return uuid.uuid4().hex
