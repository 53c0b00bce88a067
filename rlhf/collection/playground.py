"""The playground's comparisons as a reward model's training data: what may be used now, with no user's share too large.

Only comparisons that their senders agreed to, that were scrubbed and that have not expired are used; the share of one
user among all training data is capped, so that nobody alone decides what a reward model learns.
"""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from rlhf.collection.export import rows_of
from rlhf.collection.measured import snapshot
from rlhf.collection.store import Store
from rlhf.rows.records import prompt_key

Row = dict[str, Any]


def comparisons(store: Store, apart: Collection[str] = ()) -> list[Row]:
    """Return the comparisons that may be used now, as rankings in the order in which they were given; none of a prompt
    in `apart` (`prompt_key`s)."""
    rows = rows_of(replace(snapshot(store), judgments=[]), "rankings").rows
    return [row for row in rows if prompt_key(row["prompt"]) not in apart]


def capped(rows: Sequence[Row], others: int, share: float, seed: int) -> list[Row]:
    """Return the rows, of each user at most so many that they are no more than `share` of all: of these rows and
    `others` further ones. Which of a user's rows stay is drawn with the seed."""
    given: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        given.setdefault(row["labeler"], []).append(number)
    most = max(map(len, given.values()), default=0)
    while most > share * (others + sum(min(len(own), most) for own in given.values())):
        most -= 1
    kept = [
        number
        for user, own in given.items()
        for number in random.Random(f"{seed} {user}").sample(own, min(len(own), most))
    ]
    return [rows[number] for number in sorted(kept)]


def still_usable(rows: Sequence[Row], now: Sequence[Row]) -> list[Row]:
    """Return those of `rows`, taken earlier, that are among the rows that may be used now."""
    usable = {json.dumps(row, sort_keys=True) for row in now}
    return [row for row in rows if json.dumps(row, sort_keys=True) in usable]
