"""Answers that a model has given already, in an SQLite file that only grows: nothing is asked twice.

An answer's key is the hash of all that decides it: the model's content, the prompt as token ids (or its messages, where
a server renders them), the sampler's settings and the row's seed. So an interrupted run goes on where it was, another
eval with the same questions asks none of them again, and a policy that was trained on is asked anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rlhf.errors import InputError
from rlhf.run.fingerprint import canonical

VERSION = 1
"""Of the table; a file with another `user_version` is refused."""


def key_of(**decides: Any) -> str:
    """Return the key of an answer: the sha256 of what decides it."""
    return hashlib.sha256(canonical(decides)).hexdigest()


class Answers:
    """A file of answers. Each one is kept once its model has given it, in the transaction of its batch."""

    def __init__(self, path: str | Path) -> None:
        """Open a file, which is made where it is not there. Raises InputError for a file that is none of answers."""
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = sqlite3.connect(self.path, timeout=60.0, isolation_level=None)
            (version,) = self.file.execute("PRAGMA user_version").fetchone()
            (tables,) = self.file.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if version not in (0, VERSION) or (version == 0 and tables):
                raise InputError(f"{path}: is no file of answers of this version; name another one with --answers")
            with contextlib.suppress(sqlite3.OperationalError):  # a network disk may have no shared memory
                self.file.execute("PRAGMA journal_mode = WAL")
            self.file.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)")
            self.file.execute(f"PRAGMA user_version = {VERSION}")
        except sqlite3.Error as error:
            raise InputError(
                f"{path}: cannot be used for answers ({error}); name another file with --answers"
            ) from None

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.file.close()

    def known(self, keys: Sequence[str]) -> dict[str, Any]:
        """Return those of the answers that are there, by key."""
        found: dict[str, Any] = {}
        for start in range(0, len(keys), 500):  # SQLite's limit of places in a statement
            part = list(dict.fromkeys(keys[start : start + 500]))
            places = ",".join("?" * len(part))
            rows = self.file.execute(f"SELECT key, answer FROM answers WHERE key IN ({places})", part)
            found |= {key: json.loads(answer) for key, answer in rows}
        return found

    def keep(self, answers: Mapping[str, Any]) -> None:
        """Keep answers, all or none of them; what is there already stays."""
        rows = [(key, json.dumps(answer)) for key, answer in answers.items()]
        self.file.execute("BEGIN IMMEDIATE")
        try:
            self.file.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?)", rows)
        except BaseException:
            self.file.execute("ROLLBACK")
            raise
        self.file.execute("COMMIT")
