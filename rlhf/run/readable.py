"""Check that a checkpoint's small files and states can be read, before a run is built on them.

States are pickles. torch reads them with `weights_only=True`, so a foreign class in one is never made; here it is also
refused in one line. Only the structure is read: the tensors stay on disk.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from rlhf.errors import InputError, reason
from rlhf.rows.jsonl import read_object

BROKEN = (
    RuntimeError, EOFError, OSError, pickle.UnpicklingError, ValueError, LookupError, TypeError, AttributeError
)  # fmt: skip
"""The errors of reading a file that was cut short or holds something else: from torch.load, or from its content."""

NEEDED = {
    "optimizer": ("state", "param_groups"),
    "scheduler": ("last_epoch",),
    "rng_state": ("python", "numpy", "cpu"),
    "ppo": ("random",),
    "trainer_state": ("global_step", "log_history"),
}
"""What a file holds at least, by the beginning of its name."""


def require_readable(checkpoint: str | Path) -> None:
    """Raise InputError, which names the file, where a file in a checkpoint's folder is damaged or something else."""
    for path in sorted(Path(checkpoint).iterdir()):
        if path.suffix in (".pt", ".pth"):
            content = read_state(path)
        elif path.name == "trainer_state.json":
            content = read_object(path)
        else:
            continue
        for start, names in NEEDED.items():
            lacking = [name for name in names if path.stem.startswith(start) and name not in content]
            if lacking:
                raise InputError(f"{path}: holds no {lacking[0]}; it is damaged or of another program")


def read_state(path: str | Path) -> dict[str, Any]:
    """Read the structure of a pickled state: its tensors have shapes and no values."""
    import torch
    from transformers.trainer_pt_utils import safe_globals  # NumPy's arrays, in the random states of its Trainer

    try:
        with safe_globals():
            content = torch.load(path, map_location="meta", weights_only=True)
    except BROKEN as error:
        what = "holds more than tensors and plain values" if "Unsupported" in str(error) else "cut short or no state"
        raise InputError(f"{path}: {what} ({first_sentence(error)}); it is not loaded") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: a dict is needed, it holds a {type(content).__name__}; it is not loaded")
    return content


def first_sentence(error: BaseException) -> str:
    """Return the beginning of a library's message about a broken file."""
    return reason(error).split(". ")[0][:120]
