"""Resuming and stopping, the same on all processes: the checkpoint to continue from, and the end after SIGTERM."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from rlhf.errors import InputError
from rlhf.run.checkpoint import check_checkpoint, latest_checkpoint

log = logging.getLogger("rlhf")

TERMINATED = 143  # 128 + SIGTERM, the exit code that a shell reports for a process ended by SIGTERM


def resume_point(
    accelerator: Accelerator, folder: str | Path, asked: bool | str | Path | None, settings: Mapping[str, Any]
) -> Path | None:
    """Return the checkpoint to continue from, the same on all processes; None starts from the beginning.

    asked: True takes the newest good one in ``folder`` (see `rlhf.run.checkpoint.latest_checkpoint`), a path names one,
    False and None take none. Raises InputError for a damaged checkpoint or one of another run.
    """
    if not asked:
        return None
    answer: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            if asked is True:
                answer[0] = latest_checkpoint(folder, settings)
            else:
                check_checkpoint(Path(asked), settings)
                answer[0] = Path(asked)
        except InputError as error:
            answer[1] = str(error)
    broadcast_object_list(answer)
    if answer[1]:
        raise InputError(answer[1])
    if answer[0] is None:
        log.debug("no checkpoint in %s: starting from the beginning", folder)
    return answer[0]


class Termination:
    """A context manager that records SIGTERM, so that a loop can finish its step, save, and exit with code 143.

    A second SIGTERM ends the process at once, as does SIGKILL; the files on disk are complete either way. Outside the
    main thread (in some notebook servers) signals keep their default effect.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.received = False
        self._before: Any = None

    def __enter__(self) -> Termination:
        self.received = False
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._restore()

    def agreed(self) -> bool:
        """Return whether any process has received SIGTERM; a collective, called at the same step by all processes."""
        if self.accelerator.num_processes > 1:
            received = torch.tensor([float(self.received)], device=self.accelerator.device)
            self.received = bool(self.accelerator.reduce(received, "sum").item())
        return self.received

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        self._restore()
        log.warning("SIGTERM: finishing this step and saving a checkpoint; a second SIGTERM stops at once")

    def _restore(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None
