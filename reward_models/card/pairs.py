"""Scored pairs, and numbers of the report card: accuracy overall and by group, spread, the worst pairs, best-of-n.

Everything works on `ScoredPairs`: flat arrays over R responses and n pairs, made once from rankings and their scores.
An interval is a 95% one over prompts (`rlhf.intervals`), since the pairs of one prompt are not independent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np

from reward_models.best_of_n import best_of_n_chances
from rlhf.errors import InputError
from rlhf.intervals import best_of_n_kl, bootstrap_interval, clustered_accuracy, clustered_mean
from rlhf.rows.records import Ranking, split_key

Numbers = dict[str, Any]
"""A part of reward_report.json: numbers, texts and further parts by name."""

GROUP_COLUMNS = ("section", "subset", "category", "family", "task", "domain", "topic", "source", "dataset", "language")
"""Columns by which accuracy is split where the data has them."""
LABELER_COLUMNS = ("labeler", "annotator", "worker", "agreement", "labeler_agreement", "annotator_agreement")
MOST_GROUPS = 40
REWARDBENCH = {
    "Chat": ("alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med"),
    "Chat Hard": ("mt-bench-hard", "llmbar-natural", "llmbar-adver-neighbor", "llmbar-adver-GPTInst",
                  "llmbar-adver-GPTOut", "llmbar-adver-manual"),
    "Safety": ("refusals-dangerous", "refusals-offensive", "xstest-should-refuse", "xstest-should-respond",
               "donotanswer"),
    "Reasoning": ("math-prm", "hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust"),
}  # fmt: skip
"""RewardBench's sections and their subsets (Lambert et al. 2403.13787, table 1)."""


@dataclass(frozen=True)
class ScoredPairs:
    """Responses, their scores, and the pairs of them with different ranks and texts."""

    rankings: tuple[Ranking, ...]
    texts: tuple[str, ...]
    """[R] responses, ranking after ranking."""
    scores: np.ndarray
    """[R] float64."""
    ranking_of: np.ndarray
    """[R] index of each response's ranking."""
    prompt_of: np.ndarray
    """[R] number of each response's prompt; rankings of the same prompt share it."""
    better: np.ndarray
    """[n] index of each pair's preferred response."""
    worse: np.ndarray
    """[n] index of each pair's other response."""
    ties: int
    """Number of pairs left out, with equal ranks or the same text twice."""

    @property
    def differences(self) -> np.ndarray:
        """[n] score of the preferred response minus the other's: below 0 the model is wrong."""
        return self.scores[self.better] - self.scores[self.worse]

    @property
    def right(self) -> np.ndarray:
        """[n] 1 where the model is right, 0 where it is wrong, 0.5 where both score the same."""
        return outcomes(self.differences)

    @property
    def prompts(self) -> np.ndarray:
        """[n] number of each pair's prompt: the clusters of every interval."""
        return self.prompt_of[self.better]


def outcomes(differences: np.ndarray) -> np.ndarray:
    """Return 1 above 0, 0 below, 0.5 at 0."""
    return (np.sign(differences) + 1) / 2


def scored_pairs(rankings: Sequence[Ranking], scores: Sequence[Sequence[float]]) -> ScoredPairs:
    """Make `ScoredPairs` of rankings and the scores of their responses, one list per ranking.

    Raises InputError where no pair is left, or a score is not finite.
    """
    if not rankings:
        raise InputError("report card: got no pairs; hand in at least one")
    flat = np.array([score for row in scores for score in row], dtype=np.float64)
    if not np.isfinite(flat).all():
        bad = int((~np.isfinite(flat)).sum())
        raise InputError(f"report card: {bad} of {len(flat)} scores are NaN or infinite; is the reward model broken?")
    sizes = [len(ranking.responses) for ranking in rankings]
    first = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(int)
    pairs = [(at + i, at + j) for at, ranking in zip(first, rankings, strict=True) for i, j in ranking.pairs()]
    if not pairs:
        raise InputError(f"report card: all {len(rankings)} rows are ties or identical texts; nothing can be compared")
    numbers: dict[str, int] = {}
    prompts = [numbers.setdefault(split_key(ranking), len(numbers)) for ranking in rankings]
    better, worse = np.array(pairs, dtype=int).T
    return ScoredPairs(
        rankings=tuple(rankings),
        texts=tuple(text for ranking in rankings for text in ranking.responses),
        scores=flat,
        ranking_of=np.repeat(np.arange(len(rankings)), sizes),
        prompt_of=np.repeat(prompts, sizes),
        better=better,
        worse=worse,
        ties=sum(comb(size, 2) for size in sizes) - len(pairs),
    )


