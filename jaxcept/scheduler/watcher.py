"""What reads a sequence's tokens as they come and may stop or intercept it: stop strings, tool calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol


class Verdict(NamedTuple):
    """What a watcher wants done with its sequence after the last token."""

    kind: Literal["stop", "intercept", "reject"]
    reason: str = ""  # the stop string that matched, or the tools that are called
    payload: object | None = None  # handed on in the Intercepted event: the parsed calls, say
    hold_s: float | None = None  # an interception that ends its sequence if nothing comes so long; None: as requested


REJECT = Verdict("reject")  # the token was drawn before the mask that forbids it was known: it is drawn again


class WatcherError(Exception):
    """The sequence cannot go on as its request asks for; says why. Its text is the reason that it ends with."""


class Watcher(Protocol):
    """Reads one sequence. The scheduler calls it; a watcher that raises ends its own sequence alone."""

    def push(self, token_id: int) -> Verdict | None:
        """The next generated token: every one, in order, once, stop tokens included.

        A token that is rejected was not generated: the watcher is as it was before it, and `mask` must forbid it.
        """
        ...

    def mask(self) -> bytes | None:
        """Which tokens may come next, where not all of them may: bit i % 32 of the little-endian uint32 word i // 32
        for token i; ids past its end may not. The same until the next call of another method."""
        ...

    def masks_behind(self, token_ids: Sequence[int]) -> Sequence[bytes | None]:
        """What `mask` would say behind each of these tokens, if they came next; fewer where one of them may not come,
        or where it cannot be told what would follow. Nothing changes."""
        ...

    def forced(self) -> Sequence[int]:
        """Tokens that come next as nothing else may, but for other tokens of the same text; none where it is open."""
        ...

    def end_of_turn(self) -> Verdict | None:
        """The token pushed last is a stop token: an "intercept" turns the stop into an interception."""
        ...

    def returned(self, token_ids: Sequence[int]) -> None:
        """These tokens, which the model did not generate, were appended."""
        ...

    def finish(self) -> None:
        """The sequence has ended, for whatever reason; called once."""
        ...
