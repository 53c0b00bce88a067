"""Conversations and feedback: consent, expiry, and erasing to the last byte."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import pytest
from reference.labelling import Clock, answer, item, items

from rlhf.collection.store import Conversation, Feedback, Store
from rlhf.errors import InputError, RunStopped


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(tmp_path, clock):
    with Store(tmp_path / "labels.db", clock=clock) as store:
        yield store


def talk(name: str, person: str = "p-1", text: str = "Hello?", **fields: object) -> Conversation:
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "Hi."}]
    return Conversation(id=name, messages=messages, person=person, **fields)


def test_conversations_come_out_as_they_went_in(store):
    said = talk("c-1", consent=True, scrubbed=True, expires=2e9, policy="ppo", fingerprint="f00", seed=7,
                sampler={"temperature": 0.7}, columns={"page": 1}, created=1e9)  # fmt: skip
    store.add_conversation(said)
    assert store.conversation("c-1") == said
    assert store.conversations() == [said]
    assert store.conversation("c-2") is None
    longer = Conversation(**{**vars(said), "messages": [*said.messages, *said.messages], "created": 1.5e9})
    store.add_conversation(longer)
    assert store.conversation("c-1") == Conversation(**{**vars(longer), "created": 1e9})
    with pytest.raises(InputError, match="conversation c-1: is another person's"):
        store.add_conversation(talk("c-1", person="p-2"))


def test_feedback_comes_out_as_it_went_in_and_once(store):
    store.add_conversation(talk("c-1"))
    said = [
        Feedback(id="f-1", person="p-1", kind="thumb", thumb=-1, conversation="c-1", turn=1, responses=("Hi.",),
                 tags=("rude",), consent=True, scrubbed=True, expires=2e9, created=1e9),
        Feedback(id="f-2", person="p-1", kind="comparison", conversation="c-1", turn=1, responses=("Hi.", "Yo."),
                 policies=("sft", "ppo"), order=(1, 0), ranks=(1.0, 2.0), created=1e9),
        Feedback(id="f-3", person="p-9", kind="edit", edit="Good day.", created=1e9),
    ]  # fmt: skip
    assert [store.add_feedback(one) for one in said] == [True] * 3
    assert store.add_feedback(said[0]) is False
    assert store.feedback(usable=False) == said
    with pytest.raises(InputError, match="feedback f-1: is another person's"):
        store.add_feedback(Feedback(id="f-1", person="p-2", kind="thumb", thumb=1))
    for conversation, person in (("c-9", "p-1"), ("c-1", "p-2")):
        with pytest.raises(InputError, match="is not stored; store it first"):
            store.add_feedback(Feedback(id="f-4", person=person, kind="thumb", thumb=1, conversation=conversation))


def test_who_changes_their_mind_is_counted_once(store):
    """By the id, whatever it was sent for; a thumb or vote also by person, conversation, turn and answers."""
    store.add_conversation(talk("c-1"))
    store.add_conversation(talk("c-2"))
    about = {"person": "p-1", "kind": "thumb", "conversation": "c-1", "turn": 1, "responses": ("Hi.",)}
    voted = {**about, "kind": "comparison", "responses": ("Hé.", "Yo.")}
    said = [
        Feedback(id="f-1", thumb=1, **about),
        Feedback(id="f-2", thumb=-1, **about),
        Feedback(id="f-3", thumb=1, **{**about, "conversation": "c-2"}),
        Feedback(id="f-4", thumb=1, **{**about, "conversation": None}),
        Feedback(id="f-4", thumb=-1, **{**about, "conversation": None}),
        Feedback(id="f-5", ranks=(1.0, 2.0), **voted),
        Feedback(id="f-5", ranks=(2.0, 1.0), **voted),
        Feedback(id="f-8", ranks=(1.0, 1.0), **voted),
        Feedback(id="f-9", ranks=(1.0, 2.0), **{**voted, "responses": ("Hé.", "No.")}),
        Feedback(id="f-6", edit="Good day.", **{**about, "kind": "edit"}),
        Feedback(id="f-7", edit="Good morning.", **{**about, "kind": "edit"}),
    ]
    assert [store.add_feedback(one) for one in said] == [True] * len(said)
    assert store.add_feedback(said[7]) is False
    kept = {one.id: one.thumb or one.edit or one.ranks for one in store.feedback(usable=False)}
    assert kept == {
        "f-2": -1, "f-3": 1, "f-4": -1, "f-8": (1.0, 1.0), "f-9": (1.0, 2.0), "f-6": "Good day.",
        "f-7": "Good morning.",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kind": "thumb"}, "feedback.thumb: got None"),
        ({"kind": "edit", "edit": " "}, "feedback.edit: got empty text"),
        ({"kind": "comparison", "responses": ("a",), "ranks": (1,)}, "1 ranks for 1 responses"),
        ({"kind": "comparison", "responses": ("a", "b"), "ranks": (1,)}, "1 ranks for 2 responses"),
        ({"kind": "comparison", "responses": ("a", "b"), "ranks": (1, "x")}, "feedback.ranks: got"),
        ({"kind": "edit", "edit": "b", "responses": ("a",), "policies": ("x", "y")}, "2 policies for 1 responses"),
        ({"kind": "edit", "edit": "b", "responses": ("a",), "order": (1,)}, "feedback.order: got"),
        ({"kind": "edit", "edit": "\ud800"}, "half a character"),
    ],
)
def test_feedback_that_says_nothing_is_refused(fields, said):
    with pytest.raises(InputError, match=said):
        Feedback(id="f-1", person="p-1", **fields)


@pytest.mark.parametrize("missing", ["consent", "scrubbed", "time", "its conversation's consent", "its conversation"])
def test_what_is_not_agreed_to_scrubbed_and_in_time_is_not_used(store, clock, missing):
    good = {"consent": True, "scrubbed": True, "expires": clock.now + 10}
    store.add_conversation(talk("c-1", **{**good, "consent": missing != "its conversation's consent"}))
    fields = {"person": "p-1", "kind": "thumb", "thumb": 1, "responses": ("Hi.",), "turn": 1, **good}
    fields |= {"consent": False} if missing == "consent" else {"scrubbed": False} if missing == "scrubbed" else {}
    store.add_feedback(Feedback(id="f-1", conversation=None if missing == "its conversation" else "c-1", **fields))
    clock.now += 11 if missing == "time" else 0
    assert store.feedback() == []
    assert len(store.feedback(usable=False)) == 1


def bytes_anywhere(folder: Path, mark: str) -> list[str]:
    return [file.name for file in folder.iterdir() if mark.encode() in file.read_bytes()]


def test_what_expires_is_gone_to_the_last_byte(store, clock, tmp_path):
    store.add_conversation(talk("c-1", text="MARK-short", expires=clock.now + 5))
    store.add_conversation(talk("c-2", text="MARK-long", expires=clock.now + 50))
    store.add_feedback(Feedback(id="f-1", person="p-1", kind="edit", edit="MARK-short", conversation="c-1"))
    assert store.expire() == 0
    clock.now += 5
    assert store.expire() == 2
    assert bytes_anywhere(tmp_path, "MARK-short") == []
    assert bytes_anywhere(tmp_path, "MARK-long")
    assert store.feedback(usable=False) == []


def test_a_person_is_erased_to_the_last_byte(store, tmp_path):
    """Also what they replaced, what lies in overflow pages, and the items made from their conversations."""
    for n in range(40):  # on pages with the others' rows
        text = f"MARK-{n % 2} " * (1 if n % 3 else 4000)
        store.add_conversation(talk(f"c-{n}", f"p-{n % 2}", text, consent=True, scrubbed=True))
        store.add_feedback(
            Feedback(id=f"f-{n}", person=f"p-{n % 2}", kind="edit", edit=f"MARK-{n % 2}", conversation=f"c-{n}")
        )
    for n in range(0, 40, 4):
        store.add_conversation(talk(f"c-{n}", f"p-{n % 2}", "replaced"))
    store.add_items([item("MARK-0", person="p-0"), item("MARK-1", person="p-1"), item("other")])
    store.add_annotator("ann")
    for task in store.lease("ann", 3):
        store.submit("ann", answer(task, comment="said of it"))
    assert bytes_anywhere(tmp_path, "MARK-0")
    gone = store.erase(person="p-0")
    assert gone == {"feedback": 20, "conversations": 20, "items": 1}
    assert bytes_anywhere(tmp_path, "MARK-0") == []
    assert bytes_anywhere(tmp_path, "MARK-1")
    assert {one.person for one in store.conversations(usable=False)} == {"p-1"}
    assert len(store.judgments()) == 2
    assert store.erase(person="p-0") == {"feedback": 0, "conversations": 0, "items": 0}


def test_what_another_program_left_on_freed_pages_is_gone_too(store, tmp_path):
    """It need not overwrite what it deletes."""
    for n in range(30):
        store.add_conversation(talk(f"c-{n}", text="MARK " * 2000))
    other = sqlite3.connect(tmp_path / "labels.db")
    other.execute("PRAGMA secure_delete = OFF")
    other.execute("DELETE FROM conversations")
    other.commit()
    other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    other.close()
    assert bytes_anywhere(tmp_path, "MARK")
    assert store.erase(person="p-1") == {"feedback": 0, "conversations": 0, "items": 0}
    assert bytes_anywhere(tmp_path, "MARK") == []


def test_an_annotator_is_erased_and_their_places_open_again(store, tmp_path):
    store.add_items(items(6), overlap=2)
    for name in ("MARK-ann", "bob"):
        store.add_annotator(name)
        for task in store.lease(name, 4):
            store.submit(name, answer(task, comment=f"by {name}"))
            store.submit(name, answer(task, (1, 1, 1), comment=f"again by {name}"))
    store.lease("MARK-ann", 6)
    assert store.progress("bob").left == 2
    gone = store.erase(annotator="MARK-ann")
    assert gone == {"annotators": 1, "judgments": 8}
    assert bytes_anywhere(tmp_path, "MARK-ann") == []
    assert {said.annotator for said in store.judgments()} == {"bob"}
    assert store.progress("bob").left == 8
    store.add_annotator("cy")
    assert len(store.lease("cy", 9)) == 6


def test_a_reader_of_an_old_state_keeps_its_log_and_is_told_of(store, tmp_path, monkeypatch):
    """The log can't be emptied under it; erasing again does so."""
    store.add_conversation(talk("c-1", text="MARK"))
    ready, done = threading.Event(), threading.Event()

    def read() -> None:
        with store.reading() as db:
            db.execute("SELECT * FROM conversations").fetchall()
            ready.set()
            done.wait(20)

    reader = threading.Thread(target=read)
    reader.start()
    ready.wait(20)
    store._connection().execute("PRAGMA busy_timeout = 50")
    with pytest.raises(RunStopped, match="another process still reads the log"):
        store.erase(person="p-1")
    done.set()
    reader.join()
    store.erase(person="p-1")
    assert bytes_anywhere(tmp_path, "MARK") == []


def test_erasing_names_one_of_the_two(store):
    for wrong in ({}, {"person": "a", "annotator": "b"}):
        with pytest.raises(InputError, match="name a person or an annotator"):
            store.erase(**wrong)
