"""A process model's report card: numbers worked out by hand or by slow loops, and a page without markup of others."""

from __future__ import annotations

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from reward_models.card.process import bag_of_words, metrics_of, predicted_error, process_report
from reward_models.card.process_page import save_process_report, verdict
from rlhf.errors import InputError
from rlhf.intervals import proportion
from rlhf.rows.records import StepLabels


def record(problem: int, labels, text: str = "step", **columns) -> StepLabels:
    steps = tuple(f"{text} {n}" for n in range(len(labels)))
    return StepLabels([{"role": "user", "content": f"Problem {problem}"}], steps, tuple(labels), columns)


def model(steps, kind: str = "process", head: str = "scalar"):
    """A model that gives these probabilities, whatever it is asked."""
    about = SimpleNamespace(kind=kind, head=head, separator="\n")
    return SimpleNamespace(about=about, solution="min", step_probabilities=lambda talks: steps)


RECORDS = [record(0, (1, -1, None)), record(1, (1, 0)), record(2, (-1,)), record(3, (1, None, -1)),
           record(3, (None, 1), alternative=True)]  # fmt: skip
STEPS = [[0.9, 0.2, 0.1], [0.8, 0.9], [0.7], [0.6, 0.3, 0.4], [0.5, 0.6]]


def test_the_most_probable_first_error_by_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(200):
        steps = rng.random(rng.integers(1, 6)).tolist()
        chances = {}
        for right in itertools.product((True, False), repeat=len(steps)):  # each way the steps may come out
            chance = math.prod(p if one else 1 - p for one, p in zip(right, steps, strict=True))
            first = right.index(False) if False in right else len(steps)
            chances[first] = chances.get(first, 0.0) + chance
        assert sum(chances.values()) == pytest.approx(1)
        assert predicted_error(steps) == max(chances, key=chances.get)


def test_intervals_go_by_the_split_group():
    """Twenty problems of two documents are two, not twenty."""
    steps, labels = [[0.9, 0.2]] * 20, [(1, -1), (-1, 1)]
    alone = process_report(model(steps), [record(n, labels[n % 2]) for n in range(20)])["steps"]
    group = process_report(model(steps), [record(n, labels[n % 2], split_group=n % 2) for n in range(20)])["steps"]
    assert group["accuracy"] == alone["accuracy"] == 0.5
    (low, high), (narrow_low, narrow_high) = group["accuracy_ci"], alone["accuracy_ci"]
    assert high - low > 1.5 * (narrow_high - narrow_low)


def test_numbers_by_hand():
    report = process_report(model(STEPS), RECORDS)
    # labelled steps: .9 right, .2 wrong | .8 right, .9 neutral | .7 wrong (missed) | .6 right, .4 wrong | .6 right
    assert (report["steps"]["accuracy"], report["steps"]["n"]) == (7 / 8, 8)
    assert report["steps"]["right_share"] == 5 / 8
    # a right step outscores a wrong one: of .9 .8 .9 .6 .6 against .2 .7 .4: 5 + 3 + 5 of 15
    assert report["steps"]["auc"] == pytest.approx(13 / 15)
    errors = report["first_errors"]
    # known: the first three. Answers: 1 (.9 * .8); none (.72); none (.7)
    assert (errors["n"], errors["unknown"], errors["accuracy"]) == (3, 2, 2 / 3)
    assert (errors["wrong"]["accuracy"], errors["right"]["accuracy"]) == (1 / 2, 1.0)
    assert errors["f1"] == pytest.approx(2 * 0.5 / 1.5)
    baselines = {row["name"]: row["accuracy"] for row in errors["baselines"]}
    assert baselines == {"always the first step": 1 / 3, "always none": 1 / 3}
    assert errors["against"]["always none"]["difference"] == pytest.approx(1 / 3)
    # outcomes: wrong, right, wrong, wrong; an alternative has none
    assert report["outcomes"]["n"] == 4
    assert report["outcomes"]["min"]["accuracy"] == 3 / 4  # .1, .8, .7, .3
    assert report["outcomes"]["product"]["accuracy"] == 3 / 4  # .018, .72, .7, .072
    assert report["outcomes"]["last"]["accuracy"] == 3 / 4  # .1, .9, .7, .4
    assert report["outcomes"]["min"]["auc"] == 1.0
    places = {row["name"]: (row["n"], row["wrong_share"], row["mean_probability"]) for row in report["by_position"]}
    assert places["step 1"] == (4, 1 / 4, pytest.approx(0.75))
    assert places["step 2"] == (3, 1 / 3, pytest.approx(1.7 / 3))
    assert places["step 3"] == (1, 1.0, pytest.approx(0.4))
    metrics = metrics_of(report)
    assert metrics["first_error_accuracy"]["value"] == 2 / 3
    assert metrics["first_error_accuracy"]["n"] == 3
    _, low, high = proportion(2, 3)
    assert (metrics["first_error_accuracy"]["low"], metrics["first_error_accuracy"]["high"]) == (low, high)
    assert metrics["first_error_accuracy_always_none"]["value"] == 1 / 3
    assert set(metrics) >= {"step_accuracy", "calibration_error", "solution_accuracy_min"}
    assert all({"value", "low", "high", "n"} == set(metric) for metric in metrics.values())
    json.dumps(metrics, allow_nan=False)


