"""The store's records: what goes in comes out, judgments are appended, submissions repeat, tokens are hashed."""

from __future__ import annotations

import json
import sqlite3

import pytest
from reference.labelling import Clock, answer, item, items

from rlhf.collection.store import Answer, Candidate, Item, Plan, Store, Task
from rlhf.errors import InputError


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(tmp_path, clock):
    with Store(tmp_path / "labels.db", clock=clock) as store:
        yield store


def test_items_come_out_as_they_went_in(store):
    wanted = [
        Item(
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Wie gehtś? \x00 \u2028 🙂"}],
            (Candidate("gut", "sft", "f00", {"temperature": 0.7}, 3), Candidate("<b>schlecht</b>")),
            {"facts": '{"b": 1, "a": 2}', "n": [1, None]}, "prompts.jsonl", ("research",), "p-1", (1.0, 2.0),
        ),
        item("q"),
    ]  # fmt: skip
    ids = store.add_items(wanted, overlap=2)
    found = store.items()
    assert [one.id for one in found] == ids
    bare = [{**vars(one), "id": 0, "candidates": [{**vars(c), "id": 0} for c in one.candidates]} for one in found]
    assert bare == [{**vars(one), "candidates": [vars(c) for c in one.candidates]} for one in wanted]
    assert list(found[0].columns) == ["facts", "n"]  # in order: labelers see the same bytes


def test_an_item_is_stored_once_whatever_the_order_of_its_candidates(store):
    first, again = item("q"), item("q")
    turned = Item(again.prompt, again.candidates[::-1])
    assert store.add_items([first, turned, item("other"), first]) == [1, 1, 2, 1]
    assert len(store.items()) == 2


@pytest.mark.parametrize(
    ("wrong", "line", "said"),
    [
        (Item([{"role": "assistant", "content": "x"}], (Candidate("a"),)), "main", "the last turn is 'assistant'"),
        (Item([{"role": "user", "content": "x"}], ()), "main", "candidates: got none"),
        (Item([{"role": "user", "content": "x"}], (Candidate(" "),)), "main", "leave empty responses out"),
        (Item([{"role": "user", "content": "x"}], (Candidate("\ud83d"),)), "main", "half a character"),
        (Item([{"role": "user", "content": "x"}], (Candidate("a", "\ud83d"),)), "main", "half a character"),
        (Item([{"role": "user", "content": "x"}], (Candidate("a", seed=2**64),)), "main", "at most 64 bits"),
        (Item([{"role": "user", "content": "x"}], (Candidate("a"),), {"x": object()}), "main", "columns: JSON can't"),
        (item("q"), "gold", "gold_ranks: missing"),
        (item("q", gold_ranks=(1, 2)), "gold", "2 ranks for 3 candidates"),
    ],
)
def test_items_that_nobody_could_judge_are_refused(store, wrong, line, said):
    with pytest.raises(InputError, match=said):
        store.add_items([item("good", gold_ranks=(1, 2, 3)), wrong], line=line)
    assert store.items() == []  # all of a call or nothing


def test_an_item_that_comes_again_opens_to_more_annotators(store):
    store.add_items(items(2), overlap=1)
    for name in ("ann", "bob"):
        store.add_annotator(name)
    store.submit("ann", answer(store.lease("ann")[0]))
    store.add_items(items(2), overlap=2)
    store.add_items(items(2), overlap=1)  # fewer: what was asked for stays
    assert [len(store.lease(name, 9)) for name in ("ann", "bob")] == [1, 2]


def test_a_gold_item_that_comes_again_is_corrected_whatever_the_order_of_its_candidates(store):
    stored = item("q", gold_ranks=(1, 2, 3))
    store.add_items([stored, item("r", gold_ranks=(1, 2, 3))], line="gold")
    turned = Item(stored.prompt, stored.candidates[::-1], gold_ranks=(1, 2, 2))
    assert store.add_items([turned], line="gold") == [1]
    assert [known.gold_ranks for known in store.items()] == [(2, 2, 1), (1, 2, 3)]


def test_an_item_is_of_one_line(store):
    store.add_items([item("q")])
    with pytest.raises(InputError, match="item 1: 'question q' is in the store as main, and now comes as gold"):
        store.add_items([item("q", gold_ranks=(1, 2, 3))], line="gold")
    store.add_items([item("c")], line="calibration")
    with pytest.raises(InputError, match="is in the store as calibration, and now comes as main"):
        store.add_items([item("c")])
    store.add_items([item("c")], overlap=0)  # only its id is asked for


