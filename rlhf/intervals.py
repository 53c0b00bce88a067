"""The one module of intervals: shares, means and differences over prompts, win rates; and best-of-n.

An interval is over prompts, since responses and pairs of one prompt are not independent. Which one is used, and why
(tests/test_intervals.py computes how often each holds the truth; a percentile bootstrap's are too narrow at few
prompts, and have no width where all answers are right):

| of what | interval |
|---|---|
| a count, one answer per prompt | `proportion`: Wilson's, widened by Agresti and Coull |
| other shares, and differences | `clustered_mean`: Student's t over prompts, one of them added at each bound |
| two systems on the same items | `paired_difference`: `clustered_mean` of the items' differences |
| a judge, corrected by a few human labels | `rlhf.evals.correction` |
| a mean without bounds | `bootstrap_interval`: Student's t below 100 prompts, then a studentized bootstrap |
| a calibration error | `reflected`, of the quantiles on redrawn sets |

`too_few` says how many prompts an undecided comparison would take, `holm` what remains of several comparisons.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from rlhf.quantiles import student_quantile

Scores = Sequence[float] | Sequence[Sequence[float]] | np.ndarray
FEW = 100
"""Below so many prompts a bootstrap's intervals are too narrow; Student's t replaces it."""
SURE = 1.96 + 0.84
"""Standard errors between two values that a 95% interval tells apart in four of five tries."""
MOST = 100_000
"""More prompts than this nobody is told to bring."""


class Estimate(NamedTuple):
    """A number and its interval."""

    value: float
    low: float
    high: float

    @property
    def interval(self) -> list[float]:
        return [self.low, self.high]


# ---------------------------------------------------------------------------------------------- by formula


def proportion(right: float, n: float, level: float = 0.95) -> Estimate:
    """Compute the share ``right / n`` of independent answers and its interval.

    With z the normal quantile, the centre is ``(right + z^2 / 2) / (n + z^2)``. Where none or all are right, the
    interval is Wilson's (1927), ``[0, z^2 / (n + z^2)]`` or ``[n / (n + z^2), 1]``; elsewhere Agresti and Coull's
    (1998), which has the same centre and is never narrower: Wilson's alone holds only 84% of the time at n = 17 and a
    true share of 0.99. Coverage for n = 12 to 500 and shares of .5, .9 and .99: 92.3% or more.
    """
    if not 0 <= right <= n or n < 1:
        raise ValueError(f"{right} of {n} is no share; the number right lies between 0 and n, and n is 1 or more")
    squared = NormalDist().inv_cdf((1 + level) / 2) ** 2
    if right == 0:
        return Estimate(0.0, 0.0, squared / (n + squared))
    if right == n:
        return Estimate(1.0, n / (n + squared), 1.0)
    centre = (right + squared / 2) / (n + squared)
    half = math.sqrt(squared * centre * (1 - centre) / (n + squared))
    return Estimate(right / n, max(0.0, centre - half), min(1.0, centre + half))


def clustered_mean(
    values: Sequence[float] | np.ndarray,
    keys: Sequence[Hashable],
    bounds: tuple[float, float] = (0.0, 1.0),
    level: float = 0.95,
    weights: Sequence[float] | None = None,
) -> Estimate:
    """Compute the mean of all values [n], which lie within ``bounds``, and its interval over clusters (prompts).

    With S_c the sum and m_c the number of cluster c's values, r = sum S / sum m and e_c = S_c - r m_c, the variance of
    r is ``G / (G - 1) sum e_c^2 / (sum m)^2`` over G clusters, and its quantile is Student's with one degree less than
    there are prompts. Before, a cluster of mean size is added at either bound, as Agresti and Caffo (2000) and Bonett
    and Price (2012) do for differences: so the interval has a width where all answers agree, and holds near the bounds.
    The value is the plain mean. A count (values 0 and 1, one per cluster, bounds 0 and 1) is `proportion`'s. weights
    [n]: how often each value counts in all of this; None: once.
    """
    given = _checked(values)
    of, times = _numbered(keys), np.ones(len(given)) if weights is None else np.asarray(weights, dtype=np.float64)
    sums, sizes = _totals(given, of, times)
    there = len(sums)
    plain = there == len(given) and bool((times == 1).all())
    if bounds == (0.0, 1.0) and plain and set(given.tolist()) <= {0.0, 1.0}:
        return proportion(int(given.sum()), len(given), level)
    low, high = bounds
    size = float(times.sum()) / there
    sums, sizes = np.append(sums, [low * size, high * size]), np.append(sizes, [size, size])
    ratio, clusters = float(sums.sum() / sizes.sum()), len(sums)
    variance = clusters / (clusters - 1) * float(((sums - ratio * sizes) ** 2).sum() / sizes.sum() ** 2)
    half = student_quantile((1 + level) / 2, max(1, there - 1)) * math.sqrt(variance)
    return Estimate(float(np.average(given, weights=weights)), max(low, ratio - half), min(high, ratio + half))


def paired_difference(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    keys: Sequence[Hashable] | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    level: float = 0.95,
) -> Estimate:
    """Compute the mean of ``first - second`` [n], two systems' results on the same items, and its interval.

    Results lie within ``bounds``. keys [n]: the clusters (prompts, documents); by default every item is one. Of
    answers that are right or wrong, this is Bonett and Price's (2012) interval with Student's quantile. Coverage in
    2,000 simulated worlds: 95.6% of 200 items, 98.7% of 40; of 12 items, or of 30 clusters of four, nearly all: there
    it is wider than it need be (tests/test_intervals_paired.py).
    """
    differences = _checked(first) - _checked(second)
    width = bounds[1] - bounds[0]
    return clustered_mean(differences, range(len(differences)) if keys is None else keys, (-width, width), level)


def unpaired_difference(first: Estimate, second: Estimate) -> Estimate:
    """Compute the difference of two independent estimates and its interval from theirs (Newcombe 1998, his method 10):
    with value v and interval [l, u] of each, ``d - sqrt((v - l)^2 + (u' - v')^2)`` to ``d + sqrt((u - v)^2 + (v' -
    l')^2)``. It is as wide near 0 and 1 as the two intervals are there."""
    value = first.value - second.value
    below = math.hypot(first.value - first.low, second.high - second.value)
    above = math.hypot(first.high - first.value, second.value - second.low)
    return Estimate(value, value - below, value + above)


def student_mean(values: Sequence[float] | np.ndarray, level: float = 0.95) -> Estimate:
    """Compute the mean of independent values without bounds, and Student's interval. Of a single value, which says
    nothing about the others, the interval has no ends (-inf, inf)."""
    given = _checked(values)
    if len(given) == 1:
        return Estimate(float(given[0]), -math.inf, math.inf)
    half = student_quantile((1 + level) / 2, len(given) - 1) * _standard_error(given)
    return Estimate(float(given.mean()), float(given.mean()) - half, float(given.mean()) + half)


# ---------------------------------------------------------------------------------- too few, or too many


def needed(n: int, value: float, against: float, interval: Sequence[float]) -> int | None:
    """Estimate how many prompts or pairs it takes to tell a value from another one, if both are as far apart as here.

    interval: the value's 95% interval at the n at hand, from which its standard error is read; the error falls with the
    root of their number. Rounded up to two digits; None where that would be more than 100,000, or the two are equal.
    """
    error, gap = (interval[1] - interval[0]) / (2 * 1.96), abs(value - against)
    count = math.inf if gap == 0 else n * (SURE * error / gap) ** 2
    if count > MOST:
        return None
    unit = 10 ** max(0, int(math.log10(max(count, 1))) - 1)
    return math.ceil(count / unit) * unit


def too_few(estimate: Estimate, n: int, against: float = 0.5, what: str = "prompts") -> str | None:
    """Return the sentence for a 95% interval that holds ``against``; None where it doesn't: the comparison is
    decided."""
    if not estimate.low <= against <= estimate.high:
        return None
    count = needed(n, estimate.value, against, estimate.interval)
    tell = f"about {max(count, n + 1):,} needed for a difference of this size" if count else "more would hardly tell"
    return f"too few to tell: {n:,} {what}, {tell}"


def sign_test(won: int, lost: int) -> float:
    """Return the two-sided probability of a split at least as uneven as ``won`` to ``lost`` where both are as likely:
    the exact McNemar test of two systems' answers that differ."""
    n, few = won + lost, min(won, lost)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(few + 1)) / 2**n)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust the p-values of several comparisons (Holm 1979), in their order: one below 0.05 then stands with the
    others at 5% of error in all, however they depend on one another."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def by_chance(comparisons: int, level: float = 0.95) -> str:
    """Return the sentence that belongs below a table of several intervals."""
    expected = comparisons * (1 - level)
    return (
        f"{comparisons} comparisons, each at {level:.0%}: where nothing differs, about {expected:.1g} of them exclude "
        "no difference by chance alone"
    )


