"""PPI++: hand arithmetic, simulated coverage, never wider than the labels alone."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlhf.errors import InputError
from rlhf.evals.correction import corrected, ppi_mean
from rlhf.quantiles import student_quantile


def test_by_hand():
    """Four labels and verdicts, two further verdicts; the two added labels are 0 and 1, at the verdicts' mean."""
    human, judge, rest = np.array([1.0, 0.0, 1.0, 1.0]), np.array([1.0, 0.0, 0.0, 1.0]), np.array([1.0, 0.0])
    # y = 1 0 1 1 0 1, mean 2/3; f = 1 0 0 1 .5 .5, mean .5; sums of squares: yy 4/3, yf 2/3 - ... below
    y, f = [1, 0, 1, 1, 0, 1], [1, 0, 0, 1, 0.5, 0.5]
    yy = sum((a - 2 / 3) ** 2 for a in y) / 5
    yf = sum((a - 2 / 3) * (b - 0.5) for a, b in zip(y, f, strict=True)) / 5
    ff = sum((b - 0.5) ** 2 for b in f) / 5
    rr = 0.5  # of 1 and 0
    weight = (yf / 6) / (ff / 6 + rr / 2)
    variance = (yy - 2 * weight * yf + weight**2 * ff) / 6 + weight**2 * rr / 2
    found = ppi_mean(human, judge, rest, level=0.5)
    half = student_quantile(0.75, 3) * math.sqrt(variance)
    assert found.weight == pytest.approx(weight)
    assert found.half == pytest.approx(half)
    assert found.estimate.value == pytest.approx(0.75)  # mean(rest) = mean(judge): nothing is moved
    assert found.estimate.low == pytest.approx(2 / 3 - half)


def test_a_judge_with_another_scale_and_one_that_knows_nothing():
    draw = np.random.default_rng(0)
    human = (draw.random(300) < 0.6).astype(float)
    scale = 5 + 3 * human
    found = ppi_mean(human, scale, 5 + 3 * (draw.random(3000) < 0.6))
    assert found.weight == pytest.approx(1 / 3, abs=0.05)
    assert ppi_mean(human, np.full(300, 4.0), np.full(3000, 4.0)).weight == 0
    assert ppi_mean(human, human, np.array([])).weight == 0


def world(draw: np.random.Generator, n: int, rest: int, truth: float, right: float, generous: float) -> tuple:
    """Labels of a share `truth`; a judge that is right on `right` of them, else says 1 with chance `generous`."""
    human = (draw.random(n + rest) < truth).astype(float)
    judge = np.where(draw.random(n + rest) < right, human, draw.random(n + rest) < generous)
    return human[:n], judge[:n], judge[n:]


@pytest.mark.parametrize(
    ("n", "rest", "truth", "right", "generous"),
    [
        (200, 500, 0.55, 0.7, 0.9),  # a judge that likes the policy
        (200, 500, 0.55, 0.0, 0.5),  # one that draws lots
        (200, 500, 0.3, 1.0, 0.5),  # one that is always right
        (50, 1000, 0.6, 0.8, 0.8),
        (200, 500, 0.93, 0.6, 0.9),  # near the bound
    ],
)
def test_coverage_and_never_wider_than_the_labels(n, rest, truth, right, generous):
    draw, held, naive, worlds = np.random.default_rng(n), 0, 0, 2000  # a standard error of half a point
    for _ in range(worlds):
        human, judge, others = world(draw, n, rest, truth, right, generous)
        both, alone = ppi_mean(human, judge, others), ppi_mean(human, judge, others[:0])
        assert both.half <= alone.half * (1 + 1e-12)
        held += both.estimate.low <= truth <= both.estimate.high
        every = np.append(judge, others)
        error = 1.96 * every.std() / math.sqrt(len(every))
        naive += abs(every.mean() - truth) <= error
    assert 0.93 <= held / worlds <= 0.97
    if generous != 0.5 and truth < 0.9:
        assert naive / worlds < 0.7, "the judge alone is wrong with confidence"


def test_a_good_judge_makes_labels_worth_more():
    draw = np.random.default_rng(1)
    human, judge, rest = world(draw, 200, 2000, 0.5, 0.9, 0.5)
    verdicts = {f"p{n}": float(value) for n, value in enumerate([*judge, *rest])}
    labels = {f"p{n}": float(value) for n, value in enumerate(human)}
    found = corrected(verdicts, labels)
    assert found.worth > 1.5
    assert found.corrected.value == pytest.approx(ppi_mean(human, judge, rest).estimate.value)
    assert found.corrected.high - found.corrected.low < found.labels.high - found.labels.low
    assert (found.labelled, found.judged) == (200, 2200)
    plain = found.as_dict()
    assert plain["raw"]["n"] == 2200
    assert plain["corrected"]["low"] == found.corrected.low


