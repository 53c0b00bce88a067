"""transformers callbacks that every trainer of ours gets: whole checkpoints, metrics.jsonl, a progress bar.

They are kept apart from checkpoint.py, metrics.py and console.py so that those import without transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, TrainerCallback
from transformers import ProgressCallback as TqdmCallback

from rlhf import checkpoint, console, metrics


def attach(trainer: Any, stage: str, numbers: Sequence[str], folder: str | Path) -> None:
    """Give a trainer ours in place of what it has: a bar, ``folder/metrics.jsonl``, whole checkpoints."""
    for older in (PrinterCallback, TqdmCallback, MarkComplete, JsonlCallback, ProgressCallback):
        trainer.remove_callback(older)
    trainer.add_callback(MarkComplete)
    trainer.add_callback(JsonlCallback(Path(folder) / "metrics.jsonl"))
    trainer.add_callback(ProgressCallback(stage, numbers))


class MarkComplete(TrainerCallback):
    """Mark transformers' checkpoint-N complete once it is on disk: a killed save leaves none marked."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            checkpoint.mark_complete(folder)


class JsonlCallback(TrainerCallback):
    """Append every log to ``path`` as a line ``{"step": ., "<metric>": .}``.

    A run that goes on at step s first cuts what the killed run had logged after s.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            metrics.truncate(self.path, state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            numbers = metrics.from_logs(logs or {})
            if numbers:
                metrics.append_metrics(self.path, state.global_step, numbers)


class ProgressCallback(TrainerCallback):
    """One bar for a stage, with the numbers that matter; off a terminal, a line every ``every`` seconds."""

    def __init__(self, stage: str, numbers: Sequence[str] = ("loss",), every: float = 15.0) -> None:
        self.stage, self.names, self.every = stage, tuple(numbers), every
        self.bar: console.StageBar | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.bar = console.StageBar(self.stage, state.max_steps, state.global_step, self.every)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar:
            self.bar.update(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.bar:
            numbers = metrics.from_logs(logs or {})
            self.bar.show({name: numbers[name] for name in self.names if name in numbers})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar:
            self.bar.close()
            self.bar = None
