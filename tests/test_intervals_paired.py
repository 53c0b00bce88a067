"""Paired and unpaired differences, several comparisons: hand arithmetic, published values, simulated coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlhf.intervals import (
    Estimate,
    by_chance,
    clustered_mean,
    holm,
    needed,
    paired_difference,
    proportion,
    sign_test,
    too_few,
    unpaired_difference,
)


def test_a_paired_difference_is_the_clustered_mean_of_the_differences():
    first, second = [1, 1, 0, 1], [0, 1, 0, 0]
    assert paired_difference(first, second) == clustered_mean([1, 0, 0, 1], range(4), bounds=(-1.0, 1.0))
    keys = ["a", "a", "b", "b"]
    assert paired_difference(first, second, keys) == clustered_mean([1, 0, 0, 1], keys, bounds=(-1.0, 1.0))
    equal = paired_difference([1] * 12, [1] * 12)
    assert equal.value == 0
    assert equal.low < -0.1
    assert equal.high > 0.1, "twelve equal answers prove little"


def paired_world(draw: np.random.Generator, n: int, p: float, gain: float, size: int = 1) -> tuple[np.ndarray, ...]:
    """Two systems' right answers: the second is right on a share p of items, the first turns some over. Items of a
    cluster share their difficulty."""
    easy = np.repeat(draw.beta(2 * p, 2 * (1 - p), n), size)
    second = draw.random(n * size) < easy
    first = np.where(second, draw.random(n * size) > 0.05, draw.random(n * size) < gain)
    return first.astype(float), second.astype(float), np.repeat(np.arange(n), size)


@pytest.mark.parametrize(("n", "size"), [(12, 1), (40, 1), (200, 1), (30, 4)])
def test_a_paired_differences_coverage(n, size):
    draw, held, worlds = np.random.default_rng(n + size), 0, 500
    p, gain = 0.7, 0.3
    truth = p * -0.05 + (1 - p) * gain
    for _ in range(worlds):
        low, high = paired_difference(*paired_world(draw, n, p, gain, size)).interval
        held += low <= truth <= high
    assert held / worlds >= 0.93, "a few of 500 below 95% are chance"
    assert held / worlds <= 0.985 or n < 200, "at few items it is wide on purpose"


def test_newcombes_example():
    """Newcombe 1998, table II: 56/70 - 48/80, method 10 (Wilson's intervals): 0.0524 to 0.3339."""

    def wilson(right: int, n: int) -> Estimate:
        z = 1.959964
        centre, half = right + z * z / 2, z * math.sqrt(right * (n - right) / n + z * z / 4)
        return Estimate(right / n, (centre - half) / (n + z * z), (centre + half) / (n + z * z))

    found = unpaired_difference(wilson(56, 70), wilson(48, 80))
    assert found == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)


def test_the_exact_sign_test_by_hand():
    assert sign_test(5, 0) == pytest.approx(2 / 32)
    assert sign_test(1, 4) == pytest.approx(2 * (1 + 5) / 32)
    assert sign_test(3, 3) == 1.0
    assert sign_test(0, 0) == 1.0


def test_holm_by_hand():
    # sorted .01 .02 .03 .04: times 4, 3, 2, 1, and never falling
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_keeps_the_chance_of_any_mistake_below_a_twentieth():
    draw = np.random.default_rng(0)
    mistakes = [min(holm(draw.random(8).tolist())) < 0.05 for _ in range(2000)]
    assert 0.03 < np.mean(mistakes) < 0.065


def test_too_few_says_how_many():
    assert too_few(Estimate(0.7, 0.6, 0.8), 80) is None
    told = too_few(Estimate(0.55, 0.45, 0.65), 100)
    count = needed(100, 0.55, 0.5, [0.45, 0.65])
    assert told == f"too few to tell: 100 prompts, about {count:,} needed for a difference of this size"
    assert 700 < count < 900  # 100 (2.8 * .1 / 1.96 / .05)^2 = 816
    assert "more would hardly tell" in too_few(Estimate(0.5, 0.4, 0.6), 100)
    assert too_few(proportion(6, 12), 12, what="items").startswith("too few to tell: 12 items")


def test_a_table_of_intervals_says_what_chance_does():
    assert "about 1 of them exclude" in by_chance(20)
