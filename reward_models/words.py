"""A bag of words that says how likely each category of a text is: what costs nothing, and a trunk must beat.

Features are words and pairs of neighbouring words, weighted by ``(1 + log count) log((1 + n) / (1 + texts))`` and
scaled to length 1; a logistic model per category is fitted to them with a ridge that is chosen on a fifth of the texts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol
from zipfile import BadZipFile

import numpy as np

from reward_models.card.baselines import words_of
from rlhf.errors import InputError, reason

RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0)
MOST_FEATURES, MOST_TEXTS = 50_000, 20_000
STEPS = 30


@dataclass(frozen=True)
class WordClassifier:
    """Logistic models of a text's words. `weights` and `bias`: [features, categories] and [categories]."""

    categories: tuple[str, ...]
    vocabulary: Mapping[str, int]
    rarity: np.ndarray
    """[features] log((1 + n) / (1 + texts that have it))."""
    weights: np.ndarray
    bias: np.ndarray
    ridge: float

    def save(self, path: str | Path) -> None:
        """Write one .npz file."""
        arrays: dict[str, Any] = {name: getattr(self, name) for name in ("rarity", "weights", "bias")}
        names: dict[str, Any] = {
            "categories": np.array(self.categories),
            "vocabulary": np.array(list(self.vocabulary) or [""]),
        }
        np.savez_compressed(path, **arrays, **names, ridge=np.array(self.ridge))

    @classmethod
    def load(cls, path: str | Path) -> WordClassifier:
        """Read what `save` wrote. Raises InputError."""
        try:
            with np.load(path, allow_pickle=False) as held:
                terms = [str(term) for term in held["vocabulary"] if term]
                vocabulary, names = {term: n for n, term in enumerate(terms)}, tuple(map(str, held["categories"]))
                found = cls(names, vocabulary, held["rarity"], held["weights"], held["bias"], float(held["ridge"]))
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            raise InputError(
                f"{path}: no bag of words could be read ({reason(error)}); copy the folder again"
            ) from None
        if found.weights.shape != (len(vocabulary), len(names)) or len(found.rarity) != len(vocabulary):
            raise InputError(f"{path}: its weights do not fit its words; copy the folder again")
        return found

    def logits(self, texts: Sequence[str]) -> np.ndarray:
        """Return [texts, categories]; words that training never saw count nothing."""
        return self.bias + _features(texts, self.vocabulary, self.rarity).times(self.weights)


def drawn_texts(weights: np.ndarray, seed: int) -> np.ndarray:
    """Draw at most `MOST_TEXTS` of the texts that weigh anything, with the seed; return their indices, in order."""
    return np.sort(np.random.default_rng(seed).permutation(np.flatnonzero(weights))[:MOST_TEXTS])


def fit_words(
    texts: Sequence[str], labels: np.ndarray, categories: Sequence[str], seed: int = 0,
    weights: np.ndarray | None = None,
) -> WordClassifier:  # fmt: skip
    """Fit a bag of words, to the texts that `drawn_texts` draws. labels: [texts, categories], 1, 0 or NaN (unknown,
    left out of that category). weights: [texts], of each text in the loss, scaled to 1 on average."""
    weights = np.ones(len(texts)) if weights is None else weights
    if not weights.any():
        raise InputError("weight: every text weighs 0; give some of them a weight above 0")
    drawn = drawn_texts(weights, seed)
    texts, labels, weights = [texts[n] for n in drawn], labels[drawn], weights[drawn] / weights[drawn].mean()
    counted = [Counter(_terms(text)) for text in texts]
    seen = Counter(term for terms in counted for term in terms)
    usable = sorted(term for term, n in seen.items() if n > 1 and "\0" not in term)
    kept = sorted(usable, key=lambda term: -seen[term])[:MOST_FEATURES]
    vocabulary = {term: number for number, term in enumerate(sorted(kept))}
    rarity = np.array([math.log((1 + len(texts)) / (1 + seen[term])) for term in vocabulary])
    data = _features(texts, vocabulary, rarity)
    checked = np.random.default_rng(seed).permutation(len(texts)) < len(texts) // 5
    ridge = best_ridge(data, labels, checked, RIDGES, weights) if checked.any() else 1.0
    found = [fit_logistic(data, labels[:, n], ridge, weights) for n in range(len(categories))]
    point, bias = np.array([w for w, _ in found]).T, np.array([b for _, b in found])
    return WordClassifier(tuple(categories), vocabulary, rarity, point.reshape(-1, len(categories)), bias, ridge)


def _terms(text: str) -> list[str]:
    words = words_of(text)
    return [*words, *(f"{one} {other}" for one, other in pairwise(words))]


