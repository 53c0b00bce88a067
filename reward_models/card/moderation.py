"""A moderation model's report card in numbers: each category beside a bag of words, calibration, thresholds, groups.

Intervals are over distinct texts. Those of AUPRC redraw texts and take quantiles, which is too narrow where a category
has few positives; the calibration error's reflect these quantiles, and are too narrow everywhere
(`rlhf.intervals.reflected`); rates have the intervals of `rlhf.intervals`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from reward_models.card.pairs import GROUP_COLUMNS, Numbers
from reward_models.labelled_texts import LabelledText
from reward_models.moderation import Category
from reward_models.thresholds import average_precision, true_positive_rate_at
from rlhf.intervals import Estimate, clustered_mean, reflected
from rlhf.rows.records import prompt_key

BINS, REDRAWN, WORST, MOST_GROUPS = 10, 500, 12, 12
LOW_RATE = 0.01
"""The share of negatives at which the true-positive rate is always told."""

Statistic = Callable[[np.ndarray, np.ndarray], float | None]
"""Of scores and labels."""


@dataclass(frozen=True)
class JudgedTexts:
    """Labelled texts and what is said of them. Arrays are [texts, categories]."""

    records: Sequence[LabelledText]
    categories: Sequence[Category]
    labels: np.ndarray
    """1, 0, or NaN where nothing is known."""
    probabilities: np.ndarray
    words: np.ndarray | None = None
    """What the bag of words says: any number that is higher for more likely."""

    @property
    def texts(self) -> np.ndarray:
        """[texts] the number of each one's text: rows of one text share it."""
        numbers: dict[str, int] = {}
        return np.array([numbers.setdefault(prompt_key(record.prompt), len(numbers)) for record in self.records])


def moderation_report(judged: JudgedTexts, wanted: float | None, seed: int = 0) -> Numbers:
    """Compute everything on the card, as plain values. wanted: the false-positive rate for which the thresholds were
    chosen, on other texts."""
    redrawn = _redrawn(judged, seed)
    report: Numbers = {
        "texts": len(judged.records), "distinct_texts": len(set(judged.texts.tolist())),
        "wanted_false_positive_rate": wanted,
        "categories": [_category(judged, n, redrawn, category) for n, category in enumerate(judged.categories)],
        "mean": {name: _estimate(name, *mean) for name, mean in redrawn.means.items()},
        "calibration": _reliability(judged), "flagged": _flagged(judged),
        "by_length": _by_length(judged), "by_source": _by_source(judged), "most_wrong": most_wrong(judged),
    }  # fmt: skip
    return report


# ------------------------------------------------------------------------------------------------ categories


@dataclass(frozen=True)
class _Redrawn:
    """Statistics of each category on the texts and on redrawn sets of them: name -> [1 + redrawn, categories], NaN
    where a set has no positive."""

    values: dict[str, np.ndarray]

    @property
    def means(self) -> dict[str, tuple[float, np.ndarray]]:
        """Return the means over the categories that have a value."""
        found = {}
        for name, table in self.values.items():
            there = ~np.isnan(table[0])
            if there.any() and name != "calibration_error":
                rows = table[:, there]
                known = (~np.isnan(rows)).sum(1)
                means = np.where(known > 0, np.nansum(rows, axis=1) / np.maximum(known, 1), np.nan)
                found[name] = (float(means[0]), means[1:])
        return found


