"""A round's labels where a run is overwritten; the playground's comparisons, and what is erased between two runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from reference import recipe

from reward_models.grader import RubricGrader
from rlhf.collection.desk import StoreDesk, label
from rlhf.collection.store import Conversation, Feedback, Store
from rlhf.errors import InputError
from rlhf.rows.jsonl import read_rows
from rlhf.rows.records import write_jsonl
from rlhf.run.stages import Manifest

round_labels = recipe.load("round_labels")


def labelled(run: Path, overwrite: bool = False, labeler: str = "", **turn: Any) -> list[list[float]]:
    """Have three items of two responses judged; returns the ranks of the rankings that are written."""
    items = [{"prompt": f"Label {n}?", "responses": ["a", "b"]} for n in range(3)]
    write_jsonl(run / "round_1" / "items" / "items.jsonl", items)
    settings = {"labels": "simulated", "overlap": 1, "grader": None, "rubric": None, "store": None, **turn}
    asked = SimpleNamespace(
        flywheel=SimpleNamespace(**settings), data=SimpleNamespace(labeler=labeler, seed=0), output_dir=str(run),
        overwrite=overwrite,
    )  # fmt: skip
    round_labels.label_items(asked, 1, run / "round_1")
    return [row["ranks"] for _, row in read_rows(run / "round_1" / "labels" / "rankings.jsonl")]


@pytest.fixture
def labelers(tmp_path: Path) -> list[str]:
    """Two that disagree."""
    for name, ranks in (("up", [1, 2]), ("down", [2, 1])):
        (tmp_path / f"{name}.py").write_text(f"def rank(prompts, responses, seed): return [{ranks}] * len(prompts)")
    return [f"{tmp_path}/{name}.py:rank" for name in ("up", "down")]


def test_another_labeler_judges_the_same_items_anew(tmp_path, labelers):
    run, (up, down) = tmp_path / "run", labelers
    assert labelled(run, labeler=up) == [[1, 2]] * 3
    with pytest.raises(InputError, match=r"config\.settings\.labeler was"):
        labelled(run, labeler=down)
    assert labelled(run, labeler=down, overwrite=True) == [[2, 1]] * 3


def test_what_people_and_invited_models_said_stays(tmp_path, labelers):
    run = tmp_path / "run"
    labelled(run, labeler=labelers[0], overlap=3)
    with Store(run / "labels.db") as store:
        store.erase(annotator="simulated-3")
        store.invite("judge", "model")
        label(StoreDesk(store, "judge", "model"), lambda prompts, responses, seed: [[5, 5]] * len(prompts), 0, batch=3)
        store.erase(annotator="simulated-2")
        label(StoreDesk(store, "ann", "person"), lambda prompts, responses, seed: [[7, 7]] * len(prompts), 0, batch=3)
    ranks = labelled(run, labeler=labelers[1], overlap=3, overwrite=True)
    assert sorted(ranks) == [[2, 1]] * 3 + [[5, 5]] * 3 + [[7, 7]] * 3


def test_another_grader_judges_anew_and_one_that_moved_does_not(tmp_path, monkeypatch):
    run, grader = tmp_path / "run", tmp_path / "grader"
    grader.mkdir()
    (tmp_path / "rubric.yaml").write_text("question")
    asked = []

    def load(model: str, rubric: str) -> Any:
        asked.append(model)
        sign = float(Path(model, "weights").read_text())
        return lambda prompts, texts: [sign * ord(text) for text in texts]

    monkeypatch.setattr(RubricGrader, "load", load)
    turn = {"labels": "grader", "rubric": str(tmp_path / "rubric.yaml")}
    (grader / "weights").write_text("1")
    assert labelled(run, grader=str(grader), **turn) == [[2, 1]] * 3
    grader.rename(tmp_path / "moved")
    grader = tmp_path / "moved"
    labelled(run, grader=str(grader), **turn)
    assert len(asked) == 1, "the stage is complete"
    (grader / "weights").write_text("-1")
    with pytest.raises(InputError, match="belongs to another run: grader was"):
        labelled(run, grader=str(grader), **turn)
    assert labelled(run, grader=str(grader), overwrite=True, **turn) == [[1, 2]] * 3


def say(store: Store, name: str, person: str, question: str) -> None:
    asked = [{"role": "user", "content": question}, {"role": "assistant", "content": "Hi."}]
    store.add_conversation(Conversation(id=name, messages=asked, person=person, consent=True, scrubbed=True))
    store.add_feedback(
        Feedback(
            id=f"said-{name}", person=person, kind="comparison", conversation=name, turn=1, responses=("Hi.", "Yo."),
            ranks=(2.0, 1.0), consent=True, scrubbed=True,
        )
    )  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose first round has its rankings, and a playground of three users."""
    folder = tmp_path / "run" / "round_1" / "rankings"
    ranked = [{"prompt": f"Label {n}?", "responses": ["a", "b"], "ranks": [1, 2]} for n in range(20)]
    write_jsonl(folder / "train.jsonl", ranked[:17])
    write_jsonl(folder / "held_out.jsonl", ranked[17:])
    Manifest(stage="rankings", inputs={}, seed=0).write(folder)
    write_jsonl(tmp_path / "run" / "data" / "eval_prompts.jsonl", [{"prompt": "An evaluation's?"}])
    with Store(tmp_path / "playground.db") as store:
        for n in range(9):
            say(store, f"much-{n}", "p-much", f"Much {n}?")
        say(store, "one", "p-one", "One?")
        say(store, "eval", "p-two", "An evaluation's?")
        say(store, "held", "p-two", "Label 18?")
        say(store, "two", "p-two", "Two?")
    return tmp_path / "run"


