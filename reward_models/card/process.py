"""A process or outcome reward model's report card in numbers: steps, first errors, solutions, calibration, baselines.

A solution's first error is found where the model's answer, the index of its first wrong step or "none", is the label's
(ProcessBench, Zheng et al. 2412.06559). Intervals are over problems.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from reward_models.card.baselines import fit_bag_of_words
from reward_models.card.calibration import auc
from reward_models.card.pairs import Numbers, accuracy, difference
from reward_models.process import ProcessModel, solution_score
from reward_models.steps import conversation_of, first_error, outcome
from rlhf.errors import InputError
from rlhf.intervals import bootstrap_interval, reflected
from rlhf.rows.records import Ranking, StepLabels, prompt_key, split_key

BINS, LAST_POSITION, WORST, REDRAWN = 10, 8, 12, 500
NOTHING = "∅"
"""The text that a step is compared with in the bag of words; its weight is the intercept."""

Steps = Sequence[Sequence[float]]
"""Of each solution, a probability per step that it is not wrong."""


@dataclass(frozen=True)
class JudgedSteps:
    """The steps that have a label, one after the other, and what a model says of them."""

    right: np.ndarray
    """[n] False where the label says wrong; a neutral step counts as right."""
    probability: np.ndarray
    """[n] that it is right."""
    position: np.ndarray
    """[n] counted from 1 in its solution."""
    problem: np.ndarray
    """[n] number of its problem."""

    @classmethod
    def of(cls, records: Sequence[StepLabels], steps: Steps) -> JudgedSteps:
        problems = _problems(records)
        rows = [
            (label >= 0, p, place, problem)
            for record, own, problem in zip(records, steps, problems, strict=True)
            for place, (label, p) in enumerate(zip(record.labels, own, strict=True), start=1)
            if label is not None
        ]
        if not rows:
            raise InputError("report card: none of the solutions has a labelled step; hand in others")
        right, probability, position, problem = (np.array(column) for column in zip(*rows, strict=True))
        return cls(right.astype(bool), probability.astype(np.float64), position, problem)


def process_report(
    model: ProcessModel, records: Sequence[StepLabels], train: Sequence[StepLabels] | None = None, seed: int = 0
) -> Numbers:
    """Compute everything on the card, as plain values.

    train: the training solutions, to which the bag of words is fitted; without them there is none. An outcome model is
    measured on solutions alone."""
    separator = model.about.separator
    found = model.step_probabilities([conversation_of(record, separator) for record in records])
    report: Numbers = {"kind": model.about.kind, "head": model.about.head, "solution": model.solution}
    report |= {"solutions": len(records), "problems": len(set(_problems(records).tolist()))}
    report["outcomes"] = _outcomes(records, found, model.about.kind, seed)
    if model.about.kind == "outcome":
        return report
    judged, words = JudgedSteps.of(records, found), None if not train else bag_of_words(train, seed)
    right = (judged.probability >= 0.5) == judged.right
    report["steps"] = accuracy(right, judged.problem, seed) | {
        "right_share": float(judged.right.mean()),
        "auc": auc(judged.probability[judged.right], judged.probability[~judged.right]),
    }
    report["calibration"] = calibration(judged, seed)
    report["by_position"] = by_position(judged, seed)
    report["first_errors"] = first_errors(records, found, words, seed)
    report["most_wrong"] = most_wrong(records, found)
    return report


def _problems(records: Sequence[StepLabels]) -> np.ndarray:
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(split_key(record), len(numbers)) for record in records])


# ------------------------------------------------------------------------------------------------ steps


def calibration(judged: JudgedSteps, seed: int) -> Numbers:
    """Compute `ece` with its interval, `brier`, `nll` and the reliability `curve` of step probabilities.

    ece: mean over steps of |share right - mean probability| per bin, of ten of equal width (Guo et al. 1706.04599); its
    interval redraws problems and is too narrow (`rlhf.intervals.reflected`). nll: mean of -log of the probability that
    the label has, in nats."""
    steps = np.column_stack([judged.probability, judged.right])
    problems, error = judged.problem.tolist(), lambda rows: _ece(rows[:, 0], rows[:, 1])[0]
    found = bootstrap_interval(steps, seed, samples=REDRAWN, statistic=error, keys=problems)
    (ece, low, high), curve = reflected(found), _ece(judged.probability, judged.right)[1]
    own = np.where(judged.right, judged.probability, 1 - judged.probability)
    return {
        "ece": ece, "ece_ci": [low, high], "n": len(own), "curve": curve, "brier": float(((1 - own) ** 2).mean()),
        "nll": float(-np.log(np.maximum(own, 1e-12)).mean()),
    }  # fmt: skip


def _ece(probability: np.ndarray, right: np.ndarray) -> tuple[float, list[Numbers]]:
    bins = np.clip((probability * BINS).astype(int), 0, BINS - 1)
    curve = [
        {"confidence": float(probability[bins == b].mean()), "accuracy": float(right[bins == b].mean()),
         "n": int((bins == b).sum())}
        for b in range(BINS) if (bins == b).any()
    ]  # fmt: skip
    return sum(row["n"] * abs(row["accuracy"] - row["confidence"]) for row in curve) / len(right), curve


def by_position(judged: JudgedSteps, seed: int) -> list[Numbers]:
    """Compute accuracy, the share of wrong steps and the mean probability by a step's place in its solution."""
    places = np.minimum(judged.position, LAST_POSITION)
    found = []
    for place in np.unique(places):
        own = places == place
        right = (judged.probability[own] >= 0.5) == judged.right[own]
        found.append({
            "name": f"step {place}{' and later' if place == LAST_POSITION else ''}",
            **accuracy(right, judged.problem[own], seed), "wrong_share": float((~judged.right[own]).mean()),
            "mean_probability": float(judged.probability[own].mean()),
        })  # fmt: skip
    return found


