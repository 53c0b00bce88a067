"""Best-of-n and votes over subsets, against brute force; answers as texts write them."""

from __future__ import annotations

import itertools
import re
from collections import Counter

import numpy as np
import pytest

from reward_models import best_of_n as ways

RNG = np.random.default_rng(0)


def subsets(count: int, n: int):
    return itertools.combinations(range(count), n)


def test_curves_are_means_over_all_subsets():
    scores, quality = RNG.normal(size=(3, 6)), RNG.normal(size=(3, 6))
    found = ways.scored_curves(scores, quality)
    for row, n in itertools.product(range(3), range(1, 7)):
        picked = [quality[row][max(drawn, key=lambda i: scores[row][i])] for drawn in subsets(6, n)]
        assert found[row, n - 1] == pytest.approx(np.mean(picked))


def test_equal_scores_share_their_chance():
    found = ways.scored_curves(np.array([[1.0, 1.0, 0.0]]), np.array([[4.0, 0.0, 9.0]]))
    assert found[0].tolist() == pytest.approx([13 / 3, (2.0 + 2.0 + 2.0) / 3, 2.0])


def test_chances_sum_to_one_for_many_responses():
    """C(999, 499) is beyond float64."""
    chances = ways.best_of_n_chances(1000, 500)
    np.testing.assert_allclose(chances.sum(axis=1), 1.0, rtol=1e-9)
    assert chances[499, -1] == pytest.approx(0.5)
    assert (chances[499, :499] == 0).all()


def majority(answers, weights, quality, drawn) -> float:
    votes: Counter = Counter()
    for i in drawn:
        if answers[i] is not None:
            votes[answers[i]] += weights[i]
    if not votes:
        return float(np.mean([quality[i] for i in drawn]))
    most = max(votes.values())
    won = [answer for answer in votes if votes[answer] == most]
    return float(np.mean([np.mean([quality[i] for i in drawn if answers[i] == answer]) for answer in won]))


@pytest.mark.parametrize("weighted", [False, True])
def test_votes_over_few_responses_are_exact(weighted):
    answers = [["a", "b", "a", None, "c"], [None, None, 1.0, 2.0, 2.0], [None] * 5]
    quality = RNG.normal(size=(3, 5))
    weights = np.array([[1, 2, 4, 8, 16], [1, 2, 4, 8, 16], [1, 1, 1, 1, 1]], float) if weighted else np.ones((3, 5))
    found = ways.vote_curves(answers, weights, quality, seed=0)
    for row, n in itertools.product(range(3), range(1, 6)):
        expected = np.mean([majority(answers[row], weights[row], quality[row], drawn) for drawn in subsets(5, n)])
        assert found[row, n - 1] == pytest.approx(expected), (row, n)


def test_votes_over_many_responses_are_near_and_repeat():
    answers = [[int(x) for x in RNG.integers(0, 3, 7)] for _ in range(2)]
    quality = np.array([[float(a == 1) for a in own] for own in answers])
    ones = np.ones((2, 7))
    found = ways.vote_curves(answers, ones, quality, seed=3)
    assert np.array_equal(found, ways.vote_curves(answers, ones, quality, seed=3))
    assert not np.array_equal(found, ways.vote_curves(answers, ones, quality, seed=4))
    for row, n in itertools.product(range(2), (1, 3, 7)):
        expected = np.mean([majority(answers[row], ones[row], quality[row], drawn) for drawn in subsets(7, n)])
        assert found[row, n - 1] == pytest.approx(expected, abs=0.12), (row, n)  # 3.5 standard errors of 200 draws
    assert found[:, 6] == pytest.approx(
        [majority(a, ones[0], q, range(7)) for a, q in zip(answers, quality, strict=True)]
    )


def test_a_vote_chooses_a_response_of_the_winning_answer():
    answers = [["a", "b", "b", None], ["a", "b", "b", "a"], [None] * 4]
    assert ways.voted(answers, np.ones((3, 4))) == [1, 0, None]
    assert ways.voted(answers, np.array([[9.0, 1, 2, 50], [1.0, 2, 3, 1], [1.0] * 4])) == [0, 2, None]


def test_weights_of_a_vote():
    assert ways.vote_weights(np.array([[0.0, 0.25, 1.0]])).tolist() == [[0.0, 0.25, 1.0]]
    np.testing.assert_allclose(ways.vote_weights(np.array([[-1.0, 0.0, 3.0]])), 1 / (1 + np.exp([[1.0, 0.0, -3.0]])))


@pytest.mark.parametrize(
    ("text", "pattern", "answer"),
    [
        ("So 3 and 4.\n#### 1,200.0", r"#### (.+)", 1200.0),
        ("#### 1\nthen #### $7.", r"#### (.+)", 7.0),
        ("It is 12, or -3.5", r"-?\$?\d[\d,]*(?:\.\d+)?", -3.5),
        ("It is 12, which is right", r"-?\$?\d[\d,]*(?:\.\d+)?", 12.0),
        ("It is -$1,234,567.5.", r"-?\$?\d[\d,]*(?:\.\d+)?", -1234567.5),
        ("#### $ -5", r"#### (.+)", -5.0),
        ("#### 1,2", r"#### (.+)", "1,2"),
        ("#### 1,2345", r"#### (.+)", "1,2345"),
        ("#### -$-5", r"#### (.+)", "-$-5"),
        ("The answer is  New   YORK.", r"answer is (.+)", "new york"),
        ("The answer is B", r"[A-D]\b", "b"),
        ("nothing here", r"#### (.+)", None),
        ("####  ", r"####(.*)", None),
    ],
)
def test_answers(text, pattern, answer):
    assert ways.extracted_answer(text, re.compile(pattern)) == answer
