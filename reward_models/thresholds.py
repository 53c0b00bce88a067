"""Calibration and thresholds of a classifier's category, from held-out logits and labels. NumPy alone.

`calibrate` fits ``sigmoid(scale z + shift)``. `threshold_for` chooses the probability from which a text is flagged so
that a wanted share of negatives is. `average_precision` and `true_positive_rate_at` measure.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from rlhf.intervals import Estimate, proportion

PRIOR = 1.0
"""Standard deviation of log(scale) and shift before any label is seen: few labels move them little from 0."""


class Calibration(NamedTuple):
    """Turns a logit z into the probability sigmoid(scale z + shift)."""

    scale: float = 1.0
    shift: float = 0.0

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        """Return probabilities."""
        return np.exp(-np.logaddexp(0.0, -(self.scale * np.asarray(logits, dtype=np.float64) + self.shift)))


def calibrate(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> Calibration:
    """Fit Platt's two numbers (1999) to held-out logits and labels, both [n].

    Minimises ``sum v log(1 + exp(-y (e^s z + b))) + (s^2 + b^2) / (2 PRIOR^2)``, v the weights (1 each), so a category
    with few labels stays near its own logits, which the training loss has calibrated as well as it could; without
    labels it stays there.
    """
    logits, signs = np.asarray(logits, dtype=np.float64), np.where(np.asarray(labels) > 0, 1.0, -1.0)
    weights = np.ones(len(logits)) if weights is None else weights
    point = np.zeros(2)

    def loss(at: np.ndarray) -> float:
        z = math.exp(at[0]) * logits + at[1]
        return float((weights * np.logaddexp(0.0, -signs * z)).sum() + (at @ at) / (2 * PRIOR**2))

    value = loss(point)
    for _ in range(100):
        scaled = math.exp(point[0]) * logits
        wrong = np.exp(-np.logaddexp(0.0, signs * (scaled + point[1])))
        pull, curved = -weights * signs * wrong, weights * wrong * (1 - wrong)
        gradient = np.array([(pull * scaled).sum(), pull.sum()]) + point / PRIOR**2
        cross = float((curved * scaled).sum())
        # Gauss and Newton's matrix: the true one may have a direction upwards
        matrix = np.array([[(curved * scaled**2).sum(), cross], [cross, curved.sum()]]) + np.eye(2) / PRIOR**2
        step, size = -np.linalg.solve(matrix, gradient), 1.0
        while size > 1e-8 and loss(point + size * step) > value:
            size /= 2
        point = point + size * step
        value, before = loss(point), value
        if before - value <= 1e-12 * max(1.0, abs(before)):
            break
    return Calibration(math.exp(point[0]), float(point[1]))


class Threshold(NamedTuple):
    """The probability from which a text is flagged, and how many of the negatives that it was chosen on are."""

    value: float
    flagged: int
    negatives: int

    @property
    def false_positive_rate(self) -> Estimate | None:
        """Return the share of negatives that are flagged, with its interval; None without a negative."""
        return proportion(self.flagged, self.negatives) if self.negatives else None


def threshold_for(
    probabilities: np.ndarray, labels: np.ndarray, wanted: float, weights: np.ndarray | None = None
) -> Threshold:
    """Choose the lowest threshold at which at most the share `wanted` of the negatives, by their weights, is flagged
    (probability at or above it); it lies in the middle between two negatives, or halfway from the highest one to 1.

    Without a negative it is 0.5."""
    own = np.asarray(labels) <= 0
    if not own.any():
        return Threshold(0.5, 0, 0)
    negatives = np.asarray(probabilities, dtype=np.float64)[own]
    order = np.argsort(-negatives, kind="stable")
    negatives, shares = negatives[order], (np.ones(len(order)) if weights is None else weights[own][order]).cumsum()
    allowed = int((shares <= wanted * shares[-1] + 1e-9).sum())
    while 0 < allowed < len(negatives) and negatives[allowed - 1] == negatives[allowed]:
        allowed -= 1  # equal probabilities are flagged together
    above = negatives[allowed - 1] if allowed else 1.0
    below = negatives[allowed] if allowed < len(negatives) else 0.0
    value = float((above + below) / 2)
    if value <= below:  # no number between them, or the highest negative is sure
        value = float(np.nextafter(below, 2.0))
    return Threshold(value, int((negatives >= value).sum()), len(negatives))


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """Compute ``sum over thresholds of (recall - recall before) * precision``, the area under the precision-recall
    curve without interpolation; equal scores share a threshold. None without a positive."""
    labels = np.asarray(labels) > 0
    if not labels.any():
        return None
    order = np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable")
    sorted_scores, hits = np.asarray(scores, dtype=np.float64)[order], labels[order].cumsum()
    last = np.append(np.diff(sorted_scores) != 0, True)
    found, seen = hits[last], np.flatnonzero(last) + 1
    gained = np.diff(found, prepend=0)
    return float((gained * found / seen).sum() / hits[-1])


def true_positive_rate_at(scores: np.ndarray, labels: np.ndarray, false_positive_rate: float) -> float | None:
    """Compute the share of positives that are flagged at the lowest threshold that flags at most this share of the
    negatives; None without either. (Of the data at hand: `threshold_for` chooses on other texts.)"""
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels) > 0
    if not labels.any() or labels.all():
        return None
    negatives = np.sort(scores[~labels])[::-1]
    allowed = int(false_positive_rate * len(negatives) + 1e-9)
    return float((scores[labels] > negatives[allowed]).mean()) if allowed < len(negatives) else 1.0
