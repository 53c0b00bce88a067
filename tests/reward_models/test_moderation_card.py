"""The moderation card: its numbers by hand, groups, and hostile text that stays text."""

from __future__ import annotations

import numpy as np
import pytest

from reward_models.card import moderation as card
from reward_models.card.moderation import (
    JudgedTexts,
    calibration_error,
    metrics_of,
    moderation_report,
    most_wrong,
)
from reward_models.card.moderation_page import save_moderation_report, verdict
from reward_models.labelled_texts import LabelledText, labels_of
from reward_models.moderation import Category
from reward_models.thresholds import average_precision
from rlhf.intervals import proportion


@pytest.fixture(autouse=True)
def fewer_redrawn(monkeypatch):
    monkeypatch.setattr(card, "REDRAWN", 100)


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"


def judged(count: int = 60, seed: int = 0, text: str = "text") -> JudgedTexts:
    rng = np.random.default_rng(seed)
    records = []
    for n in range(count):
        labels = {"bad": bool(rng.random() < 0.3)} | ({} if n % 2 else {"rare": n == 4})
        content = f"{text} {n} " + "word " * int(rng.integers(1, 60))
        records.append(
            LabelledText([{"role": "user", "content": content}], labels, {"source": "web" if n % 3 else "book"})
        )
    categories = (Category(name="bad", threshold=0.6, flagged=1, negatives=50), Category(name="rare", threshold=0.5))
    labels = labels_of(records, ["bad", "rare"])
    said = np.clip(np.where(labels > 0, 0.7, 0.3) + rng.normal(0, 0.25, labels.shape), 0.001, 0.999)
    return JudgedTexts(records, categories, labels, said, rng.normal(0, 1, labels.shape))


def test_unknown_labels_are_neither_positive_nor_negative():
    one = judged()
    report = moderation_report(one, 0.01)
    bad, rare = report["categories"]
    assert (bad["n"], bad["unknown"], rare["n"], rare["unknown"], rare["positives"]) == (60, 0, 30, 30, 1)
    known = ~np.isnan(one.labels[:, 1])
    assert rare["auprc"]["value"] == average_precision(one.probabilities[known, 1], one.labels[known, 1])
    assert bad["lead"]["value"] == pytest.approx(bad["auprc"]["value"] - bad["auprc_bag_of_words"]["value"])
    assert bad["lead"]["low"] <= bad["lead"]["value"] <= bad["lead"]["high"]
    negatives = one.labels[:, 0] == 0
    flagged = int((one.probabilities[negatives, 0] >= 0.6).sum())
    rate = bad["false_positive_rate"]
    assert (rate["value"], rate["low"], rate["high"]) == pytest.approx(proportion(flagged, int(negatives.sum())))
    assert report["mean"]["auprc"]["value"] == pytest.approx((bad["auprc"]["value"] + rare["auprc"]["value"]) / 2)
    metrics = metrics_of(report)
    assert {
        "auprc/bad",
        "auprc/rare",
        "auprc_bag_of_words/bad",
        "calibration_error/bad",
        "mean_auprc",
    } <= metrics.keys()
    assert all(set(metric) == {"value", "low", "high", "n"} for metric in metrics.values())


def test_nothing_is_sure_of_a_handful_of_texts(tmp_path):
    """All four texts rank first: the bootstrap's interval is a point, and says nothing."""
    labels = np.array([[1.0]] * 4 + [[0.0]] * 60)
    records = [LabelledText([{"role": "user", "content": f"text {n}"}], {"bad": n < 4}, {}) for n in range(64)]
    one = JudgedTexts(records, (Category(name="bad"),), labels, np.where(labels > 0, 0.9, 0.1), -labels)
    report = moderation_report(one, 0.01)
    assert report["categories"][0]["lead"]["low"] > 0
    assert verdict(report) == "Better than a bag of words in 1 of 1 categories; no single lead is sure."
    page = save_moderation_report(report, tmp_path, {}).read_text()
    assert "Fewer than 10 texts have, or have not, bad: intervals are too narrow there." in page


def test_the_calibration_error_by_hand():
    probabilities, labels = np.array([0.05, 0.15, 0.15, 0.95]), np.array([0, 1, 0, 1])
    assert calibration_error(probabilities, labels) == pytest.approx((0.05 + 2 * 0.35 + 0.05) / 4)


def test_a_calibrated_models_error_may_be_none():
    """Its value is above 0 by chance alone, and redrawn texts put it higher still."""
    rng = np.random.default_rng(0)
    probabilities = rng.random((80, 1))
    labels = (rng.random((80, 1)) < probabilities).astype(float)
    records = [LabelledText([{"role": "user", "content": f"text {n}"}], {}, {}) for n in range(80)]
    report = moderation_report(JudgedTexts(records, (Category(name="bad"),), labels, probabilities), None)
    found = report["categories"][0]["calibration_error"]
    assert found["low"] < 0.02 < found["value"] < found["high"]


def test_repeated_texts_are_one_in_the_intervals():
    one = judged(20)
    twice = JudgedTexts(
        [*one.records] * 8, one.categories, np.tile(one.labels, (8, 1)), np.tile(one.probabilities, (8, 1))
    )
    widths = [
        row["auprc"]["high"] - row["auprc"]["low"]
        for row in (moderation_report(judges, None)["categories"][0] for judges in (one, twice))
    ]
    assert widths[1] == pytest.approx(widths[0], rel=0.25)


def test_groups_hold_every_text_once():
    report = moderation_report(judged(), None)
    assert sum(row["texts"] for row in report["by_length"]) == 60
    assert [(row["name"], row["texts"]) for row in report["by_source"]] == [("source: web", 40), ("source: book", 20)]


def test_the_worst_mistakes_come_first_and_each_text_once():
    one = judged()
    shown = most_wrong(one)
    gaps = [abs(row["label"] - row["probability"]) for row in shown]
    assert gaps == sorted(gaps, reverse=True)
    assert len({row["text"] for row in shown}) == len(shown)
    assert all(gap >= 0.5 for gap in gaps)


def test_texts_without_labels_have_a_flagged_share_alone(tmp_path):
    one = judged(10)
    blank = JudgedTexts(one.records, one.categories, np.full((10, 2), np.nan), one.probabilities)
    report = moderation_report(blank, None)
    assert set(metrics_of(report)) == {"flagged_share"}
    assert save_moderation_report(report, tmp_path, {}).is_file()


def test_hostile_text_stays_text(tmp_path):
    one = judged(text=HOSTILE)
    report = moderation_report(one, 0.01)
    report["by_source"][0]["name"] = report["categories"][0]["name"] = HOSTILE
    page = save_moderation_report(report, tmp_path, {"moderation_model": HOSTILE, "trunk": HOSTILE}).read_text()
    assert "<script" not in page
    assert "<img" not in page
    assert page.count("&lt;script&gt;") > 4
