"""A page about a run, or about one stage.

    rlhf report runs/my        # every stage: verdict, tables, curves, samples
    rlhf report runs/my/sft    # one stage

Writes report.html (one file, no network) and report.md into the folder. A run that is going on or was interrupted has
one, too. Reward models' report cards in it are drawn again from their numbers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf import config as configs
from rlhf.errors import InputError
from rlhf.flags import first_word
from rlhf.run import console
from rlhf.run.report import find_stages, write_report
from rlhf_recipes.stage import SECTIONS

console.quiet()

CARD = "reward_report.json"


@dataclass(frozen=True, kw_only=True)
class PageConfig:
    """A page about a run or a stage."""

    run: str
    """The run's folder, or a stage's; also given as the first word, without a flag."""


def report(run: str | Path, summary: dict[str, Any] | None = None) -> Path:
    """Write the page of a run or stage, and again those of the reward models in it; return the path to open. summary:
    of the run, where it is at hand (`rlhf.run.report.write_report`)."""
    folder = Path(run)
    if not folder.is_dir():
        raise InputError(f"{run}: no such folder; name a run's folder or a stage's")
    stages = list(find_stages(folder))
    cards = [*folder.glob(CARD), *folder.glob(f"*/{CARD}")]
    if not stages and not cards:
        raise InputError(f"{run}: holds no stage (a folder with manifest.json or metrics.jsonl) and no {CARD}")
    try:
        page = write_report(folder, summary) if stages else folder / "reward_report.html"
        for card in cards:
            draw_card(card)
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be written ({error.strerror})") from None
    return page


def draw_card(file: Path) -> None:
    """Draw a report card's page from its numbers."""
    from reward_models.card.report import write_page

    try:
        write_page(json.loads(file.read_text(encoding="utf-8")), file.parent)
    except (ValueError, KeyError, TypeError, AttributeError):  # another version's, or none
        console.stage_line("report", f"{file}: not drawn again, its numbers are not those of this version")


def main(argv: list[str]) -> None:
    words = first_word(argv, "run", "rlhf report RUN, or rlhf report RUN/STAGE")
    config = configs.load(PageConfig, words, section="report", known_sections=SECTIONS, description=__doc__ or "")
    console.stage_line("report", str(report(config.run)))


if __name__ == "__main__":
    configs.run(main)
