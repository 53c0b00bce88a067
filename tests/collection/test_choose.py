"""What to label next: each rule against hand arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlhf.collection import choose


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_disagreement_is_the_variance_of_the_probability_to_win():
    members = [[[0.0, 1.0], [0.0, 2.0, 2.0]], [[1.0, 0.0], [0.0, 2.0, 2.0]]]
    one, other = sigmoid(-1), sigmoid(1)
    mean = (one + other) / 2
    variance = ((one - mean) ** 2 + (other - mean) ** 2) / 2
    assert choose.disagreement(members) == pytest.approx([variance, 0.0])


def test_disagreement_is_averaged_over_pairs():
    members = [[[0.0, 0.0, 1.0]], [[0.0, 0.0, -1.0]]]
    one = (sigmoid(1) - sigmoid(-1)) / 2
    assert choose.disagreement(members) == pytest.approx([2 / 3 * one**2])


def test_split_votes_by_hand():
    rankings = [
        [(1, 2), (2, 1)],  # one vote each way
        [(1, 2), (1, 2), (2, 1), (1, 1)],  # 2.5 of 4
        [(1, 2), (1, 2)],
        [(1, 2)],  # one alone
        [],
    ]
    assert choose.split_votes(rankings) == pytest.approx([1, 4 * 0.625 * 0.375, 0, 0, 0])


def test_closeness_by_hand():
    p = sigmoid(-3)
    assert choose.closeness([[2, 2], [0, 3], [1]]) == pytest.approx([1, 4 * p * (1 - p), 0])


def test_highest_takes_the_first_of_equals():
    assert choose.highest([1, 3, 3, 2], 3) == [1, 2, 3]
    assert choose.highest([1], 5) == [0]


def test_diverse_goes_to_the_farthest_item():
    features = np.array([[0.0, 0], [1, 0], [10, 0], [5, 0], [4.9, 0]])
    # the mean is 4.18: nearest is 4.9; then 10 is farthest (5.1 away; 0 is 4.9 away), then 0, then 1
    assert choose.diverse(features, 4) == [4, 2, 0, 1]
    assert sorted(choose.diverse(features, 9)) == [0, 1, 2, 3, 4]
    assert choose.diverse(np.zeros((0, 2)), 3) == []
    assert sorted(choose.diverse(np.zeros((4, 2)), 4)) == [0, 1, 2, 3]  # of equals each one once


def test_at_random_is_a_draw_without_repetition():
    drawn = choose.at_random(50, 20, seed=1)
    assert len(set(drawn)) == 20
    assert drawn == choose.at_random(50, 20, seed=1) != choose.at_random(50, 20, seed=2)
    assert sorted(choose.at_random(3, 9, seed=0)) == [0, 1, 2]
