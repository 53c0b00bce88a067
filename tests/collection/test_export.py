"""What leaves a store, and what comes in: rows, round trips through our own reader, cards, what is left out."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime

import pytest
from reference.labelling import Clock, answer, item, items

from rlhf.collection import export, measured
from rlhf.collection.imported import Imported, import_rankings
from rlhf.collection.store import Candidate, Conversation, Feedback, Item, Plan, Store
from rlhf.errors import InputError
from rlhf.rows.records import read_demonstrations, read_prompts, read_rankings, write_jsonl

USER = {"role": "user", "content": "question q0"}
PAIR = {"prompt": "Name a fruit.", "chosen": "An apple.", "rejected": "No."}


@pytest.fixture
def store(tmp_path):
    """Two annotators; an item ranked by both, one with ties, one with a rewrite alone, a gold item."""
    with Store(tmp_path / "labels.db", clock=Clock()) as store:
        store.set_plan(Plan(gold_share=0.5))
        store.add_items(
            [item("q0", source="prompts.jsonl", columns={"topic": "fruit"}), *items(2, prefix="r")], overlap=2
        )
        store.add_items([item("g", gold_ranks=(1, 2, 3))], line="gold")
        guideline = store.set_guideline("Prefer the shorter.").hash
        said = {
            "q0": {"ann": {"ranks": (1, 2, 3), "seconds": 4}, "bob": {"ranks": (2, 1, 3), "seconds": 8}},
            "r0": {"ann": {"ranks": (1, 1, 2), "comment": "close"}, "bob": {"ranks": (1, 1, 1)}},
            "r1": {"ann": {"rewrite": "A better answer.", "flags": ("off topic",), "ranks": None}},
            "g": {"ann": {"ranks": (1, 2, 3)}, "bob": {"ranks": (1, 3, 2)}},
        }
        for name in ("ann", "bob"):
            store.add_annotator(name)
            while tasks := store.lease(name):
                given = said[tasks[0].prompt[0]["content"].split()[1]].get(name)
                if given is None:
                    store.skip(name, tasks[0].assignment)
                    continue
                fields = {n: value for n, value in given.items() if n != "ranks"}
                store.submit(name, answer(tasks[0], given["ranks"], guideline=guideline, **fields))
        yield store


def made(store, kind, **options):
    return export.export(measured.snapshot(store), kind, **options)


def test_rankings_hold_the_item_the_labeler_and_where_it_is_from(store):
    rows = made(store, "rankings").rows
    assert [(row["prompt"][0]["content"].split()[1], row["labeler"], row["ranks"]) for row in rows] == [
        ("q0", "ann", [1, 2, 3]), ("q0", "bob", [2, 1, 3]), ("r0", "ann", [1, 1, 2]), ("r0", "bob", [1, 1, 1]),
    ]  # fmt: skip
    row = rows[0]
    assert (row["responses"], row["topic"]) == ([f"q0: answer {n}" for n in range(3)], "fruit")
    assert (row["policy"], row["sampling_seed"]) == (["policy 0", "policy 1", "policy 2"], [0, 1, 2])
    assert sorted(row["order_shown"]) == [0, 1, 2]
    assert (row["seconds"], row["item_source"], row["labeler_kind"]) == (4, "prompts.jsonl", "person")
    assert row["guideline_hash"] == store.guideline().hash
    assert row["judged"] == "2001-09-09T01:46:40+00:00"
    assert {frozenset(row) - {"topic"} for row in rows} == {frozenset(rows[-1])}  # a table: every row has every column


def test_pairs_are_those_that_are_no_tie(store):
    rows = made(store, "pairs").rows
    found = [(row["labeler"], row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows]
    assert found == [
        ("ann", "q0: answer 0", "q0: answer 1"), ("ann", "q0: answer 0", "q0: answer 2"),
        ("ann", "q0: answer 1", "q0: answer 2"), ("bob", "q0: answer 0", "q0: answer 2"),
        ("bob", "q0: answer 1", "q0: answer 0"), ("bob", "q0: answer 1", "q0: answer 2"),
        ("ann", "r0: answer 0", "r0: answer 2"), ("ann", "r0: answer 1", "r0: answer 2"),
    ]  # fmt: skip
    assert (rows[0]["chosen_policy"], rows[0]["rejected_policy"]) == ("policy 0", "policy 1")


def test_kto_rows_are_the_best_and_the_worst(store):
    found = [(row["labeler"], row["completion"][0]["content"], row["label"]) for row in made(store, "kto").rows]
    assert found == [
        ("ann", "q0: answer 0", True), ("ann", "q0: answer 2", False),
        ("bob", "q0: answer 1", True), ("bob", "q0: answer 2", False),
        ("ann", "r0: answer 0", True), ("ann", "r0: answer 1", True), ("ann", "r0: answer 2", False),
    ]  # fmt: skip


def test_demonstrations_are_rewrites(store):
    (row,) = made(store, "demonstrations").rows
    assert row["completion"] == [{"role": "assistant", "content": "A better answer."}]
    assert (row["prompt"][0]["content"], row["labeler"], row["flags"]) == ("question r1", "ann", ["off topic"])


@pytest.mark.parametrize(
    ("kind", "left_out"),
    [
        ("rankings", {"of a gold item": 2, "without ranks": 1}),
        ("pairs", {"of a gold item": 2, "without ranks, or with ties alone": 2}),
        ("kto", {"of a gold item": 2, "without ranks or thumb, or with ties alone": 2}),
        ("demonstrations", {"of a gold item": 2, "without a rewrite": 4}),
    ],
)
def test_what_gives_no_row_is_counted(store, kind, left_out):
    assert dict(made(store, kind).left_out) == left_out


def test_our_own_reader_reads_every_format(store, tmp_path):
    files = {}
    for kind in export.FORMATS:
        files[kind] = tmp_path / f"{kind}.jsonl"
        write_jsonl(files[kind], made(store, kind).rows)
    rankings = read_rankings(str(files["rankings"]))
    assert [(r.ranks, r.columns["labeler"]) for r in rankings] == [
        ((1, 2, 3), "ann"), ((2, 1, 3), "bob"), ((1, 1, 2), "ann"), ((1, 1, 1), "bob"),
    ]  # fmt: skip
    assert [len(r.pairs()) for r in rankings] == [3, 3, 2, 0]
    pairs = read_rankings(str(files["pairs"]))
    assert [(p.responses, p.ranks) for p in pairs][:1] == [(("q0: answer 0", "q0: answer 1"), (1, 2))]
    assert len(pairs) == 8
    assert [d.response for d in read_demonstrations(str(files["demonstrations"]))] == ["A better answer."]
    wanted = ["q0: answer 0", "q0: answer 1", "r0: answer 0", "r0: answer 1"]  # those labelled good
    assert [d.response for d in read_demonstrations(str(files["kto"]))] == wanted
    assert all(prompt.messages[0]["role"] == "user" for file in files.values() for prompt in read_prompts(str(file)))


def test_an_export_that_is_imported_gives_the_same_export(store, tmp_path):
    file, again = tmp_path / "rankings.jsonl", tmp_path / "again.jsonl"
    write_jsonl(file, made(store, "rankings").rows)
    with Store(tmp_path / "other.db") as other:
        added = import_rankings(other, read_rankings(str(file)))
        assert (added.items, added.judgments, added.edits, added.repeated) == (2, 4, 0, 0)
        write_jsonl(again, made(other, "rankings").rows)
        assert again.read_bytes() == file.read_bytes()
        added = import_rankings(other, read_rankings(str(file)))
        assert (added.items, added.judgments, added.edits, added.repeated) == (0, 0, 0, 4)


@pytest.mark.parametrize("provenance", [True, False])
def test_an_export_that_comes_back_changes_nothing(tmp_path, provenance):
    clock = Clock()
    with Store(tmp_path / "labels.db", clock=clock) as store:
        store.add_items([item("q0"), item("q1")])
        store.add_annotator("ann")
        for _ in range(2):
            given = answer(store.lease("ann")[0], (1, 2, 3), comment="close", rewrite="A better answer.")
            store.submit("ann", given)
            clock.now += 0.25
        rows = made(store, "rankings", provenance=provenance).rows
        rows = [{"labeler": "ann", **row} for row in rows]
        before = store.judgments(superseded=True)
        for later in (0, 1000):
            clock.now += later
            added = import_rankings(store, read_rankings(rows))
            assert (added.items, added.judgments, added.edits, added.repeated) == (0, 0, 0, 2)
            assert store.judgments(superseded=True) == before
        assert len(made(store, "demonstrations").rows) == 2


def test_an_export_is_older_than_an_edit_and_a_later_judgment_is_not(tmp_path):
    clock = Clock()
    with Store(tmp_path / "labels.db", clock=clock) as store:
        store.add_items([item("q0")])
        store.add_annotator("ann")
        (task,) = store.lease("ann")
        store.submit("ann", answer(task, (1, 2, 3)))
        rows = made(store, "rankings").rows
        clock.now += 60
        store.submit("ann", answer(task, (3, 2, 1), rewrite="A better answer."))
        before = store.judgments(superseded=True)
        assert import_rankings(store, read_rankings(rows)).repeated == 1
        assert store.judgments(superseded=True) == before
        elsewhere = datetime.fromtimestamp(clock.now + 60, UTC).isoformat()
        newer = {**rows[0], "judged": elsewhere}
        assert import_rankings(store, read_rankings([newer])).edits == 1
        same = {**newer, "judged": datetime.fromtimestamp(clock.now + 120, UTC).isoformat()}
        assert import_rankings(store, read_rankings([same])).repeated == 1
        assert import_rankings(store, read_rankings([{**same, "flags": ["off topic"]}])).edits == 1


def test_without_provenance_a_row_is_what_the_rankings_stage_writes(store):
    rows = made(store, "rankings", provenance=False).rows
    assert rows[0] == {"prompt": [USER], "responses": [f"q0: answer {n}" for n in range(3)], "ranks": [1.0, 2.0, 3.0],
                       "topic": "fruit"}  # fmt: skip


def test_an_items_own_column_gives_way_and_is_named(tmp_path, caplog):
    with Store(tmp_path / "x.db") as store:
        store.add_items([item("q", columns={"seconds": "many", "topic": "t"})])
        store.add_annotator("ann")
        store.submit("ann", answer(store.lease("ann")[0], seconds=2))
        (row,) = made(store, "rankings").rows
    assert (row["seconds"], row["topic"]) == (2, "t")
    assert "own columns seconds give way" in caplog.text


def test_nothing_to_export_is_one_line(tmp_path):
    wanted = "export --format kto: no rows: the store has no judgments"
    with Store(tmp_path / "x.db") as store, pytest.raises(InputError, match=wanted):
        made(store, "kto")


# -- the playground ----------------------------------------------------------------------------------------


def test_usable_feedback_leaves_as_rankings_kto_rows_and_demonstrations(tmp_path):
    turns = [USER, {"role": "assistant", "content": "Hi."}]
    agreed = {"consent": True, "scrubbed": True}
    with Store(tmp_path / "x.db") as store:
        store.add_conversation(
            Conversation(id="c-1", messages=turns, person="p-1", policy="ppo", fingerprint="f", **agreed)
        )
        store.add_conversation(Conversation(id="c-2", messages=turns, person="p-2"))
        store.add_conversation(Conversation(id="c-3", messages=turns, person="p-1", **agreed))
        about = {"person": "p-1", "conversation": "c-1", "turn": 1, **agreed}
        for one in (
            Feedback(id="f-1", kind="thumb", thumb=-1, responses=("Hi.",), tags=("rude",), **about),
            Feedback(id="f-2", kind="comparison", responses=("Hi.", "Yo."), policies=("ppo", "sft"), ranks=(2, 1),
                     **about),
            Feedback(id="f-3", kind="edit", edit="Good day.", responses=("Hi.",), **about),
            Feedback(id="f-4", kind="thumb", thumb=1, responses=("Hi.",), **{**about, "turn": 0}),
            Feedback(id="f-5", kind="thumb", thumb=1, **{**about, "conversation": "c-3"}),
            Feedback(id="f-6", kind="thumb", thumb=1, responses=("No.",), person="p-2", conversation="c-2", turn=1),
        ):  # fmt: skip
            store.add_feedback(one)
        (ranking,) = made(store, "rankings").rows
        assert (ranking["prompt"], ranking["responses"], ranking["ranks"]) == ([USER], ["Hi.", "Yo."], [2, 1])
        assert (ranking["policy"], ranking["fingerprint"]) == (["ppo", "sft"], ["f", ""])
        assert re.fullmatch(r"user-[0-9a-f]{12}", ranking["labeler"])
        assert ranking["labeler_kind"] == "user"
        assert import_rankings(store, read_rankings([ranking])) == Imported(repeated=1)
        assert (store.items(), store.annotators()) == ([], [])  # which would outlive their person
        kto = made(store, "kto")
        found = [(row["completion"][0]["content"], row["label"], row["flags"]) for row in kto.rows]
        assert found == [("Hi.", False, ["rude"]), ("Hi.", False, []), ("Yo.", True, [])]
        assert dict(kto.left_out) == {
            "feedback whose turn follows no prompt": 1, "feedback without the answer that it is about": 1,
            "without ranks or thumb, or with ties alone": 1,
        }  # fmt: skip
        (demonstration,) = made(store, "demonstrations").rows
        assert demonstration["completion"][0]["content"] == "Good day."


def test_an_item_that_was_called_bad_has_a_new_answer_that_may_be_imitated(tmp_path):
    """`label: false` belongs to the verdict that it came with, and to no other."""
    bad = {"prompt": "q?", "responses": ["bad one", "bad two"], "ranks": [1, 1], "label": False, "labeler": "old"}
    with Store(tmp_path / "x.db") as store:
        import_rankings(store, read_rankings([bad, {**PAIR, "labeler": "old"}])[:1], overlap=3)
        for name, ranks in (("ann", (1, 2)), ("bob", (1, 1))):
            store.add_annotator(name)
            (task,) = store.lease(name)
            store.submit(name, answer(task, ranks, rewrite="A good one."))
        rankings, demonstrations = made(store, "rankings").rows, made(store, "demonstrations").rows
        assert {row["labeler"]: row.get("label") for row in rankings} == {"old": False, "ann": None, "bob": None}
        read = read_demonstrations(demonstrations)
        assert [talk.messages[-1]["content"] for talk in read] == ["A good one."] * 2


# -- cards -------------------------------------------------------------------------------------------------


def test_a_card_says_what_the_rows_are(store):
    rows = made(store, "rankings")
    text = export.card("rankings", "rankings.jsonl", rows, [("alpha", "0.5 [0.4, 0.6] (n 9)")], "cc-by-4.0")
    header, _, body = text.partition("\n---\n")
    assert "license: cc-by-4.0" in header
    for line in (
        "| rows | 4 |", "| judgments | 4 |", "| distinct prompts | 2 |", "| judged | 2001-09-09 to 2001-09-09 |",
        "| annotators | ann 2, bob 2 |", "| kinds of annotators | person 4 |",
        f"| guideline, by hash | {store.guideline().hash} 4 |",
        "| responses, by policy | policy 0 4, policy 1 4, policy 2 4 |",
        "| sources of the prompts | prompts.jsonl 2, not named 2 |",
        "| gave no row | of a gold item 2, without ranks 1 |",
        r"| alpha | 0.5 \[0.4, 0.6\] (n 9) |",
    ):  # fmt: skip
        assert line in body
    assert "license: unknown" in export.card("rankings", "rankings.jsonl", rows, [], None)


def test_a_name_is_no_markup_in_a_card(tmp_path):
    with Store(tmp_path / "x.db") as store:
        store.add_items(items(1))
        store.add_annotator("a|b <i>`")
        store.submit("a|b <i>`", answer(store.lease("a|b <i>`")[0]))
        text = export.card("rankings", "f", made(store, "rankings"), [], None)
    assert r"| annotators | a\|b \<i\>\` 1 |" in text


# -- import ------------------------------------------------------------------------------------------------


def test_pairs_become_items_and_judgments_of_the_annotator_named(tmp_path):
    with Store(tmp_path / "x.db") as store:
        turned = {**PAIR, "chosen": PAIR["rejected"], "rejected": PAIR["chosen"], "labeler": "bob"}
        added = import_rankings(store, read_rankings([PAIR, turned]), "ann", source="pairs.jsonl")
        assert (added.items, added.judgments) == (1, 2)  # one item, whichever was chosen
        assert {said.annotator: said.ranks for said in store.judgments()} == {"ann": (1, 2), "bob": (2, 1)}
        assert store.items()[0].source == "pairs.jsonl"
        assert store.progress("ann").left == 0
        assert measured.measure(measured.snapshot(store)).pairs[0].agreement.n == 1


def test_a_row_that_says_otherwise_supersedes(tmp_path):
    turned = {**PAIR, "chosen": PAIR["rejected"], "rejected": PAIR["chosen"]}
    with Store(tmp_path / "x.db") as store:
        added = import_rankings(store, read_rankings([PAIR, turned, PAIR]), "ann")
        assert (added.items, added.judgments, added.edits, added.repeated) == (1, 2, 1, 1)
        assert [said.ranks for said in store.judgments()] == [(2, 1)]
        added = import_rankings(store, read_rankings([{**PAIR, "prompt": "Name another."}]), "ann")
        assert (added.items, added.judgments, added.edits) == (1, 1, 0)


def test_an_import_fills_a_place_and_leaves_the_rest_to_others(tmp_path):
    with Store(tmp_path / "x.db") as store:
        import_rankings(store, read_rankings([PAIR]), "ann", overlap=2)
        for name in ("bob", "cy"):
            store.add_annotator(name)
        assert store.lease("ann") == ()
        assert len(store.lease("bob")) == 1
        assert store.lease("cy") == ()


def test_equal_texts_of_a_row_keep_their_ranks(tmp_path):
    rows = [{"prompt": "q", "responses": ["a", "b", "a"], "ranks": [1, 2, 3], "labeler": "ann"},
            {"prompt": "q", "responses": ["b", "a", "a"], "ranks": [3, 1, 2], "labeler": "bob"}]  # fmt: skip
    with Store(tmp_path / "x.db") as store:
        assert import_rankings(store, read_rankings(rows)).items == 1
        assert [said.ranks for said in store.judgments()] == [(1, 2, 3), (1, 3, 2)]


def test_a_row_without_an_annotator_is_named_and_nothing_is_stored(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({**PAIR, "labeler": "ann"}) + "\n" + json.dumps(PAIR) + "\n")
    with Store(tmp_path / "x.db") as store:
        with pytest.raises(InputError, match=r"pairs\.jsonl:2: labeler: missing"):
            import_rankings(store, read_rankings(str(file)))
        assert store.items() == []
        store.add_items(read_items(file), line="calibration")
        with pytest.raises(InputError, match=r"pairs\.jsonl:1: item 1: 'Name a fruit.' is in the store as calibration"):
            import_rankings(store, read_rankings(str(file)), "ann", overlap=1)


def read_items(file):
    return [
        Item(list(ranking.prompt), tuple(map(Candidate, ranking.responses))) for ranking in read_rankings(str(file))
    ]
