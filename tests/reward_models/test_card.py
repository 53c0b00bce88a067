"""The report card's numbers against hand arithmetic, with simple scorers: perfect, reversed, by length, random."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from reference import recipe, tiny_chain

from reward_models.card import baselines, calibration
from reward_models.card import pairs as card
from reward_models.card.page import advice, headlines, helps, page
from reward_models.card.report import report_card, reward_report, save_reward_report, score_rankings
from reward_models.card.sensitivity import ALONE, PADDING, VARIANTS, sensitivity
from reward_models.card.surface import FEATURES, spearman, surface
from reward_models.card.verdict import verdict
from rlhf.errors import InputError
from rlhf.rows.records import Ranking, read_rankings


class Scorer:
    """A stand-in for a reward model with `.score(conversations)`; `say` scores one conversation."""

    def __init__(self, say: Callable[[list[dict[str, str]]], float]) -> None:
        self.say = say

    def score(self, conversations):
        return np.array([self.say(messages) for messages in conversations])


def quality(messages) -> float:
    return float(re.search(r"q(\d+)", messages[-1]["content"])[1])


def coin(messages) -> float:
    return float(np.random.default_rng(list(messages[-1]["content"].encode())).normal())


PERFECT, CONTRARY = Scorer(quality), Scorer(lambda messages: -quality(messages))
BY_LENGTH, COIN = Scorer(lambda messages: float(len(messages[-1]["content"]))), Scorer(coin)


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def rankings(prompts: int, k: int = 3, seed: int = 0, **columns) -> list[Ranking]:
    """Make rankings of answers q0, q1, ... (a higher q is better) of random lengths; all texts differ."""
    draw = np.random.default_rng(seed)
    rows = []
    for number in range(prompts):
        order = draw.permutation(k)
        texts = tuple(f"q{q} of {seed}.{number} " + "x" * int(draw.integers(1, 60)) for q in order)
        here = {name: values[number % len(values)] for name, values in columns.items()}
        rows.append(Ranking(ask(f"Question {number}?"), texts, tuple(float(k - q) for q in order), here))
    return rows


def pairs_of(rows, scorer=PERFECT) -> card.ScoredPairs:
    return card.scored_pairs(rows, score_rankings(scorer, rows))


# ------------------------------------------------------------------------------------------- the headline


def test_perfect_contrary_and_constant_scorers():
    rows = rankings(40)
    for scorer, expected in ((PERFECT, 1.0), (CONTRARY, 0.0), (Scorer(lambda _: 3.0), 0.5)):
        found = report_card(scorer, rows)
        low, high = found["accuracy_ci"]
        assert (found["accuracy"], low <= expected <= high) == (expected, True)
        assert 0.04 < high - low < 0.1, "40 prompts never prove that no other is different"
        assert (found["n"], found["prompts"]) == (120, 40)


def test_a_gold_score_that_ties_pairs_says_how_many_it_does_not():
    """All tied: the card is made, without a share. Only the pairs apart count; labels that tie those give no share."""
    rows = rankings(20)
    assert report_card(PERFECT, rows, gold=Scorer(lambda _: 3.0)) == report_card(PERFECT, rows) | {"gold_n": 0}
    found = report_card(PERFECT, rows, gold=Scorer(lambda messages: float(quality(messages) > 1)))  # q0 = q1 < q2
    assert (found["gold_n"], found["gold_accuracy"], found["label_gold_accuracy"]) == (40, 1.0, 1.0)
    tied = [
        replace(row, ranks=tuple(float(quality([{"content": text}]) == 0) for text in row.responses)) for row in rows
    ]
    found = report_card(PERFECT, tied, gold=Scorer(lambda messages: max(1.0, quality(messages))))  # q0 = q1 < q2
    assert (found["gold_n"], found["label_gold_accuracy"]) == (40, 1.0), "of q0's pairs; q1 and q2 tie by label"
    only = [replace(row, responses=row.responses[:2], ranks=(1.0, 2.0)) for row in rows]
    apart = Scorer(lambda messages: quality(messages) if "Question 0?" in messages[0]["content"] else 1.0)
    assert report_card(PERFECT, only, gold=apart)["gold_n"] == 1


def test_a_length_scorer_is_the_longer_rule_and_a_coin_is_a_coin():
    rows = rankings(300)
    longer = sum(
        1.0 if len(r.responses[i]) > len(r.responses[j]) else 0.5 if len(r.responses[i]) == len(r.responses[j]) else 0.0
        for r in rows
        for i, j in combinations(sorted(range(3), key=lambda n: r.ranks[n]), 2)
    )
    found = reward_report(BY_LENGTH, rows, sensitivity_pairs=0)
    assert found["accuracy"] == pytest.approx(longer / 900)
    assert found["length_baseline"] == pytest.approx(max(longer, 900 - longer) / 900)
    low, high = report_card(COIN, rows)["accuracy_ci"]
    assert low < 0.5 < high
    # 900 pairs, 300 prompts: the interval of a coin is about +-4 points
    assert 0.06 < high - low < 0.11


def test_ties_and_equal_texts_are_dropped_and_counted():
    rows = [
        Ranking(ask("a"), ("q2", "q1", "q1", "q0"), (1, 2, 2, 3)),  # 6 couples, one of them a tie
        Ranking(ask("b"), ("q1", "q2"), (1, 1)),
        Ranking(ask("c"), ("q1", "q1"), (1, 2)),
    ]
    found = reward_report(PERFECT, rows, sensitivity_pairs=0)
    assert (found["n"], found["prompts"], found["responses"]) == (5, 1, 8)
    assert (found["ties_dropped"], found["rankings_without_a_pair"], found["rankings"]) == (3, 2, 3)


def test_the_interval_holds_the_truth_19_times_in_20():
    """The model gets all 6 pairs of a prompt right, or all wrong, so pairs are not independent."""
    held, held_by_pairs, worlds = 0, 0, 100
    for world in range(worlds):
        draw = np.random.default_rng(world)
        right = np.repeat((draw.random(50) < 0.7).astype(float), 6)
        low, high = card.accuracy(right, np.repeat(np.arange(50), 6), world)["accuracy_ci"]
        held += low <= 0.7 <= high
        half = 1.96 * math.sqrt(right.mean() * (1 - right.mean()) / 300)
        held_by_pairs += abs(right.mean() - 0.7) <= half
    assert 0.87 <= held / worlds <= 0.99
    assert held_by_pairs / worlds < 0.75, "what redrawing pairs would give"


def test_a_paired_difference_by_hand():
    first, second = np.array([1.0, 1, 0, 0.5]), np.array([0.0, 1, 1, 0.5])
    found = card.difference(first, second, np.arange(4), 0)
    assert found["difference"] == 0.0
    assert found["difference_ci"][0] == -found["difference_ci"][1] or found["difference_ci"][0] < 0
    same = card.difference(first, first, np.arange(4), 0)
    assert same["difference"] == 0.0
    half = 3.1824 * math.sqrt(2 / (6 * 5))  # Student's t, 3 degrees; 0, 0, 0, 0 and one of -1 and 1 each
    assert same["difference_ci"] == pytest.approx([-half, half], abs=1e-4)


# --------------------------------------------------------------------------------------------- baselines


def by_subset(each: int = 40, seed: int = 0) -> list[Ranking]:
    """In one subset every better response is the longer one, in the other every better one is the shorter."""
    rows = []
    for number in range(2 * each):
        better, worse = (("q1 and much more of it", "q0"), ("q1", "q0 and much more of it"))[number % 2]
        subset = ("alpacaeval-easy", "math-prm")[number % 2]
        rows.append(Ranking(ask(f"{seed}.{number}?"), (better, worse), (1, 2), {"subset": subset}))
    return rows


def test_the_length_rule_of_each_group_by_hand():
    found = reward_report(PERFECT, by_subset(), sensitivity_pairs=0)
    assert found["length_baseline"] == 0.5, "over both subsets length says nothing"
    assert found["length_by_group"]["subset"]["accuracy"] == 1.0
    easy, mathematics = found["groups"]["subset"]
    assert (easy["length_rule"], easy["length_baseline"], easy["n"]) == ("longer", 1.0, 40)
    assert (mathematics["length_rule"], mathematics["length_baseline"], mathematics["difference"]) == (
        "shorter",
        1.0,
        0.0,
    )
    (line,) = [line for line in advice(found) if line.startswith("Length alone decides 2 of 2 by subset")]
    assert "alpacaeval-easy (the longer: 100.0%" in line
    assert "math-prm (the shorter: 100.0%" in line
    assert any(line.startswith("The longer or the shorter by subset: 100.0%") for line in headlines(found))
    assert "the length rule of each subset" in verdict(found)


def test_a_group_s_length_rule_is_chosen_on_its_training_rows():
    turned = [Ranking(r.prompt, r.responses, (2, 1), r.columns) for r in by_subset(seed=1)]
    easy, mathematics = reward_report(PERFECT, by_subset(), train=turned, sensitivity_pairs=0)["groups"]["subset"]
    assert (easy["length_rule"], easy["length_baseline"]) == ("shorter", 0.0)
    assert (mathematics["length_rule"], mathematics["length_baseline"]) == ("longer", 0.0)


def test_length_that_decides_nothing_is_not_told():
    found = reward_report(PERFECT, rankings(200, k=2, subset=["one", "two"]), sensitivity_pairs=0)
    assert not [line for line in advice(found) if "ength" in line]


def test_a_benchmark_whose_subsets_go_by_length():
    found = [folder / "shared/cases/43/rb_len.jsonl" for folder in Path(__file__).resolve().parents]
    if not (files := [file for file in found if file.is_file()]):
        pytest.skip("needs ../shared/cases")
    rows = read_rankings(files[0])
    found = reward_report(BY_LENGTH, rows, sensitivity_pairs=0)
    assert (found["accuracy"], found["length_baseline"]) == (0.5, 0.5)
    assert any("Length alone decides 2 of 2 by subset" in line for line in advice(found))


# ----------------------------------------------------------------------------------------------- verdict


def leads(n: int, accuracy: float, interval: list[float], length: float, over: list[float]) -> dict:
    """Make the part of a report that a verdict reads."""
    lead = {"difference": accuracy - length, "difference_ci": over}
    return {
        "n": n, "accuracy": accuracy, "accuracy_ci": interval, "length_baseline": length, "length_rule": "longer",
        "over_length_rule": lead, "length_by_group": {}, "bag_of_words": None,
    }  # fmt: skip


def test_few_pairs_say_how_many_are_needed():
    """A standard error of .1008: (2.8 * .1008 / .083)^2 = 11.56 times 24 pairs are 278; so are (2.8 * .1276 / .125)^2
    times 24 pairs 196."""
    found = verdict(leads(24, 0.583, [0.385, 0.78], 0.458, [-0.125, 0.375]))
    assert found == (
        "24 pairs: too few to tell this model (58.3% [38.5, 78.0] right) from a coin (about 280 needed) or always "
        "taking the longer response (about 200 needed)."
    )


def test_many_pairs_say_what_is_beaten():
    assert verdict(leads(2000, 0.7, [0.68, 0.72], 0.55, [0.12, 0.18])) == (
        "Right on 70.0% [68.0, 72.0] of 2,000 held-out pairs: better than a coin and always taking the longer response."
    )
    mixed = verdict(leads(2000, 0.58, [0.55, 0.61], 0.56, [-0.02, 0.06]))
    assert mixed.startswith("2,000 pairs: too few to tell this model (58.0% [55.0, 61.0] right) from always taking the")
    assert mixed.endswith("It is better than a coin.")
    assert "It is worse than always taking the longer" in verdict(leads(900, 0.58, [0.55, 0.61], 0.7, [-0.15, -0.09]))
    worse = verdict(leads(900, 0.4, [0.37, 0.43], 0.4, [0.0, 0.0]))
    assert "always taking the longer response (no lead to be seen)" in worse
    assert worse.endswith("It is worse than a coin.")


def test_twelve_of_twelve_is_not_certain():
    """Wilson's interval of 12 of 12 begins at 75.8%; (12.1 / 5)^2 times 12 pairs are 70."""
    found = verdict(leads(12, 1.0, [0.758, 1.0], 0.5, [0.2, 0.8]))
    assert found.startswith("Right on 100.0% [75.8, 100.0] of 12 held-out pairs: better than a coin and always taking")
    assert found.endswith("About 70 pairs would narrow that to 5 points on either side.")


