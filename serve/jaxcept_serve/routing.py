"""Which of several engines serves a turn: the one that has its context, unless another has so much less to do.

Pure: no clock, no network. A conversation is known by digests of its beginnings (jaxcept.conversations.digests_of). An
engine that computed a beginning has it in its cache, and the one that served the last turn holds the context.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

MAX_KNOWN = 200_000


class Reason(StrEnum):
    """Why an engine was chosen."""

    HELD = "held"  # it served the conversation's last turn
    PREFIX = "prefix"  # it computed the longest beginning that any engine knows
    LOAD = "load"  # nothing is known, and it has the least to do
    SPILLED = "spilled"  # another one has the context, and too much to do
    RECOMPUTED = "recomputed"  # the one that had the context died


@dataclass(frozen=True, slots=True)
class Choice:
    """The engine for a turn. `num_known`: messages of the conversation that were known somewhere."""

    engine: str
    reason: Reason
    num_known: int = 0
    instead_of: str | None = None  # who has, or had, the context, where that is another


@dataclass(slots=True)
class _Known:
    """Engines that computed a beginning, and the one that served a turn that ends with it."""

    engines: list[str] = field(default_factory=list)
    holder: str | None = None
    died: str | None = None  # who was the holder, if nobody is any more


class Router:
    """Where conversations are, and how much every engine has to do.

    A turn leaves the engine that holds its context where that one has `held_slack` more turns under way than the least
    busy, and an engine that merely knows its beginning where it has `prefix_slack` more. ValueError without engines.
    """

    def __init__(
        self, engines: Sequence[str], *, held_slack: int = 16, prefix_slack: int = 2, max_known: int = MAX_KNOWN
    ) -> None:
        if not engines or len(set(engines)) != len(engines):
            raise ValueError(f"engines={list(engines)}: expected one or more different names")
        self._order = {engine: i for i, engine in enumerate(engines)}
        self._load = dict.fromkeys(engines, 0)
        self._is_down: dict[str, bool] = dict.fromkeys(engines, False)
        self._held_slack, self._prefix_slack, self._max_known = held_slack, prefix_slack, max_known
        self._known: OrderedDict[Hashable, _Known] = OrderedDict()

    @property
    def loads(self) -> dict[str, int]:
        """Turns under way, by engine."""
        return dict(self._load)

    @property
    def up(self) -> tuple[str, ...]:
        """Engines that are not down."""
        return tuple(engine for engine in self._order if not self._is_down[engine])

    def holds(self, digests: Sequence[Hashable]) -> bool:
        """Whether an engine holds the context of a beginning of this conversation."""
        known = (self._known.get(digest) for digest in digests[1:])
        return any(each is not None and each.holder is not None for each in known)

    def begin(self, digests: Sequence[Hashable], name: Hashable | None = None) -> Choice | None:
        """The engine for a turn that begins; None where all are down. `end` must follow.

        `digests[i]` is that of the first i messages; `name` is a name that the client gave the conversation.
        """
        if not self.up:
            return None
        choice = self._choose(digests, name)
        self._load[choice.engine] += 1
        for digest in digests[1:]:
            self._note(digest, choice.engine)
        return choice

    def end(self, engine: str, held: Hashable | None = None, name: Hashable | None = None) -> None:
        """A turn is over. `held` is the digest of the conversation with the answer, where the engine holds it."""
        self._load[engine] -= 1
        assert self._load[engine] >= 0, f"{engine}: more turns ended than began"
        if self._is_down[engine]:
            return
        for key in (held, name):
            if key is not None:
                self._note(key, engine, holds=True)

    def down(self, engine: str) -> int:
        """An engine died, and its contexts with it: how many turns it had ended, of which it knew the context."""
        self._is_down[engine] = True
        count = 0
        for digest in list(self._known):
            known = self._known[digest]
            if engine not in known.engines:
                continue
            known.engines.remove(engine)
            if known.holder == engine:
                known.holder, known.died = None, engine
                count += 1
            if not known.engines and known.died is None:
                del self._known[digest]
        return count

    def up_again(self, engine: str) -> None:
        """An engine is there again, and knows nothing."""
        self._is_down[engine] = False

    def _choose(self, digests: Sequence[Hashable], name: Hashable | None) -> Choice:
        least = min(self.up, key=lambda engine: (self._load[engine], self._order[engine]))
        count, known = self._find(digests, name)
        # Nobody, where another turn was told who died and has not ended yet.
        if known is None or not (known.engines or known.died):
            return Choice(least, Reason.LOAD, count)
        if known.died is not None:
            died, known.died = known.died, None
            others = [engine for engine in known.engines if not self._is_down[engine]]
            engine = self._least_of(others, least, self._prefix_slack) if others else least
            return Choice(engine, Reason.RECOMPUTED, count, died)
        if known.holder is not None:
            holder = known.holder
            if self._load[holder] - self._load[least] <= self._held_slack:
                return Choice(holder, Reason.HELD, count)
            return Choice(least, Reason.SPILLED, count, holder)
        engine = self._least_of(known.engines, least, self._prefix_slack)
        if engine in known.engines:
            return Choice(engine, Reason.PREFIX, count)
        return Choice(engine, Reason.SPILLED, count, known.engines[-1])

    def _least_of(self, engines: Sequence[str], least: str, slack: int) -> str:
        """The least busy of the engines, or the least busy of all where that one has much less to do."""
        best = min(engines, key=lambda engine: (self._load[engine], self._order[engine]))
        return best if self._load[best] - self._load[least] <= slack else least

    def _find(self, digests: Sequence[Hashable], name: Hashable | None) -> tuple[int, _Known | None]:
        """How many messages are known, and what is: of the last turn that ended here, of the name that the client gave,
        of the longest beginning."""
        count, longest = 0, None
        for i in range(len(digests) - 1, 0, -1):
            known = self._known.get(digests[i])
            if known is None:
                continue
            if longest is None:
                count, longest = i, known
            if known.holder is not None or known.died is not None:
                return count, known
        named = self._known.get(name) if name is not None else None
        return count, named if named is not None else longest

    def _note(self, digest: Hashable, engine: str, holds: bool = False) -> None:
        known = self._known.setdefault(digest, _Known())
        if engine not in known.engines:
            known.engines.append(engine)
        if holds:
            known.holder = engine
        known.died = None
        self._known.move_to_end(digest)
        while len(self._known) > self._max_known:
            self._known.popitem(last=False)
