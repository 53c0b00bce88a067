"""Study 12: one epoch is enough for a reward model; more overfits.

python recipes/studies/epochs.py
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rlhf import config as configs
from rlhf.rows.records import read_rankings, write_jsonl
from rlhf_recipes.reward_model import RewardRecipe, reward_model
from rlhf_recipes.studies.shared_runs import chain, stage
from rlhf_recipes.studies.study import Check, Panel, Row, Study, StudyConfig, main

TRAIN, HELD_OUT = "training prompts", "held-out prompts"
ACCURACY, LOSS = "accuracy", "loss"


@dataclass(frozen=True, kw_only=True)
class EpochsConfig(StudyConfig):
    """Settings of the study."""

    prompts: int = 600
    """Training prompts."""
    epochs: list[int] = field(default_factory=lambda: [1, 2, 4])
    """Passes over them, each a training of its own with its own schedule."""


def run(config: EpochsConfig) -> Iterator[Row]:
    from reward_models import RewardModel
    from reward_models.card.report import reward_report

    folder = chain(config, "rankings")
    data = folder / f"train_{config.prompts}.jsonl"
    rankings = read_rankings(folder / "rankings/train.jsonl")[: config.prompts]
    write_jsonl(data, rankings)
    held_out = read_rankings(folder / "rankings/held_out.jsonl")
    for epochs in config.epochs:
        out = stage(
            config, reward_model, RewardRecipe, "reward_model", f"reward_model_epochs_{epochs}", train_data=str(data),
            epochs=float(epochs),
        )  # fmt: skip
        scorer = RewardModel.load(out)
        for name, rows in ((TRAIN, rankings), (HELD_OUT, held_out)):
            report = reward_report(scorer, rows, sensitivity_pairs=0)
            yield Row(name, report["accuracy"], epochs, *report["accuracy_ci"], report["prompts"], ACCURACY)
            yield Row(name, report["calibration"]["nll"], epochs, n=report["prompts"], panel=LOSS)


def curve(rows: Sequence[Row], series: str, panel: str) -> list[float]:
    """Return the values of a series, from the fewest epochs to the most."""
    return [row.value for row in sorted(rows, key=lambda row: row.x or 0) if (row.series, row.panel) == (series, panel)]


def no_better(rows: Sequence[Row]) -> float:
    first, *others = curve(rows, HELD_OUT, ACCURACY)
    return 0.01 - (max(others) - first)


def loss_rises(rows: Sequence[Row]) -> float:
    values = curve(rows, HELD_OUT, LOSS)
    return values[-1] - values[0]


def gap_widens(rows: Sequence[Row]) -> float:
    train, held_out = (curve(rows, series, ACCURACY) for series in (TRAIN, HELD_OUT))
    return (train[-1] - held_out[-1]) - (train[0] - held_out[0])


STUDY = Study(
    name="epochs",
    number=12,
    title="One epoch is enough for a reward model",
    claim="Several epochs quickly overfit a reward model, and its validation loss gets obviously worse; one is enough.",
    source="Ouyang et al. 2022, appendix C.2",
    miniature="Reward models of 600 toy prompts, trained for 1, 2 and 4 epochs.",
    panels=[
        Panel(ACCURACY, "epochs", "accuracy on labels", "log"),
        Panel(LOSS, "epochs", "loss per pair, nats", "log"),
    ],
    checks=[
        Check("more epochs add less than a point, held out", no_better),
        Check("the held-out loss rises", loss_rises),
        Check("accuracy on training prompts runs ahead", gap_widens),
    ],
    run=run,
)

if __name__ == "__main__":
    configs.run(lambda argv: main(STUDY, EpochsConfig, __file__, argv))
