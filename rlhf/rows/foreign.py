"""Bring rows of the shapes that people have (`shapes`) into our fields, and say what a row is that can't be read.

The rows of a file are of one shape, which the log names once with their number. Rows that have our own fields stay as
they are. What has no shape of the table is refused in one line: what it looks like, and how to write it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any, TypeVar

from rlhf.errors import InputError, reason
from rlhf.rows import asked, fields
from rlhf.rows.comparisons import ALONE, EMPTY
from rlhf.rows.exports import two_responses
from rlhf.rows.fields import FIELDS, Missing, Row, Unusable
from rlhf.rows.mixed import renamed
from rlhf.rows.shapes import SHAPES, Shape, named, nearest, recognised
from rlhf.rows.sources import wrong

logger = logging.getLogger("rlhf")

Read = TypeVar("Read")

_OBJECTS = {
    "conversations", "conversation", "conversation_a", "conversation_b", "answers", "completions", "context", "history",
    "summaries", "info", "data", "annotations", "snapshot", "meta", "chat",
}  # fmt: skip
"""Columns that tables hold as JSON."""

_COMPARISON = "prompt, chosen and rejected (a tie: prompt, responses and equal ranks)"
_RANKING = "prompt, responses and ranks (smaller is better)"

# Rows that are recognised and not read: the columns that tell them, what they are, and what to write instead.
_REFUSED = (
    (("trajectory", "chosen", "rejected"), "an UltraInteract pair", "write the trajectory as prompt, in messages"),
    (("summaries", "choice"), "a comparison of summaries", f"write {_COMPARISON} from info, summaries and choice"),
    (("answers",), "a row of answers with ranks (Nectar)", f"write {_RANKING} from answers"),
    (("completions", "labels"), "an answer in labelled steps", "write prompt and completion, the steps joined"),
    (("completions",), "several completions (UltraFeedback, NeMo-RL)", f"write {_RANKING} from completions"),
    (("message_tree_id", "prompt"), "an OASST tree", f"write {_RANKING} from a message's replies"),
    (("message_id", "text"), "a turn of an OASST tree", f"write {_RANKING} from a turn's replies"),
    (("prompt", "completion", "label"), "a KTO row", f"write {_COMPARISON} from the rows of one prompt"),
    (("conversations",), "a conversation (ShareGPT)", "write messages, each turn with role and content"),
    (("text",), "a text in one piece", "write messages, each with role and content, or prompt and completion"),
    (("messages",), "a conversation", ""),
    (("prompt", "completion"), "a demonstration", ""),
)


# --- rows that are read ---------------------------------------------------------------------------------------------


def translated(
    rows: Iterable[tuple[str, object]], wanted: str, name: str, columns: Mapping[str, str] | None = None
) -> Iterator[tuple[str, Any]]:
    """Yield (where, row) pairs, rows of a known shape in our fields; in the place of a row that can't be read, the
    InputError or Unusable.

    wanted: "ranking", "demonstration" or "prompt". name: the source's, for the log. columns: our names of columns, and
    what they are called in these rows."""
    counts: dict[str, list[int]] = {}  # a shape's name -> rows, records, ties
    for shape, found in _by_shape(rows, wanted, columns):
        if shape is None:
            yield from found
            continue
        count = counts.setdefault(shape.name, [0, 0, 0])
        count[0] += len(found)
        for where, row in _ours(shape, found, wanted):
            if isinstance(row, dict):
                count[1] += 1
                count[2] += len(set(row.get("ranks", ()))) == 1
            yield where, row
    for shape_name, (seen, records, ties) in counts.items():
        told = f", of which {ties} are ties without a pair" if ties and wanted == "ranking" else ""
        _tell_once(f"{name}: {seen} rows of {shape_name} give {records} {wanted}s{told}")


def _by_shape(
    rows: Iterable[tuple[str, object]], wanted: str, columns: Mapping[str, str] | None
) -> Iterator[tuple[Shape | None, list[tuple[str, Any]]]]:
    """Yield rows with their shape, None for rows of our own and errors: each alone, or all of a file where the shape
    wants them together."""
    first: dict[str, Shape | None] = {}  # file -> the shape of its first row
    held: list[tuple[str, Any]] = []
    file = ""
    for where, row in rows:
        if held and where.rpartition(":")[0] != file:
            yield first[file], held
            held = []
        file = where.rpartition(":")[0]
        if not isinstance(row, dict):
            yield None, [(where, row)]
            continue
        try:
            row = {key: decoded(key, value) for key, value in renamed(row, columns).items()}
            shape = _shape_of(row, wanted)
            if wanted == "prompt" and (shape is None or _has_prompt(row)):
                yield None, [(where, row)]
                continue
            if shape is not None or any(row.get(key) is not None for key in FIELDS):
                first.setdefault(file, shape)
            shape = _of_its_file(row, shape, first.get(file, shape))
        except InputError as error:
            yield None, [(where, error)]
            continue
        if shape is None:
            yield None, [(where, row)]
        elif shape.gather is not None and (wanted != "prompt" or shape.read is None):
            held.append((where, row))
        else:
            yield shape, [(where, row)]
    if held:
        yield first[file], held


def _shape_of(row: Row, wanted: str) -> Shape | None:
    """Return the shape by which a row is to be read; None for one that has our own fields."""
    sides = [row[name] for name in ("chosen", "rejected") if row.get(name) is not None]
    if row.get("conversations") is None or row.get("prompt") is not None:
        own = sides and not all(isinstance(side, dict) or _are_texts(side) for side in sides)
        if own or row.get("responses") is not None:
            return None
    imitated = any(row.get(name) is not None for name in ("messages", "completion"))
    if wanted == "demonstration" and imitated and not sides:
        return None
    if wanted == "ranking" and row.get("completion") is not None and not sides and fields.label_of(row) is not None:
        return None  # KTO's
    try:
        return recognised(row)
    except InputError:
        if wanted == "prompt":
            return None  # its prompt may be clear all the same
        raise


def _of_its_file(row: Row, shape: Shape | None, first: Shape | None) -> Shape | None:
    """Return the shape of a row in a file that began with `first`. Raises InputError where it is another one."""
    if shape is first:
        return shape
    unlike = any(row.get(name) is not None for name in FIELDS if first and name not in first.columns)
    if first is not None and (set(shape.columns) < set(first.columns) if shape else not unlike):
        for name in first.columns:
            if row.get(name) is None:
                seen = "got null" if name in row else "missing"
                raise wrong(name, f"{seen}, and the rows before are {first.name}", f"add {name!r} to the row")
        return first  # its function says what is wrong
    names = [f"{one.name} ({', '.join(one.columns)})" if one else "our own fields" for one in (shape, first)]
    raise InputError(f"a row of {names[0]} in a file of {names[1]}; write rows of one shape into one file")


def _has_prompt(row: Row) -> bool:
    """Return whether a row's prompt can be read as it stands, so that all its columns stay as they are."""
    marks = str(row.get("prompt"))
    if marks.startswith('["') or "<extra_id_1>" in marks:  # the turns of LMArena's users as JSON; HelpSteer2's turns
        return False
    try:
        fields.prompt_fields(row)
    except InputError:
        return False
    return True