# ------------------------------------------------------------------------------------------- by redrawing


def mean(values: np.ndarray) -> float:
    """Compute the mean: the default ``statistic`` of `bootstrap_interval`."""
    return float(values.mean())


def bootstrap_interval(
    values: Scores,
    seed: int,
    level: float = 0.95,
    samples: int = 2000,
    statistic: Callable[[np.ndarray], float] = mean,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    keys: Sequence[Hashable] | None = None,
) -> Estimate:
    """Compute the interval of a statistic over prompts; of the mean, the one that the module's table names.

    ``values [P, ...]`` has one row per prompt, with everything of that prompt: prompts are redrawn, not responses; with
    keys [P], the clusters that they are of. A mean of values that all lie in ``bounds`` is `clustered_mean`'s: name
    them for differences, and None for a spread, which has no upper one. Any other mean of fewer than 100 clusters is
    `student_mean`'s. From 100 on, it is studentized (Efron and Tibshirani 1993, chapter 12.5): the quantiles of
    ``(mean* - mean) / error*`` on ``samples`` redrawn sets take the place of Student's. Of any other statistic the
    interval runs from the (1 - level) / 2 to the (1 + level) / 2 quantile on the redrawn sets, which is too narrow
    below 100 clusters. Raises ValueError on no values, or on NaN or infinity.
    """
    values = _checked(values)
    draw = np.random.default_rng(seed)
    tails = [(1 - level) / 2, (1 + level) / 2]
    of = np.arange(len(values)) if keys is None else _numbered(keys)
    if statistic is not mean:
        members = np.split(np.argsort(of, kind="stable"), np.cumsum(np.bincount(of))[:-1])
        again = (draw.integers(0, len(members), len(members)) for _ in range(samples))
        redrawn = [statistic(values[np.concatenate([members[cluster] for cluster in drawn])]) for drawn in again]
        low, high = np.quantile(redrawn, tails)
        return Estimate(float(statistic(values)), float(low), float(high))
    rows = values.reshape(len(values), -1).mean(axis=1)
    if bounds is not None and values.min() >= bounds[0] and values.max() <= bounds[1]:
        return clustered_mean(rows, of.tolist(), bounds, level)
    sums, sizes = _totals(rows, of, np.ones(len(rows)))
    if len(sums) < len(rows):  # a number per cluster, with the rows' mean and its standard error over clusters
        rows = rows.mean() + (sums - rows.mean() * sizes) * len(sizes) / len(rows)
    if len(rows) < FEW or np.ptp(rows) == 0:
        return student_mean(rows, level)
    centre, error = float(rows.mean()), _standard_error(rows)
    sets = (rows[draw.integers(0, len(rows), len(rows))] for _ in range(samples))
    apart = [(float(drawn.mean()) - centre) / _standard_error(drawn) for drawn in sets if np.ptp(drawn) > 0]
    below, above = np.quantile(apart, tails)
    return Estimate(centre, centre - float(above) * error, centre - float(below) * error)


