"""Which keys a query sees, and what becomes of its products with them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scoring:
    """Scores of an attention: products of queries and keys times `scale`, between the caps, within the window."""

    scale: float
    window: int | None = None  # keys that a query sees at most, the last ones, its own among them; None is all
    soft_cap: float | None = None  # c makes c · tanh(s / c) of a score s (Gemma 2, arXiv:2408.00118); None leaves it

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window}: expected 1 or more keys, or None for no window")
        if self.soft_cap is not None and self.soft_cap <= 0:
            raise ValueError(f"soft_cap={self.soft_cap}: expected more than 0, or None for no cap")
