"""The store's file: created, migrated, refused."""

from __future__ import annotations

import os
import sqlite3
import stat
import threading
from pathlib import Path

import pytest
from reference.labelling import answer, items

from rlhf.collection import schema
from rlhf.collection.store import Store
from rlhf.errors import InputError, RunStopped


def filled(path: Path, count: int = 300) -> Path:
    with Store(path) as store:
        store.add_items(items(count))
        store.add_annotator("ann")
        store.submit("ann", answer(store.lease("ann")[0]))
    return path


def test_a_new_store_waits_for_the_disk_and_is_its_owners(tmp_path):
    path = filled(tmp_path / "labels.db")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    wanted = {
        "journal_mode": "wal",
        "synchronous": 2,
        "secure_delete": 1,
        "foreign_keys": 1,
        "application_id": int.from_bytes(b"RLHF", "big"),
        "user_version": len(schema.MIGRATIONS),
    }
    with Store(path) as store, store.reading() as db:
        assert {name: db.execute(f"PRAGMA {name}").fetchone()[0] for name in wanted} == wanted


MADE_UP = (
    "CREATE TABLE moods (annotator INTEGER NOT NULL REFERENCES annotators ON DELETE CASCADE, mood TEXT NOT NULL)",
    "INSERT INTO moods SELECT id, 'calm' FROM annotators",
    "ALTER TABLE items ADD COLUMN urgency INTEGER NOT NULL DEFAULT 0",
)


def test_an_older_file_is_brought_to_the_newest_version(tmp_path):
    path = filled(tmp_path / "labels.db")
    schema.prepare(path, create=False, migrations=(*schema.MIGRATIONS, MADE_UP))
    db = sqlite3.connect(path)
    assert db.execute("PRAGMA user_version").fetchone() == (len(schema.MIGRATIONS) + 1,)
    assert db.execute("SELECT mood FROM moods").fetchall() == [("calm",)]
    assert db.execute("SELECT count(*), sum(urgency) FROM items").fetchone() == (300, 0)
    assert db.execute("SELECT count(*) FROM judgments").fetchone() == (1,)
    db.close()


def test_a_migration_that_fails_changes_nothing(tmp_path):
    path = filled(tmp_path / "labels.db")
    with pytest.raises(sqlite3.OperationalError, match="nowhere"):
        schema.prepare(path, False, (*schema.MIGRATIONS, (*MADE_UP, "INSERT INTO nowhere VALUES (1)")))
    with Store(path) as store, store.reading() as db:
        assert db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'moods'").fetchone()[0] == 0
        assert db.execute("PRAGMA user_version").fetchone()[0] == len(schema.MIGRATIONS)


def test_a_newer_file_is_refused(tmp_path):
    path = filled(tmp_path / "labels.db")
    schema.prepare(path, False, (*schema.MIGRATIONS, MADE_UP))
    with pytest.raises(InputError, match=r"labels\.db: its version 2 is newer than this program's 1; upgrade"):
        Store(path)


def test_many_may_create_one_file_at_once(tmp_path):
    path, errors = tmp_path / "labels.db", list[BaseException]()

    def create() -> None:
        try:
            with Store(path) as store:
                store.add_items(items(1))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=create) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    with Store(path) as store:
        assert len(store.items()) == 1


def foreign(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE visits (url TEXT)")
    db.commit()
    db.close()


def truncated(path: Path) -> None:
    filled(path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def scribbled(path: Path) -> None:
    filled(path)
    size = path.stat().st_size
    with path.open("r+b") as file:
        for place in range(8192, size, 4096):
            file.seek(place)
            file.write(os.urandom(2048))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.write_text("prompt,chosen\n" * 200), "no SQLite database, so no store of judgments"),
        (lambda path: path.write_bytes(b""), "is empty, so no store of judgments"),
        (lambda path: path.mkdir(), "is a folder; name a file"),
        (lambda path: None, "no such store"),
        (foreign, "an SQLite database, but no store of judgments"),
        (truncated, "a damaged store"),
        (scribbled, "a damaged store"),
    ],
    ids=["text", "empty", "folder", "missing", "foreign", "truncated", "scribbled"],
)
def test_what_is_no_store_is_refused_in_one_line(tmp_path, make, said):
    path = tmp_path / "labels.db"
    make(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(InputError) as raised:
        Store(path, create=False)
    assert str(raised.value).startswith(f"{path}: {said}")
    assert "\n" not in str(raised.value)
    assert (path.read_bytes() if path.is_file() else None) == before


def test_a_place_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"its folder .* doesn't exist"):
        Store(tmp_path / "nowhere" / "labels.db")


def test_damage_that_comes_later_is_one_line_too(tmp_path):
    path = filled(tmp_path / "labels.db")
    store = Store(path)
    scribbled_again = path.stat().st_size
    with path.open("r+b") as file:
        for place in range(4096, scribbled_again, 4096):
            file.seek(place)
            file.write(os.urandom(4096))
    with pytest.raises(InputError, match="a damaged store"):
        store.items()
    store.close()


def test_a_mistake_in_our_own_code_is_not_called_damage(tmp_path):
    with Store(filled(tmp_path / "labels.db")) as store:
        with pytest.raises(sqlite3.OperationalError, match="no such table"), store.reading() as db:
            db.execute("SELECT * FROM nowhere")
        with pytest.raises(sqlite3.ProgrammingError, match="bindings"), store.reading() as db:
            db.execute("SELECT ?")
        assert len(store.items()) == 300


def test_a_store_that_another_process_holds_stops_the_run(tmp_path, monkeypatch):
    path = filled(tmp_path / "labels.db")
    monkeypatch.setattr(schema, "BUSY_SECONDS", 0.05)
    with Store(path) as store, Store(path) as other, other.writing():
        with pytest.raises(RunStopped, match="another process has held it"):
            store.add_annotator("bob")
        assert len(store.items()) == 300  # whoever reads does not wait
