"""Comparisons of the playground that may be used now, and the cap on one user's share."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from reference.labelling import Clock

from rlhf.collection import playground
from rlhf.collection.store import Conversation, Feedback, Store
from rlhf.rows.records import prompt_key


def say(store: Store, name: str, person: str, text: str = "", of_talk: dict | None = None, **fields: object) -> None:
    """One comparison of two answers to a question, consented to and scrubbed where nothing else is said."""
    allowed = {"consent": True, "scrubbed": True}
    asked = [{"role": "user", "content": text or f"Question {name}?"}, {"role": "assistant", "content": "Hi."}]
    store.add_conversation(Conversation(id=f"talk-{name}", messages=asked, person=person, **allowed | (of_talk or {})))
    compared = {"kind": "comparison", "responses": ("Hi.", "Yo."), "ranks": (1.0, 2.0), "turn": 1}
    store.add_feedback(
        Feedback(id=f"said-{name}", person=person, conversation=f"talk-{name}", **compared | allowed | fields)
    )


def asked(rows: list[playground.Row]) -> set[str]:
    return {row["prompt"][-1]["content"] for row in rows}


def test_what_may_be_used_now(tmp_path):
    clock = Clock()
    with Store(tmp_path / "labels.db", clock=clock) as store:
        say(store, "fine", "p-1")
        say(store, "no-consent", "p-1", consent=False)
        say(store, "talk-without-consent", "p-1", of_talk={"consent": False})
        say(store, "not-scrubbed", "p-2", scrubbed=False)
        say(store, "talk-not-scrubbed", "p-2", of_talk={"scrubbed": False})
        say(store, "expires", "p-2", expires=clock() + 60)
        say(store, "talk-expires", "p-2", of_talk={"expires": clock() + 60})
        say(store, "thumb", "p-3", kind="thumb", thumb=1, responses=("Hi.",), ranks=None)
        say(store, "other", "p-3", text="A held-out question?")
        first = playground.comparisons(store)
        assert asked(first) == {"Question fine?", "Question expires?", "Question talk-expires?", "A held-out question?"}
        assert len(first) == 4
        assert first[0]["responses"] == ["Hi.", "Yo."]
        assert first[0]["ranks"] == [1.0, 2.0]
        assert {row["labeler_kind"] for row in first} == {"user"}
        apart = {prompt_key([{"role": "user", "content": "A  held-out question?"}])}
        assert "A held-out question?" not in asked(playground.comparisons(store, apart))

        clock.now += 61
        assert asked(playground.comparisons(store)) == {"Question fine?", "A held-out question?"}, "before expire() ran"
        store.erase(person="p-3")
        now = playground.comparisons(store)
        assert asked(now) == {"Question fine?"}
        assert playground.still_usable(first, now) == now


def rows_by(counts: dict[str, int]) -> list[playground.Row]:
    return [{"labeler": user, "number": n} for user, count in counts.items() for n in range(count)]


@pytest.mark.parametrize("seed", range(40))
def test_no_user_has_more_than_the_share_and_no_row_is_left_out_for_nothing(seed):
    draw = random.Random(seed)
    counts = {f"user-{n}": draw.randint(1, 60) for n in range(draw.randint(1, 12))}
    others, share, rows = draw.choice((0, 5, 90)), draw.choice((0.05, 0.1, 0.34, 1.0)), rows_by(counts)
    kept = Counter(row["labeler"] for row in playground.capped(rows, others, share, seed))
    assert all(count <= share * (others + kept.total()) for count in kept.values())
    cap = max(kept.values(), default=0)
    assert all(kept[user] == min(counts[user], cap) for user in counts)
    for more in range(cap + 1, max(counts.values()) + 1):  # no larger cap would do
        assert more > share * (others + sum(min(count, more) for count in counts.values()))


def test_the_draw_is_the_seed_s_and_keeps_the_order():
    rows = rows_by({"a": 50, "b": 2})
    kept = playground.capped(rows, 90, 0.1, seed=1)
    assert kept == playground.capped(rows, 90, 0.1, seed=1)
    assert kept != playground.capped(rows, 90, 0.1, seed=2)
    assert [rows.index(row) for row in kept] == sorted(rows.index(row) for row in kept)
    assert Counter(row["labeler"] for row in kept) == {"a": 10, "b": 2}  # 10 <= 0.1 (90 + 12), 11 > 0.1 (90 + 13)
    assert playground.capped([], 90, 0.1, seed=1) == []
