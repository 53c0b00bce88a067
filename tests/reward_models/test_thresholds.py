"""Calibration, thresholds and average precision by slow definitions; the bag of words by its gradient."""

from __future__ import annotations

import math

import numpy as np
import pytest

from reward_models.thresholds import (
    Calibration,
    average_precision,
    calibrate,
    threshold_for,
    true_positive_rate_at,
)
from reward_models.words import fit_words


def slow_average_precision(scores, labels) -> float:
    """The sum over distinct thresholds, from the definition."""
    total, before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        chosen = [label for score, label in zip(scores, labels, strict=True) if score >= threshold]
        recall, precision = sum(chosen) / sum(labels), sum(chosen) / len(chosen)
        total += (recall - before) * precision
        before = recall
    return total


def test_average_precision_is_the_slow_sum():
    rng = np.random.default_rng(0)
    for digits in (1, 8):  # with many equal scores, and without
        scores = rng.random(40).round(digits)
        labels = rng.random(40) < 0.3
        assert average_precision(scores, labels) == pytest.approx(slow_average_precision(scores, labels), abs=1e-12)
    assert average_precision(np.array([3.0, 2.0, 1.0]), np.array([1, 0, 1])) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(np.ones(3), np.zeros(3)) is None


def penalised(scale: float, shift: float, logits, labels) -> float:
    total = (math.log(scale) ** 2 + shift**2) / 2
    for z, label in zip(logits, labels, strict=True):
        p = 1 / (1 + math.exp(-(scale * z + shift)))
        total -= math.log(p if label else 1 - p)
    return total


def test_calibration_is_the_minimum_of_its_formula():
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 3, 200)
    labels = rng.random(200) < 1 / (1 + np.exp(-(0.5 * logits - 1)))
    found = calibrate(logits, labels)
    least = penalised(found.scale, found.shift, logits, labels)
    for scale, shift in ((1.01, 0), (0.99, 0), (1, 0.01), (1, -0.01)):
        assert penalised(found.scale * scale, found.shift + shift, logits, labels) > least
    assert found.scale == pytest.approx(0.5, abs=0.15)
    assert found.shift == pytest.approx(-1, abs=0.4)


def test_few_labels_move_little_and_none_nothing():
    assert calibrate(np.zeros(0), np.zeros(0)) == Calibration(1.0, 0.0)
    one = calibrate(np.array([2.0]), np.array([1]))
    assert 1.0 <= one.scale < 1.4
    assert 0.0 <= one.shift < 0.2
    separated = calibrate(np.array([-1.0, 1.0] * 20), np.array([0, 1] * 20))
    assert separated.scale < 20  # never sure, though nothing contradicts


@pytest.mark.parametrize("wanted", [0.001, 0.05, 0.1, 0.5])
def test_a_threshold_flags_as_many_negatives_as_wanted_and_no_fewer(wanted):
    rng = np.random.default_rng(2)
    for digits in (1, 6):
        probabilities = rng.random(100).round(digits)
        labels = rng.random(100) < 0.2
        found = threshold_for(probabilities, labels, wanted)
        negatives = probabilities[~labels]
        assert found.flagged == (negatives >= found.value).sum() <= wanted * len(negatives)
        lower = negatives[negatives < found.value].max()
        assert (negatives >= lower).mean() > wanted
        assert found.false_positive_rate.low <= found.flagged / found.negatives <= found.false_positive_rate.high


def test_a_sure_negative_and_no_negative():
    assert threshold_for(np.array([1.0, 0.2]), np.array([0, 1]), 0.01).value > 1
    assert threshold_for(np.array([0.3]), np.array([1]), 0.01) == (0.5, 0, 0)
    assert threshold_for(np.array([0.3]), np.array([1]), 0.01).false_positive_rate is None


