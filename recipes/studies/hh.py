"""Study 19: reward models of what people found harmless, and PPO against the most accurate of them.

    python recipes/studies/hh.py

Without a hub: --chain_flags '["--data.rankings=hh_harmless.jsonl.gz", "--sft.model=FOLDER"]' --encoder FOLDER
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rlhf import config as configs
from rlhf.rows.jsonl import read_object
from rlhf.run.stages import Manifest
from rlhf_recipes.ensemble import EnsembleConfig, ensemble
from rlhf_recipes.ppo import PPORecipe, ppo
from rlhf_recipes.reward_model import RewardRecipe, reward_model
from rlhf_recipes.stage import SECTIONS
from rlhf_recipes.studies.shared_runs import chain, compared, stage
from rlhf_recipes.studies.study import Check, Panel, Row, Study, StudyConfig, at, main

DECODER, ENCODER, BOTH = "SmolLM2", "MiniLM", "their mean"
WORDS, LENGTH = "bag of words", "better length rule"
RIGHT, WON, MOVED, TOKENS = "", "won", "distance", "length"
ONCE: dict[str, Any] = {"seeds": None, "keep_seeds": False}
"""A reward model per seed of the study, and not the best of several."""


@dataclass(frozen=True, kw_only=True)
class HHConfig(StudyConfig):
    """Settings of the study."""

    small: str = "hh_reward.yaml"
    """Config of the encoder's reward model."""
    encoder: str | None = None
    """The encoder; null: that config's."""
    policy: bool = True
    """Train a policy against the most accurate reward model, too."""

    @property
    def files(self) -> dict[str, str]:
        return {**super().files, "small": self.small}


def models(config: HHConfig) -> dict[str, Path]:
    """Train a reward model on each trunk, on the same rankings of the seed's own split, and join them; the folders."""
    chain(config, "judge" if config.policy else "reward_model", reward_model=ONCE)
    of_decoder = config.shared / "reward_model"
    argv = ["--config", config.small, "--seed", str(config.seed)]
    argv += ["--output_dir", str(config.shared / "reward_model_encoder")]
    own = configs.load(RewardRecipe, argv, section="reward_model", known_sections=SECTIONS)
    reward_model(replace(own, **ONCE, **({"model": config.encoder} if config.encoder else {})))
    of_encoder, both = config.shared / "reward_model_encoder", config.shared / "reward_model_both"
    data, held_out = (str(config.shared / f"rankings/{name}.jsonl") for name in ("train", "held_out"))
    members = [str(of_decoder), str(of_encoder)]
    ensemble(EnsembleConfig(members=members, data=data, eval_data=held_out, output_dir=str(both), seed=config.seed))
    return {DECODER: of_decoder, ENCODER: of_encoder, BOTH: both}


def run(config: HHConfig) -> Iterator[Row]:
    folders = models(config)
    right = {}
    for name in (DECODER, ENCODER):
        own = Manifest.read(folders[name]).outputs
        right[name] = own["accuracy"]
        yield Row(name, own["accuracy"], None, *own["accuracy_ci"], own["n"], RIGHT)
    joined = read_object(folders[BOTH] / "ensemble.json")["metrics"]["accuracy"]
    right[BOTH] = joined["value"]
    yield Row(BOTH, joined["value"], None, joined["low"], joined["high"], joined["n"], RIGHT)
    for name, key in ((WORDS, "bag_of_words_accuracy"), (LENGTH, "length_baseline")):
        yield Row(name, own[key], None, *own[f"{key}_ci"], own["n"], RIGHT)
    if config.policy:
        best = max(right, key=right.__getitem__)
        policy = stage(config, ppo, PPORecipe, "ppo", "ppo_best", reward_model=str(folders[best]))
        entry = read_object(compared(config, "comparison_best", policy=str(policy)) / "evaluation.json")["ppo"]
        yield Row("PPO over SFT", entry["win_rate_vs_sft"], None, *entry["win_rate_ci"], entry["prompts"], WON)
        yield Row("PPO", entry["kl_nats"], n=entry["prompts"], panel=MOVED)
        yield Row("PPO", entry["response_tokens"], n=entry["prompts"], panel=TOKENS)


def above(series: str, other: str, rows: Sequence[Row]) -> float:
    return at(rows, series, panel=RIGHT) - at(rows, other, panel=RIGHT)


def over_chance(series: str, panel: str, rows: Sequence[Row]) -> float:
    return at(rows, series, panel=panel) - 0.5


STUDY = Study(
    name="hh",
    number=19,
    title="What people find harmless, learned from their choices",
    claim="A reward model learns which of two answers people find less harmful, and a policy trained against it is "
    "preferred.",
    source="Bai et al. 2022 (HH), sections 3 and 4",
    miniature="1,648 pairs of harmless-base (of 1,800, up to 1,500 characters), a fifth held out, another for each "
    "seed; SmolLM2-135M after SFT with LoRA and MiniLM on the same pairs, but those of over 256 tokens, which MiniLM "
    "leaves out. A reward model of other pairs judges PPO against the most accurate of both and their mean.",
    panels=[
        Panel(RIGHT, y="right on held-out pairs"),
        Panel(WON, y="preferred by the judge"),
        Panel(MOVED, y="KL to SFT, nats"),
        Panel(TOKENS, y="tokens per response"),
    ],
    checks=[
        *(Check(f"{name} above chance", partial(over_chance, name, RIGHT)) for name in (DECODER, ENCODER, BOTH)),
        *(Check(f"{name} above a bag of words", partial(above, name, WORDS)) for name in (DECODER, ENCODER, BOTH)),
        Check("both together above either", lambda rows: min(above(BOTH, DECODER, rows), above(BOTH, ENCODER, rows))),
        Check("PPO over SFT on more than half", partial(over_chance, "PPO over SFT", WON)),
    ],
    run=run,
)

if __name__ == "__main__":
    configs.run(lambda argv: main(STUDY, HHConfig, __file__, argv))
