"""Charts and comparisons of distributions: by slow loops and published values, and what they find and do not."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest

from rlhf.safety.drift import (
    Counted,
    RateChart,
    chance_limit,
    changed_odds,
    counts_in,
    edges_of,
    kolmogorov_smirnov,
    rate_chart,
    shares_apart,
)
from rlhf.safety.monitor import Rules

RULES = Rules()


def test_the_sum_is_that_of_a_slow_loop():
    events, chart, total = np.random.default_rng(0).random(50) < 0.3, RateChart(0.2, 0.4, 3.0), 0.0
    expected = []
    for event in events:
        total = max(0.0, total + (math.log(0.4 / 0.2) if event else math.log(0.6 / 0.8)))
        expected.append(total)
    assert chart.path(events) == pytest.approx(expected, abs=1e-12)
    over = [n for n, value in enumerate(expected) if value > 2]
    assert RateChart(0.2, 0.4, 2.0).first_alarm(events) == (over[0] if over else None)
    assert RateChart(0.2, 0.4, 99.0).first_alarm(events) is None


def test_changed_odds():
    assert changed_odds(0.5, 3) == pytest.approx(0.75)
    assert changed_odds(changed_odds(0.05, 2.5), 1 / 2.5) == pytest.approx(0.05)


@functools.cache
def chart_of(reference: Counted) -> RateChart:
    return rate_chart(reference, RULES.factor, RULES.each, RULES.horizon)


def one_run(seed: int, later_rate: float, count: int) -> int | None:
    """Draw a reference at 5% and what comes after it; return the index of the alarm."""
    draw = np.random.default_rng(seed)
    reference = Counted(int((draw.random(RULES.reference_requests) < 0.05).sum()), RULES.reference_requests)
    return chart_of(reference).first_alarm(draw.random(count) < later_rate)


def test_a_rate_that_rises_from_5_to_15_percent_is_found_within_200_requests():
    found = [one_run(seed, 0.15, 2000) for seed in range(20)]
    assert np.median([2000 if at is None else at + 1 for at in found]) <= 200


def test_quiet_runs_hardly_ever_alarm():
    assert sum(one_run(seed, 0.05, 2000) is not None for seed in range(100, 120)) <= 1


def test_a_level_is_higher_where_the_reference_is_smaller():
    levels = [rate_chart(Counted(n // 20, n), 2.5, 0.01, 500).level for n in (100, 1000)]
    assert levels[0] > levels[1]
    assert rate_chart(Counted(5, 100), 2.5, 0.01, 500) == rate_chart(Counted(5, 100), 2.5, 0.01, 500)


def test_the_stability_index():
    assert shares_apart(np.array([10, 20]), np.array([10, 20])) == 0
    p, q = np.array([10.5, 20.5]) / 31, np.array([20.5, 10.5]) / 31
    expected = sum((b - a) * math.log(b / a) for a, b in zip(p, q, strict=True))
    assert shares_apart(np.array([10, 20]), np.array([20, 10])) == pytest.approx(expected)
    # chi^2 with 9 degrees: 21.666 at 0.99
    assert chance_limit(500, 200, 10, 0.01) == pytest.approx((1 / 500 + 1 / 200) * 21.666, rel=2e-3)


def test_the_limit_holds_for_samples_of_one_distribution():
    draw, passed = np.random.default_rng(3), 0
    for _ in range(300):
        one, other = draw.exponential(size=500), draw.exponential(size=200)
        edges = edges_of(one)
        passed += shares_apart(counts_in(one, edges), counts_in(other, edges)) > chance_limit(500, 200, 10, 0.05)
    assert 3 <= passed <= 30  # 5%, about


def test_bins():
    edges = edges_of(np.arange(100))
    assert counts_in(np.arange(100), edges).tolist() == [10] * 10
    assert counts_in(np.array([-5.0, 500.0]), edges)[[0, -1]].tolist() == [1, 1]
    often = np.array([9.0] * 5 + [37.0] * 95)  # answers of two lengths: what is shorter has a bin of its own
    assert counts_in(often, edges_of(often)).tolist() == [5, 95, 0]
    assert counts_in(np.array([9.0, 37.0, 40.0]), edges_of(often)).tolist() == [1, 1, 1]
    assert counts_in(np.array([0.0, 1.0, 2.0]), edges_of(np.ones(50))).tolist() == [1, 1, 1]


def test_kolmogorov_smirnov():
    draw = np.random.default_rng(4)
    one, other = draw.normal(size=60), draw.normal(0.4, 1, size=40)
    slow = max(abs((one <= x).mean() - (other <= x).mean()) for x in [*one, *other])
    found = kolmogorov_smirnov(one, other)
    assert found.distance == pytest.approx(slow)
    # the limit's quantile at 0.05 is 1.3581 (Smirnov 1948): with large samples of that distance, p is 0.05
    n = 200_000
    apart = round(1.3581 / math.sqrt(n / 2) * n)
    far = kolmogorov_smirnov(np.arange(n), np.arange(n) + apart)
    assert far.p_value == pytest.approx(0.05, abs=1e-3)
    assert kolmogorov_smirnov(one, one) == (0.0, 1.0)
    rejected = sum(kolmogorov_smirnov(draw.normal(size=60), draw.normal(size=80)).p_value < 0.05 for _ in range(400))
    assert 5 <= rejected <= 32
