"""Make the reward model's report card: its accuracy on held-out rankings, its biases, and where it fails.

`report_card` gives the few numbers that a chain's summary holds, `reward_report` all of them, `save_reward_report`
writes them as `reward_report.json` and as a page, `reward_report.html`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from statistics import fmean

import numpy as np

from reward_models.card import page as card_page
from reward_models.card.baselines import fit_bag_of_words, longer_share
from reward_models.card.calibration import auc, calibration
from reward_models.card.disagreement import disagreement
from reward_models.card.lengths import length_rules
from reward_models.card.pairs import (
    LABELER_COLUMNS,
    Numbers,
    ScoredPairs,
    accuracy,
    best_of_n_curve,
    by_column,
    by_length_difference,
    by_margin,
    difference,
    grouping_columns,
    length_differences,
    most_wrong,
    outcomes,
    rewardbench_sections,
    scored_pairs,
    spread,
)
from reward_models.card.rewardbench2 import rewardbench2
from reward_models.card.sensitivity import sensitivity
from reward_models.card.surface import surface
from rlhf.calls import call
from rlhf.errors import InputError
from rlhf.intervals import clustered_accuracy
from rlhf.rows.messages import Messages
from rlhf.rows.records import Ranking
from rlhf.run import environment
from rlhf.run import page as html
from rlhf.run.checkpoint import write_json_atomic
from rlhf.run.stages import package_versions

Score = Callable[..., Sequence[float | None]]
QUICK_PAIRS = 50
"""Pairs for the sensitivity right after training, where the report should take a small part of the training's time."""


def report_card(score: Score, rankings: Sequence[Ranking], *, seed: int = 0, gold: Score | None = None) -> Numbers:
    """Compute how often `score` orders a held-out pair as its label does; equal scores count half.

    score, gold: functions of trl's reward signature, or objects with `.score(conversations)` (a RewardModel is both).
    Returns `accuracy`, `accuracy_ci` (95%, over prompts), `n` pairs, `prompts`, and `length_baseline` with
    its interval: the better of always choosing the longer and always the shorter response, on the same pairs
    (`length_rule` names it). With `gold`, also `gold_accuracy`, `gold_accuracy_ci` and `gold_n`, the agreement with the
    sign of the gold difference over all pairs whose gold scores differ, and `label_gold_accuracy`, how often the labels
    themselves agree with that sign (null where they tie all those pairs). Where gold ties every pair there is `gold_n`
    alone: 0.
    """
    pairs = scored_pairs(rankings, score_rankings(score, rankings))
    card = _headline(pairs, None, seed)
    return card if gold is None else card | _against_gold(pairs, score_rankings(gold, rankings), seed)


def reward_report(
    scorer: Score,
    rankings: Sequence[Ranking],
    *,
    train: Sequence[Ranking] | None = None,
    second: Score | None = None,
    seed: int = 0,
    group_by: Sequence[str] | None = None,
    sensitivity_pairs: int = 200,
) -> Numbers:
    """Compute everything on the report card, as plain values: see the keys below.

    scorer: an object with `.score(conversations)`, or a function of trl's signature. For the calibration, score
    differences are multiplied by its `normalizer.std`, if it has one: this gives the raw differences of its loss (of an
    ensemble, by the members' mean std).
    train: its training rankings, on which the length rule is chosen and the bag of words fitted. Without them the
    length rule is the better one on the held-out pairs, and there is no bag of words.
    second: another scorer, which judges best-of-n by `scorer`. Of an ensemble (a scorer with `members`), `ensemble`
    says how far its members disagree (`reward_models.card.disagreement`).
    group_by: columns to split the accuracy by; default: section, subset, category and the like, where the data has
    them. sensitivity_pairs: number of pairs to score again after changes that keep the meaning; 0: none.

    Raises InputError where no pair is left, or a score is missing, NaN or infinite.
    """
    columns = grouping_columns(rankings, group_by)
    pairs = scored_pairs(rankings, score_rankings(scorer, rankings))
    normalizers = [getattr(member, "normalizer", None) for member in getattr(scorer, "members", [scorer])]
    scale = fmean(float(getattr(normalizer, "std", 1.0)) for normalizer in normalizers)
    ruled = {name: length_rules(pairs, name, by_column(pairs, name, seed), train, seed) for name in columns}
    groups = {name: rows for name, (rows, _) in ruled.items() if name not in LABELER_COLUMNS}
    labelers = {name: rows for name, (rows, _) in ruled.items() if name in LABELER_COLUMNS}
    scores = (pairs.scores[pairs.better], pairs.scores[pairs.worse])
    best_of_n = None
    if second is not None:
        judged = scored_pairs(rankings, score_rankings(second, rankings)).scores
        best_of_n = best_of_n_curve(pairs, judged, seed)
    return {
        **_headline(pairs, train, seed),
        "responses": len(pairs.texts),
        "rankings": len(rankings),
        "ties_dropped": pairs.ties,
        "rankings_without_a_pair": sum(not ranking.pairs() for ranking in rankings),
        "equal_scores": int((pairs.differences == 0).sum()),
        "auc": auc(*scores),
        **_against_baselines(pairs, train, seed),
        "groups": groups,
        "labelers": labelers,
        "length_by_group": {name: ruled[name][1] for name, rows in groups.items() if rows},
        "rewardbench": rewardbench_sections(groups.get("subset", [])),
        "rewardbench2": rewardbench2(pairs),
        "by_margin": by_margin(pairs, seed),
        "by_length_difference": by_length_difference(pairs, seed),
        "calibration": {"scale": scale, **calibration(pairs.differences * scale, pairs.prompts, seed)},
        "surface": surface(pairs, seed),
        "spread": spread(pairs),
        "sensitivity": (
            sensitivity(
                lambda conversations: score_conversations(scorer, conversations), pairs, seed, sensitivity_pairs
            )
            if sensitivity_pairs
            else None
        ),
        "best_of_n": best_of_n,
        "ensemble": _members(scorer, pairs, seed),
        "most_wrong": most_wrong(pairs),
        "points": _points(pairs, seed),
    }


