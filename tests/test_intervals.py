"""Intervals: published quantiles, hand arithmetic, and how often they hold the truth, computed or simulated."""

from __future__ import annotations

import math
from itertools import combinations_with_replacement

import numpy as np
import pytest

from rlhf.intervals import (
    bootstrap_interval,
    clustered_accuracy,
    clustered_mean,
    proportion,
    reflected,
    student_mean,
    win_rate,
)
from rlhf.quantiles import student_quantile


@pytest.mark.parametrize(
    ("degrees", "quantile"),  # tables of Student's t, two-sided 95%
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (29, 2.0452), (30, 2.0423), (100, 1.9840)],
)
def test_students_quantiles_are_the_tables(degrees, quantile):
    assert student_quantile(0.975, degrees) == pytest.approx(quantile, abs=5e-5)


def test_wilson_at_the_ends_and_agresti_coull_between():
    low, high = proportion(12, 12).interval
    assert (low, high) == (pytest.approx(0.75751, abs=1e-5), 1.0)  # Wilson: n / (n + z^2)
    assert proportion(0, 12).interval == pytest.approx([0.0, 1 - 0.75751], abs=1e-5)
    # Agresti and Coull: (11 + 1.92073) / (12 + 3.84146) = 0.815630, +- 1.95996 sqrt(0.815630 * 0.184370 / 15.84146)
    assert proportion(11, 12).interval == [pytest.approx(0.62467, abs=1e-5), 1.0]
    assert proportion(50, 100).interval == pytest.approx([0.40383, 0.59617], abs=1e-5)
    assert proportion(50, 100, level=0.5).high < proportion(50, 100).high
    for right, n in ((-1, 5), (6, 5), (0, 0)):
        with pytest.raises(ValueError, match="no share"):
            proportion(right, n)


def coverage(n: int, share: float) -> float:
    """The probability that the interval holds the share, summed over every possible count."""
    log, held = math.lgamma, 0.0
    for right in range(n + 1):
        low, high = proportion(right, n).interval
        if low <= share <= high:
            ways = log(n + 1) - log(right + 1) - log(n - right + 1)
            held += math.exp(ways + right * math.log(share) + (n - right) * math.log1p(-share))
    return held


@pytest.mark.parametrize(("share", "most"), [(0.5, 0.957), (0.9, 0.966), (0.99, 0.988), (0.1, 0.966)])
def test_a_proportions_coverage(share, most):
    """At one size it jumps with the counts that are possible; at 96% instead of 95, the mean would pass `most`."""
    held = [coverage(n, share) for n in [*range(12, 60), 75, 100, 150, 250, 500]]
    assert min(held) >= 0.92
    assert sum(held) / len(held) <= most


@pytest.mark.long
@pytest.mark.parametrize(("share", "most"), [(0.5, 0.955), (0.9, 0.96), (0.99, 0.978)])
def test_a_proportions_coverage_at_every_size(share, most):
    held = [coverage(n, share) for n in range(12, 501)]
    assert min(held) >= 0.92
    assert sum(held) / len(held) <= most


def test_a_clustered_mean_by_hand():
    # 3 of 3 and 1 of 3 right; added: 0 of 3 and 3 of 3. r = 7/12, e = 1.25, -0.75, -1.75, 1.25
    found = clustered_mean([1, 1, 1, 1, 0, 0], ["x", "x", "x", "y", "y", "y"], level=0.5)
    half = 1.0 * math.sqrt(4 / 3 * (1.25**2 + 0.75**2 + 1.75**2 + 1.25**2) / 12**2)  # t of 1 degree at 0.75: 1
    assert found.value == pytest.approx(4 / 6)
    assert found.interval == pytest.approx([7 / 12 - half, 7 / 12 + half])
    # a difference between -1 and 1: five of 0, and one of -1 and of 1 each
    found = clustered_mean([0.0] * 5, range(5), bounds=(-1.0, 1.0))
    half = 2.7764 * math.sqrt(2 / (6 * 7))
    assert found.interval == pytest.approx([-half, half], abs=1e-4)


def test_a_weight_is_how_often_a_value_counts():
    values, keys, weights = [1.0, 0.0, 0.5], ["a", "a", "b"], [3, 1, 2]
    often = clustered_mean([1, 1, 1, 0, 0.5, 0.5], ["a", "a", "a", "a", "b", "b"])
    assert clustered_mean(values, keys, weights=weights) == pytest.approx(often)
    assert clustered_mean([1.0, 0.0], "ab", weights=[1, 1]) == clustered_mean([1.0, 0.0], "ab")


@pytest.mark.parametrize("answers", list(combinations_with_replacement((0.0, 0.5, 1.0), 4)))
def test_no_interval_is_without_width_or_without_its_value(answers):
    for found in (clustered_accuracy(answers, range(4)), clustered_accuracy(answers * 3, [*range(4)] * 3)):
        assert 0 <= found.low <= found.value <= found.high <= 1
        assert found.high - found.low > 0.2


