"""Read rows from files, folders, hub names, datasets objects and lists, each with its location (file:line).

A folder, hub data set or DatasetDict has splits: training reads "train", evaluation `HELD_OUT`, and ``name@split``
names one. In a folder the files' names say which split they belong to: ``pairs_test.jsonl`` is not training data.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from rlhf.errors import reason
from rlhf.rows.arrow import row_reader
from rlhf.rows.files import KINDS, file_rows, kind_of, show, wrong

__all__ = ["HELD_OUT", "DataSet", "Source", "name_of", "path_of", "require_there", "rows", "show", "wrong"]

logger = logging.getLogger("rlhf")


class DataSet(Protocol):
    """Has columns, as datasets' Dataset, IterableDataset and DatasetDict do: the package is imported by whoever made
    one."""

    @property
    def column_names(self) -> object:
        """Name the columns."""


Source: TypeAlias = str | Path | Sequence[object] | DataSet
"""A path, a hub name (with ``@split`` where another than the usual one is meant), a datasets object or a list of
rows."""

HELD_OUT = "held_out"
"""The split that evaluation reads: test, else validation, else the only one there is."""

# Words in the name of a split or file, those of one meaning together; datasets knows the same.
_MEANINGS = (
    ("train", "training"),
    ("heldout", "holdout", "test", "testing", "eval", "evaluation"),
    ("validation", "valid", "val", "dev"),
)

_ABOUT_DATA = re.compile(r"(?i)(licen[cs]e|readme|notice|requirements)([-_. ].*)?\.txt|dataset_infos?\.json")
"""Names of files beside those of the data."""


def name_of(source: Source) -> str:
    """Name a source in a message: its path or hub name, else its type."""
    return str(source) if isinstance(source, str | Path) else f"the {type(source).__name__}"


def path_of(source: str | Path) -> Path | None:
    """Return the file or folder that a source names, without its ``:part`` and ``@split``; None for a hub name."""
    place = _parted(source)[0]
    return next((p for p in (Path(place), Path(place.rpartition(":")[0] or place)) if p.exists()), None)


def rows(source: Source, split: str, columns: Mapping[str, str] | None = None) -> Iterator[tuple[str, object]]:
    """Yield (where, row) pairs; `split` names the part of a folder, hub data set or DatasetDict. columns: our names of
    columns -> theirs, by which a table's numbers stay text where we want text; the rows have theirs."""
    if isinstance(source, str) and not source.strip():  # Path("") would be the current folder
        raise wrong("data", f"got {show(source)}", "name a file, a folder or a data set")
    if isinstance(source, str | Path):
        place, asked = _parted(source)
        path = Path(place)
        if path.is_dir():
            yield from _folder_rows(path, asked or split, columns)
        elif path.is_file():
            if asked:
                raise wrong(str(source), f"a file has no split {asked!r}", f"name {place}")
            yield from file_rows(path, columns)
        else:
            yield from rows(_from_hub(source, place), asked or split, columns)
    elif hasattr(source, "column_names"):
        yield from _rows_of(source, split)
    elif isinstance(source, list | tuple):
        yield from ((f"row {n}", row) for n, row in enumerate(source))
    else:
        raise wrong("data", f"got {show(source)}", "hand in a path, a datasets object or a list of rows")


def _rows_of(data: Any, split: str) -> Iterator[tuple[str, object]]:
    """Yield those of an object of datasets."""
    if isinstance(data, dict):  # a DatasetDict
        found = [split] if split in data else _chosen(list(data), split)
        if len(found) != 1:
            seen = f"no {split!r} among {', '.join(data)}" if not found else f"{split!r} may be {', '.join(found)}"
            raise wrong("split", seen, f"name one of these, for a folder or hub name as NAME@{(found or [*data])[0]}")
        if found[0] != split:
            logger.info("split %s is read as %s", found[0], split)
        yield from rows(data[found[0]], split)
        return
    features = getattr(data, "features", None)
    read = row_reader(features.arrow_schema if features else None, decoded=True)
    yield from ((f"row {n}", read(row)) for n, row in enumerate(data))


def require_there(source: str | Path) -> None:
    """Raise InputError for a source that looks like a path and doesn't exist. A hub name is not checked."""
    text = _parted(source)[0]
    if "://" in text:
        raise wrong(text.partition("?")[0], "an address", "download the file, or name a hub data set as OWNER/NAME")
    path = Path(text)
    looks_like_path = (isinstance(source, Path) or bool(kind_of(path.name)[1]) or path.suffix == ".gz"
                       or text.startswith((".", "/", "~")) or text.count("/") > 1)  # fmt: skip
    if looks_like_path and path_of(source) is None:
        folder = path.parent
        near = get_close_matches(path.name, os.listdir(folder) if folder.is_dir() else [], n=1)
        todo = f"did you mean {folder / near[0]}?" if near else "check the path"
        raise wrong(str(source), "no such file or folder", todo)


