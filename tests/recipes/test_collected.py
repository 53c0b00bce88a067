"""recipes/collected.py: every verb, what it writes, what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from reference import recipe, tiny_chain
from reference.labelling import answer, item, items
from trl import is_conversational

from reward_models import RewardModel
from rlhf.collection.personal import pseudonym
from rlhf.collection.store import Conversation, Feedback, Plan, Store
from rlhf.rows.records import read_rankings

HOSTILE = "<script>alert(1)</script>|$x$"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Three annotators, one of them with a hostile name, who agree most of the time."""
    path = tmp_path / "labels.db"
    with Store(path) as store:
        store.set_plan(Plan(gold_share=0.3))
        store.add_items(items(20, 3), overlap=2)
        store.add_items([item(f"g{n}", gold_ranks=(1, 2, 3)) for n in range(4)], line="gold")
        for n, name in enumerate(("ann", "bob", HOSTILE)):
            store.add_annotator(name)
            for task in store.lease(name, 14):
                store.submit(name, answer(task, ((1, 2, 3), (1, 2, 2))[(task.item + n) % 3 == 0], seconds=3 + n))
        messages = [{"role": "user", "content": "MARK"}, {"role": "assistant", "content": "Hi."}]
        store.add_conversation(Conversation(id="c-1", messages=messages, person="p-17"))
        store.add_feedback(Feedback(id="f-1", kind="thumb", thumb=1, person="p-17", conversation="c-1"))
    return path


def run(*flags: object, code: int = 0) -> recipe.Result:
    result = recipe.run("collected", *flags)
    assert result.code == code, result.out + result.err
    return result


def read(folder: Path) -> dict:
    return json.loads((folder / "collected.json").read_text(encoding="utf-8"))


def test_status_counts_and_is_in_our_form(store, tmp_path):
    run("status", "--store", store)
    metrics = read(tmp_path)["metrics"]
    assert all({"value", "low", "high", "n"} <= set(metric) for metric in metrics.values())
    values = {name: metric["value"] for name, metric in metrics.items()}
    assert (values["items"], values["annotators"], values["gold_items"]) == (24, 3, 4)
    assert values["judgments"] == 42
    assert (values["conversations"], values["feedback"], values["feedback_usable"]) == (1, 1, 0)
    assert read(tmp_path)["progress"]["ann"] == {"done": 14, "leased": 0, "skipped": 0, "expired": 0}
    page = (tmp_path / "collected.html").read_text(encoding="utf-8")
    assert "42 judgments" in page


def test_agreement_is_measured_drawn_and_told(store, tmp_path):
    out = run("agreement", "--store", store, "--output_dir", tmp_path / "out").out
    told = read(tmp_path / "out")
    shared = told["metrics"]["agreement"]
    assert shared["low"] < shared["value"] < shared["high"]
    assert shared["n"] % 3 == 0
    assert f"agreement: {100 * shared['value']:.1f}%" in out
    assert re.search(r"position bias: [+-]\d+\.\d \[[+-]\d+\.\d, [+-]\d+\.\d\] points \(n \d+\)", out)
    assert {who["name"] for who in told["annotators"]} == {"ann", "bob", HOSTILE}
    assert told["annotators"][0]["seconds"]["seconds_median"]["value"] in (3, 4, 5)
    assert [at["position"] for at in told["positions"]] == [1, 2, 3]
    page = (tmp_path / "out" / "collected.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 5  # three forests, the times, the positions
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page


@pytest.mark.slow
def test_rankings_leave_with_a_card_and_train_a_reward_model(store, tmp_path, tiny_model, tiny_tokenizer):
    run("export", "--store", store, "--output_dir", tmp_path / "out", "--licence", "cc-by-4.0")
    rows = tmp_path / "out" / "rankings.jsonl"
    assert len(read_rankings(str(rows))) > 20
    card = (tmp_path / "out" / "rankings.card.md").read_text(encoding="utf-8")
    assert "license: cc-by-4.0" in card
    assert re.search(r"\| Krippendorff's alpha of the ranks, by their order \| -?[01]\.\d{3} \\\[", card)
    assert any(line.startswith("left out:") for line in read(tmp_path / "out")["notes"])
    tiny_chain.shake(tiny_model, 0, 0.05)
    base = tiny_chain.save_base(tmp_path / "tiny", tiny_model, tiny_tokenizer)
    trained = recipe.run("reward_model", "--model", base, "--train_data", rows, "--output_dir", tmp_path / "my" / "rm",
                         "--prompts_per_batch", 16, "--preflight", "false")  # fmt: skip
    assert trained.code == 0, trained.err
    assert len(RewardModel.load(tmp_path / "my" / "rm")(["question q0"], ["an answer"])) == 1


@pytest.mark.parametrize("kind", ["pairs", "kto"])
def test_other_formats_leave_in_files_of_their_names(store, tmp_path, kind):
    run("export", "--store", store, "--format", kind, "--provenance", "false")
    rows = [json.loads(line) for line in (tmp_path / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()]
    wanted = {"pairs": {"prompt", "chosen", "rejected"}, "kto": {"prompt", "completion", "label"}}
    assert {frozenset(row) for row in rows} == {frozenset(wanted[kind])}
    assert all(is_conversational(row) for row in rows)
    assert (tmp_path / f"{kind}.card.md").exists()


def test_an_import_makes_a_store_and_may_be_repeated(tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"q {n}", "chosen": "a", "rejected": "b"}) + "\n" for n in range(3)))
    flags = ["import", "--store", tmp_path / "new.db", "--data", data, "--annotator", "ann"]
    run(*flags)
    assert read(tmp_path)["changed"] == {
        "imported_items": 3, "imported_judgments": 3, "imported_edits": 0, "imported_repeated": 0}  # fmt: skip
    run(*flags)
    assert read(tmp_path)["changed"]["imported_repeated"] == 3
    assert read(tmp_path)["metrics"]["judgments"]["value"] == 3


