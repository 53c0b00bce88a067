"""Items and answers that tests of the store share."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from rlhf.collection.store import Answer, Candidate, Item, Task


def item(name: str, k: int = 3, **fields: Any) -> Item:
    """Make an item of k candidates, whose texts hold its name."""
    candidates = tuple(Candidate(f"{name}: answer {n}", policy=f"policy {n}", seed=n) for n in range(k))
    return Item([{"role": "user", "content": f"question {name}"}], candidates, **fields)


def items(count: int, k: int = 3, prefix: str = "q", **fields: Any) -> list[Item]:
    return [item(f"{prefix}{n}", k, **fields) for n in range(count)]


def answer(task: Task, ranks: Sequence[float] | None = (), **fields: Any) -> Answer:
    """Answer a task with ranks in stored order, by default 1, 2, 3, ...; None: without ranks."""
    given = range(1, len(task.candidates) + 1) if ranks == () else ranks
    by_id = None if given is None else {c.id: rank for c, rank in zip(task.stored, given, strict=True)}
    return Answer(assignment=task.assignment, **{"submission": uuid.uuid4().hex, "ranks": by_id, **fields})


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self, now: float = 1e9) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now