def _ours(shape: Shape, rows: list[tuple[str, Row]], wanted: str) -> Iterator[tuple[str, Any]]:
    """Yield what rows of a shape give: our fields, with the columns that it doesn't use."""
    if shape.gather is not None and (wanted != "prompt" or shape.read is None):
        if wanted == "demonstration":
            rows, flawed = _by_label(rows)
            yield from flawed
        try:
            for where, found in shape.gather(rows):
                yield where, _as_wanted(found, {}, wanted, shape)
        except (InputError, *_BROKEN) as error:
            yield rows[0][0], error if isinstance(error, InputError) else _not_as_usual(error, shape)
        return
    assert shape.read is not None
    for where, row in rows:
        used = {*shape.columns, *shape.uses, *FIELDS} if wanted != "prompt" else set[str]()
        further = {key: value for key, value in row.items() if key not in used}
        try:
            result = shape.read(row)
            for one in [result] if isinstance(result, dict) else result:
                yield where, _as_wanted(one, further, wanted, shape)
        except (InputError, Unusable) as flaw:
            yield where, flaw
        except _BROKEN as error:
            yield where, _not_as_usual(error, shape)


def _by_label(rows: Iterable[tuple[str, Row]]) -> tuple[list[tuple[str, Row]], list[tuple[str, Exception]]]:
    """Return the rows that may be imitated, and why the others may not: their label is false, or can't be read."""
    good: list[tuple[str, Row]] = []
    flawed: list[tuple[str, Exception]] = []
    for where, row in rows:
        try:
            fields.obey_label(row)
            good.append((where, row))
        except (InputError, Unusable) as flaw:
            flawed.append((where, flaw))
    return good, flawed


_BROKEN = (KeyError, TypeError, AttributeError, IndexError, ValueError)


def _not_as_usual(error: Exception, shape: Shape) -> InputError:
    seen = f"{type(error).__name__} {reason(error)}"
    return wrong(", ".join(shape.columns), f"not as rows of {shape.name} have them ({seen})", "mend the row")


