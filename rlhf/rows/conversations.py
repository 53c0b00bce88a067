"""Rows to imitate, in the shapes of well-known sets, in our fields: messages, or prompt and completion.

Each function reads a row of one shape (`shapes` lists them). A system text beside them (`system`, `system_prompt`)
stays a column of the row, from which it becomes the first turn, as in rows of our own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.rows.comparisons import with_roles
from rlhf.rows.fields import Row
from rlhf.rows.messages import Messages
from rlhf.rows.sources import show, wrong

QUESTIONS = ("prompt", "question", "instruction", "query", "problem", "input")
ANSWERS = ("response", "output", "answer", "solution", "target")
"""Columns of which one may hold a question, and one its answer."""

_GUANACO = re.compile(r"### (Human|Assistant):")
_CHATML = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\s*", re.DOTALL)


def sharegpt(row: Row) -> Row:
    """Read `conversations` or `conversation`, with ShareGPT's names of fields or the usual ones."""
    return {"messages": with_roles(row.get("conversations") or row.get("conversation"))}


def question_and_answer(row: Row, question: str, answer: str) -> Row:
    return {"prompt": row[question], "completion": row[answer]}


def instruction(row: Row, question: str = "instruction", context: str = "input", answer: str = "output") -> Row:
    """Read a question, with what it is about below it and earlier turns before it (Alpaca, Dolly, ms-swift)."""
    parts = [text for text in (row[question], row.get(context)) if text]
    for text in parts:
        if not isinstance(text, str):
            raise wrong(context, f"got {show(text)}", "write text")
    asked, earlier = "\n\n".join(parts), _history(row.get("history"))
    prompt = [*earlier, {"role": "user", "content": asked}] if earlier else asked
    return {"prompt": prompt, "completion": row[answer]}


def question_columns(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the names of the columns that hold a question and its answer; None where there are none. Raises InputError
    where several may be one of them."""
    found = [[name for name in names if isinstance(row.get(name), str) and row[name]] for names in (QUESTIONS, ANSWERS)]
    found[0] += ["prompt"] if isinstance(row.get("prompt"), list | tuple) else []
    if not all(found):
        return None
    for names, meant in zip(found, ("prompt", "completion"), strict=True):
        if len(names) > 1:
            todo = f"name one of them, as in columns: {{{meant}: {names[0]}}}"
            raise wrong(", ".join(names), f"each of them may be the {meant}", todo)
    return found[0][0], found[1][0]


def guanaco(row: Row) -> Row:
    """Read a text of turns that begin with `### Human:` or `### Assistant:`."""
    _, *parts = _GUANACO.split(row["text"])
    roles = {"Human": "user", "Assistant": "assistant"}
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return {"messages": [{"role": roles[speaker], "content": text.strip()} for speaker, text in pairs]}


def chatml(row: Row) -> Row:
    """Read a text of turns between `<|im_start|>` and `<|im_end|>`."""
    text = row["text"].strip()
    turns = _CHATML.findall(text)
    rest = _CHATML.sub("", text)
    if rest.strip():
        raise wrong("text", f"{show(rest)} stands outside the turns", "end every turn with <|im_end|>")
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _history(value: Any) -> Messages:
    """Read earlier turns: pairs of a question and its answer, or messages."""
    if value in (None, "", []):
        return []
    if isinstance(value, Sequence) and all(isinstance(turn, Mapping) for turn in value):
        return list(with_roles(value))
    pairs = (
        [turn for turn in value if isinstance(turn, list | tuple) and len(turn) == 2] if isinstance(value, list) else []
    )
    if not pairs or len(pairs) < len(value):
        raise wrong("history", f"got {show(value)}", "write pairs of a question and its answer")
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for turn in pairs for role, text in zip(roles, turn, strict=True)]
