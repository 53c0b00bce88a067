"""Judgments: status, agreement, export, import, erase.

    rlhf collected status --store labels.db
    rlhf collected agreement --store labels.db --output_dir runs/my/labels
    rlhf collected export --store labels.db --format rankings \\
        --output_dir runs/my/labels
    rlhf collected import --store labels.db --data pairs.jsonl --annotator ann
    rlhf collected erase --store labels.db --person p-17

`rlhf label` fills a store, and so does `import`, which makes one where there is none. Every verb writes collected.json
and collected.html into --output_dir, by default the store's own folder; `export` beside them the rows, such as
rankings.jsonl, and their data card. It replaces no file of that name that has no such card beside it. `erase` takes a
person's conversations and feedback, or an annotator's judgments, out of the store for good; files that were exported
before are not touched.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from rlhf import config as configs
from rlhf.errors import InputError, unknown
from rlhf.run import console
from rlhf.run.owner import by_main
from rlhf_recipes.stage import SECTIONS

console.quiet()

Verb = Literal["status", "agreement", "export", "import", "erase"]
VERBS: tuple[Verb, ...] = get_args(Verb)
USAGE = f"rlhf collected {'|'.join(VERBS)} --store FILE"


@dataclass(frozen=True, kw_only=True)
class CollectedConfig:
    """What to do with a store of judgments."""

    verb: Verb
    """What to do: the first word, without a flag's name."""
    store: str
    """The store's file."""
    output_dir: str | None = None
    """Where collected.json, the page and exports go; default: the store's folder."""
    seed: int = 0
    """Of the intervals of alpha."""
    format: Literal["rankings", "pairs", "kto", "demonstrations"] = "rankings"
    """export: K ranked responses; trl's pairs; trl's unpaired rows (KTO); prompts and rewrites to imitate."""
    provenance: bool = True
    """export: false: without labeler, policies, times and all that says where a row is from."""
    licence: str | None = None
    """export: the licence that the data card names, such as cc-by-4.0."""
    data: str | None = None
    """import: rankings or pairs in any shape that training reads."""
    on_bad_row: Literal["refuse", "drop"] = "refuse"
    """import: a row that can't be read: refuse: stop and name it; drop: leave it out, and count it in the log."""
    annotator: str | None = None
    """import: who judged the rows that have no `labeler`; erase: whose judgments go."""
    kind: Literal["person", "model", "simulated"] = "person"
    """import: what kind of annotator that is."""
    overlap: int = 0
    """import: how many annotators are to judge a new item in all; 0: nobody is asked again."""
    person: str | None = None
    """erase: whose conversations and feedback go: the page's name for them, or the `user` of a client's requests."""

    def __post_init__(self) -> None:
        for name, verbs in _ONLY.items():
            if getattr(self, name) != getattr(type(self), name) and self.verb not in verbs:
                raise InputError(f"--{name} is for {' and '.join(verbs)}; leave it out of {self.verb}")
        if self.verb == "import" and self.data is None:
            raise InputError("import: name the file of rankings or pairs as --data")
        if self.verb == "erase" and (self.person is None) == (self.annotator is None):
            raise InputError("erase: name --person or --annotator, one of them")
        if self.overlap < 0:
            raise InputError(f"overlap={self.overlap} must be 0 or more")
        if self.licence is not None and not re.fullmatch(r"[\w.+-]{1,60}", self.licence):
            raise InputError(f"licence={self.licence!r} must be a short name such as cc-by-4.0")


_ONLY = {
    "format": ("export",), "provenance": ("export",), "licence": ("export",),
    "data": ("import",), "on_bad_row": ("import",), "kind": ("import",), "overlap": ("import",),
    "annotator": ("import", "erase"), "person": ("erase",),
}  # fmt: skip
"""Settings that only some verbs read."""


