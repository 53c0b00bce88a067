"""Reward models, and every other source of a score.

`trainer` trains one on rankings: `config` has the settings, `encoding` makes batches, `model` what is trained, `losses`
the formulas, `best` keeps the best weights, `preflight` checks before the first step. `scoring` scores with a reward
model, `ensemble` with several, `averaging` joins their weights; `server`, `scoring_queue` and `client` score over
HTTP. `steps` reads solutions with labelled steps, `process_trainer` trains on them, `process` scores with what came
out. `labelled_texts` reads texts with a label per category, `moderation_trainer` trains on them, `moderation` gives
verdicts with calibrated `thresholds`, `guards` asks others' guards, `filtering` divides data by either, `talks` finds
the conversations of a row, and `words` is the bag of words that they must beat. `functions`, `rules` and `grader` score
without a model. `best_of_n` chooses among responses, and `card` says how good a model is.

Names below are imported when first used, so ``import reward_models`` stays fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import rlhf  # before the libraries that the modules below import: it keeps some of them quiet

_PUBLIC = {
    "ModerationConfig": "reward_models.config",
    "ModerationModel": "reward_models.moderation",
    "ModerationTrainer": "reward_models.moderation_trainer",
    "ProcessConfig": "reward_models.config",
    "ProcessModel": "reward_models.process",
    "ProcessTrainer": "reward_models.process_trainer",
    "RewardClient": "reward_models.client",
    "RewardConfig": "reward_models.config",
    "RewardEnsemble": "reward_models.ensemble",
    "RewardTrainer": "reward_models.trainer",
    "RewardModel": "reward_models.scoring",
}

__all__ = [
    "ModerationConfig", "ModerationModel", "ModerationTrainer", "ProcessConfig", "ProcessModel", "ProcessTrainer",
    "RewardClient", "RewardConfig", "RewardEnsemble", "RewardModel", "RewardTrainer",
]  # fmt: skip

if TYPE_CHECKING:
    from reward_models.client import RewardClient
    from reward_models.config import ModerationConfig, ProcessConfig, RewardConfig
    from reward_models.ensemble import RewardEnsemble
    from reward_models.moderation import ModerationModel
    from reward_models.moderation_trainer import ModerationTrainer
    from reward_models.process import ProcessModel
    from reward_models.process_trainer import ProcessTrainer
    from reward_models.scoring import RewardModel
    from reward_models.trainer import RewardTrainer


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    if name in set(rlhf.__all__) - {"__version__"}:  # not an AttributeError: `from ... import` would drop its message
        raise ImportError(f"{name} is not in reward_models: from rlhf import {name}", name="reward_models")
    raise AttributeError(f"module 'reward_models' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
