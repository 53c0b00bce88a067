"""Rows of trees and of labelling tools' exports, in our fields: one row of theirs may give several of ours.

`oasst_tree` and `oasst_messages` read OpenAssistant's trees, a ranking for each turn that has several replies.
`label_studio` reads tasks with their annotations, `open_webui` the ratings of a chat front end.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf.errors import InputError
from rlhf.rows.asked import SYSTEM, with_system
from rlhf.rows.comparisons import FIRST, SECOND, number, pair
from rlhf.rows.fields import Row, Unusable
from rlhf.rows.messages import Messages, as_prompt
from rlhf.rows.sources import show, wrong

Found = Row | Unusable | InputError
"""A row of ours, or why there is none: to count, or to name."""

# Ends of two columns with one beginning that hold two responses: response_a and response_b, answer_0 and answer_1.
_OF_TWO = re.compile(
    r"(.*(?:response|answer|completion|output|reply|summary|generation|candidate|text)[_ ]?)(\w)", re.IGNORECASE
)
_ENDS = (("a", "b"), ("0", "1"), ("1", "2"), ("j", "k"))


def two_responses(names: Any) -> tuple[str, str] | None:
    """Return the names of two columns that hold two responses to one prompt; None where there are none."""
    for name in sorted(names, key=str):
        found = _OF_TWO.fullmatch(str(name))
        for one, two in _ENDS:
            if found and found[2].lower() == one:
                other = found[1] + (two.upper() if found[2].isupper() else two)
                if other in names:
                    return name, other
    return None


# --- OpenAssistant's trees ------------------------------------------------------------------------------------------


def oasst_tree(row: Row) -> Iterator[Found]:
    """Read a tree of messages that hold their replies."""
    return _answers_in(row["prompt"], [])


def oasst_messages(rows: Sequence[tuple[str, Row]]) -> Iterator[tuple[str, Found]]:
    """Read trees from rows that are single messages and name their parents, in any order."""
    nodes = {row["message_id"]: {**row, "replies": []} for _, row in rows}
    for where, row in rows:
        parent = row.get("parent_id")
        if parent is None:
            continue
        if parent in nodes:
            nodes[parent]["replies"].append(nodes[row["message_id"]])
        else:
            yield where, Unusable("a message whose parent is not there")
    for where, row in rows:
        if row.get("parent_id") is None:
            for found in _answers_in(nodes[row["message_id"]], []):
                yield where, found


def _answers_in(root: Mapping[str, Any], before: Messages) -> Iterator[Found]:
    """Yield, for every user's turn of a tree, the conversation up to it and the replies with their ranks."""
    waiting = [(root, before)]
    while waiting:
        node, path = waiting.pop(0)
        turn = {"role": node.get("role"), "content": node.get("text")}
        replies = [reply for reply in node.get("replies") or [] if not _is_deleted(reply)]
        for _ in range(len(node.get("replies") or []) - len(replies)):
            yield Unusable("a deleted or refused message")
        waiting += [(reply, [*path, turn]) for reply in replies]
        if node.get("role") == "prompter" and replies:
            yield from _compared([*path, turn], replies)


def _compared(prompt: Messages, replies: Sequence[Mapping[str, Any]]) -> Iterator[Found]:
    ranked = [reply for reply in replies if reply.get("rank") is not None] if len(replies) > 1 else replies
    for _ in range(len(replies) - len(ranked)):
        yield Unusable("a reply without a rank")
    if ranked:
        try:
            ranks = [number(reply, "rank") for reply in ranked] if len(ranked) > 1 else [1]
        except InputError as error:
            yield error
            return
        yield {"prompt": prompt, "responses": [reply.get("text") for reply in ranked], "ranks": ranks}


def _is_deleted(node: Mapping[str, Any]) -> bool:
    return bool(node.get("deleted")) or node.get("review_result") is False


# --- labelling tools ------------------------------------------------------------------------------------------------


def label_studio(row: Row) -> Iterator[Found]:
    """Read a task: a ranking for every annotation that compares (pairwise, ranker), a demonstration for a text."""
    for annotation in row["annotations"]:
        if annotation.get("was_cancelled"):
            yield Unusable("a skipped task")
            continue
        given = annotation.get("completed_by")
        given = given.get("email", given.get("id")) if isinstance(given, Mapping) else given
        labeler = {} if given is None else {"labeler": str(given)}
        results = [result for result in annotation.get("result") or [] if result.get("type") in _RESULTS]
        if not results:
            yield Unusable("a task without a choice, a ranking or a text")
        for result in results:
            yield _RESULTS[result["type"]](row["data"], result.get("value") or {}) | labeler


