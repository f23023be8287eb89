"""How much the server takes: every limit in one place, and the gate that requests pass one by one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from jaxcept_serve.turns import ServiceError

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key that may ask, and its owner's name for logs and limits."""

    name: str
    key: str = field(repr=False)

    def __post_init__(self) -> None:
        if not self.key or not self.key.isprintable():
            raise ValueError(f"api_key {self.name!r}: expected a non-empty key of printable characters")


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Limits and rules of the HTTP server. None means no limit. Seconds end in _s.

    api_keys: none leaves the server open. salt_secret: makes the cache salts of keys; b"" is one per process.
    allowed_hosts: names that a Host header may carry beside IP addresses; none is any (a page in a browser can point a
    name of its own at this machine). max_concurrent_per_key and requests_per_s (with bursts of `burst`) bound each
    key. max_num_queued_reqs bounds the requests that wait for the engine; where prompts of more
    than max_num_queued_tokens wait, no more come.
    retry_after_s: when to come again while draining or full.
    """

    api_keys: tuple[ApiKey, ...] = ()
    salt_secret: bytes = field(default=b"", repr=False)
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 16 * MIB
    max_json_depth: int = 100
    header_timeout_s: float = 15.0
    body_timeout_s: float = 60.0
    send_timeout_s: float = 120.0
    sse_keepalive_s: float = 15.0
    max_headers: int = 100
    max_header_bytes: int = 32 * 1024
    max_prompts: int = 1024
    max_messages: int = 10_000
    max_completions: int = 1024
    max_tools: int = 512
    max_schema_bytes: int = 256 * 1024
    max_connections: int = 8192
    max_concurrent: int = 2048
    max_concurrent_per_key: int | None = None
    requests_per_s: float | None = None
    burst: int = 32
    max_num_queued_reqs: int | None = 1024
    max_num_queued_tokens: int | None = None
    retry_after_s: float = 1.0

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_json_depth", "max_headers", "max_header_bytes", "max_prompts",
                     "max_messages", "max_completions", "max_tools", "max_schema_bytes", "max_concurrent",
                     "max_connections", "burst"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected 1 or more")
        for name in ("max_concurrent_per_key", "requests_per_s", "max_num_queued_reqs", "max_num_queued_tokens"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value}: expected above 0, or None")
        for name in ("header_timeout_s", "body_timeout_s", "send_timeout_s", "sse_keepalive_s", "retry_after_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: expected seconds above 0")
        names = [key.name for key in self.api_keys]
        if len(set(names)) < len(names):
            raise ValueError(f"api_keys={names}: two keys have the same name")


class _Bucket:
    """A token bucket: `rate` a second, at most `size` at once."""

    def __init__(self, rate: float, size: int, now: float) -> None:
        self.rate, self.size = rate, size
        self._left, self._at = float(size), now

    def take(self, now: float) -> float:
        """0 where one may pass, else the seconds until one may."""
        self._left = min(self.size, self._left + (now - self._at) * self.rate)
        self._at = now
        if self._left >= 1:
            self._left -= 1
            return 0.0
        return (1 - self._left) / self.rate


class Gate:
    """Counts the requests in flight, all together and by key, and refuses those over the limits.

    Belongs to the event loop's thread. Keys are those of ServerOptions (and "anonymous"), so its tables are bounded.
    """

    def __init__(self, options: ServerOptions, clock: Callable[[], float] = time.monotonic) -> None:
        self._options = options
        self._clock = clock
        self._in_flight: dict[str, int] = {}
        self._buckets: dict[str, _Bucket] = {}
        self.is_draining = False

    @property
    def num_in_flight(self) -> int:
        """Requests that have entered and not left."""
        return sum(self._in_flight.values())

    def enter(self, key_name: str) -> None:
        """Lets a request in, which must `leave`. Raises ServiceError 503 and 429 with Retry-After."""
        options = self._options
        if self.is_draining:
            raise ServiceError(503, "the server is shutting down", code="shutting_down",
                               retry_after_s=options.retry_after_s)  # fmt: skip
        if self.num_in_flight >= options.max_concurrent:
            raise self._full(f"{options.max_concurrent} requests are in flight")
        mine = self._in_flight.get(key_name, 0)
        if options.max_concurrent_per_key is not None and mine >= options.max_concurrent_per_key:
            raise ServiceError(429, f"{mine} requests of this key are in flight: at most "
                               f"{options.max_concurrent_per_key} may be", code="concurrency_limit_exceeded",
                               retry_after_s=options.retry_after_s)  # fmt: skip
        if options.requests_per_s is not None:
            now = self._clock()
            bucket = self._buckets.setdefault(key_name, _Bucket(options.requests_per_s, options.burst, now))
            wait_s = bucket.take(now)
            if wait_s > 0:
                raise ServiceError(429, f"more than {options.requests_per_s:g} requests a second with this key",
                                   code="rate_limit_exceeded", retry_after_s=wait_s)  # fmt: skip
        self._in_flight[key_name] = mine + 1

    def leave(self, key_name: str) -> None:
        """A request that had entered is over."""
        self._in_flight[key_name] -= 1
        assert self._in_flight[key_name] >= 0, f"a request of {key_name!r} has left twice"

    def admit(self, figures: Mapping[str, float], num_prompts: int) -> None:
        """Raises ServiceError 503 where the engine's queue (its figures) has no place for so many more prompts."""
        options = self._options
        queued, queued_tokens = figures.get("num_waiting", 0), figures.get("num_waiting_tokens", 0)
        limit, token_limit = options.max_num_queued_reqs, options.max_num_queued_tokens
        # A call that is larger than the whole queue is let in once nothing waits: nothing else could be done with it.
        if limit is not None and queued > 0 and queued + num_prompts > limit:
            raise self._full(f"{queued:g} requests wait, at most {limit} may")
        if token_limit is not None and queued_tokens >= token_limit > 0:
            raise self._full(f"prompts of {queued_tokens:g} tokens wait, at most {token_limit} may")

    def _full(self, why: str) -> ServiceError:
        return ServiceError(503, f"the server is overloaded: {why}", code="overloaded",
                            retry_after_s=self._options.retry_after_s)  # fmt: skip
