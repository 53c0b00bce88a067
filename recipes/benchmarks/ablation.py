"""Measure what each of our tricks for CPUs is worth: run ours again with one of them switched off, in turn
(--ablate)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench_tables import comparison_table, markdown, summarize
from board import Board
from cases import CASES, precision, runs_here
from jobs import Job, Worker

TRICKS = {
    "gated": "gated MLPs that keep two products for backward",
    "norms": "RMSNorms that keep their input alone",
    "fused_lora": "LoRA layers in few passes over memory",
    "attention": "attention of short rows as matrix products",
    "freed_memory": "what loading has freed goes back to the system",
    "draw": "a token drawn by one random number",
}
"""What `without.py` can switch off."""

LORA_ONLY = ("fused_lora",)
RUNS = {"tiny": ("ours_adapter", "ours_shared_trunk", "ours_full"), "smollm2": ("ours_adapter", "ours_shared_trunk")}
WITH = "with all"

SECONDS, PEAK = 0.05, 0.10
"""What a trick must take off an update's time or off the peak in one of the runs, to stay."""
WORSE = 0.03
"""What it may add to either in any run without being said to worsen it: timings of one run differ by so much."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """Hold the share that a trick takes off an update's seconds and off the peak in one run; negative where it adds."""

    run: str
    seconds: float
    peak: float


def stays(shares: Sequence[Share]) -> bool:
    """Return whether a trick takes enough off time or peak in some run and worsens neither in any."""
    gains = any(share.seconds >= SECONDS or share.peak >= PEAK for share in shares)
    return gains and all(min(share.seconds, share.peak) > -WORSE for share in shares)


def ablate(board: Board, cases: Sequence[str], runs: Sequence[str], tricks: Sequence[str], job: Job) -> None:
    """Measure every case, and show its tables. job: `model`, `updates` and `threads` of every run."""
    shares: dict[str, list[Share]] = {trick: [] for trick in tricks}
    results: dict[str, Any] = {}
    for name in cases:
        made = board.made(name, CASES[name], job["model"])
        if made is None:
            continue
        made |= {"updates": job["updates"]}
        wanted = [run for run in RUNS[name] if run in runs]
        for run, settings in runs_here(wanted, made["bf16_hardware"]).items():
            chosen = [trick for trick in tricks if settings.get("lora_rank") or trick not in LORA_ONLY]
            folder = board.folder / "ablation" / name / run
            workers = {
                trick: Worker(
                    "ours_worker.py", made | {"settings": settings, "without": None if trick == WITH else trick},
                    folder / trick.replace(" ", "_"), threads=job["threads"], in_turns=True,
                )
                for trick in (WITH, *chosen)
            }  # fmt: skip
            measured = board.in_turns(f"{name}: {run} without", workers, job["updates"])
            results[f"{name}: {run}"] = measured
            board.keep("ablation", results)
            summaries = {trick: summarize(result) for trick, result in measured.items()}
            if WITH not in summaries:
                continue
            board.show(f"{name}, {run} ({precision(settings)}), without", comparison_table(summaries, WITH))
            for trick, share in shares_of(f"{name}, {run}", summaries).items():
                shares[trick].append(share)
    board.show("What stays", verdicts(shares))


def shares_of(run: str, summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, Share]:
    """Return each trick's share: 1 - with / without."""
    first = summaries[WITH]
    return {
        trick: Share(
            run=run, seconds=1 - first["step"] / summary["step"], peak=1 - first["peak_gib"] / summary["peak_gib"]
        )
        for trick, summary in summaries.items()
        if trick != WITH
    }


def verdicts(shares: Mapping[str, Sequence[Share]]) -> str:
    """Return a table with one row per trick: its share of time and peak in every run, and whether it stays."""
    runs = list(dict.fromkeys(share.run for of_one in shares.values() for share in of_one))
    rows = []
    for trick, of_one in shares.items():
        by_run = {share.run: f"{share.seconds:+.0%} / {share.peak:+.0%}" for share in of_one}
        verdict = "yes" if stays(of_one) else "no"
        rows.append([f"{trick}: {TRICKS[trick]}", *(by_run.get(run, "-") for run in runs), verdict])
    text = f"Share of an update's seconds / of the peak that each takes off. It stays where it takes {SECONDS:.0%} off "
    text += f"the one or {PEAK:.0%} off the other in some run, and adds no more than {WORSE:.0%} to either in any.\n\n"
    return text + markdown(["trick", *runs, "stays"], rows)
