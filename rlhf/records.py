"""Data in: prompts, demonstrations and rankings from the shapes that people already have, as frozen records.

Shapes, a row each (extra columns are kept in `.columns`):

* rankings: trl's preference formats, `prompt`/`chosen`/`rejected` as text or messages, with the prompt left implicit
  if you like (what both share); Anthropic HH's ``"\\n\\nHuman: ...\\n\\nAssistant: ..."`` strings; K responses with
  ties, ``{"prompt": ..., "responses": [...], "ranks": [...]}`` (a smaller rank is better).
* demonstrations: `messages`; `prompt`/`completion`; of a ranking, the best response.
* prompts: `prompt`; of any of the above, the prompt.

A source is a path (.jsonl, .jsonl.gz, .json), a folder of such files or one written by datasets' `save_to_disk`, a
name on the hub ("name", or "name:part" with a configuration or folder of it), a `datasets` object, or a list of rows.
Every mistake is an `InputError` of one line: file:line: field: what was seen; what to do.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from rlhf.errors import InputError
from rlhf.sources import name_of, rows, show, wrong

logger = logging.getLogger("rlhf")

Messages = list[dict[str, str]]
ROLES = ("system", "user", "assistant")
_FIELDS = ("prompt", "chosen", "rejected", "responses", "ranks", "completion", "messages")
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True)
class Prompt:
    """What a policy answers. `text`: it came as a plain string, and reward functions get strings, as in trl."""

    messages: Messages
    columns: dict[str, Any] = field(default_factory=dict)
    text: bool = False

    def __post_init__(self) -> None:
        _check_prompt(self.messages, "prompt")


@dataclass(frozen=True)
class Demonstration:
    """A conversation to imitate: the loss is on assistant turns whose index is at least `trained_from`."""

    messages: Messages
    trained_from: int = 0
    columns: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_messages(self.messages, "messages")
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
    """K responses to one prompt and their ranks: smaller is better, equal is a tie. A pair is K = 2."""

    prompt: Messages
    responses: tuple[str, ...]
    ranks: tuple[float, ...]
    columns: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_prompt(self.prompt, "prompt")
        _check_texts(self.responses, "responses")
        if len(self.responses) < 2:
            raise wrong("responses", f"got {len(self.responses)}", "a ranking compares at least 2 responses")
        for rank in self.ranks:
            if isinstance(rank, bool) or not isinstance(rank, int | float) or not math.isfinite(rank):
                raise wrong("ranks", f"got {show(rank)}", "write a number per response, smaller is better")
        if len(self.ranks) != len(self.responses):
            seen = f"got {len(self.ranks)} ranks for {len(self.responses)} responses"
            raise wrong("ranks", seen, "write one number per response")

    def pairs(self) -> list[tuple[int, int]]:
        """(better, worse) indices of all pairs; ties, and responses of the same text, are left out."""
        n = range(len(self.responses))
        return [(i, j) for i in n for j in n
                if self.ranks[i] < self.ranks[j] and self.responses[i] != self.responses[j]]  # fmt: skip


@dataclass(frozen=True)
class StepLabels:
    """A worked answer in steps, each labelled: 1 right, 0 neutral, -1 wrong."""

    prompt: Messages
    steps: tuple[str, ...]
    labels: tuple[int, ...]
    columns: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_prompt(self.prompt, "prompt")
        _check_texts(self.steps, "steps")
        if len(self.labels) != len(self.steps):
            raise wrong("labels", f"got {len(self.labels)} for {len(self.steps)} steps", "write one label per step")
        for label in self.labels:
            if isinstance(label, bool) or label not in (-1, 0, 1):
                raise wrong("labels", f"got {show(label)}", "use 1 (right), 0 (neutral) or -1 (wrong)")


Record = TypeVar("Record", Prompt, Demonstration, Ranking, StepLabels)
_AnyRecord = Prompt | Demonstration | Ranking | StepLabels


def read_prompts(source: Any, split: str = "train") -> list[Prompt]:
    """Prompts from any shape above. Raises InputError."""
    return _read(source, split, _to_prompt)


def read_demonstrations(source: Any, split: str = "train") -> list[Demonstration]:
    """Demonstrations; of preference rows, the best response (the first of equals) to its prompt. Raises InputError."""
    return _read(source, split, _to_demonstration)


def read_rankings(source: Any, split: str = "train") -> list[Ranking]:
    """Rankings. Identical responses are ties; a source in which nothing is better than anything is an InputError."""
    rankings = _read(source, split, _to_ranking)
    if not any(ranking.pairs() for ranking in rankings):
        raise wrong(f"{name_of(source)}: chosen/rejected", f"all {len(rankings)} rows are ties or identical texts",
                     "check that the two columns differ")  # fmt: skip
    return rankings


def write_jsonl(path: str | Path, rows: Iterable[Any]) -> None:
    """Write records or dicts, one JSON object a line (gzip if the name ends in .gz); whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as raw:
            # No name and no time in the header: the same rows make the same bytes.
            out = gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) if path.suffix == ".gz" else raw
            for row in rows:
                out.write((json.dumps(_to_row(row), ensure_ascii=False) + "\n").encode())
            if out is not raw:
                out.close()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def prompt_key(messages: Messages) -> str:
    """A prompt's identity, up to white space: rows with equal keys never fall into different splits."""
    turns = [[m["role"], " ".join(m["content"].split())] for m in messages]
    return hashlib.sha256(json.dumps(turns).encode()).hexdigest()[:24]


