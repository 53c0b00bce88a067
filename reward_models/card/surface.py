"""Surface features of a response (length, punctuation, lists, ...), and how far a reward model's scores follow them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from reward_models.card.pairs import Numbers, ScoredPairs, accuracy, length_differences

MATCHED = 0.1
"""Two lengths are matched when they differ by at most this share of the longer."""
_REFUSAL = re.compile(
    r"\b(i('m| am)? (sorry|unable|not able)|i (can('|no)t|cannot|won't|will not|must decline|don't feel comfortable)"
    r"|i apologi[sz]e|as an ai\b)",
    re.IGNORECASE,
)

FEATURES: dict[str, Callable[[str], float]] = {
    "characters": len,
    "words": lambda text: len(text.split()),
    "sentences": lambda text: len(re.findall(r"[.!?]+(?=\s|$)", text)),
    "line breaks": lambda text: text.count("\n"),
    "list items": lambda text: len(re.findall(r"(?m)^\s*(?:[-*•]|\d+[.)])\s", text)),
    "punctuation": lambda text: len(re.findall(r"[^\w\s]", text)),
    "digits": lambda text: len(re.findall(r"\d", text)),
    "refusal phrases": lambda text: len(_REFUSAL.findall(text.replace("’", "'"))),
}


def surface(pairs: ScoredPairs, seed: int) -> Numbers:
    """Compute `features` and `length_matched`.

    `features`, a row each: `spearman`, its rank correlation with the score over all responses; `n`, the pairs in which
    it differs; and the share of these in which the model (`model_prefers_more`) and the labels (`labels_prefer_more`)
    prefer the response with more of it. A model far above the labels rewards the feature itself.
    `length_matched`: accuracy on the pairs whose lengths in characters differ by at most 10%; None without such a pair.
    """
    rows = []
    for name, count in FEATURES.items():
        values = np.array([count(text) for text in pairs.texts], dtype=np.float64)
        more = np.sign(values[pairs.better] - values[pairs.worse])
        differ = more != 0
        model = (np.sign(pairs.differences) * more + 1) / 2
        rows.append(
            {
                "feature": name,
                "spearman": spearman(values, pairs.scores),
                "model_prefers_more": float(model[differ].mean()) if differ.any() else None,
                "labels_prefer_more": float((more[differ] > 0).mean()) if differ.any() else None,
                "n": int(differ.sum()),
            }
        )
    matched = np.abs(length_differences(pairs)) <= MATCHED
    card = accuracy(pairs.right[matched], pairs.prompts[matched], seed) if matched.any() else None
    return {"features": rows, "length_matched": card}


def spearman(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float | None:
    """Compute the rank correlation, with equal values sharing their mean rank; None where one side does not vary."""
    a, b = (_ranks(np.asarray(values, dtype=np.float64)) for values in (x, y))
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt(float((a * a).sum() * (b * b).sum()))
    return float((a * b).sum() / norm) if norm > 0 else None


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + 1 + last) / 2)[inverse]