# ------------------------------------------------------------------------------------ length rule, bag of words


def test_the_length_rule_is_chosen_on_the_training_data():
    train = [Ranking(ask(f"t{n}"), ("long answer", "no"), (1, 2)) for n in range(5)]
    rows = [Ranking(ask(f"h{n}"), ("q1", "q0 and more"), (1, 2)) for n in range(8)]
    assert reward_report(PERFECT, rows, train=train, sensitivity_pairs=0)["length_rule"] == "longer"
    found = reward_report(PERFECT, rows, train=train, sensitivity_pairs=0)
    assert (found["length_baseline"], found["length_rule_chosen_on"]) == (0.0, "the training data")
    assert found["over_length_rule"]["difference"] == 1.0
    assert 0.3 < found["over_length_rule"]["difference_ci"][0] < 0.5
    assert found["over_length_rule"]["difference_ci"][1] == 1.0
    hindsight = reward_report(PERFECT, rows, sensitivity_pairs=0)
    assert (hindsight["length_rule"], hindsight["length_baseline"]) == ("shorter", 1.0)
    assert hindsight["length_rule_chosen_on"] == "these pairs"


def test_bag_of_words_minimises_its_loss():
    """Against plain gradient descent on the dense matrix of differences."""
    draw = np.random.default_rng(0)
    words = ["fox", "dog", "cat", "sky", "."]
    rows = [
        Ranking(ask(str(n)), tuple(" ".join(draw.choice(words, 6)) + f" {k}" for k in "ab"), (1, 2)) for n in range(40)
    ]
    data = baselines._Pairs.of(rows)
    assert set(data.vocabulary) == {*words, "a", "b"}
    texts = [text.split() for r in rows for text in r.responses]
    dense = np.array([[t.count(w) for w in data.vocabulary] for t in texts], dtype=float)
    matrix = dense[0::2] - dense[1::2]
    w = np.zeros(len(data.vocabulary))
    for _ in range(4000):
        w -= 0.01 * (2.0 * w - matrix.T @ (1 / (1 + np.exp(matrix @ w))))
    np.testing.assert_allclose(baselines.minimum(data, 2.0), w, atol=1e-5)
    np.testing.assert_allclose(data.differences(w), matrix @ w, atol=1e-12)


