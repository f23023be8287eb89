"""The program of a tool process: loads the tools that it is told, says what they are, and answers one call at a time.

Messages are JSON behind four bytes of length, on the pipes that were its stdin and stdout; the tools' own prints go
to stderr.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from typing import Any, BinaryIO

import msgspec

from jaxcept.tools.arguments import ArgumentsError
from jaxcept.tools.calls import Outcome
from jaxcept.tools.definition import Tool, tool
from jaxcept.tools.load import load_tools
from jaxcept.tools.output import error_outcome, error_text, output_text

_PR_SET_PDEATHSIG = 1


class ToolAbout(msgspec.Struct, frozen=True):
    """A tool as its process describes it."""

    name: str
    description: str
    parameters: dict[str, Any]
    timeout_s: float | None
    is_pure: bool


class Hello(msgspec.Struct, frozen=True):
    """The first message of a process; `error` where its tools could not be loaded."""

    tools: list[ToolAbout] = []
    error: str = ""


class Ask(msgspec.Struct, frozen=True):
    """A call."""

    name: str
    arguments: dict[str, Any]
    max_chars: int


class Reply(msgspec.Struct, frozen=True):
    """What came of a call."""

    text: str
    outcome: Outcome


def main() -> None:
    """Serve until the other side closes the pipe."""
    with contextlib.suppress(OSError, AttributeError):  # Linux: never outlive the server, even inside a loop in C
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    asks, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    try:
        tools = {each.name: each for each in (_as_tool(given) for given in load_tools(sys.argv[1]))}
    except Exception as error:  # the module is somebody's own code: whatever it raises is told to who named it
        _write(replies, Hello(error=str(error) or type(error).__name__))
        return
    about = [ToolAbout(t.name, t.description, dict(t.parameters), t.timeout_s, t.is_pure) for t in tools.values()]
    _write(replies, Hello(about))
    while len(head := asks.read(4)) == 4:
        ask = msgspec.json.decode(asks.read(int.from_bytes(head, "big")), type=Ask)
        _write(replies, answer(tools[ask.name], ask))


def answer(made: Tool, ask: Ask) -> Reply:
    """Run a call here and now."""
    process_id = os.getpid()
    try:
        value = made(**made.bind(ask.arguments))
        if asyncio.iscoroutine(value):
            value = asyncio.run(value)
        reply = Reply(output_text(value, ask.max_chars), Outcome.ANSWERED)
    except ArgumentsError as error:
        reply = Reply(f"error: {error}", Outcome.ERROR)
    except BaseException as error:  # SystemExit and KeyboardInterrupt of a tool are the tool's failure
        reply = Reply(error_text(error), error_outcome(error))
    if os.getpid() != process_id:
        os._exit(0)  # a child that the tool forked: the answer is its parent's to give
    return reply


def _as_tool(given: Any) -> Tool:
    return given if isinstance(given, Tool) else tool(given)


def _write(stream: BinaryIO, message: Hello | Reply) -> None:
    body = msgspec.json.encode(message)
    stream.write(len(body).to_bytes(4, "big") + body)
    stream.flush()


if __name__ == "__main__":
    main()