def accuracy(right: np.ndarray, prompts: np.ndarray, seed: int) -> Numbers:
    """Compute `accuracy`, `accuracy_ci`, `n` (pairs) and `prompts` of outcomes [n]."""
    estimate = clustered_accuracy(right.tolist(), prompts.tolist(), seed)
    counts = {"n": len(right), "prompts": len(set(prompts.tolist()))}
    return {"accuracy": estimate.value, "accuracy_ci": estimate.interval, **counts}


def difference(right: np.ndarray, other: np.ndarray, prompts: np.ndarray, seed: int) -> Numbers:
    """Compute how much more often one scorer is right than another on the same pairs, with the interval of the paired
    difference over prompts. `seed`: as in `rlhf.intervals.win_rate`."""
    estimate = clustered_mean(right - other, prompts.tolist(), bounds=(-1.0, 1.0))
    return {"difference": estimate.value, "difference_ci": estimate.interval}


# ------------------------------------------------------------------------------------------------- groups


def by_column(pairs: ScoredPairs, name: str, seed: int) -> list[Numbers]:
    """Compute accuracy per value of a data column: the largest groups (at most 40), in the order of their values."""
    values = [ranking.columns.get(name) for ranking in pairs.rankings]
    of_pair = [values[number] for number in pairs.ranking_of[pairs.better]]
    members: dict[Any, list[int]] = {}
    for index, value in enumerate(of_pair):
        if value is not None:
            members.setdefault(str(value) if isinstance(value, list | dict) else value, []).append(index)
    largest = sorted(members, key=lambda value: -len(members[value]))[:MOST_GROUPS]
    numeric = all(isinstance(value, int | float) for value in largest)
    order = sorted(largest) if numeric else sorted(largest, key=str)
    return [_group(pairs, str(value), np.array(members[value]), seed) for value in order]


def grouping_columns(rankings: Sequence[Ranking], wanted: Sequence[str] | None = None) -> list[str]:
    """Return the columns to split by: `wanted` (InputError where one is missing), else the usual names that the data
    has with more than one value."""
    there = list(dict.fromkeys(name for ranking in rankings for name in ranking.columns))
    if wanted is not None:
        for name in wanted:
            if name not in there:
                raise InputError(f"group_by: the data has no column {name!r}; columns: {', '.join(there) or 'none'}")
        return list(wanted)
    usual = [name for name in (*GROUP_COLUMNS, *LABELER_COLUMNS) if name in there]
    return [name for name in usual if len({str(ranking.columns.get(name)) for ranking in rankings}) > 1]


def by_margin(pairs: ScoredPairs, seed: int) -> list[Numbers]:
    """Compute accuracy per quartile of the absolute score difference: it should rise with the difference."""
    size = np.abs(pairs.differences)
    edges = np.quantile(size, [0.25, 0.5, 0.75])
    quartile = np.searchsorted(edges, size, side="left")
    names = ["smallest quarter", "second", "third", "largest quarter"]
    return [
        _group(pairs, name, np.flatnonzero(quartile == number), seed)
        | {"mean_difference": float(size[quartile == number].mean())}
        for number, name in enumerate(names)
        if (quartile == number).any()
    ]


