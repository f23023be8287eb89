"""Names for the content of blocks: a digest of a block's tokens and of all tokens before it.

The digests are cryptographic (128 bits of BLAKE2b), because a collision would hand one tenant's context to another, and
equal across processes, so that the same workload gives the same plans.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

DIGEST_BYTES = 16


def root_digest(salt: str) -> bytes:
    """Where a request's chain of digests begins: requests with different salts share nothing."""
    return blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES, person=b"cache salt").digest()


def block_digest(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The digest of a full block that follows the context named by `parent`."""
    return blake2b(parent + array("q", token_ids).tobytes(), digest_size=DIGEST_BYTES).digest()