def test_a_judgment_comes_out_in_stored_order_with_its_provenance(store, clock):
    (id,) = store.add_items([item("q")])
    store.add_annotator("ann")
    guideline = store.set_guideline("Prefer the shorter.")
    (task,) = store.lease("ann")
    a, b, c = (shown.id for shown in task.stored)
    clock.now += 60
    said = store.submit(
        "ann",
        Answer(
            assignment=task.assignment, submission="submission-1", ranks={c: 1, a: 2, b: 2},
            ratings={b: {"clarity": 4}}, rewrite="Better.", rewrite_of=b, flags=("personal data",), comment="hm",
            seconds=12.5, guideline=guideline.hash,
        ),
    )  # fmt: skip
    assert (said.item, said.annotator, said.ranks, said.ratings) == (id, "ann", (2, 2, 1), ({}, {"clarity": 4}, {}))
    assert [task.stored[n].text for n in said.order] == [shown.text for shown in task.candidates]
    assert (said.rewrite, said.rewrite_of, said.flags, said.comment) == ("Better.", 1, ("personal data",), "hm")
    assert (said.seconds, said.guideline, said.created, said.supersedes) == (12.5, guideline.hash, 1e9 + 60, None)
    assert store.judgments() == [said]
    assert store.history("ann")[0].answer.ranks == {a: 2, b: 2, c: 1}


def test_an_edit_supersedes_and_nothing_is_changed(store):
    store.add_items([item("q")])
    store.add_annotator("ann")
    (task,) = store.lease("ann")
    first = store.submit("ann", answer(task, (1, 2, 3)))
    second = store.submit("ann", answer(task, (3, 2, 1)))
    third = store.submit("ann", answer(task, (1, 1, 1)))
    assert [second.supersedes, third.supersedes] == [first.id, second.id]
    assert store.judgments() == [third]
    assert store.judgments(superseded=True) == [first, second, third]
    with pytest.raises(sqlite3.IntegrityError, match="never changed"), store.writing() as db:
        db.execute("UPDATE judgments SET ranks = NULL")


def test_a_repeated_submission_neither_doubles_nor_fails(store):
    store.add_items(items(2))
    store.add_annotator("ann")
    store.add_annotator("bob")
    (task,) = store.lease("ann")
    said = answer(task, submission="once-and-for-all")
    first = store.submit("ann", said)
    assert store.submit("ann", said) == first
    assert store.submit("ann", answer(task, (3, 2, 1), submission="once-and-for-all")) == first
    store.submit("ann", answer(task, (2, 2, 1)))
    assert store.submit("ann", said) == first  # late, after an edit: it does not supersede the edit
    assert len(store.judgments(superseded=True)) == 2
    with pytest.raises(InputError, match="was used for another answer"):
        store.submit("bob", answer(store.lease("bob")[0], submission="once-and-for-all"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ranks": {1: 1, 2: 2}}, "rank each of 1, 2, 3"),
        ({"ranks": {1: 1, 2: 2, 3: 3, 9: 4}}, "got candidates 1, 2, 3, 9"),
        ({"ratings": {9: {"clarity": 1}}}, "name a candidate of another item"),
        ({"rewrite": "x", "rewrite_of": 9}, "name a candidate of another item"),
        ({"assignment": 77}, "assignment 77: is none of this annotator's"),
    ],
)
def test_answers_that_do_not_fit_are_refused(store, change, said):
    store.add_items([item("q")])
    store.add_annotator("ann")
    (task,) = store.lease("ann")
    fields = {"assignment": task.assignment, "submission": "12345678", "ranks": {1: 1, 2: 2, 3: 3}, **change}
    with pytest.raises(InputError, match=said):
        store.submit("ann", Answer(**fields))
    assert store.judgments() == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([], "answer: got"),
        ({"assignment": 1, "submission": "12345678", "rank": {}}, "unknown field 'rank'"),
        ({"assignment": True, "submission": "12345678"}, "answer.assignment: got True"),
        ({"submission": "12345678"}, "answer.assignment: missing"),
        ({"assignment": 1, "submission": "short", "flags": ["x"]}, "submission: got 'short'"),
        ({"assignment": 1, "submission": "12345678"}, "neither ranks, ratings, a rewrite nor a flag"),
        ({"assignment": 1, "submission": "12345678", "rewrite": " "}, "neither ranks, ratings, a rewrite nor a flag"),
        ({"assignment": 1, "submission": "12345678", "ranks": {"a": 1}}, "answer.ranks: send an object"),
        ({"assignment": 1, "submission": "12345678", "ranks": {"1": "x"}}, "ranks: got 'x'"),
        ({"assignment": 1, "submission": "12345678", "ranks": {"1": float("nan")}}, "ranks: got nan"),
        ({"assignment": 1, "submission": "12345678", "ratings": {"1": 3}}, "answer.ratings: send"),
        ({"assignment": 1, "submission": "12345678", "flags": [3]}, "answer.flags: got"),
        ({"assignment": 1, "submission": "12345678", "flags": ["\ud800"]}, "half a character"),
        ({"assignment": 1, "submission": "12345678", "flags": ["x"], "seconds": -1}, "seconds: got -1"),
        ({"assignment": 1, "submission": "12345678", "ranks": {"1": 10**400}}, "ranks: got 1000"),
        ({"assignment": 10**30, "submission": "12345678", "flags": ["x"]}, "assignment: got 1000"),
    ],
)
def test_an_answer_that_is_malformed_is_refused_in_one_line(content, said):
    with pytest.raises(InputError, match=said) as raised:
        Answer.from_json(content)
    assert "\n" not in str(raised.value)