def _as_wanted(found: Any, further: Row, wanted: str, shape: Shape) -> Any:
    """Return a row of ours that gives what is wanted, or why it gives none."""
    if not isinstance(found, dict):
        return found
    if wanted == "prompt":
        return {**further, **({"prompt": found["prompt"]} if "prompt" in found else found)}
    responses = found.get("responses")
    if responses is not None and any(text is None or text == "" or str(text).isspace() for text in responses):
        return Unusable(EMPTY)
    if wanted == "ranking" and not (responses is not None and len(responses) > 1) and "chosen" not in found:
        if shape.compares:
            return Unusable(ALONE)
        return wrong(", ".join(shape.columns), f"a row of {shape.name}, and no comparison", f"write {_COMPARISON}")
    if wanted == "demonstration" and responses is not None and len(responses) < 2:
        if not responses:
            return Unusable(EMPTY)
        kept = {key: value for key, value in found.items() if key not in ("responses", "ranks")}
        found = {**kept, "completion": responses[0]}
    return {**further, **found}


def in_our_fields(row: Row) -> list[Row] | None:
    """Return what a row of a named shape gives by itself, in our fields; None for a row of no such shape, for one that
    is read together with others, and for a text in one piece. Raises InputError."""
    shape = named(row)
    if shape is None or shape.gather is not None or shape.columns == ("text",):
        return None
    found = [one for _, one in _ours(shape, [("", row)], "demonstration")]
    for one in found:
        if isinstance(one, Exception):
            raise InputError(f"{', '.join(shape.columns)}: {one}") from None
    return found


def decoded(name: str, value: Any) -> Any:
    """Return a column's value, of those that tables hold as JSON its content."""
    if name in FIELDS:
        return asked.decoded(name, value)
    if name not in _OBJECTS or not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


@cache
def _tell_once(message: str) -> None:
    logger.info(message)


# --- rows that are not ----------------------------------------------------------------------------------------------


def read(row: object, wanted: str, reader: Callable[[Any], Read]) -> Read:
    """Read a row of ours; where it is none, the error says what it looks like and how to write it."""
    try:
        return reader(row)
    except InputError as error:
        if not isinstance(row, dict):
            raise
        if told := advice(row, wanted):
            raise InputError(told) from None
        if isinstance(error, Missing) and not any(row.get(name) is not None for name in FIELDS):
            field = str(error).partition(":")[0]
            raise InputError(f"{error}, or name its column (columns: {{{field}: ...}}); {_known(row)}") from None
        raise


def advice(row: Mapping[str, Any], wanted: str) -> str | None:
    """Return what a row looks like, and how to write it ("seen; what to do"); None where it looks like nothing that is
    known, or has the fields that are read, so that the fault is in them."""
    given = {name for name, value in row.items() if value is not None}
    own = {"ranking": (), "demonstration": ("completion", "messages"), "prompt": ("prompt",)}[wanted]
    if any(isinstance(row.get(name), str | list) for name in own):
        return None
    refused = [kind for kind in _REFUSED if given.issuperset(kind[0]) and _usual(row, kind[0][0])]
    if pair := next((kind for kind in refused if "chosen" in kind[0]), None):
        return _refusal(pair, wanted)
    if {"chosen", "rejected"} & given or {"responses", "ranks"} <= given:
        return None
    if names := two_responses(given):
        return f"{', '.join(names)}: two responses, and no choice that is known; write {_COMPARISON}"
    return _refusal(refused[0], wanted) if refused else None


def _refusal(kind: tuple[tuple[str, ...], str, str], wanted: str) -> str | None:
    names, seen, todo = kind
    if wanted == "ranking" and kind in _REFUSED[-4:]:
        return f"{', '.join(names)}: {seen}, and no comparison; write {_COMPARISON}"
    return f"{', '.join(names)}: {seen}; {todo}" if todo else None


def _known(row: Mapping[str, Any]) -> str:
    """Name the shapes that are read, and the one whose columns are most like a row's."""
    shape = nearest(row)
    near = f"the nearest is {shape.name} ({', '.join(shape.columns)}); " if shape else ""
    return f"{near}the shapes that are read: {', '.join(dict.fromkeys(one.name for one in SHAPES))}"


def _usual(row: Mapping[str, Any], name: str) -> bool:
    """Return whether a column's value is of the type that the well-known sets have there."""
    if name in ("answers", "completions", "conversations", "summaries"):
        return isinstance(row[name], list | tuple)
    return name != "text" or isinstance(row[name], str)


def _are_texts(value: object) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, str) for item in value)
