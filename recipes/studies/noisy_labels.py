"""Study 11: where a quarter of the labels is wrong, ensembles and averaged weights hold off over-optimisation.

python recipes/studies/noisy_labels.py
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlhf import config as configs
from rlhf.intervals import bootstrap_interval
from rlhf.rows.records import Ranking, read_rankings, write_jsonl
from rlhf_recipes.ensemble import EnsembleConfig, ensemble
from rlhf_recipes.ppo import PPORecipe, ppo
from rlhf_recipes.reward_model import RewardRecipe, reward_model
from rlhf_recipes.studies.proxy_runs import at_grid, kl_of, samples
from rlhf_recipes.studies.shared_runs import WATCHED, chain, stage
from rlhf_recipes.studies.study import Check, Panel, Row, Study, StudyConfig, at, main

SINGLE = "single model"
RULES = {"mean": "mean", "min": "minimum", "mean_minus_std": "mean less spread", "average": "averaged weights (WARM)"}
CURVE, EQUAL, END = "gold", "equal", "end"
LAST = 3
"""Updates at the end of a run over which the end is measured."""


@dataclass(frozen=True, kw_only=True)
class NoisyConfig(StudyConfig):
    """Settings of the study."""

    flipped: float = 0.25
    """Share of the labelled pairs whose label is turned round."""
    prompts: int = 1000
    """Ranked prompts, each with two pairs of its four responses."""
    members: int = 4
    """Reward models of an ensemble: one head to begin with, as averaging needs, and orders of the data of their own."""
    kl_coef: float = 0.01
    """Weight of the KL penalty: low, so that a policy goes far."""
    updates: int = 20
    """PPO's updates."""
    rollout_size: int = 128
    """Responses per update."""
    minibatch_size: int = 32
    """Responses per optimizer step."""


def flipped_pairs(rankings: Sequence[Ranking], share: float, seed: int) -> list[dict[str, object]]:
    """Return each ranking's responses as pairs, of which `share` have their label turned round; a tie stays one."""
    draw, rows = random.Random(seed), []
    for ranking in rankings:
        for first in range(0, len(ranking.responses) - 1, 2):
            ranks = ranking.ranks[first : first + 2]
            turned = ranks[::-1] if draw.random() < share else ranks
            responses = ranking.responses[first : first + 2]
            rows.append({"prompt": ranking.prompt, "responses": list(responses), "ranks": list(turned)})
    return rows


def scorers(config: NoisyConfig) -> dict[str, Path]:
    """Train the members on the same noisy pairs and join them by every rule; the folders."""
    shared = chain(config, "rankings")
    rankings, data = read_rankings(shared / "rankings/train.jsonl")[: config.prompts], shared / "noisy.jsonl"
    write_jsonl(data, flipped_pairs(rankings, config.flipped, config.seed))
    members = [
        stage(
            config, reward_model, RewardRecipe, "reward_model", f"noisy_{number}", train_data=str(data),
            prompts_per_batch=8, save_steps=0, seed=100 * config.seed + number, init_seed=config.seed,
        )
        for number in range(config.members)
    ]  # fmt: skip
    found = {SINGLE: members[0]}
    for rule, name in RULES.items():
        out = shared / f"noisy_{rule}"
        ensemble(
            EnsembleConfig(
                members=[*map(str, members)], data=str(data), rule=rule, output_dir=str(out),  # type: ignore[arg-type]
                seed=config.seed, bf16=False,
            )
        )  # fmt: skip
        found[name] = out
    return found


def run(config: NoisyConfig) -> Iterator[Row]:
    curves, ends = {}, {}
    for name, scorer in scorers(config).items():
        folder = stage(
            config, ppo, PPORecipe, "ppo", f"ppo_{scorer.name}", reward_model=str(scorer), kl_coef=config.kl_coef,
            updates=config.updates, rollout_size=config.rollout_size, minibatch_size=config.minibatch_size,
            lr_schedule="constant", save_steps=0, samples_logged=10**6, **WATCHED,
        )  # fmt: skip
        updates = samples(folder)
        gold = [[row["score/gold"] for row in rows] for rows in updates]
        curves[name] = at_grid(gold, kl_of(updates))
        ends[name] = [value for values in gold[-LAST:] for value in values]
        for x, found in curves[name].items():
            yield Row(name, found.value, x, found.low, found.high, config.rollout_size, CURVE)
    furthest = max(set.intersection(*(set(curve) for curve in curves.values())))
    for name, curve in curves.items():
        found = curve[furthest]
        yield Row(name, found.value, None, found.low, found.high, config.rollout_size, EQUAL)
        end = bootstrap_interval(np.asarray(ends[name], dtype=np.float64), config.seed)
        yield Row(name, end.value, None, end.low, end.high, len(ends[name]), END)


def gain(rows: Sequence[Row], names: Sequence[str], panel: str) -> float:
    """Return the mean of these less the single model's value."""
    return float(np.mean([at(rows, name, panel=panel) for name in names])) - at(rows, SINGLE, panel=panel)


ENSEMBLES = ("mean", "minimum", "mean less spread")
WARM = RULES["average"]
STUDY = Study(
    name="noisy_labels",
    number=11,
    title="Ensembles and averaged weights against label noise",
    claim="With a quarter of the labels wrong, ensembles of reward models and averaged weights over-optimise less than "
    "a single model.",
    source="Coste et al. 2310.02743; Rame et al. 2401.12187 (WARM)",
    miniature="Four reward models learn from the same pairs in unlike order, a quarter of them turned round; PPO "
    "against one of them, their ensembles and their averaged weights, with a low KL penalty; gold only watches.",
    panels=[
        Panel(CURVE, "KL to SFT, nats (root scale)", "gold score", "sqrt"),
        Panel(EQUAL, y="gold score at the largest KL that all reached"),
        Panel(END, y="gold score at the end"),
    ],
    run=run,
    checks=[
        Check("ensembles above a single model at equal KL", lambda rows: gain(rows, ENSEMBLES, EQUAL)),
        Check("ensembles above a single model at the end", lambda rows: gain(rows, ENSEMBLES, END)),
        Check("averaged weights above a single model at equal KL", lambda rows: gain(rows, [WARM], EQUAL)),
        Check("averaged weights above a single model at the end", lambda rows: gain(rows, [WARM], END)),
    ],
)

if __name__ == "__main__":
    configs.run(lambda argv: main(STUDY, NoisyConfig, __file__, argv))
