"""Seconds: what steps and swaps take on one device with one model. Each number is from a profile or a data sheet."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple, Protocol

from jaxcept.scheduler.plan import StepPlan


class StepLoad(NamedTuple):
    """What makes a step long."""

    query_tokens: int  # computed
    context_tokens: int  # KV tokens read: for each sequence of the step, the positions its last query attends to
    pairs: int  # for each query token, the positions it attends to, summed
    num_seqs: int

    @classmethod
    def of(cls, plan: StepPlan) -> StepLoad:
        """The load of a plan."""
        num_decodes = len(plan.decodes.positions)
        context = sum(plan.decodes.positions) + num_decodes
        query, pairs = num_decodes, context
        for chunk in plan.chunks:
            size = len(chunk.token_ids)
            query += size
            context += chunk.start + size
            pairs += chunk_pairs(chunk.start, size)
        return cls(query, context, pairs, num_decodes + len(plan.chunks))


def chunk_pairs(start: int, size: int) -> int:
    """Query-key pairs of a causal chunk of `size` tokens behind `start` computed ones."""
    return size * start + size * (size + 1) // 2


class Costs(Protocol):
    """What policies ask."""

    @property
    def saturation_tokens(self) -> int:
        """Query tokens past which a step grows linearly."""
        ...

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of KV cache of one token."""
        ...

    def step_s(self, load: StepLoad) -> float:
        """Seconds of a step."""
        ...

    def forward_s(self, num_tokens: int, num_context: int = 0) -> float:
        """Seconds of a step that computes one chunk of `num_tokens` behind `num_context` computed tokens."""
        ...

    def swap_out_s(self, num_tokens: int) -> float:
        """Seconds to move the KV of so many tokens to the host."""
        ...

    def swap_in_s(self, num_tokens: int) -> float:
        """Seconds to move the KV of so many tokens from the host."""
        ...

    def hidden_tokens(self, seconds: float) -> int:
        """The swap budget: most tokens that move either way within these seconds."""
        ...


@dataclass(frozen=True, slots=True)
class CostModel:
    """step_s = overhead + max(floor, token · query tokens) + context_token · context tokens + pair · pairs.

    floor_s is the time that the weights take through memory, however few tokens there are. The linear model in tokens
    alone of InferCept (arXiv 2402.01869) is the case floor_s = context_token_s = pair_s = 0. A swap of n tokens takes
    latency + token · n seconds, one way. `sources` says of each number where it is from.
    """

    name: str
    device: str
    model: str
    dtype: str
    overhead_s: float
    floor_s: float
    token_s: float
    context_token_s: float
    pair_s: float
    saturation_tokens: int
    kv_token_bytes: int
    swap_out_latency_s: float
    swap_out_token_s: float
    swap_in_latency_s: float
    swap_in_token_s: float
    sources: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for spec in fields(self):
            value = getattr(self, spec.name)
            if spec.name.endswith("_s") and not (_is_number(value) and math.isfinite(value) and value >= 0):
                raise ValueError(f"{spec.name}={value!r}: expected seconds, 0 or more")
        for name in ("name", "device", "model", "dtype"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name}={getattr(self, name)!r}: expected text")
        for name in ("sources", "versions"):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(f"{name}={getattr(self, name)!r}: expected an object of texts")
        for name in ("saturation_tokens", "kv_token_bytes"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r}: expected an integer of 1 or more")

    def step_s(self, load: StepLoad) -> float:
        """Seconds of a step; 0 for one that computes nothing."""
        return self._seconds(load.query_tokens, load.context_tokens, load.pairs)

    def forward_s(self, num_tokens: int, num_context: int = 0) -> float:
        """T_fwd: seconds of a step that computes one chunk of `num_tokens` behind `num_context` computed tokens."""
        return self._seconds(num_tokens, num_context + num_tokens, chunk_pairs(num_context, num_tokens))

    def _seconds(self, query_tokens: int, context_tokens: int, pairs: int) -> float:
        if not query_tokens:
            return 0.0
        dense = max(self.floor_s, self.token_s * query_tokens)
        return self.overhead_s + dense + self.context_token_s * context_tokens + self.pair_s * pairs

    def swap_out_s(self, num_tokens: int) -> float:
        """T_swap, device to host."""
        return self.swap_out_latency_s + self.swap_out_token_s * num_tokens if num_tokens else 0.0

    def swap_in_s(self, num_tokens: int) -> float:
        """T_swap, host to device."""
        return self.swap_in_latency_s + self.swap_in_token_s * num_tokens if num_tokens else 0.0

    def hidden_tokens(self, seconds: float) -> int:
        """The largest N with T_swap(N) <= seconds in the slower direction (InferCept, section 4.1)."""
        ways = (
            (self.swap_out_latency_s, self.swap_out_token_s),
            (self.swap_in_latency_s, self.swap_in_token_s),
        )
        return min(_most_tokens(seconds, latency, token) for latency, token in ways)

    def to_json(self) -> str:
        """The whole model, for `from_json`."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> CostModel:
        """A model that `to_json` wrote. ValueError names what is wrong."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"cost model: expected a JSON object: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"cost model: expected a JSON object, got {type(values).__name__}")
        names = {spec.name for spec in fields(cls)}
        missing = sorted(names - set(values) - {"sources", "versions"})
        unknown = sorted(set(values) - names)
        if missing or unknown:
            raise ValueError(f"cost model: fields missing: {missing}; fields unknown: {unknown}")
        return cls(**values)

    @classmethod
    def load(cls, path: str | Path) -> CostModel:
        """Reads a file. FileNotFoundError, or ValueError with the file's name."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Writes a file."""
        Path(path).write_text(self.to_json(), encoding="utf-8")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _most_tokens(seconds: float, latency_s: float, token_s: float) -> int:
    if seconds <= latency_s:
        return 0
    return int((seconds - latency_s) / token_s + 1e-9) if token_s > 0 else 2**31
