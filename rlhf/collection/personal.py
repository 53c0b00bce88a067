"""Conversations and feedback of the playground: kept with consent, until they expire or are erased."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rlhf.collection import assign
from rlhf.collection.records import check_storable, check_whole, is_number, storable_json
from rlhf.errors import InputError, RunStopped
from rlhf.rows.records import Messages
from rlhf.rows.sources import show


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A conversation of the playground, as its server keeps it."""

    id: str
    """Drawn by the server or client, such as a UUID; storing it again replaces it."""
    messages: Messages
    person: str
    """A pseudonym, under which everything of this person can be erased."""
    source: str = "playground"
    consent: bool = False
    """Whether the person agreed that it is kept and used for training."""
    scrubbed: bool = False
    """Whether personal data were looked for and removed."""
    expires: float | None = None
    """Seconds since 1970; `Store.expire` deletes it then. None: kept until erased."""
    policy: str = ""
    fingerprint: str = ""
    sampler: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    created: float | None = None
    """None: when it is stored."""

    def __post_init__(self) -> None:
        for name in ("id", "person", "source", "policy", "fingerprint"):
            check_storable(getattr(self, name), f"conversation.{name}")
        check_whole(self.seed, "conversation.seed")


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """What a person of the playground says of one answer, or of several.

    The prompt is the conversation's messages before `turn`.
    """

    id: str
    """Drawn once for what is judged: a repeat is not stored again, something else under it replaces what was there."""
    person: str
    kind: Literal["thumb", "edit", "comparison"]
    conversation: str | None = None
    """None: its sender did not agree that the conversation is kept."""
    turn: int | None = None
    """The index of the assistant turn in the conversation's messages."""
    responses: tuple[str, ...] = ()
    """The answer that is meant, or the compared ones, in stored order."""
    policies: tuple[str, ...] = ()
    """Who wrote each of them."""
    order: tuple[int, ...] = ()
    """The responses' indices in the order shown."""
    thumb: int | None = None
    """1 up, -1 down."""
    ranks: tuple[float, ...] | None = None
    """Of a comparison: smaller is better, equal is a tie."""
    edit: str | None = None
    """The answer as the person would have it."""
    tags: tuple[str, ...] = ()
    """Reasons."""
    consent: bool = False
    scrubbed: bool = False
    expires: float | None = None
    created: float | None = None

    def __post_init__(self) -> None:
        if self.kind == "thumb" and self.thumb not in (1, -1):
            raise InputError(f"feedback.thumb: got {show(self.thumb)}; send 1 or -1")
        if self.kind == "edit" and not (self.edit or "").strip():
            raise InputError("feedback.edit: got empty text; send the answer as it should be")
        if self.kind == "comparison" and (len(self.responses) < 2 or len(self.ranks or ()) != len(self.responses)):
            seen = f"{len(self.ranks or ())} ranks for {len(self.responses)} responses"
            raise InputError(f"feedback.ranks: {seen}; send two responses or more and a rank for each")
        if not all(is_number(rank) for rank in self.ranks or ()):
            raise InputError(f"feedback.ranks: got {show(self.ranks)}; send a number for each response")
        if len(self.policies) not in (0, len(self.responses)):
            seen = f"{len(self.policies)} policies for {len(self.responses)} responses"
            raise InputError(f"feedback.policies: {seen}; name one for each, or none")
        if self.order and sorted(self.order) != list(range(len(self.responses))):
            raise InputError(f"feedback.order: got {show(self.order)}; send each response's index once, or none")
        for text in (self.id, self.person, self.conversation, self.edit, *self.responses, *self.policies, *self.tags):
            check_storable(text, "feedback")
        check_whole(self.turn, "feedback.turn")


Db = sqlite3.Connection
USABLE = "consent = 1 AND scrubbed = 1 AND (expires IS NULL OR expires > ?)"
"""What may be used for training: agreed to, scrubbed and not expired."""


