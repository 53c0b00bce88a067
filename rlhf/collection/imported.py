"""What comes into a store from files: rankings and pairs in every shape that `rlhf.rows` reads, as judged items.

A row's `labeler` is its annotator, or the caller names one. Rows that a store exported bring their provenance along. A
row that is there already adds nothing, nor does one that is older than what its annotator says now; so an import may be
repeated, and an export brought back to its own store changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rlhf.collection import assign, content
from rlhf.collection.agreement import midranks
from rlhf.collection.personal import labeler_of
from rlhf.collection.records import KINDS, Answer, Candidate, Item, Kind
from rlhf.collection.store import Store
from rlhf.errors import InputError
from rlhf.rows.records import Ranking

OWN = ("labeler_kind", "item", "item_source", "item_tags", "order_shown", "seconds", "guideline_hash", "judged",
       "flags", "comment", "policy", "fingerprint", "sampler", "sampling_seed", "ratings")  # fmt: skip
"""The provenance columns of an exported ranking; a row is one of ours where it has them all."""
IMPORTED = "import-"
"""What the submission of an imported judgment begins with."""


@dataclass
class Imported:
    """What an import added."""

    items: int = 0
    judgments: int = 0
    edits: int = 0
    """Judgments that superseded another one of the same annotator and item."""
    repeated: int = 0
    """Rows that were there, or that a later judgment had taken the place of."""


def import_rankings(
    store: Store,
    rankings: Iterable[Ranking],
    annotator: str | None = None,
    kind: Kind = "person",
    source: str = "",
    overlap: int = 0,
) -> Imported:
    """Store rankings as items, candidates and judgments, all of them or none.

    annotator, kind: of the rows without a `labeler`. overlap: by how many annotators a new item is to be judged in all;
    0 hands it to nobody. Raises InputError for a row without an annotator."""
    given, compared = list(rankings), _compared(store)
    rows = [row for row in given if (row.columns.get("labeler"), tuple(row.responses)) not in compared]
    made = Imported(repeated=len(given) - len(rows))
    named = [_named(ranking, annotator, kind) for ranking in rows]
    ids = {name: store.add_annotator(name, kinds).id for name, kinds in dict(named).items()}
    with store.writing() as db:
        for ranking, (name, _) in zip(rows, named, strict=True):
            try:
                new, edits = _add(db, ranking, ids[name], source, overlap, store.clock())
            except InputError as error:
                raise InputError(f"{ranking.where}: {error}") from None
            made.items += new
            made.repeated += edits is None
            made.judgments += edits is not None
            made.edits += edits is True
    return made


def _compared(store: Store) -> set[tuple[str, tuple[str, ...]]]:
    """Return what people of the playground compared, with the labeler that exports name: as items, such rows would
    count twice, and stay when their person is erased."""
    said = (one for one in store.feedback(usable=False) if one.kind == "comparison")
    return {(labeler_of(one.person), one.responses) for one in said}


def _add(
    db: sqlite3.Connection, ranking: Ranking, annotator: int, source: str, overlap: int, now: float
) -> tuple[bool, bool | None]:
    """Store one ranking; returns whether its item is new, and what `assign.record` says of its judgment."""
    item, own = _item(ranking, source)
    id, new = content.add_item(db, item, overlap, "main", now)
    places = content.matched(ranking.responses, [candidate.text for candidate in content.candidates(db, id)])
    said = _answer(ranking, own, places, f"{item.key}|{annotator}")
    shown = [places[n] for n in own.get("order_shown", ())]
    created = datetime.fromisoformat(own["judged"]).timestamp() if own else now
    if _is_there(db, annotator, id, said, created if own else None):
        return new, None
    return new, assign.record(db, annotator, id, said, shown, created)


def _is_there(db: sqlite3.Connection, annotator: int, item: int, said: Answer, judged: float | None) -> bool:
    """Return whether an annotator's standing judgment of an item is no older than a row, or says the same. judged: when
    the row was; None: it holds ranks alone, and only these are compared."""
    last = db.execute(
        "SELECT j.* FROM judgments j JOIN assignments a ON a.id = j.assignment WHERE a.item = ? AND a.annotator = ?"
        " ORDER BY j.id DESC LIMIT 1", (item, annotator)
    ).fetchone()  # fmt: skip
    if last is None:
        return False
    if judged is not None and last["created"] >= judged:
        return True
    ranks = said.ranks or {}
    places = range(len(ranks))
    if last["ranks"] is None or midranks(json.loads(last["ranks"])) != midranks([ranks[n] for n in places]):
        return False
    rated = [dict(said.ratings.get(n, {})) for n in places]
    beside = json.loads(last["ratings"]), json.loads(last["flags"]), last["comment"]
    return judged is None or beside == (rated, [*said.flags], said.comment)


def _named(ranking: Ranking, annotator: str | None, kind: Kind) -> tuple[str, Kind]:
    labeler = ranking.columns.get("labeler")
    if labeler is None and annotator is None:
        raise InputError(f"{ranking.where}: labeler: missing; add a column labeler, or name one as --annotator")
    if labeler is None:
        return str(annotator), kind
    given = ranking.columns.get("labeler_kind")
    return str(labeler), next((k for k in KINDS if k == given), kind)


def _item(ranking: Ranking, source: str) -> tuple[Item, Mapping[str, Any]]:
    """Return a ranking's item, and the provenance where a store exported it."""
    columns = {name: value for name, value in ranking.columns.items() if name != "labeler"}
    own: dict[str, Any] = {}
    if columns.keys() >= {*OWN}:
        own = {name: columns.pop(name) for name in OWN}
    unknown = [None] * len(ranking.responses)
    sides = [own.get(name) or unknown for name in ("policy", "fingerprint", "sampler", "sampling_seed")]
    candidates = tuple(
        Candidate(text, policy or "", fingerprint or "", sampler or {}, seed)
        for text, policy, fingerprint, sampler, seed in zip(ranking.responses, *sides, strict=True)
    )
    return Item(
        list(ranking.prompt), candidates, columns, own.get("item_source") or source, tuple(own.get("item_tags") or ())
    ), own


def _answer(ranking: Ranking, own: Mapping[str, Any], places: Sequence[int], whose: str) -> Answer:
    """Return a row as an answer that names candidates by their index; its submission is a hash of what it says."""
    ranks = {place: float(rank) for place, rank in zip(places, ranking.ranks, strict=True)}
    ratings = dict(zip(places, own.get("ratings") or [{}] * len(places), strict=True))
    said: dict[str, Any] = {
        "flags": tuple(own.get("flags") or ()), "comment": own.get("comment") or "",
        "seconds": own.get("seconds"), "guideline": own.get("guideline_hash"),
    }  # fmt: skip
    text = json.dumps([whose, sorted(ranks.items()), sorted(ratings.items()), said], sort_keys=True)
    submission = f"{IMPORTED}{hashlib.sha256(text.encode()).hexdigest()[:32]}"
    return Answer(assignment=0, submission=submission, ranks=ranks, ratings=ratings, **said)
