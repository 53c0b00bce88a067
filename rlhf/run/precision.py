"""The precision of matrix products: bfloat16 where the hardware multiplies it several times faster than float32.

One rule for every stage: fine-tuning, reward models, PPO, evaluation and scoring. `bf16: null` means bfloat16 on such
hardware and float32 elsewhere. Trained weights, Adam's moments, log-softmax, losses and values are always float32.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("rlhf")


def bf16_hardware() -> str | None:
    """Return the name of the GPU, or of the CPU's instructions, that make bfloat16 products fast here; None if they are
    not fast."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name() if torch.cuda.is_bf16_supported(including_emulation=False) else None
    capabilities = torch.cpu.get_capabilities()
    return next((name for name in ("amx_bf16", "avx512_bf16", "sve_bf16") if capabilities.get(name)), None)


def compute_dtype(setting: bool | None) -> torch.dtype:
    """Return the dtype of matrix products: by `setting`, or with None the dtype that is fast here."""
    import torch

    fast = bf16_hardware() is not None if setting is None else setting
    return torch.bfloat16 if fast else torch.float32


def explained() -> str:
    """Describe the choice that `bf16: null` makes here."""
    hardware = bf16_hardware()
    return f"bfloat16 autocast ({hardware}); bf16: false computes in float32" if hardware else "float32"


def log_choice(setting: bool | None) -> None:
    """Log the choice, if the setting is None."""
    if setting is None:
        logger.info("precision: %s", explained())