def test_calibration_is_that_of_a_slow_loop():
    rng = np.random.default_rng(1)
    records = [record(n % 40, rng.choice([1, -1], size=3).tolist()) for n in range(80)]
    steps = rng.random((80, 3)).tolist()
    found = process_report(model(steps), records)["calibration"]
    bins: dict[int, list[tuple[float, bool]]] = {}
    brier, nll = [], []
    for own, given in zip(records, steps, strict=True):
        for label, p in zip(own.labels, given, strict=True):
            bins.setdefault(min(9, int(p * 10)), []).append((p, label == 1))
            chance = p if label == 1 else 1 - p
            brier.append((1 - chance) ** 2)
            nll.append(-math.log(chance))
    gaps = [len(b) * abs(np.mean([r for _, r in b]) - np.mean([p for p, _ in b])) for b in bins.values()]
    assert found["ece"] == pytest.approx(sum(gaps) / 240)
    assert found["ece_ci"][0] < found["ece"] < found["ece_ci"][1]
    assert (found["brier"], found["nll"]) == (pytest.approx(np.mean(brier)), pytest.approx(np.mean(nll)))


def test_a_calibrated_models_error_may_be_none():
    """Its value is above 0 by chance alone, and redrawn problems put it higher still."""
    rng = np.random.default_rng(0)
    steps = rng.random((60, 2)).tolist()
    records = [record(n, [1 if rng.random() < p else -1 for p in own]) for n, own in enumerate(steps)]
    found = process_report(model(steps), records)["calibration"]
    assert found["ece_ci"][0] == 0.0 < found["ece"] < found["ece_ci"][1]


def test_a_bag_of_words_learns_words_and_places():
    train = [record(n, (1, -1), text="dog" if n % 3 else "fox") for n in range(60)]  # the second step is wrong
    words = bag_of_words(train, seed=0)
    right, wrong = words(record(99, (1, 1)))
    assert right > 0.8 > 0.2 > wrong
    assert bag_of_words([record(0, (None, None))], seed=0) is None


def test_an_outcome_model_is_measured_on_solutions():
    report = process_report(model([[0.9], [0.8], [0.2], [0.1], [0.5]], kind="outcome"), RECORDS)
    assert report["outcomes"]["last"]["accuracy"] == 3 / 4
    assert set(metrics_of(report)) == {"outcome_accuracy"}
    assert "75.0%" in verdict(report)
    assert "first_errors" not in report


def test_nothing_labelled_is_refused():
    with pytest.raises(InputError, match="none of the solutions has a labelled step"):
        process_report(model([[0.5]]), [record(0, (None,))])


def test_the_page_shows_text_as_text(tmp_path):
    evil = "<script>alert(1)</script>"
    records = [record(n, (1, -1, None), text=f"{evil} $x$ step") for n in range(30)]
    rng = np.random.default_rng(0)
    report = process_report(model(rng.random((30, 3)).tolist()), records, train=records)
    page = save_process_report(report, tmp_path, {"process_model": f"mine {evil}", "model": "base"})
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    for heading in ("First errors", "Steps", "Calibration", "Whole solutions", "Most surely wrong"):
        assert f"<h2>{heading}</h2>" in text
    assert "bag of words" in text
    assert text.index("class=verdict") < text.index("<h2>")
    orm = process_report(model([[0.5]] * 30, kind="outcome"), records)
    assert "Outcome report card" in save_process_report(orm, tmp_path, {}).read_text(encoding="utf-8")