def test_bag_of_words_learns_a_word_and_nothing_from_noise():
    def world(first: int, count: int, telling: bool) -> list[Ranking]:
        draw, rows = np.random.default_rng(first), []
        for n in range(first, first + count):
            a, b = (" ".join(draw.choice(["red", "blue", "green", "big"], 5)) for _ in range(2))
            rows.append(Ranking(ask(f"p{n}"), (f"thanks {a}" if telling else f"{a} a", f"{b} b"), (1, 2)))
            if not telling and draw.random() < 0.5:
                rows[-1] = Ranking(ask(f"p{n}"), rows[-1].responses, (2, 1))
        return rows

    for telling in (True, False):
        model = baselines.fit_bag_of_words(world(0, 150, telling))
        assert model.pairs == 150
        held = pairs_of(world(1000, 150, telling), COIN)
        scores = model.score(held.texts)
        share = float((scores[held.better] > scores[held.worse]).mean())
        assert share == 1.0 if telling else abs(share - 0.5) < 0.13
    assert baselines.fit_bag_of_words([Ranking(ask("a"), ("one", "two"), (1, 2))]) is None, "no word twice"


def test_the_model_is_held_against_its_bag_of_words_in_pairs():
    train, rows = rankings(60, seed=1), rankings(40, seed=2)
    found = reward_report(PERFECT, rows, train=train, sensitivity_pairs=0)["bag_of_words"]
    assert found["accuracy"] == 1.0, "q0, q1 and q2 are words"
    assert found["difference"] == 0.0
    assert found["difference_ci"] == pytest.approx([-0.0689, 0.0689], abs=1e-4)  # 40 of 0, and one of -1 and 1 each
    assert found["training_pairs"] == 180