def test_a_weight_is_as_many_texts():
    rng = np.random.default_rng(3)
    logits, labels, weights = rng.normal(0, 2, 60), rng.random(60) < 0.3, rng.integers(0, 4, 60)
    times = np.repeat(np.arange(60), weights)
    found, wanted = calibrate(logits, labels, weights.astype(float)), calibrate(logits[times], labels[times])
    assert (found.scale, found.shift) == pytest.approx((wanted.scale, wanted.shift), abs=1e-6)
    for share in (0.01, 0.1, 0.3):
        probabilities, held = found(logits), weights > 0
        threshold = threshold_for(probabilities[held], labels[held], share, weights[held].astype(float))
        assert threshold.value == pytest.approx(threshold_for(probabilities[times], labels[times], share).value)
        assert threshold.negatives == (held & ~labels).sum()
        assert threshold.flagged == ((probabilities >= threshold.value) & held & ~labels).sum()


def test_the_true_positive_rate_at_a_false_positive_rate():
    scores = np.array([0.9, 0.8, 0.7, 0.6, *np.linspace(0.1, 0.75, 10)])
    labels = np.array([1] * 4 + [0] * 10)
    assert true_positive_rate_at(scores, labels, 0.05) == 0.5  # above every negative
    assert true_positive_rate_at(scores, labels, 0.1) == 0.75  # above all but one
    assert true_positive_rate_at(scores, np.zeros(14), 0.1) is None


# ------------------------------------------------------------------------------------------------ words

TEXTS = ["a cat sat", "a dog sat", "the dog ran", "the cat ran", "dog dog cat", "a bird sang"] * 4


def test_the_bag_of_words_is_a_minimum_and_leaves_unknown_labels_out():
    dog = np.array([float("dog" in text) for text in TEXTS])
    labels = np.stack([dog, dog], axis=1)
    labels[5::6, 1] = np.nan
    labels[0:6, 1] = 1 - labels[0:6, 1]
    found = fit_words(TEXTS, labels, ["dog", "other"])
    assert ((found.logits(TEXTS)[:, 0] > 0) == (dog > 0)).all()
    for n in range(2):
        known = ~np.isnan(labels[:, n])
        wrong = labels[:, n] - 1 / (1 + np.exp(-found.logits(TEXTS)[:, n]))
        assert abs(wrong[known].sum()) < 1e-3  # the bias has no ridge: its gradient is 0
    assert found.logits(["zebra"])[0] == pytest.approx(found.bias)


def test_the_words_of_a_text_count_by_its_weight():
    """The bias's gradient, weighted, is 0; a text that weighs nothing is as if it were not there."""
    labels = np.array([[float("dog" in text)] for text in TEXTS])
    labels[:6] = 1
    weights = np.where(np.arange(len(TEXTS)) < 6, 0.5, 2.0)
    found = fit_words(TEXTS, labels, ["dog"], weights=weights)
    wrong = labels[:, 0] - 1 / (1 + np.exp(-found.logits(TEXTS)[:, 0]))
    assert abs(weights @ wrong) < 1e-3 < abs(wrong.sum())
    weights[:6] = 0
    found, alone = fit_words(TEXTS, labels, ["dog"], 1, weights), fit_words(TEXTS[6:], labels[6:], ["dog"], 1)
    assert found.vocabulary == alone.vocabulary
    assert found.ridge == alone.ridge
    assert found.logits(TEXTS) == pytest.approx(alone.logits(TEXTS), abs=1e-12)


def test_a_category_with_one_kind_of_label_has_its_share():
    found = fit_words(TEXTS, np.zeros((len(TEXTS), 1)), ["never"])
    assert found.logits(["a cat"])[0, 0] == pytest.approx(math.log(0.5 / (len(TEXTS) + 0.5)))


def test_labels_that_cancel_out_teach_nothing():
    """Every text once with the label and once without: the gradient is zero, and so is the solution."""
    from reward_models.words import fit_words

    texts = [f"text number {n // 2}" for n in range(40)]
    with np.errstate(all="raise"):
        fitted = fit_words(texts, np.array([[float(n % 2)] for n in range(40)]), ["bad"])
    assert np.isfinite(fitted.weights).all()
    assert np.allclose(fitted.logits(texts), 0, atol=0.5)