def save_reward_report(report: Numbers, folder: str | Path, about: Mapping[str, str | None]) -> Path:
    """Write `reward_report.json` and `reward_report.html` into `folder`; return the page's path.

    about: names for the page's header: `reward_model`, `data`, `train_data`, `second_model`."""
    content = {"about": {**about, "made": made()}, "metrics": metrics_of(report), **report}
    write_json_atomic(Path(folder) / "reward_report.json", content)
    return write_page(content, folder)


def metrics_of(report: Numbers) -> Numbers:
    """Return a report's headline numbers in the form that every command writes: intervals over prompts, n pairs."""
    against, words = report["over_length_rule"], report["bag_of_words"]
    found = {name: (report[name], report[f"{name}_ci"]) for name in ("accuracy", "length_baseline")}
    found["over_length_rule"] = (against["difference"], against["difference_ci"])
    if words:
        found["bag_of_words_accuracy"] = (words["accuracy"], words["accuracy_ci"])
        found["over_bag_of_words"] = (words["difference"], words["difference_ci"])
    return {
        name: {"value": value, "low": low, "high": high, "n": report["n"]}
        for name, (value, (low, high)) in found.items()
    }


def write_page(content: Numbers, folder: str | Path) -> Path:
    """Write `reward_report.html` from the content of `reward_report.json`; return its path."""
    above = Path(folder).resolve().parent / "report.html"
    links = [("the run's report", "../report.html")] if above.is_file() else []
    return html.write(Path(folder) / "reward_report.html", card_page.page(content, links))


