"""Measure each stage alone and beside one process that never stops computing (--busy).

A thread that waits by spinning holds a core that the thread it waits for may need: then a stage is many times slower.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median

from bench_tables import markdown
from board import Board
from cases import CASES, TOY, settings_here
from jobs import Job, Result, Worker

STAGES = ("sft", "reward_model", "sampling", "ppo_toy", "ppo_tiny")
MOST = 2.0
"""How many times its time alone a stage may take."""


def measure(board: Board, stages: Sequence[str], rounds: int, threads: int | None) -> dict[str, Result]:
    """Return the seconds of every turn of each stage: {stage: {"alone": [...], "busy": [...]}}, after a turn that warms
    up."""
    measured: dict[str, Result] = {}
    made = {"toy": board.made("toy", TOY, None), "tiny": board.made("tiny", CASES["tiny"], None)}
    for stage in stages:
        job = made["tiny" if stage == "ppo_tiny" else "toy"]
        if job is None:
            continue
        result = board.attempt(f"busy: {stage}", partial(_turns, board, stage, job, rounds, threads))
        if result is not None:
            measured[stage] = result
            board.keep("busy", measured)
    board.show("Beside one busy process", table(measured))
    return measured


def _turns(board: Board, stage: str, job: Job, rounds: int, threads: int | None) -> Result:
    settings = settings_here("ours_adapter" if stage == "ppo_tiny" else "ours_full", job["bf16_hardware"])
    job = job | {"stage": stage, "updates": 1 + 2 * rounds, "settings": settings}
    script = "ours_worker.py" if stage.startswith("ppo") else "stage_worker.py"
    worker = Worker(script, job, board.folder / "busy" / stage, threads=threads, in_turns=True)
    worker.update()
    for _ in range(rounds):
        worker.update()
        with busy_process():
            worker.update()
    seconds = [update["step"] for update in worker.result()["updates"]][1:]
    return {"alone": seconds[0::2], "busy": seconds[1::2]}


@contextmanager
def busy_process() -> Iterator[subprocess.Popen[bytes]]:
    """Keep one process computing inside the block, on whatever core the system gives it; it ends with this process,
    too."""
    code = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        time.sleep(0.3)  # it has started by then
        yield process
    finally:
        process.kill()
        process.wait()


def table(measured: Mapping[str, Result]) -> str:
    """Return a table with one row per stage: seconds alone, beside the busy process, their ratio, and whether that is
    allowed."""
    rows = []
    for stage, seconds in measured.items():
        alone, busy = median(seconds["alone"]), median(seconds["busy"])
        good = "yes" if busy <= MOST * alone else "no"
        rows.append([stage, f"{alone:.2f}", f"{busy:.2f}", f"{busy / alone:.2f}", good])
    return markdown(["stage", "seconds alone", "busy", "ratio", f"at most {MOST:g}"], rows) if rows else ""
