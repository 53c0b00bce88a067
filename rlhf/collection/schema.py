"""The tables of the store, their versions, and opening a file: what is damaged or foreign is refused in one line.

`PRAGMA user_version` counts the migrations that a file has been through. A new version is another tuple of statements
at the end of `MIGRATIONS`; an older file gets it when it is opened, in one transaction.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlhf.errors import InputError, RunStopped, reason

APPLICATION = 0x524C4846  # "RLHF", which SQLite keeps in the file's head
BUSY_SECONDS = 30.0

# An item's queue number grows with every number drawn, so that an annotator's cursor in a line never meets an open item
# behind it: whatever opens again gets a new number. `places`: how many more annotators may get it; calibration and gold
# items, which all annotators get, keep 1. An assignment's `judgment` is its first one's id, and keeps an annotator's
# tasks in the order in which they were judged.
VERSION_1 = (
    "CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    "INSERT INTO settings VALUES ('queue', '0')",
    "CREATE TABLE guidelines (hash TEXT PRIMARY KEY, text TEXT NOT NULL, created REAL NOT NULL) WITHOUT ROWID",
    """CREATE TABLE annotators (
        id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE,
        kind TEXT NOT NULL CHECK (kind IN ('person', 'model', 'simulated')),
        token_hash TEXT UNIQUE, given INTEGER NOT NULL DEFAULT 0, created REAL NOT NULL)""",
    """CREATE TABLE items (
        id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, prompt TEXT NOT NULL, columns TEXT NOT NULL,
        source TEXT NOT NULL, tags TEXT NOT NULL, person TEXT, gold_ranks TEXT,
        line TEXT NOT NULL CHECK (line IN ('calibration', 'first', 'main', 'gold')), queue INTEGER NOT NULL,
        overlap INTEGER NOT NULL, places INTEGER NOT NULL CHECK (places >= 0), created REAL NOT NULL)""",
    "CREATE INDEX items_open ON items (line, queue, places) WHERE places > 0",
    "CREATE INDEX items_of_person ON items (person) WHERE person IS NOT NULL",
    """CREATE TABLE candidates (
        id INTEGER PRIMARY KEY, item INTEGER NOT NULL REFERENCES items ON DELETE CASCADE, position INTEGER NOT NULL,
        text TEXT NOT NULL, policy TEXT NOT NULL, fingerprint TEXT NOT NULL, sampler TEXT NOT NULL, seed INTEGER,
        UNIQUE (item, position))""",
    """CREATE TABLE cursors (
        annotator INTEGER NOT NULL REFERENCES annotators ON DELETE CASCADE, line TEXT NOT NULL,
        position INTEGER NOT NULL, PRIMARY KEY (annotator, line)) WITHOUT ROWID""",
    """CREATE TABLE assignments (
        id INTEGER PRIMARY KEY, item INTEGER NOT NULL REFERENCES items ON DELETE CASCADE,
        annotator INTEGER NOT NULL REFERENCES annotators ON DELETE CASCADE, shown TEXT NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('leased', 'done', 'skipped', 'expired')), reason TEXT NOT NULL DEFAULT '',
        leased REAL NOT NULL, lease_until REAL NOT NULL, judgment INTEGER, UNIQUE (item, annotator))""",
    "CREATE INDEX assignments_leased ON assignments (lease_until) WHERE state = 'leased'",
    "CREATE INDEX assignments_of ON assignments (annotator, state, leased)",
    "CREATE INDEX assignments_judged ON assignments (annotator, judgment) WHERE judgment IS NOT NULL",
    """CREATE TABLE judgments (
        id INTEGER PRIMARY KEY, submission TEXT NOT NULL UNIQUE,
        assignment INTEGER NOT NULL REFERENCES assignments ON DELETE CASCADE,
        supersedes INTEGER UNIQUE REFERENCES judgments ON DELETE CASCADE,
        ranks TEXT, ratings TEXT NOT NULL, rewrite TEXT, rewrite_of INTEGER, flags TEXT NOT NULL, comment TEXT NOT NULL,
        seconds REAL, guideline TEXT, created REAL NOT NULL)""",
    "CREATE INDEX judgments_of ON judgments (assignment, id)",
    """CREATE TRIGGER judgments_are_appended BEFORE UPDATE ON judgments
        BEGIN SELECT RAISE(ABORT, 'a judgment is never changed: another one supersedes it'); END""",
    """CREATE TABLE conversations (
        id TEXT PRIMARY KEY, person TEXT NOT NULL, source TEXT NOT NULL, messages TEXT NOT NULL, policy TEXT NOT NULL,
        fingerprint TEXT NOT NULL, sampler TEXT NOT NULL, seed INTEGER, columns TEXT NOT NULL,
        consent INTEGER NOT NULL, scrubbed INTEGER NOT NULL, expires REAL, created REAL NOT NULL)""",
    "CREATE INDEX conversations_of ON conversations (person)",
    "CREATE INDEX conversations_expire ON conversations (expires) WHERE expires IS NOT NULL",
    """CREATE TABLE feedback (
        id TEXT PRIMARY KEY, person TEXT NOT NULL,
        conversation TEXT REFERENCES conversations ON DELETE CASCADE, turn INTEGER,
        kind TEXT NOT NULL CHECK (kind IN ('thumb', 'edit', 'comparison')), content TEXT NOT NULL,
        consent INTEGER NOT NULL, scrubbed INTEGER NOT NULL, expires REAL, created REAL NOT NULL)""",
    "CREATE INDEX feedback_of ON feedback (person)",
    "CREATE INDEX feedback_on ON feedback (conversation)",
    "CREATE INDEX feedback_expires ON feedback (expires) WHERE expires IS NOT NULL",
)
MIGRATIONS: tuple[Sequence[str], ...] = (VERSION_1,)


def connect(path: Path) -> sqlite3.Connection:
    """Open a connection of the store's settings: every commit reaches the disk, what is deleted is overwritten."""
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    for pragma in ("foreign_keys = ON", "synchronous = FULL", "secure_delete = ON"):
        connection.execute(f"PRAGMA {pragma}").close()
    return connection


