"""Intervals over seeds and over prompts, and the rule by which a study says whether a finding comes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from rlhf.intervals import student_mean

SEEDS = 3
"""Seeds below which a study has no verdict."""
RULE = (
    "A check is a number per seed, above 0 where the seed bears the statement out. It says yes where its 95% interval "
    "over seeds (Student's) lies above 0, partly where every seed is above 0 and the interval is not, else no. The "
    "study: yes where all checks do, no where all say no, else partly. Below three seeds there is no verdict."
)


def over_seeds(values: Sequence[float]) -> list[float] | None:
    """Return Student's 95% interval over the seeds' values: what another seed would give. None of a single one."""
    return student_mean(values).interval if len(values) > 1 else None


def over_prompts(seeds: Sequence[tuple[float, float | None, float | None]]) -> list[float] | None:
    """Return the interval over prompts of the mean of these very seeds, from each seed's (value, low, high): a bound is
    as far from the mean as the root of the sum of squares of theirs, divided by the number of seeds. None where a seed
    has no interval."""
    mean, below, above = fmean(value for value, _, _ in seeds), 0.0, 0.0
    for value, low, high in seeds:
        if low is None or high is None:
            return None
        below += (value - low) ** 2
        above += (high - value) ** 2
    return [mean - below**0.5 / len(seeds), mean + above**0.5 / len(seeds)]


def checked(text: str, margins: Sequence[float]) -> dict[str, Any]:
    """Compute a check from its margins, one per seed: their mean with its interval over seeds, and what it says."""
    low, high = over_seeds(margins) or (None, None)
    says = "yes" if low is not None and low > 0 else "partly" if min(margins) > 0 else "no"
    return {
        "text": text, "says": says, "value": fmean(margins), "low": low, "high": high, "n": len(margins),
        "by_seed": list(margins),
    }  # fmt: skip


def verdict(checks: Sequence[Mapping[str, Any]]) -> str:
    """Return what a study comes to, by `RULE`."""
    if min(check["n"] for check in checks) < SEEDS:
        return "too few seeds"
    says = {check["says"] for check in checks}
    return says.pop() if len(says) == 1 else "partly"
