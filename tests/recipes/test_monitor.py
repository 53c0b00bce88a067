"""recipes/monitor.py: what it writes, a reference that is kept, the review queue, the exit code of an alarm."""

from __future__ import annotations

import json
import time
import uuid
from pathlib import Path

import pytest
from reference import recipe
from reference.documents import ROOT, blocks_of

from rlhf.collection.store import Answer, Conversation, Store

MODERATOR = """
from rlhf.serving.app import Verdict

def judge(texts):
    return [Verdict({"insult": "fool" in text}, {"insult": float("fool" in text)}) for text in texts]
"""
GUIDE = ROOT / "recipes" / "guides" / "monitoring.md"
FAST = ("--reference_requests", 50, "--window", 20, "--horizon", 100)


def log(path: Path, answers: list[str], first: int = 0, source: str = "log", consent: bool = False) -> None:
    now = time.time()
    with Store(path) as store:
        for n, answer in enumerate(answers, start=first):
            talk = [{"role": "user", "content": f"Question {n}?"}, {"role": "assistant", "content": answer}]
            store.add_conversation(Conversation(
                id=f"chat-{n:05}", messages=talk, person="anonymous", source=source, consent=consent, scrubbed=True,
                expires=now + 1e6, created=now - 10_000 + n, policy="ppo",
            ))  # fmt: skip


def run(*flags: object, code: int = 0) -> recipe.Result:
    result = recipe.run("monitor", *flags)
    assert result.code == code, result.out + result.err
    return result


def test_a_log_is_watched_and_reviewed(tmp_path):
    (tmp_path / "mine.py").write_text(MODERATOR)
    store, review = tmp_path / "log.db", tmp_path / "review.db"
    log(store, ["A fine answer."] * 49 + ["You fool."] + ["A fine answer."] * 30)
    given = ("--store", store, "--moderator", f"{tmp_path / 'mine.py'}:judge", *FAST)
    quiet = run(*given, "--output_dir", tmp_path / "one", "--review", review, "--review_share", "0.2")
    assert "No alarm in 30 answers" in quiet.out + quiet.err
    written = json.loads((tmp_path / "one" / "monitor.json").read_text())
    assert written["metrics"]["flag_rate"] == pytest.approx(
        {"value": 0.0, "low": 0.0, "high": 0.1135, "n": 30}, abs=1e-3
    )
    assert (tmp_path / "one" / "monitor.html").is_file()
    with Store(review) as queued:
        assert sum(bool(item.columns["flagged"]) for item in queued.items()) == 1
        assert queued.setting("label.project")["flags"] == ["insult"]
    log(store, ["You fool."] * 20, first=80)
    with Store(store) as opened, opened.writing() as db:  # the reference has expired since
        db.execute("DELETE FROM conversations WHERE id < 'chat-00050'")
    stopped = run(*given, "--reference", tmp_path / "one" / "monitor.json", "--output_dir", tmp_path / "two",
                  "--on_alarm", "stop", code=1)  # fmt: skip
    assert "2 alarms" in stopped.err
    again = json.loads((tmp_path / "two" / "monitor.json").read_text())
    assert again["answers"] == 50
    assert [alarm["signal"] for alarm in again["alarms"]] == ["length_psi", "flag_rate"]  # "You fool." is shorter
    assert "fool" not in json.dumps(again)


def test_a_reference_of_another_moderator_or_source_is_told(tmp_path):
    mine, store = tmp_path / "mine.py", tmp_path / "log.db"
    mine.write_text(MODERATOR)
    log(store, ["A fine answer."] * 70)
    given = ("--store", store, "--moderator", f"{mine}:judge", *FAST)
    run(*given, "--output_dir", tmp_path / "one")
    again = (*given, "--reference", tmp_path / "one" / "monitor.json", "--output_dir", tmp_path / "two")
    assert "not compared" not in run(*again).out
    mine.write_text(MODERATOR.replace("fool", "fine"))
    assert "not compared: flag_rate: the reference was made with another --moderator" in run(*again).out
    other = run(*again, "--source", "playground", code=2)
    assert "its reference is of source=log, and this is playground; leave --reference out" in other.err


def decide(review: Path) -> None:
    """Flag all that is queued, as a person does at `rlhf label`."""
    with Store(review) as queued:
        queued.add_annotator("ann")
        for task in queued.lease("ann", 10):
            shown = task.candidates[0].id
            queued.submit("ann", Answer(
                assignment=task.assignment, submission=uuid.uuid4().hex, ranks={shown: 1},
                ratings={shown: {"decision": 2}}, flags=("insult",),
            ))  # fmt: skip


def test_decisions_about_a_playground_become_rows_in_the_guides_steps(tmp_path):
    """monitoring.md: the monitor queues, people label, the same command writes the rows."""
    (tmp_path / "mine.py").write_text(MODERATOR)
    store, review, rows = tmp_path / "log.db", tmp_path / "review.db", tmp_path / "out" / "review_rows.jsonl"
    log(store, ["A fine answer."] * 10 + ["You fool."] * 2, source="playground", consent=True)
    block = next(block for block in blocks_of(GUIDE) if "review_rows.jsonl" in block.text)
    steps = [words for words in block.commands if words[:2] == ["rlhf", "monitor"]]
    assert [words[1] for words in block.commands] == ["monitor", "label", "monitor", "moderation"]
    ours = {"log.db": store, "review.db": review, "runs/my/moderation": f"{tmp_path / 'mine.py'}:judge",
            "runs/my/agreed": tmp_path / "out", "20": 8}  # fmt: skip
    for words in steps:
        assert not rows.exists()
        run(*(ours.get(word, word) for word in words[2:]))
        decide(review)
    written = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [(row["response"], row["labels"]) for row in written] == [("You fool.", {"insult": 1})] * 2


def test_decisions_about_a_log_measure_and_train_nothing(tmp_path):
    (tmp_path / "mine.py").write_text(MODERATOR)
    store, review, rows = tmp_path / "log.db", tmp_path / "review.db", tmp_path / "out" / "review_rows.jsonl"
    log(store, ["A fine answer."] * 50 + ["You fool."] * 3)
    given = ("--store", store, "--moderator", f"{tmp_path / 'mine.py'}:judge", *FAST, "--review", review,
             "--output_dir", tmp_path / "out")  # fmt: skip
    run(*given)
    rows.write_text("of an earlier run, whose person has been erased\n")
    decide(review)
    again = run(*given)
    assert "decisions become no training row: their senders did not agree" in again.out
    metrics = json.loads((tmp_path / "out" / "monitor.json").read_text())["metrics"]
    assert metrics["review_precision"]["value"] == 1
    assert not rows.exists()


def test_mistakes(tmp_path):
    log(tmp_path / "log.db", ["A fine answer."] * 5)
    cases = [
        (("--store", tmp_path / "no.db"), "no such store"),
        (("--store", tmp_path / "log.db"), "5 answers may be read, the reference needs 500"),
        (("--store", tmp_path / "log.db", "--review", tmp_path / "r.db"), "nothing is flagged without a moderator"),
        (("--store", tmp_path / "log.db", "--factor", "1"), "factor=1.0 must be above 1"),
        (("--store", tmp_path / "log.db", "--reference", tmp_path / "no.json"), "no such file"),
        (("--store", tmp_path / "log.db", "--reference", tmp_path), "is a folder; name monitor.json"),
        (("--store", tmp_path / "log.db", "--categories", "[a, b, a]"), "a, b, a: one is there twice"),
    ]
    for flags, message in cases:
        refused = run(*flags, "--output_dir", tmp_path / "out", code=2)
        assert message in refused.err, refused.err