# --- splits ---------------------------------------------------------------------------------------------------------


def _parted(source: str | Path) -> tuple[str, str]:
    """Split ``name@split`` into its parts, the second "" where there is none. A path that exists is a whole name."""
    text = str(Path(source).expanduser()) if str(source).startswith("~") else str(source)
    name, _, split = text.rpartition("@")
    return (text, "") if not name or "/" in split or Path(text).exists() else (name, split)


def _word_of(name: str) -> str | None:
    """Return the word in a file's or split's name that says what it is for; one of evaluation goes before "train"."""
    tokens = re.split(r"[-._ 0-9/]+", re.sub(r"(held|hold)[-_. ]out", r"\1out", name.lower()))
    words = [token for token in tokens if any(token in meaning for meaning in _MEANINGS)]
    return next((word for word in words if word not in _MEANINGS[0]), words[0] if words else None)


def _chosen(names: Sequence[str], split: str) -> list[str]:
    """Return those of the names (of splits, or of a folder's files) that belong to a split; none where none does."""
    own = re.sub(r"(held|hold)[-_ ]out", r"\1out", split.lower())
    same = next((meaning for meaning in _MEANINGS if own in meaning), ())
    if not same:
        return [name for name in names if name == split]
    wanted = (*_MEANINGS[1], *_MEANINGS[2]) if split == HELD_OUT else (own, *same)
    words = {name: _word_of(name) for name in names}
    for word in wanted:
        if found := [name for name in names if words[name] == word]:
            return found
    if split == HELD_OUT and len(set(words.values())) == 1:
        return list(names)  # there is one split; whoever names it for evaluation means it
    return [name for name in names if words[name] is None] if split == "train" else []


def _holds_rows(file: Path) -> bool:
    return file.is_file() and bool(kind_of(file.name)[1]) and not _ABOUT_DATA.fullmatch(file.name)


def _folder_rows(folder: Path, split: str, columns: Mapping[str, str] | None) -> Iterator[tuple[str, object]]:
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        from datasets import load_from_disk

        try:
            data = load_from_disk(str(folder))
        except Exception as error:  # datasets raises what pyarrow, json and fsspec raise
            raise wrong(str(folder), f"datasets can't load it: {reason(error)}", "save it again") from error
        yield from rows(data, split)
        return
    files = sorted(f for f in folder.iterdir() if _holds_rows(f) and not f.name.startswith("."))
    if not files:
        if not any(map(_holds_rows, folder.rglob("*"))):
            kinds = ", ".join(KINDS[:-1])
            raise wrong(str(folder), f"no {kinds} or {KINDS[-1]} file in this folder", "name the folder of the data")
        yield from rows(_loaded(str(folder), ""), split)  # a snapshot of a hub data set: datasets knows its layout
        return
    stems = {file: kind_of(file.name)[0] for file in files}
    found = set(_chosen(list(dict.fromkeys(stems.values())), split))
    chosen = [file for file in files if stems[file] in found]
    if not chosen:
        raise wrong(str(folder), f"no file for split {split!r} among {', '.join(f.name for f in files)}",
                     f"add {split}.jsonl or name a file")  # fmt: skip
    twice = next(([one, two] for one, two in pairwise(chosen) if stems[one] == stems[two]), None)
    if twice:
        raise wrong(str(folder), f"{twice[0].name} and {twice[1].name} have one name", "delete one, or name a file")
    for file in chosen:
        yield from file_rows(file, columns)


# --- the hub --------------------------------------------------------------------------------------------------------


def _from_hub(source: str | Path, place: str) -> Source:
    """Load a data set from the hub, or a part of a local folder. Raises InputError, also for a path that doesn't
    exist."""
    name, _, part = place.rpartition(":") if ":" in place else (place, "", "")
    if Path(name).is_dir() and (Path(name) / part).is_dir():
        return Path(name) / part
    require_there(source)
    return _loaded(name, part)


def _loaded(name: str, part: str) -> Source:
    """Load all splits of a hub data set or of a snapshot's folder; part: a configuration, or a folder in it."""
    from datasets import load_dataset

    try:
        try:
            return load_dataset(name, part or None)
        except ValueError as error:
            if not part or "BuilderConfig" not in str(error):
                raise
            return load_dataset(name, data_dir=part)  # no configuration: a folder of the data set
    except Exception as error:  # whatever the hub, the network or the data set's own files raise
        seen = f"neither a file nor a data set that can be loaded: {reason(error)}"
        todo = f"name one as {name}:CONFIGURATION" if "Config name is missing" in str(error) else (
            "check the path or name, or the network")  # fmt: skip
        raise wrong(f"{name}:{part}" if part else name, seen, todo) from error