# ------------------------------------------------------------------------------------------------ groups


def test_groups_by_hand():
    rows = rankings(12, k=2, section=["easy", "easy", "hard"], agreement=[1.0, 0.6], note=["one", "one"])
    hard_wrong = Scorer(lambda m: quality(m) * (-1 if int(m[0]["content"].split()[1][:-1]) % 3 == 2 else 1))
    found = reward_report(hard_wrong, rows, sensitivity_pairs=0)
    assert list(found["groups"]) == ["section"]
    easy, hard = found["groups"]["section"]
    assert (easy["name"], easy["accuracy"], easy["n"]) == ("easy", 1.0, 8)
    assert (hard["name"], hard["accuracy"], hard["n"], hard["prompts"]) == ("hard", 0.0, 4, 4)
    assert [(row["name"], row["n"], row["accuracy"]) for row in found["labelers"]["agreement"]] == [
        ("0.6", 6, pytest.approx(4 / 6)),
        ("1.0", 6, pytest.approx(4 / 6)),
    ]
    assert list(reward_report(PERFECT, rows, group_by=["note"], sensitivity_pairs=0)["groups"]) == ["note"]


def test_by_margin_and_by_length_difference():
    texts = [("q9" + "x" * 18, "q1" + "x" * 18), ("q5", "q1" + "x" * 20), ("q3" + "x" * 30, "q1"), ("q2", "q1 ")]
    rows = [Ranking(ask(str(n)), pair, (1, 2)) for n, pair in enumerate(texts)]
    margins = card.by_margin(pairs_of(rows), 0)
    assert [row["mean_difference"] for row in margins] == [1.0, 2.0, 4.0, 8.0]
    lengths = {row["name"]: row["n"] for row in card.by_length_difference(pairs_of(rows), 0)}
    assert lengths == {
        "preferred is less than half as long": 1,
        "preferred is shorter": 1,  # 2 characters against 3
        "of like length (within 10%)": 1,
        "preferred is more than twice as long": 1,
    }


def test_rewardbench_sections():
    """Reasoning: mathematics and code weigh alike whatever their sizes; the other sections are means over pairs."""
    rows = [
        {"name": "alpacaeval-easy", "accuracy": 1.0, "n": 30},
        {"name": "mt-bench-easy", "accuracy": 0.5, "n": 10},
        {"name": "donotanswer", "accuracy": 0.25, "n": 8},
        {"name": "math-prm", "accuracy": 0.0, "n": 100},
        {"name": "hep-go", "accuracy": 1.0, "n": 1},
        {"name": "hep-js", "accuracy": 0.0, "n": 3},
    ]
    found = card.rewardbench_sections(rows)
    assert found["sections"] == {"Chat": 0.875, "Safety": 0.25, "Reasoning": 0.125}
    assert found["mean"] == pytest.approx(1.25 / 3)
    assert card.rewardbench_sections([*rows, {"name": "mine", "accuracy": 1.0, "n": 1}]) is None
    assert sum(len(subsets) for subsets in card.REWARDBENCH.values()) == 23


def test_the_worst_pairs():
    rows = [
        Ranking(ask(f"p{n}"), (f"q{a}", f"q{b}", "q0 "), (1, 2, 2)) for n, (a, b) in enumerate([(1, 9), (3, 5), (8, 2)])
    ]
    found = card.most_wrong(pairs_of(rows))
    assert [(row["preferred"], row["rejected"], row["difference"]) for row in found] == [
        ("q1", "q9", -8),
        ("q3", "q5", -2),
    ]
    assert found[0]["prompt"] == ask("p0")
    assert len(card.most_wrong(pairs_of(rankings(40), CONTRARY))) == 20
    assert card.most_wrong(pairs_of(rankings(40))) == []


