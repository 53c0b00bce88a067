"""PPO and best-of-n against a weak reward model, the proxy, while gold watches: what studies 4, 5 and 6 share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.intervals import Estimate, bootstrap_interval
from rlhf.rows.jsonl import read_rows
from rlhf.rows.records import read_rankings, write_jsonl
from rlhf_recipes.ppo import PPORecipe, ppo
from rlhf_recipes.reward_model import RewardRecipe, reward_model
from rlhf_recipes.studies.shared_runs import WATCHED, chain, stage
from rlhf_recipes.studies.study import StudyConfig

GRID = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""KL, in nats per response, at which the runs of all seeds are read."""
ANOTHER = 1000
"""Added to a seed for another run of the same setting."""


@dataclass(frozen=True, kw_only=True)
class ProxyConfig(StudyConfig):
    """Settings of the runs that the studies of over-optimisation share; they must be the same in all of them."""

    proxy_prompts: int = 120
    """Ranked prompts of the proxy reward model."""
    updates: int = 32
    """Updates of every PPO run, at a constant learning rate."""


def proxy(config: ProxyConfig) -> Path:
    """Train the proxy on prompts that the chain's reward model never saw (those held out for it); its folder."""
    folder = chain(config, "reward_model")
    rankings = read_rankings(folder / "rankings/held_out.jsonl")
    files = folder / "proxy_train.jsonl", folder / "proxy_held_out.jsonl"
    for file, part in zip(files, (rankings[: config.proxy_prompts], rankings[config.proxy_prompts :]), strict=True):
        write_jsonl(file, part)
    train, held_out = map(str, files)
    return stage(
        config, reward_model, RewardRecipe, "reward_model", "proxy", train_data=train, eval_data=held_out, save_steps=0
    )


def policy(config: ProxyConfig, kl_coef: float, another: bool = False) -> Path:
    """Train a policy against the proxy with such a coefficient of KL, every response of every update kept; its folder.
    another: with another seed than the other runs'.

    The learning rate is constant, so that a run that stops earlier is the beginning of this one."""
    return stage(
        config, ppo, PPORecipe, "ppo", f"ppo_proxy_{kl_coef}{'_again' if another else ''}",
        reward_model=str(proxy(config)), kl_coef=kl_coef, updates=config.updates, lr_schedule="constant",
        samples_logged=10**6, seed=config.seed + (ANOTHER if another else 0), **WATCHED,
    )  # fmt: skip


def samples(folder: Path) -> list[list[dict[str, Any]]]:
    """Return the responses of every update of a PPO run."""
    by_update: dict[int, list[dict[str, Any]]] = {}
    for _, row in read_rows(folder / "samples.jsonl"):
        by_update.setdefault(row["step"], []).append(row)
    return [by_update[step] for step in sorted(by_update)]


def at_grid(updates: Sequence[Sequence[float]], kl: Sequence[float], seed: int = 0) -> dict[float, Estimate]:
    """Read a measure of a run at the KL of the grid that it reached.

    updates: its values by update and response. kl: the mean KL of each update; it may fall for a moment, and each
    update counts at the most that was reached by then. Means and bounds are interpolated over the root of the KL."""
    found = [bootstrap_interval(np.asarray(values, dtype=np.float64), seed) for values in updates]
    reached = np.sqrt(np.maximum.accumulate(np.maximum(np.asarray(kl, dtype=np.float64), 0.0)))
    within = [point for point in GRID if point**0.5 <= reached[-1]]
    columns = [[getattr(estimate, name) for estimate in found] for name in Estimate._fields]
    return {point: Estimate(*(float(np.interp(point**0.5, reached, column)) for column in columns)) for point in within}


def kl_of(updates: Sequence[Sequence[dict[str, Any]]]) -> list[float]:
    """Return the mean KL of every update."""
    return [float(np.mean([row["kl_nats"] for row in rows])) for rows in updates]