def test_a_mean_without_bounds():
    found = student_mean([1.0, 2.0, 6.0])  # mean 3, standard deviation sqrt(7)
    assert found.interval == pytest.approx([3 - 4.3027 * math.sqrt(7 / 3), 3 + 4.3027 * math.sqrt(7 / 3)], abs=1e-3)
    assert bootstrap_interval([1.0, 2.0, 6.0], seed=0) == found, "a bootstrap of three values is too narrow"
    assert student_mean([4.0]).interval == [-math.inf, math.inf]


def simulated(draw_interval, truth: float, worlds: int = 400) -> float:
    found = [draw_interval(np.random.default_rng(world), world) for world in range(worlds)]
    return sum(low <= truth <= high for low, high in found) / worlds


def of_clusters(draw: np.random.Generator, clusters: int, beta: tuple[float, float]) -> list[float]:
    """Clusters of 1 to 11 answers, each cluster with a chance of its own."""
    sizes = draw.integers(1, 12, clusters)
    right = [draw.random(size) < draw.beta(*beta) for size in sizes]
    return clustered_accuracy(np.concatenate(right).tolist(), np.repeat(np.arange(clusters), sizes).tolist()).interval


def test_few_clusters_hold_the_truth():
    for clusters in (5, 10, 30):
        assert simulated(lambda draw, _: of_clusters(draw, clusters, (2, 1)), 2 / 3, 150) >= 0.92  # noqa: B023


@pytest.mark.long
@pytest.mark.parametrize("beta", [(2.0, 1.0), (9.0, 1.0), (1.9, 0.1), (20.0, 20.0)])
def test_coverage_over_clusters(beta):
    """93 to 97% (and the simulation's error) from 100 clusters on; at fewer, never less."""
    truth = beta[0] / sum(beta)
    for clusters in (5, 10, 30, 100, 200):
        held = simulated(lambda draw, _: of_clusters(draw, clusters, beta), truth, 1000)  # noqa: B023
        assert held >= 0.92, clusters
        assert held <= 0.985 or clusters < 100, clusters


def calibration_error(rows: np.ndarray) -> float:
    """Of rows (right, confidence), in ten bins."""
    gaps = np.bincount(np.minimum((10 * rows[:, 1]).astype(int), 9), weights=rows[:, 0] - rows[:, 1])
    return float(np.abs(gaps).sum() / len(rows))


def answered(draw: np.random.Generator, n: int, error: float) -> np.ndarray:
    confidence = draw.uniform(0.2, 1, n)
    return np.column_stack([draw.random(n) < confidence - error, confidence])


def test_a_calibration_errors_interval_holds_its_own_value_and_often_the_truth():
    """Redrawn sets are worse calibrated than the items: their quantiles alone hold a truth of 0.05 in no world here."""
    draw, held = np.random.default_rng(0), 0
    for world in range(200):
        rows = answered(draw, 100, 0.05)
        found = reflected(bootstrap_interval(rows, world, samples=40, statistic=calibration_error))
        assert 0 <= found.low <= found.value <= found.high
        assert found.value == calibration_error(rows)
        held += found.low <= 0.05 <= found.high
    assert 0.65 < held / 200 < 0.92


def test_a_redrawn_statistic_of_clusters_knows_no_copies():
    rows = answered(np.random.default_rng(1), 30, 0.0)
    alone = bootstrap_interval(rows, 0, samples=50, statistic=calibration_error)
    assert bootstrap_interval(rows, 0, samples=50, statistic=calibration_error, keys=range(30)) == alone
    copies = np.repeat(rows, 5, axis=0)
    found = bootstrap_interval(copies, 0, samples=50, statistic=calibration_error, keys=np.repeat(range(30), 5))
    assert found == pytest.approx(alone)


@pytest.mark.long
@pytest.mark.parametrize("n", [100, 300])
def test_coverage_of_bootstraps(n):
    """Means of values without bounds, symmetric and skewed: 93 to 97%, and the simulation's error."""
    worlds: dict[str, tuple] = {
        "normal": (lambda draw: draw.normal(size=n), 0.0),
        "exponential": (lambda draw: draw.exponential(2.0, n), 2.0),
        "uniform": (lambda draw: draw.uniform(-3, 3, n), 0.0),
    }
    for name, (sample, truth) in worlds.items():
        held = simulated(lambda draw, world: bootstrap_interval(sample(draw), world, samples=400).interval, truth, 600)  # noqa: B023
        assert 0.92 <= held <= 0.98, name


@pytest.mark.long
@pytest.mark.parametrize("n", [5, 10, 30, 80])
def test_coverage_of_students_at_few_prompts(n):
    for sample in (lambda draw: draw.normal(size=n), lambda draw: draw.uniform(-3, 3, n)):
        held = simulated(lambda draw, world: bootstrap_interval(sample(draw), world).interval, 0.0, 1000)  # noqa: B023
        assert 0.93 <= held <= 0.97


@pytest.mark.long
@pytest.mark.parametrize(("n", "chance"), [(12, 0.5), (30, 0.7), (100, 0.6), (400, 0.97)])
def test_coverage_of_win_rates_with_ties(n, chance):
    def world(draw, _):
        mine = draw.choice([1.0, 0.5, 0.0], n, p=[0.6 * chance, 0.4 * chance, 1 - chance])
        return win_rate(mine, np.full(n, 0.5)).interval

    assert 0.92 <= simulated(world, 0.6 * chance + 0.2 * chance, 1000) <= 0.975
