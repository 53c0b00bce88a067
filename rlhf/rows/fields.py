"""Read the fields of our records from a row that has them.

Our rows (extra columns are kept):

* rankings: trl's preference formats, `prompt`/`chosen`/`rejected` as text or messages, where `prompt` may be absent (it
  is then the part that both share); Anthropic HH's ``"\\n\\nHuman: ...\\n\\nAssistant: ..."`` strings; K responses with
  ties, ``{"prompt": ..., "responses": [...], "ranks": [...]}`` (a smaller rank is better).
* demonstrations: `messages`; `prompt`/`completion`; with a `label` (KTO), those that are true.
* prompts: `prompt`; the prompt of any row above.

`asked` finds the prompt where it has another column, and a system text beside it. Rows of other shapes are brought into
this form before (`foreign`). Every mistake raises an `InputError` of one line: field: what was seen; what to do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple, TypeVar

from rlhf.errors import InputError
from rlhf.rows import asked
from rlhf.rows.messages import Messages, as_messages, as_prompt, check_messages, check_text, is_hh, parse_hh
from rlhf.rows.sources import show, wrong

FIELDS = ("prompt", "chosen", "rejected", "responses", "ranks", "completion", "messages")

Row = dict[str, Any]
"""A JSON object whose fields are not checked yet."""


class Unusable(Exception):
    """Raised for a row to leave out and count: it has a known flaw of a public data set, or its label says so."""


class Missing(InputError):
    """Raised where a field is not there, nor any column of nearly its name."""


class RankingFields(NamedTuple):
    prompt: Messages
    responses: tuple[str, ...]
    ranks: tuple[float, ...]
    columns: Row
    thinking: tuple[str, ...] = ()
    text: bool = False


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


def further_columns(row: Mapping[str, Any]) -> Row:
    """Return a row's columns besides the fields of the accepted shapes."""
    return {name: value for name, value in row.items() if name not in FIELDS}


def ranking_fields(row: object) -> RankingFields:
    """Read a row of preferences. Identical responses get equal ranks."""
    return _read(row, "ranking", _ranking)


def demonstration_fields(row: object) -> DemonstrationFields:
    """Read a conversation, or a prompt and its completion. Raises Unusable where its label is false (KTO)."""
    return _read(row, "demonstration", _demonstration)


def prompt_fields(row: object) -> PromptFields:
    """Read a row's prompt: the field, or the prompt of a demonstration or ranking. All other fields are kept in
    `columns`, since reward functions get them, as from trl's GRPOTrainer."""
    return _read(row, "prompt", _prompt)


_WANTED = {
    "ranking": "prompt, chosen and rejected, or prompt, responses and ranks",
    "demonstration": "prompt and completion, or messages",
    "prompt": "prompt",
}
Fields = TypeVar("Fields", RankingFields, DemonstrationFields, PromptFields)


def _read(row: object, wanted: str, read: Callable[[Row], Fields]) -> Fields:
    if not isinstance(row, dict):
        raise InputError(f"got {show(row)}; write an object with {_WANTED[wanted]}")
    return read({name: asked.decoded(name, value) if name in FIELDS else value for name, value in row.items()})


def _ranking(row: Row) -> RankingFields:
    columns = further_columns(row)
    if row.get("responses") is not None:
        if row.get("ranks") is None and isinstance(row.get("scores"), list):
            raise wrong("ranks", "missing, but there are scores", "write ranks, smaller is better: minus the scores")
        responses, ranks = _need(row, "responses"), _need(row, "ranks")
        for name, value in (("responses", responses), ("ranks", ranks)):
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise wrong(name, f"got {show(value)}", "write a list")
        prompt = asked.prompt_of(row) or as_prompt(_need(row, "prompt"))
        answers = [_answer(value, f"responses[{n}]") for n, value in enumerate(responses)]
    else:
        if row.get("chosen") is None:
            _refuse_near_miss(row, "responses")
        prompt, better, worse = _compared(row, _need(row, "chosen"), _need(row, "rejected"))
        answers = [_answer(better, "chosen"), _answer(worse, "rejected")]
        ranks = (1, 1) if answers[0][0] == answers[1][0] else (1, 2)
    texts, thinking = zip(*answers, strict=True) if answers else ((), ())
    kept = thinking if any(thinking) else ()
    return RankingFields(prompt, texts, tuple(ranks), columns, kept, _is_text(row, prompt))


def _answer(value: Any, name: str) -> tuple[Any, str]:
    """Return an answer's text and its thinking, "" for none, of a text or a list of one assistant's turn."""
    if not asked.are_turns(value):
        return value, ""
    turn, *more = as_messages(value, name)
    if more or turn["role"] != "assistant" or turn.get("tool_calls"):
        seen = "it calls tools (tool_calls)" if turn.get("tool_calls") else f"got {show(value)}"
        raise wrong(name, seen, "only one assistant turn of text can be compared")
    return turn["content"], turn.get("reasoning_content", "")


def _demonstration(row: Row) -> DemonstrationFields:
    columns = further_columns(row)
    if row.get("messages") is not None:
        turns = asked.with_system(as_messages(row["messages"], "messages"), row)
        obey_label(row)
        return DemonstrationFields(turns, 0, columns)
    prompt = asked.prompt_of(row)
    if prompt is None:
        prompt = as_prompt(_need(row, "messages" if row.get("completion") is None else "prompt"))
    completion = _need(row, "completion")
    if isinstance(completion, str):
        turns = [{"role": "assistant", "content": check_text(completion, "completion")}]
    else:
        turns = as_messages(completion, "completion")
    obey_label(row)
    return DemonstrationFields(prompt + turns, len(prompt), columns)


