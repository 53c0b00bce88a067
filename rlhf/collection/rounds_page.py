"""The page of `rlhf flywheel`: the rounds in a table, and the judge's score from round to round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlhf.run import page as html
from rlhf.run.page import FIRST, INK, SECOND, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]
"""A round as flywheel.json holds it."""


def page(rounds: Sequence[Row], best: str) -> str:
    """Write the whole page."""
    kind = "gold_score" if rounds[0]["entry"].get("gold_score") is not None else "judge_score"
    passed = sum(row["passed"] for row in rounds)
    parts = [
        html.verdict(f"{passed} of {len(rounds)} rounds passed the gate, on {rounds[-1]['labels']:,} labels in all."),
        html.note(f"Best policy: {best}"),
        html.links(
            (f"round {row['number']}: reward model", f"{row['folder']}/reward_model/reward_report.html")
            for row in rounds
        ),
        "<h2>Rounds</h2>",
        html.table(table(rounds, kind)),
        html.items(f"round {row['number']}: {row['reason']}" for row in rounds),
        html.note(
            "Win rates are over the best policy before the round; intervals are over prompts. A policy passes if "
            "its interval lies above 50% and no family's lies below."
        ),
        f"<h2>{html.text(kind.replace('_', ' ')).capitalize()} by round</h2>",
        f"<figure>{svg(lambda axes: draw(axes, rounds, kind), 4.6, 2.8)}</figure>",
    ]
    return html.page("Flywheel", "\n".join(parts))


def table(rounds: Sequence[Row], kind: str) -> html.Table:
    """Return one row per round."""
    headers = ["round", "labels", "reward model, held-out", kind.replace("_", " "), "wins over the last", "KL, nats",
               "seconds", "gate"]  # fmt: skip
    return headers, [
        [
            str(row["number"]),
            f"{row['labels']:,}",
            between(row["accuracy"], row["accuracy_ci"], percent=True),
            between(row["entry"][kind], row["entry"][f"{kind}_ci"]),
            between(row["entry"]["win_rate_vs_sft"], row["entry"]["win_rate_ci"], percent=True),
            "-" if row["entry"].get("kl_nats") is None else f"{row['entry']['kl_nats']:.2f}",
            f"{row['seconds']:.0f}",
            "passed" if row["passed"] else "not passed",
        ]
        for row in rounds
    ]


def between(value: float, interval: Sequence[float], percent: bool = False) -> str:
    """Write a number and its interval."""
    low, high = interval
    return f"{value:.1%} [{low:.1%}, {high:.1%}]" if percent else f"{value:.2f} [{low:.2f}, {high:.2f}]"


def draw(axes: Axes, rounds: Sequence[Row], kind: str) -> None:
    """Draw each round's score with its interval; rounds that did not pass are hollow."""
    for row in rounds:
        value, (low, high) = row["entry"][kind], row["entry"][f"{kind}_ci"]
        face = FIRST if row["passed"] else "none"
        axes.errorbar(
            [row["labels"]], [value], yerr=[[value - low], [high - value]], fmt="o", color=FIRST, markerfacecolor=face,
            ecolor=SECOND, capsize=3,
        )  # fmt: skip
        axes.annotate(str(row["number"]), (row["labels"], value), textcoords="offset points", xytext=(6, 4), color=INK)
    axes.set_xlabel("labels of all rounds so far")
    axes.set_ylabel(kind.replace("_", " "))
