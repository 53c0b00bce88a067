"""Who gets which item, and what becomes of it: leases, overlap, the calibration part, gold items, submissions.

Every function works inside a transaction that its caller has begun, so that several processes hand out no place twice.
A place is one annotator's turn at an item: an item with overlap k has k places, a lease takes one, and a lease that
ends or is skipped gives it back. Finding the next item reads an index from the annotator's own cursor on, so that its
time does not grow with the store.
"""

from __future__ import annotations

import json
import random
import sqlite3
from collections.abc import Sequence

from rlhf.collection.records import Answer, HandedOn, Line, Outlook, Plan, Progress
from rlhf.errors import InputError

FOR_ALL: tuple[Line, ...] = ("calibration", "gold")
"""Lines whose items all annotators get, whatever the overlap."""

Db = sqlite3.Connection


def order_shown(seed: int, key: str, annotator: str, count: int) -> list[int]:
    """Draw the order in which an annotator sees an item's candidates: a function of seed, item and annotator alone."""
    order = list(range(count))
    random.Random(f"{seed}|{key}|{annotator}").shuffle(order)
    return order


def draw_numbers(db: Db, count: int) -> range:
    """Draw the next `count` queue numbers; no number is ever drawn twice."""
    last = _last_number(db)
    db.execute("UPDATE settings SET value = ? WHERE name = 'queue'", (str(last + count),))
    return range(last + 1, last + count + 1)


def lease(db: Db, annotator: sqlite3.Row, plan: Plan, now: float, count: int) -> list[int]:
    """Return up to `count` assignments that the annotator holds: those they have, renewed, then new ones."""
    if count < 1:
        raise InputError(f"lease: got count={count}; ask for one task or more")
    expire(db, now)
    until = now + plan.lease_seconds
    held = db.execute(
        "SELECT id FROM assignments WHERE annotator = ? AND state = 'leased' ORDER BY leased, id LIMIT ?",
        (annotator["id"], count),
    ).fetchall()
    found = [row["id"] for row in held]
    db.executemany("UPDATE assignments SET lease_until = ? WHERE id = ?", [(until, held) for held in found])
    for given in range(annotator["given"], annotator["given"] + count - len(found)):
        item = _next_item(db, annotator, plan, given)
        if item is None:
            break
        found.append(_take(db, item, annotator, plan, now, until))
    return found


def expire(db: Db, now: float) -> None:
    """Give back the places of the leases that have ended."""
    ended = db.execute(
        "SELECT id, item, annotator FROM assignments WHERE state = 'leased' AND lease_until <= ?", (now,)
    ).fetchall()
    for row in ended:
        db.execute("UPDATE assignments SET state = 'expired' WHERE id = ?", (row["id"],))
        give_back(db, row["item"])
        # of an item for all nobody else takes the place: this annotator's cursor goes back to it
        db.execute(
            "UPDATE cursors SET position = min(position, (SELECT queue FROM items WHERE id = ?) - 1)"
            " WHERE annotator = ? AND line IN ('calibration', 'gold')"
            " AND line = (SELECT line FROM items WHERE id = ?)",
            (row["item"], row["annotator"], row["item"]),
        )


def give_back(db: Db, item: int) -> None:
    """Open the place of an item that an annotator no longer has, in the line that is served before the main one. An
    item that enough others have, by an import beside the leases, stays closed."""
    db.execute(
        "UPDATE items SET line = 'first', queue = ?, places = max(0, overlap - (SELECT count(*) FROM assignments"
        " WHERE item = items.id AND state IN ('leased', 'done'))) WHERE id = ? AND line IN ('first', 'main')",
        (draw_numbers(db, 1)[0], item),
    )


def take_back(db: Db, items: Sequence[int]) -> None:
    """Delete what functions and models of this machine said of items, whose places open again. What people said stays,
    and so does what those said who came by an invitation."""
    ours = "SELECT id FROM annotators WHERE kind != 'person' AND token_hash IS NULL"
    for item in items:
        if db.execute(f"DELETE FROM assignments WHERE item = ? AND annotator IN ({ours})", (item,)).rowcount:
            give_back(db, item)


def take_place(db: Db, item: int) -> bool:
    """Take one of an item's open places; returns whether there was one."""
    row = db.execute("SELECT line, places FROM items WHERE id = ?", (item,)).fetchone()
    if row["line"] in FOR_ALL:
        return True
    db.execute("UPDATE items SET places = places - 1 WHERE id = ? AND places > 0", (item,))
    return bool(row["places"] > 0)


