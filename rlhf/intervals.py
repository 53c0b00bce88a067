"""Statistics on arrays: win rates, bootstrap intervals over prompts, best-of-n."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np

Scores = Sequence[float] | Sequence[Sequence[float]] | np.ndarray


class Estimate(NamedTuple):
    """A number and its interval."""

    value: float
    low: float
    high: float

    @property
    def interval(self) -> list[float]:
        return [self.low, self.high]


def mean(values: np.ndarray) -> float:
    """Compute the mean: the default ``statistic`` of a bootstrap."""
    return float(values.mean())


def bootstrap_interval(
    values: Scores,
    seed: int,
    level: float = 0.95,
    samples: int = 2000,
    statistic: Callable[[np.ndarray], float] = mean,
) -> Estimate:
    """Compute a percentile bootstrap interval over prompts (Efron 1979).

    ``values [P, ...]`` has one row per prompt, with everything of that prompt: prompts are redrawn, not responses,
    since responses to one prompt are not independent. The interval runs from the (1 - level) / 2 to the (1 + level) / 2
    quantile of ``statistic`` on ``samples`` redrawn sets. Raises ValueError on no values, or on NaN or infinity.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) == 0:
        raise ValueError("bootstrap_interval got no values; it needs one per prompt")
    if not np.isfinite(values).all():
        raise ValueError(f"{int((~np.isfinite(values)).sum())} of the bootstrap's values are NaN or infinite")
    draw = np.random.default_rng(seed)
    redrawn = [statistic(values[draw.integers(0, len(values), len(values))]) for _ in range(samples)]
    low, high = np.quantile(redrawn, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(statistic(values)), float(low), float(high))


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
    """Compute the share of prompts on which A beats B, ties counting half, with a bootstrap interval over prompts."""
    return bootstrap_interval(wins(scores_a, scores_b), seed)


def clustered_accuracy(correct: Sequence[float], prompt_keys: Sequence[Hashable], seed: int = 0) -> Estimate:
    """Compute the share of right answers over all pairs, with an interval that redraws prompts.

    Pairs of the same prompt's responses are not independent, so redrawing pairs would give too narrow an interval.
    ``correct`` is 1, 0, or 0.5 for a tie.
    """
    totals: dict[Hashable, list[float]] = {}
    for right, key in zip(correct, prompt_keys, strict=True):
        total = totals.setdefault(key, [0.0, 0.0])
        total[0] += float(right)
        total[1] += 1.0
    sums = np.array(list(totals.values())).reshape(-1, 2)
    return bootstrap_interval(sums, seed, statistic=lambda rows: float(rows[:, 0].sum() / rows[:, 1].sum()))


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
