"""Baselines that a reward model must beat to have learnt anything: length alone, and a bag of words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhf.rows.records import Ranking, split_by_prompt, split_key

_WORD = re.compile(r"\w+|[^\w\s]")
RIDGES = (1.0, 10.0, 100.0, 1000.0)
FEW_PROMPTS, FEW_PROMPTS_RIDGE = 10, 100.0
MOST_TRAINING_PAIRS = 50_000


def longer_share(rankings: Sequence[Ranking]) -> float:
    """Return the share of pairs whose preferred response is the longer one, in characters (equal lengths count
    half)."""
    lengths = [
        (len(ranking.responses[better]), len(ranking.responses[worse]))
        for ranking in rankings
        for better, worse in ranking.pairs()
    ]
    return float(np.mean([(np.sign(better - worse) + 1) / 2 for better, worse in lengths]))


@dataclass(frozen=True)
class BagOfWords:
    """A logistic model of word counts: a response's score is the sum of the weights of its words."""

    vocabulary: dict[str, int]
    weights: np.ndarray
    ridge: float
    pairs: int
    """Number of training pairs."""

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """Return [R] scores; words that training never saw have weight 0."""
        return _Counts.of(texts, self.vocabulary).times(self.weights)


def fit_bag_of_words(rankings: Sequence[Ranking], seed: int = 0) -> BagOfWords | None:
    """Fit the weights w that minimise ``sum over pairs of log(1 + exp(-w . (counts of better - counts of worse)))
    + ridge / 2 |w|^2``.

    Words are words and punctuation marks in lower case that occur in at least two responses. The ridge is the one of 1,
    10, 100 and 1000 with the smallest loss on a fifth of the prompts (100 with fewer than ten prompts). Uses the first
    rankings, up to about 50,000 pairs. Returns None where no pair or no word is left.
    """
    chosen: list[Ranking] = []
    count = 0
    for ranking in rankings:
        if count >= MOST_TRAINING_PAIRS:
            break
        count += len(ranking.pairs())
        chosen.append(ranking)
    data = _Pairs.of(chosen)
    if not len(data.better) or not data.vocabulary:
        return None
    few = len({split_key(ranking) for ranking in chosen}) < FEW_PROMPTS
    ridge = FEW_PROMPTS_RIDGE if few else _best_ridge(chosen, data.vocabulary, seed)
    return BagOfWords(data.vocabulary, minimum(data, ridge), ridge, len(data.better))


def _best_ridge(rankings: list[Ranking], vocabulary: dict[str, int], seed: int) -> float:
    fit, check = split_by_prompt(rankings, 0.2, seed)
    train, test = (_Pairs.of(part, vocabulary) for part in (fit, check))
    if not len(train.better) or not len(test.better):
        return FEW_PROMPTS_RIDGE
    losses, weights = {}, None
    for ridge in sorted(RIDGES, reverse=True):
        weights = minimum(train, ridge, weights)
        losses[ridge] = float(np.logaddexp(0.0, -test.differences(weights)).mean())
    return min(losses, key=lambda ridge: losses[ridge])


def minimum(data: _Pairs, ridge: float, start: np.ndarray | None = None) -> np.ndarray:
    """Find the minimising weights by Newton's method, each step solved by conjugate gradients: the loss is convex."""
    weights = np.zeros(len(data.vocabulary)) if start is None else start.copy()

    def objective(w: np.ndarray) -> float:
        return float(np.logaddexp(0.0, -data.differences(w)).sum() + 0.5 * ridge * (w @ w))

    value = objective(weights)
    for _ in range(30):
        wrong = _sigmoid(-data.differences(weights))
        gradient = ridge * weights - data.transposed(wrong)
        if np.linalg.norm(gradient) <= 1e-6 * max(1.0, len(data.better)):
            break
        step = _conjugate_gradients(data, wrong * (1 - wrong), ridge, -gradient)
        size = 1.0
        while size > 1e-6 and objective(weights + size * step) > value:
            size /= 2
        weights = weights + size * step
        value, before = objective(weights), value
        if before - value <= 1e-9 * abs(before):
            break
    return weights


def _conjugate_gradients(data: _Pairs, curvature: np.ndarray, ridge: float, target: np.ndarray) -> np.ndarray:
    x = np.zeros_like(target)
    residual, direction = target.copy(), target.copy()
    norm = residual @ residual
    for _ in range(100):
        product = ridge * direction + data.transposed(curvature * data.differences(direction))
        step = norm / (direction @ product)
        x, residual = x + step * direction, residual - step * product
        before, norm = norm, residual @ residual
        if norm <= 1e-6 * (target @ target):
            break
        direction = residual + norm / before * direction
    return x


@dataclass(frozen=True)
class _Counts:
    """Word counts of R texts as a sparse matrix: entry k is `counts[k]` at (rows[k], words[k])."""

    rows: np.ndarray
    words: np.ndarray
    counts: np.ndarray
    size: int

    @classmethod
    def of(cls, texts: Sequence[str], vocabulary: dict[str, int]) -> _Counts:
        entries = [
            (row, vocabulary[word], count)
            for row, text in enumerate(texts)
            for word, count in Counter(words_of(text)).items()
            if word in vocabulary
        ]
        rows, words, counts = np.array(entries, dtype=np.int64).reshape(-1, 3).T
        return cls(rows, words, counts.astype(np.float64), len(texts))

    def times(self, weights: np.ndarray) -> np.ndarray:
        return np.bincount(self.rows, weights=self.counts * weights[self.words], minlength=self.size)

    def transposed(self, values: np.ndarray, words: int) -> np.ndarray:
        return np.bincount(self.words, weights=self.counts * values[self.rows], minlength=words)


@dataclass(frozen=True)
class _Pairs:
    """The matrix of differences of word counts, pairs x words, as products with vectors; never stored whole."""

    counts: _Counts
    vocabulary: dict[str, int]
    better: np.ndarray
    worse: np.ndarray

    @classmethod
    def of(cls, rankings: Sequence[Ranking], vocabulary: dict[str, int] | None = None) -> _Pairs:
        texts = [text for ranking in rankings for text in ranking.responses]
        if vocabulary is None:
            seen = Counter(word for text in texts for word in set(words_of(text)))
            vocabulary = {word: number for number, word in enumerate(sorted(w for w, n in seen.items() if n > 1))}
        pairs, at = [], 0
        for ranking in rankings:
            pairs += [(at + i, at + j) for i, j in ranking.pairs()]
            at += len(ranking.responses)
        better, worse = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        return cls(_Counts.of(texts, vocabulary), vocabulary, better, worse)

    def differences(self, weights: np.ndarray) -> np.ndarray:
        scores = self.counts.times(weights)
        return scores[self.better] - scores[self.worse]

    def transposed(self, values: np.ndarray) -> np.ndarray:
        size = self.counts.size
        spread = np.bincount(self.better, values, minlength=size) - np.bincount(self.worse, values, minlength=size)
        return self.counts.transposed(spread, len(self.vocabulary))


def words_of(text: str) -> list[str]:
    """Return a text's words and punctuation marks in lower case."""
    return _WORD.findall(text.lower())


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -x))
