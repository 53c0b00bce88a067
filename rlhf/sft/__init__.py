"""Supervised fine-tuning: the policy learns to write the demonstrations' responses.

`data` encodes the demonstrations, `trainer` trains on them with trl's trainer, `model` prepares the policy (chat
tokens, dropout, adapter), `config` has the settings and `preflight` the checks before the first step.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf.sft.config import SFTConfig
    from rlhf.sft.trainer import SFTTrainer

__all__ = ["SFTConfig", "SFTTrainer"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("rlhf.sft.config" if name == "SFTConfig" else "rlhf.sft.trainer"), name)
    raise AttributeError(f"module 'rlhf.sft' has no attribute {name!r}")
