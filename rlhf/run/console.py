"""What people see while a recipe runs: one line per stage that shows its progress, quiet libraries, one table at the
end."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from rlhf.errors import hidden, visible

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.segment import Segment
    from rich.text import Text

_LIBRARIES = (
    "transformers", "datasets", "trl", "peft", "accelerate", "bitsandbytes", "huggingface_hub", "httpx", "httpcore"
)  # fmt: skip


@cache
def console() -> Console:
    """Where everything is printed: stdout, whatever it is at the time. Of several processes only the first prints."""
    return _make_console(quiet=_process() > 0)


def _make_console(quiet: bool = False) -> Console:
    from rich.console import Console

    class Escaping(Console):
        """A console on which control characters of printed text are escaped: only its own styles reach a terminal."""

        def render(self, renderable: RenderableType, options: Any = None) -> Iterable[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else segment._replace(text=visible(segment.text))

    width = None if sys.stdout.isatty() else 110
    notebook = "ipykernel" in sys.modules  # where rich would believe in a terminal, and break a line at every print
    terminal = False if notebook else None
    return Escaping(width=width, highlight=False, force_jupyter=False, force_terminal=terminal, quiet=quiet)


def _process() -> int:
    """Return this process's number, as torchrun gives it."""
    return int(os.environ.get("RANK", "0"))


def quiet() -> None:
    """Silence the libraries down to errors, and show our own warnings as one line each.

    Call it before transformers, datasets and trl are imported; they read these settings then.
    """
    from rich.logging import RichHandler

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in _LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)
    if "transformers" in sys.modules:
        sys.modules["transformers"].logging.set_verbosity_error()
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()
    libraries = "|".join((*_LIBRARIES, "tqdm", r"torch\.utils", "torch.optim.lr_scheduler"))
    warnings.filterwarnings("ignore", module=rf"({libraries})(\.|$)")
    ours = logging.getLogger("rlhf")
    if not any(isinstance(handler, RichHandler) for handler in ours.handlers):
        shown = _make_console() if _process() else console()  # a warning of any process matters
        handler = RichHandler(console=shown, show_time=False, show_path=False, markup=False)
        handler.setFormatter(_WithoutSecrets("%(message)s"))
        for name in ("rlhf", "reward_models"):
            logger = logging.getLogger(name)
            logger.addHandler(handler)
            logger.setLevel(logging.WARNING if _process() else logging.INFO)
            logger.propagate = False


class _WithoutSecrets(logging.Formatter):
    """Log lines that show no password, key or token of an address."""

    def format(self, record: logging.LogRecord) -> str:
        return hidden(super().format(record))


def stage_line(stage: str, text: str) -> None:
    """Print one line about a stage: `sft  complete, skipped`."""
    console().print(f"[bold]{stage:<13}[/bold] ", end="")
    console().print(hidden(text), markup=False, soft_wrap=True)


class StageBar:
    """A stage's progress and latest numbers: one line that is kept up to date on a terminal, else a line every `every`
    seconds. The line begins with what is done and the time left; numbers that don't fit are left out from the right."""

    def __init__(self, stage: str, total: int, done: int = 0, every: float = 15.0) -> None:
        self.stage, self.total, self.done, self.every = stage, total, done, every
        self.numbers: list[str] = []
        self.began = self.printed = self.stepped = time.monotonic()
        self.first = done
        self.live: Any = None
        if console().is_terminal and not console().quiet:
            from rich.live import Live

            self.live = Live(get_renderable=self._render, console=console(), refresh_per_second=4)
            self.live.start()
            atexit.register(self.close)  # gives the cursor back when the run dies

    def update(self, done: int) -> None:
        """Note how many steps are done."""
        self.done, self.stepped = done, time.monotonic()
        if not self.live and done < self.total and self.stepped - self.printed >= self.every:
            self._print()

    def show(self, numbers: Mapping[str, float]) -> None:
        """Show the latest numbers, the most important first."""
        if numbers:
            self.numbers = [f"{name} {_short(value)}" for name, value in numbers.items()]

    def close(self) -> None:
        """End the stage's line."""
        if self.live:
            self.live.stop()
            self.live = None
            atexit.unregister(self.close)
        elif self.done >= 0:
            self._print()
        self.done = -1

    def line(self, width: int) -> list[str]:
        """Return the parts of the line that fit into so many columns: the stage, how far it is, numbers."""
        name = f"{self.stage:<13} " if width >= 60 else f"{self.stage}  "
        parts = [name, f"{self.done}/{self.total}  {self._time()}"]
        room = width - sum(map(len, parts))
        for number in self.numbers:
            room -= len(number) + 2
            if room < 0:
                break
            parts.append(f"  {number}")
        return parts

    def _time(self) -> str:
        now = time.monotonic()
        steps, left = self.done - self.first, self.total - self.done
        if steps <= 0 or left <= 0:
            return _duration(now - self.began)
        return f"{_duration(max(0.0, (self.stepped - self.began) / steps * left - (now - self.stepped)))} left"

    def _render(self) -> Text:
        from rich.text import Text

        name, progress, *numbers = self.line(console().width)
        text = Text(name, "bold", no_wrap=True, overflow="crop")
        return text.append(progress, "cyan").append("".join(numbers))

    def _print(self) -> None:
        self.printed = time.monotonic()
        name, *rest = self.line(width=1000)
        stage_line(name.strip(), "".join(rest))


def final_table(summary: Mapping[str, Any]) -> None:
    """Print the chain's result: evaluation, the reward model's accuracy, who judged, seconds per stage, the verdict."""
    from rich import box
    from rich.table import Table

    from rlhf.run import tables, verdict

    headers, rows = tables.headline(summary)
    title, width = "Evaluation on held-out prompts", console().width
    cells = [[cell.replace(" [", "\n[").replace(", ", ",") for cell in row] for row in rows]
    tall = [header.replace(" ", "\n") for header in headers]
    forms = [form for form in ((headers, rows), (headers, cells), (tall, cells)) if _width_of(*form) <= width]
    if rows and forms:
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
        for place, header in enumerate(forms[0][0]):
            table.add_column(header, justify="left" if place == 0 else "right", no_wrap=True)
        for row in forms[0][1]:
            table.add_row(*row)
        console().print(table)
    elif rows:
        console().print(f"[italic]{title}[/italic]")
        for name, *values in rows:
            console().print(name, style="bold", markup=False)
            for header, value in zip(headers[1:], values, strict=True):
                console().print(f"  {header}: {value}" if value else "", markup=False, end="\n" if value else "")
    whole = not console().is_terminal  # a file's lines stay whole; a terminal's are broken between words
    for line in tables.notes(summary):
        console().print(line, markup=False, soft_wrap=whole)
    if rows:
        console().print(verdict.of_run(summary, {}), style="bold", markup=False, soft_wrap=whole)


def _width_of(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """Return the width of the table, with two columns of space for each of its own."""
    columns = zip(headers, *rows, strict=True)
    return sum(max(len(line) for cell in column for line in cell.split("\n")) + 2 for column in columns)


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
