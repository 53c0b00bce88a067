"""The playground's comparisons in a round: a folder as the flywheel leaves it, and what is erased between two runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from reference import recipe

from rlhf.collection.store import Conversation, Feedback, Store
from rlhf.errors import InputError
from rlhf.rows.jsonl import read_rows
from rlhf.rows.records import write_jsonl
from rlhf.run.stages import Manifest

round_labels = recipe.load("round_labels")


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