# ------------------------------------------------------------------------------------------------ first errors


def predicted_error(steps: Sequence[float]) -> int:
    """Return the most probable index of the first wrong step, or the number of steps for "none".

    A step is right with its probability, given that those before it are: index k has ``p[0] ... p[k-1] (1 - p[k])`` and
    "none" the product of all. So no threshold is chosen."""
    before, chances = 1.0, []
    for probability in steps:
        chances.append(before * (1 - probability))
        before *= probability
    return int(np.argmax([*chances, before]))


def first_errors(
    records: Sequence[StepLabels], steps: Steps, words: Callable[[StepLabels], list[float]] | None, seed: int
) -> Numbers:
    """Compute how often the first error (or that there is none) is found, of all solutions in which it is known, of the
    wrong ones and of the right ones, beside "always the first step", "always none" and the bag of words.

    `f1` is the harmonic mean of the shares of the wrong and of the right ones, ProcessBench's number; `against` the
    model's lead over each baseline, paired over problems. Alternatives of a step are no solutions of their own."""
    known = [
        (record, own, truth, problem)
        for record, own, problem in zip(records, steps, _problems(records), strict=True)
        if not record.columns.get("alternative") and (truth := first_error(record.labels)) is not None
    ]
    if not known:
        return {"n": 0, "unknown": len(records), "baselines": [], "against": {}}
    truths = np.array([truth for _, _, truth, _ in known])
    sizes = np.array([len(record.steps) for record, _, _, _ in known])
    problems = np.array([problem for _, _, _, problem in known])
    answers = {"always the first step": np.zeros_like(truths), "always none": sizes}
    if words is not None:
        answers["bag of words"] = np.array([predicted_error(words(record)) for record, _, _, _ in known])
    model = np.array([predicted_error(own) for _, own, _, _ in known]) == truths
    baselines = {name: answer == truths for name, answer in answers.items()}

    def shares(right: np.ndarray) -> Numbers:
        wrong_ones = truths < sizes
        parts = {
            name: accuracy(right[own], problems[own], seed) if own.any() else None
            for name, own in (("wrong", wrong_ones), ("right", ~wrong_ones))
        }
        both = [part["accuracy"] for part in parts.values() if part]
        f1 = 2 * both[0] * both[1] / (both[0] + both[1]) if len(both) == 2 and sum(both) > 0 else 0.0
        return accuracy(right, problems, seed) | parts | {"f1": f1 if len(both) == 2 else None}

    return {
        **shares(model),
        "unknown": len(records) - len(known),
        "baselines": [{"name": name, **shares(right)} for name, right in baselines.items()],
        "against": {name: difference(1.0 * model, 1.0 * right, problems, seed) for name, right in baselines.items()},
    }


