"""Prompts, demonstrations and rankings as frozen records: reading, writing, and splitting by prompt.

`rlhf.shapes` lists the accepted rows; extra columns are kept in `.columns`. A demonstration read from a ranking is its
best response. A source is a path (.jsonl, .jsonl.gz, .json), a folder of such files or one written by datasets'
`save_to_disk`, a name on the hub ("name", or "name:part" with a configuration or folder of it), a `datasets` object,
or a list of rows. Every mistake raises an `InputError` of one line: file:line: field: what was seen; what to do.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from rlhf import shapes
from rlhf.errors import InputError
from rlhf.messages import ROLES, Messages, check_messages, check_prompt, check_texts
from rlhf.shapes import Unusable
from rlhf.sources import Source, name_of, rows, show, wrong

__all__ = [
    "ROLES",
    "Demonstration",
    "Messages",
    "Prompt",
    "Ranking",
    "Record",
    "StepLabels",
    "check_disjoint",
    "prompt_key",
    "read_demonstrations",
    "read_prompts",
    "read_rankings",
    "split_by_prompt",
    "write_jsonl",
]

logger = logging.getLogger("rlhf")


@dataclass(frozen=True)
class Prompt:
    """A conversation for a policy to answer. `text`: the row had a plain string, so reward functions get strings (trl's
    rule)."""

    messages: Messages
    columns: dict[str, Any] = field(default_factory=dict)
    text: bool = False

    def __post_init__(self) -> None:
        check_prompt(self.messages, "prompt")


@dataclass(frozen=True)
class Demonstration:
    """A conversation to imitate. The loss is on assistant turns whose index is at least `trained_from`."""

    messages: Messages
    trained_from: int = 0
    columns: dict[str, Any] = field(default_factory=dict)

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
    """K responses to one prompt and their ranks: a smaller rank is better, equal ranks are a tie."""

    prompt: Messages
    responses: tuple[str, ...]
    ranks: tuple[float, ...]
    columns: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_prompt(self.prompt, "prompt")
        check_texts(self.responses, "responses")
        if len(self.responses) < 2:
            raise wrong("responses", f"got {len(self.responses)}", "a ranking compares at least 2 responses")
        for rank in self.ranks:
            if isinstance(rank, bool) or not isinstance(rank, int | float) or not math.isfinite(rank):
                raise wrong("ranks", f"got {show(rank)}", "write a number per response, smaller is better")
        if len(self.ranks) != len(self.responses):
            seen = f"got {len(self.ranks)} ranks for {len(self.responses)} responses"
            raise wrong("ranks", seen, "write one number per response")

    def pairs(self) -> list[tuple[int, int]]:
        """Return indices (better, worse) of all pairs, without ties and responses of the same text."""
        n = range(len(self.responses))
        return [(i, j) for i in n for j in n
                if self.ranks[i] < self.ranks[j] and self.responses[i] != self.responses[j]]  # fmt: skip


@dataclass(frozen=True)
class StepLabels:
    """An answer worked out in steps, each labelled 1 (right), 0 (neutral) or -1 (wrong)."""

    prompt: Messages
    steps: tuple[str, ...]
    labels: tuple[int, ...]
    columns: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_prompt(self.prompt, "prompt")
        check_texts(self.steps, "steps")
        if len(self.labels) != len(self.steps):
            raise wrong("labels", f"got {len(self.labels)} for {len(self.steps)} steps", "write one label per step")
        for label in self.labels:
            if isinstance(label, bool) or label not in (-1, 0, 1):
                raise wrong("labels", f"got {show(label)}", "use 1 (right), 0 (neutral) or -1 (wrong)")


Record = TypeVar("Record", Prompt, Demonstration, Ranking, StepLabels)
_AnyRecord = Prompt | Demonstration | Ranking | StepLabels


def read_prompts(source: Source, split: str = "train") -> list[Prompt]:
    """Read prompts from rows of any accepted shape. Raises InputError."""
    return _read(source, split, _to_prompt)


def read_demonstrations(source: Source, split: str = "train") -> list[Demonstration]:
    """Read demonstrations; a preference row gives its best response (the first of equals). Raises InputError."""
    return _read(source, split, _to_demonstration)


def read_rankings(source: Source, split: str = "train") -> list[Ranking]:
    """Read rankings. Identical responses are ties. Raises InputError, also for a source without a single pair."""
    rankings = _read(source, split, _to_ranking)
    if not any(ranking.pairs() for ranking in rankings):
        raise wrong(f"{name_of(source)}: chosen/rejected", f"all {len(rankings)} rows are ties or identical texts",
                     "check that the two columns differ")  # fmt: skip
    return rankings


def write_jsonl(path: str | Path, rows: Iterable[object]) -> None:
    """Write records or dicts, one JSON object per line (gzip if the name ends in .gz). A failed write leaves no
    file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as raw:
            # No name and no time in the header, so that equal rows make equal bytes.
            out = gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) if path.suffix == ".gz" else raw
            for row in rows:
                out.write((json.dumps(_to_row(row), ensure_ascii=False) + "\n").encode())
            if out is not raw:
                out.close()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def prompt_key(messages: Messages) -> str:
    """Return a hash of a prompt, up to white space. Rows with equal keys are never in different splits."""
    turns = [[m["role"], " ".join(m["content"].split())] for m in messages]
    return hashlib.sha256(json.dumps(turns).encode()).hexdigest()[:24]


