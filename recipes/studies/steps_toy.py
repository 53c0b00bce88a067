"""Study 8: a process model picks better than an outcome model, and that better than a vote, the more the larger n.

python recipes/studies/steps_toy.py
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rlhf import config as configs
from rlhf.rows.jsonl import read_object
from rlhf_recipes.best_of_n import BestOfNConfig, best_of_n
from rlhf_recipes.process_reward import ProcessRecipe, process_reward
from rlhf_recipes.studies.shared_runs import chain, stage
from rlhf_recipes.studies.study import Check, Panel, Row, Study, StudyConfig, at, main

PROCESS, OUTCOME, VOTE = "process model", "outcome model", "majority"
SOLVED, JUDGED = "", "judged"
PROCESS_FOLDER, OUTCOME_FOLDER = "process_reward", "outcome_reward"
CARD = (
    ("process model: first wrong step found", 0, "first_error_accuracy"),
    ("process model: solution judged rightly", 0, "solution_accuracy_min"),
    ("outcome model: solution judged rightly", 1, "outcome_accuracy"),
)
"""What the models' own cards say on held-out solutions: the label, whose card, the metric."""


@dataclass(frozen=True, kw_only=True)
class StepsConfig(StudyConfig):
    """Settings of the study."""

    n: int = 64
    """Solutions per problem."""
    max_prompts: int = 200
    """Held-out problems."""

    def check(self) -> None:
        sampled(self)


def sampled(config: StepsConfig) -> BestOfNConfig:
    """Return the settings of best-of-n with both models."""
    shared = config.shared
    return BestOfNConfig(
        model=str(shared / "sft"), data=str(shared / "data/eval_prompts.jsonl"),
        scorers=[str(shared / PROCESS_FOLDER), str(shared / OUTCOME_FOLDER)], answer=r"The answer is (-?\d+)",
        answer_column="answer", n=config.n, max_prompts=config.max_prompts, max_new_tokens=48,
        output_dir=str(shared / "best_of_n_steps"), seed=config.seed, bf16=False,
    )  # fmt: skip


def run(config: StepsConfig) -> Iterator[Row]:
    chain(config, "sft")
    folders = [
        stage(config, process_reward, ProcessRecipe, "process_reward", out, kind=kind)
        for out, kind in ((PROCESS_FOLDER, "process"), (OUTCOME_FOLDER, "outcome"))
    ]
    for label, which, metric in CARD:
        found = read_object(folders[which] / "process_reward.json")["metrics"][metric]
        yield Row(label, found["value"], None, found["low"], found["high"], found["n"], JUDGED)
    best_of_n(sampled(config))
    curves = read_object(config.shared / "best_of_n_steps" / "best_of_n.json")["curves"]
    names = dict(zip((PROCESS, OUTCOME), curves, strict=False)) | {VOTE: "majority"}
    for series, name in names.items():
        for point in curves[name]:
            if point["n"] & (point["n"] - 1) == 0:  # 1, 2, 4, ...
                yield Row(series, point["value"], point["n"], point["low"], point["high"], config.max_prompts, SOLVED)


def lead(rows: Sequence[Row], one: str, other: str, n: float) -> float:
    return at(rows, one, n, SOLVED) - at(rows, other, n, SOLVED)


def most(rows: Sequence[Row]) -> float:
    """Return the largest n of the curves."""
    return max(row.x for row in rows if row.series == PROCESS and row.x is not None)


STUDY = Study(
    name="steps_toy",
    number=8,
    title="Process over outcome over majority, the more the larger n",
    claim="A process reward model solves more problems by best-of-n than an outcome model, and that more than a vote; "
    "its lead grows with n.",
    source="Lightman et al. 2023, figure 3",
    miniature="Sums and short stories in steps, where many make the same mistake; both models learn from the same "
    "4,000 solutions, whose steps labelers judge with slips; solutions are sampled from the SFT model, and a problem "
    "is solved where the answer is right.",
    panels=[Panel(SOLVED, "n", "problems solved", "log"), Panel(JUDGED, y="share of held-out solutions")],
    run=run,
    checks=[
        Check("process above outcome at the largest n", lambda rows: lead(rows, PROCESS, OUTCOME, most(rows))),
        Check("outcome above majority at the largest n", lambda rows: lead(rows, OUTCOME, VOTE, most(rows))),
        Check(
            "the process model's lead over the vote grows from n = 4 to the largest",
            lambda rows: lead(rows, PROCESS, VOTE, most(rows)) - lead(rows, PROCESS, VOTE, 4),
        ),
    ],
)

if __name__ == "__main__":
    configs.run(lambda argv: main(STUDY, StepsConfig, __file__, argv))
