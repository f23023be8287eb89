"""What a client asks for, in token ids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b

from jaxcept.scheduler.params import InterceptParams, SamplingParams
from jaxcept.scheduler.watcher import Watcher

PRIORITY_S = 30.0


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and how to complete it `params.n` times.

    `seed_base` stands in where `params.seed` is None: whoever composes draws it, the scheduler has no random source.
    `cache_salt` separates tenants: only requests with equal salts find each other's blocks. `watcher` makes the
    watcher of the completion with the given index. `arrival` (seconds of the engine's clock) is the time of `add`
    where it is None. `priority`: lower is served first; one level is worth PRIORITY_S seconds of waiting, and no more,
    so nobody waits for ever. `is_open` says that the prompt goes on: it is computed as far as it is known, then
    intercepted.
    """

    request_id: str
    prompt_ids: tuple[int, ...] = field(repr=False)
    params: SamplingParams = field(default_factory=SamplingParams)
    intercept: InterceptParams = field(default_factory=InterceptParams)
    eos_token_ids: tuple[int, ...] = ()
    cache_salt: str = ""
    seed_base: int = 0
    watcher: Callable[[int], Watcher] | None = None
    arrival: float | None = None
    is_open: bool = False
    priority: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt_ids", tuple(self.prompt_ids))
        object.__setattr__(self, "eos_token_ids", tuple(self.eos_token_ids))
        if self.is_open and self.params.n != 1:
            raise ValueError(f"n={self.params.n}: expected 1 for a prompt that comes in pieces")
        if self.is_open and self.params.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs: expected none for a prompt that comes in pieces")

    def rank(self, arrival: float) -> float:
        """What the arrival counts as in queues, seconds."""
        return arrival + PRIORITY_S * self.priority

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The ids that end a completion: the client's, then the model's unless they are to be ignored."""
        eos = () if self.params.ignore_eos else self.eos_token_ids
        return tuple(dict.fromkeys((*self.params.stop_token_ids, *eos)))

    def seed(self, index: int) -> int:
        """The seed of one completion, 63 bits; a function of the request's seed and the index alone."""
        base = self.seed_base if self.params.seed is None else self.params.seed
        digest = blake2b(f"{base}/{index}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1
