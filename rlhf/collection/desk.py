"""One desk for all who judge: people's page, grader models and simulated labelers take tasks and hand in answers alike.

`StoreDesk` works on a store in this process. A client over HTTP has the same three methods, so `label` drives both.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any, Protocol

from rlhf.calls import own
from rlhf.collection.records import HandedOn, is_number
from rlhf.collection.store import Answer, Kind, Store, Task
from rlhf.errors import InputError, short

Labeler = Callable[..., Sequence[Sequence[float]]]
"""f(prompts, responses, seed, **columns) -> ranks per prompt, smaller is better: as `rlhf rankings` calls one."""


class Desk(Protocol):
    """Where one annotator takes tasks and hands in answers."""

    def lease(self, count: int = 1) -> tuple[Task, ...]:
        """Return up to `count` tasks; none when all is done."""

    def submit(self, answer: Answer) -> int:
        """Store an answer and return its judgment's id; a repeat returns the first one's."""

    def skip(self, assignment: int, reason: str = "") -> None:
        """Hand a task back unjudged."""


class StoreDesk:
    """The desk of one annotator, who is added to the store where they are not there."""

    def __init__(self, store: Store, annotator: str, kind: Kind = "simulated") -> None:
        self.store, self.annotator = store, annotator
        store.add_annotator(annotator, kind)

    def lease(self, count: int = 1) -> tuple[Task, ...]:
        return self.store.lease(self.annotator, count)

    def submit(self, answer: Answer) -> int:
        return self.store.submit(self.annotator, answer).id

    def skip(self, assignment: int, reason: str = "") -> None:
        self.store.skip(self.annotator, assignment, reason)


def label(desk: Desk, labeler: Labeler, seed: int, batch: int = 64) -> int:
    """Have a function judge all tasks that a desk gives out; returns how many of its answers were stored.

    It sees an item's candidates in stored order, so that it ranks as it would without a store. Raises InputError where
    its ranks don't fit."""
    count = 0
    while tasks := desk.lease(batch):
        names = sorted({name for task in tasks for name in task.columns})
        columns: dict[str, list[Any]] = {name: [task.columns.get(name) for task in tasks] for name in names}
        responses = [[shown.text for shown in task.stored] for task in tasks]
        # copies: the function may change what it gets
        ranked = labeler(own([task.prompt for task in tasks]), own(responses), seed, **own(columns))
        for task, ranks in zip(tasks, fitting(ranked, responses), strict=True):
            by_id = {shown.id: rank for shown, rank in zip(task.stored, ranks, strict=True)}
            with suppress(HandedOn):  # the lease had ended, and others have judged the item
                desk.submit(Answer(assignment=task.assignment, submission=uuid.uuid4().hex, ranks=by_id))
                count += 1
    return count


def fitting(ranked: Any, responses: Sequence[Sequence[str]]) -> list[tuple[float, ...]]:
    """Return what a labeler gave. Raises InputError where it is not a finite number for each prompt's responses."""
    try:
        found = [tuple(map(float, ranks)) for ranks in ranked]
        numbers = all(map(is_number, chain(*found)))
    except (TypeError, ValueError, OverflowError):
        found, numbers = [], False
    if not numbers:
        raise InputError(f"labeler: returned {short(repr(ranked), 60)}; return a list of numbers for each prompt")
    if len(found) != len(responses):
        raise InputError(f"labeler: returned ranks for {len(found)} prompts of {len(responses)}; return them for each")
    for ranks, texts in zip(found, responses, strict=True):
        if len(ranks) != len(texts):
            raise InputError(f"labeler: {len(ranks)} ranks for {len(texts)} responses; return one for each")
    return found
