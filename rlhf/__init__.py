"""Post-training from human preferences: supervised fine-tuning, reward models, PPO.

One word for one thing, in code, flags, logs and documentation:

* policy, reference, value model, reward model: the four models of RLHF.
* prompt, response: what comes in and what the policy writes. Dataset columns keep trl's names
  (prompt, completion, chosen, rejected, messages).
* score ``[B]``: what a reward model or function says of a whole response.
* reward ``[B, T]``: what PPO maximises per token: ``-kl_coef * KL``, plus the score at the last token.
* rollout: prompts, responses and everything collected on them.
* mask: True on real tokens, always.

Names below are imported when first used, so ``import rlhf`` stays fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"


class InputError(ValueError):
    """A mistake in what the user handed in, told in one line: where, what was seen, what to do.

    Recipes print it without a traceback and exit with code 2.
    """


class RunStopped(RuntimeError):
    """A run that ended before its end for a reason that it names in one line; what is on disk is whole.

    Recipes print it without a traceback and exit with code 1; the same command goes on from the last checkpoint.
    """


_PUBLIC = {
    "SFTConfig": "rlhf.sft_config",
    "SFTTrainer": "rlhf.sft",
    "PPOConfig": "rlhf.ppo_config",
    "PPOTrainer": "rlhf.ppo",
    "Prompt": "rlhf.records",
    "Demonstration": "rlhf.records",
    "Ranking": "rlhf.records",
    "StepLabels": "rlhf.records",
    "read_prompts": "rlhf.records",
    "read_demonstrations": "rlhf.records",
    "read_rankings": "rlhf.records",
}

__all__ = [
    "Demonstration",
    "InputError",
    "PPOConfig",
    "PPOTrainer",
    "Prompt",
    "Ranking",
    "RunStopped",
    "SFTConfig",
    "SFTTrainer",
    "StepLabels",
    "__version__",
    "read_demonstrations",
    "read_prompts",
    "read_rankings",
]

if TYPE_CHECKING:
    from rlhf.ppo import PPOTrainer
    from rlhf.ppo_config import PPOConfig
    from rlhf.records import (
        Demonstration,
        Prompt,
        Ranking,
        StepLabels,
        read_demonstrations,
        read_prompts,
        read_rankings,
    )
    from rlhf.sft import SFTTrainer
    from rlhf.sft_config import SFTConfig


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'rlhf' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
