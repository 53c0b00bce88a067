"""recipes/process_reward.py: what it writes, where its data come from, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from reference import recipe, tiny_chain

from reward_models import ProcessModel
from rlhf.run.stages import Manifest


@pytest.fixture
def base(tmp_path: Path, tiny_model, tiny_tokenizer) -> Path:
    tiny_chain.shake(tiny_model, 0, 0.05)
    return tiny_chain.save_base(tmp_path / "tiny", tiny_model, tiny_tokenizer)


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def student(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Rows of a right and a wrong solution; the wrong step has a dog."""
    return [
        {"problem": f"Problem {n}?", "reference_solution": f"one {n}\ntwo {n}\n 3", "incorrect_index": n % 2,
         "student_incorrect_solution": [f"one {n}" if n % 2 else f"dog {n}", "dog two", " 4"]}
        for n in range(first, first + count)
    ]  # fmt: skip


def run(*flags: object, code: int = 0) -> recipe.Result:
    result = recipe.run("process_reward", *flags)
    assert result.code == code, result.out + result.err
    return result


SMALL = ("--solutions_per_batch", 8, "--microbatch_size", 8, "--learning_rate", "3e-3", "--epochs", 2,
         "--bf16", "false", "--preflight", "false", "--save_steps", 0)  # fmt: skip


def test_what_is_written(tmp_path, base):
    train = write(tmp_path / "train.jsonl", student(24))
    held_out = write(tmp_path / "held_out.jsonl", student(12, first=50))
    out = tmp_path / "my" / "prm"
    given = ("--model", base, "--train_data", train, "--eval_data", held_out, "--output_dir", out, *SMALL)
    told = run(*given)
    written = json.loads((out / "process_reward.json").read_text())
    metric = written["metrics"]["first_error_accuracy"]
    assert set(metric) == {"value", "low", "high", "n"}
    assert metric["n"] == 24  # 12 problems, a right and a wrong solution each
    assert metric["low"] <= metric["value"] <= metric["high"]
    assert written["metrics"]["first_error_accuracy_always_none"]["value"] == 0.5
    assert written["metrics"]["first_error_accuracy_always_the_first_step"]["value"] == 0.25
    assert written["metrics"]["first_error_accuracy_bag_of_words"]["value"] > 0.9
    manifest = Manifest.read(out)
    assert manifest.stage == "process_reward"
    assert manifest.outputs["first_error_accuracy"] == metric["value"]
    assert manifest.outputs["training_solutions"] == 48
    assert (out / "process_report.html").is_file()
    assert "process_report.html" in told.out + told.err
    model = ProcessModel.load(out, device="cpu")
    assert manifest.template_hash == model.about.template_hash
    assert len(model(["Problem 1?"], ["one\ntwo"])) == 1
    assert "complete, skipped" in (again := run(*given)).out + again.err
    refused = run(*given[:-2], "--head", "three_class", code=2)
    assert "belongs to another run" in refused.err


@pytest.mark.slow
def test_data_come_from_the_run_or_are_split_by_problem(tmp_path, base):
    run_folder = tmp_path / "run"
    rows = [{"prompt": f"Problem {n}?", "steps": ["a", "dog b"], "labels": [1, -1]} for n in range(20) for _ in (0, 1)]
    write(run_folder / "data" / "steps.jsonl", rows)
    base.rename(run_folder / "sft")
    run("--output_dir", run_folder / "one", *SMALL)
    report = json.loads((run_folder / "one" / "process_reward.json").read_text())["report"]
    assert (report["problems"], report["solutions"]) == (2, 4)  # a tenth of 20 problems, both rows of each
    write(run_folder / "data" / "steps_held_out.jsonl", [{**rows[0], "prompt": f"Other {n}?"} for n in range(5)])
    rows += [{"prompt": f"Right {n}?", "steps": ["a"], "labels": [1]} for n in range(20)]
    write(run_folder / "data" / "steps.jsonl", rows)
    run("--output_dir", run_folder / "three", "--kind", "outcome", *SMALL)
    written = json.loads((run_folder / "three" / "process_reward.json").read_text())
    assert (written["report"]["kind"], written["report"]["problems"]) == ("outcome", 5)
    assert set(written["metrics"]) == {"outcome_accuracy"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"--eval_data": "train.jsonl"}, "train_data, eval_data: prompt: "),
        ({"--train_data": "nothing.jsonl"}, "nothing.jsonl: no such file"),
        ({"--train_data": "pairs.jsonl"}, "steps, labels: missing; the fields are prompt, chosen"),
        ({"--model": "nothing"}, "nothing"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(tmp_path, base, change, says):
    write(tmp_path / "train.jsonl", student(4))
    write(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    given = {"--model": base, "--train_data": "train.jsonl", "--output_dir": "out"} | change
    paths = {name: tmp_path / value if isinstance(value, str) else value for name, value in given.items()}
    refused = run(*(word for pair in paths.items() for word in pair), *SMALL, code=2)
    assert says in refused.err
    assert refused.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_student_steps_above_the_baselines(tmp_path, shared_data):
    """The whole of the published rows, split by problem, on a small encoder drawn at random would learn nothing: this
    needs a real trunk in runs/minilm."""
    trunk = recipe.ROOT / "runs" / "minilm"
    if not trunk.is_dir():
        pytest.skip(f"no trunk at {trunk}")
    run("--config", "process_reward.yaml", "--model", trunk, "--train_data", shared_data / "student_steps.jsonl.gz",
        "--output_dir", tmp_path / "prm")  # fmt: skip
    metrics = json.loads((tmp_path / "prm" / "process_reward.json").read_text())["metrics"]
    found = metrics["first_error_accuracy"]["value"]
    assert found > metrics["first_error_accuracy_always_none"]["value"]
    assert found > metrics["first_error_accuracy_always_the_first_step"]["value"]
