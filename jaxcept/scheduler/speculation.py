"""Drafts: tokens that a sequence may generate next, guessed from what it holds and verified all in one step.

A model that calls tools repeats itself: the form of its calls, names out of their answers, numbers. So what followed
the last tokens where they stood before is a good guess (prompt lookup decoding, Saxena 2023), and so is the text that a
grammar leaves no choice about. A step computes the guesses behind the token drawn last and draws a token at each of
their places; a draw counts if the guesses before it were what was drawn. Draws depend on the seed and the place alone,
so the tokens are those of a run without drafts, whether greedy or random.

Drafts are computed where they pay by the cost model, while nobody prefills or waits. They stay within the block that
the sequence writes to anyway, so they never take memory.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

from jaxcept.scheduler.costs import Costs, StepLoad
from jaxcept.scheduler.lookup import Lookup
from jaxcept.scheduler.plan import Chunk, StepPlan
from jaxcept.scheduler.sequence import SeqState, Sequence

logger = logging.getLogger(__name__)

RIGHT = 0.5  # share of drafts that is taken to be right where it is asked whether they pay


@dataclass(frozen=True, slots=True)
class SpeculationConfig:
    """`max_tokens`: most drafts of one sequence in one step. What is looked up are the last `longest` tokens, then
    fewer, down to `shortest`."""

    max_tokens: int = 8
    longest: int = 4
    shortest: int = 2

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r}: expected an integer of 1 or more")
        if self.shortest > self.longest:
            raise ValueError(f"shortest={self.shortest}: expected at most longest={self.longest}")


class Drafts(NamedTuple):
    """Guesses, and for each what may be drawn behind it (Watcher.mask)."""

    token_ids: tuple[int, ...]
    masks: tuple[bytes | None, ...]


NO_DRAFTS = Drafts((), ())


class Speculation:
    """Decides in each step who computes drafts, and how many."""

    def __init__(self, config: SpeculationConfig, costs: Costs) -> None:
        self.config = config
        self._costs = costs

    def room(self, num_decoding: int, context_tokens: int, limit: int) -> int:
        """Drafts, at most `limit`, that pay beside so many decodes which read so many tokens.

        One that is right saves its sequence a step, of which the others have their use as well.
        """
        if not num_decoding:
            return 0
        alone_s = self._costs.step_s(StepLoad(num_decoding, context_tokens, context_tokens, num_decoding))
        count = min(limit, num_decoding * self.config.max_tokens)
        while count > 0:
            pairs = context_tokens + count * context_tokens // num_decoding
            load = StepLoad(num_decoding + count, context_tokens + count, pairs, num_decoding)
            if self._costs.step_s(load) - alone_s <= RIGHT * count * alone_s / num_decoding:
                break
            count //= 2
        return max(0, count)

    def drafts(self, seq: Sequence, limit: int, block_size: int) -> Drafts:
        """At most `limit` guesses for a sequence all of whose tokens are known."""
        params = seq.request.params
        left_in_block = -(seq.num_computed + 1) % block_size
        until_stop = seq.stop_len - len(seq.token_ids) - 1
        limit = min(limit, left_in_block, until_stop)
        if limit <= 0 or params.uses_history or params.min_tokens or params.logprobs is not None:
            return NO_DRAFTS
        guessed, watcher = self.guess(seq, limit), seq.watcher
        if watcher is None:
            return Drafts(guessed, (None,) * len(guessed))
        try:
            masks = tuple(watcher.masks_behind(guessed)) if guessed else ()
            if not masks and seq.mask is not None:  # the grammar's own guess
                guessed = tuple(watcher.forced())[:limit]
                masks = tuple(watcher.masks_behind(guessed)) if guessed else ()
        except Exception as error:  # where a draw leads there, the watcher says so again and ends its sequence
            logger.debug("sequence %d gets no drafts: %s", seq.seq_id, error)
            return NO_DRAFTS
        return Drafts(guessed[: len(masks)], masks)

    def guess(self, seq: Sequence, limit: int) -> tuple[int, ...]:
        """At most `limit` tokens that may come next."""
        if seq.lookup is None:
            seq.lookup = Lookup()
        return seq.lookup.guess(seq.token_ids, self.config.longest, self.config.shortest, limit)


class Trial(NamedTuple):
    """A sequence whose drafts a step computed, and what it drew: one token more than drafts."""

    seq: Sequence
    chunk: Chunk
    drawn: tuple[int, ...]
    masks: Mapping[int, bytes]  # under which it drew, by the place of the draw

    @property
    def drafts(self) -> tuple[int, ...]:
        """The guesses."""
        return self.chunk.token_ids[1:]

    @property
    def num_taken(self) -> int:
        """Draws that are among the sequence's tokens."""
        return len(self.seq.token_ids) - self.chunk.start - 1

    def credit(self) -> None:
        """The next draw is about to be taken: where it is what was guessed, its KV is there already."""
        place = self.num_taken
        if place < len(self.drafts) and self.drawn[place] == self.drafts[place]:
            self.seq.num_computed += 1

    @property
    def goes_on(self) -> bool:
        """Whether the draw behind those taken counts: the last one was guessed, the sequence still runs, and what may
        come is what could be drawn."""
        seq, place = self.seq, self.num_taken
        return (
            0 < place <= len(self.drafts)
            and seq.token_ids[-1] == self.drafts[place - 1]
            and seq.state is SeqState.RUNNING
            and seq.mask == self.masks.get(place)
        )

    def end(self) -> int:
        """The sequence decodes on from its last token; returns how many drafts are among its tokens."""
        seq = self.seq
        if seq.state is SeqState.RUNNING:
            seq.num_computed = min(seq.num_computed, len(seq.token_ids) - 1)
        return sum([draft == token for draft, token in zip(self.drafts, self.drawn[: self.num_taken], strict=False)])


def split_draws(plan: StepPlan, seqs: Seq[Sequence], token_ids: tuple[int, ...]) -> tuple[tuple[int, ...], list[Trial]]:
    """The first draw of each of the drawing sequences, and the trials among them."""
    firsts = list(token_ids[: len(plan.decodes.rows)])
    trials = []
    masks: dict[int, dict[int, bytes]] = {}
    for row, bits, draw in plan.masks:
        masks.setdefault(row, {})[draw] = bits
    place = len(firsts)
    for chunk in plan.chunks:
        if chunk.samples:
            if chunk.num_drafts:
                drawn = token_ids[place : place + chunk.num_draws]
                trials.append(Trial(seqs[len(firsts)], chunk, drawn, masks.get(chunk.row, {})))
            firsts.append(token_ids[place])
            place += chunk.num_draws
    return tuple(firsts), trials
