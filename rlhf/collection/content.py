"""Items, tasks and judgments as rows of the store, written and read inside a transaction of the caller."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any

from rlhf.collection.assign import FOR_ALL, draw_numbers, give_back
from rlhf.collection.records import (
    Annotator,
    Answer,
    Candidate,
    Item,
    Judgment,
    Line,
    Shown,
    Task,
    check_storable,
    check_whole,
    storable_json,
)
from rlhf.errors import InputError
from rlhf.rows.messages import check_prompt
from rlhf.rows.sources import show

Db = sqlite3.Connection


def add_item(db: Db, item: Item, overlap: int, line: Line, now: float) -> tuple[int, bool]:
    """Store an item; returns its id, and whether it is new. A gold item that is there gets the new ranks.
    Raises InputError for one that nobody could judge."""
    _check(item, overlap, line)
    there = db.execute("SELECT id, line, overlap FROM items WHERE key = ?", (item.key,)).fetchone()
    if there is not None:
        if there["line"] != line and (line in FOR_ALL or (there["line"] in FOR_ALL and overlap)):
            seen = f"{show(item.prompt[-1]['content'])} is in the store as {there['line']}, and now comes as {line}"
            raise InputError(f"item {there['id']}: {seen}; take it out of one of the two")
        if overlap > there["overlap"] and line not in FOR_ALL:
            db.execute("UPDATE items SET overlap = ? WHERE id = ?", (overlap, there["id"]))
            give_back(db, there["id"])
        if line == "gold":
            _correct(db, there["id"], item)
        return int(there["id"]), False
    places = 1 if line in FOR_ALL else overlap
    gold = None if item.gold_ranks is None else json.dumps([float(rank) for rank in item.gold_ranks])
    made = db.execute(
        "INSERT INTO items (key, prompt, columns, source, tags, person, gold_ranks, line, queue, overlap, places,"
        " created) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (item.key, json.dumps(item.prompt), storable_json(dict(item.columns), "columns"), item.source,
         json.dumps(item.tags), item.person, gold, line, draw_numbers(db, 1)[0], overlap, places, now),
    )  # fmt: skip
    db.executemany(
        "INSERT INTO candidates (item, position, text, policy, fingerprint, sampler, seed)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        [
            (made.lastrowid, n, c.text, c.policy, c.fingerprint, storable_json(dict(c.sampler), "sampler"), c.seed)
            for n, c in enumerate(item.candidates)
        ],
    )
    return int(made.lastrowid or 0), True


def _correct(db: Db, id: int, item: Item) -> None:
    """Give a stored gold item the ranks with which it comes now, whatever the order of its candidates."""
    places = matched([c.text for c in item.candidates], [c.text for c in candidates(db, id)])
    ranks = dict(zip(places, item.gold_ranks or (), strict=True))
    gold = json.dumps([float(ranks[place]) for place in sorted(ranks)])
    db.execute("UPDATE items SET gold_ranks = ? WHERE id = ?", (gold, id))


def matched(responses: Sequence[str], stored: Sequence[str]) -> list[int]:
    """Return, for each response, the index of the stored candidate with its text; equal texts in their order."""
    free: dict[str, list[int]] = {}
    for n, text in enumerate(stored):
        free.setdefault(text, []).append(n)
    return [free[text].pop(0) for text in responses]


def _check(item: Item, overlap: int, line: Line) -> None:
    check_prompt(item.prompt, "prompt")
    if not item.candidates:
        raise InputError("candidates: got none; an item has one or more")
    for text in (item.source, item.person, *item.tags):
        check_storable(text, "source, person, tags")
    for candidate in item.candidates:
        for text in (candidate.text, candidate.policy, candidate.fingerprint):
            check_storable(text, "candidates")
        check_whole(candidate.seed, "candidates.seed")
        if not candidate.text.strip():
            raise InputError(f"candidates: got {show(candidate.text)}; leave empty responses out")
    if line == "gold" and item.gold_ranks is None:
        raise InputError("gold_ranks: missing; a gold item needs the right ranks of its candidates")
    if item.gold_ranks is not None and len(item.gold_ranks) != len(item.candidates):
        seen = f"{len(item.gold_ranks)} ranks for {len(item.candidates)} candidates"
        raise InputError(f"gold_ranks: {seen}; write one per candidate, smaller is better")
    if overlap < 0:
        raise InputError(f"overlap={overlap} must be 0 or more")


def annotator(row: sqlite3.Row) -> Annotator:
    """Return a row of annotators as its record."""
    return Annotator(row["id"], row["name"], row["kind"], row["created"], row["token_hash"] is not None)


def annotators(db: Db) -> list[Annotator]:
    """Return all annotators by their names."""
    return [annotator(row) for row in db.execute("SELECT * FROM annotators ORDER BY name")]


def candidates(db: Db, item: int) -> tuple[Candidate, ...]:
    """Return an item's candidates in stored order."""
    found = db.execute("SELECT * FROM candidates WHERE item = ? ORDER BY position", (item,))
    return tuple(
        Candidate(row["text"], row["policy"], row["fingerprint"], json.loads(row["sampler"]), row["seed"], row["id"])
        for row in found
    )