def test_an_export_replaces_its_own_rows_and_nobody_elses(tmp_path):
    data, store = tmp_path / "rankings.jsonl", tmp_path / "labels.db"
    text = json.dumps({"prompt": "q", "chosen": "a", "rejected": "b", "note": "mine"}) + "\n"
    data.write_text(text, encoding="utf-8")
    run("import", "--store", store, "--data", data, "--annotator", "ann")
    result = run("export", "--store", store, code=2)
    assert "rankings.jsonl: is no export of ours" in result.err
    assert result.err.count("\n") == 1
    assert data.read_text(encoding="utf-8") == text
    assert not (tmp_path / "rankings.card.md").exists()
    for _ in range(2):
        run("export", "--store", store, "--output_dir", tmp_path / "out")
    assert len(read_rankings(str(tmp_path / "out" / "rankings.jsonl"))) == 1


def test_who_is_erased_is_in_no_file_and_no_later_export(store, tmp_path):
    run("erase", "--store", store, "--person", "p-17")
    assert read(tmp_path)["changed"] == {"erased_feedback": 1, "erased_conversations": 1, "erased_items": 0}
    run("erase", "--store", store, "--annotator", HOSTILE)
    run("export", "--store", store)
    for file in tmp_path.iterdir():
        content = file.read_bytes()
        assert b"MARK" not in content, file.name
        assert HOSTILE.encode() not in content, file.name
        assert b"alert(1)" not in content, file.name


def test_a_name_is_looked_for_as_a_requests_user_too(store):
    with Store(store) as opened:
        opened.put_setting("person_salt", "00ff")
        user = pseudonym("alice", "00ff")
        opened.add_conversation(Conversation(id="c-2", messages=[{"role": "user", "content": "Hi"}], person=user))
    erase = ["erase", "--store", store, "--person", "alice"]
    assert f"person alice or {user}" in run(*erase).out
    assert f"nothing of person alice or {user} is in this store" in run(*erase, code=2).err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "say first what to do: rlhf collected status|agreement|export|import|erase"),
        (["stats", "--store", "x.db"], "unknown verb stats; did you mean status?"),
        (["status"], "`store` is required"),
        (["status", "--store", "nowhere.db"], "nowhere.db: no such store"),
        (["status", "--store", "STORE", "--data", "x.jsonl"], "--data is for import; leave it out of status"),
        (["agreement", "--store", "STORE", "--licence", "mit"], "--licence is for export"),
        (["import", "--store", "STORE"], "import: name the file of rankings or pairs as --data"),
        (["import", "--store", "STORE", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["erase", "--store", "STORE"], "erase: name --person or --annotator"),
        (["erase", "--store", "STORE", "--person", "p", "--annotator", "a"], "erase: name --person or --annotator"),
        (["erase", "--store", "STORE", "--person", "nobody"], "nothing of person nobody is in this store"),
        (["status", "--store", "STORE", "--output_dir", "STORE"], "labels.db: is a file; choose another --output_dir"),
        (["export", "--store", "STORE", "--licence", "mit\nx: y"], "must be a short name such as cc-by-4.0"),
        (["export", "--store", "STORE", "--format", "demonstrations"], "no rows: "),
    ],
)
def test_mistakes_are_one_line(store, flags, said):
    result = run(*[str(store) if flag == "STORE" else flag for flag in flags], code=2)
    assert said in result.err
    assert result.err.count("\n") == 1


def test_the_yaml_has_a_section(store, tmp_path):
    (tmp_path / "my.yaml").write_text(f"collected:\n  store: {store}\n  output_dir: {tmp_path}/there\n")
    run("status", "--config", tmp_path / "my.yaml")
    assert (tmp_path / "there" / "collected.html").exists()
