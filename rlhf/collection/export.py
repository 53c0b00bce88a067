"""What leaves a store: rankings, trl pairs, KTO rows and demonstrations, each with a data card.

A row holds what its reader needs, the labeler, the item's own columns and its provenance. Usable feedback of the
playground (agreed to, scrubbed, not expired) leaves with the judgments: comparisons as rankings and pairs, thumbs as
KTO rows, edits as demonstrations. Gold items measure annotators and stay in the store.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain
from typing import Any, Literal, get_args

from rlhf.collection.imported import IMPORTED
from rlhf.collection.measured import Snapshot
from rlhf.collection.personal import Conversation, Feedback, labeler_of
from rlhf.collection.records import Item, Judgment
from rlhf.errors import InputError
from rlhf.rows.messages import Messages, check_prompt
from rlhf.rows.records import Ranking

log = logging.getLogger("rlhf")

Format = Literal["rankings", "pairs", "kto", "demonstrations"]
FORMATS: tuple[Format, ...] = get_args(Format)
Row = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """One judgment, or one feedback, that may become rows: its texts, their provenance, and who said what of them."""

    prompt: Messages
    responses: tuple[str, ...]
    ranks: tuple[float, ...] | None
    rewrite: str | None
    thumb: int | None
    labeler: str
    columns: Row
    """The item's own."""
    provenance: Row
    """Of the judgment."""
    per_response: dict[str, Sequence[Any]]
    """Of the responses: a list for each name."""


@dataclass
class Exported:
    """Rows of one format, and what gave none."""

    rows: list[Row]
    sources: list[Source]
    """Those that gave a row."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Why a judgment or feedback gave no row -> how many."""


def export(taken: Snapshot, kind: Format, provenance: bool = True) -> Exported:
    """Make a format's rows; without `provenance` they hold the item's own columns alone, as other tools write them.

    Raises InputError where there are none."""
    made = rows_of(taken, kind, provenance)
    if not made.rows:
        why = "; ".join(f"{count} {reason}" for reason, count in made.left_out.items()) or "the store has no judgments"
        raise InputError(f"export --format {kind}: no rows: {why}")
    return made


def rows_of(taken: Snapshot, kind: Format, provenance: bool = True) -> Exported:
    """Make a format's rows, as `export` does; there may be none."""
    made, hidden = Exported([], []), set[str]()
    for source in chain(_judged(taken, made.left_out), _said(taken, made.left_out)):
        rows = list(_MAKE[kind](source))
        if not rows:
            made.left_out[_NOTHING[kind]] += 1
            continue
        made.sources.append(source)
        about = {"labeler": source.labeler, **source.provenance} if provenance else {}
        for row, further in rows:
            said = {**row, **about, **(further if provenance else {})}
            hidden |= source.columns.keys() & said.keys()  # an item's own column never takes the place of what is said
            made.rows.append({**row, **source.columns, **said})
    if hidden:
        log.warning("export: the items' own columns %s give way to the export's", ", ".join(sorted(hidden)))
    return made


# --- what may leave -------------------------------------------------------------------------------------------------


def _judged(taken: Snapshot, left_out: Counter[str]) -> Iterator[Source]:
    for said in taken.judgments:
        item = taken.items[said.item]
        if item.gold_ranks is not None:
            left_out["of a gold item"] += 1
            continue
        yield _of_judgment(item, said, taken.annotators[said.annotator].kind)


def _of_judgment(item: Item, said: Judgment, kind: str) -> Source:
    provenance = {
        "labeler_kind": kind, "item": item.id, "item_source": item.source, "item_tags": list(item.tags),
        "order_shown": list(said.order), "seconds": said.seconds, "guideline_hash": said.guideline,
        "judged": _date(said.created), "flags": list(said.flags), "comment": said.comment,
    }  # fmt: skip
    per_response: dict[str, Sequence[Any]] = {
        "policy": [c.policy for c in item.candidates],
        "fingerprint": [c.fingerprint for c in item.candidates],
        "sampler": [dict(c.sampler) for c in item.candidates],
        "sampling_seed": [c.seed for c in item.candidates],
        "ratings": [dict(rated) for rated in said.ratings],
    }
    texts = tuple(candidate.text for candidate in item.candidates)
    rewrite = said.rewrite if said.rewrite and said.rewrite.strip() else None
    columns = _columns(item, said)
    return Source(item.prompt, texts, said.ranks, rewrite, None, said.annotator, columns, provenance, per_response)


def _columns(item: Item, said: Judgment) -> Row:
    """Return an item's own columns: `label`, by which a verdict called all of its responses bad, beside that alone."""
    verdict = said.submission.startswith(IMPORTED) and len(set(said.ranks or ())) == 1
    dropped = isinstance(item.columns.get("label"), bool) and not verdict
    return {name: value for name, value in item.columns.items() if not (dropped and name == "label")}


def _said(taken: Snapshot, left_out: Counter[str]) -> Iterator[Source]:
    """Yield the usable feedback; its labeler is a hash of the person's pseudonym."""
    for said, talk in taken.feedback:
        prompt = talk.messages[: said.turn] if said.turn is not None else []
        try:
            check_prompt(prompt, "prompt")
        except InputError:
            left_out["feedback whose turn follows no prompt"] += 1
            continue
        if not said.responses or not all(text.strip() for text in said.responses):
            left_out["feedback without the answer that it is about"] += 1
            continue
        yield _of_feedback(said, talk, prompt)


