"""Human review: what queues, what people see, what their decisions measure, and that it ends with its conversation."""

from __future__ import annotations

import uuid

import pytest

from reward_models.labelled_texts import read_labelled
from rlhf.collection import review
from rlhf.collection.project import Project, check_ratings
from rlhf.collection.store import Answer, Conversation, Item, Store
from rlhf.collection.store import Candidate as StoredCandidate
from rlhf.errors import InputError
from rlhf.intervals import clustered_mean

CATEGORIES = ("hate", "insult")


def conversation(n: int, consent: bool = True, **more) -> Conversation:
    talk = [{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": f"answer {n}"}]
    given = {"messages": talk, "person": f"p{n}", "scrubbed": True, "consent": consent, "expires": 1_000.0}
    return Conversation(id=f"c{n:03}", policy="ppo", seed=n, **(given | more))


@pytest.fixture
def store(tmp_path):
    clock = [100.0]
    with Store(tmp_path / "review.db", clock=lambda: clock[0]) as opened:
        opened.now = clock
        yield opened


def decide(store: Store, decisions: dict[str, tuple[int, tuple[str, ...]]], annotator: str = "ann") -> None:
    """Give each conversation's decision, as the page sends it."""
    store.add_annotator(annotator, "person")
    project = Project.from_json(store.setting(review.PROJECT))
    for task in store.lease(annotator, 100):
        point, flags = decisions[task.prompt[0]["content"]]
        shown = task.candidates[0].id
        answer = Answer(
            assignment=task.assignment, submission=uuid.uuid4().hex, ranks={shown: 1},
            ratings={shown: {review.DECISION: point}}, flags=flags,
        )  # fmt: skip
        check_ratings(answer.ratings, project)
        store.submit(annotator, answer)


def test_flagged_conversations_queue_and_a_share_of_the_others(store):
    talks = [conversation(n) for n in range(200)]
    flags = [["hate"] if n < 5 else [] for n in range(200)]
    put = review.queue(store, talks, flags, 0.1, seed=0)
    assert put.flagged == 5
    assert 8 <= put.others <= 32
    assert review.queue(store, talks, flags, 0.1, seed=0) == put  # the same again: nothing is drawn anew
    assert len(store.items()) == put.flagged + put.others
    item = next(item for item in store.items() if item.columns["flagged"])
    assert (item.source, item.person, item.candidates[0].policy) == ("review", "p0", "ppo")
    assert item.columns == {
        "conversation": "c000", "flagged": ["hate"], "chance": 1.0, "copies": 1, "trainable": True,
        "review_expires": 1_000.0,
    }  # fmt: skip
    empty = conversation(300, messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}])
    assert review.queue(store, [empty], [["hate"]], 0.1, 0).empty == 1


def test_decisions_measure_the_classifier_and_become_its_rows(store):
    review.set_project(store, CATEGORIES)
    talks = [conversation(0), conversation(1), conversation(2, consent=False), conversation(3), conversation(4)]
    review.queue(store, talks, [["hate"], ["hate"], ["insult"], [], []], 1.0, seed=0)
    said = {
        "question 0": (2, ("hate",)), "question 1": (1, ()), "question 2": (2, ("insult",)),
        "question 3": (2, ("hate", "insult")), "question 4": (1, ()),
    }  # fmt: skip
    decide(store, said)
    decisions, none = review.decisions_in(store)
    assert (len(decisions), none) == (5, 0)
    found = review.measured(decisions)
    assert found["review_precision"]["value"] == pytest.approx(2 / 3)
    assert found["review_missed"]["value"] == pytest.approx(1 / 2)
    assert found["review_recall"]["value"] == pytest.approx(2 / 3)
    rows, left = review.training_rows(decisions, CATEGORIES)
    assert left == 1  # its sender did not agree
    records = read_labelled(rows)
    assert [dict(record.labels) for record in records] == [
        {"hate": True, "insult": False}, {"hate": False, "insult": False}, {"hate": True, "insult": True},
        {"hate": False, "insult": False},
    ]  # fmt: skip
    assert records[0].text == "user: question 0\n\nassistant: answer 0"
    assert records[0].columns == {"labeler": "ann", "weight": 1.0}


def test_recall_weighs_what_was_drawn(store):
    review.set_project(store, CATEGORIES)
    talks, share = [conversation(n) for n in range(40)], 0.5
    review.queue(store, talks, [["hate"] if n < 10 else [] for n in range(40)], share, seed=1)
    missed = [item for item in store.items() if not item.columns["flagged"]][:2]
    wrong = {item.prompt[0]["content"] for item in missed}
    decide(
        store, {f"question {n}": (2, ("hate",)) if n < 10 or f"question {n}" in wrong else (1, ()) for n in range(40)}
    )
    found = review.measured(review.decisions_in(store)[0])
    assert found["review_recall"]["value"] == pytest.approx(10 / (10 + 2 / share))


def test_recall_counts_conversations_of_one_text(store):
    """One flagged text that was logged 100 times beside 100 missed ones, half of them drawn: half are caught."""
    review.set_project(store, CATEGORIES)
    often = conversation(0).messages
    talks = [conversation(n, messages=often) for n in range(100)] + [conversation(n) for n in range(100, 200)]
    put = review.queue(store, talks, [["hate"] if n < 100 else [] for n in range(200)], 0.5, seed=0)
    assert put.flagged == 1
    decide(store, {item.prompt[0]["content"]: (2, ("hate",)) for item in store.items()})
    decisions = review.decisions_in(store)[0]
    drawn = len(store.items()) - 1
    assert review.measured(decisions)["review_recall"]["value"] == pytest.approx(100 / (100 + drawn / 0.5))
    assert 35 <= drawn <= 65