def prepare(path: Path, create: bool, migrations: Sequence[Sequence[str]] = MIGRATIONS) -> None:
    """Check a store's file, bring it to the newest version, or create it. Raises InputError."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name a file, such as {path / 'labels.db'}")
    if not path.exists():
        if not create:
            raise InputError(f"{path}: no such store; check the path, or let `rlhf label` or `import` make one")
        if not path.parent.is_dir():
            raise InputError(f"{path}: its folder {path.parent} doesn't exist; create it")
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))  # its owner's: it holds what people wrote
        except FileExistsError:
            pass  # another process was faster
        except OSError as error:
            raise InputError(f"{path}: can't be created: {error.strerror}; choose another place") from None
    with told(path), contextlib.closing(connect(path)) as connection:
        if _is_empty(connection):
            if not create:
                raise InputError(f"{path}: is empty, so no store of judgments; check the path")
            _write_ahead(connection, path)
        elif _pragma(connection, "application_id") != APPLICATION:
            raise InputError(f"{path}: an SQLite database, but no store of judgments; name another file")
        version = _pragma(connection, "user_version")
        if version > len(migrations):
            seen = f"its version {version} is newer than this program's {len(migrations)}"
            raise InputError(f"{path}: {seen}; upgrade rlhf-recipes")
        found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise sqlite3.DatabaseError(found)
        if version < len(migrations):
            _migrate(connection, migrations)


def _is_empty(connection: sqlite3.Connection) -> bool:
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    return tables == 0 and _pragma(connection, "application_id") == 0


def _migrate(connection: sqlite3.Connection, migrations: Sequence[Sequence[str]]) -> None:
    connection.execute("BEGIN IMMEDIATE")
    try:
        version = _pragma(connection, "user_version")  # another process may have been faster
        for statements in migrations[version:]:
            for statement in statements:
                connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION}")
        connection.execute(f"PRAGMA user_version = {len(migrations)}")
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


def _write_ahead(connection: sqlite3.Connection, path: Path) -> None:
    """Turn the write-ahead log on. Of several processes at once, SQLite lets one do it and tells the others at once
    that the file is busy."""
    end = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > end:
                raise
            time.sleep(0.01)
            continue
        if mode != "wal":
            raise InputError(f"{path}: this file system can't hold a write-ahead log; choose a local disk")
        return


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return int(connection.execute(f"PRAGMA {name}").fetchone()[0])


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """Turn what SQLite raises into errors of one line."""
    try:
        yield
    except (sqlite3.IntegrityError, sqlite3.ProgrammingError, sqlite3.NotSupportedError, sqlite3.DataError):
        raise  # ours to mend
    except sqlite3.OperationalError as error:
        text = str(error)
        if "locked" in text:
            seen = f"another process has held it for {BUSY_SECONDS:.0f} s"
            raise RunStopped(f"{path}: {seen}; nothing was stored, try again") from None
        if "full" in text or "disk I/O" in text:
            raise RunStopped(f"{path}: {text}; nothing was stored: free some space and try again") from None
        if "readonly" in text or "unable to open" in text:
            raise InputError(f"{path}: can't be written ({text}); check its permissions and its folder's") from None
        raise
    except sqlite3.DatabaseError as error:
        if "not a database" in str(error):
            raise InputError(f"{path}: no SQLite database, so no store of judgments; name another file") from None
        raise InputError(f"{path}: a damaged store ({reason(error)}); take the last copy of it") from None
