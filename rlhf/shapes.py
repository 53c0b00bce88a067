"""Convert rows of the shapes in common use to the fields of our records.

Accepted shapes of a row (extra columns are kept):

* rankings: trl's preference formats, `prompt`/`chosen`/`rejected` as text or messages, where `prompt` may be absent (it
  is then the part that both share); Anthropic HH's ``"\\n\\nHuman: ...\\n\\nAssistant: ..."`` strings; K responses with
  ties, ``{"prompt": ..., "responses": [...], "ranks": [...]}`` (a smaller rank is better).
* demonstrations: `messages`; `prompt`/`completion`.
* prompts: `prompt`; the prompt of any row above.

Every mistake raises an `InputError` of one line: field: what was seen; what to do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

from rlhf.errors import InputError
from rlhf.messages import Messages, as_messages, as_prompt, check_messages, check_text, is_hh, parse_hh
from rlhf.sources import show, wrong

_FIELDS = ("prompt", "chosen", "rejected", "responses", "ranks", "completion", "messages")

Row = dict[str, Any]
"""A JSON object whose fields are not checked yet."""


class Unusable(Exception):
    """Raised for a row to leave out and count: it has a known flaw of a public data set, not a mistake of the user."""


class RankingFields(NamedTuple):
    prompt: Messages
    responses: tuple[str, ...]
    ranks: tuple[float, ...]
    columns: Row


class DemonstrationFields(NamedTuple):
    messages: Messages
    trained_from: int
    columns: Row


class PromptFields(NamedTuple):
    messages: Messages
    columns: Row
    text: bool = False


# --- one row: its shape ---------------------------------------------------------------------------------------------


def is_ranking(row: object) -> bool:
    """Return whether a row is one of preferences, complete or not."""
    return isinstance(row, dict) and any(row.get(name) is not None for name in ("chosen", "rejected", "responses"))


def ranking_fields(row: object) -> RankingFields:
    """Read a row of preferences. Identical responses get equal ranks."""
    row = _as_row(row, "prompt, chosen and rejected, or prompt, responses and ranks")
    columns = _extra(row)
    if row.get("responses") is not None:
        responses, ranks = _need(row, "responses"), _need(row, "ranks")
        for name, value in (("responses", responses), ("ranks", ranks)):
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise wrong(name, f"got {show(value)}", "write a list")
        return RankingFields(as_prompt(_need(row, "prompt")), tuple(responses), tuple(ranks), columns)
    if row.get("chosen") is None:
        _refuse_near_miss(row, "responses")
    chosen, rejected = _need(row, "chosen"), _need(row, "rejected")
    prompt, better, worse = _shared_prompt(row, chosen, rejected)
    return RankingFields(prompt, (better, worse), (1, 1) if better == worse else (1, 2), columns)


def demonstration_fields(row: object) -> DemonstrationFields:
    """Read a conversation, or a prompt and its completion."""
    row = _as_row(row, "prompt and completion, or messages")
    columns = _extra(row)
    if row.get("messages") is not None:
        return DemonstrationFields(as_messages(row["messages"], "messages"), 0, columns)
    if row.get("completion") is None and row.get("prompt") is None:
        _need(row, "messages")
    prompt, completion = as_prompt(_need(row, "prompt")), _need(row, "completion")
    if isinstance(completion, str):
        turns = [{"role": "assistant", "content": check_text(completion, "completion")}]
    else:
        turns = as_messages(completion, "completion")
    return DemonstrationFields(prompt + turns, len(prompt), columns)


def prompt_fields(row: object) -> PromptFields:
    """Read a row's prompt: the field, or the prompt of a demonstration or ranking."""
    row = _as_row(row, "prompt")
    if row.get("prompt") is None:
        _refuse_near_miss(row, "prompt")
        if row.get("messages") is not None:
            turns = as_messages(row["messages"], "messages")
            return PromptFields(turns[:-1] if turns[-1]["role"] == "assistant" else turns, _extra(row))
        if is_ranking(row):
            fields = ranking_fields(row)
            return PromptFields(fields.prompt, fields.columns)
    value = _need(row, "prompt")
    return PromptFields(as_prompt(value), _extra(row), isinstance(value, str) and not is_hh(value))


