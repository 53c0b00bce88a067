"""Conversations as data come with them: messages read from rows, and checked.

A message has `role` and `content` (text), and may have `reasoning_content` (an assistant's thinking), `tool_calls`,
`name`, `tool_call_id`, and ``train: False`` (an assistant turn without loss). Rows may say the same in other words: the
aliases below, contents as lists of text parts, JSON text. Other keys of a message are metadata and left out.

Every mistake raises an `InputError` of one line: field: what was seen; what to do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from rlhf.rows.sources import show, wrong

Messages = list[dict[str, Any]]
"""A conversation, a message per turn."""

ROLES = ("system", "user", "assistant", "tool")
ALIASES = {
    "developer": "system", "human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant",
    "model": "assistant", "chatbot": "assistant", "ai": "assistant", "function": "tool", "observation": "tool",
    "ipython": "tool",
}  # fmt: skip
"""Other names of roles: OpenAI's, ShareGPT's, Gemma's, OASST's, Llama's."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""The names of an assistant's thinking; transformers gives a template the first two."""
_TEXT_PARTS = ("text", "input_text", "output_text")
_THINKING_PARTS = ("thinking", "reasoning")
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


def check_several(texts: object) -> None:
    """Raise InputError for one text where several are asked for: its letters would be judged, one by one."""
    if isinstance(texts, str):
        raise wrong("texts", f"got one text, {show(texts)}", "hand in a list of them")


def check_messages(messages: object, name: str) -> Messages:
    """Return `messages`, checked: a list of {role, content} with known roles and contents that are not empty.

    Empty may be a system prompt, a tool's result, and the content of a turn that calls tools."""
    if not isinstance(messages, list) or not messages:
        raise wrong(name, f"got {show(messages)}", "write text or a list of messages")
    for n, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise wrong(f"{name}[{n}]", f"got {show(message)}", "write {'role': ..., 'content': ...}")
        role, calls = message["role"], message.get("tool_calls")
        if role not in ROLES:
            near = get_close_matches(str(role), ROLES, n=1, cutoff=0.5)
            todo = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(ROLES)}"
            raise wrong(f"{name}[{n}].role", f"got {show(role)}", todo)
        if message["content"] != "" or not (calls or role in ("system", "tool")):
            check_text(message["content"], f"{name}[{n}].content")
        if "reasoning_content" in message:
            check_text(message["reasoning_content"], f"{name}[{n}].reasoning_content")
        if role != "assistant" and (calls or "reasoning_content" in message):
            field = "tool_calls" if calls else "reasoning_content"
            raise wrong(f"{name}[{n}].{field}", f"the role is {role!r}", "only an assistant turn has it")
    return messages


def check_prompt(messages: object, name: str) -> Messages:
    """Return `messages`, checked: a conversation that doesn't end with an assistant turn."""
    turns = check_messages(messages, name)
    if turns[-1]["role"] == "assistant":
        raise wrong(name, "the last turn is 'assistant'", "end a prompt with a user turn")
    return turns


def as_messages(value: object, name: str) -> Messages:
    """Read messages: roles and fields under their usual names, contents as text. JSON text of a list is read, too."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _json(value, name)
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise wrong(name, f"got {show(value)}", "write a list of messages")
    return check_messages([_message(message, f"{name}[{n}]") for n, message in enumerate(value)], name)


def _message(message: Any, name: str) -> Any:
    if not isinstance(message, Mapping) or "role" not in message:
        return message
    role = message["role"]
    role = ALIASES.get(role.lower(), role.lower()) if isinstance(role, str) else role
    calls = _calls(message, name)
    if "content" not in message and not calls:
        return dict(message)
    content, thought = _content(message.get("content"), bool(calls), f"{name}.content")
    read: dict[str, Any] = {"role": role, "content": content}
    thoughts = {key: message[key] for key in REASONING if message.get(key) not in (None, "")}
    thoughts |= {"content": thought} if thought else {}
    if len(set(map(str, thoughts.values()))) > 1:
        raise wrong(f"{name}.{'/'.join(thoughts)}", "different texts", "keep one of them")
    if thoughts:
        read["reasoning_content"] = next(iter(thoughts.values()))
    if calls:
        read["tool_calls"] = calls
    read |= {key: message[key] for key in ("name", "tool_call_id") if isinstance(message.get(key), str)}
    if not _trained(message, name):
        read["train"] = False
    return read


def _content(content: Any, calls: bool, name: str) -> tuple[Any, str]:
    """Return a content as one text, and the thinking among its parts."""
    if content is None and calls:
        return "", ""
    if not isinstance(content, list):
        return content, ""
    text, thought = "", ""
    for n, part in enumerate(content):
        kind = part.get("type", "text") if isinstance(part, Mapping) else None
        said = part if isinstance(part, str) else part.get("text") if kind in _TEXT_PARTS else None
        if isinstance(said, str):
            text += said
        elif kind in _THINKING_PARTS and isinstance(part.get(kind), str):
            thought += part[kind]
        else:
            seen = f"a part of type {kind!r}" if isinstance(kind, str) and kind not in _TEXT_PARTS else show(part)
            raise wrong(f"{name}[{n}]", f"got {seen}", "only text is read; take the part out")
    return text, thought


def _calls(message: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Read tool calls in OpenAI's form: {'type': 'function', 'function': {'name': ..., 'arguments': ...}}."""
    calls, name = message.get("tool_calls"), f"{name}.tool_calls"
    if not calls and message.get("function_call"):  # OpenAI's before tools
        calls = [message["function_call"]]
    calls = _json(calls, name) if isinstance(calls, str) and calls.strip() else calls
    if not calls:
        return []
    if not isinstance(calls, Sequence):
        raise wrong(name, f"got {show(calls)}", "write a list of calls")
    read = []
    for n, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            todo = "write {'type': 'function', 'function': {'name': ..., 'arguments': {...}}}"
            raise wrong(f"{name}[{n}]", f"got {show(call)}", todo)
        arguments = function.get("arguments")
        made = {
            "type": "function",
            "function": {"name": function["name"], "arguments": {} if arguments is None else arguments},
        }
        read.append(({"id": call["id"]} if isinstance(call.get("id"), str) else {}) | made)
    return read


def _trained(message: Mapping[str, Any], name: str) -> bool:
    """Read whether a turn is trained: OpenAI's `weight` 0 or 1, axolotl's `train`, ms-swift's `loss`."""
    for key in ("weight", "train", "loss"):
        value = message.get(key)
        if value is not None and value not in (0, 1):
            raise wrong(f"{name}.{key}", f"got {show(value)}", "write 0 or 1: a turn is trained or not")
    return all(message.get(key) in (None, 1) for key in ("weight", "train", "loss"))


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise wrong(name, f"{error} in {show(text)}", "write a list, or JSON text of one") from None


def text_of(messages: Messages) -> str:
    """Return a conversation as one text: a lone user's turn as it is, else each turn behind its role."""
    if len(messages) == 1 and messages[0]["role"] == "user":
        return str(messages[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


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
