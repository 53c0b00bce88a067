"""JSON lines: one value per line, where nothing but a line feed ends a line.

Texts hold other line breaks as they are (U+2028, U+0085, a form feed), at which `str.splitlines` would cut them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rlhf.errors import InputError

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
