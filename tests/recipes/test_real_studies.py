"""Studies 18 and 20, of real rows: what they hold out and compute; a seed of each on rows that take seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from reference import tiny_chain

from rlhf.errors import InputError
from rlhf_recipes.studies import qa_feedback, student_steps
from rlhf_recipes.studies.study import Row, main

STUDENTS = """
process_reward: {solutions_per_batch: 8, microbatch_size: 8, learning_rate: 3.0e-3, bf16: false, preflight: false}
"""
QUESTIONS = """
data: {held_out_fraction: 0.25}
sft: {batch_size: 4, microbatch_size: 4, learning_rate: 1.0e-3, bf16: false, preflight: false}
reward_model:
  {prompts_per_batch: 4, learning_rate: 1.0e-3, seeds: [0, 1], keep_seeds: true, bf16: false, preflight: false}
"""


def students(problems: int) -> list[dict[str, Any]]:
    """Two rows per problem, each of a right and a wrong solution; the wrong step has a dog."""
    return [
        {"problem": f"Problem {n}?", "reference_solution": f"one {n}\n{n} two {student}", "incorrect_index": student,
         "student_incorrect_solution": ["dog one", "two"] if student == 0 else ["one", "dog two"]}
        for n in range(problems) for student in (0, 1)
    ]  # fmt: skip


def test_a_fifth_of_the_problems_is_held_out_whole():
    rows = students(20)
    held = []
    for seed in (0, 1):
        rest, out = student_steps.split(rows, seed)
        assert len(out) == 8
        assert len(rest) == 32
        assert not {row["problem"] for row in rest} & {row["problem"] for row in out}
        held.append({row["problem"] for row in out})
        assert student_steps.split(rows[::-1], seed)[1] == out[::-1]
    assert held[0] != held[1]


@pytest.fixture
def base(tmp_path: Path, tiny_model, tiny_tokenizer) -> Path:
    tiny_chain.shake(tiny_model, 0, 0.05)
    return tiny_chain.save_base(tmp_path / "tiny", tiny_model, tiny_tokenizer)


def test_margins_by_hand():
    of = {"process model": 0.5, "always none": 0.375, "always the first": 0.125, "bag of words": 0.75}
    rows = [Row(name, value) for name, value in of.items()]
    assert [check.margin(rows) for check in student_steps.STUDY.checks] == [0.125, 0.375, -0.25]
    of = {"reward model": 0.625, "bag of words": 0.5, "better length rule": 0.75}
    rows = [Row(name, value) for name, value in of.items()]
    assert [check.margin(rows) for check in qa_feedback.STUDY.checks] == [0.125, 0.125, -0.125]


@pytest.mark.slow
def test_a_seed_of_students(tmp_path: Path, base: Path) -> None:
    (tmp_path / "small.yaml").write_text(STUDENTS)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in students(20)))
    out = tmp_path / "studies"
    flags = ["--seeds", "[1]", "--output_dir", str(out), "--chain", str(tmp_path / "small.yaml"), "--model", str(base)]
    own = (student_steps.STUDY, student_steps.StudentStepsConfig, student_steps.__file__)
    with pytest.raises(InputError, match="--train_data is missing"):
        main(*own, flags)
    with pytest.raises(InputError, match=r"row\.jsonl: no such file or folder; did you mean .*rows\.jsonl"):
        main(*own, [*flags, "--train_data", str(tmp_path / "row.jsonl")])
    assert not out.exists()
    main(*own, [*flags, "--train_data", str(tmp_path / "rows.jsonl")])
    made = json.loads((out / "student_steps/student_steps.json").read_text())
    by_name = {point["series"]: point for point in made["points"]}
    assert by_name["process model"]["n"] == 16
    assert by_name["always none"]["value"] == 0.5
    assert by_name["always the first"]["value"] == 0.25
    assert by_name["wrong solutions"]["n"] == by_name["right solutions"]["n"] == 8
    assert str(tmp_path) not in json.dumps(made)


def test_a_seed_of_questions(tmp_path: Path, base: Path) -> None:
    """Held-out questions are ranked and not demonstrated; one reward model, whatever the chain says of seeds."""
    (tmp_path / "small.yaml").write_text(QUESTIONS)
    passages = [["Sea", "Sea\n\nIt is wet."]]
    answers = {f"prediction {k}": "no " * k for k in (1, 2, 3, 4)}
    rows = [
        {"question": f"What is {n}?", "passages": passages, "preference": [1] * 6, **answers,
         "feedback": {"corrected-prediction": f"It is {n}."}}
        for n in range(16)
    ]  # fmt: skip
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    out = tmp_path / "studies"
    flags = ["--seeds", "[1]", "--output_dir", str(out), "--chain", str(tmp_path / "small.yaml"), "--model", str(base)]
    own = (qa_feedback.STUDY, qa_feedback.QAConfig, qa_feedback.__file__)
    with pytest.raises(InputError, match="--source is missing"):
        main(*own, flags)
    assert not out.exists()
    main(*own, [*flags, "--source", str(tmp_path / "rows.json")])
    made = json.loads((out / "qa_feedback/qa_feedback.json").read_text())
    by_name = {point["series"]: point for point in made["points"]}
    assert by_name["reward model"]["n"] == 4 * 6
    assert by_name["better length rule"]["value"] == 1.0
    assert str(tmp_path) not in json.dumps(made)
    run = out / "runs/small-1"
    asked = {json.loads(line)["prompt"] for line in (run / "data/demonstrations.jsonl").read_text().splitlines()}
    held_out = [json.loads(line)["prompt"] for line in (run / "rankings/held_out.jsonl").read_text().splitlines()]
    assert len(asked) == 12
    assert len(held_out) == 4
    assert not asked & {turns if isinstance(turns, str) else turns[-1]["content"] for turns in held_out}
    assert not list(run.glob("reward_model/seed-*"))