def test_spread_by_hand():
    rows = [Ranking(ask("a"), ("q1", "q3"), (2, 1)), Ranking(ask("b"), ("q5", "q7"), (2, 1))]
    found = card.spread(pairs_of(rows))
    assert (found["mean"], found["std"]) == (4.0, pytest.approx(math.sqrt(5)))
    assert found["within_prompt_share"] == pytest.approx(1 / 5)
    assert found["quantiles"]["0.5"] == 4.0


# ------------------------------------------------------------------------------------------- calibration


def test_ece_brier_and_loss_by_hand():
    logit = lambda p: math.log(p / (1 - p))  # noqa: E731
    # two pairs at 80% confidence, one right; two at 60%, both right
    found = calibration.reliability(np.array([logit(0.8), -logit(0.8), logit(0.6), logit(0.6)]))
    assert [(row["confidence"], row["accuracy"], row["n"]) for row in found["curve"]] == [
        (pytest.approx(0.6), 1.0, 2),
        (pytest.approx(0.8), 0.5, 2),
    ]
    assert found["ece"] == pytest.approx((2 * 0.4 + 2 * 0.3) / 4)
    assert found["brier"] == pytest.approx((0.04 + 0.64 + 2 * 0.16) / 4)
    assert found["nll"] == pytest.approx(-(math.log(0.8) + math.log(0.2) + 2 * math.log(0.6)) / 4)
    coin = calibration.reliability(np.zeros(3))
    assert (coin["ece"], coin["brier"], coin["nll"]) == (0.0, 0.25, pytest.approx(math.log(2)))


def test_the_temperature_is_known_where_all_margins_are_alike():
    """k of n right at margin 2: the best probability is k/n, so 2 / T = logit(k/n)."""
    differences = np.array([2.0] * 7 + [-2.0] * 3)
    assert calibration.inverse_temperature(differences) == pytest.approx(math.log(0.7 / 0.3) / 2, abs=1e-9)
    assert calibration.inverse_temperature(-differences) == 0.0
    assert calibration.inverse_temperature(np.abs(differences)) is None
    assert calibration.inverse_temperature(np.zeros(4)) == 0.0


def test_a_model_that_is_too_sure_is_found_out_and_mended():
    draw = np.random.default_rng(0)
    true = draw.normal(0, 1.5, 4000)
    signed = np.where(draw.random(4000) < 1 / (1 + np.exp(-np.abs(true))), 1, -1) * np.abs(true)
    honest = calibration.calibration(signed, np.arange(4000), 0)
    boastful = calibration.calibration(3 * signed, np.arange(4000), 0)
    assert honest["ece"] < 0.03
    assert honest["temperature"] == pytest.approx(1.0, rel=0.08)
    assert boastful["ece"] > 0.1
    assert boastful["temperature"] == pytest.approx(3 * honest["temperature"], rel=1e-6)
    assert boastful["calibrated"]["ece"] < 0.03
    assert boastful["calibrated"]["nll"] == pytest.approx(honest["calibrated"]["nll"], abs=1e-9)


def test_the_temperature_is_never_judged_on_its_own_pairs():
    """Of two prompts, one is all right and one all wrong: each gets the other's temperature, which makes both worse."""
    differences, prompts = np.array([1.0] * 9 + [-1.0] * 2 + [1.0]), np.array([0] * 9 + [1] * 3)
    found = calibration.calibration(differences, prompts, 0)
    scale = calibration.inverse_temperature(differences[prompts == 1])
    assert scale == 0.0
    own = calibration.reliability(differences * calibration.inverse_temperature(differences))
    assert found["calibrated"]["nll"] > own["nll"]


def test_calibration_uses_the_differences_that_the_loss_saw():
    rows, scorer = rankings(30), Scorer(lambda m: quality(m) / 4)
    scorer.normalizer = type("Normalizer", (), {"std": 4.0})()
    found = reward_report(scorer, rows, sensitivity_pairs=0)["calibration"]
    assert found["scale"] == 4.0
    sigmoid = [1 / (1 + math.exp(-d)) for d in (1, 1, 2)]
    assert found["brier"] == pytest.approx(sum((1 - p) ** 2 for p in sigmoid) / 3)


def test_auc_by_hand():
    assert calibration.auc(np.array([3.0, 1.0]), np.array([2.0, 1.0])) == (1 + 1 + 0 + 0.5) / 4
    assert calibration.auc(np.array([]), np.array([1.0])) is None
    assert calibration.confidence_auc(np.array([3.0, 2.0, -1.0, -2.5])) == 3 / 4


def test_a_temperature_is_advised_only_where_it_helps_on_other_prompts():
    """A model that is too sure by a factor of 3 is mended; two prompts whose temperatures harm each other are not."""
    draw = np.random.default_rng(0)
    true = draw.normal(0, 1.5, 4000)
    signed = np.where(draw.random(4000) < 1 / (1 + np.exp(-np.abs(true))), 1, -1) * np.abs(true)
    assert helps(calibration.calibration(3 * signed, np.arange(4000), 0))
    found = calibration.calibration(np.array([1.0] * 9 + [-1.0] * 2 + [1.0]), np.array([0] * 9 + [1] * 3), 0)
    assert found["temperature"]
    assert found["calibrated"]["nll"] > found["nll"]
    assert not helps(found)
    report = reward_report(PERFECT, rankings(30), sensitivity_pairs=0) | {"calibration": found}
    told = " ".join(advice(report) + headlines(report))
    assert "Confidence is off by" in told
    assert "divide" not in told
    assert "leave the scores as they are" in page({**report, "about": {"reward_model": "x"}})
    for ece, nll, expected in ((0.1, 0.5, True), (0.3, 0.5, False), (0.1, 0.7, False)):
        numbers = {"temperature": 2.0, "ece": 0.2, "nll": 0.6, "calibrated": {"ece": ece, "nll": nll}}
        assert helps(numbers) == expected
    assert not helps({"temperature": None, "ece": 0.2, "nll": 0.6, "calibrated": {"ece": 0.1, "nll": 0.5}})


