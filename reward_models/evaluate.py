"""The reward model's report card: accuracy on held-out rankings, beside what length alone would get."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

from rlhf.evaluate import clustered_accuracy
from rlhf.records import Ranking, prompt_key

Score = Callable[..., Sequence[float | None]]


def report_card(
    score: Score, rankings: Sequence[Ranking], *, seed: int = 0, gold: Score | None = None
) -> dict[str, Any]:
    """How often `score` orders a held-out pair as its label does; ties of the score count half.

    score, gold: functions of trl's reward signature (a RewardModel is one). Returns `accuracy`, `accuracy_ci`
    (95%, bootstrap over prompts), `n` pairs, `prompts`, and `length_baseline`: the better of always choosing
    the longer and always the shorter response, on the same pairs (`length_rule` says which), with its
    interval. With `gold`, also `gold_accuracy`, `gold_accuracy_ci` and `gold_n`: agreement with the sign of the
    gold difference over all pairs of responses that gold tells apart, and `label_gold_accuracy`: how often the
    labels themselves agree with it.
    """
    scores = score_rankings(score, rankings)
    keys = [prompt_key(ranking.prompt) for ranking in rankings]
    right: list[float] = []
    longer: list[float] = []
    owners: list[str] = []
    for ranking, values, key in zip(rankings, scores, keys, strict=True):
        lengths = [float(len(response)) for response in ranking.responses]
        for better, worse in ranking.pairs():
            right.append(_ordered(values[better], values[worse]))
            longer.append(_ordered(lengths[better], lengths[worse]))
            owners.append(key)
    rule = "longer" if sum(longer) >= len(longer) / 2 else "shorter"
    baseline = longer if rule == "longer" else [1.0 - value for value in longer]
    accuracy, length = clustered_accuracy(right, owners, seed), clustered_accuracy(baseline, owners, seed)
    card: dict[str, Any] = {
        "accuracy": accuracy.value,
        "accuracy_ci": accuracy.interval,
        "n": len(right),
        "prompts": len(set(owners)),
        "length_baseline": length.value,
        "length_baseline_ci": length.interval,
        "length_rule": rule,
    }
    return card if gold is None else card | _against_gold(scores, score_rankings(gold, rankings), rankings, keys, seed)


def score_rankings(score: Score, rankings: Sequence[Ranking]) -> list[list[float]]:
    """Scores of every response, one list per ranking; extra columns reach the function as in PPO."""
    prompts = [ranking.prompt for ranking in rankings for _ in ranking.responses]
    completions = [[{"role": "assistant", "content": text}] for ranking in rankings for text in ranking.responses]
    names = sorted({name for ranking in rankings for name in ranking.columns})
    columns = {name: [r.columns.get(name) for r in rankings for _ in r.responses] for name in names}
    flat = iter(score(prompts=prompts, completions=completions, **columns))
    return [[float(next(flat) or 0.0) for _ in ranking.responses] for ranking in rankings]


def _against_gold(
    scores: list[list[float]], gold: list[list[float]], rankings: Sequence[Ranking], keys: list[str], seed: int
) -> dict[str, Any]:
    right: list[float] = []
    owners: list[str] = []
    labels: list[float] = []
    for ranking, values, truth, key in zip(rankings, scores, gold, keys, strict=True):
        for i, j in combinations(range(len(values)), 2):
            if truth[i] == truth[j]:
                continue
            better, worse = (i, j) if truth[i] > truth[j] else (j, i)
            right.append(_ordered(values[better], values[worse]))
            owners.append(key)
            if ranking.ranks[i] != ranking.ranks[j]:
                labels.append(float(ranking.ranks[better] < ranking.ranks[worse]))
    accuracy = clustered_accuracy(right, owners, seed)
    return {
        "gold_accuracy": accuracy.value,
        "gold_accuracy_ci": accuracy.interval,
        "gold_n": len(right),
        "label_gold_accuracy": sum(labels) / max(1, len(labels)),
    }


def _ordered(better: float, worse: float) -> float:
    return 1.0 if better > worse else 0.5 if better == worse else 0.0
