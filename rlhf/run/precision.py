"""Which precision PPO computes in: bfloat16 where the hardware multiplies it several times faster than float32."""

from __future__ import annotations

import torch


def bf16_hardware() -> str | None:
    """What makes bfloat16 matrix products fast here: a GPU's name, or a CPU's instructions; None where nothing does."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name() if torch.cuda.is_bf16_supported(including_emulation=False) else None
    capabilities = torch.cpu.get_capabilities()
    return next((name for name in ("amx_bf16", "avx512_bf16", "sve_bf16") if capabilities.get(name)), None)


def ppo_dtype(setting: bool | None) -> torch.dtype:
    """What PPO's matrix products are computed in; as the user said, else (None) what is fast here.

    Weights that are trained, Adam's moments, log-softmax, values and everything after them are float32 either way.
    """
    fast = bf16_hardware() is not None if setting is None else setting
    return torch.bfloat16 if fast else torch.float32


def explained() -> str:
    """What is chosen without a setting, for the log."""
    hardware = bf16_hardware()
    return f"bfloat16 autocast ({hardware}); bf16: false computes in float32" if hardware else "float32"


def use_bf16(setting: bool | str | None) -> bool:
    """True or False as the user said; "auto" or None: where CUDA supports it."""
    import torch

    if setting in (None, "auto"):
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return bool(setting)


def compute_dtype(setting: bool | str | None) -> torch.dtype:
    """bfloat16 or float32, by `use_bf16`."""
    import torch

    return torch.bfloat16 if use_bf16(setting) else torch.float32


def default_dtype() -> torch.dtype:
    """bfloat16 on a GPU that has it, else float32."""
    return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32