def _prompt(row: Row) -> PromptFields:
    columns = {name: value for name, value in row.items() if name != "prompt"}
    given = row.get("prompt")
    if given is None and row.get("messages") is not None:
        turns = asked.with_system(as_messages(row["messages"], "messages"), row)
        return PromptFields(turns[:-1] if turns[-1]["role"] == "assistant" else turns, columns)
    conversations = asked.are_turns(row.get("chosen")) and asked.are_turns(row.get("rejected"))
    if conversations or (given is None and is_ranking(row)):
        prompt = _compared(row, row["chosen"], row["rejected"])[0] if conversations else _ranking(row).prompt
    else:
        prompt = asked.prompt_of(row, strict=given is None) or as_prompt(_need(row, "prompt"))
    return PromptFields(prompt, columns, _is_text(row, prompt))


def _is_text(row: Row, prompt: Messages) -> bool:
    """Return whether a row's prompt is plain text, and not the turns that two conversations share."""
    conversations = all(asked.are_turns(row.get(name)) for name in ("chosen", "rejected"))
    own = isinstance(row.get("prompt"), str) or not conversations
    return own and len(prompt) == 1 and asked.is_plain(row)


NOT_TO_IMITATE = "label false, which says not to imitate it"
WEIGHS_NOTHING = "weight 0, which says not to learn from the ranking"

# A label of KTO's: whether the completion is one to imitate.
_DESIRABLE = (True, 1, "true", "1", "1.0", "yes", "desirable", "chosen", "good", "positive", "accepted", "thumbs_up")
_UNDESIRABLE = (
    False, 0, -1, "false", "0", "-1", "0.0", "no", "undesirable", "rejected", "bad", "negative", "thumbs_down",
)  # fmt: skip


def label_of(row: Row) -> bool | None:
    """Return whether a completion is labelled as one to imitate; None: it has no label. A text that is no truth value
    is a column like others; a number is refused, since it may be a grade."""
    label = row.get("label")
    label = label.strip().lower() if isinstance(label, str) else label
    if label in _DESIRABLE or label in _UNDESIRABLE:
        return label in _DESIRABLE
    if label is not None and not isinstance(label, str):
        raise wrong("label", f"got {show(label)}", "write true or false (KTO), or give the column another name")
    return None


def obey_label(row: Row) -> None:
    """Raise Unusable for a completion that is labelled as one not to imitate."""
    if label_of(row) is False:
        raise Unusable(NOT_TO_IMITATE)


# --- two responses --------------------------------------------------------------------------------------------------


def _compared(row: Row, chosen: object, rejected: object) -> tuple[Messages, Any, Any]:
    """Return a preference row's prompt, given or shared by both, and the two responses: texts, or lists of a turn."""
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise wrong("rejected", f"got {show(rejected)}", "write it as chosen is: both text, or both messages")
    if isinstance(chosen, str) and isinstance(rejected, str) and not is_hh(chosen):
        prompt = asked.prompt_of(row)
        if prompt is None:
            _refuse_near_miss(row, "prompt")
            asked.refuse_other_prompts(row)
            return _shared_text(chosen, rejected)
        if is_hh(str(row.get("prompt"))):
            chosen, rejected = chosen.strip(), rejected.strip()
        return prompt, check_text(chosen, "chosen"), check_text(rejected, "rejected")
    better, worse = _turns(chosen, "chosen"), _turns(rejected, "rejected")
    count = _shared_turns(better, worse)
    for name, tail in (("chosen", better[count:]), ("rejected", worse[count:])):
        if len(tail) != 1 or tail[0]["role"] != "assistant":
            seen = f"{len(tail)} turns after the {count} that both share"
            raise wrong(name, seen, "chosen and rejected may differ in their last assistant turn only")
    prompt = asked.shared_prompt(row, better[:count])
    if prompt is None:
        _refuse_near_miss(row, "prompt")
        raise wrong("prompt", "there is none and chosen and rejected share no turn", "add a prompt field")
    return prompt, better[count:], worse[count:]


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


def _refuse_near_miss(row: Row, name: str) -> None:
    """Raise InputError where a column is a misspelt `name`: nearly the same letters, and a value of its type.

    A name of several words or with a number is another column: prompt_id, num_responses, response_2.
    """
    spelt = {str(k): k for k in row if k not in FIELDS and re.fullmatch(r"\s*([a-z]+|[A-Z][a-z]*|[A-Z]+)\s*", str(k))}
    for near in get_close_matches(name, spelt, n=3, cutoff=0.75) + [k for k in spelt if k.strip().lower() == name]:
        value = row[spelt[near]]
        if name in ("responses", "ranks"):
            fits = isinstance(value, list)
        else:
            fits = asked.are_turns(value) or (isinstance(value, str) and name != "messages")
        if fits and len(near) < len(name) + 2:
            raise wrong(name, f"missing, but there is {near!r}", f"rename {near!r} to {name!r}")


def _need(row: Row, name: str) -> Any:
    if row.get(name) is None:
        _refuse_near_miss(row, name)
        seen = "got null" if name in row else f"missing; the fields are {', '.join(map(str, row)) or '(none)'}"
        raise Missing(f"{name}: {seen}; add {name!r} to the row")
    return row[name]
