"""Samples: the rows of an eval, each with what is asked, what is right, and where the row stands.

A row asks in `input` (OpenAI Evals) or `prompt`: text, or messages. What is right stands in `ideal`, a text or a list
of texts of which each is right. Every mistake is an InputError: file:line: field: what was seen; what to do.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.errors import InputError
from rlhf.rows.files import file_rows, show, wrong
from rlhf.rows.messages import Messages, as_messages, check_prompt, check_text

ASKED = ("input", "prompt")
"""The columns that may hold what is asked."""
EXAMPLES = {"example_user": "user", "example_assistant": "assistant"}
"""Names of system turns that show a conversation (OpenAI's few-shot form), and whose turns they show."""


@dataclass(frozen=True)
class Sample:
    """An item of an eval: what the policy is asked, the answers that are right, and all columns of its row."""

    messages: Messages
    ideal: tuple[str, ...]
    columns: Mapping[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)

    @property
    def key(self) -> str:
        """Return sixteen hex digits of what is asked and what is right, by which two runs' items are paired."""
        return digest([self.columns, self.messages, self.ideal])[:16]

    @property
    def group(self) -> str:
        """Return what items that are not independent share: the column `split_group`, else the item's key."""
        group = self.columns.get("split_group")
        return self.key if group is None else f"group {group}"

    @property
    def choices(self) -> tuple[str, ...]:
        """Return the answers among which likelihood-based scoring chooses: the column `choices`. Raises InputError."""
        found = self.columns.get("choices")
        where = f"{self.where}: choices"
        if not isinstance(found, list) or len(found) < 2:
            raise wrong(where, f"got {show(found)}", "likelihood scoring needs a list of two or more texts")
        texts = tuple(check_text(text, f"{where}[{n}]") for n, text in enumerate(found))
        if len(set(texts)) < len(texts):
            raise wrong(where, f"got {show(found)}", "write each choice once")
        if not set(self.ideal) & set(texts):
            raise wrong(where, f"{show(list(self.ideal))} is none of them", "write the right answer among the choices")
        return texts


def digest(content: object) -> str:
    """Return the sha256 of what JSON has read: NaN and infinity, which it reads too, are among it."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_samples(
    source: Path,
    ideal: bool = True,
    examples: Sequence[Mapping[str, Any]] = (),
    renamed: Mapping[str, str] | None = None,
) -> tuple[Sample, ...]:
    """Read the samples of a file, or of all .jsonl files below a folder. Raises InputError, also for no rows at all.

    ideal: whether every row must say what is right. examples: few-shot turns, put before each sample's last turn.
    renamed: columns under other names, theirs -> ours.
    """
    files = sorted(source.rglob("*.jsonl")) if source.is_dir() else [source]
    if not source.exists():
        raise wrong(str(source), "no such file", "check the path, or fetch the data")
    samples = [
        sample_of({(renamed or {}).get(name, name): value for name, value in row.items()}, where, ideal, examples)
        for file in files
        for where, row in object_rows(file)
    ]
    if not samples:
        raise wrong(str(source), "no samples", "write one JSON object per line")
    return tuple(samples)


def object_rows(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """Read a file's rows, all of them JSON objects, with where each stands. Raises InputError."""
    rows = []
    for where, row in file_rows(file):
        if not isinstance(row, dict):
            raise wrong(where, f"got {show(row)}", "write an object with a prompt and an ideal")
        rows.append((where, row))
    return rows


def sample_of(
    row: Mapping[str, Any], where: str, ideal: bool = True, examples: Sequence[Mapping[str, Any]] = ()
) -> Sample:
    """Make a sample of a row. Raises InputError.

    A row without `input` and `prompt` is one whose class knows what is asked by other names (battle's `input1`): its
    messages are empty."""
    name = next((name for name in ASKED if row.get(name) is not None), None)
    if name is None and ideal:
        raise wrong(where, f"no prompt among the columns {', '.join(map(str, row))}", "write prompt: text or messages")
    messages = with_examples(asked(row[name], f"{where}: {name}"), examples) if name else []
    return Sample(messages, ideals(row.get("ideal"), f"{where}: ideal", ideal), dict(row), where)


def asked(value: object, name: str) -> Messages:
    """Read what is asked: text becomes a user's turn; messages are checked.

    System turns named example_user and example_assistant become the turns that they show; where no turn is a user's,
    the last one becomes it, since a chat template has no place for an answer to a system text alone (OpenAI's set is
    full of both). Raises InputError, also where the last turn is an assistant's."""
    if isinstance(value, str):
        return [{"role": "user", "content": check_text(value, name)}]
    if isinstance(value, list):
        value = [_shown(turn) for turn in value]
    turns = as_messages(value, name)
    if all(turn["role"] == "system" for turn in turns):
        turns = [*turns[:-1], {**turns[-1], "role": "user"}]
    return check_prompt(turns, name)


def _shown(turn: object) -> object:
    if isinstance(turn, dict) and turn.get("role") == "system" and str(turn.get("name")) in EXAMPLES:
        return {"role": EXAMPLES[turn["name"]], "content": turn.get("content")}
    return turn


def ideals(value: object, name: str, needed: bool = True) -> tuple[str, ...]:
    """Read the right answers: a text, or a list of texts of which each is right. Raises InputError."""
    if value is None and not needed:
        return ()
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not found or not all(isinstance(text, str) for text in found):
        if not needed:
            return ()  # a column that a grading prompt may show; no verdict reads it
        raise wrong(name, f"got {show(value)}", "write the right answer as text, or a list of texts")
    for text in found:
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise wrong(name, f"half a character in {show(text)} (a lone surrogate)", "repair the text")
    return tuple(found)


def with_examples(messages: Messages, examples: Sequence[Mapping[str, Any]]) -> Messages:
    """Put few-shot turns before a conversation's last turn, as OpenAI's Match does."""
    return [*messages[:-1], *map(dict, examples), *messages[-1:]]


def read_examples(file: Path, count: int) -> Messages:
    """Read the first `count` rows of a few-shot file as turns: OpenAI's rows hold them in `sample`, ours are samples.

    Raises InputError where the file has fewer rows."""
    rows = object_rows(file)
    if count > len(rows):
        raise InputError(f"{file}: {len(rows)} rows, and num_few_shot={count}; lower it")
    turns: Messages = []
    for where, row in rows[:count]:
        if "sample" in row:
            shown = [_shown(turn) for turn in row["sample"]] if isinstance(row["sample"], list) else row["sample"]
            turns += as_messages(shown, f"{where}: sample")
        else:
            sample = sample_of(row, where)
            answer = check_text(sample.ideal[0], f"{where}: ideal")
            turns += [*sample.messages, {"role": "assistant", "content": answer}]
    return turns