def put_conversation(db: Db, conversation: Conversation, now: float) -> None:
    """Store a conversation, or replace it. Raises InputError where its id is another person's."""
    there = db.execute("SELECT person FROM conversations WHERE id = ?", (conversation.id,)).fetchone()
    if there is not None and there["person"] != conversation.person:
        raise InputError(f"conversation {conversation.id}: is another person's; draw a new id")
    values = {
        "id": conversation.id, "person": conversation.person, "source": conversation.source,
        "messages": storable_json(conversation.messages, "conversation.messages"), "policy": conversation.policy,
        "fingerprint": conversation.fingerprint, "sampler": storable_json(dict(conversation.sampler), "sampler"),
        "seed": conversation.seed, "columns": storable_json(dict(conversation.columns), "columns"),
        "consent": int(conversation.consent), "scrubbed": int(conversation.scrubbed), "expires": conversation.expires,
        "created": conversation.created or now,
    }  # fmt: skip
    replaced = ", ".join(f"{name} = excluded.{name}" for name in values if name not in ("id", "created"))
    db.execute(
        f"INSERT INTO conversations ({', '.join(values)}) VALUES ({', '.join('?' * len(values))})"
        f" ON CONFLICT (id) DO UPDATE SET {replaced}",
        tuple(values.values()),
    )


def put_feedback(db: Db, feedback: Feedback, now: float) -> bool:
    """Store feedback, in place of what has its id, and of a person's earlier thumb or vote on the same answers; returns
    False for a repeat, which changes nothing. Raises InputError where its id is another person's, or its conversation
    is missing or another person's."""
    content = json.dumps({name: getattr(feedback, name) for name in _CONTENT})
    said = (feedback.person, feedback.conversation, feedback.turn, feedback.kind, content, int(feedback.consent))
    there = db.execute(
        "SELECT person, conversation, turn, kind, content, consent FROM feedback WHERE id = ?", (feedback.id,)
    ).fetchone()
    if there is not None and there["person"] != feedback.person:
        raise InputError(f"feedback {feedback.id}: is another person's; draw a new id")
    if there is not None and tuple(there) == said:
        return False
    if feedback.conversation is not None:
        on = db.execute("SELECT person FROM conversations WHERE id = ?", (feedback.conversation,)).fetchone()
        if on is None or on["person"] != feedback.person:
            seen = f"{feedback.conversation} is not stored"
            raise InputError(f"feedback.conversation: {seen}; store it first, or send null")
    if feedback.kind != "edit":
        db.execute(
            "DELETE FROM feedback WHERE person = ? AND conversation = ? AND turn IS ? AND kind = ?"
            " AND json_extract(content, '$.responses') = json_extract(?, '$.responses')",
            said[:5],
        )
    db.execute(
        "INSERT OR REPLACE INTO feedback"
        " (id, person, conversation, turn, kind, content, consent, scrubbed, expires, created)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (feedback.id, *said, int(feedback.scrubbed), feedback.expires, feedback.created or now),
    )
    return True


_CONTENT = ("responses", "policies", "order", "thumb", "ranks", "edit", "tags")


def conversations(db: Db, now: float, usable: bool) -> Iterator[Conversation]:
    """Yield the conversations, or only those that may be used for training."""
    where = f"WHERE {USABLE}" if usable else ""
    for row in db.execute(f"SELECT * FROM conversations {where} ORDER BY created, id", (now,) if usable else ()):
        yield _conversation(row)


def conversation(db: Db, name: str) -> Conversation | None:
    """Return one conversation; None where it is not there."""
    row = db.execute("SELECT * FROM conversations WHERE id = ?", (name,)).fetchone()
    return None if row is None else _conversation(row)


def _conversation(row: sqlite3.Row) -> Conversation:
    read = dict(zip(row.keys(), row, strict=True))
    read |= {name: json.loads(row[name]) for name in ("messages", "sampler", "columns")}
    return Conversation(**read | {"consent": bool(row["consent"]), "scrubbed": bool(row["scrubbed"])})


def feedback(db: Db, now: float, usable: bool) -> Iterator[Feedback]:
    """Yield the feedback, or only what may be used for training, its conversation too."""
    where = f"WHERE {USABLE} AND conversation IN (SELECT id FROM conversations WHERE {USABLE})" if usable else ""
    for row in db.execute(f"SELECT * FROM feedback {where} ORDER BY created, id", (now, now) if usable else ()):
        content = json.loads(row["content"])
        lists = {name: tuple(content[name]) for name in ("responses", "policies", "order", "tags")}
        ranks = None if content["ranks"] is None else tuple(content["ranks"])
        yield Feedback(
            id=row["id"], person=row["person"], kind=row["kind"], conversation=row["conversation"], turn=row["turn"],
            thumb=content["thumb"], edit=content["edit"], ranks=ranks, consent=bool(row["consent"]),
            scrubbed=bool(row["scrubbed"]), expires=row["expires"], created=row["created"], **lists,
        )  # fmt: skip


