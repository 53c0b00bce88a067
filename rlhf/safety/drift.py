"""Has a stream of requests changed? A chart for rates that finds a change soon, and two comparisons of distributions.

NumPy alone, and every number that is drawn is drawn by a seed: equal logs give equal alarms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

RUNS = 2000
"""Quiet streams that a chart's level is set by."""


class Counted(NamedTuple):
    """How often something happened in a reference."""

    happened: int
    n: int

    @property
    def rate(self) -> float:
        """Return the rate with half a case of either kind added, so that it is neither 0 nor 1."""
        return (self.happened + 0.5) / (self.n + 1)


def changed_odds(rate: float, factor: float) -> float:
    """Return the rate whose odds are `factor` times as high."""
    odds = factor * rate / (1 - rate)
    return odds / (1 + odds)


@dataclass(frozen=True)
class RateChart:
    """A cumulative sum (CUSUM, Page 1954) of log-likelihood ratios of a changed rate against the reference's:
    ``S_t = max(0, S_(t-1) + log p1(x_t) / p0(x_t))``, with an alarm where it passes `level`."""

    before: float
    """p0: the reference's rate."""
    after: float
    """p1: the changed rate that is found soonest."""
    level: float

    def path(self, happened: np.ndarray) -> np.ndarray:
        """Return the sum after each of the events [n], True where it happened."""
        steps = np.where(happened, math.log(self.after / self.before), math.log((1 - self.after) / (1 - self.before)))
        total, path = 0.0, np.empty(len(steps))
        for number, step in enumerate(steps.tolist()):
            total = max(0.0, total + step)
            path[number] = total
        return path

    def first_alarm(self, happened: np.ndarray) -> int | None:
        """Return the index of the first event at which the sum passes the level; None where it never does."""
        over = np.flatnonzero(self.path(happened) > self.level)
        return int(over[0]) if len(over) else None


def rate_chart(reference: Counted, factor: float, false_alarms: float, horizon: int, seed: int = 0) -> RateChart:
    """Make the chart for a change of a rate's odds by `factor` (below 1: for a fall).

    Its level is the one that a quiet stream of `horizon` events passes with probability `false_alarms`. That the
    reference has a finite size counts: each of `RUNS` simulated quiet streams has a rate of its own, drawn from what
    the reference leaves possible (Beta with Jeffreys' prior), and the chart knows the estimate alone."""
    before = reference.rate
    chart = RateChart(before, changed_odds(before, factor), math.inf)
    up, down = math.log(chart.after / before), math.log((1 - chart.after) / (1 - before))
    draw = np.random.default_rng(seed)
    rates = draw.beta(reference.happened + 0.5, reference.n - reference.happened + 0.5, RUNS)
    total, highest = np.zeros(RUNS), np.zeros(RUNS)
    for _ in range(horizon):
        total = np.maximum(0.0, total + np.where(draw.random(RUNS) < rates, up, down))
        np.maximum(highest, total, out=highest)
    return RateChart(before, chart.after, float(np.quantile(highest, 1 - false_alarms)))


# ------------------------------------------------------------------------------------------ distributions


def shares_apart(reference: np.ndarray, now: np.ndarray) -> float:
    """Compute the population stability index of two lots of counts [bins]: ``sum (q - p) log(q / p)``, in nats, with
    half a case added to each bin. Equal shares have 0."""
    p, q = (np.asarray(counts, dtype=np.float64) + 0.5 for counts in (reference, now))
    p, q = p / p.sum(), q / q.sum()
    return float(((q - p) * np.log(q / p)).sum())


def chance_limit(reference: int, now: int, bins: int, false_alarms: float) -> float:
    """Return the index that two samples of one distribution pass with this probability: it is about
    ``(1 / n + 1 / m) chi^2`` with bins - 1 degrees (Yurdakul 2018), by Wilson and Hilferty's quantile."""
    degrees = max(1, bins - 1)
    z = NormalDist().inv_cdf(1 - false_alarms)
    quantile = degrees * max(0.0, 1 - 2 / (9 * degrees) + z * math.sqrt(2 / (9 * degrees))) ** 3
    return (1 / reference + 1 / now) * quantile


def edges_of(values: np.ndarray, bins: int = 10) -> np.ndarray:
    """Return the inner edges of bins that hold about as many of the values each. A value that is several edges, so
    frequent it is, gets a bin of its own: else a change below it would not be seen."""
    inner = np.quantile(np.asarray(values, dtype=np.float64), np.linspace(0, 1, bins + 1)[1:-1])
    frequent = inner[1:][inner[1:] == inner[:-1]]
    return np.unique(np.concatenate([inner, np.nextafter(frequent, -np.inf)]))


def counts_in(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Count values by bins; a value on an edge belongs to the lower one."""
    return np.bincount(np.searchsorted(edges, values, side="left"), minlength=len(edges) + 1)


class Apart(NamedTuple):
    """The largest distance of two distribution functions, and the probability of one as large by chance."""

    distance: float
    p_value: float


def kolmogorov_smirnov(reference: np.ndarray, now: np.ndarray) -> Apart:
    """Compare two samples (Kolmogorov-Smirnov). The p-value is the limit's, with Stephens' correction (1970); with many
    equal values it is too large, so that an alarm is no more likely."""
    one, other = (np.sort(np.asarray(values, dtype=np.float64)) for values in (reference, now))
    every = np.concatenate([one, other])
    below = [np.searchsorted(sample, every, side="right") / len(sample) for sample in (one, other)]
    distance = float(np.abs(below[0] - below[1]).max())
    size = math.sqrt(len(one) * len(other) / (len(one) + len(other)))
    scaled = (size + 0.12 + 0.11 / size) * distance
    if scaled < 0.2:  # the series below converges too slowly there, to 1
        return Apart(distance, 1.0)
    terms = (2 * (-1) ** (k - 1) * math.exp(-2 * (k * scaled) ** 2) for k in range(1, 101))
    return Apart(distance, min(1.0, max(0.0, math.fsum(terms))))
