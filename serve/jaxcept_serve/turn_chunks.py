"""A turn begun in an API's own terms, and the chunks of a streamed one, closed together with it."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterator

from jaxcept_serve.sse import closing
from jaxcept_serve.turns import Caller, ChatTurn, Service, ServiceError, TurnEvent
from jaxcept_serve.wire import bad

_TOO_LONG = re.compile(r"prompt_ids has (?:at least )?(\d+) ids: expected at most (\d+)")
_CONSTRAINT_FIELDS = ("structured", "json_schema", "regex", "grammar", "choice")
_PROMPT_FIELDS = ("prompt", "messages")


async def begin_turn(
    service: Service, turn: ChatTurn, caller: Caller, prompt_field: str, constraint_field: str = "response_format"
) -> AsyncIterator[TurnEvent]:
    """Starts a turn; what is wrong with its prompt, or with what its output must match, is told of the field that the
    API has it in."""
    try:
        return await service.chat(turn, caller)
    except ServiceError as error:
        raise retold(error, prompt_field, constraint_field) from None


def retold(error: ServiceError, prompt_field: str, constraint_field: str) -> ServiceError:
    """The same error, of the field that an API has the prompt, or the constraint of the output, in.

    A prompt that is too long is told in the words by which coding agents know that it is time to summarize.
    """
    found = _TOO_LONG.search(error.message)
    if found is not None:
        text = f"{prompt_field}: prompt is too long: {found[1]} tokens > {found[2]} maximum"
        return ServiceError(400, text, param=prompt_field, code="context_length_exceeded")
    if error.param in _PROMPT_FIELDS and error.param != prompt_field:
        return ServiceError(error.status, f"{prompt_field}: {error.message}", param=prompt_field)
    if error.param in _CONSTRAINT_FIELDS:
        return bad(constraint_field, error.message, status=error.status)
    return error


class TurnChunks:
    """What a generator makes of a turn's events. Closing it closes the turn even where no chunk was asked for yet: a
    generator that was never started would not do so."""

    def __init__(self, chunks: AsyncGenerator[bytes, None], events: AsyncIterator[TurnEvent]) -> None:
        self._chunks = chunks
        self._events = events

    def __aiter__(self) -> TurnChunks:
        return self

    async def __anext__(self) -> bytes:
        return await anext(self._chunks)

    async def aclose(self) -> None:
        """Ends the turn, if it has not ended."""
        async with closing(self._events):
            await self._chunks.aclose()
