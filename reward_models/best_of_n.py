"""Best-of-n by any scorer, and by a vote over extracted answers: what each is expected to reach for n = 1 .. N.

With N responses per prompt, every n up to N is estimated without bias from all subsets of n, and not from the first n
alone (as in WebGPT, Nakano et al. 2112.09332, appendix). Arrays are [P, N]: prompts, and their responses.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Hashable, Sequence

import numpy as np

SUBSETS = 200
"""Orders of a prompt's responses over which votes are averaged, where there are more than `EXACT`."""
EXACT = 120
_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")

Answers = Sequence[Sequence[Hashable | None]]
"""The answer of every response, None where it gives none."""


def best_of_n_chances(count: int, most: int) -> np.ndarray:
    """Compute the chances ``[most, count]`` that a response is the best of n drawn without replacement from `count`.

    Row n - 1, column r - 1 is of n and of the response of rank r (1 the lowest): ``C(r - 1, n - 1) / C(count, n)``."""
    ranks = np.arange(1, count + 1, dtype=np.float64)
    rows = [np.full(count, 1 / count)]
    for n in range(2, most + 1):  # the ratio of two rows, since the binomials themselves grow beyond float64
        rows.append(rows[-1] * np.clip(ranks - n + 1, 0, None) / (n - 1) * n / (count - n + 1))
    return np.stack(rows)


def scored_curves(scores: np.ndarray, quality: np.ndarray) -> np.ndarray:
    """Compute [P, N]: the expected quality of the response with the highest score among n = 1 .. N of a prompt's.

    Exact, over all C(N, n) subsets; responses with equal scores share their chance."""
    chances = best_of_n_chances(scores.shape[1], scores.shape[1])
    curves = np.empty(scores.shape)
    for row, (own, worth) in enumerate(zip(scores, quality, strict=True)):
        order = np.argsort(own, kind="stable")
        _, tied = np.unique(own[order], return_inverse=True)
        means = np.bincount(tied, weights=worth[order]) / np.bincount(tied)
        curves[row] = chances @ means[tied]
    return curves


def vote_curves(answers: Answers, weights: np.ndarray, quality: np.ndarray, seed: int) -> np.ndarray:
    """Compute [P, N]: the expected quality of the answer with most votes among n = 1 .. N responses.

    A response votes for its answer with its weight (all 1: the majority, as in self-consistency, Wang et al.
    2203.11171); one without an answer does not vote. Answers with equal votes share. An answer's quality is the mean of
    its responses' in the subset, and of a subset without any answer that of all its responses. The mean is over the
    beginnings of all orders of the responses where there are at most 120 (N <= 5), else of 200 drawn with the seed:
    the beginning of a random order is a random subset."""
    count = quality.shape[1]
    draw = np.random.default_rng(seed)
    if math.factorial(count) <= EXACT:
        orders = np.array(list(itertools.permutations(range(count))))
    else:
        orders = np.stack([draw.permutation(count) for _ in range(SUBSETS)])
    return np.stack(
        [_vote_curve(own, votes, worth, orders) for own, votes, worth in zip(answers, weights, quality, strict=True)]
    )


def _vote_curve(
    answers: Sequence[Hashable | None], weights: np.ndarray, quality: np.ndarray, orders: np.ndarray
) -> np.ndarray:
    known = {answer: place for place, answer in enumerate(dict.fromkeys(a for a in answers if a is not None))}
    given = np.zeros((len(answers), max(1, len(known))))
    for row, answer in enumerate(answers):
        if answer is not None:
            given[row, known[answer]] = 1.0
    votes = (given * weights[:, None])[orders].cumsum(axis=1)  # [orders, n, answers]
    counts = given[orders].cumsum(axis=1)
    worth = (given * quality[:, None])[orders].cumsum(axis=1) / np.maximum(counts, 1)
    most = np.where(counts > 0, votes, -np.inf).max(axis=-1, keepdims=True)
    won = (votes == most) & (counts > 0)
    unanswered = quality[orders].cumsum(axis=1) / np.arange(1, len(answers) + 1)
    reached = (won * worth).sum(axis=-1) / np.maximum(won.sum(axis=-1), 1)
    return np.asarray(np.where(won.any(axis=-1), reached, unanswered).mean(axis=0))


def vote_weights(scores: np.ndarray) -> np.ndarray:
    """Return weights for a vote: scores that are probabilities (all within [0, 1]) as they are, others by a sigmoid,
    which is Bradley-Terry's probability of beating a response with score 0."""
    within = scores.min() >= 0 and scores.max() <= 1
    return scores if within else np.exp(-np.logaddexp(0.0, -scores))


def voted(answers: Answers, weights: np.ndarray) -> list[int | None]:
    """Choose a response per prompt by a vote: of the answer with most votes, the response with the largest weight.

    The first of equals; None where no response gives an answer."""
    chosen: list[int | None] = []
    for own, weight in zip(answers, weights, strict=True):
        votes: dict[Hashable, float] = {}
        for answer, vote in zip(own, weight, strict=True):
            if answer is not None:
                votes[answer] = votes.get(answer, 0.0) + float(vote)
        best = max(votes, key=lambda answer: votes[answer], default=None)
        rows = [row for row, answer in enumerate(own) if best is not None and answer == best]
        chosen.append(max(rows, key=lambda row: weight[row], default=None))
    return chosen


def extracted_answer(text: str, pattern: re.Pattern[str]) -> Hashable | None:
    """Return the answer in a text: the last match of the pattern (of its first group, if it has one), None without one.

    Answers that differ in case, white space, a full stop or comma at the end, or in how a number is written ("1,200.0"
    and "1200", "-$5" and "-5") are one. A comma that parts no thousands, as in "1,2", makes a text."""
    found = [match[1] if pattern.groups else match[0] for match in pattern.finditer(text)]
    found = [match for match in found if match is not None and match.strip()]
    if not found:
        return None
    plain = " ".join(found[-1].casefold().split()).rstrip(".,")
    number = re.sub(r"^(-?)\$ ?", r"\1", plain)
    return float(number.replace(",", "")) if _NUMBER.fullmatch(number) else plain
