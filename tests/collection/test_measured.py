"""Measures of a whole store, against hand arithmetic."""

from __future__ import annotations

import random

import pytest
from reference.labelling import answer, item, items

from rlhf.collection import measured
from rlhf.collection.report import shown
from rlhf.collection.store import Plan, Store

KRIPPENDORFF = {"A": "123321412...", "B": "1233224125.3", "C": ".3332342251.", "D": "12332441251."}
"""Content Analysis (2004), 11.3: a point is a value that is missing."""


@pytest.fixture
def store(tmp_path, no_fsync):
    with Store(tmp_path / "labels.db") as store:
        yield store


def judge(store, name, ranks, seconds=None):
    """Have an annotator judge all that they get; ranks: the item's name -> ranks in stored order."""
    store.add_annotator(name)
    while tasks := store.lease(name):
        at = tasks[0].prompt[0]["content"].removeprefix("question ")
        store.submit(name, answer(tasks[0], ranks(at), seconds=seconds))


def test_an_empty_store_says_that_it_is_too_little(store):
    taken = measured.snapshot(store)
    assert {measure.value for measure in measured.status(taken).values()} == {0}
    found = measured.measure(taken)
    assert all(measure.value is None and measure.note.startswith("too few") for measure in found.metrics.values())
    assert (found.annotators, found.pairs, found.positions, found.criteria) == ([], [], [], [])


def test_the_tasks_of_each_annotator_are_counted(store):
    store.add_items(items(3))
    for name in ("bob", "ann"):
        store.add_annotator(name)
    for task in store.lease("ann", 2):
        store.submit("ann", answer(task))
    store.skip("ann", store.lease("ann")[0].assignment)
    store.lease("ann")
    store.lease("bob")
    assert measured.snapshot(store).progress == {
        "ann": {"done": 2, "leased": 0, "skipped": 1, "expired": 0},
        "bob": {"done": 0, "leased": 1, "skipped": 0, "expired": 0},
    }


def test_one_annotator_alone_agrees_with_nobody(store):
    store.add_items(items(5))
    judge(store, "ann", lambda at: (1, 2, 3), seconds=2)
    found = measured.measure(measured.snapshot(store))
    assert found.metrics["agreement"].note == "too few: 0 item judged by two annotators"
    assert found.metrics["alpha_ordinal"].value is None
    assert found.metrics["position_bias"].n == 15
    assert found.metrics["seconds_median"].value == 2


def test_agreement_of_two_by_hand(store):
    store.add_items(items(4, 2), overlap=2)
    judge(store, "ann", lambda at: (1, 2), seconds=1)
    judge(store, "bob", lambda at: {"q0": (2, 1), "q1": (1, 1)}.get(at, (1, 2)), seconds=5)
    found = measured.measure(measured.snapshot(store))
    assert (found.metrics["agreement"].value, found.metrics["agreement"].n) == (0.5, 4)
    assert (found.metrics["agreement_decided"].value, found.metrics["agreement_decided"].n) == (pytest.approx(2 / 3), 3)
    # pairs in both directions: 1 -1 each of ann's four; alike 4 of 8; ann +- 4, bob + 3 - 3 0 2
    assert found.pairs[0].kappa.value == pytest.approx((0.5 - 24 / 64) / (1 - 24 / 64))
    assert found.pairs[0].items == 4
    assert [who.name for who in found.annotators] == ["ann", "bob"]
    assert found.annotators[0].agreement == found.annotators[1].agreement == found.metrics["agreement"]
    assert [found.metrics[f"seconds_{name}"].value for name in ("quartile_1", "median", "quartile_3")] == [1, 3, 5]
    assert found.metrics["kendall_tau_b"].n == 3  # bob's tie of q1 has none


def test_ratings_of_krippendorffs_example_have_his_alphas(store):
    """Twelve items of one candidate, rated from 1 to 5 by four annotators, not all by all."""
    store.add_items(items(12, 1), overlap=4)
    for name, values in KRIPPENDORFF.items():
        store.add_annotator(name)
        for task in store.lease(name, 12):
            rating = values[int(task.prompt[0]["content"].removeprefix("question q"))]
            if rating == ".":
                store.skip(name, task.assignment)
            else:
                rated = {task.candidates[0].id: {"clarity": int(rating)}}
                store.submit(name, answer(task, ratings=rated, ranks=None))
    (clarity,) = measured.measure(measured.snapshot(store)).criteria
    assert (clarity.criterion, clarity.ratings) == ("clarity", 41)
    alphas = (clarity.alpha_nominal, clarity.alpha_ordinal, clarity.alpha_interval)
    assert [round(alpha.value, 3) for alpha in alphas] == [0.743, 0.815, 0.849]
    assert {alpha.n for alpha in alphas} == {11}  # the twelfth has one rating
    assert all(alpha.low < alpha.value < alpha.high for alpha in alphas)


@pytest.mark.parametrize(("count", "turned", "note"), [
    (9, 3, "too few for an interval: 9 items judged by two annotators, 10 are needed"),
    (12, 0, "no interval: redrawn items say nothing else"),
])  # fmt: skip
def test_alpha_of_few_items_or_of_perfect_agreement_has_no_interval(store, count, turned, note):
    store.add_items(items(count, 2), overlap=2)
    judge(store, "ann", lambda at: (1, 2))
    judge(store, "bob", lambda at: (2, 1) if int(at[1:]) < turned else (1, 2))
    alpha = measured.measure(measured.snapshot(store)).metrics["alpha_nominal"]
    assert alpha.value is not None
    assert (alpha.low, alpha.high, alpha.n, alpha.note) == (None, None, count, note)
    assert shown("alpha_nominal", alpha) == f"{alpha.value:.3f} ({note})"


def test_gold_items_measure_annotators_and_nothing_else(store):
    store.set_plan(Plan(gold_share=0.5))
    store.add_items(items(40, 3), overlap=2)
    store.add_items([item(f"g{n}", gold_ranks=(1, 2, 3)) for n in range(10)], line="gold")
    judge(store, "ann", lambda at: (1, 2, 3))
    judge(store, "bob", lambda at: (1, 3, 2) if at.startswith("g") else (1, 2, 3))
    found = measured.measure(measured.snapshot(store))
    assert found.metrics["agreement"].value == 1
    assert found.annotators[0].gold_accuracy.value == 1
    assert found.annotators[1].gold_accuracy.value == pytest.approx(2 / 3)
    assert found.annotators[1].gold_accuracy.n == 30
    assert found.metrics["gold_accuracy"].value == pytest.approx(5 / 6)


def test_a_planted_position_bias_of_5_points_is_inside_its_interval(store):
    """Through the store: annotators who take the pair's first response 55% of the time, in the order drawn for them."""
    draw = random.Random(2)
    store.add_items(items(1200, 2), overlap=2)
    for name in ("ann", "bob"):
        store.add_annotator(name)
        for task in store.lease(name, 1200):
            first, second = (shown.id for shown in task.candidates)
            ranks = {first: 1, second: 2} if draw.random() < 0.55 else {first: 2, second: 1}
            at = [ranks[shown.id] for shown in task.stored]
            store.submit(name, answer(task, at))
    found = measured.measure(measured.snapshot(store))
    bias = found.metrics["position_bias"]
    assert bias.n == 2400
    assert bias.low < 0.05 < bias.high
    assert bias.low > 0
    ranks = {at.position: at.scaled_rank for at in found.positions}
    assert ranks[1].value == pytest.approx(0.5 - bias.value)
    assert ranks[2].value == pytest.approx(0.5 + bias.value)
