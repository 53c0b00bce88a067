"""Conversations as data come with them: messages read from rows, and checked.

Every mistake raises an `InputError` of one line: field: what was seen; what to do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches

from rlhf.sources import show, wrong

Messages = list[dict[str, str]]
"""A conversation: role (system, user or assistant) and content of each turn."""

ROLES = ("system", "user", "assistant")
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def check_text(value: object, name: str) -> str:
    """Return `value`, checked: text that is not empty and has no half of a character."""
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


def check_texts(values: tuple[str, ...], name: str) -> None:
    """Raise InputError for a value that is not text, or is empty."""
    for n, value in enumerate(values):
        check_text(value, f"{name}[{n}]")


def check_messages(messages: object, name: str) -> Messages:
    """Return `messages`, checked: a list of {role, content} with known roles and contents that are not empty."""
    if not isinstance(messages, list) or not messages:
        raise wrong(name, f"got {show(messages)}", "write text or a list of messages")
    for n, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise wrong(f"{name}[{n}]", f"got {show(message)}", "write {'role': ..., 'content': ...}")
        if message["role"] not in ROLES:
            near = get_close_matches(str(message["role"]), ROLES, n=1, cutoff=0.5)
            todo = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(ROLES)}"
            raise wrong(f"{name}[{n}].role", f"got {show(message['role'])}", todo)
        check_text(message["content"], f"{name}[{n}].content")
    return messages


def check_prompt(messages: object, name: str) -> Messages:
    """Return `messages`, checked: a conversation that doesn't end with an assistant turn."""
    turns = check_messages(messages, name)
    if turns[-1]["role"] == "assistant":
        raise wrong(name, "the last turn is 'assistant'", "end a prompt with a user turn")
    return turns


def as_messages(value: object, name: str) -> Messages:
    """Reduce messages to role and content; content in parts is joined if all parts are text."""
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
    return check_messages(turns, name)


def as_prompt(value: object) -> Messages:
    """Read a prompt: text, HH's dialogue string, or messages that don't end with an assistant turn."""
    if not isinstance(value, str):
        turns = as_messages(value, "prompt")
    elif is_hh(value):
        turns = parse_hh(value)
        if turns[-1] == {"role": "assistant", "content": ""}:
            turns = turns[:-1]
    else:
        turns = [{"role": "user", "content": check_text(value, "prompt")}]
    return check_prompt(turns, "prompt")


def is_hh(text: str) -> bool:
    """Return whether a text begins as Anthropic HH's dialogue strings do: "\\n\\nHuman: ...", or without these line
    breaks where a reply follows."""
    return bool(_HH_TURN.match(text) or (text.lstrip().startswith("Human:") and "\n\nAssistant:" in text))


def parse_hh(text: str) -> Messages:
    """Parse HH's dialogue string; two turns of one speaker in a row (0.2% of the rows) become one."""
    parts = _HH_TURN.split(f"\n\n{text.lstrip()}")[1:]
    turns: Messages = []
    for speaker, content in zip(parts[::2], parts[1::2], strict=True):
        role, content = ("user" if speaker == "Human" else "assistant"), content.strip()
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] = f"{turns[-1]['content']}\n\n{content}".strip()
        else:
            turns.append({"role": role, "content": content})
    return turns