# ----------------------------------------------------------------------------------------------- surface


def test_spearman_by_hand():
    assert spearman([1, 2, 3], [10, 20, 15]) == pytest.approx(0.5)
    assert spearman([1, 2, 2, 3], [1, 2, 2, 9]) == pytest.approx(1.0)
    assert spearman([1, 2, 3], [1, 1, 1]) is None
    # ranks 1, 2.5, 2.5, 4 against 2, 1, 3, 4: covariance 3, squares 4.5 and 5
    assert spearman([1, 2, 2, 3], [2, 1, 3, 4]) == pytest.approx(3 / math.sqrt(4.5 * 5))


def test_features_of_a_text():
    text = "I'm sorry, I can’t do that.\n- one 12\n* two!\n3. three?"
    counts = {name: count(text) for name, count in FEATURES.items()}
    assert counts == {
        "characters": 53, "words": 13, "sentences": 4, "line breaks": 3, "list items": 3, "punctuation": 9,
        "digits": 3, "refusal phrases": 2,
    }  # fmt: skip


def test_what_a_length_scorer_goes_by():
    rows = rankings(100)
    found = surface(pairs_of(rows, BY_LENGTH), 0)
    characters = found["features"][0]
    assert characters["spearman"] == pytest.approx(1.0)
    assert characters["model_prefers_more"] == 1.0
    lengths = [(len(r.responses[i]), len(r.responses[j])) for r in rows for i, j in r.pairs()]
    differ = [a > b for a, b in lengths if a != b]
    assert characters["labels_prefer_more"] == pytest.approx(np.mean(differ))
    assert characters["n"] == len(differ)
    matched = [(a, b) for a, b in lengths if abs(a - b) <= 0.1 * max(a, b)]
    assert found["length_matched"]["n"] == len(matched)
    assert found["length_matched"]["accuracy"] == pytest.approx(
        np.mean([0.5 + 0.5 * np.sign(a - b) for a, b in matched])
    )
    assert surface(pairs_of(rows), 0)["length_matched"]["accuracy"] == 1.0


# ------------------------------------------------------------------------------------------- sensitivity


def changes(scorer, rows=None) -> dict[str, dict]:
    found = pairs_of(rows or rankings(50, k=2), scorer)
    return {row["name"]: row for row in sensitivity(scorer.score, found, 0)["changes"]}


def test_a_scorer_that_reads_meaning_only_does_not_move():
    for row in changes(PERFECT).values():
        assert (row["mean_change"], row["max_change"], row["flips"]) == (0.0, 0.0, 0.0)
    assert changes(PERFECT)[PADDING]["pairs"] == ALONE
    assert changes(PERFECT)[VARIANTS[0].name]["pairs"] == 50


def test_a_scorer_that_reads_padding_is_found():
    class Padded(Scorer):
        def score(self, conversations):
            widest = max(len(m[-1]["content"]) for m in conversations)
            return np.array([quality(m) + 0.5 * (widest > len(m[-1]["content"])) for m in conversations])

    row = changes(Padded(quality), rankings(200, k=2))[PADDING]
    assert 0.8 < row["mean_change"] <= 1.2, "half a point, of scores that spread by about half a point"


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        ("an empty system turn in front", lambda m: m[0]["role"] == "system"),
        ("the question between line breaks", lambda m: m[-2]["content"].endswith("\n")),
        ("the question after “User: ”", lambda m: m[-2]["content"].startswith("User: ")),
        ("a space after the response", lambda m: m[-1]["content"].endswith(" ")),
        ("a line break after the response", lambda m: m[-1]["content"].endswith("\n")),
    ],
)
def test_each_change_is_seen_by_the_scorer_that_minds_it(name, seen):
    """The scorer negates its scores: every pair flips, and each score moves from q to -q."""
    found = changes(Scorer(lambda m: (-1 if seen(m) else 1) * quality(m)))
    assert found[name]["flips"] == 1.0
    assert found[name]["mean_change"] == pytest.approx(2.0)  # q is 0 or 1, moved by 0 or 2, spread 1/2
    assert found[name]["max_change"] == pytest.approx(4.0)
    assert all(row["flips"] == 0 for other, row in found.items() if other != name)


def test_what_columns_do_to_a_score_is_no_change_of_the_template():
    """A text that the score reads in front of every response turns all scores round, before and after."""
    found = pairs_of(rankings(50, k=2), PERFECT)
    turned = replace(found, scores=-found.scores)
    for row in sensitivity(PERFECT.score, turned, 0)["changes"]:
        assert (row["max_change"], row["flips"]) == (0.0, 0.0)