def test_answers_and_tasks_survive_json(store):
    store.add_items([item("q", columns={"facts": "x"})])
    store.add_annotator("ann")
    (task,) = store.lease("ann")
    full = answer(task, (1, 2, 2), ratings={1: {"clarity": 3}}, rewrite="w", rewrite_of=2, flags=("f",), seconds=2)
    assert Answer.from_json(json.loads(json.dumps(full.to_json()))) == full
    store.submit("ann", full)
    for one in (task, *store.history("ann")):
        assert Task.from_json(json.loads(json.dumps(one.to_json()))) == one


def test_what_an_annotator_gets_does_not_say_who_wrote_it(store):
    store.add_items([item("q", gold_ranks=(1, 2, 3), source="secret")], line="gold")
    store.add_annotator("ann")
    store.set_plan(Plan(gold_share=0.999))
    text = json.dumps(store.lease("ann")[0].to_json())
    assert "answer 1" in text
    assert not any(word in text for word in ("policy", "secret", "gold", "seed"))


def test_a_token_lets_one_annotator_in_and_is_kept_as_a_hash(store, tmp_path):
    token = store.invite("ann")
    assert store.annotator_of(token).name == "ann"
    assert store.annotator_of(token[:-1]) is None
    assert store.annotators()[0].invited
    again = store.invite("ann")
    assert store.annotator_of(token) is None
    assert store.annotator_of(again).name == "ann"
    store.close()
    assert not any(again.encode() in file.read_bytes() for file in tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", " ", "x" * 81, "a\nb", "a\x1bb", "\ud800"])
def test_names_of_annotators_can_be_shown(store, name):
    with pytest.raises(InputError, match="annotator"):
        store.add_annotator(name)


def test_an_annotator_is_of_one_kind(store):
    assert store.add_annotator("judge", "model") == store.add_annotator("judge", "model")
    with pytest.raises(InputError, match="is a model already"):
        store.invite("judge", "person")
    with pytest.raises(InputError, match="use one of person, model, simulated"):
        store.add_annotator("x", "cat")
    with pytest.raises(InputError, match="annotator nobody: is not in the store"):
        store.lease("nobody")


def test_settings_guidelines_and_plan_are_kept(store, tmp_path):
    assert store.guideline() is None
    assert store.plan == Plan()
    first = store.set_guideline("Prefer the shorter.")
    second = store.set_guideline("Prefer the kinder.")
    store.set_plan(Plan(seed=3, lease_seconds=60, gold_share=0.2))
    store.put_setting("criteria", ["clarity"])
    with Store(tmp_path / "labels.db") as other:
        assert other.guideline() == second
        assert other.guideline(first.hash) == first
        assert other.plan == Plan(seed=3, lease_seconds=60, gold_share=0.2)
        assert other.setting("criteria") == ["clarity"]
        assert other.setting("nothing", 5) == 5
    with pytest.raises(InputError, match="lease_seconds=0"):
        Plan(lease_seconds=0)


def test_the_tasks_that_were_judged_go_back_one_by_one(store, clock):
    store.add_items(items(4))
    store.add_annotator("ann")
    done = []
    for _ in range(3):
        (task,) = store.lease("ann")
        store.submit("ann", answer(task))
        done.append(task.assignment)
    store.submit("ann", answer(store.task("ann", done[0]), (3, 2, 1)))  # an edit does not move it
    (now,) = store.lease("ann")
    assert store.history("ann", before=now.assignment)[0].assignment == done[2]
    assert store.history("ann", before=done[2])[0].assignment == done[1]
    assert store.history("ann", before=done[0]) == ()
    assert [task.assignment for task in store.history("ann", count=9)] == done[::-1]
