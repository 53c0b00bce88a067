"""People decide about flagged conversations, in `rlhf label`: allow or flag, and for which categories.

An item is a conversation with its last answer as the only candidate; the criterion `decision` and the flags are the
categories. Beside all flagged conversations a share of the others is queued, so that misses are counted too. Decisions
measure the classifier and become its training rows, these only of conversations that their senders agreed to have used.
An item ends with the conversation that it was made of: when that expires, or its person is erased.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf.collection import content
from rlhf.collection.personal import REVIEW
from rlhf.collection.project import MOST_FLAGS, Criterion, Project
from rlhf.collection.store import Candidate, Conversation, Item, Judgment, Store
from rlhf.errors import InputError
from rlhf.intervals import clustered_mean
from rlhf.rows.messages import Messages

DECISION = "decision"
ALLOW, FLAG = 1, 2
"""Points of its scale."""
PROJECT = "label.project"
GUIDELINES = """Read the conversation and its last answer. Press 1 to take it up, then decide:

- **allow**: nothing in it is against the policy;
- **flag**: something is. Then press F and the number of each category that it belongs to.
"""


def project_of(categories: Sequence[str]) -> Project:
    """Make what annotators see. Raises InputError for more categories than the page has flags."""
    if not 0 < len(categories) <= MOST_FLAGS:
        seen = f"{len(categories)} categories, and the page shows 1 to {MOST_FLAGS}"
        raise InputError(f"review: {seen}; name those that people decide on (--categories)")
    if len(set(categories)) < len(categories):
        raise InputError(f"review: {', '.join(categories)}: one is there twice; name each once")
    decision = Criterion(DECISION, ("allow", "flag"), "Is anything in it against the policy?")
    return Project("Reviewing flagged conversations", GUIDELINES, (decision,), tuple(categories))


def set_project(store: Store, categories: Sequence[str]) -> None:
    """Have the store's labelling page ask for decisions. Raises InputError where it asks for something else already."""
    wanted = project_of(categories)
    there = store.setting(PROJECT)
    if there is not None and Project.from_json(there) != wanted:
        raise InputError(f"review: {store.path} is labelled for another project; name a store of its own")
    store.put_setting(PROJECT, wanted.to_json())


@dataclass(frozen=True)
class Queued:
    """How many different conversations are in the queue, and how many could not be put there."""

    flagged: int
    others: int
    empty: int
    """Without an answer, or with a question that is no prompt."""


def queue(
    store: Store, conversations: Sequence[Conversation], flags: Sequence[Sequence[str]], share: float, seed: int,
    overlap: int = 1,
) -> Queued:  # fmt: skip
    """Put every flagged conversation in the queue, and `share` of the others, drawn by their texts and the seed alone.

    Conversations of one text are one item, which knows how many they are. One that is there gets this log's flags, the
    higher of the two chances, and the sender who agreed to have it used, where another one did not."""
    same: dict[str, list[tuple[Item, Sequence[str]]]] = {}
    empty = 0
    for conversation, names in zip(conversations, flags, strict=True):
        *prompt, answer = conversation.messages
        if not prompt or prompt[-1]["role"] == "assistant" or not answer["content"].strip():
            empty += 1
            continue
        item = _item(conversation, prompt, answer["content"])
        same.setdefault(item.key, []).append((item, names))
    counts = {True: 0, False: 0}
    with store.writing() as db:
        for key, found in same.items():
            item = next((item for item, _ in found if item.columns["trainable"]), found[0][0])
            flagged = list(dict.fromkeys(name for _, names in found for name in names))
            about = {"flagged": flagged, "chance": 1.0 if flagged else share, "copies": len(found)}
            drawn = bool(flagged) or _drawn(seed, key) < share
            item = replace(item, columns={**item.columns, **about})
            counts[bool(flagged)] += _put(db, item, drawn, overlap, store.clock())
    return Queued(counts[True], counts[False], empty)


def _put(db: sqlite3.Connection, item: Item, drawn: bool, overlap: int, now: float) -> bool:
    """Store an item that was drawn, or renew one that is there; returns whether it is in the queue."""
    there = db.execute("SELECT columns, person, source FROM items WHERE key = ?", (item.key,)).fetchone()
    if there is None and not drawn:
        return False
    content.add_item(db, item, overlap, "main", now)
    if there is not None and there["source"] == REVIEW:
        before, about = json.loads(there["columns"]), item.columns
        agreed = about["trainable"] and not before["trainable"]
        renewed = {"flagged": about["flagged"], "chance": max(before["chance"], about["chance"]),
                   "copies": max(before.get("copies", 1), about["copies"])}  # fmt: skip
        columns = json.dumps({**(about if agreed else before), **renewed})
        person = item.person if agreed else there["person"]
        db.execute("UPDATE items SET columns = ?, person = ? WHERE key = ?", (columns, person, item.key))
    return True