def reflected(found: Estimate) -> Estimate:
    """Return the reversed bootstrap's interval (Davison and Hinkley 1997, chapter 5.2.1) of a number that is 0 or more
    and that redrawing makes larger, as a calibration error: from the quantiles' ``[low, high]``, both above the truth,
    ``[2 value - high, 2 value - low]``, cut at 0, and widened to hold the value. It holds the truth in 65 to 90% of
    simulated worlds (calibration errors of 0 to 0.1, 100 or 400 items), not in 95%."""
    low, high = (2 * found.value - end for end in (found.high, found.low))
    return Estimate(found.value, min(found.value, max(0.0, low)), max(found.value, high))


def _numbered(keys: Sequence[Hashable]) -> np.ndarray:
    """Return each key's number, in the order in which they come first."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys])


def _totals(values: np.ndarray, of: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each cluster's sum and number of values, of which each counts so many times."""
    return np.bincount(of, weights=times * values), np.bincount(of, weights=times)


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) / math.sqrt(len(values))


def _checked(values: Scores) -> np.ndarray:
    given = np.asarray(values, dtype=np.float64)
    if len(given) == 0:
        raise ValueError("an interval needs values, one per prompt, and got none")
    if not np.isfinite(given).all():
        raise ValueError(f"{int((~np.isfinite(given)).sum())} of the interval's values are NaN or infinite")
    return given


