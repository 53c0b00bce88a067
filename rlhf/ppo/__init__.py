"""PPO of a policy against a score: collect -> score -> advantages -> update.

Read `trainer` first: it holds the four stages and calls the formulas of `math` in the order of the papers.
`config` holds the settings, `rollout` the records that pass from stage to stage, `ahead` the sampling of the next
rollout while one trains, `plan` the random choices and the division into minibatches, `actor_critic` the three models
as one module, `build` their construction, `inputs` the user's prompts and tokenizer, `pretraining_mix` the loss on
pretraining data (PPO-ptx), `run` the code around the loop (checkpoints, resuming, SIGTERM), `protocol` the types
between trainer and `run`, `logged` the metrics, `finite` the search for NaN, `saved` and `view` a rollout kept for
inspection, `preflight*` the checks that refuse a wrong run before its first step.
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
