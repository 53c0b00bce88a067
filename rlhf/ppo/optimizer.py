"""PPO's optimizer: AdamW over policy and value model, each at its own learning rate."""

from __future__ import annotations

import torch

from rlhf.ppo.actor_critic import ActorCritic
from rlhf.ppo.config import PPOConfig


def build(actor_critic: ActorCritic, args: PPOConfig) -> torch.optim.Optimizer:
    """Two groups: what the policy trains, and what the value model does."""
    groups = [
        {"params": actor_critic.policy_parameters(), "lr": args.learning_rate},
        {"params": actor_critic.value_parameters(), "lr": args.value_lr},
    ]
    betas = (args.adam_beta1, args.adam_beta2)
    fused = all(p.device.type in ("cpu", "cuda") for p in actor_critic.parameters())
    return torch.optim.AdamW(
        groups, betas=betas, eps=args.adam_epsilon, weight_decay=args.weight_decay, fused=fused or None
    )


def set_learning_rates(optimizer: torch.optim.Optimizer, args: PPOConfig, update: int) -> None:
    """Where the schedule has both rates at this update."""
    factor = args.lr_factor(update)
    for group, rate in zip(optimizer.param_groups, (args.learning_rate, args.value_lr), strict=True):
        group["lr"] = rate * factor
