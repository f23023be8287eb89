"""The block pool: every block is free, cached or held, and the three add up."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """Reference counts over fixed blocks, and the cache of computed blocks that nobody holds.

    A block is *held* while its reference count is above zero, *cached* while nobody holds it but its content is
    registered under a digest, and *free* otherwise. Cached blocks are given out again, least recently used first,
    only once no free one is left.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 0:
            raise ValueError(f"num_blocks={num_blocks}: expected 0 or more")
        self.num_blocks = num_blocks
        self.refs = [0] * num_blocks
        self.num_evictions = 0
        self.sharing_version = 0  # grows whenever a held block gains or loses one of several holders
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: the lowest ids go first
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._digests: list[bytes | None] = [None] * num_blocks
        self._by_digest: dict[bytes, int] = {}

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give out: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds and whose content can still be found."""
        return len(self._cached)

    @property
    def num_held(self) -> int:
        """Blocks that some block table names."""
        return self.num_blocks - self.num_available

    def allocate(self) -> int:
        """A block of the caller's own, with whatever content it had. One must be available."""
        if self._free:
            block = self._free.pop()
        else:
            assert self._cached, "allocate() with no block available: the caller must make room first"
            block, _ = self._cached.popitem(last=False)
            self._unregister(block)
            self.num_evictions += 1
        self.refs[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more holder of a held or cached block."""
        if self.refs[block] == 0:
            del self._cached[block]
        else:
            self.sharing_version += 1
        self.refs[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One holder less for each. The last ones are released first, so that a context's head outlives its tail."""
        for block in reversed(blocks):
            self.refs[block] -= 1
            assert self.refs[block] >= 0, f"block {block} is released more often than it is held"
            if self.refs[block] > 0:
                self.sharing_version += 1
            elif self._digests[block] is None:
                self._free.append(block)
            else:
                self._cached[block] = None

    def register(self, block: int, digest: bytes) -> None:
        """Makes a held block's content findable. Where the same content is registered already, that one stays."""
        if digest not in self._by_digest and self._digests[block] is None:
            self._digests[block] = digest
            self._by_digest[digest] = block

    def digest(self, block: int) -> bytes | None:
        """Under which the block's content can be found, so that nobody may write into it; None where it cannot."""
        return self._digests[block]

    def forget(self, block: int) -> None:
        """The content of a held block changes: it can be found no longer."""
        assert self.refs[block] == 1, f"block {block} has {self.refs[block]} holders: only one may rewrite it"
        self._unregister(block)

    def spoil(self, block: int) -> None:
        """A block's content is damaged, whoever holds it: it can be found no longer."""
        self._unregister(block)
        if block in self._cached:
            del self._cached[block]
            self._free.append(block)

    def find(self, digest: bytes) -> int | None:
        """The block that holds this content, held or cached."""
        return self._by_digest.get(digest)

    def find_run(self, digests: Sequence[bytes]) -> list[int]:
        """The blocks of these digests, up to the first that is not found."""
        blocks: list[int] = []
        for digest in digests:
            block = self._by_digest.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_exclusive(self, blocks: Sequence[int]) -> int:
        """How many of these blocks have this one holder."""
        return list(map(self.refs.__getitem__, blocks)).count(1)

    def _unregister(self, block: int) -> None:
        digest = self._digests[block]
        if digest is not None:
            self._digests[block] = None
            del self._by_digest[digest]

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """States the invariant whole: `tables` are all block tables there are."""
        holders = [0] * self.num_blocks
        for table in tables:
            assert len(set(table)) == len(table), f"a table names a block twice: {table}"
            for block in table:
                holders[block] += 1
        assert holders == self.refs, "reference counts differ from the tables that hold the blocks"
        held = {block for block, count in enumerate(self.refs) if count}
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a block is twice on the free list"
        assert not (held & free or held & cached or free & cached), "a block is in two states"
        assert len(free) + len(cached) + len(held) == self.num_blocks, "free + cached + held != total"
        registered = {block for block, digest in enumerate(self._digests) if digest is not None}
        assert cached <= registered and not free & registered, "cached blocks have a digest and free ones none"
        assert {self._by_digest[d] for d in self._by_digest} == registered, "the digest index and the blocks disagree"
        assert len(self._by_digest) == len(registered), "two digests name one block"
