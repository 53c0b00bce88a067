"""What people see while a recipe runs: one bar per stage, quiet libraries, one table at the end."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import time
import warnings
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_LIBRARIES = (
    "transformers", "datasets", "trl", "peft", "accelerate", "bitsandbytes", "huggingface_hub", "httpx", "httpcore"
)  # fmt: skip


@cache
def console() -> Console:
    """Where everything is printed: stdout, whatever it is at the time."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 110
    notebook = "ipykernel" in sys.modules  # where rich would believe in a terminal, and break a line at every print
    return Console(width=width, highlight=False, force_jupyter=False, force_terminal=False if notebook else None)


def quiet() -> None:
    """Silence the libraries down to errors, and show our own warnings as one line each.

    Call it before transformers, datasets and trl are imported; they read these settings then.
    """
    from rich.logging import RichHandler

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in _LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)
    if "transformers" in sys.modules:
        sys.modules["transformers"].logging.set_verbosity_error()
        sys.modules["transformers"].logging.disable_progress_bar()
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()
    theirs = "|".join((*_LIBRARIES, "tqdm", r"torch\.utils", "torch.optim.lr_scheduler"))
    warnings.filterwarnings("ignore", module=rf"({theirs})(\.|$)")
    ours = logging.getLogger("rlhf")
    if not any(isinstance(handler, RichHandler) for handler in ours.handlers):
        handler = RichHandler(console=console(), show_time=False, show_path=False, markup=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
        for name in ("rlhf", "reward_models"):
            logger = logging.getLogger(name)
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
            logger.propagate = False


def stage_line(stage: str, text: str) -> None:
    """One line about a stage: `sft  complete, skipped`."""
    console().print(f"[bold]{stage:<14}[/bold]", end="")
    console().print(text, markup=False, soft_wrap=True)


class StageBar:
    """A stage's progress and latest numbers: a bar on a terminal, else a line every ``every`` seconds."""

    def __init__(self, stage: str, total: int, done: int = 0, every: float = 15.0) -> None:
        self.stage, self.total, self.done, self.every = stage, total, done, every
        self.text = ""
        self.began = self.printed = time.monotonic()
        self.first = done
        self.bar: Any = None
        if console().is_terminal:
            self.bar, self.task = _rich_bar(stage, total, done)
            atexit.register(self.close)  # gives the cursor back when the run dies

    def update(self, done: int) -> None:
        """So many steps are done."""
        self.done = done
        if self.bar:
            self.bar.update(self.task, completed=done)
        elif done < self.total and time.monotonic() - self.printed >= self.every:
            self._line()

    def show(self, numbers: Mapping[str, float]) -> None:
        """The latest numbers."""
        if numbers:
            self.text = "  ".join(f"{name} {_short(value)}" for name, value in numbers.items())
            if self.bar:
                self.bar.update(self.task, numbers=self.text)

    def close(self) -> None:
        """The stage is over."""
        if self.bar:
            self.bar.stop()
            self.bar = None
            atexit.unregister(self.close)
        elif self.done >= 0:
            self._line()
        self.done = -1

    def _line(self) -> None:
        self.printed = time.monotonic()
        seconds = self.printed - self.began
        rate = (self.done - self.first) / seconds if seconds > 0 else 0.0
        text = f"{self.done}/{self.total}  {_duration(seconds)}"
        if rate and self.done < self.total:
            text += f", {_duration((self.total - self.done) / rate)} left"
        stage_line(self.stage, f"{text}  {self.text}".rstrip())


def _rich_bar(stage: str, total: int, done: int) -> tuple[Any, Any]:
    from rich import progress

    bar = progress.Progress(
        progress.TextColumn("[bold]{task.description:<14}"),
        progress.BarColumn(bar_width=24),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("<"),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[numbers]}", markup=False),
        console=console(),
    )
    task = bar.add_task(stage, total=total, completed=done, numbers="")
    bar.start()
    return bar, task


def final_table(summary: Mapping[str, Any]) -> None:
    """The chain's result: evaluation, the reward model's accuracy, who judged, seconds per stage."""
    from rich.table import Table

    from rlhf.run import report

    headers, rows = report.headline(summary)
    table = Table(title="Evaluation on held-out prompts", title_justify="left", header_style="bold")
    for place, header in enumerate(headers):
        table.add_column(header, justify="left" if place == 0 else "right", no_wrap=place == 0)
    for row in rows:
        table.add_row(*row)
    if rows:
        console().print(table)
    for line in report.notes(summary):
        console().print(line, markup=False, soft_wrap=True)


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