def bag_of_words(train: Sequence[StepLabels], seed: int) -> Callable[[StepLabels], list[float]] | None:
    """Fit a logistic model of a step's words and of its place; return the function that gives a solution's steps their
    probabilities, or None where nothing can be fitted."""
    rankings = []
    for record in train:
        for place, (step, label) in enumerate(zip(record.steps, record.labels, strict=True), start=1):
            if label is not None:
                ranks = (1, 2) if label >= 0 else (2, 1)
                rankings.append(Ranking(record.prompt, (_with_place(step, place), NOTHING), ranks))
    bag = fit_bag_of_words(rankings, seed)
    if bag is None:
        return None
    floor = float(bag.score([NOTHING])[0])

    def score(record: StepLabels) -> list[float]:
        texts = [_with_place(step, place) for place, step in enumerate(record.steps, start=1)]
        logits = bag.score(texts) - floor
        return list(np.exp(-np.logaddexp(0.0, -logits)).tolist())

    return score


def _with_place(step: str, place: int) -> str:
    return f"{step} place{min(place, LAST_POSITION)}"


# ------------------------------------------------------------------------------------------------ solutions


def _outcomes(records: Sequence[StepLabels], steps: Steps, kind: str, seed: int) -> Numbers:
    """Compute how often a solution's score (0.5 or more: right) says what its labels come to, and its AUC, by each way
    to make one score of the steps; unknown outcomes are left out."""
    known = [n for n, record in enumerate(records) if outcome(record) is not None]
    truths = np.array([outcome(records[n]) == 1 for n in known], dtype=bool)
    problems = _problems(records)[known] if known else np.zeros(0)
    found: Numbers = {"n": len(known), "unknown": len(records) - len(known)}
    if not known:
        return found
    found["right_share"] = float(truths.mean())
    for solution in ("last",) if kind == "outcome" else ("min", "product", "last"):
        scores = np.array([solution_score(steps[n], solution) for n in known])  # type: ignore[arg-type]
        found[solution] = accuracy((scores >= 0.5) == truths, problems, seed)
        found[solution]["auc"] = auc(scores[truths], scores[~truths])
    return found


def most_wrong(records: Sequence[StepLabels], steps: Steps) -> list[Numbers]:
    """Return the solutions with a label that the model finds least probable, worst first, one per problem."""
    losses = []
    for number, (record, own) in enumerate(zip(records, steps, strict=True)):
        pairs = [(label, p) for label, p in zip(record.labels, own, strict=True) if label is not None]
        if pairs:
            losses.append((min(p if label >= 0 else 1 - p for label, p in pairs), number))
    shown: list[Numbers] = []
    seen: set[str] = set()
    for surprise, number in sorted(losses):
        record = records[number]
        key = prompt_key(record.prompt)
        if surprise >= 0.5 or len(shown) == WORST:
            break
        if key in seen:
            continue
        seen.add(key)
        shown.append({
            "prompt": record.prompt, "steps": list(record.steps), "labels": list(record.labels),
            "probabilities": list(steps[number]),
        })  # fmt: skip
    return shown


# ------------------------------------------------------------------------------------------------ what is written


def metrics_of(report: Numbers) -> dict[str, Numbers]:
    """Return the card's main numbers as {name: {value, low, high, n}}."""
    found: dict[str, Numbers] = {}

    def add(name: str, part: Numbers | None) -> None:
        if part and part.get("accuracy") is not None:
            low, high = part["accuracy_ci"]
            found[name] = {"value": part["accuracy"], "low": low, "high": high, "n": part["n"]}

    errors = report.get("first_errors") or {}
    add("first_error_accuracy", errors)
    for part in ("wrong", "right"):
        add(f"first_error_accuracy_{part}", errors.get(part))
    for baseline in errors.get("baselines", ()):
        add(f"first_error_accuracy_{baseline['name'].replace(' ', '_')}", baseline)
    add("step_accuracy", report.get("steps"))
    for solution in ("min", "product", "last"):
        name = "outcome_accuracy" if report["kind"] == "outcome" else f"solution_accuracy_{solution}"
        add(name, report["outcomes"].get(solution))
    if "calibration" in report:
        low, high = report["calibration"]["ece_ci"]
        own = {"value": report["calibration"]["ece"], "low": low, "high": high, "n": report["calibration"]["n"]}
        found["calibration_error"] = own
    return found