def _redrawn(judged: JudgedTexts, seed: int) -> _Redrawn:
    words, labels = judged.words, judged.labels

    def at_low_rate(probabilities: np.ndarray, known: np.ndarray) -> float | None:
        return true_positive_rate_at(probabilities, known, LOW_RATE)

    statistics: dict[str, tuple[np.ndarray, Statistic]] = {
        "auprc": (judged.probabilities, average_precision),
        "tpr_at_low_fpr": (judged.probabilities, at_low_rate),
        "calibration_error": (judged.probabilities, calibration_error),
    }
    if words is not None:
        statistics["auprc_bag_of_words"] = (words, average_precision)
    members = [np.flatnonzero(judged.texts == text) for text in np.unique(judged.texts)]
    draw, columns = np.random.default_rng(seed), range(len(judged.categories))
    found: dict[str, list[list[float]]] = {name: [] for name in statistics}
    for number in range(1 + (0 if np.isnan(labels).all() else REDRAWN)):
        rows = np.arange(len(labels))
        if number:
            rows = np.concatenate([members[n] for n in draw.integers(0, len(members), len(members))])
        for name, (scores, compute) in statistics.items():
            found[name].append([_known(scores, labels, rows, n, compute) for n in columns])
    values = {name: np.array(table) for name, table in found.items()}
    if words is not None:
        values["lead"] = values["auprc"] - values["auprc_bag_of_words"]
    return _Redrawn(values)


def _known(scores: np.ndarray, labels: np.ndarray, rows: np.ndarray, n: int, compute: Statistic) -> float:
    """Compute a statistic of a category over the rows whose label is known; NaN where it has no value."""
    own = rows[~np.isnan(labels[rows, n])]
    value = compute(scores[own, n], labels[own, n]) if len(own) else None
    return np.nan if value is None else value


def _estimate(name: str, value: float, redrawn: np.ndarray) -> Numbers | None:
    """Return a statistic's value with its interval; None where there is no value."""
    if np.isnan(value):
        return None
    found = Estimate(float(value), *np.nanquantile(redrawn, [0.025, 0.975]).tolist())
    return (reflected(found) if name == "calibration_error" else found)._asdict()


def _category(judged: JudgedTexts, n: int, redrawn: _Redrawn, category: Category) -> Numbers:
    known = ~np.isnan(judged.labels[:, n])
    labels, flagged = judged.labels[known, n] > 0, judged.probabilities[known, n] >= category.threshold
    texts = judged.texts[known]
    found: Numbers = {
        "name": category.name, "n": int(known.sum()), "unknown": int((~known).sum()), "positives": int(labels.sum()),
        "threshold": category.threshold, "chosen_on": {"flagged": category.flagged, "negatives": category.negatives},
        "scale": category.scale, "shift": category.shift,
        "false_positive_rate": _rate(flagged[~labels], texts[~labels]),
        "true_positive_rate": _rate(flagged[labels], texts[labels]),
    }  # fmt: skip
    return found | {name: _estimate(name, table[0, n], table[1:, n]) for name, table in redrawn.values.items()}