# ------------------------------------------------------------------------------------- win rates, accuracy


def wins(scores_a: Scores, scores_b: Scores) -> np.ndarray:
    """Return per prompt how often A's response beats B's, a tie counting half: ``[P]`` in [0, 1].

    Scores are ``[P]``, or ``[P, N]`` for several responses per prompt: every response of A is compared with every
    response of B.
    """
    a, b = (np.asarray(scores, dtype=np.float64) for scores in (scores_a, scores_b))
    if len(a) != len(b):
        raise ValueError(f"win rates compare the same prompts: got scores for {len(a)} and for {len(b)}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("win rates need a finite score for every response, and some are NaN or infinite")
    a, b = a.reshape(len(a), -1, 1), b.reshape(len(b), 1, -1)
    return ((a > b) + 0.5 * (a == b)).mean(axis=(1, 2))


def win_rate(scores_a: Scores, scores_b: Scores, seed: int = 0) -> Estimate:
    """Compute the share of prompts on which A beats B, ties counting half, with its interval over prompts.

    No interval of shares draws anything; ``seed`` is there for callers that know it from the bootstrap."""
    return bootstrap_interval(wins(scores_a, scores_b), seed)


def clustered_accuracy(correct: Sequence[float], prompt_keys: Sequence[Hashable], seed: int = 0) -> Estimate:
    """Compute the share of right answers over all pairs, with its interval over prompts (`clustered_mean`).

    Pairs of the same prompt's responses are not independent. ``correct`` is 1, 0, or 0.5 for a tie. ``seed``: as in
    `win_rate`.
    """
    return clustered_mean(correct, prompt_keys)


def best_of_n_kl(n: int) -> float:
    """Return the KL of best-of-n from its policy, in nats: ln n - (n - 1) / n (Stiennon et al. 2020, appendix G.3).

    Exact when no two responses tie; an upper bound otherwise (Beirami et al. 2024).
    """
    if n < 1:
        raise ValueError(f"n={n} must be 1 or more")
    return math.log(n) - (n - 1) / n


def best_of_n(scores: np.ndarray) -> np.ndarray:
    """Return the indices ``[P]`` of the responses with the highest of ``scores [P, N]``, the first of equals."""
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or not np.isfinite(scores).all():
        raise ValueError(f"best_of_n needs finite scores [prompts, n], got shape {scores.shape}")
    return scores.argmax(axis=1)


def score_length_correlation(scores: Sequence[float], lengths: Sequence[int]) -> float | None:
    """Compute the Pearson correlation of score with response length; None where one of them does not vary."""
    x, y = np.asarray(scores, dtype=np.float64), np.asarray(lengths, dtype=np.float64)
    x, y = x - x.mean(), y - y.mean()
    norm = math.sqrt(float((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / norm if norm > 0 else None
