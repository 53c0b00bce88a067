"""The flywheel: rounds on the smoke world, stopped and run again, and people's labels through the store."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from reference import recipe
from safetensors.torch import load_file

from rlhf.rows.records import prompt_key, read_prompts, read_rankings
from rlhf.run.stages import Manifest

SMOKE = ("--config", "smoke_flywheel.yaml")


def test_what_no_round_reads_is_refused(tmp_path):
    unread = {"process_reward": "model", "red_team": "model", "run_evals": "eval_data", "judge_card": "template",
              "contamination": "min_chars", "system_card": "output_dir"}  # fmt: skip
    cases = [(f"--{name}.{field}", 30, f"{name}: no round has this stage") for name, field in unread.items()]
    for flag, value, message in (*cases, ("--overwrite_from", "sft", "overwrite_from: rounds build on all before")):
        refused = recipe.run("flywheel", *SMOKE, "--output_dir", tmp_path / "run", flag, value)
        assert (refused.code, refused.err[: len(message) + 7]) == (2, f"error: {message}"), refused.err
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_impossible_settings(tmp_path):
    for flags, message in (
        (("--flywheel.items", 500), "2 rounds of 1,000 need 2,000"),
        (("--data.labeler", "null"), "set flywheel.labels: people"),
        (("--flywheel.labels", "grader"), "labels: grader goes together with"),
        (("--data.rankings", "x.jsonl"), "the flywheel collects its own"),
    ):
        refused = recipe.run("flywheel", *SMOKE, "--output_dir", tmp_path / "run", *flags)
        assert refused.code == 2, refused.out
        assert message in refused.err
        assert len(refused.err.splitlines()) == 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("flywheel") / "run"
    done = recipe.run("flywheel", *SMOKE, "--output_dir", run)
    assert done.code == 0, done.err
    return run


@pytest.mark.long
def test_two_rounds(whole):
    result = json.loads((whole / "flywheel.json").read_text())
    assert [row["labels"] for row in result["rounds"]] == [32, 64]
    first, second = (read_rankings(whole / f"round_{n}" / "labels" / "rankings.jsonl") for n in (1, 2))
    assert {prompt_key(r.prompt) for r in first} < {prompt_key(r.prompt) for r in second}
    for name in ("gold_score", "win_rate_vs_last", "reward_model_accuracy"):
        measured = result["metrics"][f"round_2/{name}"]
        assert measured["low"] <= measured["value"] <= measured["high"]
    assert (whole / "flywheel.html").read_text().count("<svg") == 1
    held_out = {prompt_key(p.messages) for p in read_prompts(whole / "data" / "eval_prompts.jsonl")}
    assert not held_out & {prompt_key(r.prompt) for r in second}
    policy = result["rounds"][0]["folder"] + "/ppo" if result["rounds"][0]["passed"] else "sft"
    assert Manifest.read(whole / "round_2" / "items").inputs["policy"]
    row = json.loads((whole / "round_2" / "items" / "items.jsonl").read_text().splitlines()[0])
    assert row["policy"][0].endswith(policy)


@pytest.mark.long
def test_stopped_in_a_round_it_ends_the_same(whole, tmp_path):
    """The second round is gone but for its items, as after a kill before its labels were written."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for path in (run / "round_2").iterdir():
        if path.name != "items":
            shutil.rmtree(path)
    done = recipe.run("flywheel", *SMOKE, "--output_dir", run)
    assert done.code == 0, done.err
    for name in ("reward_model", "ppo"):
        mine, expected = (load_file(f / "round_2" / name / "model.safetensors") for f in (run, whole))
        assert all(mine[key].equal(expected[key]) for key in expected)


@pytest.mark.long
def test_the_playground_s_comparisons_train_the_reward_model(whole, tmp_path):
    """One round over the same data, with three consented comparisons and one that is not."""
    from rlhf.collection.store import Conversation, Feedback, Store

    with Store(tmp_path / "playground.db") as store:
        for n, consent in enumerate((True, True, True, False)):
            asked = [{"role": "user", "content": f"What is {n} + 1?"}, {"role": "assistant", "content": "Sure!"}]
            allowed = {"person": f"person-{n}", "consent": consent, "scrubbed": True}
            store.add_conversation(Conversation(id=f"talk-{n}", messages=asked, **allowed))
            said = {"kind": "comparison", "turn": 1, "responses": ("Sure!", "I do not know."), "ranks": (1.0, 2.0)}
            store.add_feedback(Feedback(id=f"said-{n}", conversation=f"talk-{n}", **said, **allowed))
    run = tmp_path / "run"
    for name in ("data", "base", "sft"):
        shutil.copytree(whole / name, run / name)
    flags = ("--flywheel.rounds", 1, "--flywheel.feedback", tmp_path / "playground.db")
    done = recipe.run("flywheel", *SMOKE, "--output_dir", run, *flags)
    assert done.code == 0, done.err
    (row,) = json.loads((run / "flywheel.json").read_text())["rounds"]
    assert row["feedback"] == 3
    report = json.loads((run / "round_1" / "reward_model" / "manifest.json").read_text())["outputs"]
    labelled = len(read_rankings(run / "round_1" / "rankings" / "train.jsonl"))
    assert report["training_prompts"] == labelled + 3
