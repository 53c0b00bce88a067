"""How far each annotator is, for a page that asks with every item: what takes long to count is kept for seconds."""

from __future__ import annotations

import time
from typing import NamedTuple

from rlhf.collection.store import Store

FRESH_SECONDS = 10.0
"""How long a count of the open items serves: it reads every one of them."""


class Standing(NamedTuple):
    """One annotator's numbers of items."""

    done: int
    skipped: int
    left: int
    """That they hold or can still get."""
    waiting: bool
    """Whether nothing is left for now, but others hold items that may come back."""


class Standings:
    """The standing of every annotator of a store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._totals: dict[str, tuple[float, int]] = {}

    def of(self, annotator: str, idle: bool) -> Standing:
        """Return an annotator's standing. idle: the store has just had no task for them."""
        with self.store.reading() as db:
            own = "annotator = (SELECT id FROM annotators WHERE name = ?)"
            counted = f"SELECT state, count(*) FROM assignments WHERE {own} GROUP BY state"
            states = dict(db.execute(counted, (annotator,)).fetchall())
        done, skipped = states.get("done", 0), states.get("skipped", 0)
        counted_at, total = self._totals.get(annotator, (-FRESH_SECONDS, 0))
        if not idle and time.monotonic() - counted_at < FRESH_SECONDS:
            return Standing(done, skipped, max(0, total - done - skipped), False)
        outlook = self.store.outlook(annotator)
        self._totals[annotator] = time.monotonic(), done + skipped + outlook.mine
        return Standing(done, skipped, outlook.mine, idle and outlook.held > 0)