def _shared_prompt(row: Row, chosen: object, rejected: object) -> tuple[Messages, str, str]:
    """Return a preference row's prompt, given or shared by both texts, and the two responses."""
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise wrong("rejected", f"got {show(rejected)}", "write it as chosen is: both text, or both messages")
    if row.get("prompt") is not None:
        given = row["prompt"]
        prompt = as_prompt(given)
        return prompt, _response(chosen, "chosen", prompt, given), _response(rejected, "rejected", prompt, given)
    _refuse_near_miss(row, "prompt")
    if isinstance(chosen, str) and isinstance(rejected, str) and not is_hh(chosen):
        return _shared_text(chosen, rejected)
    better, worse = _turns(chosen, "chosen"), _turns(rejected, "rejected")
    count = _shared_turns(better, worse)
    for name, tail in (("chosen", better[count:]), ("rejected", worse[count:])):
        if len(tail) != 1 or tail[0]["role"] != "assistant":
            seen = f"{len(tail)} turns after the {count} that both share"
            raise wrong(name, seen, "chosen and rejected may differ in their last assistant turn only")
    if count == 0:
        raise wrong("prompt", "there is none and chosen and rejected share no turn", "add a prompt field")
    return better[:count], better[count]["content"], worse[count]["content"]


def _shared_turns(chosen: Messages, rejected: Messages) -> int:
    if chosen == rejected:
        return len(chosen) - 1
    same = [a == b for a, b in zip(chosen, rejected, strict=False)]
    return same.index(False) if False in same else len(same)


def _shared_text(chosen: str, rejected: str) -> tuple[Messages, str, str]:
    """Find trl's implicit prompt of two texts, the common prefix up to its last white space; return it and the
    rests."""
    check_text(chosen, "chosen"), check_text(rejected, "rejected")
    same = next((n for n, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    prefix = chosen[: min(len(chosen), len(rejected)) if same is None else same]
    end = max((m.end() for m in re.finditer(r"\s+", prefix)), default=0)
    if chosen == rejected or not prefix[:end].strip():
        raise wrong("prompt", "there is none and chosen and rejected begin differently or are the same text",
                     "add a prompt field")  # fmt: skip
    return [{"role": "user", "content": prefix[:end].strip()}], chosen[end:], rejected[end:]


def _response(value: object, name: str, prompt: Messages, raw_prompt: object) -> str:
    """Read a response whose prompt is given: text, or messages, which may repeat the prompt first."""
    if isinstance(value, str):
        if isinstance(raw_prompt, str) and is_hh(raw_prompt):
            value = value.removeprefix(raw_prompt).strip()
        return check_text(value, name)
    turns = as_messages(value, name)
    if turns[: len(prompt)] == prompt:
        turns = turns[len(prompt) :]
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise wrong(name, f"{len(turns)} turns after the prompt", "write one assistant turn")
    return turns[0]["content"]


def _turns(value: object, name: str) -> Messages:
    if not isinstance(value, str):
        return as_messages(value, name)
    if not is_hh(value):
        raise wrong(name, f"got {show(value)}", "begin it with '\\n\\nHuman: ' as in the other column")
    turns = parse_hh(value)
    if turns[-1]["role"] != "assistant":
        raise wrong(name, "the last turn is Human's", "end it with '\\n\\nAssistant: ...'")
    if not turns[-1]["content"]:
        raise Unusable("an empty reply")  # 0.1% of the published HH rows
    return check_messages(turns, name)


# --- one field ------------------------------------------------------------------------------------------------------


def _as_row(row: object, wanted: str) -> Row:
    if not isinstance(row, dict):
        raise InputError(f"got {show(row)}; write an object with {wanted}")
    return row


def _extra(row: Row) -> Row:
    return {name: value for name, value in row.items() if name not in _FIELDS}


def _refuse_near_miss(row: Row, name: str) -> None:
    near = get_close_matches(name, [str(k) for k in row if k not in _FIELDS], n=1, cutoff=0.75)
    if near:
        raise wrong(name, f"missing, but there is {near[0]!r}", f"rename {near[0]!r} to {name!r}")


def _need(row: Row, name: str) -> Any:
    if row.get(name) is None:
        _refuse_near_miss(row, name)
        seen = "got null" if name in row else f"missing; the fields are {', '.join(map(str, row)) or '(none)'}"
        raise wrong(name, seen, f"add {name!r} to the row")
    return row[name]
