"""An ensemble on the report card: how far its members disagree, and whether that says where it is wrong."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reward_models.card.calibration import auc
from reward_models.card.pairs import Numbers, ScoredPairs, accuracy, outcomes
from rlhf.intervals import bootstrap_interval
from rlhf.run import page as html
from rlhf.run.tables import number, percent, with_interval


def disagreement(pairs: ScoredPairs, members: np.ndarray, names: Sequence[str], seed: int) -> Numbers:
    """Compute the members' accuracies and their spread. members: [M, R], every member's score of every response.

    `std` is the mean over prompts of the responses' (population) standard deviation over members, with its interval.
    `by_spread` splits the pairs into thirds by the standard deviation of the members' score differences: accuracy
    should fall with it. `wrong_auc`: how often a pair that the ensemble gets wrong has a larger spread than one that it
    gets right (0.5: the spread says nothing); None where it is always right, or always wrong.
    """
    spread = members.std(axis=0)
    by_prompt = np.bincount(pairs.prompt_of, weights=spread) / np.bincount(pairs.prompt_of)
    std = bootstrap_interval(by_prompt, seed, bounds=None)
    differences = members[:, pairs.better] - members[:, pairs.worse]
    apart, right = differences.std(axis=0), pairs.right
    third = np.searchsorted(np.quantile(apart, [1 / 3, 2 / 3]), apart, side="left")
    rows = [
        {"name": name, **accuracy(right[third == n], pairs.prompts[third == n], seed)}
        for n, name in enumerate(("smallest spread", "middle", "largest spread"))
        if (third == n).any()
    ]
    return {
        "std": std.value,
        "std_ci": std.interval,
        "members": [
            {"name": name, **accuracy(outcomes(own), pairs.prompts, seed)}
            for name, own in zip(names, differences, strict=True)
        ],
        "by_spread": rows,
        "wrong_auc": auc(apart[right == 0], apart[right == 1]),
    }


def section(report: Numbers) -> str:
    """Write the page's section about an ensemble; "" for a single reward model."""
    found = report.get("ensemble")
    if not found:
        return ""
    rows = [
        [row["name"], with_interval(row, "accuracy"), f"{row['n']:,}"]
        for row in (*found["members"], *found["by_spread"])
    ]
    lines = [f"Members differ by {with_interval(found, 'std')} standard deviations of a score per response."]
    if found["wrong_auc"] is not None:
        lines.append(
            f"A pair that the ensemble gets wrong has a larger spread than one that it gets right in "
            f"{percent(found['wrong_auc'])} of cases (50%: the spread says nothing), of {number(report['n'])} pairs."
        )
    table = html.table((["member, or third of the pairs by spread", "accuracy", "pairs"], rows))
    return f"<h2>Members and their spread</h2>{''.join(map(html.note, lines))}{table}"
