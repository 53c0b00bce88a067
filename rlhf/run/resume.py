"""Going on where a run stopped, alike on all processes: from which checkpoint, and stopping when told to (SIGTERM)."""

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

TERMINATED = 143  # 128 + SIGTERM, what a shell reports of a process that SIGTERM ended


def resume_point(
    accelerator: Accelerator, folder: str | Path, asked: bool | str | Path | None, settings: Mapping[str, Any]
) -> Path | None:
    """The checkpoint to go on from, the same on all processes; None: from the beginning.

    asked: True takes the newest good one in ``folder`` (see `rlhf.run.checkpoint.latest_checkpoint`), a path names one.
    Raises InputError for a damaged or foreign one.
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
    """SIGTERM as a wish to stop: the step in hand is finished and saved, then the process exits with 143.

    A context manager around a training loop. A second SIGTERM ends the process at once, as does SIGKILL: what is on
    disk is whole either way. Outside the main thread (some notebooks' servers) signals keep their meaning.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.told = False
        self._before: Any = None

    def __enter__(self) -> Termination:
        self.told = False
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._restore()

    def agreed(self) -> bool:
        """Has any process been told to stop? Called by all of them at the same place of the loop."""
        if self.accelerator.num_processes > 1:
            told = torch.tensor([float(self.told)], device=self.accelerator.device)
            self.told = bool(self.accelerator.reduce(told, "sum").item())
        return self.told

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.told = True
        self._restore()
        log.warning("SIGTERM: finishing this step and saving a checkpoint; a second SIGTERM stops at once")

    def _restore(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None
