"""Read the rows of one file: JSON lines, a JSON array, CSV, TSV, Parquet, Arrow or text, plain or compressed.

The name says which of them a file is; where its content is something else (a Parquet file called .jsonl, a web page, a
Git LFS pointer), the error names what it is.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf.errors import InputError, reason, short
from rlhf.rows.arrow import row_reader

KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
"""Ends of the names of files that hold rows."""


def wrong(name: str, seen: str, todo: str) -> InputError:
    """Make the error of one field or file: the value seen there, and what to do about it."""
    return InputError(f"{name}: {seen}; {todo}")


def show(value: object) -> str:
    """Write a value as Python would, as one short line."""
    return short(repr(value))


def _unzstd(raw: bytes) -> bytes:
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.BufferReader(raw), "zstd").read()


# By the end of a name: the format's name, a compressed file's first bytes, and what decompresses it.
_COMPRESSED: dict[str, tuple[str, bytes, Callable[[bytes], bytes]]] = {
    ".gz": ("gzip", b"\x1f\x8b", gzip.decompress),
    ".zst": ("zstd", b"\x28\xb5\x2f\xfd", _unzstd),
    ".bz2": ("bzip2", b"BZh", bz2.decompress),
    ".xz": ("xz", b"\xfd7zXZ\x00", lzma.decompress),
}
_DAMAGED = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)

# The first bytes of what is no text, what it is, and what to do.
_FOREIGN = (
    (rb"PAR1", "a Parquet file", "name it .parquet"),
    (rb"ARROW1|\xff\xff\xff\xff", "an Arrow file", "name it .arrow"),
    (rb"version https://git-lfs", "a Git LFS pointer and not the data", "run git lfs pull, or download the file"),
    (rb"(?i)\s*(<!doctype|<html)", "a web page", "download the file itself: on the hub, /resolve/ in place of /blob/"),
    (rb"\s*<\?xml", "an XML document", "write its rows as JSON lines"),
    (rb"PK\x03\x04", "a zip archive or a workbook", "unpack it; save a workbook as CSV"),
    (rb"7z\xbc\xaf|Rar!", "an archive", "unpack it"),
    (rb"(?s).{257}ustar", "a tar archive", "unpack it"),
    (rb"\xff\xfe|\xfe\xff|\x00\x00\xfe\xff", "UTF-16 or UTF-32 text", "save the file as UTF-8"),
    (rb"[^\x00]\x00[^\x00]\x00|\x00[^\x00]\x00[^\x00]", "UTF-16 text without its mark", "save the file as UTF-8"),
    (rb"SQLite format 3", "an SQLite database", "write its rows as JSON lines"),
    (rb"%PDF", "a PDF document", "write its rows as JSON lines"),
    (rb"\x80[\x02-\x05]", "a Python pickle", "write its rows as JSON lines"),
    (rb"(?s).{0,64}\x00", "binary data", "write its rows as JSON lines"),
)

# Columns of a table that stay text where all cells look like numbers; of others, numbers become numbers.
_TEXT = {
    "prompt", "chosen", "rejected", "completion", "messages", "question", "instruction", "input", "query", "problem",
    "request", "system", "system_prompt", "system_message", "context", "history", "answer", "response", "output",
    "solution", "target", "text",
}  # fmt: skip
_ONE_OF_SEVERAL = re.compile(r"(response|answer|completion|output|human_ref)[_ ]?[0-9a-k]", re.IGNORECASE)
_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,999})(\.[0-9]+)?([eE][-+]?[0-9]+)?")  # JSON's, none of thousands of digits


def kind_of(name: str) -> tuple[str, str]:
    """Return what stands before a file name's end, and that end without its compression; "" where it is none of
    KINDS."""
    for end in _COMPRESSED:
        name = name.removesuffix(end)
    kind = next((kind for kind in KINDS if name.lower().endswith(kind)), "")
    return name[: len(name) - len(kind)], kind


def file_rows(path: Path, columns: Mapping[str, str] | None = None) -> Iterator[tuple[str, object]]:
    """Yield (where, row) pairs; `where` is file:line, or the row's number in a file without lines. columns: our names
    of a table's columns -> theirs, which say what is text. Raises InputError."""
    kind = kind_of(path.name)[1]
    if kind in (".parquet", ".arrow"):
        rows = (_parquet if kind == ".parquet" else _arrow)(path)
        yield from ((f"{path}: row {n}", row) for n, row in enumerate(rows))
        return
    content = _content(path)
    first = content.lstrip()[:1]
    if kind == ".json" and first == b"[":
        yield from ((f"{path}: row {n}", row) for n, row in enumerate(_parse(content, path, None)))
        return
    if kind == ".json":
        _refuse_one_object(content, path)
    empty = True
    rows_of: Iterator[tuple[int, Any]]
    if kind in (".csv", ".tsv"):
        rows_of = _table(_text(content, path, None), path, kind, columns or {})
    elif kind == ".txt" and first != b"{":
        lines = re.split(r"\r\n|\r|\n", _text(content, path, None))
        rows_of = ((n, {"prompt": line.strip()}) for n, line in enumerate(lines, start=1) if line.strip())
    else:
        lines_of = enumerate(content.split(b"\n"), start=1)
        rows_of = ((number, _parse(line, path, number)) for number, line in lines_of if line.strip())
    for number, row in rows_of:
        empty = False
        yield f"{path}:{number}", row
    if empty:
        raise wrong(str(path), "the file is empty", "write one JSON object per line")


# --- content --------------------------------------------------------------------------------------------------------