def items(db: Db, where: str = "", values: tuple[Any, ...] = ()) -> Iterator[Item]:
    """Yield items in the order in which they were stored."""
    for row in db.execute(f"SELECT * FROM items {where} ORDER BY id", values):
        gold = None if row["gold_ranks"] is None else tuple(json.loads(row["gold_ranks"]))
        yield Item(
            json.loads(row["prompt"]), candidates(db, row["id"]), json.loads(row["columns"]), row["source"],
            tuple(json.loads(row["tags"])), row["person"], gold, row["id"],
        )  # fmt: skip


def task(db: Db, assignment: int) -> Task:
    """Return an assignment as its annotator sees it."""
    row = db.execute(
        "SELECT a.*, i.prompt, i.columns FROM assignments a JOIN items i ON i.id = a.item WHERE a.id = ?", (assignment,)
    ).fetchone()
    stored = [Shown(c.id, c.text) for c in candidates(db, row["item"])]
    order = json.loads(row["shown"]) or range(len(stored))  # of an imported judgment nobody knows it
    last = db.execute(f"{_JUDGMENTS} WHERE j.assignment = ? ORDER BY j.id DESC LIMIT 1", (assignment,)).fetchone()
    answer = None if last is None else _answer(_judgment(last), [shown.id for shown in stored])
    return Task(
        row["id"], row["item"], json.loads(row["prompt"]), tuple(stored[n] for n in order), row["lease_until"],
        json.loads(row["columns"]), answer,
    )  # fmt: skip


def history(db: Db, annotator: int, before: int | None, count: int) -> tuple[Task, ...]:
    """Return an annotator's judged tasks by their first judgments, the last one first: those before a task, or all."""
    found = db.execute(
        "SELECT id FROM assignments WHERE annotator = ? AND judgment <"
        " coalesce((SELECT judgment FROM assignments WHERE id = ? AND annotator = ?), 9e18)"
        " ORDER BY judgment DESC LIMIT ?",
        (annotator, before, annotator, count),
    ).fetchall()
    return tuple(task(db, row["id"]) for row in found)


_JUDGMENTS = (
    "SELECT j.*, a.item, a.shown, n.name FROM judgments j JOIN assignments a ON a.id = j.assignment"
    " JOIN annotators n ON n.id = a.annotator"
)


def judgment(db: Db, id: int) -> Judgment:
    """Return one judgment."""
    return _judgment(db.execute(f"{_JUDGMENTS} WHERE j.id = ?", (id,)).fetchone())


def _answer(said: Judgment, ids: list[int]) -> Answer:
    """Write a judgment as the answer that it was, by candidates' ids."""
    return Answer(
        assignment=said.assignment, submission=said.submission,
        ranks=None if said.ranks is None else dict(zip(ids, said.ranks, strict=True)),
        ratings={n: rated for n, rated in zip(ids, said.ratings, strict=True) if rated},
        rewrite=said.rewrite, rewrite_of=None if said.rewrite_of is None else ids[said.rewrite_of],
        flags=said.flags, comment=said.comment, seconds=said.seconds, guideline=said.guideline,
    )  # fmt: skip


def judgments(db: Db, superseded: bool) -> Iterator[Judgment]:
    """Yield judgments by item and annotator; those that an edit replaced only where they are asked for."""
    last = "" if superseded else "WHERE NOT EXISTS (SELECT 1 FROM judgments e WHERE e.supersedes = j.id)"
    for row in db.execute(f"{_JUDGMENTS} {last} ORDER BY a.item, n.id, j.id"):
        yield _judgment(row)


def _judgment(row: sqlite3.Row) -> Judgment:
    ranks = None if row["ranks"] is None else tuple(json.loads(row["ranks"]))
    return Judgment(
        row["id"], row["submission"], row["assignment"], row["item"], row["name"], tuple(json.loads(row["shown"])),
        ranks, tuple(json.loads(row["ratings"])), row["rewrite"], row["rewrite_of"], tuple(json.loads(row["flags"])),
        row["comment"], row["seconds"], row["guideline"], row["created"], row["supersedes"],
    )  # fmt: skip