def made() -> dict[str, str]:
    """Return when, with which command and versions and on which machine these numbers are computed."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": environment.command(),
        "versions": ", ".join(f"{name} {version}" for name, version in package_versions().items()),
        "machine": environment.machine(),
    }


def report_after_training(
    scorer: Score,
    held_out: Sequence[Ranking],
    train: Sequence[Ranking],
    folder: str | Path,
    seed: int,
) -> Numbers:
    """Write the report of a model just trained into its folder; return the numbers of `report_card` (the length rule
    chosen on the training data) and `bag_of_words_accuracy` with its interval."""
    report = reward_report(scorer, held_out, train=train, seed=seed, sensitivity_pairs=QUICK_PAIRS)
    about = {"reward_model": Path(folder).name, "data": "held-out rankings", "train_data": "its training rankings"}
    save_reward_report(report, folder, about)
    names = ("accuracy", "accuracy_ci", "n", "prompts", "length_baseline", "length_baseline_ci", "length_rule")
    outputs = {name: report[name] for name in names}
    words = report["bag_of_words"]
    if words:
        outputs |= {"bag_of_words_accuracy": words["accuracy"], "bag_of_words_accuracy_ci": words["accuracy_ci"]}
    return outputs


# ------------------------------------------------------------------------------------------------ scores


def score_rankings(score: Score, rankings: Sequence[Ranking]) -> list[list[float]]:
    """Score every response, one list per ranking; a function gets extra columns as in PPO.

    Raises InputError on a wrong number of scores, or a None: a mean over some of the responses would mislead."""
    prompts = [ranking.prompt for ranking in rankings for _ in ranking.responses]
    completions = [[{"role": "assistant", "content": text}] for ranking in rankings for text in ranking.responses]
    if callable(score):
        names = sorted({name for ranking in rankings for name in ranking.columns})
        columns = {name: [r.columns.get(name) for r in rankings for _ in r.responses] for name in names}
        values = list(call(score, {**columns, "prompts": prompts, "completions": completions}))
    else:
        values = list(score_conversations(score, [p + c for p, c in zip(prompts, completions, strict=True)]))
    if len(values) != len(prompts):
        raise InputError(f"report card: got {len(values)} scores for {len(prompts)} responses; return one of each")
    given = [value for value in values if value is not None]
    if len(given) < len(values):
        raise InputError(f"report card: {values.count(None)} of {len(values)} scores are None; score every response")
    flat = iter(given)
    return [[float(next(flat)) for _ in ranking.responses] for ranking in rankings]


def score_conversations(scorer: Score, conversations: Sequence[Messages]) -> np.ndarray:
    """Return [B] scores of conversations that end with the response."""
    if hasattr(scorer, "score"):
        return np.array([float(value) for value in scorer.score(conversations)])
    values = scorer(prompts=[c[:-1] for c in conversations], completions=[c[-1:] for c in conversations])
    return np.array([math.nan if value is None else float(value) for value in values])


def _members(scorer: Score, pairs: ScoredPairs, seed: int) -> Numbers | None:
    members = getattr(scorer, "members", ())
    if not members:
        return None
    scores = [np.concatenate(score_rankings(member, pairs.rankings)) for member in members]
    names = [Path(str(getattr(member, "folder", None) or member.__name__)).name for member in members]
    return disagreement(pairs, np.stack(scores), names, seed)


# ---------------------------------------------------------------------------------------------- baselines


def _headline(pairs: ScoredPairs, train: Sequence[Ranking] | None, seed: int) -> Numbers:
    rule, right = _length_rule(pairs, train)
    length = clustered_accuracy(right.tolist(), pairs.prompts.tolist(), seed)
    return {
        **accuracy(pairs.right, pairs.prompts, seed),
        "length_baseline": length.value,
        "length_baseline_ci": length.interval,
        "length_rule": rule,
    }


def _length_rule(pairs: ScoredPairs, train: Sequence[Ranking] | None) -> tuple[str, np.ndarray]:
    """Return "longer" or "shorter", and the outcomes [n] of always choosing that response."""
    longer = outcomes(length_differences(pairs))
    share = longer.mean() if train is None else longer_share(train)
    return ("longer", longer) if share >= 0.5 else ("shorter", 1.0 - longer)


def _against_baselines(pairs: ScoredPairs, train: Sequence[Ranking] | None, seed: int) -> Numbers:
    _, right = _length_rule(pairs, train)
    result: Numbers = {
        "length_rule_chosen_on": "these pairs" if train is None else "the training data",
        "over_length_rule": difference(pairs.right, right, pairs.prompts, seed),
        "bag_of_words": None,
    }
    model = fit_bag_of_words(train, seed) if train else None
    if model is not None:
        scores = model.score(pairs.texts)
        right = outcomes(scores[pairs.better] - scores[pairs.worse])
        facts = {"words": len(model.vocabulary), "ridge": model.ridge, "training_pairs": model.pairs}
        against = difference(pairs.right, right, pairs.prompts, seed)
        result["bag_of_words"] = accuracy(right, pairs.prompts, seed) | facts | against
    return result


def _points(pairs: ScoredPairs, seed: int, most: int = 500) -> dict[str, list[float]]:
    """Return the data of the page's pictures: a sample of (length, score) and a histogram of the pairs' differences."""
    drawn = np.sort(np.random.default_rng(seed).permutation(len(pairs.texts))[:most])
    low, high = min(0.0, pairs.differences.min()), max(0.0, pairs.differences.max())
    width = (high - low) / 30 or 1.0  # one edge is 0: no bar holds both right and wrong pairs
    edges = width * np.arange(np.floor(low / width), np.ceil(high / width) + 1)
    counts, edges = np.histogram(pairs.differences, bins=np.append(edges, edges[-1] + width))
    return {
        "characters": [len(pairs.texts[i]) for i in drawn],
        "scores": pairs.scores[drawn].tolist(),
        "difference_counts": counts.tolist(),
        "difference_edges": edges.tolist(),
    }


def _against_gold(pairs: ScoredPairs, gold: list[list[float]], seed: int) -> Numbers:
    right: list[float] = []
    owners: list[int] = []
    labels: list[float] = []
    scores = iter(zip(pairs.scores.tolist(), pairs.prompt_of.tolist(), strict=True))
    for ranking, truth in zip(pairs.rankings, gold, strict=True):
        here = [next(scores) for _ in truth]
        for i, j in combinations(range(len(truth)), 2):
            if truth[i] == truth[j]:
                continue
            better, worse = (i, j) if truth[i] > truth[j] else (j, i)
            right.append(float(np.sign(here[better][0] - here[worse][0]) + 1) / 2)
            owners.append(here[better][1])
            if ranking.ranks[i] != ranking.ranks[j]:
                labels.append(float(ranking.ranks[better] < ranking.ranks[worse]))
    if not right:  # gold ties every pair
        return {"gold_n": 0}
    agreement = clustered_accuracy(right, owners, seed)
    return {
        "gold_accuracy": agreement.value,
        "gold_accuracy_ci": agreement.interval,
        "gold_n": len(right),
        "label_gold_accuracy": sum(labels) / len(labels) if labels else None,
    }
