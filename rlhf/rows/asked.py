"""Find what a row asks: its prompt, also where another column holds it, and the system text beside it.

What changes the meaning of a row is used, or the row is refused: a question, a context or a system text that stands in
a column of its own is never left out of the prompt silently.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from rlhf.rows.messages import Messages, as_messages, as_prompt, check_text, is_hh
from rlhf.rows.sources import show, wrong

QUESTIONS = ("question", "instruction", "query", "problem", "input", "request")
"""Columns of which one may hold the whole prompt, where there is no `prompt`."""
SYSTEM = ("system", "system_prompt", "system_message")
CONTEXT = ("context", "history")
"""Columns that may hold what stands before the question."""

# Words in the name of a column that holds (a part of) a prompt, and words that make it a remark about one.
_PROMPT_WORDS = {
    *QUESTIONS, *SYSTEM, *CONTEXT, "prompt", "prompts", "instructions", "conversation", "conversations", "dialogue",
    "dialog", "messages", "trajectory", "turns", "post", "passage", "document", "article", "background", "user",
}  # fmt: skip
_REMARKS = {
    "id", "ids", "idx", "index", "hash", "uid", "uuid", "key", "type", "kind", "source", "dataset", "category", "topic",
    "language", "lang", "length", "len", "tokens", "count", "num", "model", "name", "url", "date", "time", "score",
}  # fmt: skip


def prompt_of(row: Mapping[str, Any], strict: bool = True) -> Messages | None:
    """Return a row's prompt with its system text; None where no column holds one.

    strict: refuse a row whose question or context, in a column of its own, is not in its prompt. Prompts for PPO may
    have such columns: they reach the reward functions.
    """
    others = [name for name in (*QUESTIONS, *CONTEXT) if _holds_text(row.get(name))]
    value = row.get("prompt")
    if value is not None:
        prompt = with_system(as_prompt(value), row)
        asked = " ".join(_words(turn["content"]) for turn in prompt)
        for name in others if strict else ():
            if not isinstance(row[name], str) or _words(row[name]) not in asked:
                raise wrong(name, f"{show(row[name])} is not in the prompt",
                            f"write it into the prompt, or take the column {name!r} out")  # fmt: skip
        return prompt
    questions = [name for name in others if name in QUESTIONS]
    if not questions:
        return None
    if len(others) > 1:
        raise wrong("prompt", f"there is none, and {', '.join(others)} hold text", "write them into one prompt")
    return with_system(_question(row[questions[0]], questions[0]), row)


def is_plain(row: Mapping[str, Any]) -> bool:
    """Return whether the column that holds the prompt is plain text: not messages, not HH's dialogue."""
    values = [row.get("prompt"), *(row[name] for name in QUESTIONS if _holds_text(row.get(name)))]
    value = next((value for value in values if value is not None), None)
    return isinstance(value, str) and not is_hh(value)


def shared_prompt(row: Mapping[str, Any], shared: Messages) -> Messages | None:
    """Return the prompt of two conversations that share their first turns; None where neither they nor the row hold
    one. A `prompt` beside them is one or several of the shared turns, or ends with them all."""
    if row.get("prompt") is not None:
        prompt = as_prompt(row["prompt"])
        if within(prompt, shared):
            prompt = shared
        elif not _same(prompt[len(prompt) - len(shared) :], shared):
            raise wrong("prompt", f"{show(prompt[-1]['content'])} is no turn that chosen and rejected share",
                        "take it out: the turns that both share are the prompt")  # fmt: skip
    elif any(turn["role"] == "user" for turn in shared):
        prompt = shared
    else:
        found = prompt_of(row)
        if found is None:
            return None
        prompt = [*shared, *(turn for turn in found if turn["role"] != "system" or not shared)]
    return with_system(prompt, row)


def with_system(turns: Messages, row: Mapping[str, Any]) -> Messages:
    """Return a conversation with the system text that stands in a column beside it as its first turn.

    It is there already where a first system turn begins with it, or a user's with it and a line break."""
    given = {name: row[name] for name in SYSTEM if _holds_text(row.get(name))}
    if not given:
        return turns
    name, text = next(iter(given.items()))
    if not isinstance(text, str):
        raise wrong(name, f"got {show(text)}", "write text, or a system turn in the messages")
    if len(set(map(str, given.values()))) > 1:
        raise wrong(", ".join(given), "two different system texts", "keep one of them")
    first = turns[0]["content"]
    if turns[0]["role"] != "system":
        if re.match(r"\s*" + r"\s+".join(map(re.escape, text.split())) + r"[^\S\n]*\n", first):
            return turns
    elif _words(first).startswith(_words(text)):
        return turns
    else:
        seen = f"{show(text)}, but the messages begin with {show(turns[0]['content'])}"
        raise wrong(name, seen, "keep one of the two system texts")
    return [{"role": "system", "content": check_text(text, name)}, *turns]


def refuse_other_prompts(row: Mapping[str, Any]) -> None:
    """Raise InputError for a column that may be the prompt of two texts without one.

    Their common beginning is trl's implicit prompt; beside such a column it would be an accident.
    """
    for name, value in row.items():
        words = set(re.findall(r"[a-z]+", str(name).lower()))
        prompt_like = str(name).lower() in _PROMPT_WORDS or (words & _PROMPT_WORDS and not words & _REMARKS)
        if (are_turns(value) or (prompt_like and _holds_text(value))) and name not in ("chosen", "rejected"):
            raise wrong("prompt", f"there is none, but there is {name!r} ({show(value)})",
                        "write it as prompt, or take the column out")  # fmt: skip


def are_turns(value: object) -> bool:
    """Return whether a value is a list whose first item is a turn of a conversation."""
    turn = value[0] if isinstance(value, list | tuple) and value else None
    return isinstance(turn, dict) and bool(turn.keys() & {"role", "from"})


def decoded(name: str, value: Any) -> Any:
    """Return messages (or a list of responses or ranks) from a JSON string, in which tables hold them; other values
    as they are."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return parsed if are_turns(parsed) or name in ("responses", "ranks") else value


def _question(value: object, name: str) -> Messages:
    if not isinstance(value, str):
        return as_messages(value, name)
    return as_prompt(value) if is_hh(value) else [{"role": "user", "content": check_text(value, name)}]


def _holds_text(value: object) -> bool:
    """Return whether a value may be a part of a prompt: a text, or what holds texts, that is not empty."""
    return bool(value.strip()) if isinstance(value, str) else isinstance(value, list | tuple | dict) and bool(value)


def _words(text: str) -> str:
    return " ".join(text.split())


def _same(one: Messages, other: Messages) -> bool:
    plain = [[(turn["role"], _words(turn["content"])) for turn in turns] for turns in (one, other)]
    return plain[0] == plain[1]


def within(part: Messages, whole: Messages) -> bool:
    """Return whether the turns of `part` stand in `whole`, one after the other, up to white space."""
    return any(_same(part, whole[n : n + len(part)]) for n in range(len(whole) - len(part) + 1))