def config(run: Path, **flywheel: Any) -> Any:
    turn = {"feedback": str(run.parent / "playground.db"), "feedback_share": 0.1, **flywheel}
    evaluation = SimpleNamespace(eval_data=None)
    return SimpleNamespace(flywheel=SimpleNamespace(**turn), evaluation=evaluation, seed=0, overwrite=False)


def questions(file: Path) -> list[str]:
    return [row["prompt"][-1]["content"] for _, row in read_rows(file)]


def begin_training(run: Path, complete: bool) -> Path:
    model = run / "round_1" / "reward_model"
    model.mkdir()
    (model / "inputs.json").write_text("{}")
    if complete:
        Manifest(stage="reward_model", inputs={}, seed=0).write(model)
    return model


def test_usable_rows_are_capped_and_apart_from_what_is_measured(run):
    file = round_labels.playground_rows(config(run), 1, run / "round_1")
    said = questions(file)
    assert said[-2:] == ["One?", "Two?"]
    assert len(said) == 2 + 2  # 2 <= 0.1 (17 + 4), and 3 > 0.1 (17 + 5)
    assert all(question.startswith("Much") for question in said[:2])
    assert round_labels.playground_rows(config(run), 1, run / "round_1") == file
    assert questions(file) == said, "a second call changes nothing"
    assert round_labels.playground_rows(config(run, feedback=None), 1, run / "round_1") is None
    with pytest.raises(InputError, match=r"config\.settings\.feedback_share was 0\.1, now 0\.5"):
        round_labels.playground_rows(config(run, feedback_share=0.5), 1, run / "round_1")


def test_what_is_erased_before_the_training_ends_is_not_trained_on(run):
    file = round_labels.playground_rows(config(run), 1, run / "round_1")
    model = begin_training(run, complete=False)
    assert round_labels.playground_rows(config(run), 1, run / "round_1") == file
    assert model.is_dir(), "nothing is gone: the training goes on"
    with Store(run.parent / "playground.db") as store:
        store.erase(person="p-much")
    round_labels.playground_rows(config(run), 1, run / "round_1")
    assert questions(file) == ["One?", "Two?"]
    assert not model.exists(), "it had seen what is gone"
    with Store(run.parent / "playground.db") as store:
        store.erase(person="p-one")
        store.erase(person="p-two")
    assert round_labels.playground_rows(config(run), 1, run / "round_1") is None
    assert not file.exists()


def test_one_killed_while_it_takes_out_what_was_erased_keeps_the_others(run, monkeypatch):
    file = round_labels.playground_rows(config(run), 1, run / "round_1")
    model = begin_training(run, complete=False)
    with Store(run.parent / "playground.db") as store:
        store.erase(person="p-much")
    monkeypatch.setattr(round_labels, "write_jsonl", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        round_labels.playground_rows(config(run), 1, run / "round_1")
    monkeypatch.undo()
    assert not model.exists()
    assert round_labels.playground_rows(config(run), 1, run / "round_1") == file
    assert questions(file) == ["One?", "Two?"]


def test_a_complete_reward_model_keeps_what_it_learned(run):
    file = round_labels.playground_rows(config(run), 1, run / "round_1")
    before, model = file.read_bytes(), begin_training(run, complete=True)
    with Store(run.parent / "playground.db") as store:
        store.erase(person="p-much")
    assert round_labels.playground_rows(config(run), 1, run / "round_1") == file
    assert file.read_bytes() == before
    assert model.is_dir()


def test_a_playground_without_anything_usable(run):
    Store(run.parent / "empty.db").close()
    assert round_labels.playground_rows(config(run, feedback=str(run.parent / "empty.db")), 1, run / "round_1") is None
    with pytest.raises(InputError, match=r"none\.db: no such store"):
        round_labels.playground_rows(config(run, feedback=str(run.parent / "none.db")), 1, run / "round_1")
