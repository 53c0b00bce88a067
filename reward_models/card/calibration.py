"""Calibration of a reward model: whether its probabilities match the labels.

By Bradley-Terry, the first of two responses is preferred with probability sigmoid(score difference). Confidence is the
probability of the response that the model prefers, 0.5 to 1. Differences must be of raw scores, which the loss was
computed on, not of normalised ones.
"""

from __future__ import annotations

import numpy as np

from reward_models.card.pairs import Numbers

BINS = 10


def calibration(differences: np.ndarray, prompts: np.ndarray, seed: int) -> Numbers:
    """Compute ECE, Brier score, loss and reliability curve of sigmoid(differences), raw and divided by a temperature.

    differences: [n] score of the preferred response minus the other's. prompts: [n] clusters.
    `temperature` minimises the loss on all pairs. The calibrated numbers are cross-fitted (each half of the prompts
    with the temperature of the other half), since a temperature looks too good on the pairs that it was fitted on.
    `temperature` is None where none helps: the model is right no more often than wrong, or never wrong.
    """
    halves = _halves(prompts, seed)
    calibrated = np.zeros_like(differences)
    for half in (halves, ~halves):
        scale = inverse_temperature(differences[~half]) if (~half).any() else None
        calibrated[half] = differences[half] * (1.0 if scale is None else scale)
    scale = inverse_temperature(differences)
    return {
        **reliability(differences),
        "confidence_auc": confidence_auc(differences),
        "temperature": None if scale is None or scale == 0 else 1 / scale,
        "calibrated": reliability(calibrated),
    }


def reliability(differences: np.ndarray) -> Numbers:
    """Compute `ece`, `brier`, `nll` and `curve` of score differences [n].

    `ece`: mean over pairs of |accuracy - confidence| per bin (10 of equal width from 0.5 to 1; Guo et al. 1706.04599).
    `brier`: mean of (1 - probability of the preferred response)^2; a coin has 0.25. `nll`: mean of -log of that
    probability, in nats; a coin has 0.693. `curve`: confidence, accuracy and size of each bin that holds a pair.
    """
    preferred = _sigmoid(differences)
    confidence = _sigmoid(np.abs(differences))
    right = (np.sign(differences) + 1) / 2
    bins = np.clip(np.floor((confidence - 0.5) * 2 * BINS).astype(int), 0, BINS - 1)
    curve = [
        {"confidence": float(confidence[bins == b].mean()), "accuracy": float(right[bins == b].mean()),
         "n": int((bins == b).sum())}
        for b in range(BINS) if (bins == b).any()
    ]  # fmt: skip
    ece = sum(row["n"] * abs(row["accuracy"] - row["confidence"]) for row in curve) / len(differences)
    loss = float(np.logaddexp(0.0, -differences).mean())
    return {"ece": float(ece), "brier": float(((1 - preferred) ** 2).mean()), "nll": loss, "curve": curve}


def inverse_temperature(differences: np.ndarray) -> float | None:
    """Find the 1 / T that minimises the mean of log(1 + exp(-differences / T)), by bisection: it is convex in 1 / T.

    Returns 0 where the best T is infinite (the model is wrong at least as much as right), None where it is 0 (the
    model is never wrong).
    """
    size = float(np.abs(differences).max(initial=0.0))
    if size == 0 or float(differences.mean()) <= 0:  # the slope at 1/T = 0 is -mean/2: no way down
        return 0.0
    if (differences >= 0).all():
        return None
    low, high = 0.0, 1 / size
    while _slope(differences, high) < 0:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _slope(differences, middle) < 0 else (low, middle)
    return (low + high) / 2


def confidence_auc(differences: np.ndarray) -> float | None:
    """Return the probability that a right pair has a wider margin than a wrong one (ties count half).

    At 0.5 the margins carry no information, at 1 they separate right pairs from wrong ones. None where the model is
    never wrong, or never right.
    """
    size = np.abs(differences)
    return auc(size[differences > 0], size[differences < 0])


def auc(positive: np.ndarray, negative: np.ndarray) -> float | None:
    """Return the share of (positive, negative) couples with the positive one higher, ties counting half
    (Mann-Whitney); None without a couple."""
    if not len(positive) or not len(negative):
        return None
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, side="left")
    ties = np.searchsorted(ordered, positive, side="right") - below
    return float((below + 0.5 * ties).sum() / (len(positive) * len(negative)))


def _slope(differences: np.ndarray, scale: float) -> float:
    return float(-(differences * _sigmoid(-scale * differences)).mean())


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -x))


def _halves(prompts: np.ndarray, seed: int) -> np.ndarray:
    """Return a mask [n], True on the pairs of a random half of the prompts."""
    numbers = np.unique(prompts)
    chosen = np.random.default_rng(seed).permutation(numbers)[: (len(numbers) + 1) // 2]
    return np.isin(prompts, chosen)
