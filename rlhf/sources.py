"""Read rows from files, folders, hub names, datasets objects and lists, each with its location (file:line)."""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from rlhf.errors import InputError, reason, short

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset

Source: TypeAlias = "str | Path | Sequence[object] | Dataset | IterableDataset | DatasetDict"
"""A path, a hub name, a datasets object or a list of rows."""


def wrong(name: str, seen: str, todo: str) -> InputError:
    """Make the error of one field: the value seen there, and what to do about it."""
    return InputError(f"{name}: {seen}; {todo}")


def show(value: object) -> str:
    """Write a value as Python would, as one short line."""
    return short(repr(value))


def name_of(source: Source) -> str:
    """Name a source in a message: its path or hub name, else its type."""
    return str(source) if isinstance(source, str | Path) else f"the {type(source).__name__}"


def rows(source: Source, split: str) -> Iterator[tuple[str, object]]:
    """Yield (where, row) pairs; `split` names the part of a folder, hub data set or DatasetDict."""
    if isinstance(source, str) and not source.strip():  # Path("") would be the current folder
        raise wrong("data", f"got {show(source)}", "name a file, a folder or a data set")
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if path.is_dir():
            yield from _folder_rows(path, split)
        elif path.is_file():
            yield from _file_rows(path)
        else:
            yield from rows(_from_hub(source, path, split), split)
    elif hasattr(source, "column_names") and isinstance(source, dict):  # a DatasetDict
        if split not in source:
            raise wrong("split", f"no {split!r} among {', '.join(source)}", "name one of these")
        yield from rows(source[split], split)
    elif hasattr(source, "column_names") or isinstance(source, list | tuple):
        yield from ((f"row {n}", row) for n, row in enumerate(source))
    else:
        raise wrong("data", f"got {show(source)}", "hand in a path, a datasets object or a list of rows")


def _folder_rows(folder: Path, split: str) -> Iterator[tuple[str, object]]:
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        from datasets import load_from_disk

        try:
            data = load_from_disk(str(folder))
        except Exception as error:  # datasets raises what pyarrow, json and fsspec raise
            raise wrong(str(folder), f"datasets can't load it: {reason(error)}", "save it again") from error
        yield from rows(data, split)
        return
    files = sorted(f for f in folder.iterdir() if f.name.endswith((".jsonl", ".jsonl.gz", ".json", ".json.gz")))
    if not files:
        raise wrong(str(folder), "no .jsonl, .jsonl.gz or .json file in this folder", "name the folder of the data")
    named = [f for f in files if re.match(r"(train|test|val|valid|validation|dev|eval)\b", f.name.replace("_", "-"))]
    chosen = [f for f in files if f.name.replace("_", "-").split(".")[0].split("-")[0] == split] if named else files
    if not chosen:
        raise wrong(str(folder), f"no file for split {split!r} among {', '.join(f.name for f in files)}",
                     f"add {split}.jsonl or name a file")  # fmt: skip
    for file in chosen:
        yield from _file_rows(file)


def _file_rows(path: Path) -> Iterator[tuple[str, object]]:
    lines = _content(path).split(b"\n")
    array = (
        path.name.endswith((".json", ".json.gz")) and next((x for x in lines if x.strip()), b"").lstrip()[:1] == b"["
    )
    if array:
        rows = _parse(b"\n".join(lines), path, None)
        yield from ((f"{path}: row {n}", row) for n, row in enumerate(rows))
        return
    empty = True
    for number, line in enumerate(lines, start=1):
        if line.strip():
            empty = False
            yield f"{path}:{number}", _parse(line, path, number)
    if empty:
        raise wrong(str(path), "the file is empty", "write one JSON object per line")


def _content(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        zipped = raw[:2] == b"\x1f\x8b"
        if path.suffix == ".gz" and not zipped:
            raise wrong(str(path), "not a gzip file", "take .gz off its name or compress it")
        raw = gzip.decompress(raw) if zipped else raw
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise wrong(str(path), f"a damaged gzip file ({reason(error)})", "copy it again") from error
    except OSError as error:
        raise wrong(str(path), f"can't be read: {error.strerror}", "check its permissions") from error
    return raw.removeprefix(b"\xef\xbb\xbf")


def _parse(line: bytes, path: Path, number: int | None) -> Any:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        where = f"{path}:{number or line[: error.start].count(bytes([10])) + 1}"
        raise wrong(where, f"byte {error.start} isn't UTF-8", "save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        where = f"{path}:{number or error.lineno}"
        raise wrong(where, f"broken JSON at column {error.colno}, {error.msg}", "write one object per line") from None


def require_there(source: str | Path) -> None:
    """Raise InputError for a source that looks like a path and doesn't exist. A hub name is not checked."""
    path, text = Path(source).expanduser(), str(source)
    looks_like_path = (isinstance(source, Path) or path.suffix in (".jsonl", ".json", ".gz", ".txt", ".csv", ".parquet")
                       or text.startswith((".", "/", "~")) or text.count("/") > 1)  # fmt: skip
    if looks_like_path and not path.exists():
        folder = path.parent
        near = get_close_matches(path.name, os.listdir(folder) if folder.is_dir() else [], n=1)
        raise wrong(text, "no such file or folder", f"did you mean {folder / near[0]}?" if near else "check the path")


def _from_hub(source: str | Path, path: Path, split: str) -> Source:
    """Load a data set from the hub. Raises InputError, also for a path that doesn't exist."""
    require_there(source)
    text = str(source)
    from datasets import load_dataset

    name, _, part = text.partition(":")
    try:
        try:
            return load_dataset(name, part or None, split=split)
        except ValueError as error:
            if not part or "BuilderConfig" not in str(error):
                raise
            return load_dataset(name, data_dir=part, split=split)  # no configuration: a folder of the data set
    except Exception as error:  # whatever the hub, the network or the data set's own files raise
        raise wrong(text, f"neither a file nor a data set that can be loaded: {reason(error)}",
                     "check the path or name, or the network") from error  # fmt: skip
