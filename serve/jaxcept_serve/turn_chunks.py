"""The chunks of a streamed turn, closed together with the turn."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator

from jaxcept_serve.sse import closing
from jaxcept_serve.turns import TurnEvent


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
