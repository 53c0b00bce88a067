"""What a round of the flywheel decides: items by hand-made scores, waiting for people, and the gate."""

from __future__ import annotations

import threading
import uuid

import pytest

from rlhf.collection.rounds import chosen, gate, ranks_of, wait_for_people
from rlhf.collection.store import Answer, Candidate, Item, Store


class Model:
    """A reward model that reads a response's score off its text."""

    def __init__(self, sign=1.0):
        self.sign = sign

    def score(self, conversations):
        assert all(turns[-1]["role"] == "assistant" for turns in conversations)
        return [self.sign * float(turns[-1]["content"]) for turns in conversations]


def items(*scores):
    return [
        Item([{"role": "user", "content": f"Question {n}"}], tuple(Candidate(str(score)) for score in of))
        for n, of in enumerate(scores)
    ]


def prompts(found):
    return [item.prompt[0]["content"][-1] for item in found]


def test_closeness_takes_the_items_whose_scores_are_nearest():
    given = items((0.0, 4.0), (1.0, 1.1), (0.0, 0.5), (-3.0, 3.0))
    assert prompts(chosen(given, 2, "closeness", [Model(-9.0), Model()], seed=0)) == ["1", "2"]  # the last model's


def test_disagreement_takes_the_items_on_which_two_models_differ():
    given = items((0.0, 0.1), (0.0, 3.0), (0.0, 0.2))
    assert prompts(chosen(given, 1, "disagreement", [Model(), Model(-1.0)], seed=0)) == ["1"]
    alone = prompts(chosen(given, 2, "disagreement", [Model()], seed=0))
    assert alone == prompts(chosen(given, 2, "random", [], seed=0))  # one model cannot disagree


def test_diversity_takes_prompts_far_apart():
    texts = ["How do I bake bread?", "How do I bake a bread?", "Sum 19 and 23", "How do I bake breads?"]
    given = [Item([{"role": "user", "content": text}], (Candidate("a"), Candidate("b"))) for text in texts]
    assert "Sum 19 and 23" in [item.prompt[0]["content"] for item in chosen(given, 2, "diversity", [], seed=0)]


def test_equal_scores_share_a_rank():
    assert ranks_of([0.5, 2.0, 0.5, -1.0]) == (2.0, 1.0, 2.0, 3.0)


def entry(rate, families):
    return {
        "win_rate_vs_sft": sum(rate) / 2,
        "win_rate_ci": list(rate),
        "families": {
            name: {"win_rate_vs_sft": sum(found) / 2, "win_rate_ci": list(found)} for name, found in families.items()
        },
    }


@pytest.mark.parametrize(
    ("rate", "families", "passed", "reason"),
    [
        ((0.51, 0.6), {}, True, "wins 55.5%"),
        ((0.50, 0.6), {}, False, "not surely more than half"),
        ((0.6, 0.8), {"sums": (0.3, 0.5)}, True, "worse in no family"),
        ((0.6, 0.8), {"sums": (0.3, 0.49), "greetings": (0.9, 1.0)}, False, "but worse in sums 39.5% [30.0%, 49.0%]"),
    ],
)
def test_the_gate(rate, families, passed, reason):
    verdict = gate(entry(rate, families))
    assert verdict.passed == passed
    assert reason in verdict.reason


def test_it_waits_until_enough_people_have_judged(tmp_path):
    said = []
    with Store(tmp_path / "labels.db") as store:
        numbers = store.add_items(items((1.0, 2.0), (3.0, 4.0), (5.0, 6.0)), overlap=2)
        for person in ("ann", "ben"):
            store.add_annotator(person)

        def judge(count):
            for person in ("ann", "ben"):
                for task in store.lease(person, count):
                    ranks = {shown.id: float(n) for n, shown in enumerate(task.candidates)}
                    answer = Answer(assignment=task.assignment, submission=uuid.uuid4().hex, ranks=ranks)
                    store.submit(person, answer)

        judge(1)
        people = threading.Timer(0.2, lambda: judge(1))
        people.start()
        wait_for_people(store, numbers, 2, 0.6 * len(numbers), 0.02, said.append)
        people.join()
    assert said[0] == "1 of 3 items are judged"
    assert said[-1] == "2 of 3 items are judged"
