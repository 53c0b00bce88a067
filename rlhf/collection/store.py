"""The store: one SQLite file of items, candidates, assignments, judgments, conversations and feedback.

    with Store("labels.db") as store:
        store.add_items([Item(prompt, (Candidate("An apple."), Candidate("No.")))], overlap=3)
        store.add_annotator("ann")
        (task,) = store.lease("ann")
        store.submit("ann", Answer(assignment=task.assignment, submission=uuid4().hex, ranks={...}))

Several processes and threads may use one file at a time. A method that writes is one transaction, and what it returned
is on the disk: a process that is killed afterwards loses nothing, one that is killed before leaves nothing half done.
Every mistake raises an `InputError` of one line; where another process holds the file too long, `RunStopped`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from rlhf.collection import assign, content, personal, schema
from rlhf.collection.personal import Conversation, Feedback
from rlhf.collection.records import (
    KINDS,
    Annotator,
    Answer,
    Candidate,
    Guideline,
    HandedOn,
    Item,
    Judgment,
    Kind,
    Line,
    Outlook,
    Plan,
    Progress,
    Shown,
    Task,
    check_storable,
)
from rlhf.errors import InputError

__all__ = [
    "Annotator",
    "Answer",
    "Candidate",
    "Conversation",
    "Feedback",
    "Guideline",
    "HandedOn",
    "Item",
    "Judgment",
    "Kind",
    "Line",
    "Outlook",
    "Plan",
    "Progress",
    "Shown",
    "Store",
    "Task",
]


class Store:
    """A store's file, opened; each thread has a connection of its own. `clock` gives seconds since 1970."""

    def __init__(self, path: str | Path, create: bool = True, clock: Callable[[], float] = time.time) -> None:
        self.path, self.clock = Path(path), clock
        self._local, self._connections = threading.local(), list[sqlite3.Connection]()
        schema.prepare(self.path, create)

    def close(self) -> None:
        """Close all threads' connections."""
        while self._connections:
            self._connections.pop().close()
        self._local = threading.local()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Open a transaction that sees one state of the store throughout."""
        yield from self._transaction("BEGIN")

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Open a transaction that writes: it waits for other writers first, and is stored whole or not at all."""
        yield from self._transaction("BEGIN IMMEDIATE")

    def _transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        with schema.told(self.path):
            db = self._connection()
            db.execute(begin)
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    def _connection(self) -> sqlite3.Connection:
        """Return this thread's connection; a forked process opens its own."""
        if getattr(self._local, "process", None) != os.getpid():
            self._local.process = os.getpid()
            self._local.connection = schema.connect(self.path)
            self._connections.append(self._local.connection)
        connection: sqlite3.Connection = self._local.connection
        return connection

    # --- settings ---------------------------------------------------------------------------------------------------

    def put_setting(self, name: str, value: Any) -> None:
        """Keep a value that JSON can hold, under a name."""
        with self.writing() as db:
            db.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (f"own.{name}", json.dumps(value)))

    def setting(self, name: str, default: Any = None) -> Any:
        """Return a value that `put_setting` kept."""
        with self.reading() as db:
            row = db.execute("SELECT value FROM settings WHERE name = ?", (f"own.{name}",)).fetchone()
        return default if row is None else json.loads(row["value"])

    @property
    def plan(self) -> Plan:
        """Return how items are handed out."""
        return Plan(**self.setting("plan", {}))

    def set_plan(self, plan: Plan) -> None:
        """Change how items are handed out from now on."""
        self.put_setting("plan", asdict(plan))

    def set_guideline(self, text: str) -> Guideline:
        """Make a text the guideline that annotators get from now on; earlier ones are kept."""
        check_storable(text, "guideline")
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        with self.writing() as db:
            db.execute("INSERT OR IGNORE INTO guidelines VALUES (?, ?, ?)", (name, text, self.clock()))
        self.put_setting("guideline", name)
        return Guideline(name, text)

    def guideline(self, name: str | None = None) -> Guideline | None:
        """Return the guideline in force, or the one of a hash; None where there is none."""
        name = name or self.setting("guideline")
        with self.reading() as db:
            row = db.execute("SELECT hash, text FROM guidelines WHERE hash = ?", (name,)).fetchone()
        return None if row is None else Guideline(row["hash"], row["text"])

    # --- annotators -------------------------------------------------------------------------------------------------

    def add_annotator(self, name: str, kind: Kind = "person") -> Annotator:
        """Return the annotator of a name, added where there is none."""
        check_storable(name, "annotator")
        if not name.strip() or len(name) > 80 or not name.isprintable():
            raise InputError(f"annotator: got {name[:90]!r}; use a name of 1 to 80 visible characters")
        if kind not in KINDS:
            raise InputError(f"annotator {name}: kind {kind!r}; use one of {', '.join(KINDS)}")
        with self.writing() as db:
            db.execute(
                "INSERT OR IGNORE INTO annotators (name, kind, created) VALUES (?, ?, ?)", (name, kind, self.clock())
            )
            row = self._annotator(db, name)
        if row["kind"] != kind:
            raise InputError(f"annotator {name}: is a {row['kind']} already, not a {kind}; choose another name")
        return content.annotator(row)

    def invite(self, name: str, kind: Kind = "person") -> str:
        """Return a new token for an annotator, who is added where there is none. The store keeps its hash alone; an
        earlier token of theirs ends."""
        self.add_annotator(name, kind)
        token = secrets.token_urlsafe(32)
        with self.writing() as db:
            db.execute("UPDATE annotators SET token_hash = ? WHERE name = ?", (_hashed(token), name))
        return token

    def annotator_of(self, token: str) -> Annotator | None:
        """Return whom a token lets in; None for nobody."""
        with self.reading() as db:
            row = db.execute("SELECT * FROM annotators WHERE token_hash = ?", (_hashed(token),)).fetchone()
        return None if row is None else content.annotator(row)

    def annotators(self) -> list[Annotator]:
        """Return all annotators by their names."""
        with self.reading() as db:
            return content.annotators(db)

    def _annotator(self, db: sqlite3.Connection, name: str) -> sqlite3.Row:
        row: sqlite3.Row | None = db.execute("SELECT * FROM annotators WHERE name = ?", (name,)).fetchone()
        if row is None:
            raise InputError(f"annotator {name}: is not in the store; invite or add them first")
        return row

    # --- items ------------------------------------------------------------------------------------------------------

    def add_items(self, items: Iterable[Item], overlap: int = 1, line: Line = "main") -> list[int]:
        """Store items for `overlap` annotators each, and return their ids; one that is there keeps its own, and opens
        to more annotators where `overlap` is larger than it was.

        line: "calibration" and "gold" items go to all annotators, calibration first; a gold item that is there gets the
        new ranks; an `overlap` of 0 hands an item to nobody."""
        with self.writing() as db:
            return [content.add_item(db, item, overlap, line, self.clock())[0] for item in items]

    def items(self) -> list[Item]:
        """Return all items in the order in which they were stored."""
        with self.reading() as db:
            return list(content.items(db))

    def put_first(self, items: Sequence[int]) -> None:
        """Have these open items labelled next, in this order: they go to the front of what everybody gets."""
        with self.writing() as db:
            for number, item in zip(assign.draw_numbers(db, len(items)), items, strict=True):
                db.execute(
                    "UPDATE items SET line = 'first', queue = ? WHERE id = ? AND line IN ('first', 'main')",
                    (number, item),
                )

    # --- labelling --------------------------------------------------------------------------------------------------

    def lease(self, annotator: str, count: int = 1) -> tuple[Task, ...]:
        """Return up to `count` tasks for an annotator: those that they hold, renewed, then new ones; none: all is done.

        Everybody gets the calibration items first; then what was handed back, then the other items, with gold items
        mixed in. No item goes to more than its `overlap` of annotators, nor twice to one."""
        plan = self.plan
        with self.writing() as db:
            found = assign.lease(db, self._annotator(db, annotator), plan, self.clock(), count)
            return tuple(content.task(db, assignment) for assignment in found)

    def renew(self, annotator: str, assignment: int) -> bool:
        """Let an annotator who is still at work keep a task; returns False where its lease has ended."""
        until = self.clock() + self.plan.lease_seconds
        with self.writing() as db:
            held = assign.own(db, self._annotator(db, annotator)["id"], assignment)
            db.execute("UPDATE assignments SET lease_until = ? WHERE id = ? AND state = 'leased'", (until, assignment))
        return bool(held["state"] == "leased")

    def submit(self, annotator: str, answer: Answer) -> Judgment:
        """Store an answer; a second one to the same task supersedes the first. A repeat of a submission returns what
        was stored. Raises HandedOn where the lease had ended and others took the item, InputError for a mistake."""
        with self.writing() as db:
            stored = assign.submit(db, self._annotator(db, annotator)["id"], answer, self.clock())
            return content.judgment(db, stored)

    def skip(self, annotator: str, assignment: int, reason: str = "") -> None:
        """Hand a task back unjudged: others get it, this annotator does not. A repeat changes nothing."""
        check_storable(reason, "reason")
        with self.writing() as db:
            assign.skip(db, self._annotator(db, annotator)["id"], assignment, reason)

    def task(self, annotator: str, assignment: int) -> Task:
        """Return one of the annotator's tasks, judged or not."""
        with self.reading() as db:
            assign.own(db, self._annotator(db, annotator)["id"], assignment)
            return content.task(db, assignment)

    def history(self, annotator: str, before: int | None = None, count: int = 1) -> tuple[Task, ...]:
        """Return the annotator's last judged tasks with their answers, the last one first; of those that they judged
        before the assignment `before`, where it is named and judged. An edit does not move a task."""
        with self.reading() as db:
            return content.history(db, self._annotator(db, annotator)["id"], before, count)

    def progress(self, annotator: str) -> Progress:
        """Return how far an annotator is."""
        with self.reading() as db:
            return assign.progress(db, self._annotator(db, annotator)["id"])

    def outlook(self, annotator: str) -> Outlook:
        """Return what is left for an annotator; it looks at every open item."""
        with self.reading() as db:
            return assign.outlook(db, self._annotator(db, annotator)["id"])

    def judgments(self, superseded: bool = False) -> list[Judgment]:
        """Return the judgments by item and annotator; with `superseded` those that edits replaced, too."""
        with self.reading() as db:
            return list(content.judgments(db, superseded))

    # --- the playground ---------------------------------------------------------------------------------------------

    def add_conversation(self, conversation: Conversation) -> None:
        """Store a conversation; one of the same id and person is replaced."""
        with self.writing() as db:
            personal.put_conversation(db, conversation, self.clock())

    def add_feedback(self, feedback: Feedback) -> bool:
        """Store feedback, in place of what has its id, and of a person's earlier thumb or vote on the same answers;
        returns False for a repeat, which is not stored again."""
        with self.writing() as db:
            return personal.put_feedback(db, feedback, self.clock())

    def conversation(self, id: str) -> Conversation | None:
        """Return a conversation; None where it is not there."""
        with self.reading() as db:
            return personal.conversation(db, id)

    def conversations(self, usable: bool = True) -> list[Conversation]:
        """Return the conversations that may be used for training (consent, scrubbed, not expired), or all."""
        with self.reading() as db:
            return list(personal.conversations(db, self.clock(), usable))

    def feedback(self, usable: bool = True) -> list[Feedback]:
        """Return the feedback that may be used for training, its conversation stored and usable too; or all."""
        with self.reading() as db:
            return list(personal.feedback(db, self.clock(), usable))

    def expire(self) -> int:
        """Erase the conversations, feedback and reviewed items whose time has come, and return how many."""
        with self.writing() as db:
            gone = personal.delete_expired(db, self.clock())
        if gone:
            self._wipe()
        return gone

    def erase(self, *, person: str | None = None, annotator: str | None = None) -> dict[str, int]:
        """Erase a person's conversations and feedback with the items made from them, or an annotator with all of their
        judgments; returns how many rows of each. The bytes are gone from the file and from its write-ahead log."""
        if (person is None) == (annotator is None):
            raise InputError("erase: name a person or an annotator")
        with self.writing() as db:
            if person is not None:
                gone = personal.erase_person(db, person)
            else:
                gone = personal.erase_annotator(db, str(annotator))
        self._wipe()
        return gone

    def _wipe(self) -> None:
        with schema.told(self.path):
            personal.wipe(self._connection(), self.path)


def _hashed(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