def _choice(data: Mapping[str, Any], value: Mapping[str, Any]) -> Row:
    names = two_responses([name for name, text in data.items() if isinstance(text, str)])
    if names is None:
        raise wrong("data", f"no two responses among {', '.join(data)}", "call them answer1 and answer2")
    selected = value.get("selected")
    if selected not in ("left", "right"):
        raise wrong("selected", f"got {show(selected)}", "write left or right")
    return pair(_asked(data), data[names[0]], data[names[1]], FIRST if selected == "left" else SECOND)


def _order(data: Mapping[str, Any], value: Mapping[str, Any]) -> Row:
    """Read a ranker's order of items, which a list in the task's data holds with their ids."""
    order = value.get("ranker")
    order = order.get("rank") if isinstance(order, Mapping) else order or value.get("rank")
    lists = [
        item for item in data.values() if isinstance(item, list) and all(isinstance(part, Mapping) for part in item)
    ]
    texts = {part["id"]: part.get("body", part.get("text")) for part in lists[0] if "id" in part} if lists else {}
    if not isinstance(order, list) or not order or set(order) - set(texts):
        raise wrong("ranker", f"got {show(value)}", f"write the order of the items {', '.join(map(str, texts))}")
    ranks = list(range(1, len(order) + 1))
    return {"prompt": _asked(data), "responses": [texts[name] for name in order], "ranks": ranks}


def _text(data: Mapping[str, Any], value: Mapping[str, Any]) -> Row:
    text = value.get("text")
    text = "\n".join(text) if isinstance(text, list) else text
    return {"prompt": _asked(data), "completion": text}


_RESULTS = {"pairwise": _choice, "ranker": _order, "textarea": _text}


def _asked(data: Mapping[str, Any]) -> Any:
    """Return the prompt of a task's data: text, or turns (role or author, and content or text). A system text beside it
    is the first turn."""
    names = ("prompt", "question", "instruction", "query", "dialogue", "messages")
    asked = next((data[name] for name in names if data.get(name)), None)
    if isinstance(asked, list):
        asked = [
            {"role": str(turn.get("role", turn.get("author"))), "content": turn.get("content", turn.get("text"))}
            for turn in asked
        ]
    return with_system(as_prompt(asked), data) if asked and any(data.get(name) for name in SYSTEM) else asked


# --- a chat front end -----------------------------------------------------------------------------------------------


def open_webui(row: Row) -> Row:
    """Read a rating: of a response beside others (an arena, or several models) a ranking of them, else a response with
    KTO's label."""
    messages = _history(row["snapshot"])
    node = messages.get((row.get("meta") or {}).get("message_id"))
    if node is None:
        raise wrong("meta.message_id", "the snapshot has no such message", "export the feedback with its chats")
    rating = str(row["data"].get("rating"))
    if rating == "None":
        raise Unusable("a comment without a rating")
    if rating not in ("1", "-1"):
        raise wrong("data.rating", f"got {show(row['data']['rating'])}", "write 1 or -1")
    *path, _ = _branch(messages, node)
    family = messages.get(node.get("parentId"), {}).get("childrenIds") or []
    others = [messages[name] for name in family if name in messages and messages[name] is not node]
    about = {"labeler": str(row["user_id"])} if row.get("user_id") is not None else {}
    if row["data"].get("sibling_model_ids") and others:
        responses = [node.get("content"), *(other.get("content") for other in others)]
        ranks = [1, *[2] * len(others)] if rating == "1" else [2, *[1] * len(others)]
        return {"prompt": path, "responses": responses, "ranks": ranks, **about}
    return {"prompt": path, "completion": node.get("content"), "label": rating == "1", **about}


def open_webui_chat(row: Row) -> Row:
    """Read a chat: the turns of the branch that is shown."""
    messages = _history(row)
    node = messages.get(_holder(row).get("currentId"))
    if node is None:
        raise Unusable("a chat without a message")
    return {"messages": _branch(messages, node)}


def _branch(messages: Mapping[Any, Mapping[str, Any]], node: Mapping[str, Any] | None) -> Messages:
    """Return the turns from the first one to a message."""
    turns: Messages = []
    while node is not None and len(turns) <= len(messages):  # more turns than messages: they go round
        turns.insert(0, {"role": node.get("role"), "content": node.get("content")})
        node = messages.get(node.get("parentId"))
    return turns


def _holder(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the history of a chat, which exports hold at different depths."""
    while isinstance(value, Mapping):
        if isinstance(value.get("history"), Mapping):
            return value["history"]
        value = value.get("chat")  # type: ignore[assignment]
    return {}


def _history(value: Mapping[str, Any]) -> dict[Any, Mapping[str, Any]]:
    """Return a chat's messages by their ids."""
    messages = _holder(value).get("messages") or {}
    if isinstance(messages, list):
        return {message.get("id"): message for message in messages}
    return dict(messages)
