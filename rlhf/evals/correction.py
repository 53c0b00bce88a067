"""Correct a judge's mean or win rate by a few human labels: prediction-powered inference, power-tuned (PPI++).

A judge that errs gives a wrong number with a narrow interval, and more of its verdicts only make that interval
narrower. Labels of people are right and few. Angelopoulos, Duchi and Zrnic (2311.01453) use both: the judge's mean over
many items, moved by how far it was from the labels where there are both. The result is right whatever the judge is
worth, and a judge that agrees with people makes it narrower than the labels alone would be.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rlhf.errors import InputError
from rlhf.intervals import Estimate, clustered_mean
from rlhf.quantiles import student_quantile

FEWEST = 10
"""Labelled prompts below which nothing is corrected: the tuning has nothing to go by."""


@dataclass(frozen=True)
class Corrected:
    """A judge's mean, the labels' mean, and what both say together."""

    raw: Estimate
    """The judge's mean over all its verdicts, with an interval that knows nothing of its errors."""
    labels: Estimate
    """The labels' mean alone."""
    corrected: Estimate
    weight: float
    """Of the judge: 0 where its verdicts say nothing of the labels, near 1 where they agree and there are many."""
    labelled: int
    """Prompts with labels."""
    judged: int
    """Prompts with verdicts (not NaN), the labelled ones among them."""
    worth: float
    """How many labels alone would tell as much, per label that was given: 1 or more."""

    def as_dict(self) -> dict[str, object]:
        """Return plain values, as `<output_dir>/<name>.json` keeps them."""
        sizes = {"raw": self.judged, "labels": self.labelled, "corrected": self.labelled}
        metrics = {
            name: {"value": found.value, "low": found.low, "high": found.high, "n": sizes[name]}
            for name, found in (("raw", self.raw), ("labels", self.labels), ("corrected", self.corrected))
        }
        return {**metrics, "weight": self.weight, "labelled": self.labelled, "judged": self.judged, "worth": self.worth}


def corrected(
    verdicts: Mapping[Hashable, float],
    labels: Mapping[Hashable, float],
    bounds: tuple[float, float] = (0.0, 1.0),
    level: float = 0.95,
    certain: Mapping[Hashable, float] | None = None,
    groups: Mapping[Hashable, Hashable] | None = None,
) -> Corrected:
    """Correct the mean of a judge's ``verdicts`` by ``labels``, both by prompt and within ``bounds``.

    Every label's prompt has a verdict, and the labelled prompts are a random part of all but the `certain` ones. Of a
    win rate, a verdict is 1 (won), 0.5 (tie) or 0; several verdicts or labels of one prompt are averaged before.
    Where the judge abstained, a verdict is NaN and counts as the mean of the others. certain: what is known of some
    prompts without asking anybody, and so not labelled: 0.5 for two equal responses. groups: what prompts that are not
    independent share, for the intervals; those that are not named stand alone. Raises InputError where labels are too
    few, or of prompts without a verdict.
    """
    certain, groups = certain or {}, groups or {}
    missing = [key for key in labels if key not in verdicts]
    if missing:
        raise InputError(f"labels: {len(missing)} of {len(labels)} are of prompts that the judge gave no verdict on")
    if (independent := len({groups.get(key, (key,)) for key in labels})) < FEWEST:
        of = "prompts" if independent == len(labels) else f"groups of {len(labels)} prompts"
        raise InputError(f"labels: {independent} {of} are labelled; a correction needs {FEWEST} or more")
    given = {key: value for key, value in verdicts.items() if not math.isnan(value)}
    verdicts = {**verdicts, **dict.fromkeys(verdicts.keys() - given.keys(), float(np.mean([*given.values()] or [0.0])))}
    human = np.array([labels[key] for key in labels], dtype=np.float64)
    judge = np.array([verdicts[key] for key in labels], dtype=np.float64)
    others = [key for key in verdicts if key not in labels and key not in certain]
    rest = np.array([verdicts[key] for key in others], dtype=np.float64)
    numbers: dict[Hashable, int] = {}
    shared = [numbers.setdefault(groups.get(key, (key,)), len(numbers)) for key in (*labels, *others)]
    both, alone = (ppi_mean(human, judge, of, bounds, level, shared[: len(human) + len(of)]) for of in (rest, rest[:0]))
    clusters = [groups.get(key, (key,)) for key in given]
    raw = clustered_mean([*given.values()], clusters, _spanned(bounds, [*given.values()]), level)
    worth = (alone.half / both.half) ** 2
    known, asked = np.array([*certain.values()], dtype=np.float64), len(human) + len(rest)
    labels_alone, together = (_joined(one.estimate, asked, known, bounds, level) for one in (alone, both))
    return Corrected(raw, labels_alone, together, both.weight, len(human), len(given), worth)