def test_changes_that_cannot_be_made_say_so():
    def strict(messages):
        if messages[0]["role"] == "system":
            raise InputError("the chat template refuses the roles system, user")
        return quality(messages)

    assert "refuses the roles" in changes(Scorer(strict))[VARIANTS[0].name]["note"]
    rows = [Ranking([{"role": "system", "content": "s"}, *r.prompt], r.responses, r.ranks) for r in rankings(5)]
    assert "already" in changes(PERFECT, rows)[VARIANTS[0].name]["note"]


# --------------------------------------------------------------------------------------------- best of n


def test_best_of_n_is_the_mean_over_all_draws():
    draw = np.random.default_rng(0)
    proxy, other = np.array([0.3, -1.0, 2.0, 0.1, 0.7]), draw.normal(size=5)
    for n in range(1, 6):
        draws = [max(chosen, key=lambda i: proxy[i]) for chosen in combinations(range(5), n)]
        assert card.expected_best_of_n(proxy, other, n) == pytest.approx(np.mean([other[i] for i in draws]))
    assert card.expected_best_of_n(np.array([1.0, 1, 0]), np.array([4.0, 0, 9]), 3) == 2.0, "equals share"
    with pytest.raises(ValueError, match="n=6"):
        card.expected_best_of_n(proxy, other, 6)


def test_the_second_model_tells_good_from_bad_optimisation():
    rows = rankings(60, k=4)
    found = pairs_of(rows)
    agreed = card.best_of_n_curve(found, found.scores * 10 + 3, 0)
    assert [row["n"] for row in agreed["per_prompt"]] == [1, 2, 4]
    assert [row["kl_nats"] for row in agreed["per_prompt"]] == pytest.approx([0, math.log(2) - 0.5, math.log(4) - 0.75])
    assert [row["n"] for row in agreed["pool"]] == [1, 2, 4, 8, 16]
    for row in agreed["per_prompt"]:
        assert row["proxy"] == pytest.approx(row["second"])
    # q of 0..3: best of 4 is 3, that is 1.5 above the mean in deviations of sqrt(1.25)
    assert agreed["per_prompt"][-1]["proxy"] == pytest.approx(1.5 / math.sqrt(1.25))
    contrary = card.best_of_n_curve(found, -found.scores, 0)
    assert contrary["per_prompt"][-1]["second"] == pytest.approx(-1.5 / math.sqrt(1.25))
    assert (agreed["second_model"]["accuracy"], contrary["second_model"]["accuracy"]) == (1.0, 0.0)
    # likes q up to 2 and hates 3: rises, then falls
    bent = card.best_of_n_curve(found, np.where(found.scores == 3, -5.0, found.scores), 0)
    report = reward_report(PERFECT, rows, sensitivity_pairs=0) | {"best_of_n": bent}
    assert any("peaks at best of 1" in line for line in advice(report))


def test_pairs_of_the_same_prompt_count_as_its_responses():
    rows = [
        Ranking(r.prompt, (r.responses[i], r.responses[j]), (1, 2)) for r in rankings(20, k=4) for i, j in r.pairs()
    ]
    found = pairs_of(rows)
    assert (len(found.better), len(set(found.prompts))) == (120, 20)
    assert card.best_of_n_curve(found, found.scores, 0)["per_prompt"][-1]["n"] == 4


# -------------------------------------------------------------------------------------------- page, files


@pytest.mark.slow
def test_the_page_is_one_file_and_escapes_what_others_wrote(tmp_path: Path):
    rows = rankings(30, k=4, subset=["hep-go", "math-prm", "donotanswer"], labeler=[3, 7])
    evil = Ranking(ask("<script>alert(1)</script> $x_1$"), ("q0 <b>bold</b>", "q9"), (1, 2), {"subset": "hep-go"})
    found = reward_report(PERFECT, [*rows, evil], train=rankings(20, k=4, seed=9), second=BY_LENGTH)
    path = save_reward_report(found, tmp_path, {"reward_model": "<i>rm</i>", "data": "d.jsonl"})
    text = path.read_text()
    assert text.count("<svg") >= 8
    assert "<script" not in text
    assert "<b>bold" not in text
    assert "&lt;script&gt;" in text
    assert not re.findall(
        r"""(?:src|href|url|@import)\s*[=(]?\s*["']?\s*(?:https?:)?//[^"')\s>]+""",
        re.sub(r'xmlns(:\w+)?="[^"]*"', "", text),
    )
    assert not {"nan", "None", "inf"} & set(re.sub(r"<[^>]*>", " ", text).split())
    read = json.loads((tmp_path / "reward_report.json").read_text())
    assert read["accuracy"] == found["accuracy"]
    low, high = found["accuracy_ci"]
    assert read["metrics"]["accuracy"] == {"value": found["accuracy"], "low": low, "high": high, "n": found["n"]}
    low, high = found["over_length_rule"]["difference_ci"]
    told = {"value": found["accuracy"] - found["length_baseline"], "low": low, "high": high, "n": found["n"]}
    assert read["metrics"]["over_length_rule"] == pytest.approx(told)
    assert ("bag_of_words_accuracy" in read["metrics"]) == (found["bag_of_words"] is not None)
    assert read["about"]["data"] == "d.jsonl"
    assert page({**found, "about": read["about"]}) == text, "the same numbers make the same page"