def split_by_prompt(records: Sequence[Record], fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """(rest, held out): `fraction` of the distinct prompts, with all their rows, is held out.

    Which prompts depends on `seed` and the set of prompts only, not on the order or number of rows. At least one
    prompt on each side, unless `fraction` is 0.
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
    """Raise InputError where a prompt occurs in both."""
    seen = {prompt_key(_prompt_of(record)) for record in train}
    both = {prompt_key(p): p for p in map(_prompt_of, held_out) if prompt_key(p) in seen}
    if both:
        first = next(iter(both.values()))[-1]["content"]
        raise wrong(f"{names[0]}, {names[1]}: prompt", f"{len(both)} in both, the first is {show(first)}",
                     "split by prompt: take these rows out of one of them")  # fmt: skip


# --- one row: its shape ---------------------------------------------------------------------------------------------


class _Unusable(Exception):
    """A row that is left out and counted: a known flaw of a public data set, not the user's mistake."""


def _to_ranking(row: Any) -> Ranking:
    if isinstance(row, Ranking):
        return row
    row = _as_row(row, "prompt, chosen and rejected, or prompt, responses and ranks")
    columns = _extra(row)
    if row.get("responses") is not None:
        responses, ranks = _need(row, "responses"), _need(row, "ranks")
        for name, value in (("responses", responses), ("ranks", ranks)):
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise wrong(name, f"got {show(value)}", "write a list")
        return Ranking(_prompt_field(_need(row, "prompt")), tuple(responses), tuple(ranks), columns)
    if row.get("chosen") is None:
        _refuse_near_miss(row, "responses")
    chosen, rejected = _need(row, "chosen"), _need(row, "rejected")
    prompt, (better, worse) = _shared_prompt(row, chosen, rejected)
    return Ranking(prompt, (better, worse), (1, 1) if better == worse else (1, 2), columns)


def _to_demonstration(row: Any) -> Demonstration:
    if isinstance(row, Demonstration):
        return row
    if isinstance(row, dict) and not _is_ranking(row):
        columns = _extra(row)
        if row.get("messages") is not None:
            return Demonstration(_messages_field(row["messages"], "messages"), 0, columns)
        known = _as_row(row, "prompt and completion, or messages")
        if known.get("completion") is None and known.get("prompt") is None:
            _need(known, "messages")
        prompt, completion = _prompt_field(_need(known, "prompt")), _need(known, "completion")
        turns = ([{"role": "assistant", "content": _text(completion, "completion")}] if isinstance(completion, str)
                 else _messages_field(completion, "completion"))  # fmt: skip
        return Demonstration(prompt + turns, len(prompt), columns)
    ranking = _to_ranking(row)
    best = ranking.responses[ranking.ranks.index(min(ranking.ranks))]
    turns = [*ranking.prompt, {"role": "assistant", "content": best}]
    return Demonstration(turns, len(ranking.prompt), ranking.columns)


def _to_prompt(row: Any) -> Prompt:
    if isinstance(row, Prompt):
        return row
    if isinstance(row, Ranking | Demonstration | StepLabels):
        return Prompt(list(row.prompt), row.columns)
    row = _as_row(row, "prompt")
    if row.get("prompt") is not None:
        prompt = row["prompt"]
        return Prompt(_prompt_field(prompt), _extra(row), isinstance(prompt, str) and not _is_hh(prompt))
    _refuse_near_miss(row, "prompt")
    if row.get("messages") is not None:
        turns = _messages_field(row["messages"], "messages")
        return Prompt(turns[:-1] if turns[-1]["role"] == "assistant" else turns, _extra(row))
    if _is_ranking(row):
        ranking = _to_ranking(row)
        return Prompt(ranking.prompt, ranking.columns)
    return Prompt(_prompt_field(_need(row, "prompt")), _extra(row))


def _is_ranking(row: dict) -> bool:
    return any(row.get(name) is not None for name in ("chosen", "rejected", "responses"))


def _shared_prompt(row: dict, chosen: Any, rejected: Any) -> tuple[Messages, list[str]]:
    """A preference row's prompt, given or shared by both, and the two responses."""
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise wrong("rejected", f"got {show(rejected)}", "write it as chosen is: both text, or both messages")
    if row.get("prompt") is not None:
        prompt = _prompt_field(row["prompt"])
        return prompt, [_response(value, name, prompt, row["prompt"])
                        for name, value in (("chosen", chosen), ("rejected", rejected))]  # fmt: skip
    _refuse_near_miss(row, "prompt")
    if isinstance(chosen, str) and not _is_hh(chosen):
        return _shared_text(chosen, rejected)
    turns = [_turns(value, name) for name, value in (("chosen", chosen), ("rejected", rejected))]
    count = _shared_turns(*turns)
    tails = [t[count:] for t in turns]
    for name, tail in zip(("chosen", "rejected"), tails, strict=True):
        if len(tail) != 1 or tail[0]["role"] != "assistant":
            seen = f"{len(tail)} turns after the {count} that both share"
            raise wrong(name, seen, "chosen and rejected may differ in their last assistant turn only")
    if count == 0:
        raise wrong("prompt", "there is none and chosen and rejected share no turn", "add a prompt field")
    return turns[0][:count], [tail[0]["content"] for tail in tails]


def _shared_turns(chosen: Messages, rejected: Messages) -> int:
    if chosen == rejected:
        return len(chosen) - 1
    same = [a == b for a, b in zip(chosen, rejected, strict=False)]
    return same.index(False) if False in same else len(same)


def _shared_text(chosen: str, rejected: str) -> tuple[Messages, list[str]]:
    """trl's implicit prompt for text: the common prefix up to the last white space (or all, for identical texts)."""
    _text(chosen, "chosen"), _text(rejected, "rejected")
    same = next((n for n, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    prefix = chosen[: min(len(chosen), len(rejected)) if same is None else same]
    end = max((m.end() for m in re.finditer(r"\s+", prefix)), default=0)
    if chosen == rejected or not prefix[:end].strip():
        raise wrong("prompt", "there is none and chosen and rejected begin differently or are the same text",
                     "add a prompt field")  # fmt: skip
    return [{"role": "user", "content": prefix[:end].strip()}], [chosen[end:], rejected[end:]]


def _response(value: Any, name: str, prompt: Messages, raw_prompt: Any) -> str:
    """A response beside a given prompt: text, or messages which may begin with the prompt again."""
    if isinstance(value, str):
        if isinstance(raw_prompt, str) and _is_hh(raw_prompt):
            value = value.removeprefix(raw_prompt).strip()
        return _text(value, name)
    turns = _messages_field(value, name)
    if turns[: len(prompt)] == prompt:
        turns = turns[len(prompt) :]
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise wrong(name, f"{len(turns)} turns after the prompt", "write one assistant turn")
    return turns[0]["content"]


def _turns(value: Any, name: str) -> Messages:
    if not isinstance(value, str):
        return _messages_field(value, name)
    if not _is_hh(value):
        raise wrong(name, f"got {show(value)}", "begin it with '\\n\\nHuman: ' as in the other column")
    turns = _parse_hh(value)
    if turns[-1]["role"] != "assistant":
        raise wrong(name, "the last turn is Human's", "end it with '\\n\\nAssistant: ...'")
    if not turns[-1]["content"]:
        raise _Unusable("an empty reply")  # 0.1% of the published HH rows
    _check_messages(turns, name)
    return turns


def _is_hh(text: str) -> bool:
    return bool(_HH_TURN.match(text))


def _parse_hh(text: str) -> Messages:
    """HH's dialogue string to messages; two turns of one speaker in a row (0.2% of the rows) become one."""
    parts = _HH_TURN.split(text)[1:]
    turns: Messages = []
    for speaker, content in zip(parts[::2], parts[1::2], strict=True):
        role, content = ("user" if speaker == "Human" else "assistant"), content.strip()
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] = f"{turns[-1]['content']}\n\n{content}".strip()
        else:
            turns.append({"role": role, "content": content})
    return turns


# --- one field ------------------------------------------------------------------------------------------------------


def _as_row(row: Any, wanted: str) -> dict:
    if not isinstance(row, dict):
        raise InputError(f"got {show(row)}; write an object with {wanted}")
    return row


def _extra(row: dict) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in _FIELDS}


def _refuse_near_miss(row: dict, name: str) -> None:
    near = get_close_matches(name, [str(k) for k in row if k not in _FIELDS], n=1, cutoff=0.75)
    if near:
        raise wrong(name, f"missing, but there is {near[0]!r}", f"rename {near[0]!r} to {name!r}")


def _need(row: dict, name: str) -> Any:
    if row.get(name) is None:
        _refuse_near_miss(row, name)
        seen = "got null" if name in row else f"missing; the fields are {', '.join(map(str, row)) or '(none)'}"
        raise wrong(name, seen, f"add {name!r} to the row")
    return row[name]


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise wrong(name, f"got {show(value)}", "write text")
    if not value.strip():
        raise wrong(name, f"got empty text {show(value)}", "write some text or take the row out")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise wrong(name, f"half a character at {error.start} (a lone surrogate)", "repair the text") from None
    return value


def _check_texts(values: tuple[str, ...], name: str) -> None:
    for n, value in enumerate(values):
        _text(value, f"{name}[{n}]")


def _check_messages(messages: Any, name: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise wrong(name, f"got {show(messages)}", "write text or a list of messages")
    for n, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise wrong(f"{name}[{n}]", f"got {show(message)}", "write {'role': ..., 'content': ...}")
        if message["role"] not in ROLES:
            near = get_close_matches(str(message["role"]), ROLES, n=1, cutoff=0.5)
            todo = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(ROLES)}"
            raise wrong(f"{name}[{n}].role", f"got {show(message['role'])}", todo)
        _text(message["content"], f"{name}[{n}].content")


def _check_prompt(messages: Any, name: str) -> None:
    _check_messages(messages, name)
    if messages[-1]["role"] == "assistant":
        raise wrong(name, "the last turn is 'assistant'", "end a prompt with a user turn")


def _messages_field(value: Any, name: str) -> Messages:
    """Messages with role and content only; content in parts is joined if all parts are text."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise wrong(name, f"got {show(value)}", "write a list of messages")
    turns = []
    for n, message in enumerate(value):
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
            content = "".join(part["text"] for part in content)
        if isinstance(message, dict) and message.get("tool_calls"):
            raise wrong(f"{name}[{n}].tool_calls", "tools aren't supported", "write the turn as text")
        known = isinstance(message, dict) and {"role", "content"} <= message.keys()
        turns.append({"role": message["role"], "content": content} if known else message)
    _check_messages(turns, name)
    return turns


def _prompt_field(value: Any) -> Messages:
    if not isinstance(value, str):
        turns = _messages_field(value, "prompt")
    elif _is_hh(value):
        turns = _parse_hh(value)
        if turns[-1] == {"role": "assistant", "content": ""}:
            turns = turns[:-1]
    else:
        turns = [{"role": "user", "content": _text(value, "prompt")}]
    _check_prompt(turns, "prompt")
    return turns


def _prompt_of(record: _AnyRecord) -> Messages:
    return record.messages if isinstance(record, Prompt) else record.prompt


def _to_row(record: Any) -> Any:
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


def _read(source: Any, split: str, convert: Callable[[Any], Any]) -> list[Any]:
    records, unusable = [], []
    for where, row in rows(source, split):
        try:
            records.append(convert(row))
        except _Unusable as flaw:
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
