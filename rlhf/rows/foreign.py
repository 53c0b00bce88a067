"""Recognise rows of well-known data sets that are not read as they are, and say how to write them.

An entry of a table holds the columns that tell the shape, what it is, and what to write instead.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_COMPARISON = "prompt, chosen and rejected (a tie: prompt, responses and equal ranks)"
_RANKING = "prompt, responses and ranks (smaller is better)"
_RATED = f"gather a prompt's rows and write {_RANKING}: minus the rating; to imitate it, rename response to completion"

_Shapes = tuple[tuple[tuple[str, ...], str, str], ...]

# Comparisons that have other columns besides chosen and rejected.
_PAIRS: _Shapes = (
    (("trajectory", "chosen", "rejected"), "an UltraInteract pair", "write the trajectory as prompt, in messages"),
    (("conversations", "chosen", "rejected"), "a ShareGPT pair", f"write {_COMPARISON}, the turns as messages"),
)
_COMPARED: _Shapes = (
    (("conversation_a", "conversation_b"), "an LMArena battle", f"write {_COMPARISON} from them and winner"),
    (("human_ref_A", "human_ref_B"), "an SHP row", f"write {_COMPARISON} from history, them and labels"),
    (("messages", "rejected_response"), "an ms-swift pair", f"write {_COMPARISON}"),
    (("summaries", "choice"), "a comparison of summaries", f"write {_COMPARISON} from info, summaries and choice"),
    (("answers",), "a row of answers with ranks (Nectar)", f"write {_RANKING} from answers"),
    (("completions", "labels"), "an answer in labelled steps", "write prompt and completion, the steps joined"),
    (("completions",), "several completions (UltraFeedback, NeMo-RL)", f"write {_RANKING} from completions"),
    (("message_tree_id", "prompt"), "an OASST tree", f"write {_RANKING} from a message's replies"),
    (("message_id", "text"), "a turn of an OASST tree", f"write {_RANKING} from a turn's replies"),
    (("response", "helpfulness"), "a rated response (HelpSteer2)", _RATED),
    (("response", "score"), "a rated response", _RATED),
    (("prompt", "completion", "label"), "a KTO row", f"write {_COMPARISON} from the rows of one prompt"),
)
_CONVERSATIONS: _Shapes = (
    (("conversations",), "a conversation (ShareGPT)",
     "rename it to messages, each turn with role (for human: user, for gpt: assistant) and content"),
    (("conversation",), "a conversation", "rename it to messages, each turn with role and content"),
    (("text",), "a text in one piece", "write messages, each with role and content, or prompt and completion"),
)  # fmt: skip
# One response, to imitate.
_IMITATED: _Shapes = (
    *_CONVERSATIONS,
    (("instruction", "output"), "an Alpaca row", "write prompt (instruction, input below it) and completion (output)"),
    (("instruction", "response"), "a Dolly row",
     "write prompt (instruction, context below it) and completion (response)"),
    *(((asked, answer), "a question and its answer",
       f"rename {answer} to completion" if asked == "prompt" else "rename them to prompt and completion")
      for asked in ("prompt", "question", "instruction", "query", "problem", "input")
      for answer in ("response", "output", "answer", "solution", "target")),
)  # fmt: skip
_DEMONSTRATIONS: _Shapes = (
    (("messages",), "a conversation", ""),
    (("prompt", "completion"), "a demonstration", ""),
)
_LISTS = {"answers", "completions", "conversations", "conversation", "summaries"}
_TEXTS = {
    "response", "output", "answer", "solution", "target", "text",
    "instruction", "question", "query", "problem", "input",
}  # fmt: skip

# Ends of two columns with one beginning that hold two responses: response_a and response_b, answer_0 and answer_1.
_ENDS = (("a", "b"), ("0", "1"), ("1", "2"), ("j", "k"))


def advice(row: Mapping[str, Any], wanted: str) -> str | None:
    """Return what a row is, and how to write it ("seen; what to do"); None where it has no known shape.

    wanted: "ranking", "demonstration" or "prompt", which the row was to give.
    """
    if all(_texts(row.get(name)) for name in ("chosen", "rejected")):
        return f"chosen, rejected: lists of texts (RewardBench 2, RM-Bench); write {_RANKING}"
    given = {name for name, value in row.items() if value is not None and _usual(name, value)}
    native = ("completion", "messages") if wanted == "demonstration" else ("prompt",) if wanted == "prompt" else ()
    if any(isinstance(row.get(name), str | list) and not str(row[name]).startswith('["') for name in native):
        return None  # it has the fields that are read, and the fault is in them
    if found := _first(given, _PAIRS):
        return found
    if {"chosen", "rejected"} & given or {"responses", "ranks"} <= given:
        return None
    if pair := _two_responses(given):
        return f"{', '.join(pair)}: two responses and a label; write {_COMPARISON}"
    if found := _first(given, _COMPARED):
        return found
    if wanted != "ranking":
        return _first(given, _IMITATED if wanted == "demonstration" else _CONVERSATIONS)
    found = _first(given, _IMITATED + _DEMONSTRATIONS)
    return found and f"{found.partition(';')[0]}, and no comparison; write {_COMPARISON}"


def _first(given: set[str], shapes: _Shapes) -> str | None:
    found = ((names, seen, todo) for names, seen, todo in shapes if given.issuperset(names))
    return next((f"{', '.join(names)}: {seen}; {todo}" for names, seen, todo in found), None)


def _usual(name: str, value: object) -> bool:
    """Return whether a column's value is of the type that the well-known sets have there."""
    if name in _LISTS:
        return isinstance(value, list | tuple)
    return name not in _TEXTS or isinstance(value, str)


def _two_responses(names: set[str]) -> tuple[str, str] | None:
    for name in sorted(names, key=str):
        found = re.fullmatch(r"(.*(?:response|answer|completion|output|reply|summary|generation|candidate)_?)(\w)",
                             str(name), re.IGNORECASE)  # fmt: skip
        for one, two in _ENDS:
            if found and found[2].lower() == one:
                other = found[1] + (two.upper() if found[2].isupper() else two)
                if other in names:
                    return name, other
    return None


def _texts(value: object) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, str) for item in value)
