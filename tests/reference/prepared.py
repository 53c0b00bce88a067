"""PPO's three models as PPOTrainer has them: built, and made fast for the CPU."""

from __future__ import annotations

from typing import Any

from rlhf import cpu
from rlhf.ppo.actor_critic import ActorCritic
from rlhf.ppo.build import build_actor_critic


def prepared_models(*args: Any, **kwargs: Any) -> ActorCritic:
    """`build_actor_critic`, then `rlhf.cpu.prepare`."""
    models = build_actor_critic(*args, **kwargs)
    cpu.prepare(models)
    return models
