"""Compare our SFT and reward-model training with trl's own trainers of today (--only stages).

The same model, rows, optimizer steps and learning rate, in turn; seconds of every turn, peak memory, the seconds until
the first step is done, and what both have learnt on held-out rows, measured by the same code. Rows are the toy world's:
demonstrations, and rankings of four responses, which ours scores once each and trl sees as their six pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from bench_tables import GIB, markdown
from board import Board
from jobs import Job, Worker, run_job

STAGES = ("sft", "reward_model")
SCRIPTS = {"ours": "stages_ours.py", "trl": "stages_trl.py"}


@dataclass(frozen=True, kw_only=True)
class Size:
    """Say how much a case trains: rows per optimizer step and steps a turn of each stage, how many held-out rows."""

    rows_per_step: dict[str, int]
    steps: dict[str, int]
    learning_rates: dict[str, float]
    held_out: int
    rows_per_forward: int = 16  # of demonstrations, or responses
    lora: dict[str, Any]


SIZES = {
    "tiny": Size(
        rows_per_step={"sft": 16, "reward_model": 4}, steps={"sft": 20, "reward_model": 20}, held_out=200,
        learning_rates={"sft": 1e-3, "reward_model": 5e-4}, lora={"lora_rank": 0, "lora_alpha": 32.0},
    ),
    "smollm2": Size(
        rows_per_step={"sft": 16, "reward_model": 4}, steps={"sft": 4, "reward_model": 6}, held_out=48,
        learning_rates={"sft": 2e-4, "reward_model": 2e-4}, lora={"lora_rank": 16, "lora_alpha": 32.0},
    ),
}  # fmt: skip
"""tiny: the toy world's own models, all weights; smollm2: adapters on the model of --model."""


def job_of(stage: str, size: Size, updates: int, bf16: bool) -> Job:
    """Return what both sides are told, but for model and rows."""
    return {
        "stage": stage, "updates": updates, "steps": size.steps[stage], "rows_per_step": size.rows_per_step[stage],
        "rows_per_forward": size.rows_per_forward, "learning_rate": size.learning_rates[stage], "bf16": bf16,
        **size.lora,
    }  # fmt: skip


def measure(
    board: Board, cases: Sequence[str], stages: Sequence[str], run: Path, seed: int, model: str, updates: int,
    threads: int | None,
) -> None:  # fmt: skip
    """Measure both sides on every case and stage, and show the tables.

    run: a toy chain's folder, which is made where it is missing."""
    results: dict[str, Any] = {}
    for case in cases:
        size, folder = SIZES[case], board.folder / "stages" / case
        wanted = {stage: updates * size.steps[stage] * size.rows_per_step[stage] for stage in STAGES}
        asked = {"run": str(run.absolute()), "seed": seed, "rows": wanted, "held_out": size.held_out}
        files = board.attempt(
            f"{case}: rows", partial(run_job, "stages_rows.py", asked, folder / "rows", threads=threads)
        )
        if files is None:
            continue
        for stage in stages:
            own = {"sft": files["base"], "reward_model": files["sft_model"]}[stage] if case == "tiny" else model
            job = job_of(stage, size, updates, bool(files["bf16_hardware"]))
            job |= files[stage] | {"model": own, "tokenizer": own}
            results[f"{case}: {stage}"] = side_by_side(board, f"{case}: {stage}", job, folder / stage, threads)
            board.keep("stages", results)
    board.show("SFT and reward model beside trl's own trainers", table(results))
    board.show("Seconds until the first optimizer step is done", start_table(results))


def side_by_side(board: Board, title: str, job: Job, folder: Path, threads: int | None) -> dict[str, Any]:
    """Let both sides train in turn; return the reports of those that did not fail."""
    workers = {
        side: Worker(script, job, folder / side, threads=threads, in_turns=True) for side, script in SCRIPTS.items()
    }
    return board.in_turns(title, workers, job["updates"])


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table with a row per stage and side: seconds a turn after the first with their range, times as fast as
    trl's, peak memory, and the accuracy or loss on held-out rows."""
    rows = []
    for title, sides in results.items():
        seconds = {side: [update["step"] for update in result["updates"]] for side, result in sides.items()}
        seconds = {side: turns[1:] or turns for side, turns in seconds.items()}
        for side, result in sides.items():
            turns, theirs = seconds[side], seconds.get("trl")
            times = f"{median(theirs) / median(turns):.2f}" if theirs else "-"
            peak = result.get("peak_cuda_bytes", result["peak_bytes"]) / GIB
            version = f" {result['trl']}" if side == "trl" else ""
            rows.append(
                [f"{title}, {side}{version}", f"{median(turns):.2f}", f"{min(turns):.2f}-{max(turns):.2f}", times,
                 f"{peak:.2f}", learnt(title, result.get("held_out"))]
            )  # fmt: skip
    headers = ["stage, side", "s/turn", "range", "times as fast as trl", "peak GiB", "held-out rows"]
    return markdown(headers, rows) if rows else ""


def learnt(title: str, held_out: Mapping[str, float] | None) -> str:
    """Show an accuracy or a loss with its interval."""
    if held_out is None:
        return "-"
    if title.endswith("sft"):
        return "{value:.3f} [{low:.3f}, {high:.3f}] nats per token".format(**held_out)
    return "{:.1%} [{:.1%}, {:.1%}] of the pairs".format(*(held_out[name] for name in ("value", "low", "high")))


def start_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table with a row per stage and side: seconds of its imports, of building the trainer, and of the first
    step."""
    rows = [
        [f"{title}, {side}", *(f"{result['start'][part]:.1f}" for part in ("imports", "trainer", "first_step")),
         f"{sum(result['start'].values()):.1f}"]
        for title, sides in results.items() for side, result in sides.items()
    ]  # fmt: skip
    return markdown(["stage, side", "imports", "trainer", "first step", "in all"], rows) if rows else ""