def split_by_prompt(records: Sequence[Record], fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Return (rest, held out), where `fraction` of the distinct prompts, with all their rows, is held out.

    The choice depends on `seed` and the set of prompts only, not on the order or number of rows. Each side gets at
    least one prompt, unless `fraction` is 0.
    """
    if not 0 <= fraction < 1:
        raise wrong("eval fraction", f"got {fraction}", "use a number from 0 up to, not including, 1")
    keys = [prompt_key(_prompt_of(record)) for record in records]
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
    """Raise InputError where a prompt is in both data sets."""
    seen = {prompt_key(_prompt_of(record)) for record in train}
    both = {prompt_key(p): p for p in map(_prompt_of, held_out) if prompt_key(p) in seen}
    if both:
        first = next(iter(both.values()))[-1]["content"]
        raise wrong(f"{names[0]}, {names[1]}: prompt", f"{len(both)} in both, the first is {show(first)}",
                     "split by prompt: take these rows out of one of them")  # fmt: skip


# --- one row --------------------------------------------------------------------------------------------------------


def _to_ranking(row: object) -> Ranking:
    return row if isinstance(row, Ranking) else Ranking(*shapes.ranking_fields(row))


def _to_demonstration(row: object) -> Demonstration:
    if isinstance(row, Demonstration):
        return row
    if not isinstance(row, Ranking) and not shapes.is_ranking(row):
        return Demonstration(*shapes.demonstration_fields(row))
    ranking = _to_ranking(row)
    best = ranking.responses[ranking.ranks.index(min(ranking.ranks))]
    turns = [*ranking.prompt, {"role": "assistant", "content": best}]
    return Demonstration(turns, len(ranking.prompt), ranking.columns)


def _to_prompt(row: object) -> Prompt:
    if isinstance(row, Prompt):
        return row
    if isinstance(row, Ranking | Demonstration | StepLabels):
        return Prompt(list(row.prompt), row.columns)
    return Prompt(*shapes.prompt_fields(row))


def _prompt_of(record: _AnyRecord) -> Messages:
    return record.messages if isinstance(record, Prompt) else record.prompt


def _to_row(record: object) -> object:
    if not is_dataclass(record) or isinstance(record, type):
        return record
    row = asdict(record)
    columns = row.pop("columns", {})
    if isinstance(record, Prompt):
        row = {"prompt": record.messages[0]["content"] if record.text else record.messages}
    elif isinstance(record, Demonstration) and record.trained_from:
        turns = enumerate(record.messages)
        cut = next(n for n, m in turns if n >= record.trained_from and m["role"] == "assistant")
        row = {"prompt": record.messages[:cut], "completion": record.messages[cut:]}
    elif isinstance(record, Demonstration):
        row = {"messages": record.messages}
    return row | columns


# --- reading --------------------------------------------------------------------------------------------------------


def _read(source: Source, split: str, convert: Callable[[object], Record]) -> list[Record]:
    records: list[Record] = []
    unusable: list[tuple[str, str]] = []
    for where, row in rows(source, split):
        try:
            records.append(convert(row))
        except Unusable as flaw:
            unusable.append((where, str(flaw)))
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
    if unusable:
        named = ", ".join(where.rpartition(":")[2].strip() for where, _ in unusable[:8])
        _warn_once(f"{name_of(source)}: left out {len(unusable)} of {len(unusable) + len(records)} rows for "
                   f"{unusable[0][1]}: {named}{' ...' if len(unusable) > 8 else ''}")  # fmt: skip
    if not records:
        raise wrong(name_of(source), "no rows", "hand in at least one")
    return records


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)
