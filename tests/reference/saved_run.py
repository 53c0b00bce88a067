"""A small PPO run that keeps its rollouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reward_models import RewardModel
from rlhf.ppo.trainer import PPOConfig, PPOTrainer

ROWS = [{"prompt": f"Count to {i}" + ", please" * (i % 3), "number": i} for i in range(11)]
SMALL: dict[str, Any] = {
    "updates": 4, "rollout_size": 8, "minibatch_size": 4, "inner_epochs": 2, "max_new_tokens": 7, "bf16": False,
    "learning_rate": 1e-3, "kl_coef": 0.3, "lam": 0.9, "gamma": 0.98, "tokens_per_microbatch": 150, "save_steps": 1,
    "save_rollouts": 2, "normalize_scores": True, "kl_target_nats": 0.5,
}  # fmt: skip


def make(folder: Path, policy, reward, callbacks=None, **changes) -> PPOTrainer:
    config = PPOConfig(**{"output_dir": str(folder)} | SMALL | changes)
    scorer = RewardModel.load(reward, device="cpu")
    return PPOTrainer(policy, scorer, config, ROWS, value_model=str(reward), callbacks=callbacks)
