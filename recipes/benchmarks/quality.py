"""Measure time to quality: seconds of training until the toy world's held-out gold score passes a mark.

The mark lies midway between the gold scores of the SFT model and of its best-of-16 by the reward model. Both sides
start from the same SFT and reward model; gold is measured after every update, with the clock stopped. Each side has as
many settings to try on one seed, and runs the others with the one that passed the mark there first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from bench_tables import markdown
from board import Board
from jobs import Job, run_job

BOTH: dict[str, Any] = {"value_learning_rate": None, "value_warmup_updates": 0, "bf16": False}
"""What the toy config sets and trl's PPO has no setting for, off: the value model learns as fast as the policy, and
both from the first update. And float32, in which trl computes there."""
RATES = (3e-4, 6e-4, 1.2e-3)  # the first is the toy config's
TRIALS: dict[str, list[dict[str, Any]]] = {
    "ours": [{"value_model": kind, "learning_rate": rate} for kind in ("separate", "shared_trunk") for rate in RATES],
    "trl": [{"inner_epochs": epochs, "learning_rate": rate} for epochs in (2, 4) for rate in RATES],
}
"""Settings, under the names of our PPOConfig, that each side tries; the first are the toy config's."""
SCRIPTS = {"ours": "quality_ours.py", "trl": "quality_trl.py"}


@dataclass(frozen=True, kw_only=True)
class Race:
    """Run one side on one seed up to the mark."""

    board: Board
    toy_run: str  # a finished toy chain's folder; {output_dir} and {seed} stand for the board's folder and the seed
    updates: int | None  # over which the learning rate falls to 0, and after which a side gives up; None: the toy's
    threads: int | None
    site: Path | None  # where trl is; None: only ours runs

    @property
    def sides(self) -> list[str]:
        return [side for side in SCRIPTS if side != "trl" or self.site is not None]

    def job(self, seed: int) -> Job:
        """Make the seed's chain where it is missing, and measure its mark."""
        run = Path(self.toy_run.format(output_dir=self.board.folder, seed=seed)).absolute()
        job: Job = {"run": str(run), "seed": seed, "updates": self.updates}
        return job | run_job("toy_mark.py", job, self.folder(seed) / "mark", threads=self.threads)

    def folder(self, seed: int) -> Path:
        return self.board.folder / "quality" / f"seed_{seed}"

    def run(
        self, side: str, job: Job, settings: Mapping[str, Any], at_most: float | None = None, name: str = ""
    ) -> dict[str, Any]:
        """Let a side train until it passes the mark, or for `at_most` seconds."""
        site = {"site": self.site} if side == "trl" else {}
        whole = job | {"settings": BOTH | settings, "at_most": at_most}
        return run_job(SCRIPTS[side], whole, self.folder(job["seed"]) / (name or side), threads=self.threads, **site)


def tune(race: Race, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Try every setting of every side on a seed; a trial ends where it has lost. By side: settings and seconds."""
    job = race.job(seed)
    return {side: tried(partial(race.run, side, job), side) for side in race.sides}


def tried(run: Callable[..., dict[str, Any]], side: str) -> list[dict[str, Any]]:
    """Run a side's trials; each has no longer than the fastest before it."""
    found: list[dict[str, Any]] = []
    for number, settings in enumerate(TRIALS[side]):
        least = min((one["seconds"] for one in found if one["seconds"] is not None), default=None)
        done = run(settings, at_most=least, name=f"{side}_{number}")
        found.append({"settings": settings, **done})
    return found


def best(trials: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the settings of the fastest trial; the first ones where none passed the mark."""
    fastest = min(trials, key=lambda one: math.inf if one["seconds"] is None else one["seconds"])
    return dict(fastest["settings"])


def measure(race: Race, seeds: Sequence[int], tuning_seed: int | None) -> None:
    """Tune both sides on one seed (None: both take their first settings), race them on the others, and show the
    tables."""
    board, chosen = race.board, {side: TRIALS[side][0] for side in race.sides}
    if tuning_seed is not None:
        trials = board.attempt(f"quality: trials on seed {tuning_seed}", partial(tune, race, tuning_seed))
        if trials is None:
            return
        board.keep("quality_trials", trials)
        board.show(f"Trials on seed {tuning_seed}", trials_table(trials))
        chosen = {side: best(own) for side, own in trials.items()}
    rows = []
    for seed in seeds:
        row = board.attempt(f"quality: seed {seed}", partial(on_seed, race, seed, chosen))
        if row is not None:
            rows.append(row)
            board.keep("quality", rows)
    if rows:
        board.show("Seconds until the gold score passes the mark", table(rows))


def on_seed(race: Race, seed: int, chosen: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Race the sides on a seed: the mark, and each one's way to it."""
    job = race.job(seed)
    return job | {side: race.run(side, job, settings) for side, settings in chosen.items()}


def trials_table(trials: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    lines = [
        [side, ", ".join(f"{name} {value}" for name, value in one["settings"].items()), _reached(one)]
        for side, own in trials.items()
        for one in own
    ]
    return markdown(["side", "settings", "s (updates)"], lines)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table with one line per seed and their median ratio with its range. A side that never passes the mark
    shows the seconds that it trained."""
    lines = [
        [
            row["seed"], f"{row['sft']:.2f}", f"{row['best_of_16']:.2f}", f"{row['mark']:.2f}",
            _reached(row["ours"]), _reached(row.get("trl")), _ratio(row["ours"], row.get("trl")),
        ]
        for row in rows
    ]  # fmt: skip
    ratios = [r for r in (ratio(row["ours"], row.get("trl")) for row in rows) if r is not None]
    middle = f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})" if len(ratios) == len(rows) else "-"
    lines.append(["median (range)", *([""] * 5), middle])
    headers = ["seed", "gold of SFT", "of best-of-16", "mark", "ours: s (updates)", "trl: s (updates)", "trl / ours"]
    return markdown(headers, lines)


def ratio(ours: Mapping[str, Any], theirs: Mapping[str, Any] | None) -> float | None:
    """Return trl's seconds over ours: a lower bound where only trl never passed the mark, None where ours did not."""
    if theirs is None or ours["seconds"] is None:
        return None
    return float((theirs["seconds"] or theirs["trained_seconds"]) / ours["seconds"])


def _ratio(ours: Mapping[str, Any], theirs: Mapping[str, Any] | None) -> str:
    value = ratio(ours, theirs)
    if value is None or theirs is None:
        return "-"
    return f"{value:.2f}" if theirs["seconds"] is not None else f"> {value:.2f}"


def _reached(side: Mapping[str, Any] | None) -> str:
    if side is None:
        return "-"
    if side["seconds"] is None:
        return f"not in {side['trained_seconds']:.0f} ({len(side['history'])})"
    return f"{side['seconds']:.1f} ({len(side['history'])})"
