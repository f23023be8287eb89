"""Logs for people and for machines, and the request that a line belongs to."""

from __future__ import annotations

import json
import logging
import logging.config
import re
import time
import uuid
from contextvars import ContextVar
from typing import Any, Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

LogFormat = Literal["text", "json"]

request_id: ContextVar[str] = ContextVar("request_id", default="")
trace_headers: ContextVar[dict[str, str]] = ContextVar("trace_headers", default={})  # noqa: B039 - it is never changed

access = logging.getLogger("jaxcept_serve.access")

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,64}")
_QUIET_PATHS = frozenset({"/health", "/ready", "/ping", "/metrics", "/live"})
_OWN_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {
    "message",
    "asctime",
    "request_id",
    "taskName",
    "color_message",
}


class AddRequestId(logging.Filter):
    """Gives every record the id of the request in whose course it was written."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Keeps every record."""
        if not hasattr(record, "request_id"):
            record.request_id = request_id.get()
        return True


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in _OWN_FIELDS}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, request_id, what `extra` gave, error."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if getattr(record, "request_id", ""):
            line["request_id"] = record.__dict__["request_id"]
        line |= _extra(record)
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """`12:00:00 info    logger: message [request id] name=value`; line breaks of a message are shown, not written."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line, and behind it the traceback of an error."""
        at = time.strftime("%H:%M:%S", time.localtime(record.created))
        message = record.getMessage().replace("\r", "\\r").replace("\n", "\\n")
        parts = [f"{at} {record.levelname.lower():7} {record.name}: {message}"]
        if getattr(record, "request_id", ""):
            parts.append(f"[{record.__dict__['request_id']}]")
        parts += [f"{name}={value}" for name, value in _extra(record).items()]
        line = " ".join(parts)
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def log_config(log_format: LogFormat = "text", level: str = "info") -> dict[str, Any]:
    """A configuration for logging.config.dictConfig, and for uvicorn's `log_config`; everything goes to stderr.

    Raises ValueError for a format or a level that there is not.
    """
    formatters = {"text": TextFormatter, "json": JsonFormatter}
    levels = {name.lower() for name in logging.getLevelNamesMapping()} | {"trace"}
    if log_format not in formatters:
        raise ValueError(f"log_format={log_format!r}: expected text or json")
    if level.lower() not in levels:
        raise ValueError(f"log level {level!r}: expected one of {', '.join(sorted(levels))}")
    chosen = "DEBUG" if level.lower() == "trace" else level.upper()
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "filters": {"request_id": {"()": AddRequestId}},
        "formatters": {"chosen": {"()": formatters[log_format]}},
        "handlers": {
            "stderr": {
                "class": "logging.StreamHandler",
                "stream": "ext://sys.stderr",
                "formatter": "chosen",
                "filters": ["request_id"],
            }
        },
        "root": {"handlers": ["stderr"], "level": "WARNING"},
        "loggers": {
            name: {"level": chosen, "handlers": ["stderr"], "propagate": False}
            for name in ("jaxcept", "jaxcept_serve", "uvicorn")
        }
        | {"uvicorn.access": {"level": "CRITICAL", "handlers": [], "propagate": False}},  # RequestContext tells more
    }


def configure(log_format: LogFormat = "text", level: str = "info") -> None:
    """Sets logging up for this process."""
    logging.config.dictConfig(log_config(log_format, level))


class RequestContext:
    """The outermost middleware: gives a request its id, keeps its trace headers, and logs how it went.

    A request without a fit X-Request-Id gets one, for whoever reads the header behind this.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name: value for name, value in scope["headers"] if name in _TOLD}
        own_id = headers.get(b"x-request-id", b"")
        if not _REQUEST_ID.fullmatch(own_id):
            own_id = uuid.uuid4().hex.encode()
            rest = [pair for pair in scope["headers"] if pair[0] != b"x-request-id"]
            scope = {**scope, "headers": [*rest, (b"x-request-id", own_id)]}
        names = (b"traceparent", b"tracestate")
        tokens = (
            request_id.set(own_id.decode()),
            trace_headers.set({name.decode(): headers[name].decode("latin-1") for name in names if name in headers}),
        )
        status, began = 0, time.monotonic()

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        finally:
            _log(scope, status, time.monotonic() - began)
            request_id.reset(tokens[0])
            trace_headers.reset(tokens[1])


_TOLD = frozenset({b"x-request-id", b"traceparent", b"tracestate"})


def _log(scope: Scope, status: int, seconds: float) -> None:
    path = "".join(char if char.isprintable() else "?" for char in scope["path"][:200])
    level = logging.DEBUG if path in _QUIET_PATHS and status < 400 else logging.INFO
    client = scope.get("client")
    extra = {"status": status, "seconds": round(seconds, 4), "client": client[0] if client else ""}
    access.log(level, "%s %s", scope["method"], path, extra=extra)