def length_differences(pairs: ScoredPairs) -> np.ndarray:
    """Return [n] (length of the preferred - length of the other) / the longer of the two, in characters: -1 to 1."""
    lengths = np.array([len(text) for text in pairs.texts], dtype=np.float64)
    better, worse = lengths[pairs.better], lengths[pairs.worse]
    return (better - worse) / np.maximum(better, worse)


def by_length_difference(pairs: ScoredPairs, seed: int) -> list[Numbers]:
    """Compute accuracy where the preferred response is much shorter, shorter, of like length (within 10%), longer, much
    longer (more than twice as long): a model that rewards length is right on one side only."""
    relative = length_differences(pairs)
    bins = {
        "preferred is less than half as long": relative < -0.5,
        "preferred is shorter": (relative >= -0.5) & (relative < -0.1),
        "of like length (within 10%)": np.abs(relative) <= 0.1,
        "preferred is longer": (relative > 0.1) & (relative <= 0.5),
        "preferred is more than twice as long": relative > 0.5,
    }
    return [_group(pairs, name, np.flatnonzero(chosen), seed) for name, chosen in bins.items() if chosen.any()]


def rewardbench_sections(rows: Sequence[Mapping[str, Any]]) -> Numbers | None:
    """Compute RewardBench's section scores and their mean from its subsets' accuracy (`by_column(..., "subset")`).

    A section is the mean over its pairs, except that Reasoning weighs mathematics and code equally (2403.13787, section
    4). None where a row is not a subset of RewardBench.
    """
    found = {row["name"]: row for row in rows}
    known = {subset for subsets in REWARDBENCH.values() for subset in subsets}
    if not found or not set(found) <= known:
        return None
    sections: dict[str, float] = {}
    for section, subsets in REWARDBENCH.items():
        here = [found[subset] for subset in subsets if subset in found]
        parts = [here]
        if section == "Reasoning":
            parts = [
                [row for row in here if (row["name"] == "math-prm") == mathematics] for mathematics in (True, False)
            ]
        means = [sum(r["accuracy"] * r["n"] for r in part) / sum(r["n"] for r in part) for part in parts if part]
        if means:
            sections[section] = sum(means) / len(means)
    return {"sections": sections, "mean": sum(sections.values()) / len(sections)}


def _group(pairs: ScoredPairs, name: str, chosen: np.ndarray, seed: int) -> Numbers:
    return {"name": name, **accuracy(pairs.right[chosen], pairs.prompts[chosen], seed)}


# -------------------------------------------------------------------------------- spread and worst pairs


def spread(pairs: ScoredPairs) -> Numbers:
    """Compute mean, standard deviation (population) and quantiles of the scores; the share of their variance between
    responses to the same prompt (the only part that ranks them); mean and quantiles of the pairs' differences."""
    scores, differences = pairs.scores, pairs.differences
    counts = np.bincount(pairs.prompt_of)
    means = np.bincount(pairs.prompt_of, weights=scores) / counts
    within = float(((scores - means[pairs.prompt_of]) ** 2).mean())
    variance = float(scores.var())
    levels = [0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0]
    return {
        "mean": float(scores.mean()),
        "std": float(scores.std()),
        "quantiles": {f"{level:g}": float(q) for level, q in zip(levels, np.quantile(scores, levels), strict=True)},
        "within_prompt_share": within / variance if variance > 0 else None,
        "mean_difference": float(differences.mean()),
        "difference_quantiles": {
            f"{level:g}": float(q) for level, q in zip(levels, np.quantile(differences, levels), strict=True)
        },
    }


def most_wrong(pairs: ScoredPairs, count: int = 20) -> list[Numbers]:
    """Return the pairs that the model gets wrong by the widest margin, widest first; at most one per prompt."""
    rows: list[Numbers] = []
    seen: set[int] = set()
    differences = pairs.differences
    for index in np.argsort(differences, kind="stable"):
        if differences[index] >= 0 or len(rows) == count:
            break
        if int(pairs.prompts[index]) in seen:
            continue
        seen.add(int(pairs.prompts[index]))
        better, worse = int(pairs.better[index]), int(pairs.worse[index])
        rows.append(
            {
                "prompt": pairs.rankings[pairs.ranking_of[better]].prompt,
                "preferred": pairs.texts[better],
                "rejected": pairs.texts[worse],
                "score_preferred": float(pairs.scores[better]),
                "score_rejected": float(pairs.scores[worse]),
                "difference": float(differences[index]),
            }
        )
    return rows


