"""A way between device and host memory that does what a test says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import count

import jax
import numpy as np
from jax.sharding import Sharding

from jaxcept.runner.host_pool import Link
from jaxcept.scheduler.plan import MoveKind


class SlowLink(Link):
    """A link on which copies are over when the test says so, or fail, or arrive changed."""

    def __init__(self) -> None:
        self.is_open = True
        self.delay = 0  # polls that a copy takes
        self.refused: list[MoveKind] = []  # sends that fail at once
        self.lost: set[int] = set()  # numbers of copies, in the order of sending, that fail on the way
        self.corrupted: set[int] = set()
        self._numbers = count()
        self._polls: Counter[int] = Counter()
        self._sent: dict[int, tuple[jax.Array, int]] = {}  # keeps the arrays alive, so that ids stay unique

    def send(self, blocks: Sequence[jax.Array], to: Sharding) -> list[jax.Array]:
        kind = MoveKind.SWAP_OUT if to.memory_kind == "pinned_host" else MoveKind.SWAP_IN
        if kind in self.refused:
            raise RuntimeError("RESOURCE_EXHAUSTED: no memory")
        sent = []
        for block in super().send(blocks, to):
            number, content = next(self._numbers), block
            if number in self.corrupted:
                changed = np.array(block)
                changed[-1, -1, -1, -1, -1] += 1
                content = jax.device_put(changed, to)
            self._sent[id(content)] = (content, number)
            sent.append(content)
        return sent

    def is_over(self, block: jax.Array) -> bool:
        if not self.is_open:
            return False
        number = self._sent[id(block)][1]
        self._polls[number] += 1
        if self._polls[number] <= self.delay:
            return False
        if number in self.lost:
            raise RuntimeError("the copy was lost")
        return super().is_over(block)