@pytest.mark.parametrize("scorer", [PERFECT, CONTRARY, COIN, BY_LENGTH, Scorer(lambda _: 1.0)])
def test_every_scorer_has_a_page(scorer):
    found = reward_report(scorer, rankings(25), second=scorer, sensitivity_pairs=10)
    assert "None" not in " ".join(headlines(found))
    assert len(page({**found, "about": {"reward_model": "x"}})) > 5000
    told = " ".join(advice(found))
    assert ("coin" in told) == (scorer is not PERFECT)


def test_the_smallest_data_there_is():
    found = reward_report(PERFECT, rankings(1, k=2), train=rankings(1, k=2, seed=4), second=PERFECT)
    assert (found["accuracy"], found["n"], found["bag_of_words"]["accuracy"]) == (1.0, 1, 0.5)
    page({**found, "about": {"reward_model": "x"}})


# -------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("rows", "scorer", "message"),
    [
        ([], PERFECT, "got no pairs"),
        ([Ranking(ask("a"), ("q1", "q2"), (1, 1))] * 3, PERFECT, "all 3 rows are ties"),
        (rankings(2, k=2), Scorer(lambda _: math.nan), "4 of 4 scores are NaN or infinite"),
        (rankings(2, k=2), lambda prompts, completions, **columns: [1.0], "got 1 scores for 4 responses"),
        (rankings(2, k=2), lambda prompts, completions, **columns: [None] * 4, "4 of 4 scores are None"),
    ],
)
def test_bad_input_is_one_line(rows, scorer, message):
    with pytest.raises(InputError, match=message) as caught:
        reward_report(scorer, rows, sensitivity_pairs=0)
    assert "\n" not in str(caught.value)


def test_a_missing_column_names_those_that_are_there():
    with pytest.raises(InputError, match="no column 'sektion'; columns: section"):
        reward_report(PERFECT, rankings(4, section=["a", "b"]), group_by=["sektion"])


# ---------------------------------------------------------------------------------------------- recipe


@pytest.fixture
def scorer_folder(tmp_path: Path, tiny_model, tiny_tokenizer) -> Path:
    tiny_chain.shake(tiny_model, 0, 0.05)
    base = tiny_chain.save_base(tmp_path / "tiny", tiny_model, tiny_tokenizer)
    return tiny_chain.save_reward_model(tmp_path / "rm", base, tiny_tokenizer)


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
def test_the_recipe_on_a_rewardbench_file(tmp_path: Path, scorer_folder: Path):
    subsets = ["alpacaeval-easy", "llmbar-natural", "donotanswer", "math-prm", "hep-rust"]
    rows = [
        {"prompt": f"Question {n}?", "chosen": f"Good {n}.", "rejected": f"Bad answer {n}.", "subset": subsets[n % 5],
         "chosen_model": "a", "rejected_model": "b", "id": n}
        for n in range(20)
    ]  # fmt: skip
    data = write(tmp_path / "bench.jsonl", rows)
    train = write(tmp_path / "train.jsonl", [{**row, "prompt": f"Train {n}"} for n, row in enumerate(rows)])
    flags = ("--reward_model", scorer_folder, "--data", data)
    result = recipe.run("evaluate_reward_model", *flags, "--train_data", train, "--second_model", scorer_folder)
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[-1] == str(scorer_folder / "reward_report.html")
    found = json.loads((scorer_folder / "reward_report.json").read_text())
    assert set(found["rewardbench"]["sections"]) == {"Chat", "Chat Hard", "Safety", "Reasoning"}
    assert "RewardBench: " in result.out
    assert found["calibration"]["scale"] == tiny_chain.NORMALIZER.std
    assert found["best_of_n"]["second_model"]["accuracy"] == found["accuracy"]
    padding = found["sensitivity"]["changes"][0]
    assert padding["name"] == PADDING
    assert padding["max_change"] < 1e-4, "attention masks hide the padding"
    # elsewhere, without the rest
    out = tmp_path / "out"
    assert recipe.run("evaluate_reward_model", *flags, "--output_dir", out, "--sensitivity_pairs", 0).code == 0
    assert json.loads((out / "reward_report.json").read_text())["accuracy"] == found["accuracy"]
    for bad, message in (
        (("--data", tmp_path / "none.jsonl"), "no such file"),
        (("--train_data", data), "train_data, data: prompt: 20 in both"),
        (("--group_by", "[family]"), "no column 'family'"),
        (("--reward_model", "org/model"), "--output_dir is missing"),
        (("--data", write(tmp_path / "x.jsonl", [{"prompt": "a", "chosen": "b"}])), "rejected: missing"),
    ):
        refused = recipe.run("evaluate_reward_model", *flags, *bad)
        assert refused.code == 2, refused.out
        (line,) = refused.err.splitlines()
        assert message in line