def submit(db: Db, annotator: int, answer: Answer, now: float) -> int:
    """Store an answer and return its judgment's id; of a submission that is there, the id that it got.

    Raises HandedOn where the lease had ended and others took the item's places, InputError for other mistakes."""
    stored = db.execute(
        "SELECT j.id, j.assignment, a.annotator FROM judgments j JOIN assignments a ON a.id = j.assignment"
        " WHERE j.submission = ?",
        (answer.submission,),
    ).fetchone()
    if stored is not None:
        if (stored["assignment"], stored["annotator"]) != (answer.assignment, annotator):
            raise InputError(f"submission {answer.submission}: was used for another answer; draw a new one")
        return int(stored["id"])
    held = own(db, annotator, answer.assignment)
    found = db.execute("SELECT id FROM candidates WHERE item = ? ORDER BY position", (held["item"],))
    ids = [row["id"] for row in found]
    check_candidates(answer, ids)
    if held["state"] in ("expired", "skipped") and not take_place(db, held["item"]):
        seen = "its lease had ended, or it was skipped, and the item went to others"
        raise HandedOn(f"assignment {answer.assignment}: {seen}; not stored")
    return _append(db, answer.assignment, answer, ids, now)[0]


def record(db: Db, annotator: int, item: int, answer: Answer, shown: Sequence[int], now: float) -> bool | None:
    """Store an answer that was given elsewhere, and names candidates by their index; it takes an open place of the item
    where there is one. Returns whether it superseded another, None for a submission that is there already.

    shown: the candidates' indices in the order in which they were shown; empty where nobody knows it."""
    if db.execute("SELECT 1 FROM judgments WHERE submission = ?", (answer.submission,)).fetchone():
        return None
    held = db.execute("SELECT * FROM assignments WHERE item = ? AND annotator = ?", (item, annotator)).fetchone()
    if held is None:
        db.execute(
            "INSERT INTO assignments (item, annotator, shown, state, leased, lease_until)"
            " VALUES (?, ?, ?, 'done', ?, ?)",
            (item, annotator, json.dumps(list(shown)), now, now),
        )
        held = db.execute("SELECT * FROM assignments WHERE item = ? AND annotator = ?", (item, annotator)).fetchone()
        take_place(db, item)
    elif held["state"] in ("expired", "skipped"):
        take_place(db, item)
    count = db.execute("SELECT count(*) FROM candidates WHERE item = ?", (item,)).fetchone()[0]
    return _append(db, held["id"], answer, range(count), now)[1]


def _append(db: Db, assignment: int, answer: Answer, ids: Sequence[int], now: float) -> tuple[int, bool]:
    """Append a judgment of an assignment, which is done then; returns its id and whether it supersedes another.

    ids: what the answer calls the candidates, in stored order."""
    last = db.execute("SELECT max(id) FROM judgments WHERE assignment = ?", (assignment,)).fetchone()[0]
    ranks = None if answer.ranks is None else json.dumps([float(answer.ranks[n]) for n in ids])
    ratings = json.dumps([dict(answer.ratings.get(n, {})) for n in ids])
    rewrite_of = None if answer.rewrite_of is None else ids.index(answer.rewrite_of)
    made = db.execute(
        "INSERT INTO judgments (submission, assignment, supersedes, ranks, ratings, rewrite, rewrite_of, flags,"
        " comment, seconds, guideline, created) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (answer.submission, assignment, last, ranks, ratings, answer.rewrite, rewrite_of, json.dumps(answer.flags),
         answer.comment, answer.seconds, answer.guideline, now),
    )  # fmt: skip
    db.execute(
        "UPDATE assignments SET state = 'done', judgment = coalesce(judgment, ?) WHERE id = ?",
        (made.lastrowid, assignment),
    )
    return int(made.lastrowid or 0), last is not None


def skip(db: Db, annotator: int, assignment: int, reason: str) -> None:
    """Give an assignment back unjudged; this annotator does not get the item again. A repeat changes nothing."""
    held = own(db, annotator, assignment)
    if held["state"] == "done":
        raise InputError(f"assignment {assignment}: is judged already; submit an edit instead of skipping it")
    if held["state"] != "skipped":
        db.execute("UPDATE assignments SET state = 'skipped', reason = ? WHERE id = ?", (reason, assignment))
    if held["state"] == "leased":
        give_back(db, held["item"])


def own(db: Db, annotator: int, assignment: int) -> sqlite3.Row:
    """Return an assignment. Raises InputError unless it is the annotator's."""
    found: sqlite3.Row | None = db.execute(
        "SELECT * FROM assignments WHERE id = ? AND annotator = ?", (assignment, annotator)
    ).fetchone()
    if found is None:
        raise InputError(f"assignment {assignment}: is none of this annotator's; ask for the next task")
    return found


