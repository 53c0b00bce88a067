"""Time to quality: seconds of training until the toy world's held-out gold score passes a mark, ours against trl's.

The mark lies midway between the gold scores of the SFT model and of its best-of-16 by the reward model. Both sides
start from the same SFT and reward model; gold is measured after every update, with the clock stopped.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from bench_tables import markdown
from jobs import run_job


def measure(run: Path, seed: int, folder: Path, threads: int, site: Path | None, updates: int | None = None) -> dict:
    """One seed: the mark, and ours and trl's way to it. Makes the toy chain where `run` has none."""
    job = {"run": str(run.absolute()), "seed": seed, "updates": updates}
    mark = run_job("toy_mark.py", job, folder / "mark", threads=threads)
    job |= {"mark": mark["mark"]}
    row = {"seed": seed, **mark, "ours": run_job("quality_ours.py", job, folder / "ours", threads=threads)}
    if site is not None:
        row["trl"] = run_job("quality_trl.py", job, folder / "trl", threads=threads, site=site)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """One line per seed and their median. A side that never passes the mark shows the seconds that it trained."""
    lines = []
    for row in rows:
        ours, theirs = row["ours"], row.get("trl")
        lines.append(
            [
                row["seed"], f"{row['sft']:.2f}", f"{row['best_of_16']:.2f}", f"{row['mark']:.2f}",
                _reached(ours), _reached(theirs), _ratio(ours, theirs),
            ]
        )  # fmt: skip
    ratios = [r for r in (ratio(row["ours"], row.get("trl")) for row in rows) if r is not None]
    middle = f"{median(ratios):.2f}" if len(ratios) == len(rows) else "-"
    lines.append(["median", "", "", "", "", "", middle])
    headers = ["seed", "gold of SFT", "of best-of-16", "mark", "ours: s (updates)", "trl: s (updates)", "trl / ours"]
    return markdown(headers, lines)


def ratio(ours: dict[str, Any], theirs: dict[str, Any] | None) -> float | None:
    """trl's seconds over ours; at least so much where only trl never got there; None where ours did not."""
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
