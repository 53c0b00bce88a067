"""Measure time to quality: seconds of training until the toy world's held-out gold score passes a mark.

The mark lies midway between the gold scores of the SFT model and of its best-of-16 by the reward model. Both sides
start from the same SFT and reward model; gold is measured after every update, with the clock stopped.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from bench_tables import markdown
from jobs import run_job

AS_TRL = {"value_learning_rate": None, "value_warmup_updates": 0, "bf16": False}
"""What the toy config sets and trl's PPO has no setting for, off: the value model learns as fast as the policy, and
both from the first update. And float32, in which trl computes there."""


OURS: dict[str, dict[str, Any]] = {
    "ours": AS_TRL,
    "ours, shared_trunk": AS_TRL | {"value_model": "shared_trunk"},
    "ours, toy.yaml": {},
}
"""trl's hyperparameters; the same with the value head on the policy's own hidden states; the toy config as it is."""


def measure(run: Path, seed: int, folder: Path, threads: int | None, site: Path | None, updates: int | None) -> dict:
    """Measure one seed: the mark, and each side's way to it. Makes the toy chain where `run` has none.

    trl is left out where `site` is None."""
    job = {"run": str(run.absolute()), "seed": seed, "updates": updates}
    mark = run_job("toy_mark.py", job, folder / "mark", threads=threads)
    job |= {"mark": mark["mark"]}
    row = {"seed": seed, **mark}
    for side, settings in OURS.items():
        own = folder / side.replace(", ", "_")
        row[side] = run_job("quality_ours.py", job | {"settings": settings}, own, threads=threads)
    if site is not None:
        row["trl"] = run_job("quality_trl.py", job, folder / "trl", threads=threads, site=site)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Return a table with one line per seed and their median. A side that never passes the mark shows the seconds that
    it trained."""
    lines = [
        [
            row["seed"], f"{row['sft']:.2f}", f"{row['best_of_16']:.2f}", f"{row['mark']:.2f}",
            *(_reached(row.get(side)) for side in (*OURS, "trl")),
            *(_ratio(row[side], row.get("trl")) for side in OURS),
        ]
        for row in rows
    ]  # fmt: skip
    middles = []
    for side in OURS:
        ratios = [r for r in (ratio(row[side], row.get("trl")) for row in rows) if r is not None]
        middles.append(f"{median(ratios):.2f}" if len(ratios) == len(rows) else "-")
    lines.append(["median", *([""] * (4 + len(OURS))), *middles])
    headers = ["seed", "gold of SFT", "of best-of-16", "mark", *(f"{side}: s (updates)" for side in (*OURS, "trl"))]
    return markdown([*headers, *(f"trl / {side}" for side in OURS)], lines)


def ratio(ours: dict[str, Any], theirs: dict[str, Any] | None) -> float | None:
    """Return trl's seconds over ours: a lower bound where only trl never passed the mark, None where ours did not."""
    if theirs is None or ours["seconds"] is None:
        return None
    return (theirs["seconds"] or theirs["trained_seconds"]) / ours["seconds"]


def _ratio(ours: dict[str, Any], theirs: dict[str, Any] | None) -> str:
    value = ratio(ours, theirs)
    if value is None or theirs is None:
        return "-"
    return f"{value:.2f}" if theirs["seconds"] is not None else f"> {value:.2f}"


def _reached(side: dict[str, Any] | None) -> str:
    if side is None:
        return "-"
    if side["seconds"] is None:
        return f"not in {side['trained_seconds']:.0f} ({len(side['history'])})"
    return f"{side['seconds']:.1f} ({len(side['history'])})"
