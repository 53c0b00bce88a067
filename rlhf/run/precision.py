"""The precision of matrix products: bfloat16 where the hardware multiplies it several times faster than float32.

One rule for every stage: fine-tuning, reward models, PPO, evaluation and scoring. `bf16: null` asks the hardware; true
and false decide. Trained weights, Adam's moments, log-softmax, losses and values are float32 either way.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("rlhf")


def bf16_hardware() -> str | None:
    """Name what makes bfloat16 products fast here: a GPU, or a CPU's instructions; None where nothing does."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name() if torch.cuda.is_bf16_supported(including_emulation=False) else None
    capabilities = torch.cpu.get_capabilities()
    return next((name for name in ("amx_bf16", "avx512_bf16", "sve_bf16") if capabilities.get(name)), None)


def compute_dtype(setting: bool | None) -> torch.dtype:
    """Return what matrix products are computed in: as `setting` says, else (None) what is fast here."""
    import torch

    fast = bf16_hardware() is not None if setting is None else setting
    return torch.bfloat16 if fast else torch.float32


def explained() -> str:
    """Say in words what is chosen without a setting."""
    hardware = bf16_hardware()
    return f"bfloat16 autocast ({hardware}); bf16: false computes in float32" if hardware else "float32"


def log_choice(setting: bool | None) -> None:
    """Log what was chosen where the setting leaves it open."""
    if setting is None:
        logger.info("precision: %s", explained())