@pytest.mark.parametrize("equal", [0.6, 0.15])
def test_prompts_whose_answer_is_certain_count_with_it(equal):
    """Equal responses, of which nobody is asked: ties. A correction of the others alone never held the truth."""
    draw, held, missed, worlds = np.random.default_rng(3), 0, 0, 1000
    truth = equal * 0.5 + (1 - equal) * 0.8
    for _ in range(worlds):
        same = draw.random(400) < equal
        human, judge, _ = world(draw, 400, 0, 0.8, 0.6, 0.5)
        asked = draw.permutation(np.flatnonzero(~same))[:80].tolist()
        labels = {number: float(human[number]) for number in asked}
        verdicts = {number: 0.5 if same[number] else float(judge[number]) for number in range(400)}
        found = corrected(verdicts, labels, certain=dict.fromkeys(np.flatnonzero(same).tolist(), 0.5))
        held += found.corrected.low <= truth <= found.corrected.high
        alone = corrected({key: value for key, value in verdicts.items() if not same[key]}, labels)
        missed += not alone.corrected.low <= truth <= alone.corrected.high
        share = same.mean()
        assert found.corrected.value == pytest.approx(share * 0.5 + (1 - share) * alone.corrected.value)
        assert found.labels.value == pytest.approx(share * 0.5 + (1 - share) * alone.labels.value)
        assert found.worth == pytest.approx(alone.worth)
    assert 0.93 <= held / worlds <= 0.975
    assert missed / worlds > (0.95 if equal == 0.6 else 0.1)
    assert found.judged == 400
    assert found.raw.value == pytest.approx(np.mean([*verdicts.values()]))


def test_a_judge_that_abstains_where_the_policy_lost():
    """Its own mean says 1; what people say of those prompts counts all the same."""
    draw, held, worlds = np.random.default_rng(4), 0, 1000
    for _ in range(worlds):
        human = (draw.random(400) < 0.6).astype(float)
        judge = np.where((human == 0) & (draw.random(400) < 0.8), np.nan, human)
        found = corrected(dict(enumerate(judge.tolist())), dict(enumerate(human[:80].tolist())))
        held += found.corrected.low <= 0.6 <= found.corrected.high
        assert found.raw.value == pytest.approx(np.nanmean(judge))
        assert found.judged == (~np.isnan(judge)).sum()
    assert 0.93 <= held / worlds <= 0.97


def test_all_labels_agree_and_the_interval_has_a_width():
    found = ppi_mean(np.ones(12), np.ones(12), np.ones(100))
    assert found.estimate.value == 1.0
    assert found.estimate.low < 0.85
    assert found.estimate.high == 1.0


def test_a_win_rate_lies_between_0_and_1_with_ties_that_are_certain():
    for lost in (0.0, 1.0):
        verdicts, labels = dict.fromkeys(range(100), lost), dict.fromkeys(range(30), lost)
        found = corrected(verdicts, labels, certain={99: 0.5})
        for estimate in (found.labels, found.corrected):
            assert 0.0 <= estimate.low < estimate.value < estimate.high <= 1.0
            assert estimate.value == pytest.approx(0.99 * lost + 0.01 * 0.5)


def test_prompts_that_share_a_group_are_not_independent():
    """Five of a conversation, alike in truth and verdict: intervals as of the conversations."""
    draw, held, ignored, worlds = np.random.default_rng(5), 0, 0, 1000
    for _ in range(worlds):
        human, judge, rest = (part.repeat(5) for part in world(draw, 40, 200, 0.6, 0.7, 0.8))
        verdicts = dict(enumerate(map(float, [*judge, *rest])))
        labels = dict(enumerate(map(float, human)))
        found = corrected(verdicts, labels, groups={key: key // 5 for key in verdicts})
        held += found.corrected.low <= 0.6 <= found.corrected.high
        alone = corrected(verdicts, labels)
        ignored += alone.corrected.low <= 0.6 <= alone.corrected.high
        assert found.corrected.value == pytest.approx(alone.corrected.value, abs=0.02)
    assert 0.93 <= held / worlds <= 0.975
    assert ignored / worlds < 0.75


def test_a_group_of_one_is_a_prompt_and_one_may_lie_in_both_parts():
    draw = np.random.default_rng(6)
    human, judge, rest = world(draw, 60, 100, 0.6, 0.8, 0.5)
    verdicts, labels = dict(enumerate(map(float, [*judge, *rest]))), dict(enumerate(map(float, human)))
    assert corrected(verdicts, labels, groups={key: -key for key in verdicts}) == corrected(verdicts, labels)
    # each labelled prompt has a twin of the same verdict among the others, which so tells nothing: labels alone
    twins, alone = ppi_mean(human, judge, judge, groups=[*range(60), *range(60)]), ppi_mean(human, judge, judge[:0])
    assert twins.half == pytest.approx(alone.half, rel=0.01)


def test_what_cannot_be_corrected():
    verdicts = dict.fromkeys(range(30), 1.0)
    with pytest.raises(InputError, match="9 prompts are labelled; a correction needs 10"):
        corrected(verdicts, dict.fromkeys(range(9), 1.0))
    with pytest.raises(InputError, match="1 of 11 are of prompts that the judge gave no verdict on"):
        corrected(verdicts, dict.fromkeys([*range(10), 99], 1.0))
    with pytest.raises(InputError, match="6 groups of 12 prompts are labelled; a correction needs 10"):
        corrected(verdicts, dict.fromkeys(range(12), 1.0), groups={key: key // 2 for key in range(30)})