def test_precision_counts_conversations_of_one_text(store):
    review.set_project(store, CATEGORIES)
    talks = [conversation(n, messages=conversation(n // 3).messages) for n in range(4)]
    review.queue(store, talks, [["hate"]] * 4, 0.1, seed=0)
    decide(store, {"question 0": (2, ("hate",)), "question 1": (1, ())})
    assert review.measured(review.decisions_in(store)[0])["review_precision"]["value"] == pytest.approx(3 / 4)


def decided(id: int, flag: bool, chance: float, copies: int = 1, annotator: str = "ann", among: int = 1):
    columns = {"flagged": [], "chance": chance, "copies": copies}
    about = Item([{"role": "user", "content": f"{id}"}], (StoredCandidate("a"),), columns, id=id)
    return review.Decision(about, annotator, flag, (), among)


def test_what_was_missed_weighs_what_was_drawn():
    """20 that an earlier moderator flagged, half of them rightly, beside 50 of 5,000 others: 10 of 5,020."""
    formerly = [decided(n, n < 10, 1.0) for n in range(20)]
    found = review.measured(formerly + [decided(100 + n, False, 0.01) for n in range(50)])["review_missed"]
    assert found["value"] == pytest.approx(10 / (20 + 50 / 0.01))
    assert (found["low"], found["high"], found["n"]) == (None, None, 70)


def test_people_share_a_decision_and_a_text_counts_for_its_copies():
    """Of four conversations, three of one text that one of two people flags: 3/2 of 4."""
    two = [decided(1, flag, 0.1, 3, name, 2) for flag, name in ((True, "ann"), (False, "bob"))]
    found = review.measured([*two, decided(2, False, 0.1)])["review_missed"]
    assert found["value"] == pytest.approx(1.5 / 4)
    alike = clustered_mean([0.5, 0.5, 0.5, 0.0], [1, 1, 1, 2])
    assert (found["low"], found["high"]) == pytest.approx(alike.interval)


def test_an_unflagged_text_is_drawn_once_however_often_it_was_logged(store):
    """100 copies with a chance each would draw nearly every text."""
    talks = [conversation(n, messages=conversation(n % 100).messages) for n in range(10_000)]
    assert 2 <= review.queue(store, talks, [[]] * 10_000, 0.1, seed=0).others <= 20
    assert {item.columns["copies"] for item in store.items()} == {100}


def test_what_is_there_gets_the_higher_chance_and_the_new_flags(store):
    talks = [conversation(n) for n in range(200)]
    columns = lambda: {item.prompt[0]["content"]: item.columns for item in store.items()}  # noqa: E731
    few = review.queue(store, talks, [[]] * 200, 0.1, seed=0).others
    first = columns()
    assert review.queue(store, talks, [[]] * 200, 0.5, seed=0).others > few
    assert {about["chance"] for about in columns().values()} == {0.5}
    assert first.keys() < columns().keys()
    review.queue(store, talks, [[]] * 200, 0.1, seed=0)
    assert {about["chance"] for about in columns().values()} == {0.5}  # they are there by the larger share
    name = next(iter(first))
    flags = [["hate"] if talk.messages[0]["content"] == name else [] for talk in talks]
    review.queue(store, talks, flags, 0.5, seed=0)
    assert (columns()[name]["flagged"], columns()[name]["chance"]) == (["hate"], 1.0)


def test_a_sender_who_agrees_makes_a_logged_text_trainable(store):
    refused, agreed = conversation(0, consent=False, expires=500.0), conversation(1, messages=conversation(0).messages)
    review.queue(store, [refused], [["hate"]], 0.1, seed=0)
    assert not store.items()[0].columns["trainable"]
    for talks in ([agreed], [refused]):  # whoever comes last
        review.queue(store, talks, [["hate"]], 0.1, seed=0)
        (item,) = store.items()
        assert (item.columns["trainable"], item.columns["conversation"], item.person) == (True, "c001", "p1")
        assert item.columns["review_expires"] == 1_000.0


def test_contradictions_are_no_decisions_and_several_people_share_a_row(store):
    review.set_project(store, CATEGORIES)
    review.queue(store, [conversation(0), conversation(1)], [["hate"], ["hate"]], 0.1, seed=0, overlap=2)
    decide(store, {"question 0": (2, ("hate",)), "question 1": (1, ("hate",))}, "ann")
    decide(store, {"question 0": (2, ()), "question 1": (2, ("insult",))}, "ben")
    decisions, none = review.decisions_in(store)
    assert none == 1  # allowed, and yet in a category
    rows, left = review.training_rows(decisions, CATEGORIES)
    assert left == 1  # flagged without a category: nothing is known of any
    assert [row["weight"] for row in rows] == [0.5, 1.0]


def test_items_end_with_their_conversation(store):
    review.queue(store, [conversation(n) for n in range(3)], [["hate"]] * 3, 0.1, seed=0)
    other = Item([{"role": "user", "content": "a"}], (StoredCandidate("b"),), {"review_expires": 1.0}, "mine.jsonl")
    store.add_items([other])
    assert store.erase(person="p1")["items"] == 1
    store.now[0] = 999.0
    assert store.expire() == 0
    store.now[0] = 1_001.0
    assert store.expire() == 2
    assert [item.source for item in store.items()] == ["mine.jsonl"]


def test_another_project_is_not_overwritten(store):
    review.set_project(store, CATEGORIES)
    review.set_project(store, CATEGORIES)
    with pytest.raises(InputError, match="is labelled for another project"):
        review.set_project(store, ("spam",))
    with pytest.raises(InputError, match="10 categories, and the page shows 1 to 9"):
        review.project_of([str(n) for n in range(10)])