class Powered(NamedTuple):
    """A mean with its interval, the judge's weight in it, and half the interval's width before it is cut at bounds."""

    estimate: Estimate
    weight: float
    half: float


def ppi_mean(
    human: np.ndarray,
    judge: np.ndarray,
    rest: np.ndarray,
    bounds: tuple[float, float] = (0.0, 1.0),
    level: float = 0.95,
    groups: Sequence[int] | None = None,
) -> Powered:
    """Compute the mean of labels by PPI++, with its interval, and the weight lambda.

    human, judge [n]: labels, and verdicts on the same prompts. rest [N]: verdicts on the prompts without a label.
    groups [n + N]: a number from 0 for each, alike where prompts are not independent; default: all are. ::

        mean   = mean(human) + lambda (mean(rest) - mean(judge))
        V      = (s_yy - 2 lambda s_yf + lambda^2 s_ff) / n + lambda^2 s_rr / N
        lambda = (s_yf / n) / (s_ff / n + s_rr / N)          which makes V smallest (their section 6)

    with s the sample (co)variances of human y, judge f and rest r; of groups, V and lambda are of what each moves the
    mean by, summed over its prompts, and lambda takes those with a label for others than those without. lambda = 0 is
    the labels alone, so the interval is never wider than theirs (before both are cut at the bounds). Where we depart
    from the paper: lambda is not kept within [0, 1], so that a judge may have another scale; the quantile is Student's
    with one degree less than groups have labels instead of the normal one; and, as in `rlhf.intervals.clustered_mean`,
    a label at either bound with the judge's mean verdict is added before, so that the interval has a width where all
    labels agree. Coverage, simulated: tests/evals/test_correction.py.
    """
    (low, high), count = bounds, len(human)
    own = np.arange(count + len(rest)) if groups is None else np.asarray(groups)
    total = int(own.max()) + 3
    of_labels, of_rest = np.append(own[:count], [total - 2, total - 1]), own[count:]
    y, f = np.append(human, [low, high]), np.append(judge, [judge.mean(), judge.mean()])
    labels, judged, others = _moves(y, of_labels, total), _moves(f, of_labels, total), _moves(rest, of_rest, total)
    spread = float(judged @ judged + others @ others)
    weight = float(labels @ judged) / spread if others.any() and spread > 0 else 0.0
    moves = labels + weight * (others - judged)
    if moves @ moves > labels @ labels:  # of groups with prompts in both parts
        weight, moves = 0.0, labels
    moved = weight * float(rest.mean() - judge.mean()) if weight else 0.0
    freedom = max(1, len(np.unique(own[:count])) - 1)
    half = student_quantile((1 + level) / 2, freedom) * float(np.linalg.norm(moves))
    centre = float(y.mean()) + moved
    value = min(high, max(low, float(human.mean()) + moved))
    interval = max(low, min(value, centre - half)), min(high, max(value, centre + half))
    return Powered(Estimate(value, *interval), weight, half)


def _moves(values: np.ndarray, groups: np.ndarray, total: int) -> np.ndarray:
    """Return by how much each of `total` groups moves the mean of the values [total]; their squares sum to its
    variance."""
    if (there := len(np.unique(groups))) < 2:
        return np.zeros(total)
    moves = np.bincount(groups, values - values.mean(), total) / len(values)
    return moves * math.sqrt(there / (there - 1))


def _joined(found: Estimate, asked: int, known: np.ndarray, bounds: tuple[float, float], level: float) -> Estimate:
    """Return the mean over all prompts: `found` over those that people may be asked about, and the `known` ones.

    To the square of each end's distance comes that of the share and of the known values, which another sample of
    prompts would have otherwise; the ends are cut at the bounds."""
    if not len(known):
        return found
    total, share = asked + len(known), len(known) / (asked + len(known))
    value = share * float(known.mean()) + (1 - share) * found.value
    variance = share * (float(known.var()) + (1 - share) * (float(known.mean()) - found.value) ** 2) / total
    chance = student_quantile((1 + level) / 2, total - 1) * math.sqrt(variance)
    below, above = (math.hypot((1 - share) * (end - found.value), chance) for end in (found.low, found.high))
    return Estimate(value, max(bounds[0], value - below), min(bounds[1], value + above))


def _spanned(bounds: tuple[float, float], values: list[float]) -> tuple[float, float]:
    """Return bounds that hold a judge's verdicts, which may have a scale of their own."""
    return (min(bounds[0], *values), max(bounds[1], *values))
