"""Find the conversations in a row of data that a moderator judges: one for each of its responses.

A row of a known shape (`rlhf.rows.shapes`) is brought into our fields first. Of any other, the prompt is `messages`,
`text`, `prompt` or the one column that holds a question, and each text is a response that stands in a column whose name
says so: response, completion, output, answers, response_a, chosen and their like, and what the readers of data take for
an answer. None is left out, so a row may give more conversations than the readers make of it, and never fewer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from rlhf.rows import asked, foreign
from rlhf.rows.comparisons import with_roles
from rlhf.rows.messages import Messages, as_messages, check_text, is_hh, parse_hh
from rlhf.rows.sources import show, wrong

TEXTS = ("messages", "text", "prompt")
"""Columns of a text or a conversation; of several, the first is read."""

_RESPONSE = re.compile(
    r".*(?:response|answer|completion|output|generation|candidate|solution|target|repl(?:y|ie)|summar(?:y|ie)"
    r"|chosen|rejected)s?(?:[_ ]?(?:\d+|\w))?",
    re.IGNORECASE,
)
_INSIDE = ("text", "content", "value")
"""Keys of a response that is an object."""


def conversations_in(row: Mapping[str, Any]) -> list[Messages]:
    """Return the conversations of a row. Raises InputError for a row without a text, for texts where none is read, and
    for a row of a known shape that is not as its set has them."""
    ours = {str(name): foreign.decoded(str(name), value) for name, value in row.items()}
    found = foreign.in_our_fields(ours)
    rows = [ours] if found is None else [{**one, "text": None} for one in found]  # it repeats what the columns say
    talks = [talk for one in rows for talk in _conversations(one)]
    if not talks:
        seen = f"missing; the fields are {', '.join(ours) or '(none)'}"
        raise wrong("text", seen, "write text, prompt or messages")
    return talks


def _conversations(row: Mapping[str, Any]) -> list[Messages]:
    prompt, responses = _prompt(row), list(_responses(row))
    if row.get("messages") is None or prompt[-1]["role"] != "assistant":
        return [_joined(prompt, response) for response in responses] or ([prompt] if prompt else [])
    others = [_joined(prompt[:-1], response) for response in responses]
    return [prompt, *(talk for talk in others if talk != prompt)]


def _prompt(row: Mapping[str, Any]) -> Messages:
    name = next((name for name in TEXTS if row.get(name) is not None), None)
    if name is None:
        return asked.prompt_of(row, strict=False) or []
    value = row[name]
    turns = _turns("user", check_text(value, name), name) if isinstance(value, str) else as_messages(value, name)
    return asked.with_system(turns, row)


def _responses(row: Mapping[str, Any]) -> Iterator[Messages]:
    for name, value in row.items():
        steps = name == "steps" or (name == "completions" and isinstance(row.get("labels"), list))
        if steps and isinstance(value, list) and all(isinstance(step, str) for step in value):
            yield from _texts("\n".join(value), name)
        elif _RESPONSE.fullmatch(name) and not (name == "target" and row.get("text") is not None):  # whom it is about
            yield from _texts(value, name)


def _texts(value: Any, name: str) -> Iterator[Messages]:
    """Yield the responses in a column's value: a text, turns, an object with a text, or a list of them."""
    if isinstance(value, str):
        yield _turns("assistant", check_text(value, name) if value.strip() else value, name)
    elif isinstance(value, Mapping) and "role" in value:
        yield as_messages([value], name)
    elif isinstance(value, Mapping):
        held = [key for key in value if key in _INSIDE or _RESPONSE.fullmatch(str(key))]
        if value and not held:
            raise wrong(name, f"no text is known in {show(value)}", "write the text alone, or take it out")
        for key in held:
            yield from _texts(value[key], f"{name}.{key}")
    elif asked.are_turns(value):
        yield as_messages(with_roles(value), name)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part, name)


def _joined(prompt: Messages, response: Messages) -> Messages:
    """Return a prompt with its response, which may be the whole conversation, the prompt in it."""
    whole = response[0]["role"] in ("system", "user") and asked.within(prompt, response)
    return response if whole else [*prompt, *response]


def _turns(role: str, text: str, name: str) -> Messages:
    """Return a text as one turn, or the turns of HH's dialogue string; a column `text` is one turn whatever it is."""
    if name == "text" or not is_hh(text):
        return [{"role": role, "content": text}]
    return [turn for turn in parse_hh(text) if turn["content"]]
