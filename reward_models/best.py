"""Keep the weights that had the lowest held-out loss, so that a training run ends with them, even if interrupted."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlhf.run import distributed

BEST_FILE = "best.safetensors"


@dataclass(frozen=True)
class Best:
    """The step with the lowest held-out loss so far."""

    step: int
    eval_loss: float


class KeepBest(TrainerCallback):
    """A callback that writes the trained weights to `best.safetensors` after every evaluation with a new lowest loss.

    The file is replaced whole, so a killed run leaves either the old file or the new one. A run that resumes from a
    checkpoint may find a file from a later step. It stays, since the resumed run reaches the same weights at that step.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / BEST_FILE

    def read(self) -> Best | None:
        """Return the step and loss of the saved weights, or None where there are none."""
        if not self.path.is_file():
            return None
        with safe_open(self.path, framework="pt") as file:
            written = file.metadata()
        return Best(int(written["step"]), float(written["eval_loss"]))

    def load_into(self, model: nn.Module) -> None:
        """Load the best weights into the model, in place."""
        distributed.load_trained(model, load_file(self.path))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and state.global_step == 0:
            drop_best(self.path.parent)  # left by an earlier run

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        loss = kwargs["metrics"].get("eval_loss")
        if loss is not None:
            self.keep(kwargs["model"], state, loss)

    def keep(self, model: nn.Module, state: TrainerState, loss: float) -> None:
        """Write the weights that are trained, where their loss (or what else is to be small) is the lowest so far.

        Called by every process: the parts of a sharded model are gathered."""
        best = self.read() if state.is_world_process_zero else None
        lowest = state.is_world_process_zero and (best is None or loss < best.eval_loss)
        if not lowest and not distributed.is_sharded(model):
            return
        trained = distributed.trained(model)
        if not lowest:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        writing = self.path.with_name(f".{BEST_FILE}.tmp")
        save_file(
            {name: weight.contiguous() for name, weight in trained.items()},
            writing,
            metadata={"step": str(state.global_step), "eval_loss": repr(float(loss))},
        )
        with writing.open("rb") as file:
            os.fsync(file.fileno())
        writing.replace(self.path)


def drop_best(folder: str | Path) -> None:
    """Delete `best.safetensors` after a finished run: its model holds these weights."""
    for name in (BEST_FILE, f".{BEST_FILE}.tmp"):
        (Path(folder) / name).unlink(missing_ok=True)