class Matrix(Protocol):
    """Rows x features, as products with vectors."""

    @property
    def shape(self) -> tuple[int, int]: ...
    def times(self, weights: np.ndarray) -> np.ndarray: ...
    def transposed(self, values: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class _Sparse:
    """A sparse matrix of texts x features, by its entries."""

    rows: np.ndarray
    columns: np.ndarray
    values: np.ndarray
    shape: tuple[int, int]

    def times(self, weights: np.ndarray) -> np.ndarray:
        """Return the product with [features] or [features, categories]."""
        if weights.ndim == 1:
            return np.bincount(self.rows, weights=self.values * weights[self.columns], minlength=self.shape[0])
        return np.stack([self.times(column) for column in weights.T], axis=1)

    def transposed(self, values: np.ndarray) -> np.ndarray:
        return np.bincount(self.columns, weights=self.values * values[self.rows], minlength=self.shape[1])


def _features(texts: Sequence[str], vocabulary: Mapping[str, int], rarity: np.ndarray) -> _Sparse:
    rows, columns, values = [], [], []
    for row, text in enumerate(texts):
        held = [(vocabulary[term], n) for term, n in Counter(_terms(text)).items() if term in vocabulary]
        sizes = np.array([1 + math.log(n) for _, n in held]) * rarity[[column for column, _ in held]]
        norm = float(np.sqrt((sizes * sizes).sum())) or 1.0
        rows += [row] * len(held)
        columns += [column for column, _ in held]
        values += (sizes / norm).tolist()
    shape = (len(texts), len(vocabulary))
    return _Sparse(np.array(rows, dtype=np.int64), np.array(columns, dtype=np.int64), np.array(values), shape)


def best_ridge(
    data: Matrix, labels: np.ndarray, checked: np.ndarray, ridges: Sequence[float], weights: np.ndarray
) -> float:
    """Return the ridge with the lowest weighted loss, over all known labels of the rows in `checked`, of models fitted
    to the others."""
    train = np.where(checked[:, None], np.nan, labels)
    losses = {}
    for ridge in ridges:
        losses[ridge] = 0.0
        for n in range(labels.shape[1]):
            point, bias = fit_logistic(data, train[:, n], ridge, weights)
            held = checked & ~np.isnan(labels[:, n])
            signed = np.where(labels[held, n] > 0, 1, -1) * (data.times(point) + bias)[held]
            losses[ridge] += float((weights[held] * np.logaddexp(0.0, -signed)).sum())
    return min(losses, key=lambda ridge: losses[ridge])


def fit_logistic(data: Matrix, labels: np.ndarray, ridge: float, weights: np.ndarray) -> tuple[np.ndarray, float]:
    """Minimise the sum of ``v log(1 + exp(-y (x w + b))) + ridge / 2 |w|^2`` over known labels, y 1 or -1, v the rows'
    weights, by Newton's method with conjugate gradients. With labels of one kind alone, the bias is that of their
    smoothed share."""
    counted = np.where(np.isnan(labels), 0.0, weights)
    signs = np.where(labels > 0, 1.0, -1.0)
    positive, negative = float(counted[signs > 0].sum()), float(counted[signs < 0].sum())
    bias = math.log((positive + 0.5) / (negative + 0.5))
    point = np.zeros(data.shape[1] + 1)
    point[-1] = bias
    if not positive or not negative:
        return point[:-1], bias
    penalty = np.full(len(point), ridge)
    penalty[-1] = 0.0

    def logits(at: np.ndarray) -> np.ndarray:
        return data.times(at[:-1]) + at[-1]

    def loss(at: np.ndarray) -> float:
        return float((counted * np.logaddexp(0.0, -signs * logits(at))).sum() + 0.5 * (penalty * at * at).sum())

    value = loss(point)
    for _ in range(STEPS):
        wrong = np.exp(-np.logaddexp(0.0, signs * logits(point)))
        pull = counted * signs * wrong
        gradient = penalty * point - np.append(data.transposed(pull), pull.sum())
        step = _solve(data, counted * wrong * (1 - wrong), penalty, -gradient)
        size = 1.0
        while size > 1e-6 and loss(point + size * step) > value:
            size /= 2
        point = point + size * step
        value, before = loss(point), value
        if before - value <= 1e-7 * abs(before):
            break
    return point[:-1], float(point[-1])


def _solve(data: Matrix, curvature: np.ndarray, penalty: np.ndarray, target: np.ndarray) -> np.ndarray:
    x, residual, direction = np.zeros_like(target), target.copy(), target.copy()
    norm = residual @ residual
    for _ in range(100):
        if norm <= 1e-8 * (target @ target):  # at once where the target is zero: labels that cancel out
            break
        curved = curvature * (data.times(direction[:-1]) + direction[-1])
        product = penalty * direction + np.append(data.transposed(curved), curved.sum())
        step = norm / (direction @ product)
        x, residual = x + step * direction, residual - step * product
        before, norm = norm, residual @ residual
        direction = residual + norm / before * direction
    return x
