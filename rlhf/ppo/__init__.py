"""PPO of a policy against a score: collect -> score -> advantages -> update.

Read `trainer` first: it holds the four stages, with the formulas of `math` called in the order of the papers.
`config` has the settings, `rollout` the records that pass from stage to stage, `plan` what is random, `actor_critic`
the three models as one module and `build` how they are made, `run` what surrounds the loop (checkpoints, resuming,
SIGTERM), `logged` the metrics, `saved` and `view` a rollout kept for inspection, `preflight` and its checks what
refuses a run before its first step.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf.ppo.config import PPOConfig
    from rlhf.ppo.trainer import PPOTrainer

__all__ = ["PPOConfig", "PPOTrainer"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("rlhf.ppo.config" if name == "PPOConfig" else "rlhf.ppo.trainer"), name)
    raise AttributeError(f"module 'rlhf.ppo' has no attribute {name!r}")
