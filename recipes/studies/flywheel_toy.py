"""Study 13: three rounds of labelling and training against one with as many labels; active against random choice.

python recipes/studies/flywheel_toy.py
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf import config as configs
from rlhf.errors import InputError
from rlhf.rows.records import read_rankings
from rlhf_recipes.flywheel import FlywheelConfig, RoundsConfig, flywheel
from rlhf_recipes.stage import SECTIONS
from rlhf_recipes.studies.shared_runs import chain
from rlhf_recipes.studies.study import Check, Panel, Row, Study, StudyConfig, at, main

ROUNDS, ONE_SHOT, ACTIVE = "rounds", "one shot", "rounds, active choice"
CHOICES = ("random choice", "active choice")
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

    @property
    def turn(self) -> dict[str, Any]:
        """Return the flywheel's settings with random choice."""
        return {"rounds": self.rounds, "items": self.items}

    @property
    def active(self) -> dict[str, Any]:
        """Return those with active choice."""
        return self.turn | {"choose": self.choose, "pool": self.pool}

    def check(self) -> None:
        RoundsConfig(**self.active)


def rounds(config: FlywheelStudyConfig, name: str, **settings: Any) -> dict[str, Any]:
    """Run the flywheel over the seed's data, base and SFT model; the content of flywheel.json."""
    run = config.shared / f"flywheel_{name}"
    for made in ("data", "base", "sft"):
        if not (run / made).is_dir():
            shutil.copytree(config.shared / made, run / f".{made}")
            (run / f".{made}").rename(run / made)  # whole or not at all
    argv = ["--config", config.chain, "--seed", str(config.seed), "--output_dir", str(run), *config.chain_flags]
    own = configs.load(FlywheelConfig, argv, known_sections=SECTIONS)
    prompts = str(config.shared / "rankings" / "prompts.jsonl")  # none of which is among the held-out rankings
    return flywheel(
        replace(
            own, flywheel=RoundsConfig(**settings), data=replace(own.data, prompts=prompts),
            ppo=replace(own.ppo, updates=config.updates, rollout_size=config.rollout_size, save_steps=0),
            evaluation=replace(own.evaluation, max_prompts=config.max_prompts, best_of=0),
        )
    )  # fmt: skip


def by_labels(result: Mapping[str, Any], config: FlywheelStudyConfig, name: str) -> Iterator[tuple[int, Any]]:
    """Yield a flywheel's rounds, each with the labels asked for so far; a few items with too few responses got none."""
    items = config.rounds * config.items if name == "one_shot" else config.items
    for number, row in enumerate(result["rounds"], 1):
        yield number * items, row


def accuracies(config: FlywheelStudyConfig, name: str, result: Mapping[str, Any]) -> Iterator[Row]:
    """Measure every round's reward model on the chain's held-out rankings, which are of prompts drawn at random."""
    from reward_models import RewardModel
    from reward_models.card.report import report_card

    held_out = read_rankings(config.shared / "rankings" / "held_out.jsonl")
    for labels, row in by_labels(result, config, name):
        folder = config.shared / f"flywheel_{name}" / row["folder"] / "reward_model"
        card = report_card(RewardModel.load(folder), held_out, seed=config.seed)
        series = {"random": CHOICES[0], "active": CHOICES[1], "one_shot": ONE_SHOT}[name]
        yield Row(series, card["accuracy"], labels, *card["accuracy_ci"], card["n"], ACCURACY)


def run(config: FlywheelStudyConfig) -> Iterator[Row]:
    labels = config.rounds * config.items
    chain(config, "rankings")
    for series, name, settings in (
        (ROUNDS, "random", config.turn),
        (ONE_SHOT, "one_shot", {"rounds": 1, "items": labels}),
        (ACTIVE, "active", config.active),
    ):
        result = rounds(config, name, **settings)
        passed = [row for row in result["rounds"] if row["passed"]]
        for so_far, row in by_labels(result, config, name):
            entry = row["entry"]
            yield Row(series, entry["gold_score"], so_far, *entry["gold_score_ci"], entry["prompts"], GOLD)
        if passed:  # else nothing has taken the SFT model's place
            best = passed[-1]["entry"]
            yield Row(series, best["gold_score"], None, *best["gold_score_ci"], best["prompts"], BEST)
        yield from accuracies(config, name, result)


def last(rows: Sequence[Row], series: str, panel: str) -> float:
    """Return a curve's value at its most labels."""
    return at(rows, series, max(row.x for row in rows if row.series == series and row.x is not None), panel)


def needed(rows: Sequence[Row], series: str, accuracy: float) -> float:
    """Return the labels with which a curve of accuracy, straight between its points, first reaches an accuracy."""
    curve = sorted((row.x, row.value) for row in rows if (row.series, row.panel) == (series, ACCURACY) and row.x)
    before, least = curve[0]
    for labels, value in curve:
        if value >= accuracy:
            return labels if value <= least else before + (labels - before) * (accuracy - least) / (value - least)
        before, least = labels, value
    raise InputError(f"rows.jsonl: {series!r} never reaches an accuracy of {accuracy}")


def saved(rows: Sequence[Row]) -> float:
    """Return the share of labels that active choice saves for the highest accuracy that both choices reach."""
    highest = [max(row.value for row in rows if (row.series, row.panel) == (series, ACCURACY)) for series in CHOICES]
    random, active = (needed(rows, series, min(highest)) for series in CHOICES)
    return 1 - active / random


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
        Check("share of labels that active choice saves at the same accuracy", saved),
    ],
)

if __name__ == "__main__":
    configs.run(lambda argv: main(STUDY, FlywheelStudyConfig, __file__, argv))
