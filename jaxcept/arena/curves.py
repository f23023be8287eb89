"""Runs at several rates as curves: the load that a policy sustains, and how two sets of runs agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxcept.arena.cases import label
from jaxcept.simulator.report import Report

# Bounds on the median normalized latency for which the sustained rate is told, seconds per token.
LATENCY_BOUNDS_S = (0.02, 0.05, 0.1, 0.2, 0.5)


def label_of(report: Report) -> str:
    """How the run's line in a table is called."""
    return label(report.info.policy, report.info.order, report.info.estimator)


def by_label(reports: Sequence[Report]) -> dict[str, list[Report]]:
    """The runs of each line by rate, in the order in which the lines come first."""
    curves: dict[str, list[Report]] = {}
    for report in reports:
        curves.setdefault(label_of(report), []).append(report)
    return {name: sorted(curve, key=lambda report: report.info.rate) for name, curve in curves.items()}


@dataclass(frozen=True, slots=True)
class Sustained:
    """The highest rate at which the median normalized latency stays within a bound."""

    bound_s: float
    rate: float | None  # None: the lowest rate that was run is too much
    is_lower_bound: bool  # the highest rate that was run is within the bound still

    def over(self, other: Sustained) -> float | None:
        """The ratio to another's; None where either is not known."""
        if self.rate is None or other.rate is None or self.is_lower_bound or other.is_lower_bound:
            return None
        return self.rate / other.rate

    def __str__(self) -> str:
        if self.rate is None:
            return "below"
        return f"{'≥ ' if self.is_lower_bound else ''}{self.rate:.2f}"


def sustained(curve: Sequence[Report], bound_s: float) -> Sustained:
    """Linear interpolation between the last rate within the bound and the first one past it."""
    previous: Report | None = None
    for report in curve:
        latency = report.normalized_latency.p50
        if latency > bound_s:
            if previous is None:
                return Sustained(bound_s, None, False)
            low, high = previous.normalized_latency.p50, latency
            share = (bound_s - low) / (high - low)
            return Sustained(bound_s, previous.info.rate + share * (report.info.rate - previous.info.rate), False)
        previous = report
    return Sustained(bound_s, None if previous is None else previous.info.rate, previous is not None)


@dataclass(frozen=True, slots=True)
class Agreement:
    """Predicted against measured runs of the same cases."""

    cases: tuple[tuple[str, float, float, float], ...]  # label, rate, predicted and measured makespan in seconds
    predicted_order: tuple[str, ...]  # by mean normalized latency over the rates, best first
    measured_order: tuple[str, ...]
    pair_share: float  # of pairs of policies that both put in the same order

    @property
    def worst_makespan_error(self) -> float:
        """The largest |predicted - measured| / measured."""
        return max((abs(predicted - measured) / measured for _, _, predicted, measured in self.cases), default=0.0)

    def markdown(self) -> str:
        """A table and two lines."""
        lines = ["| policy | rate | predicted, s | measured, s | error |", "|---|---|---|---|---|"]
        for name, rate, predicted, measured in self.cases:
            error = (predicted - measured) / measured
            lines.append(f"| {name} | {rate:g} | {predicted:.2f} | {measured:.2f} | {error:+.1%} |")
        lines += [
            "",
            f"Order predicted: {', '.join(self.predicted_order)}.",
            f"Order measured: {', '.join(self.measured_order)}; {self.pair_share:.0%} of the pairs agree.",
        ]
        return "\n".join(lines)


def compare(predicted: Sequence[Report], measured: Sequence[Report]) -> Agreement:
    """Two sets of runs of the same labels and rates. ValueError where one has what the other lacks."""
    ours = {(label_of(report), report.info.rate): report for report in predicted}
    theirs = {(label_of(report), report.info.rate): report for report in measured}
    if set(ours) != set(theirs):
        raise ValueError(f"runs differ: predicted {sorted(ours)}, measured {sorted(theirs)}")
    first, second = _scores(predicted), _scores(measured)
    names = list(first)
    pairs = [(a, b) for index, a in enumerate(names) for b in names[index + 1 :]]
    same = sum(1 for a, b in pairs if (first[a] < first[b]) == (second[a] < second[b]))
    return Agreement(
        cases=tuple((*key, ours[key].makespan_s, report.makespan_s) for key, report in theirs.items()),
        predicted_order=tuple(sorted(first, key=first.__getitem__)),
        measured_order=tuple(sorted(second, key=second.__getitem__)),
        pair_share=same / len(pairs) if pairs else 1.0,
    )


def _scores(reports: Sequence[Report]) -> dict[str, float]:
    return {
        name: sum(report.normalized_latency.mean for report in curve) / len(curve)
        for name, curve in by_label(reports).items()
    }