def _rate(flagged: np.ndarray, texts: np.ndarray) -> Numbers | None:
    """Return the share that is flagged, with its interval over texts; None without one."""
    if not len(flagged):
        return None
    share = clustered_mean(flagged.astype(float), texts.tolist())
    return {"value": share.value, "low": share.low, "high": share.high, "n": len(flagged)}


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Compute the mean over texts of |share with the category - mean probability| per bin, of ten of equal width (ECE,
    Guo et al. 1706.04599)."""
    return float(sum(row["n"] * abs(row["share"] - row["probability"]) for row in _bins(probabilities, labels))
                 / len(labels))  # fmt: skip


def _bins(probabilities: np.ndarray, labels: np.ndarray) -> list[Numbers]:
    bins = np.clip((probabilities * BINS).astype(int), 0, BINS - 1)
    return [
        {"probability": float(probabilities[bins == b].mean()), "share": float((labels[bins == b] > 0).mean()),
         "n": int((bins == b).sum())}
        for b in range(BINS) if (bins == b).any()
    ]  # fmt: skip


def _reliability(judged: JudgedTexts) -> list[Numbers]:
    """Return the reliability curve of all known labels together."""
    known = ~np.isnan(judged.labels)
    return _bins(judged.probabilities[known], judged.labels[known])


def _flagged(judged: JudgedTexts) -> Numbers | None:
    """Return the share of texts that any category flags."""
    limits = np.array([category.threshold for category in judged.categories])
    flagged: np.ndarray = np.any(judged.probabilities >= limits, axis=1)
    return _rate(flagged, judged.texts)


# ------------------------------------------------------------------------------------------------ groups


def _by_length(judged: JudgedTexts) -> list[Numbers]:
    """Compute the same over four groups of texts by their length in characters."""
    lengths = np.array([len(record.text) for record in judged.records])
    edges = np.unique(np.quantile(lengths, [0.25, 0.5, 0.75]).astype(int))
    group = np.searchsorted(edges, lengths, side="left")
    found = []
    for number in np.unique(group):
        own = np.flatnonzero(group == number)
        found.append(_group(judged, own, f"{lengths[own].min():,} to {lengths[own].max():,} characters"))
    return found


def _by_source(judged: JudgedTexts) -> list[Numbers]:
    """Compute the same over the values of the first column that says where a text is from, where there is one."""
    for column in GROUP_COLUMNS:
        values = [str(record.columns.get(column, "")) for record in judged.records]
        names = sorted(set(values), key=lambda name: (-values.count(name), name))
        if len(names) > 1:
            return [
                _group(judged, np.array([n for n, value in enumerate(values) if value == name]), f"{column}: {name}")
                for name in names[:MOST_GROUPS]
            ]
    return []


def _group(judged: JudgedTexts, rows: np.ndarray, name: str) -> Numbers:
    """Compute, over all known labels of some texts together: AUPRC, and the rates at the thresholds."""
    limits = np.array([category.threshold for category in judged.categories])
    labels, probabilities = judged.labels[rows], judged.probabilities[rows]
    known = ~np.isnan(labels)
    texts = np.broadcast_to(judged.texts[rows][:, None], labels.shape)[known]
    flagged, positive = (probabilities >= limits)[known], labels[known] > 0
    return {
        "name": name, "texts": len(rows), "positives": int(positive.sum()),
        "auprc": average_precision(probabilities[known], labels[known]) if known.any() else None,
        "false_positive_rate": _rate(flagged[~positive], texts[~positive]),
        "true_positive_rate": _rate(flagged[positive], texts[positive]),
    }  # fmt: skip


def most_wrong(judged: JudgedTexts) -> list[Numbers]:
    """Return the texts with the labels that the model finds least probable, worst first, each text once."""
    wrong = np.where(np.isnan(judged.labels), -1.0, np.abs(judged.labels - judged.probabilities))
    shown: list[Numbers] = []
    seen: set[int] = set()
    for place in np.argsort(-wrong, axis=None, kind="stable"):
        row, n = divmod(int(place), wrong.shape[1])
        if wrong[row, n] < 0.5 or len(shown) == WORST:
            break
        if judged.texts[row] in seen:
            continue
        seen.add(int(judged.texts[row]))
        names = [category.name for category in judged.categories]
        record = judged.records[row]
        shown.append({
            "text": record.text, "category": names[n], "label": bool(judged.labels[row, n]),
            "probability": float(judged.probabilities[row, n]), "labels": dict(record.labels),
            "probabilities": dict(zip(names, judged.probabilities[row].tolist(), strict=True)),
        })  # fmt: skip
    return shown


# ------------------------------------------------------------------------------------------------ what is written


def metrics_of(report: Numbers) -> dict[str, Numbers]:
    """Return the card's main numbers as {name: {value, low, high, n}}; a category without a positive has no AUPRC."""
    found: dict[str, Numbers] = {}
    measures = ("auprc", "auprc_bag_of_words", "lead", "calibration_error", "tpr_at_low_fpr", "false_positive_rate",
                "true_positive_rate")  # fmt: skip
    for row in report["categories"]:
        for measure in measures:
            if row.get(measure) is not None:
                found[f"{measure}/{row['name']}"] = {"n": row["n"], **row[measure]}
    for measure, mean in report["mean"].items():
        if mean is not None:
            found[f"mean_{measure}"] = {**mean, "n": report["distinct_texts"]}
    if report["flagged"]:
        found["flagged_share"] = report["flagged"]
    return found
