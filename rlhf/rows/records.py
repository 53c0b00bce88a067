"""Prompts, demonstrations and rankings as frozen records: reading, writing, and splitting by prompt.

`fields` lists our rows, `shapes` those of other sets; extra columns are kept in `.columns`, and `.where` says where a
row came from. A demonstration read from a ranking is its best response. A source is a file (`files` lists the kinds), a
folder of such files, one written by datasets' `save_to_disk` or a hub data set's snapshot, a name on the hub ("name",
or "name:part" with a configuration or folder of it), a `datasets` object, a list of rows, or several sources with
weights (`mixed`); "@split" after a name chooses a split. Every mistake raises an `InputError` of one line: file:line:
field: what was seen; what to do.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from rlhf.errors import InputError
from rlhf.rows import fields, foreign
from rlhf.rows.bad_rows import BadRows, OnBadRow, numbers, warn_once
from rlhf.rows.fields import Unusable
from rlhf.rows.jsonl import to_line
from rlhf.rows.messages import ROLES, Messages, check_messages, check_prompt, check_texts
from rlhf.rows.mixed import parts_of, weighed
from rlhf.rows.sources import HELD_OUT, Source, name_of, rows, show, wrong

__all__ = [
    "HELD_OUT",
    "ROLES",
    "BadRows",
    "Demonstration",
    "Messages",
    "OnBadRow",
    "Prompt",
    "Ranking",
    "Record",
    "StepLabels",
    "check_disjoint",
    "prompt_key",
    "read_demonstrations",
    "read_judged",
    "read_prompts",
    "read_rankings",
    "split_by_prompt",
    "split_key",
    "write_jsonl",
]


APART = {"apart": True}
"""Marks fields that came after runs had been fingerprinted, and decide nothing that is trained from their record."""


@dataclass(frozen=True)
class Prompt:
    """A conversation for a policy to answer. `text`: the row had a plain string, so reward functions get strings (trl's
    rule)."""

    messages: Messages
    columns: dict[str, Any] = field(default_factory=dict)
    text: bool = False
    where: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        check_prompt(self.messages, "prompt")


@dataclass(frozen=True)
class Demonstration:
    """A conversation to imitate. The loss is on assistant turns whose index is at least `trained_from`."""

    messages: Messages
    trained_from: int = 0
    columns: dict[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        check_messages(self.messages, "messages")
        if self.messages[-1]["role"] != "assistant":
            raise wrong("messages", f"the last turn is {self.messages[-1]['role']!r}", "end with an assistant turn")
        if not 0 <= self.trained_from < len(self.messages):
            raise wrong("trained_from", f"got {self.trained_from} of {len(self.messages)} turns", "use a turn's index")

    @property
    def prompt(self) -> Messages:
        return self.messages[:-1]

    @property
    def response(self) -> str:
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class Ranking:
    """K responses to one prompt and their ranks: a smaller rank is better, equal ranks tie. `text`: as a Prompt's."""

    prompt: Messages
    responses: tuple[str, ...]
    ranks: tuple[float, ...]
    columns: dict[str, Any] = field(default_factory=dict)
    thinking: tuple[str, ...] = field(default=(), metadata=APART)
    """Of each response, "" for none; empty where none has any. It is not compared, and imitated with its response."""
    text: bool = field(default=False, compare=False, metadata=APART)
    where: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        check_prompt(self.prompt, "prompt")
        check_texts(self.responses, "responses")
        if len(self.responses) < 2:
            raise wrong("responses", f"got {len(self.responses)}", "a ranking compares at least 2 responses")
        for rank in self.ranks:
            if isinstance(rank, bool) or not isinstance(rank, int | float) or not abs(rank) < 1e300:  # as floats can
                raise wrong("ranks", f"got {show(rank)}", "write a number per response, smaller is better")
        if len(self.ranks) != len(self.responses):
            seen = f"got {len(self.ranks)} ranks for {len(self.responses)} responses"
            raise wrong("ranks", seen, "write one number per response")

    def turn(self, n: int) -> dict[str, Any]:
        """Return a response as an assistant's turn, with its thinking."""
        thought = {"reasoning_content": self.thinking[n]} if self.thinking and self.thinking[n] else {}
        return {"role": "assistant", "content": self.responses[n], **thought}

    def pairs(self) -> list[tuple[int, int]]:
        """Return indices (better, worse) of all pairs, without ties and responses of the same text."""
        n = range(len(self.responses))
        return [(i, j) for i in n for j in n
                if self.ranks[i] < self.ranks[j] and self.responses[i] != self.responses[j]]  # fmt: skip


