"""Study 13: three rounds of labelling and training against one with as many labels; active against random choice.

python recipes/studies/flywheel_toy.py
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf import config as configs
from rlhf.rows.records import read_rankings
from rlhf_recipes.flywheel import FlywheelConfig, RoundsConfig, flywheel
from rlhf_recipes.studies.shared_runs import chain
from rlhf_recipes.studies.study import Check, Panel, Row, Study, StudyConfig, at, main

ROUNDS, ONE_SHOT, ACTIVE = "rounds", "one shot", "rounds, active choice"
GOLD, BEST, ACCURACY = "gold", "best", "accuracy"


@dataclass(frozen=True, kw_only=True)
class FlywheelStudyConfig(StudyConfig):
    """Settings of the study."""

    rounds: int = 3
    """Rounds."""
    items: int = 200
    """Labelled items of a round; one shot labels as many as all rounds together."""
    pool: int = 4
    """Items sampled for each that active choice takes."""
    choose: str = "closeness"
    """How active choice chooses."""
    updates: int = 10
    """PPO's updates in a round, each from the SFT model anew."""
    rollout_size: int = 128
    """Responses per update."""
    max_prompts: int = 200
    """Held-out prompts of a round's evaluation."""


def rounds(config: FlywheelStudyConfig, name: str, **settings: Any) -> dict[str, Any]:
    """Run the flywheel over the seed's data, base and SFT model; the content of flywheel.json."""
    run = config.shared / f"flywheel_{name}"
    for made in ("data", "base", "sft"):
        if not (run / made).is_dir():
            shutil.copytree(config.shared / made, run / f".{made}")
            (run / f".{made}").rename(run / made)  # whole or not at all
    argv = ["--config", config.chain, "--seed", str(config.seed), "--output_dir", str(run), *config.chain_flags]
    own = configs.load(FlywheelConfig, argv)
    prompts = str(config.shared / "rankings" / "prompts.jsonl")  # none of which is among the held-out rankings
    return flywheel(
        replace(
            own, flywheel=RoundsConfig(**settings), data=replace(own.data, prompts=prompts),
            ppo=replace(own.ppo, updates=config.updates, rollout_size=config.rollout_size, save_steps=0),
            evaluation=replace(own.evaluation, max_prompts=config.max_prompts, best_of=0),
        )
    )  # fmt: skip


def accuracies(config: FlywheelStudyConfig, name: str, result: Mapping[str, Any]) -> Iterator[Row]:
    """Measure every round's reward model on the chain's held-out rankings, which are of prompts drawn at random."""
    from reward_models import RewardModel
    from reward_models.card.report import report_card

    held_out = read_rankings(config.shared / "rankings" / "held_out.jsonl")
    for row in result["rounds"]:
        folder = config.shared / f"flywheel_{name}" / row["folder"] / "reward_model"
        card = report_card(RewardModel.load(folder), held_out, seed=config.seed)
        series = "active choice" if name == "active" else "random choice"
        yield Row(series, card["accuracy"], row["labels"], *card["accuracy_ci"], card["n"], ACCURACY)


def run(config: FlywheelStudyConfig) -> Iterator[Row]:
    chain(config, "rankings")
    labels = config.rounds * config.items
    turn: dict[str, Any] = {"rounds": config.rounds, "items": config.items}
    active = turn | {"choose": config.choose, "pool": config.pool}
    for series, name, settings in (
        (ROUNDS, "random", turn),
        (ONE_SHOT, "one_shot", {"rounds": 1, "items": labels}),
        (ACTIVE, "active", active),
    ):
        result = rounds(config, name, **settings)
        passed = [row for row in result["rounds"] if row["passed"]]
        for row in result["rounds"]:
            entry = row["entry"]
            yield Row(series, entry["gold_score"], row["labels"], *entry["gold_score_ci"], entry["prompts"], GOLD)
        if passed:  # else nothing has taken the SFT model's place
            best = passed[-1]["entry"]
            yield Row(series, best["gold_score"], None, *best["gold_score_ci"], best["prompts"], BEST)
        if series != ONE_SHOT:
            yield from accuracies(config, name, result)


def last(rows: Sequence[Row], series: str, panel: str) -> float:
    """Return a curve's value at its most labels."""
    return at(rows, series, max(row.x for row in rows if row.series == series and row.x is not None), panel)


STUDY = Study(
    name="flywheel_toy",
    number=13,
    title="Rounds of labelling against one shot, active against random choice",
    claim="Labels of the newest policy's responses, round after round, serve a policy better than as many at once; "
    "items chosen by a model's doubt teach it more than random ones.",
    source="Bai et al. 2022 (HH), section 4.5, for rounds; Lightman et al. 2023, section 4.2, for choice",
    miniature="Three rounds of 200 items of the toy world against one of 600, each ending with PPO from the SFT model; "
    "accuracy is measured on the same random held-out rankings.",
    panels=[
        Panel(GOLD, "labels so far", "gold score of the round's policy"),
        Panel(BEST, y="gold score of the policy that passed the gate last"),
        Panel(ACCURACY, "labels so far", "reward model, held-out accuracy"),
    ],
    run=run,
    checks=[
        Check("rounds above one shot in gold", lambda rows: last(rows, ROUNDS, GOLD) - last(rows, ONE_SHOT, GOLD)),
        Check(
            "active above random choice in held-out accuracy",
            lambda rows: last(rows, "active choice", ACCURACY) - last(rows, "random choice", ACCURACY),
        ),
    ],
)

if __name__ == "__main__":
    configs.run(lambda argv: main(STUDY, FlywheelStudyConfig, __file__, argv))