def _of_feedback(said: Feedback, talk: Conversation, prompt: Messages) -> Source:
    count, policies = len(said.responses), said.policies or (talk.policy,) * len(said.responses)
    provenance = {
        "labeler_kind": "user", "item": None, "item_source": talk.source, "item_tags": [],
        "order_shown": list(said.order), "seconds": None, "guideline_hash": None, "judged": _date(said.created or 0.0),
        "flags": list(said.tags), "comment": "",
    }  # fmt: skip
    per_response: dict[str, Sequence[Any]] = {
        "policy": policies, "fingerprint": [talk.fingerprint if p == talk.policy else "" for p in policies],
        "sampler": [dict(talk.sampler)] * count, "sampling_seed": [talk.seed] * count, "ratings": [{}] * count,
    }  # fmt: skip
    return Source(
        list(prompt), said.responses, said.ranks, said.edit, said.thumb, labeler_of(said.person), {}, provenance,
        per_response,
    )  # fmt: skip


# --- one format -----------------------------------------------------------------------------------------------------


def _rankings(source: Source) -> Iterator[tuple[Row, Row]]:
    if source.ranks is not None and len(source.responses) > 1:
        row = {"prompt": source.prompt, "responses": list(source.responses), "ranks": list(source.ranks)}
        yield row, {name: list(values) for name, values in source.per_response.items()}


def _pairs(source: Source) -> Iterator[tuple[Row, Row]]:
    """trl's preference format, for every pair that is no tie."""
    if source.ranks is None or len(source.responses) < 2:
        return
    for better, worse in Ranking(source.prompt, source.responses, source.ranks).pairs():
        row = {
            "prompt": source.prompt,
            "chosen": _turn(source.responses[better]),
            "rejected": _turn(source.responses[worse]),
        }
        sides = (("chosen", better), ("rejected", worse))
        yield row, {f"{side}_{name}": values[n] for side, n in sides for name, values in source.per_response.items()}


def _kto(source: Source) -> Iterator[tuple[Row, Row]]:
    """trl's unpaired preferences: of a ranking its best responses are good and its worst bad, those between are left
    out, and nothing is said where all tie."""
    labels: dict[int, bool] = {}
    if source.ranks is not None and min(source.ranks) < max(source.ranks):
        best, worst = min(source.ranks), max(source.ranks)
        labels = {n: rank == best for n, rank in enumerate(source.ranks) if rank in (best, worst)}
    elif source.thumb is not None:
        labels = {0: source.thumb > 0}
    for n, label in labels.items():
        row = {"prompt": source.prompt, "completion": _turn(source.responses[n]), "label": label}
        yield row, {name: values[n] for name, values in source.per_response.items()}


def _demonstrations(source: Source) -> Iterator[tuple[Row, Row]]:
    if source.rewrite is not None:
        yield {"prompt": source.prompt, "completion": _turn(source.rewrite)}, {}


def _turn(text: str) -> Messages:
    return [{"role": "assistant", "content": text}]


_MAKE = {"rankings": _rankings, "pairs": _pairs, "kto": _kto, "demonstrations": _demonstrations}
_NOTHING = {
    "rankings": "without ranks",
    "pairs": "without ranks, or with ties alone",
    "kto": "without ranks or thumb, or with ties alone",
    "demonstrations": "without a rewrite",
}


# --- the card -------------------------------------------------------------------------------------------------------


def card(kind: Format, file: str, made: Exported, measured: Sequence[tuple[str, str]], licence: str | None) -> str:
    """Write the data card of an export, in Markdown with the hub's header. measured: lines (what, number) about the
    annotators' agreement."""
    labelers = Counter(source.labeler for source in made.sources)
    guidelines = Counter(source.provenance["guideline_hash"] or "none" for source in made.sources)
    policies = Counter(p or "not named" for source in made.sources for p in source.per_response["policy"])
    dates = sorted(source.provenance["judged"] for source in made.sources)
    prompts = {str(source.prompt) for source in made.sources}
    facts = [
        ("rows", f"{len(made.rows):,}"),
        ("judgments", f"{len(made.sources):,}"),
        ("distinct prompts", f"{len(prompts):,}"),
        ("judged", f"{dates[0][:10]} to {dates[-1][:10]}"),
        ("annotators", _counted(labelers)),
        ("kinds of annotators", _counted(Counter(source.provenance["labeler_kind"] for source in made.sources))),
        ("guideline, by hash", _counted(guidelines)),
        ("responses, by policy", _counted(policies)),
        ("sources of the prompts", _counted(Counter(s.provenance["item_source"] or "not named" for s in made.sources))),
        ("gave no row", _counted(made.left_out) or "none"),
        *measured,
    ]
    table = "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in facts)
    return _CARD.format(licence=licence or "unknown", kind=kind, file=file, table=table)


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.most_common())


def _cell(text: str) -> str:
    """Write a text into a cell of a table: names of people and policies are no markup."""
    return " ".join("".join(f"\\{c}" if c in "|\\`*_<>[]#" else c for c in text).split())


def _date(created: float) -> str:
    return datetime.fromtimestamp(created, UTC).isoformat(timespec="seconds")


_CARD = """---
license: {licence}
configs:
- config_name: {kind}
  data_files: {file}
---
# {file}

Human and model judgments, exported as {kind} by `rlhf collected export`.

| | |
|---|---|
{table}

Agreement is measured over all judgments of the store, with its 95% interval over items. What the licence above does not
settle: the prompts' and policies' own terms. Annotators' names stand in the column `labeler`.
"""