def collected(config: CollectedConfig) -> dict[str, Any]:
    """Do what the verb says, and write collected.json and the page; returns the former's content."""
    from rlhf.collection import measured, report
    from rlhf.collection.store import Store
    from rlhf.run import page
    from rlhf.run.checkpoint import write_json_atomic

    folder = Path(config.output_dir) if config.output_dir is not None else Path(config.store).parent
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir {folder}: is a file; choose another --output_dir")
    with Store(config.store, create=config.verb == "import") as store:
        expired = store.expire()
        changed = {**({"expired": expired} if expired else {}), **_change(config, store)}
        taken = measured.snapshot(store)
    counts = measured.status(taken)
    agreement = measured.measure(taken, config.seed) if config.verb in ("agreement", "export") else None
    folder.mkdir(parents=True, exist_ok=True)
    notes = [f"{name.replace('_', ' ')}: {count:,}" for name, count in changed.items()]
    if config.verb == "export" and agreement is not None:
        notes += _export(config, taken, agreement, folder)
    numbers = {**counts, **(agreement.metrics if agreement else {})}
    content: dict[str, Any] = {
        "verb": config.verb,
        "store": config.store,
        "metrics": {name: number.to_json() for name, number in numbers.items()},
        "changed": changed,
        "notes": notes,
        "progress": taken.progress,
    }
    if agreement is not None:
        content |= {name: getattr(agreement, name) for name in ("annotators", "pairs", "positions", "criteria")}
    write_json_atomic(folder / "collected.json", content)
    shown = page.write(
        folder / "collected.html", report.page(Path(config.store).name, counts, taken.progress, agreement, notes)
    )
    for line in notes:
        console.stage_line("collected", line)
    for name, number in (agreement.metrics if agreement else counts).items():
        console.stage_line("", f"{name.replace('_', ' ')}: {report.shown(name, number)}")
    console.stage_line("", f"report {shown}")
    return content


def _change(config: CollectedConfig, store: Any) -> dict[str, int]:
    """Import or erase; returns how many rows of what were added or went."""
    if config.verb == "erase":
        from rlhf.collection.personal import names_of

        who = f"annotator {config.annotator}"
        if config.person is not None:
            with store.reading() as db:
                who = f"person {' or '.join(names_of(db, config.person))}"
        gone = store.erase(person=config.person, annotator=config.annotator)
        if not any(gone.values()):
            seen = f"nothing of {who} is in this store, and what was deleted before is overwritten now"
            raise InputError(f"{config.store}: erase: {seen}; check the name")
        console.stage_line("erase", who)
        return {f"erased_{name}": count for name, count in gone.items()}
    if config.verb == "import":
        from dataclasses import asdict

        from rlhf.collection.imported import import_rankings
        from rlhf.rows.records import read_rankings

        ranked = read_rankings(str(config.data), on_bad_row=config.on_bad_row)
        made = import_rankings(
            store, ranked, config.annotator, config.kind, Path(str(config.data)).name, config.overlap
        )
        return {f"imported_{name}": count for name, count in asdict(made).items()}
    return {}


def _export(config: CollectedConfig, taken: Any, agreement: Any, folder: Path) -> list[str]:
    """Write a format's rows and their data card; returns a line about either."""
    from rlhf.collection import export, report
    from rlhf.rows.records import write_jsonl
    from rlhf.run import page

    rows, card = folder / f"{config.format}.jsonl", folder / f"{config.format}.card.md"
    if rows.exists() and not card.exists():
        raise InputError(f"{rows}: is no export of ours, which has {card.name} beside it; choose another --output_dir")
    made = export.export(taken, config.format, config.provenance)
    measures = [(report.MEANING[name], report.shown(name, number)) for name, number in agreement.metrics.items()]
    page.write(card, export.card(config.format, rows.name, made, measures, config.licence))  # first: it marks them ours
    write_jsonl(rows, made.rows)
    return [
        f"{len(made.rows):,} rows in {rows}, their card {card}",
        *(f"left out: {count:,} {why}" for why, count in made.left_out.items()),
    ]


def first_word(argv: list[str]) -> list[str]:
    """Let the first word be the value of --verb. Raises InputError, with the usage, where it is no verb."""
    if argv and not argv[0].startswith("-"):
        if argv[0] not in VERBS:
            unknown(argv[0], VERBS, "rlhf collected", "verb")
        return [f"--verb={argv[0]}", *argv[1:]]
    if not any(word.partition("=")[0] in ("--verb", "--help", "-h") for word in argv):
        raise InputError(f"say first what to do: {USAGE}")
    return argv


def main(argv: list[str]) -> None:
    config = configs.load(
        CollectedConfig, first_word(argv), section="collected", known_sections=SECTIONS, description=__doc__ or ""
    )
    by_main(lambda: collected(config))


if __name__ == "__main__":
    configs.run(main)