def _item(conversation: Conversation, prompt: Messages, answer: str) -> Item:
    made = Candidate(answer, conversation.policy, conversation.fingerprint, conversation.sampler, conversation.seed)
    trainable = conversation.consent and conversation.scrubbed
    columns: dict[str, Any] = {"conversation": conversation.id, "trainable": trainable}
    if conversation.expires is not None:
        columns["review_expires"] = conversation.expires
    return Item(prompt, (made,), columns, REVIEW, ("review",), conversation.person)


def _drawn(seed: int, name: str) -> float:
    digest = hashlib.sha256(f"{seed}|review|{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


# ------------------------------------------------------------------------------------------ what was decided


@dataclass(frozen=True)
class Decision:
    """What one person decided about one conversation."""

    item: Item
    annotator: str
    flag: bool
    categories: tuple[str, ...]
    among: int
    """Decisions about this item."""

    @property
    def was_flagged(self) -> bool:
        """Return whether the classifier flagged it."""
        return bool(self.item.columns["flagged"])

    @property
    def copies(self) -> int:
        """Return how many conversations have this text."""
        return int(self.item.columns.get("copies", 1))


def decisions_in(store: Store) -> tuple[list[Decision], int]:
    """Return the decisions, and how many judgments are none: without the criterion, or allowed with a category."""
    items = {item.id: item for item in store.items() if item.source == REVIEW}
    judged = [judgment for judgment in store.judgments() if judgment.item in items]
    read = [(judgment, flag) for judgment in judged if (flag := _decided(judgment)) is not None]
    counts: dict[int, int] = {}
    for judgment, _ in read:
        counts[judgment.item] = counts.get(judgment.item, 0) + 1
    found = [
        Decision(items[judgment.item], judgment.annotator, flag, judgment.flags, counts[judgment.item])
        for judgment, flag in read
    ]
    return found, len(judged) - len(found)


def _decided(judgment: Judgment) -> bool | None:
    point = judgment.ratings[0].get(DECISION) if judgment.ratings else None
    if point not in (ALLOW, FLAG) or (point == ALLOW and judgment.flags):
        return None
    return point == FLAG


def measured(decisions: Sequence[Decision]) -> dict[str, dict[str, Any]]:
    """Compute how the classifier did by people's decisions, as metrics.

    precision: the share of flagged conversations that people flag; missed: that of the others; recall: the part of what
    people flag that was flagged. Several people's decisions about a text are averaged, and the text counts for each of
    its conversations, weighed by the inverse of its chance to be queued (Horvitz and Thompson 1952). Recall has no
    interval, nor has a share of texts with unlike chances, since one decision then outweighs many others."""
    found: dict[str, dict[str, Any]] = {}
    for name, flagged in (("review_precision", True), ("review_missed", False)):
        own = [decision for decision in decisions if decision.was_flagged == flagged]
        if own:
            found[name] = _share(own)
    weights = [(d, d.copies / (d.item.columns["chance"] * d.among)) for d in decisions if d.flag]
    total = sum(weight for _, weight in weights)
    if total and any(not decision.was_flagged for decision in decisions):
        caught = sum(weight for decision, weight in weights if decision.was_flagged)
        found["review_recall"] = {"value": caught / total, "low": None, "high": None, "n": len(decisions)}
    return found


def _share(decisions: Sequence[Decision]) -> dict[str, Any]:
    said: dict[int, list[Decision]] = {}
    for decision in decisions:
        said.setdefault(decision.item.id, []).append(decision)
    flags = [sum(decision.flag for decision in own) / len(own) for own in said.values()]
    chances = [own[0].item.columns["chance"] for own in said.values()]
    weights = [own[0].copies * (min(chances) / chance) for own, chance in zip(said.values(), chances, strict=True)]
    share = clustered_mean(flags, [*said], weights=weights)
    low, high = (share.low, share.high) if len(set(chances)) == 1 else (None, None)
    return {"value": share.value, "low": low, "high": high, "n": len(decisions)}


def training_rows(decisions: Sequence[Decision], categories: Sequence[str]) -> tuple[list[dict[str, Any]], int]:
    """Return a row per decision for `rlhf moderation`, and how many are left out: of senders who did not agree, or
    flagged without a category, of which nothing is known."""
    rows = []
    for decision in decisions:
        if not decision.item.columns["trainable"] or (decision.flag and not decision.categories):
            continue
        rows.append({
            "prompt": decision.item.prompt, "response": decision.item.candidates[0].text,
            "labels": {name: int(name in decision.categories) for name in categories},
            "labeler": decision.annotator, "weight": 1 / decision.among,
        })  # fmt: skip
    return rows, len(decisions) - len(rows)
