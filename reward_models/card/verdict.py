"""What a report card comes to, in one or two sentences: what the model beats, and how many pairs more would tell."""

from __future__ import annotations

from typing import NamedTuple

from reward_models.card.pairs import Numbers
from rlhf.intervals import needed
from rlhf.run.tables import with_interval

WIDE, NARROW = 0.1, 0.05
"""An accuracy whose interval reaches further than the first says how many pairs would bring it down to the second."""


class Rival(NamedTuple):
    """Something that the model must beat: the lead over it, and the lead's interval."""

    name: str
    lead: float
    interval: list[float]


def verdict(report: Numbers) -> str:
    """Write what the model is better than, worse than, or not told from with these pairs."""
    pairs, share = f"{report['n']:,} held-out pairs", with_interval(report, "accuracy")
    pairs = pairs.removesuffix("s") if report["n"] == 1 else pairs
    rivals = _rivals(report)
    worse = [rival.name for rival in rivals if rival.interval[1] < 0]
    better = [rival.name for rival in rivals if rival.interval[0] > 0]
    unclear = [rival for rival in rivals if rival.interval[0] <= 0 <= rival.interval[1]]
    parts = []
    if unclear:
        few = "pair: too few" if report["n"] == 1 else "pairs: too few"
        told = [_told(report["n"], rival) for rival in unclear]
        parts.append(f"{report['n']:,} {few} to tell this model ({share} right) from {' or '.join(told)}.")
        parts.append(f"It is better than {_listed(better)}." if better else "")
    else:
        parts.append(f"Right on {share} of {pairs}{': better than ' if better else ''}{_listed(better)}.")
    parts.append(f"It is worse than {_listed(worse)}." if worse else "")
    low, high = report["accuracy_ci"]
    if not unclear and (high - low) / 2 > WIDE:
        count = report["n"] * ((high - low) / 2 / NARROW) ** 2
        parts.append(f"About {round(count, -1):,.0f} pairs would narrow that to 5 points on either side.")
    return " ".join(filter(None, parts))


def _rivals(report: Numbers) -> list[Rival]:
    low, high = report["accuracy_ci"]
    found = [Rival("a coin", report["accuracy"] - 0.5, [low - 0.5, high - 0.5])]
    leads = [(f"always taking the {report['length_rule']} response", report["over_length_rule"])]
    for column, lead in report["length_by_group"].items():
        if lead["accuracy"] > report["length_baseline"]:
            leads.append((f"the length rule of each {column}", lead))
    leads.append(("a bag of words", report["bag_of_words"]))
    return found + [Rival(name, lead["difference"], lead["difference_ci"]) for name, lead in leads if lead]


def _told(n: int, rival: Rival) -> str:
    count = needed(n, rival.lead, 0.0, rival.interval)
    return f"{rival.name} (about {count:,} needed)" if count else f"{rival.name} (no lead to be seen)"


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