def check_candidates(answer: Answer, ids: Sequence[int]) -> None:
    """Raise InputError unless the answer ranks all candidates or none, and names no other ones."""
    known = ", ".join(map(str, ids))
    if answer.ranks is not None and set(answer.ranks) != set(ids):
        named = ", ".join(map(str, sorted(answer.ranks))) or "none"
        raise InputError(f"ranks: got candidates {named}; rank each of {known}")
    if not set(answer.ratings) <= set(ids) or answer.rewrite_of not in (None, *ids):
        raise InputError(f"ratings, rewrite_of: name a candidate of another item; this one has {known}")


def progress(db: Db, annotator: int) -> Progress:
    """Count an annotator's tasks, and the places that are open for anybody."""
    counted = "SELECT state, count(*) FROM assignments WHERE annotator = ? GROUP BY state"
    states = dict(db.execute(counted, (annotator,)).fetchall())
    open_places = "SELECT coalesce(sum(places), 0) FROM items WHERE places > 0 AND line IN ('first', 'main')"
    left = db.execute(open_places).fetchone()[0]
    return Progress(states.get("done", 0), states.get("skipped", 0), left)


def outlook(db: Db, annotator: int) -> Outlook:
    """Count the items that an annotator can still get, and those that others hold and may hand back."""
    had = "SELECT 1 FROM assignments a WHERE a.item = i.id AND a.annotator = ? AND a.state != 'expired'"
    mine = db.execute(
        "SELECT (SELECT count(*) FROM assignments WHERE annotator = ? AND state = 'leased') +"
        f" (SELECT count(*) FROM items i WHERE places > 0 AND line != 'gold' AND NOT EXISTS ({had}))",
        (annotator, annotator),
    ).fetchone()[0]
    held = db.execute(
        "SELECT count(DISTINCT i.id) FROM assignments o JOIN items i ON i.id = o.item WHERE o.state = 'leased'"
        f" AND o.annotator != ? AND i.places = 0 AND NOT EXISTS ({had})",
        (annotator, annotator),
    ).fetchone()[0]
    return Outlook(mine, held)


def _next_item(db: Db, annotator: sqlite3.Row, plan: Plan, given: int) -> int | None:
    """Find the next item for an annotator who has got `given` tasks so far."""
    draw = random.Random(f"{plan.seed}|gold|{annotator['name']}|{given}").random()
    lines: tuple[Line, ...] = ("calibration", "first", "main")
    if draw < plan.gold_share:
        lines = ("calibration", "gold", "first", "main")
    return next((item for line in lines if (item := _first_in(db, annotator["id"], line)) is not None), None)


def _first_in(db: Db, annotator: int, line: Line) -> int | None:
    """Find the first open item of a line that the annotator has not had, and move their cursor to it: up to there
    nothing is left for them, and what opens again gets a number behind it."""
    row = db.execute("SELECT position FROM cursors WHERE annotator = ? AND line = ?", (annotator, line)).fetchone()
    cursor = row["position"] if row else 0
    found = db.execute(
        "SELECT id, queue FROM items INDEXED BY items_open WHERE line = ? AND queue > ? AND places > 0"
        " AND NOT EXISTS (SELECT 1 FROM assignments a WHERE a.item = items.id AND a.annotator = ?"
        " AND a.state != 'expired') ORDER BY queue LIMIT 1",
        (line, cursor, annotator),
    ).fetchone()
    position = found["queue"] if found else _last_number(db)
    if position != cursor:
        db.execute(
            "INSERT INTO cursors VALUES (?, ?, ?) ON CONFLICT (annotator, line) DO UPDATE SET position = ?",
            (annotator, line, position, position),
        )
    return int(found["id"]) if found else None


def _take(db: Db, item: int, annotator: sqlite3.Row, plan: Plan, now: float, until: float) -> int:
    take_place(db, item)
    key, count = db.execute(
        "SELECT key, (SELECT count(*) FROM candidates WHERE item = items.id) FROM items WHERE id = ?", (item,)
    ).fetchone()
    shown = json.dumps(order_shown(plan.seed, key, annotator["name"], count))
    db.execute(
        "INSERT INTO assignments (item, annotator, shown, state, leased, lease_until) VALUES (?, ?, ?, 'leased', ?, ?)"
        " ON CONFLICT (item, annotator) DO UPDATE SET state = 'leased', leased = ?, lease_until = ?",
        (item, annotator["id"], shown, now, until, now, until),
    )
    db.execute("UPDATE annotators SET given = given + 1 WHERE id = ?", (annotator["id"],))
    found = db.execute("SELECT id FROM assignments WHERE item = ? AND annotator = ?", (item, annotator["id"]))
    return int(found.fetchone()["id"])


def _last_number(db: Db) -> int:
    return int(db.execute("SELECT value FROM settings WHERE name = 'queue'").fetchone()[0])
