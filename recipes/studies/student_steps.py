"""Study 18: the first wrong step of real students' solutions, found by a small process reward model.

    python recipes/studies/student_steps.py --train_data student_steps.jsonl.gz

Rows as of github.com/eth-lre/verify-then-generate. A fifth of the problems is held out, another fifth for each seed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rlhf import config as configs
from rlhf.errors import InputError
from rlhf.rows.jsonl import read_object
from rlhf.rows.sources import require_there, rows
from rlhf_recipes.process_reward import ProcessRecipe, process_reward
from rlhf_recipes.studies.shared_runs import stage
from rlhf_recipes.studies.study import Check, Panel, Row, Study, StudyConfig, at, main

FOUND, MODEL = "first_error_accuracy", "process model"
BASELINES = {"always_none": "always none", "always_the_first_step": "always the first", "bag_of_words": "bag of words"}
PARTS = {"wrong": "wrong solutions", "right": "right solutions"}


@dataclass(frozen=True, kw_only=True)
class StudentStepsConfig(StudyConfig):
    """Settings of the study."""

    model: str | None = None
    """Trunk of the process model; null: the chain's."""
    train_data: str = ""
    """The solutions: a file, folder or hub name whose rows have a `problem`."""

    @property
    def files(self) -> dict[str, str]:
        return {**super().files, "train_data": self.train_data}

    def check(self) -> None:
        if not self.train_data:
            raise InputError("--train_data is missing: rows as of github.com/eth-lre/verify-then-generate")
        require_there(self.train_data)


def split(found: Sequence[dict[str, Any]], seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return (the rest, the rows of a fifth of the problems)."""
    problems = sorted({row["problem"] for row in found})
    random.Random(seed).shuffle(problems)
    held = set(problems[: len(problems) // 5])
    return [row for row in found if row["problem"] not in held], [row for row in found if row["problem"] in held]


def run(config: StudentStepsConfig) -> Iterator[Row]:
    files = {name: config.shared / f"{name}.jsonl" for name in ("train", "held_out")}
    parts = split([row for _, row in rows(config.train_data, "train")], config.seed)
    config.shared.mkdir(parents=True, exist_ok=True)
    for file, part in zip(files.values(), parts, strict=True):
        file.write_text("".join(json.dumps(row) + "\n" for row in part))
    own = {"train_data": str(files["train"]), "eval_data": str(files["held_out"])}
    own |= {"model": config.model} if config.model else {}
    folder = stage(config, process_reward, ProcessRecipe, "process_reward", "process_reward", **own)
    metrics = read_object(folder / "process_reward.json")["metrics"]

    def row(name: str, series: str, panel: str) -> Row:
        found = metrics[name]
        return Row(series, found["value"], None, found["low"], found["high"], found["n"], panel)

    yield row(FOUND, MODEL, "")
    for name, series in BASELINES.items():
        yield row(f"{FOUND}_{name}", series, "")
    for name, series in PARTS.items():
        yield row(f"{FOUND}_{name}", series, "parts")
    yield row("step_accuracy", "single steps", "parts")


def above(baseline: str, found: Sequence[Row]) -> float:
    return at(found, MODEL) - at(found, baseline)


STUDY = Study(
    name="student_steps",
    number=18,
    title="Finding the first wrong step of a student's solution",
    claim="To find where a student's solution first goes wrong is hard for models; teachers' labels of steps help.",
    source="Daheim et al. 2407.09136 (Stepwise Verification and Remediation of Student Reasoning Errors)",
    miniature="Word problems of that paper, four fifths to train on; MiniLM (22 M parameters), default settings. A "
    "solution counts where its first wrong step, or that there is none, is what the labels say.",
    panels=[Panel(y="first wrong step found, or none"), Panel("parts", y="right, of the process model")],
    checks=[Check(f"above {name!r}", partial(above, name)) for name in BASELINES.values()],
    run=run,
)

if __name__ == "__main__":
    configs.run(lambda argv: main(STUDY, StudentStepsConfig, __file__, argv))
