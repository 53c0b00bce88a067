"""Resuming and stopping, the same on all processes: the checkpoint to continue from, and the end after a signal."""

from __future__ import annotations

import json
import logging
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

from rlhf.errors import another_ended, first_of_its_machine
from rlhf.run.changes import changes
from rlhf.run.checkpoint import COMPLETE, awaits_mended, check_checkpoint, checkpoints_in, latest_checkpoint, plain
from rlhf.run.owner import by_main

log = logging.getLogger("rlhf")

TERMINATED = 143  # 128 + SIGTERM, the exit code that a shell reports for a process ended by SIGTERM


def resume_point(folder: str | Path, asked: bool | str | Path | None, settings: Mapping[str, Any]) -> Path | None:
    """Return the checkpoint to continue from, the same on all processes; None starts from the beginning.

    asked: True takes the newest good one in ``folder`` (see `rlhf.run.checkpoint.latest_checkpoint`), a path names one,
    False and None take none. Checkpoints of ``folder`` that this run cannot have made are set aside. Raises InputError
    for a damaged checkpoint or one of another run.
    """

    def find() -> Path | None:
        if not asked:
            set_aside(folder, 0, "rollouts")
            return None
        found = latest_checkpoint(folder, settings) if asked is True else Path(asked)
        if found is None:
            return None
        if asked is not True:
            check_checkpoint(found, settings)
            same = found.resolve().parent == Path(folder).resolve() and found.name.startswith("checkpoint-")
            set_aside(folder, int(found.name[11:]) if same else 0)
        _tell_of_growth(found, settings)
        if awaits_mended(found):
            log.warning("%s was kept when a reward function failed: going on with the functions as they are now", found)
        return found

    found = by_main(find)
    if asked and found is None:
        log.debug("no checkpoint in %s: starting from the beginning", folder)
    return found


def set_aside(folder: str | Path, step: int, *others: str) -> None:
    """Move checkpoints of later steps than ``step``, where a run begins, to ``earlier-<number>``: they are another
    run's, or another branch's, whose higher numbers would crowd out this run's, and be taken for its result."""
    folder = Path(folder)
    found = [path for path in checkpoints_in(folder) if int(path.name[11:]) > step]
    found += [folder / name for name in others if (folder / name).is_dir()]
    if not found:
        return
    numbers = [int(path.name[8:]) for path in folder.glob("earlier-*") if path.name[8:].isdigit()]
    aside = folder / f"earlier-{max(numbers, default=0) + 1}"
    aside.mkdir()
    for path in found:
        path.rename(aside / path.name)
    names = ", ".join(path.name for path in found)
    log.warning("%s: %s of an earlier run moved to %s; delete what you don't need", folder, names, aside.name)


def _tell_of_growth(checkpoint: Path, settings: Mapping[str, Any]) -> None:
    saved = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))["settings"]
    for change in changes(saved, plain(settings)):
        if change.grown:
            schedule = settings.get("lr_schedule", "constant")
            log.warning("%s: %s; the %s learning rate is counted over the new length", checkpoint, change, schedule)


class Termination:
    """A context manager that records SIGTERM and SIGINT (Ctrl-C, a notebook's stop button), so that a loop can finish
    its step, save a checkpoint, and `leave`.

    A second one of the same kind ends the process at once, as does SIGKILL; the files on disk are complete either way.
    A launcher sends SIGTERM, too, where another process has ended: this one then leaves without a word.
    Outside the main thread (in some notebook servers) signals keep their default effect.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.received = 0  # the signal's number
        self.known_to_all = 0  # likewise, once the processes have told one another
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Termination:
        self.received = self.known_to_all = 0
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._on_signal) for number in self.SIGNALS}
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        for number in self.SIGNALS:
            self._restore(number)
        if error is not None and self.received and another_ended(error):
            raise SystemExit(128 + self.received) from None

    def agreed(self) -> bool:
        """Return whether any process has received a signal; a collective, called at the same step by all processes."""
        self.known_to_all = self.received
        if self.accelerator.num_processes > 1:
            received = torch.tensor([self.received], device=self.accelerator.device)
            self.known_to_all = int(self.accelerator.gather(received).max())
            if self.known_to_all == signal.SIGTERM:
                self._tell(signal.SIGTERM)
        return self.known_to_all > 0

    def leave(self) -> None:
        """After a signal, once all is saved: raise SystemExit(143) or, after SIGINT, KeyboardInterrupt (130).

        One of several processes doesn't leave for a signal that only it has seen yet: the others would wait for it."""
        received = self.known_to_all if self.accelerator.num_processes > 1 else self.received
        if received == signal.SIGINT:
            raise KeyboardInterrupt
        if received:
            raise SystemExit(TERMINATED)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        self._restore(number)
        if number == signal.SIGINT or self.accelerator.num_processes == 1:  # else another may have ended
            self._tell(number)

    def _tell(self, number: int) -> None:
        name = signal.Signals(number).name
        if first_of_its_machine():  # all of them got it
            log.warning("%s: finishing this step and saving a checkpoint; a second %s stops at once", name, name)

    def _restore(self, number: int) -> None:
        before = self._before.pop(number, None)
        if before is not None:
            signal.signal(number, before)