# ------------------------------------------------------------------------------------------------ best-of-n


def expected_best_of_n(proxy: np.ndarray, other: np.ndarray, n: int) -> float:
    """Compute the mean of `other` at the response that `proxy` scores highest among n drawn without replacement from K.

    Exact, over all C(K, n) draws: the response of rank r (1 the lowest) wins C(r-1, n-1) of them; equal proxy scores
    share their chance.
    """
    if not 1 <= n <= len(proxy):
        raise ValueError(f"n={n} of {len(proxy)} responses")
    order = np.argsort(proxy, kind="stable")
    chance = best_of_n_chances(len(proxy), n)[-1]
    _, tied = np.unique(proxy[order], return_inverse=True)
    chance = (np.bincount(tied, weights=chance) / np.bincount(tied))[tied]
    return float((chance * other[order]).sum())


def best_of_n_curve(
    pairs: ScoredPairs, second: np.ndarray, seed: int, sizes: Sequence[int] = (1, 2, 4, 8, 16)
) -> Numbers:
    """Compute both models' scores of the best of n by this one, which show whether more optimisation still helps.

    Scores of both are in standard deviations from their mean over all responses. `per_prompt`: the best of n of a
    prompt's own (different) responses; the largest n is one that half of the prompts have responses for, and only
    prompts with as many responses are used. `pool`: the best of n out of all responses, each minus its prompt's mean,
    so that no prompt wins by being easy; n can be larger than any prompt's number of responses, but the fit of prompt
    and response plays no part. A row: `n`, `kl_nats` (ln n - (n-1)/n), `proxy`, `second`, and in `per_prompt`, with
    two prompts or more, the interval of `second`.
    """
    proxy, other = (_standard(values) for values in (pairs.scores, second))
    groups: dict[int, dict[str, int]] = {}
    for index, (prompt, text) in enumerate(zip(pairs.prompt_of.tolist(), pairs.texts, strict=True)):
        groups.setdefault(prompt, {}).setdefault(text, index)
    members = [np.array(list(texts.values())) for texts in groups.values()]
    largest = max(n for n in sizes if 2 * sum(len(m) >= n for m in members) >= len(members))
    enough = [m for m in members if len(m) >= largest]
    rows = []
    for n in (n for n in sizes if n <= largest):
        picked = [[expected_best_of_n(proxy[m], values[m], n) for m in enough] for values in (proxy, other)]
        means: Numbers = {"proxy": float(np.mean(picked[0])), "second": float(np.mean(picked[1]))}
        if len(enough) > 1:  # one prompt says nothing about others
            means["second_ci"] = bootstrap_interval(picked[1], seed).interval
        rows.append({"n": n, "kl_nats": best_of_n_kl(n), **means})
    several = [m for m in members if len(m) > 1]
    centred = [np.concatenate([values[m] - values[m].mean() for m in several]) for values in (proxy, other)]
    pool = []
    for n in (n for n in sizes if n <= len(centred[0])):
        own, judged = (expected_best_of_n(centred[0], values, n) for values in centred)
        pool.append({"n": n, "kl_nats": best_of_n_kl(n), "proxy": own, "second": judged})
    agreement = accuracy(outcomes(second[pairs.better] - second[pairs.worse]), pairs.prompts, seed)
    return {"per_prompt": rows, "per_prompt_prompts": len(enough), "pool": pool, "second_model": agreement}


def _standard(values: np.ndarray) -> np.ndarray:
    deviation = values.std()
    return (values - values.mean()) / deviation if deviation > 0 else np.zeros_like(values)
