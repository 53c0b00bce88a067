"""Fit a moderation head to the states of a trunk that stays as it is: logistic regression, in seconds.

With few texts per category this is hard to beat, and where the trunk is trained, too, it begins from a head that does
not pull the trunk about (linear probing before fine-tuning, Kumar et al. 2202.10054).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from reward_models.words import best_ridge, fit_logistic

RIDGES = (0.1, 0.3, 1.0, 3.0)
ROUNDS = 3
"""Times that each positive text's window is chosen anew."""


class FittedHead(NamedTuple):
    """A linear head on a trunk's states."""

    weight: np.ndarray
    """[categories, states]"""
    bias: np.ndarray
    ridge: float


@dataclass(frozen=True)
class Dense:
    """A matrix of rows x states, as `fit_logistic` reads one."""

    values: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.values.shape[0]), int(self.values.shape[1])

    def times(self, weights: np.ndarray) -> np.ndarray:
        """Return the product with [states] or [states, categories]."""
        return np.asarray(self.values @ weights)

    def transposed(self, values: np.ndarray) -> np.ndarray:
        """Return the transposed matrix's product with [rows]."""
        return np.asarray(values @ self.values)


def fit_head(
    states: np.ndarray, texts: np.ndarray, labels: np.ndarray, weights: np.ndarray, seed: int = 0
) -> FittedHead:
    """Fit a head to the states of windows [s, H]. texts [s]: whose each window is, in their order; labels [n, K]: 1, 0
    or NaN (unknown); weights [n]: of the texts in the loss.

    A text's logit is the highest of its windows. So a text without a category is one without it in any window, and of a
    text with it one window counts: the one with the highest logit of the fit before, at first the mean of all. The
    ridge, on states scaled to a mean length of 1, is the one with the lowest loss on a fifth of the texts. (Scaling
    each number of a sentence's embedding to one spread made it worse.)"""
    length = float(np.linalg.norm(states, axis=1).mean()) or 1.0
    scaled = states / length
    count, sizes = len(labels), np.bincount(texts, minlength=len(labels))
    means = np.zeros((count, states.shape[1]))
    np.add.at(means, texts, scaled)
    means /= np.maximum(sizes, 1)[:, None]
    checked = np.random.default_rng(seed).permutation(count) < count // 5
    ridge = best_ridge(Dense(means), labels, checked, RIDGES, weights) if checked.any() else 1.0
    first = np.concatenate([[0], sizes.cumsum()[:-1]])
    found = [_one(scaled, means, texts, first, sizes, labels[:, n], weights, ridge) for n in range(labels.shape[1])]
    return FittedHead(np.array([w for w, _ in found]) / length, np.array([b for _, b in found]), ridge)


def _one(
    scaled: np.ndarray, means: np.ndarray, texts: np.ndarray, first: np.ndarray, sizes: np.ndarray, labels: np.ndarray,
    weights: np.ndarray, ridge: float,
) -> tuple[np.ndarray, float]:  # fmt: skip
    point = fit_logistic(Dense(means), labels, ridge, weights)
    if sizes.max(initial=0) < 2:
        return point
    positive = np.flatnonzero(labels > 0)
    for _ in range(ROUNDS):
        logits = scaled @ point[0] + point[1]
        chosen = [first[text] + int(logits[first[text] : first[text] + sizes[text]].argmax()) for text in positive]
        rows = _sorted(chosen, np.flatnonzero(labels[texts] == 0))
        point = fit_logistic(Dense(scaled[rows]), labels[texts[rows]], ridge, weights[texts[rows]])
    return point


def _sorted(chosen: Sequence[int], others: np.ndarray) -> np.ndarray:
    return np.sort(np.concatenate([np.array(chosen, dtype=np.int64), others]))
