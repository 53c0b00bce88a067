"""Time a transformers trainer's steps, some of them a turn, and wait after each turn, off the clock.

Only transformers is imported, so that the start-up of whoever uses it is its own.
"""

from __future__ import annotations

import time
from typing import Any

from jobs import wait_for_turn
from transformers import TrainerCallback


class Turns(TrainerCallback):
    """Record the seconds of every turn of `steps` optimizer steps."""

    def __init__(self, steps: int):
        self.steps = steps
        self.seconds: list[float] = []
        self.first_step: float | None = None  # its seconds, compilation and first allocations included

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.first_step is None:
            self.first_step = now() - self._began
        if state.global_step % self.steps == 0:
            self.seconds.append(now() - self._began)
            wait_for_turn()
            self._began = now()


def now() -> float:
    """Return the time, once a GPU has done what it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
