"""Several sources as one, with weights; and a source whose columns have other names.

A source may be a list of paths or names, or of ``{path: ..., weight: ..., columns: ...}``. Its records are those of the
parts, one after the other (trainers draw their order with the seed). A weight of 2 takes each record of a part twice,
0.5 every second one: the same records in every run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from rlhf.rows.asked import CONTEXT, QUESTIONS
from rlhf.rows.sources import show, wrong

Sources: TypeAlias = str | list[str | dict[str, Any]]
"""A source as a config names it: a path or hub name, or a list of them with weights."""

Item = TypeVar("Item")
_KEYS = ("path", "weight", "columns")


@dataclass(frozen=True)
class Part:
    """One source of several. `columns`: our names of columns, and what they are called there."""

    path: str | Path
    weight: float = 1.0
    columns: Mapping[str, str] | None = None


def parts_of(source: object) -> list[Part] | None:
    """Return the parts of a list of sources; None for any other source, a list of rows too. Raises InputError."""
    if not isinstance(source, list | tuple) or not source or not all(map(_is_part, source)):
        return None
    return [_part(item) for item in source]


def paths_of(source: object) -> list[str]:
    """Return the paths and names that a source holds; of None, none."""
    parts = parts_of(source)
    return [str(part.path) for part in parts] if parts else [str(source)] if source else []


def mapped(source: Any, columns: Mapping[str, str] | None) -> Any:
    """Return a source of a config with its `columns`, which those parts keep that have their own."""
    if source is None or not columns:
        return source
    items = source if isinstance(source, list) else [source]
    return [{"columns": dict(columns), **(item if isinstance(item, dict) else {"path": item})} for item in items]


def weighed(items: Sequence[Item], weight: float) -> list[Item]:
    """Return each item as often as the weight says; of a fraction, evenly spaced ones.

    Item n is there floor((n + 1) w) - floor(n w) times, so that of N items there are floor(N w)."""
    return [item for n, item in enumerate(items) for _ in range(math.floor((n + 1) * weight) - math.floor(n * weight))]


def renamed(row: dict[str, Any], columns: Mapping[str, str] | None) -> dict[str, Any]:
    """Return a row whose columns have our names. columns: our name -> theirs, which may lead into an object
    (question.full_text). A column that already has our name is replaced; an object stays, unless it is a question or
    context, of which the columns chose what is the prompt. Raises InputError where one is missing."""
    if not columns:
        return row
    taken = {ours: _value(row, theirs, ours) for ours, theirs in columns.items()}
    used = {*columns.values(), *({theirs.partition(".")[0] for theirs in columns.values()} & {*QUESTIONS, *CONTEXT})}
    return {name: value for name, value in row.items() if name not in used} | taken


def _value(row: Mapping[str, Any], theirs: str, ours: str) -> Any:
    value: Any = row
    for key in [theirs] if theirs in row else theirs.split("."):
        if not isinstance(value, Mapping) or key not in value:
            todo = f"write {theirs}: {ours}, our name first" if ours in row else "name a column that is there"
            raise wrong(f"columns: {ours}", f"no {theirs!r} among {', '.join(map(str, row))}", todo)
        value = value[key]
    return value


def _is_part(item: object) -> bool:
    return isinstance(item, str | Path) or (isinstance(item, dict) and "path" in item and item.keys() <= set(_KEYS))


def _part(item: Any) -> Part:
    if isinstance(item, str | Path):
        return Part(item)
    path, weight, columns = item["path"], item.get("weight", 1.0), item.get("columns")
    if not isinstance(path, str | Path) or not str(path).strip():
        raise wrong("path", f"got {show(path)}", "name a file, a folder or a data set")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise wrong(f"{path}: weight", f"got {show(weight)}", "write a number above 0, such as 2 or 0.5")
    if columns is not None and not (
        isinstance(columns, dict) and all(isinstance(text, str) for pair in columns.items() for text in pair)
    ):
        raise wrong(f"{path}: columns", f"got {show(columns)}", "write our names with theirs, as {prompt: question}")
    return Part(path, float(weight), columns)
