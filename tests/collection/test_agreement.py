"""Agreement: Krippendorff's own example, hand arithmetic, slow loops, planted biases."""

from __future__ import annotations

import math
import random
from itertools import combinations, permutations

import numpy as np
import pytest

from rlhf.collection import agreement as agree
from rlhf.collection.agreement import Ranked

NONE = None
KRIPPENDORFF = (  # Content Analysis (2004), 11.3: four observers, twelve units, some values missing
    (1, 2, 3, 3, 2, 1, 4, 1, 2, NONE, NONE, NONE),
    (1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NONE, 3),
    (NONE, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NONE),
    (1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NONE),
)
UNITS = [[row[n] for row in KRIPPENDORFF if row[n] is not None] for n in range(12)]
DISTANCES = {"nominal": agree.nominal, "ordinal": agree.ordinal, "interval": agree.interval}


@pytest.mark.parametrize(("name", "alpha"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_of_krippendorffs_example(name, alpha):
    assert round(agree.krippendorff_alpha(UNITS, DISTANCES[name]), 3) == alpha


def slow_alpha(units, name):
    """Alpha from its definition: disagreement of every ordered pair of values within units, and of all values."""
    paired = [unit for unit in units if len(unit) > 1]
    pool = [value for unit in paired for value in unit]
    used = {value: pool.count(value) for value in sorted(set(pool))}

    def apart(a, b):
        if name == "nominal":
            return float(a != b)
        if name == "interval":
            return (a - b) ** 2
        low, high = min(a, b), max(a, b)
        between = sum(count for value, count in used.items() if low <= value <= high)
        return 0.0 if a == b else (between - (used[a] + used[b]) / 2) ** 2

    observed = sum(apart(a, b) / (len(unit) - 1) for unit in paired for a, b in permutations(unit, 2)) / len(pool)
    expected = sum(apart(a, b) for a, b in permutations(pool, 2)) / (len(pool) * (len(pool) - 1))
    return 1 - observed / expected


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("seed", range(4))
def test_alpha_is_that_of_a_slow_loop(name, seed):
    draw = random.Random(seed)
    units = [[draw.choice((1, 1, 2, 3.5, 7)) for _ in range(draw.choice((0, 1, 2, 3, 5)))] for _ in range(25)]
    assert agree.krippendorff_alpha(units, DISTANCES[name]) == pytest.approx(slow_alpha(units, name), abs=1e-12)


def test_alpha_is_not_defined_without_two_different_values():
    assert agree.krippendorff_alpha([[1], [2]], agree.nominal) is None  # nothing is paired
    assert agree.krippendorff_alpha([[1, 1], [1, 1]], agree.nominal) is None
    assert agree.alpha_interval([[[1, 1]], [[1, 1]]], agree.nominal, seed=0) is None
    assert agree.krippendorff_alpha([[1, 1], [2, 2]], agree.ordinal) == 1.0


def test_the_interval_of_alpha_is_around_alpha_of_all_units():
    clusters = [[unit, unit[:2]] for unit in UNITS]
    alpha = agree.alpha_interval(clusters, agree.ordinal, seed=1)
    assert alpha.value == pytest.approx(
        agree.krippendorff_alpha([unit for units in clusters for unit in units], agree.ordinal)
    )
    assert alpha.low < alpha.value < alpha.high <= 1
    assert agree.alpha_interval(clusters, agree.ordinal, seed=1) == alpha


def test_kappa_by_hand():
    # 20 and 15 alike of 50; yes by 25 and 30 of 50: chance (25 * 30 + 25 * 20) / 2500 = 0.5
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert agree.cohen_kappa(first, second) == pytest.approx((0.7 - 0.5) / (1 - 0.5))
    assert agree.cohen_kappa(["a", "a"], ["a", "a"]) is None
    with pytest.raises(ValueError, match="got 1 and 2"):
        agree.cohen_kappa(["a"], ["a", "b"])


def test_midranks_and_scaled_ranks_by_hand():
    assert agree.midranks([1, 1, 2, 3]) == [1.5, 1.5, 3, 4]
    assert agree.midranks([9, -1, 9, 9]) == [3, 1, 3, 3]
    assert agree.scaled_ranks([1, 1, 2, 3]) == pytest.approx([1 / 6, 1 / 6, 2 / 3, 1])
    assert agree.scaled_ranks([5]) == [0]


def test_tau_b_by_hand_and_by_a_slow_loop():
    assert agree.kendall_tau_b([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(4 / 6)  # 5 concordant, 1 discordant
    assert agree.kendall_tau_b([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / math.sqrt(2 * 3))
    assert agree.kendall_tau_b([1, 2], [2, 1]) == -1
    assert agree.kendall_tau_b([1, 1], [1, 2]) is None
    draw = random.Random(3)
    for _ in range(30):
        one, other = ([draw.randint(1, 4) for _ in range(6)] for _ in range(2))
        signs = [(np.sign(one[i] - one[j]), np.sign(other[i] - other[j])) for i, j in permutations(range(6), 2)]
        top = sum(a * b for a, b in signs)
        below = math.sqrt(sum(a * a for a, _ in signs) * sum(b * b for _, b in signs))
        assert agree.kendall_tau_b(one, other) == (pytest.approx(top / below) if below else None)


JUDGED = [
    Ranked("q1", "ann", (1, 2, 2)),
    Ranked("q1", "bob", (1, 2, 3)),
    Ranked("q2", "ann", (2, 1, 3)),
    Ranked("q2", "bob", (1, 2, 3)),
    Ranked("q3", "ann", (1, 2, 3)),
]


def test_pairs_with_ties_by_hand():
    pairs = agree.compared(JUDGED)
    # q1: 1>2 alike, 1>3 alike, 2=3 against 2>3; q2: 2>1 against 1>2, two alike; q3 has one annotator
    assert [pair.outcomes for pair in pairs] == [(1, 1), (1, 1), (0, 1), (-1, 1), (1, 1), (1, 1)]
    values, items = agree.alike(pairs)
    assert values == [1, 1, 0, 0, 1, 1]
    assert items == ["q1"] * 3 + ["q2"] * 3
    assert agree.alike(agree.decided(pairs))[0] == [1, 1, 0, 1, 1]
    taus, at = agree.kendall_taus(JUDGED)
    assert taus == pytest.approx([2 / math.sqrt(2 * 3), 1 / 3])
    assert at == ["q1", "q2"]


def test_pairwise_measures_do_not_depend_on_which_candidate_is_stored_first():
    draw = random.Random(5)
    judged = [
        Ranked(item, who, [draw.randint(1, 3) for _ in range(4)]) for item in range(30) for who in ("ann", "bob", "cy")
    ]
    turned = [ranked._replace(ranks=ranked.ranks[::-1] if ranked.item % 2 else ranked.ranks) for ranked in judged]
    alphas = [
        agree.krippendorff_alpha([unit for units in agree.pair_units(some) for unit in units], agree.nominal)
        for some in (judged, turned)
    ]
    assert alphas[0] == pytest.approx(alphas[1])
    kappas = [agree.pair_kappa(agree.compared(some)) for some in (judged, turned)]
    assert kappas[0] == pytest.approx(kappas[1])


def test_gold_accuracy_by_hand():
    right, items = agree.gold_accuracy(JUDGED[:4], {"q1": (1, 2, 3), "q2": (1, 1, 2)})
    assert right == [1, 1, 0.5, 1, 1, 1, 1, 1, 1, 1]  # gold ties the first two of q2
    assert items == ["q1"] * 6 + ["q2"] * 4


def test_the_candidate_shown_earlier_by_hand():
    judged = [
        Ranked("q1", "ann", (1, 2, 2), (1, 0, 2)),
        Ranked("q1", "bob", (1, 2, 3)),
        JUDGED[4]._replace(order=(0, 1, 2)),
    ]
    # shown 1, 0, 2: 1 loses to 0, ties with 2, and 0 beats 2; nobody knows what bob saw
    assert agree.earlier_wins(judged) == ([0, 1, 1, 1, 1], ["q1", "q1", "q3", "q3", "q3"])


@pytest.mark.parametrize("planted", [0.0, 0.05])
def test_a_planted_position_bias_is_inside_its_interval(planted):
    """Of pairs shown in a drawn order, the earlier one wins with probability 1/2 + bias, whatever it is worth."""
    from rlhf.intervals import clustered_mean

    draw, judged = random.Random(11), []
    for item in range(3000):
        order = draw.sample(range(2), 2)
        first_wins = draw.random() < 0.5 + planted
        ranks = [0, 0]
        ranks[order[0]], ranks[order[1]] = (1, 2) if first_wins else (2, 1)
        judged.append(Ranked(item, "ann", ranks, order))
    value, low, high = clustered_mean(*agree.earlier_wins(judged))
    assert low - 0.5 < planted < high - 0.5
    assert high - low < 0.05  # narrow enough to tell 5 points from none
    assert (low > 0.5) == (planted > 0)
    assert value == pytest.approx(0.5 + planted, abs=0.03)


def test_units_of_ranks_and_pairs_by_hand():
    judged = [Ranked("q", "ann", (1, 2)), Ranked("q", "bob", (1, 1)), Ranked("r", "ann", (2, 1))]
    assert agree.rank_units(judged) == [[(0, 0.5), (1, 0.5)], [(1,), (0,)]]
    assert agree.pair_units(judged) == [[[1, 0], [-1, 0]], [[-1], [1]]]
    assert len(list(combinations(range(3), 2))) == len(agree.compared([Ranked("q", w, (1, 2, 3)) for w in "ab"]))
