"""Run another checkout of this project beside this one: the same runs of the same cases, in turn (--before DIR)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_tables import comparison_table, summarize
from board import Board
from cases import CASES, OURS, precision, runs_here
from jobs import Job, Worker

from rlhf.errors import InputError

TODAY, BEFORE = "today", "before"
Variants = Mapping[str, Mapping[str, Any]]


def check(folder: str, variants: Variants) -> None:
    """Raise InputError where `folder` is no checkout of this project."""
    if not worker_of(Path(folder)).is_file():
        raise InputError(f"before={folder}: {worker_of(Path(folder))} is missing; name a checkout of this project")
    for name in variants:
        if name in (TODAY, BEFORE):
            raise InputError(f"before_variants: {name} is taken; give it another name")


def worker_of(checkout: Path) -> Path:
    return checkout / "recipes/benchmarks/ours_worker.py"


def compare(
    board: Board, checkout: Path, variants: Variants, cases: Sequence[str], runs: Sequence[str], job: Job
) -> None:
    """Measure every case, and show its tables. job: `model`, `updates` and `threads` of every run.

    variants: further runs of the other checkout, each by what it changes: its settings, or by a dotted name what a
    module of the other checkout holds (`rlhf.packing.MOST_TOKENS: 512`).
    """
    checkout, results = checkout.absolute(), {}
    for name in cases:
        made = board.made(name, CASES[name], job["model"])
        if made is None:
            continue
        made |= {"updates": job["updates"]}
        for run, settings in runs_here([run for run in OURS if run in runs], made["bf16_hardware"]).items():
            folder = board.folder / "before" / name / run
            mine = made | {"settings": settings}
            workers = {TODAY: Worker("ours_worker.py", mine, folder / TODAY, threads=job["threads"], in_turns=True)}
            for variant, changes in {BEFORE: {}, **variants}.items():
                other = mine | {"checkout": str(checkout), "settings": settings | _settings(changes)}
                other |= {"replaced": {key: value for key, value in changes.items() if "." in key}}
                workers[variant] = Worker(
                    "earlier_worker.py", other, folder / variant.replace(" ", "_"), threads=job["threads"],
                    site=checkout, in_turns=True,
                )  # fmt: skip
            measured = board.in_turns(f"{name}: {run}", workers, job["updates"])
            results[f"{name}: {run}"] = measured
            board.keep("before", results)
            summaries = {variant: summarize(result) for variant, result in measured.items()}
            if BEFORE in summaries:
                board.show(f"{name}, {run} ({precision(settings)})", comparison_table(summaries, BEFORE))


def _settings(changes: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in changes.items() if "." not in key}
