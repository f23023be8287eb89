"""Fits the terms of a cost model to measured seconds: non-negative least squares on the relative error."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from jaxcept.scheduler.costs import StepLoad


class StepFit(NamedTuple):
    """Terms of CostModel.step_s, and how far they are from what was measured, relative to it."""

    overhead_s: float
    floor_s: float
    token_s: float
    context_token_s: float
    pair_s: float
    saturation_tokens: int
    mean_error: float
    max_error: float


def non_negative_fit(terms: np.ndarray, seconds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x >= 0 that minimizes |terms @ x / seconds - 1|, and that error of each row.

    terms: [rows, few]; seconds: [rows], above 0. Exact: with few terms, every choice of those above 0 is tried.
    """
    scaled = terms / seconds[:, None]
    best, least = np.zeros(terms.shape[1]), float(len(seconds))
    for count in range(1, terms.shape[1] + 1):
        for chosen in combinations(range(terms.shape[1]), count):
            columns = scaled[:, chosen]
            scale = np.maximum(np.abs(columns).max(axis=0), 1e-30)
            values = np.linalg.lstsq(columns / scale, np.ones(len(seconds)), rcond=None)[0] / scale
            error = float(((columns @ values - 1) ** 2).sum())
            if (values >= 0).all() and error < least * (1 - 1e-9):
                best, least = np.zeros(terms.shape[1]), error
                best[list(chosen)] = values
    return best, scaled @ best - 1


def fit_steps(steps: Sequence[tuple[StepLoad, float]], is_linear: bool) -> StepFit:
    """The terms that fit (load, seconds) best. ValueError where there are too few.

    Below the saturation point S the dense part takes what S tokens take: for a given S the rest is linear, and every
    power of 2 ** 0.25 is tried as S. `is_linear`: overhead and tokens alone, as in InferCept (arXiv 2402.01869).
    """
    if len(steps) < 3:
        raise ValueError(f"{len(steps)} loads were measured: expected 3 or more")
    seconds = np.array([taken for _, taken in steps])
    query, context, pairs, _ = (np.array(column, float) for column in zip(*(load for load, _ in steps), strict=True))
    ones = np.ones(len(steps))
    if is_linear:
        (overhead, token), errors = non_negative_fit(np.stack([ones, query], 1), seconds)
        return StepFit(float(overhead), 0.0, float(token), 0.0, 0.0, 1, *_summary(errors))
    best: StepFit | None = None
    least = np.inf
    for saturation in _candidates(int(query.max())):
        dense = np.maximum(query, saturation)
        values, errors = non_negative_fit(np.stack([ones, dense, context, pairs], 1), seconds)
        if (errors**2).sum() < least * (1 - 1e-9):
            least = float((errors**2).sum())
            overhead, token, context_token, pair = (float(value) for value in values)
            best = StepFit(
                overhead, token * saturation, token, context_token, pair, saturation, *_summary(errors)
            )  # fmt: skip
    assert best is not None
    return best


def fit_swaps(times: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """(latency, seconds of a token) of T(n) = latency + token * n, from (n, seconds); zeros where there are none."""
    if not times:
        return 0.0, 0.0
    tokens = np.array([count for count, _ in times], float)
    values, _ = non_negative_fit(np.stack([np.ones(len(times)), tokens], 1), np.array([taken for _, taken in times]))
    return float(values[0]), float(values[1])


def _candidates(largest: int) -> list[int]:
    powers = [round(2 ** (quarter / 4)) for quarter in range(4 * max(1, largest).bit_length())]
    return sorted({size for size in powers if size <= largest})


def _summary(errors: np.ndarray) -> tuple[float, float]:
    return float(np.abs(errors).mean()), float(np.abs(errors).max())
