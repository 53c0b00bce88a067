"""What a run has left on disk, and facts bound to it: a value, the file and place it stands in, the file's hash.

A card is made of facts alone, so that `check` can find every number of it again, and say which file has changed since.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.errors import InputError
from rlhf.rows.jsonl import read_object, read_rows
from rlhf.run.tables import number

_FOLDERS = re.compile(r"(?<![\w.:/~-])(?:[A-Za-z]:)?[/\\](?:[^\s/\\'\",:;]+[/\\])+")
ROWS = "number of rows"
"""The place of a fact that counts a file's rows."""


@dataclass(frozen=True)
class Fact:
    """A line of a card: what it says, and where that stands."""

    what: str
    text: str
    file: str
    """Below the run's folder."""
    places: tuple[str, ...]
    """JSON pointers (RFC 6901) of the values, or ROWS."""
    form: str = "{0}"
    """How the values, each written by `shown`, make the text."""

    @property
    def source(self) -> str:
        """Return the file and the place of the first value."""
        return f"{self.file}: {self.places[0]}"


class Artefacts:
    """The files of a run that its card reads; `hashes` names each file that was read, with its sha256."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.hashes: dict[str, str] = {}
        self._content: dict[str, Any] = {}

    def files(self, *patterns: str) -> list[str]:
        """Return the files that match a pattern, by their paths below the run's folder."""
        found = {path for pattern in patterns for path in self.folder.glob(pattern) if path.is_file()}
        return sorted(path.relative_to(self.folder).as_posix() for path in found)

    def there(self, file: str) -> bool:
        """Return whether a file is there."""
        return (self.folder / file).is_file()

    def read(self, file: str) -> dict[str, Any]:
        """Read a JSON object and note the file's hash. Raises InputError."""
        if file not in self._content:
            self._content[file] = read_object(self.folder / file)
            self._note(file)
        content: dict[str, Any] = self._content[file]
        return content

    def rows(self, file: str) -> list[dict[str, Any]]:
        """Read a file of JSON lines and note its hash. Raises InputError."""
        if file not in self._content:
            self._content[file] = [row for _, row in read_rows(self.folder / file)]
            self._note(file)
        content: list[dict[str, Any]] = self._content[file]
        return content

    def _note(self, file: str) -> None:
        self.hashes[file] = hash_of(self.folder / file)

    def fact(self, what: str, file: str, *places: str, form: str = "{0}") -> Fact | None:
        """Make a fact of the values at these places; None where the file or the first of them is not there, or null.

        A further place that is null is left out, with what stands around it, by taking the form's first part alone."""
        if not self.there(file):
            return None
        values = [value_at(self.read(file), place) for place in places]
        if values[0] is None:
            return None
        if any(value is None for value in values):
            places, form, values = places[:1], "{0}", values[:1]
        return Fact(what, form.format(*map(shown, values)), file, places, form)

    def measured(self, what: str, file: str, place: str) -> Fact | None:
        """Make a fact of a metric: value, interval and n."""
        if not self.there(file):
            return None
        metric = value_at(self.read(file), place)
        if not isinstance(metric, Mapping) or metric.get("value") is None:
            return None
        names = [name for name in ("value", "low", "high", "n") if metric.get(name) is not None]
        form = {4: "{0} [{1}, {2}], n {3}", 3: "{0} [{1}, {2}]", 2: "{0}, n {1}"}.get(len(names), "{0}")
        return self.fact(what, file, *(f"{place}/{name}" for name in names), form=form)

    def count(self, what: str, file: str) -> Fact:
        """Make a fact of a file's number of rows. Raises InputError."""
        return Fact(what, shown(len(self.rows(file))), file, (ROWS,))


def hash_of(file: Path) -> str:
    """Return a file's sha256."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def place_of(*keys: str | int) -> str:
    """Return the JSON pointer of keys."""
    return "".join("/" + str(key).replace("~", "~0").replace("/", "~1") for key in keys)


def value_at(content: Any, place: str) -> Any:
    """Return the value at a JSON pointer; None where there is none."""
    for part in place.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(content, list):
            content = content[int(key)] if key.isdecimal() and int(key) < len(content) else None
        else:
            content = content.get(key) if isinstance(content, Mapping) else None
    return content


def shown(value: Any) -> str:
    """Write a value as a card shows it: numbers in few digits, texts without the folders that lead to a file."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return number(value)
    if isinstance(value, str):
        return without_folders(value)
    return without_folders(json.dumps(value, ensure_ascii=False))


def without_folders(text: str) -> str:
    """Return a text in which absolute paths are their last parts: a card may leave this machine."""
    return _FOLDERS.sub("", text)


def check(card: Mapping[str, Any], folder: str | Path) -> list[str]:
    """Compare a card with the run's files; return a line for each file that has changed or is gone, and each fact that
    would read otherwise now. [] where the card holds. Raises InputError for a file that is no card."""
    facts, hashes = card.get("facts"), card.get("artefacts")
    if not isinstance(facts, list) or not isinstance(hashes, Mapping):
        raise InputError("is no card (it has facts and artefacts)")
    artefacts, found = Artefacts(folder), []
    for file, digest in hashes.items():
        if not artefacts.there(file):
            found.append(f"{file}: is gone")
        elif hash_of(artefacts.folder / file) != digest:
            found.append(f"{file}: has changed since the card was written")
    for row in facts:
        fact = Fact(row["what"], row["text"], row["file"], tuple(row["places"]), row["form"])
        if artefacts.there(fact.file) and (now := _again(artefacts, fact)) != fact.text:
            found.append(f"{fact.source}: {fact.what}: the card says {fact.text!r}, the file {now!r}")
    return found


def _again(artefacts: Artefacts, fact: Fact) -> str | None:
    """Write a fact's text anew from its file; None where it is not there any more."""
    try:
        if fact.places == (ROWS,):
            return artefacts.count(fact.what, fact.file).text
        made = artefacts.fact(fact.what, fact.file, *fact.places, form=fact.form)
    except (InputError, IndexError):
        return None
    return made.text if made else None


def as_rows(facts: Sequence[Fact]) -> list[dict[str, Any]]:
    """Return facts as JSON objects."""
    return [
        {"what": fact.what, "text": fact.text, "file": fact.file, "places": list(fact.places), "form": fact.form}
        for fact in facts
    ]
