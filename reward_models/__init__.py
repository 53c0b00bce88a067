"""Reward models, and every other source of a score.

`trainer` trains one on rankings: `config` has the settings, `encoding` makes batches, `model` what is trained, `losses`
the formulas, `best` keeps the best weights, `preflight` checks before the first step. `scoring` scores with a reward
model; `server`, `scoring_queue` and `client` do so over HTTP. `functions`, `rules` and `grader` score without one, and
`card` says how good one is.

Names below are imported when first used, so ``import reward_models`` stays fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import rlhf  # before the libraries that the modules below import: it keeps some of them quiet

_PUBLIC = {
    "RewardClient": "reward_models.client",
    "RewardConfig": "reward_models.config",
    "RewardTrainer": "reward_models.trainer",
    "RewardModel": "reward_models.scoring",
}

__all__ = ["RewardClient", "RewardConfig", "RewardModel", "RewardTrainer"]

if TYPE_CHECKING:
    from reward_models.client import RewardClient
    from reward_models.config import RewardConfig
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