def _content(path: Path) -> bytes:
    """Return a text file's bytes, decompressed and without a byte-order mark."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise wrong(str(path), f"can't be read: {error.strerror}", "check its permissions") from error
    named = _COMPRESSED.get(path.suffix)
    name, _, decompress = next((c for c in _COMPRESSED.values() if raw.startswith(c[1])), ("", b"", None))
    if decompress is None:
        _refuse_foreign(raw, path)
        if named:
            raise wrong(str(path), f"not a {named[0]} file", f"take {path.suffix} off its name or compress it")
    else:
        try:
            raw = decompress(raw)
        except _DAMAGED as error:
            raise wrong(str(path), f"a damaged {name} file ({reason(error)})", "copy it again") from error
        _refuse_foreign(raw, path)
    return raw.removeprefix(b"\xef\xbb\xbf")


def _refuse_foreign(raw: bytes, path: Path) -> None:
    head = raw[:512]
    for pattern, seen, todo in _FOREIGN:
        if re.match(pattern, head):
            raise wrong(str(path), seen, todo)


def _text(content: bytes, path: Path, number: int | None) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        where = f"{path}:{number or content[: error.start].count(bytes([10])) + 1}"
        raise wrong(where, f"byte {error.start} isn't UTF-8", "save the file as UTF-8") from None


def _parse(content: bytes, path: Path, number: int | None) -> Any:
    """Return a JSON value: a line of a file, or (number None) the whole file."""
    text = _text(content, path, number)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where, todo = f"{path}:{number or error.lineno}", "write one object per line"
        if number == 1 and error.pos == 0 and re.match(r"[\w ]+[,;\t]\s*\w", text):
            todo += ", or name a table .csv or .tsv"
        raise wrong(where, f"broken JSON at column {error.colno}, {error.msg}", todo) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets a thousand deep
        raise wrong(f"{path}:{number or 1}", f"JSON that can't be read: {reason(error)}", "mend it") from None


def _refuse_one_object(content: bytes, path: Path) -> None:
    """Raise InputError for a .json file that is one object and no row: a table by columns, or over several lines."""
    try:
        whole = json.loads(content)
    except (ValueError, RecursionError):
        return  # one object per line, or broken: then its line says so
    if isinstance(whole, dict) and whole and all(isinstance(v, dict) and "0" in v for v in whole.values()):
        raise wrong(str(path), "a table by columns", "write it by rows: to_json(orient='records', lines=True)")
    if isinstance(whole, dict) and b"\n" in content.strip():
        seen = f"one object over several lines, with {short(', '.join(whole))}"
        raise wrong(str(path), seen, "write one object per line, or an array of them")


# --- tables ---------------------------------------------------------------------------------------------------------


def _table(text: str, path: Path, kind: str, ours: Mapping[str, str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line, row) of a table with a header. An empty cell is None; a column of numbers holds numbers."""
    header = text.partition("\n")[0]
    separator = "\t" if kind == ".tsv" else max(",;\t", key=header.count)
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    names, lines, rows = list[str](), list[int](), list[list[str]]()
    try:
        for cells in reader:
            if not cells:
                continue
            if not names:
                names = [name.strip() for name in cells]
                continue
            if len(cells) != len(names):
                seen = f"{len(cells)} cells for {len(names)} columns ({show(header)})"
                raise wrong(f"{path}:{reader.line_num}", seen, "quote cells that hold a separator or a line break")
            lines.append(reader.line_num)
            rows.append(cells)
    except csv.Error as error:
        raise wrong(f"{path}:{reader.line_num}", f"a broken cell ({error})", "double the quotes in it") from None
    texts = {theirs for name, theirs in ours.items() if name in _TEXT}
    columns: dict[str, list[Any]] = {}
    for name, column in zip(names, zip(*rows, strict=True), strict=False):
        if name in columns:
            raise wrong(f"{path}:1", f"two columns are called {name!r}", "rename one of them")
        if name:  # pandas writes its index without a name
            text_here = name in _TEXT or name in texts or _ONE_OF_SEVERAL.fullmatch(name)
            columns[name] = [cell or None for cell in column] if text_here else _typed(column)
    for n, line in enumerate(lines):
        yield line, {name: values[n] for name, values in columns.items()}


def _typed(cells: tuple[str, ...]) -> list[Any]:
    if not all(_NUMBER.fullmatch(cell) for cell in cells if cell):
        return [cell or None for cell in cells]
    return [json.loads(cell) if cell else None for cell in cells]


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        read = row_reader(file.schema_arrow)
        for batch in file.iter_batches():
            yield from map(read, batch.to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise _no_table(path, "a Parquet", (b"PAR1",), error) from error


def _arrow(path: Path) -> Iterator[dict[str, Any]]:
    """Read Arrow's stream format, in which datasets writes, or its file format."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as source:
            batches: Iterator[Any]
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            if is_file:
                whole = pyarrow.ipc.open_file(source)
                batches = (whole.get_batch(n) for n in range(whole.num_record_batches))
            else:
                batches = iter(pyarrow.ipc.open_stream(source))
            for batch in batches:
                yield from map(row_reader(batch.schema), batch.to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise _no_table(path, "an Arrow", (b"ARROW1", b"\xff\xff\xff\xff"), error) from error


def _no_table(path: Path, kind: str, starts: tuple[bytes, ...], error: Exception) -> InputError:
    """Make the error of a table that can't be read: what the file is instead, or how it is damaged."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as unread:
        return wrong(str(path), f"can't be read: {unread.strerror}", "check its permissions")
    if not head:
        return wrong(str(path), "the file is empty", "write it again")
    if not head.startswith(starts):
        try:
            _refuse_foreign(head, path)
        except InputError as refused:
            return refused
        return wrong(str(path), f"not {kind} file", f"take {path.suffix} off its name")
    return wrong(str(path), f"{kind} file that can't be read ({reason(error)})", "copy it again")
