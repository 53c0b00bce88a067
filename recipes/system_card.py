"""A run's system card, each number bound to its file.

    rlhf system_card runs/my
    rlhf system_card runs/my --check true    # does the card still hold?

What it is, data, training, what was measured before and after, failures, time and machine. Writes system_card.md (with
the hub's header), a page, data_card.md and system_card.json into RUN/system_card, and a README.md into every model's
folder. Every number is bound to a file of the run and its hash; what was not measured says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf import config as configs
from rlhf.errors import InputError, RunStopped
from rlhf.flags import first_word
from rlhf.run import console
from rlhf.run.owner import by_main
from rlhf_recipes.stage import SECTIONS

console.quiet()

USAGE = "rlhf system_card RUN [--check true]"


@dataclass(frozen=True, kw_only=True)
class SystemCardConfig:
    """The cards of a run."""

    run: str = ""
    """The run's folder, which holds its stages' folders; also given as the first word, without a flag."""
    output_dir: str | None = None
    """Where the cards go; default: RUN/system_card."""
    check: bool = False
    """Write nothing: compare the card that is there with the run's files; exit code 1 where one has changed."""
    model_cards: bool = True
    """Write README.md into every model's folder, too."""


def system_card(config: SystemCardConfig) -> dict[str, Any]:
    """Write the cards of a run, or check the one that is there; returns what system_card.json holds."""
    from rlhf import artefacts, cards
    from rlhf.rows.jsonl import read_object
    from rlhf.run import page
    from rlhf.run.checkpoint import write_json_atomic

    run = Path(config.run)
    if not run.is_dir() or not any((run / stage / "manifest.json").is_file() for stage in cards.STAGES):
        raise InputError(f"{run}: holds no complete stage; name a run's folder, as `rlhf chain` makes it")
    folder = Path(config.output_dir) if config.output_dir else run / "system_card"
    file = folder / "system_card.json"
    if config.check:
        content = read_object(file, f"write the card first: rlhf system_card {run}")
        try:
            found = artefacts.check(content, run)
        except (InputError, KeyError, TypeError) as error:
            raise InputError(f"{file}: {error}") from None
        if found:
            raise RunStopped(f"{file}: {len(found)} things no longer hold: {'; '.join(found[:5])}")
        console.stage_line("system_card", f"holds: {len(content['facts'])} facts in {len(content['artefacts'])} files")
        return content
    files = artefacts.Artefacts(run)
    sections = cards.system_sections(files)
    facts = [fact for section in sections for fact in section.facts]
    lacking = [section.heading for section in sections if not section.facts and not section.samples]
    title = f"System card of {run.resolve().name}"
    data = artefacts.Artefacts(run)
    rows = [cards.Section("Data", list(cards.data_facts(data)), "The run holds no data of its own.")]
    folder.mkdir(parents=True, exist_ok=True)
    page.write(folder / "system_card.md", cards.markdown(title, sections, files, {"tags": ["rlhf", "system-card"]}))
    page.write(folder / "data_card.md", cards.markdown(f"Data of {run.resolve().name}", rows, data, {"tags": ["rlhf"]}))
    page.write(folder / "system_card.html", cards.as_page(title, sections, files))
    content = {
        "metrics": cards.metrics_of(files), "facts": artefacts.as_rows(facts), "artefacts": files.hashes,
        "not_measured": lacking,
    }  # fmt: skip
    write_json_atomic(file, content)
    models = [inner.parent for inner in sorted(run.glob("*/manifest.json")) if cards.holds_model(inner.parent)]
    for model in models if config.model_cards else ():
        page.write(model / "README.md", cards.model_card(model))
    console.stage_line("system_card", f"{len(facts)} facts of {len(files.hashes)} files")
    console.stage_line("", f"not measured: {', '.join(lacking)}" if lacking else "every part was measured")
    console.stage_line("", f"report {folder / 'system_card.html'}")
    return content


def main(argv: list[str]) -> None:
    words = first_word(argv, "run", USAGE)
    config = configs.load(
        SystemCardConfig, words, section="system_card", known_sections=SECTIONS, description=__doc__ or ""
    )
    by_main(lambda: system_card(config))


if __name__ == "__main__":
    configs.run(main)
