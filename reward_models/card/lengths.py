"""The length rule within each group: a benchmark's subset may go to the longer response throughout, another to the
shorter one, and over all of them length then seems to say nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reward_models.card.baselines import longer_share
from reward_models.card.pairs import Numbers, ScoredPairs, accuracy, difference, length_differences, outcomes
from rlhf.rows.records import Ranking

DECIDES = 0.75
"""Length decides a group whose length rule is right on more than this share, by the interval's lower end."""


def length_rules(
    pairs: ScoredPairs, column: str, groups: Sequence[Numbers], train: Sequence[Ranking] | None, seed: int
) -> tuple[list[Numbers], Numbers]:
    """Compute the length rule of each of a column's groups, and of all of them together.

    groups: rows of `by_column`; each comes back with `length_rule` ("longer" or "shorter"), `length_baseline` and its
    interval, and the model's lead, `difference` with its interval. A group's rule is chosen on its training rows; where
    there are none, on these pairs. Second: `accuracy`, `n`, `difference` and so on of the rules over all groups' pairs.
    """
    longer = outcomes(length_differences(pairs))
    values = np.array([str(ranking.columns.get(column)) for ranking in pairs.rankings])
    group_of = values[pairs.ranking_of[pairs.better]]
    training: dict[str, list[Ranking]] = {}
    for ranking in train or ():
        if ranking.pairs():
            training.setdefault(str(ranking.columns.get(column)), []).append(ranking)
    right, used, rows = np.zeros_like(longer), np.zeros(len(longer), dtype=bool), []
    for group in groups:
        here = group_of == group["name"]
        seen = training.get(group["name"])
        longest = (longer_share(seen) if seen else float(longer[here].mean())) >= 0.5
        right[here], used = (longer if longest else 1.0 - longer)[here], used | here
        rule = accuracy(right[here], pairs.prompts[here], seed)
        rows.append(
            {
                **group,
                "length_rule": "longer" if longest else "shorter",
                "length_baseline": rule["accuracy"],
                "length_baseline_ci": rule["accuracy_ci"],
                **difference(pairs.right[here], right[here], pairs.prompts[here], seed),
            }
        )
    lead = difference(pairs.right[used], right[used], pairs.prompts[used], seed)
    return rows, {**accuracy(right[used], pairs.prompts[used], seed), **lead}


def decided(rows: Sequence[Numbers]) -> list[Numbers]:
    """Return the groups that length alone decides."""
    return [row for row in rows if row["length_baseline_ci"][0] > DECIDES]
