"""Post-training from human preferences: supervised fine-tuning, reward models, PPO.

One word for one thing, in code, flags, logs and documentation:

* policy, reference, value model, reward model: the four models of RLHF.
* prompt, response: what comes in and what the policy writes. Dataset columns keep trl's names
  (prompt, completion, chosen, rejected, messages).
* score ``[B]``: the number that a reward model or function gives to a whole response.
* reward ``[B, T]``: the number per token that PPO maximises: ``-kl_coef * KL``, plus the score at the last token.
* rollout: prompts, responses and everything collected on them.
* mask: True on real tokens, always.

Names below are imported when first used, so ``import rlhf`` stays fast.
"""

from __future__ import annotations

import logging
import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from rlhf import moved
from rlhf.errors import InputError, RunStopped

__version__ = "0.1.0"

moved.install()

# peft imports bitsandbytes, which warns at every start on some CPUs that it has no kernel for 4-bit weights.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
warnings.filterwarnings(
    "ignore", "IProgress not found"
)  # tqdm, in a notebook without ipywidgets; its bars are text then

_PUBLIC = {
    "SFTConfig": "rlhf.sft.config",
    "SFTTrainer": "rlhf.sft.trainer",
    "PPOConfig": "rlhf.ppo.config",
    "PPOTrainer": "rlhf.ppo.trainer",
    "Prompt": "rlhf.rows.records",
    "Demonstration": "rlhf.rows.records",
    "Ranking": "rlhf.rows.records",
    "StepLabels": "rlhf.rows.records",
    "read_prompts": "rlhf.rows.records",
    "read_demonstrations": "rlhf.rows.records",
    "read_rankings": "rlhf.rows.records",
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
    from rlhf.ppo.config import PPOConfig
    from rlhf.ppo.trainer import PPOTrainer
    from rlhf.rows.records import (
        Demonstration,
        Prompt,
        Ranking,
        StepLabels,
        read_demonstrations,
        read_prompts,
        read_rankings,
    )
    from rlhf.sft.config import SFTConfig
    from rlhf.sft.trainer import SFTTrainer


_ELSEWHERE = {
    "reward_models": ("RewardTrainer", "RewardConfig", "RewardModel", "RewardClient"),
    "trl": (
        "DPOTrainer",
        "DPOConfig",
        "KTOTrainer",
        "KTOConfig",
        "GRPOTrainer",
        "GRPOConfig",
        "RLOOTrainer",
        "RLOOConfig",
    ),
    "transformers": ("Trainer", "TrainingArguments", "TrainerCallback", "AutoTokenizer", "AutoModelForCausalLM"),
    "peft": ("LoraConfig", "PeftModel", "get_peft_model"),
}
"""Package -> names that people look for here."""


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    for package, names in _ELSEWHERE.items():
        if name in names:  # not an AttributeError: `from rlhf import ...` would drop its message
            raise ImportError(f"{name} is not in rlhf: from {package} import {name}", name="rlhf")
    raise AttributeError(f"module 'rlhf' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