@dataclass(frozen=True)
class StepLabels:
    """An answer worked out in steps, each labelled 1 (right), 0 (neutral), -1 (wrong) or None (unknown)."""

    prompt: Messages
    steps: tuple[str, ...]
    labels: tuple[int | None, ...]
    columns: dict[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        check_prompt(self.prompt, "prompt")
        check_texts(self.steps, "steps")
        if len(self.labels) != len(self.steps):
            raise wrong("labels", f"got {len(self.labels)} for {len(self.steps)} steps", "write one label per step")
        for label in self.labels:
            if isinstance(label, bool) or label not in (-1, 0, 1, None):
                raise wrong("labels", f"got {show(label)}", "use 1 (right), 0 (neutral), -1 (wrong) or null (unknown)")


Record = TypeVar("Record", Prompt, Demonstration, Ranking, StepLabels)
_AnyRecord = Prompt | Demonstration | Ranking | StepLabels


def read_prompts(source: Source, split: str = "train", on_bad_row: OnBadRow = "refuse") -> list[Prompt]:
    """Read prompts from rows of any accepted shape. Raises InputError."""
    return _read(source, split, on_bad_row, "prompt", _to_prompt)


def read_demonstrations(source: Source, split: str = "train", on_bad_row: OnBadRow = "refuse") -> list[Demonstration]:
    """Read demonstrations; a preference row gives its best response (the first of equals), one whose `weight` is
    0 and a row whose `label` is false (KTO) none. Raises InputError."""
    return _read(source, split, on_bad_row, "demonstration", _to_demonstration)


def read_rankings(source: Source, split: str = "train", on_bad_row: OnBadRow = "refuse") -> list[Ranking]:
    """Read rankings. Identical responses are ties; their thinking is not compared, which the log says. Raises
    InputError, also for a source without a single pair."""
    return _with_pairs(source, _read(source, split, on_bad_row, "ranking", _to_ranking))


def read_judged(source: Source, split: str = "train", on_bad_row: OnBadRow = "refuse") -> list[Ranking | Demonstration]:
    """Read rankings as `read_rankings` does, and rows of KTO (`prompt`, `completion`, `label`) as demonstrations whose
    column `label` is True or False: desirable or not. Raises InputError."""
    judged: list[Any] = _read(source, split, on_bad_row, "ranking", _to_judged)
    return judged if any(isinstance(one, Demonstration) for one in judged) else _with_pairs(source, judged)


def _with_pairs(source: Source, rankings: list[Ranking]) -> list[Any]:
    if count := sum(any(ranking.thinking) for ranking in rankings):
        warn_once(f"{name_of(source)}: {count} of {len(rankings)} rankings have thinking; answers alone are compared")
    if not any(ranking.pairs() for ranking in rankings):
        raise wrong(f"{name_of(source)}: chosen/rejected", f"all {len(rankings)} rows are ties or identical texts",
                     "check that the two columns differ")  # fmt: skip
    return rankings


def write_jsonl(path: str | Path, rows: Iterable[object]) -> None:
    """Write records or dicts, one JSON object per line (gzip if the name ends in .gz). NaN becomes null. A failed write
    leaves no file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        with open(temporary, "xb") as raw:  # never through a link that somebody left there
            # No name and no time in the header, so that equal rows make equal bytes.
            out = gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) if path.suffix == ".gz" else raw
            for row in rows:
                out.write(to_line(_to_row(row)))
            if out is not raw:
                out.close()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def prompt_key(messages: Messages) -> str:
    """Return a hash of a prompt, up to white space. Rows with equal keys are never in different splits."""
    turns = [[m["role"], " ".join(m["content"].split())] for m in messages]
    return hashlib.sha256(json.dumps(turns).encode()).hexdigest()[:24]


def split_key(record: Prompt | Demonstration | Ranking | StepLabels) -> str:
    """Return what splits and intervals go by: the column `split_group`, else the prompt's key."""
    group = record.columns.get("split_group")
    return prompt_key(_prompt_of(record)) if group is None else f"group {group}"


def split_by_prompt(records: Sequence[Record], fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Return (rest, held out), where `fraction` of the distinct prompts (or `split_group`s) is held out.

    The choice depends on `seed` and the set of prompts only, not on the order or number of rows. Each side gets at
    least one prompt, unless `fraction` is 0.
    """
    if not 0 <= fraction < 1:
        raise wrong("eval fraction", f"got {fraction}", "use a number from 0 up to, not including, 1")
    keys = [split_key(record) for record in records]
    order = sorted(set(keys), key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
    if fraction > 0 and len(order) < 2:
        raise wrong("prompts", f"{len(order)} distinct in {len(records)} rows", "splitting by prompt needs at least 2")
    count = min(max(round(fraction * len(order)), 1), len(order) - 1) if fraction > 0 else 0
    held = set(order[:count])
    rest = [record for record, key in zip(records, keys, strict=True) if key not in held]
    return rest, [record for record, key in zip(records, keys, strict=True) if key in held]


def check_disjoint(
    train: Sequence[_AnyRecord], held_out: Sequence[_AnyRecord], names: tuple[str, str] = ("train", "eval")
) -> None:
    """Raise InputError where a prompt (or `split_group`) is in both data sets."""
    seen = set(map(split_key, train))
    both = {split_key(record): _prompt_of(record) for record in held_out if split_key(record) in seen}
    if both:
        first = next(iter(both.values()))[-1]["content"]
        raise wrong(f"{names[0]}, {names[1]}: prompt", f"{len(both)} in both, the first is {show(first)}",
                     "split by prompt: take these rows out of one of them")  # fmt: skip


# --- one row --------------------------------------------------------------------------------------------------------


def _to_ranking(row: object, where: str = "") -> Ranking:
    return row if isinstance(row, Ranking) else Ranking(*foreign.read(row, "ranking", fields.ranking_fields), where)


def _to_judged(row: Any, where: str) -> Any:
    labelled = isinstance(row, dict) and row.get("completion") is not None and not fields.is_ranking(row)
    if not labelled or (label := fields.label_of(row)) is None:
        return _to_ranking(row, where)
    read = fields.demonstration_fields({**row, "label": None})
    return Demonstration(read.messages, read.trained_from, {**read.columns, "label": label}, where)


def _to_demonstration(row: object, where: str) -> Demonstration:
    if isinstance(row, Demonstration):
        return row
    if not isinstance(row, Ranking) and not fields.is_ranking(row):
        return Demonstration(*foreign.read(row, "demonstration", fields.demonstration_fields), where)
    ranking = _to_ranking(row, where)
    if ranking.columns.get("label") is False:
        raise Unusable(fields.NOT_TO_IMITATE)
    if ranking.columns.get("weight") == 0:
        raise Unusable(fields.WEIGHS_NOTHING)
    turns = [*ranking.prompt, ranking.turn(ranking.ranks.index(min(ranking.ranks)))]
    return Demonstration(turns, len(ranking.prompt), ranking.columns, ranking.where)


def _to_prompt(row: object, where: str) -> Prompt:
    if isinstance(row, Prompt):
        return row
    if isinstance(row, Ranking | Demonstration | StepLabels):
        return Prompt(list(row.prompt), row.columns, isinstance(row, Ranking) and row.text, row.where)
    return Prompt(*foreign.read(row, "prompt", fields.prompt_fields), where)


def _prompt_of(record: _AnyRecord) -> Messages:
    return record.messages if isinstance(record, Prompt) else record.prompt


def _to_row(record: object) -> object:
    if not is_dataclass(record) or isinstance(record, type):
        return record
    row = asdict(record)
    columns, _, thinking = row.pop("columns", {}), row.pop("where", ""), row.pop("thinking", ())
    text = isinstance(record, Prompt | Ranking) and row.pop("text")
    if isinstance(record, Prompt):
        row = {"prompt": record.messages}
    elif isinstance(record, Demonstration) and record.trained_from:
        cut = next(n for n, m in enumerate(record.messages) if n >= record.trained_from and m["role"] == "assistant")
        row = {"prompt": record.messages[:cut], "completion": record.messages[cut:]}
    elif isinstance(record, Demonstration):
        row = {"messages": record.messages}
    elif isinstance(record, Ranking) and any(thinking):
        row["responses"] = [[record.turn(n)] for n in range(len(record.responses))]
    return row | ({"prompt": row["prompt"][0]["content"]} if text else {}) | columns


# --- reading --------------------------------------------------------------------------------------------------------


def _read(
    source: Source, split: str, on_bad_row: OnBadRow, wanted: str, convert: Callable[[object, str], Record],
    columns: Mapping[str, str] | None = None,
) -> list[Record]:  # fmt: skip
    if parts := parts_of(source):
        read = (_read(part.path, split, on_bad_row, wanted, convert, part.columns) for part in parts)
        return [record for part, found in zip(parts, read, strict=True) for record in weighed(found, part.weight)]
    records: list[Record] = []
    unusable: list[tuple[str, str]] = []
    name = name_of(source)
    bad = BadRows(name, on_bad_row)
    for where, row in foreign.translated(rows(source, split, columns), wanted, name, columns):
        try:
            if isinstance(row, Exception):
                raise row
            records.append(convert(row, where))
        except Unusable as flaw:
            unusable.append((where, str(flaw)))
        except InputError as error:
            bad.add(where, error)
    bad.tell(len(records) + len(unusable))
    for why in dict.fromkeys(why for _, why in unusable):
        there = [where for where, other in unusable if other == why]
        left_out = f"left out {len(there)} of {len(unusable) + len(records)} rows for {why}: {numbers(there)}"
        if not records:
            raise wrong(name, f"no rows; {left_out}", "hand in others")
        warn_once(f"{name}: {left_out}")
    if not records:
        raise wrong(name, "no rows", "hand in at least one")
    return records