# --- erasing --------------------------------------------------------------------------------------------------------


_SALT = "own.person_salt"
"""The setting that holds the store's own salt."""


def pseudonym(user: str, salt: str) -> str:
    """Return the name under which what a client calls `user` is kept, and can be erased."""
    return "user-" + hmac.new(salt.encode(), user.encode(), hashlib.sha256).hexdigest()[:16]


def labeler_of(person: str) -> str:
    """Return the labeler under which exports hold what a person said."""
    return f"user-{hashlib.sha256(person.encode()).hexdigest()[:12]}"


def drawn_salt(db: Db) -> str:
    """Return the store's own salt for pseudonyms, which is drawn where there is none, once for all servers."""
    db.execute("INSERT OR IGNORE INTO settings VALUES (?, ?)", (_SALT, json.dumps(secrets.token_hex(16))))
    return str(json.loads(db.execute("SELECT value FROM settings WHERE name = ?", (_SALT,)).fetchone()[0]))


def names_of(db: Db, person: str) -> list[str]:
    """Return the names under which a person may be kept: their own, and as a request's `user` where a server has kept
    anything here."""
    row = db.execute("SELECT value FROM settings WHERE name = ?", (_SALT,)).fetchone()
    return [person] if row is None else [person, pseudonym(person, str(json.loads(row["value"])))]


def erase_person(db: Db, person: str) -> dict[str, int]:
    """Delete a person's conversations and feedback, and the items that were made from them with their judgments, under
    all their names."""
    names = names_of(db, person)
    theirs = f"person IN ({', '.join('?' * len(names))})"
    return {
        "feedback": db.execute(
            f"DELETE FROM feedback WHERE {theirs} OR conversation IN (SELECT id FROM conversations WHERE {theirs})",
            names * 2,
        ).rowcount,
        "conversations": db.execute(f"DELETE FROM conversations WHERE {theirs}", names).rowcount,
        "items": db.execute(f"DELETE FROM items WHERE {theirs}", names).rowcount,
    }


def erase_annotator(db: Db, name: str) -> dict[str, int]:
    """Delete an annotator with their judgments; the places of those items open again."""
    row = db.execute("SELECT id FROM annotators WHERE name = ?", (name,)).fetchone()
    if row is None:
        return {"annotators": 0, "judgments": 0}
    of_theirs = "assignment IN (SELECT id FROM assignments WHERE annotator = ?)"
    judgments = db.execute(f"SELECT count(*) FROM judgments WHERE {of_theirs}", (row["id"],)).fetchone()[0]
    taken = db.execute(
        "SELECT item FROM assignments WHERE annotator = ? AND state IN ('leased', 'done') ORDER BY item", (row["id"],)
    ).fetchall()
    db.execute("DELETE FROM annotators WHERE id = ?", (row["id"],))  # and what refers to them
    for held in taken:
        assign.give_back(db, held["item"])
    return {"annotators": 1, "judgments": judgments}


def wipe(db: Db, path: Path) -> None:
    """Write the file anew, so that pages which once held deleted rows are gone, and empty the write-ahead log.

    Raises RunStopped where another process reads an older state all the while: the rows are deleted, and the same
    command wipes them when it is given again."""
    db.execute("VACUUM")
    if db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
        raise RunStopped(f"{path}: erased, but another process still reads the log; end it, and erase again to wipe it")


REVIEW = "review"
"""The source of items that were made of logged conversations, whose column `review_expires` ends them, too."""


def delete_expired(db: Db, now: float) -> int:
    """Delete conversations, feedback and reviewed items whose time has come; returns how many."""
    gone = "expires IS NOT NULL AND expires <= ?"
    count = db.execute(
        f"DELETE FROM feedback WHERE {gone} OR conversation IN (SELECT id FROM conversations WHERE {gone})", (now, now)
    ).rowcount
    reviewed = "source = ? AND json_extract(columns, '$.review_expires') <= ?"
    count += db.execute(f"DELETE FROM items WHERE {reviewed}", (REVIEW, now)).rowcount
    return int(count + db.execute(f"DELETE FROM conversations WHERE {gone}", (now,)).rowcount)
