"""Which items to label next: by disagreement, closeness of scores, diversity, or at random.

Pure functions over scores that the caller brings, a list per item with one score per candidate (items may have
different numbers of candidates). They return a value per item, of which `highest` takes the items; `diverse` and
`at_random` return the items themselves. To combine two, call one on what the other chose.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from itertools import combinations

import numpy as np

Scores = Sequence[Sequence[float]]
"""Per item, a score for each candidate."""


def disagreement(members: Sequence[Scores]) -> list[float]:
    """Compute, per item, how far the members of an ensemble differ: the variance over members of the probability that
    one candidate beats another, ``sigmoid(s_i - s_j)`` (Bradley and Terry 1952), averaged over the item's pairs."""
    return [
        _mean(float(np.var([_wins(member[i] - member[j]) for member in scores])) for i, j in _pairs(scores[0]))
        for scores in zip(*members, strict=True)
    ]


def split_votes(rankings: Sequence[Scores]) -> list[float]:
    """Compute, per item, how far its annotators' rankings differ: ``4 p (1 - p)``, p the share that ranks one candidate
    better than another (a tie counts half), averaged over the item's pairs. rankings: per item, each annotator's ranks.
    0: all agree, or fewer than two judged."""

    def split(ranked: Scores, i: int, j: int) -> float:
        p = sum((ranks[i] < ranks[j]) + 0.5 * (ranks[i] == ranks[j]) for ranks in ranked) / len(ranked)
        return 4 * p * (1 - p)

    return [_mean(split(ranked, i, j) for i, j in _pairs(ranked[0])) if len(ranked) > 1 else 0.0 for ranked in rankings]


def closeness(scores: Scores) -> list[float]:
    """Compute, per item, how uncertain one model is which candidate is better: ``4 p (1 - p)`` with
    ``p = sigmoid(s_i - s_j)``, averaged over the item's pairs; 1 where all scores are equal."""

    def close(margin: float) -> float:
        return 4 * _wins(margin) * (1 - _wins(margin))

    return [_mean(close(item[i] - item[j]) for i, j in _pairs(item)) for item in scores]


def highest(values: Sequence[float], count: int) -> list[int]:
    """Return the indices of the `count` highest values, the highest first, the first of equals first."""
    return sorted(range(len(values)), key=lambda n: -values[n])[:count]


def diverse(features: np.ndarray, count: int) -> list[int]:
    """Choose `count` items far apart by their features ``[N, D]``: first the one nearest to the mean, then always the
    one whose nearest chosen item is farthest (Gonzalez 1985; core sets, Sener and Savarese 2018)."""
    features = np.asarray(features, dtype=np.float64)
    if not len(features) or count < 1:
        return []
    chosen = [int(np.square(features - features.mean(axis=0)).sum(axis=1).argmin())]
    nearest = np.full(len(features), np.inf)
    while len(chosen) < min(count, len(features)):
        nearest = np.minimum(nearest, np.square(features - features[chosen[-1]]).sum(axis=1))
        nearest[chosen] = -1.0
        chosen.append(int(nearest.argmax()))
    return chosen


def at_random(items: int, count: int, seed: int) -> list[int]:
    """Draw `count` of so many items without repetition."""
    return random.Random(f"{seed}|choose").sample(range(items), min(count, items))


def _wins(margin: float) -> float:
    return 0.5 * (1 + math.tanh(margin / 2))


def _pairs(candidates: Sequence[float]) -> Iterable[tuple[int, int]]:
    return combinations(range(len(candidates)), 2)


def _mean(values: Iterable[float]) -> float:
    """Return the mean; 0 of an item that has no pair."""
    given = list(values)
    return sum(given) / len(given) if given else 0.0
