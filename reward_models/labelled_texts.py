"""Texts with a label per category: their rows, and the text of a conversation.

Rows of these shapes are read (further columns are kept):

* flat: ``{"prompt": "...", "S": 1, "H": 0}``, as OpenAI's moderation set is; a category that is missing or null is
  unknown, not 0;
* nested: ``{"text": "...", "labels": {"S": 1, "H": null}}``.

The text is `messages`, `text` or `prompt`, the first that is there, and a response beside it is the assistant's turn;
whatever `talks` reads as one conversation will do. Of flat rows, categories are the columns that hold nothing but 0, 1,
true, false and null.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from reward_models.talks import TEXTS, conversations_in
from rlhf.errors import InputError, short
from rlhf.rows.messages import Messages, check_messages, text_of
from rlhf.rows.mixed import parts_of, renamed, weighed
from rlhf.rows.records import BadRows, OnBadRow, Prompt, prompt_key, split_key
from rlhf.rows.sources import Source, name_of, rows, show, wrong

logger = logging.getLogger("rlhf")

ANSWERS = ("response", "completion")
"""Columns that are no labels, whatever they hold, as TEXTS."""
NO_CATEGORY = ("weight", "margin", "labeler", "split_group", "seed", "id", "index", "turn", "row", "train")
"""Columns of 0 and 1 that are no labels."""


@dataclass(frozen=True)
class LabelledText:
    """A text, or a conversation, and what is known of its categories."""

    prompt: Messages
    labels: Mapping[str, bool]
    """Without the categories of which nothing is known."""
    columns: dict[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False, repr=False)

    @property
    def text(self) -> str:
        """Return what a model reads."""
        return text_of(self.prompt)


def read_labelled(
    source: Source, split: str = "train", categories: Sequence[str] | None = None, on_bad_row: OnBadRow = "refuse"
) -> list[LabelledText]:
    """Read labelled texts. categories: whose labels are read; by default all that the rows have.

    Raises InputError, also for rows without a single label; where categories are named, rows may have none."""
    found = _rows(source, split)
    known = list(categories) if categories is not None else categories_in([row for _, row in found], name_of(source))
    bad, records = BadRows(name_of(source), on_bad_row), list[LabelledText]()
    for where, row in found:
        try:
            records.append(row if isinstance(row, LabelledText) else _record(row, known, where))
        except InputError as error:
            bad.add(where, error)
    bad.tell(len(records))
    if not records:
        raise wrong(name_of(source), "no rows", "hand in at least one")
    if categories is None and not any(record.labels for record in records):
        raise wrong(f"{name_of(source)}: labels", f"none in {len(records)} rows", "label some texts")
    return records


def _rows(source: Source, split: str) -> list[tuple[str, object]]:
    """Return the rows of a source with their places; of several sources, one after the other, by their weights."""
    parts = parts_of(source)
    if parts is None:
        return list(rows(source, split))
    found: list[tuple[str, object]] = []
    for part in parts:
        own = [(where, renamed(row, part.columns) if isinstance(row, dict) else row)
               for where, row in rows(part.path, split, part.columns)]  # fmt: skip
        found += weighed(own, part.weight)
    return found


def categories_of(records: Sequence[LabelledText]) -> list[str]:
    """Return the categories that have a label, in the order in which they come."""
    return list(dict.fromkeys(name for record in records for name in record.labels))


def labels_of(records: Sequence[LabelledText], categories: Sequence[str]) -> np.ndarray:
    """Return [texts, categories]: 1, 0, or NaN where nothing is known."""
    rows = [[float(record.labels.get(name, np.nan)) for name in categories] for record in records]
    return np.array(rows, dtype=np.float64).reshape(len(records), len(categories))


def apart_from(records: Sequence[LabelledText], others: Sequence[LabelledText], name: str) -> list[LabelledText]:
    """Leave out the records whose text or `split_group` is also among `others`, and count them in the log: a text that
    is trained on measures nothing. Raises InputError where nothing remains."""
    there = {key for record in others for key in _keys(record)}
    kept = [record for record in records if there.isdisjoint(_keys(record))]
    if len(kept) < len(records):
        left = len(records) - len(kept)
        logger.warning("%s: left out %d of %d texts that are held out, too", name, left, len(records))
    if not kept:
        raise InputError(f"{name}: every text is held out, too; hand in others")
    return kept


def _keys(record: LabelledText) -> set[str]:
    return {prompt_key(record.prompt), split_key(Prompt(record.prompt, dict(record.columns)))}


# ------------------------------------------------------------------------------------------------ one row


def _record(row: object, categories: Sequence[str], where: str) -> LabelledText:
    if not isinstance(row, Mapping):
        raise InputError(f"got {show(row)}; write an object with a text and its labels")
    talks = conversations_in(row)
    if len(talks) > 1:
        raise wrong("response", f"{len(talks)} in one row", "a label is of one: write a row for each, or take them out")
    nested = row.get("labels") is not None
    labels = labels_in(row, categories)
    apart = {*TEXTS, *ANSWERS, "labels", *(() if nested else categories)}
    return LabelledText(
        check_messages(talks[0], "text"), labels, {k: v for k, v in row.items() if k not in apart}, where
    )


def labels_in(row: Mapping[str, Any], categories: Sequence[str]) -> dict[str, bool]:
    """Return what a row says of the categories, without those that it says nothing of. Raises InputError."""
    held = row if row.get("labels") is None else row["labels"]
    if not isinstance(held, Mapping):
        raise wrong("labels", f"got {show(held)}", "write an object of category to 0, 1 or null")
    return {name: _truth(held[name], name) for name in categories if held.get(name) is not None}


def _truth(value: object, name: str) -> bool:
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    raise wrong(name, f"got {show(value)}", "write 1 or true, 0 or false, or null where it is not known")


def categories_in(found: Sequence[object], name: str) -> list[str]:
    """Find the categories of rows: the names in `labels`, else the columns of 0 and 1. Raises InputError for rows
    without one."""
    names: dict[str, bool] = {}
    labels, others = Counter[str](), dict[str, list[object]]()
    for row in found:
        if isinstance(row, LabelledText):
            names |= dict.fromkeys(row.labels, True)
            continue
        if not isinstance(row, Mapping):
            continue
        nested = row.get("labels")
        held = nested if isinstance(nested, Mapping) else row
        for column, value in held.items():
            if value is None or (held is row and column in (*TEXTS, *ANSWERS, *NO_CATEGORY, "labels")):
                continue
            fits = isinstance(value, bool | int | float) and value in (0, 1)
            names[str(column)] = names.get(str(column), True) and (fits or held is not row)
            if fits:
                labels[str(column)] += 1
            else:
                others.setdefault(str(column), []).append(value)
    for column, values in others.items():
        if not names[column] and labels[column] >= 10 * len(values):  # a mistake in a few rows, most likely
            seen = f"{show(values[0])} stands in it beside {labels[column]:,} labels"
            logger.warning("%s: column %s is no category: %s; write 0, 1 or null there", name, short(column), seen)
    categories = [column for column, fits in names.items() if fits]
    if not categories:
        seen = f"no column of 0 and 1 among {', '.join(short(column) for column in names) or 'no columns'}"
        raise wrong(f"{name}: labels", seen, "write a column per category, or labels: {category: 0 or 1}")
    return categories
