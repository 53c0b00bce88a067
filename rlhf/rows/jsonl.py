"""JSON lines, one value per line, where nothing but a line feed ends a line; and small files of one JSON object.

Texts hold other line breaks as they are (U+2028, U+0085, a form feed), at which `str.splitlines` would cut them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rlhf.errors import InputError, reason

NOT_FINITE = {"NaN": None, "Infinity": "inf", "-Infinity": "-inf"}


def to_line(row: object, default: Callable[[Any], Any] | None = None) -> bytes:
    """Return a value as one line of UTF-8; ``default`` converts what JSON cannot hold.

    JSON has no NaN, which becomes null, and no infinity, which becomes the text "inf" or "-inf"."""
    try:
        text = json.dumps(row, ensure_ascii=False, default=default, allow_nan=False)
    except ValueError:
        row = json.loads(json.dumps(row, default=default), parse_constant=NOT_FINITE.get)
        text = json.dumps(row, ensure_ascii=False)
    try:
        return (text + "\n").encode()
    except UnicodeEncodeError:  # half a surrogate pair, which only an escape can hold
        return (json.dumps(row, default=default) + "\n").encode()


def lines_of(path: str | Path) -> list[bytes]:
    """Return a file's lines, each with its line feed; the last one has none if a killed run has cut it. Raises
    InputError."""
    try:
        *whole, last = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    return [line + b"\n" for line in whole] + ([last] if last else [])


def read_rows(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield every row with its line's number; a last line that a killed run has cut is left out. Raises InputError."""
    for number, line in enumerate(lines_of(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"expected an object, got a {type(row).__name__}")
        except (ValueError, RecursionError) as error:
            if not line.endswith(b"\n"):
                return
            raise InputError(f"{path}:{number}: broken JSON: {error}") from None
        yield number, row


def read_object(path: str | Path, missing: str = "check the path", kind: str = "JSON object") -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises InputError for a file that is missing (with the advice `missing`), unreadable, cut short or no such `kind`.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        seen = "is a folder" if path.is_dir() else "no such file"
        raise InputError(f"{path}: {seen}; {missing}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read, broken JSON: {reason(error)}; it was cut short or changed") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: is no {kind}: it holds a {type(content).__name__} instead of a JSON object")
    return content
