"""The whole chain as a user runs it, started to be disturbed: run folders, how to compare two, and who starts them.

`command` starts the real command; `Forks` start the same without its seconds of imports. Both end by the same SIGKILL,
and leave the same disk.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from reference.forked import ENVIRONMENT, LIMIT, Forker, Started

ROOT = Path(__file__).resolve().parent.parent.parent
# A log line says the mean since the line before it; here a checkpoint ends every second of them.
LOGGED = ["--sft.logging_steps", "3", "--reward_model.logging_steps", "3"]  # saves are at 2 and 4: never at a log
SMOKE = ["recipes/chain.py", "--config", "recipes/configs/smoke.yaml", *LOGGED]
STAGES = ("data", "base", "sft", "rankings", "reward_model", "ppo", "evaluation")
TRAINED = ("base", "sft", "reward_model", "ppo")


# ---------------------------------------------------------------- starting it


def command(folder: Path, *flags: str) -> Started:
    """The real command."""
    process = subprocess.Popen(
        [sys.executable, *SMOKE, "--output_dir", str(folder), *flags],
        cwd=ROOT, env=os.environ | ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    written: list[tuple[str, str]] = []

    def ended(seconds: float) -> int | None:
        if seconds and not written:
            written.append(process.communicate(timeout=seconds))
        return process.poll()

    return Started(process.pid, ended, lambda: written[0])


def run(folder: Path, *flags: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the real command."""
    return command(folder, *flags).end()


class Forks(Forker):
    """Forks the chain."""

    def __call__(self, folder: Path, *flags: str) -> Started:
        """The chain in `folder` (its path for the forked process)."""
        return self.start([*SMOKE, "--output_dir", folder, *flags])


def kill_when(started: Started, seen: Callable[[], bool], delay: float = 0.0, number: int = signal.SIGKILL) -> bool:
    """Send the signal `delay` seconds after `seen()` first held; False where the run ended before that."""
    deadline = time.monotonic() + LIMIT
    while not seen():
        if not started.running():
            return False
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    time.sleep(delay)
    started.signal(number)
    return True


# ---------------------------------------------------------------- run folders


def undisturbed(factory: pytest.TempPathFactory) -> Path:
    """The folder of one undisturbed run of the real command, for all tests; they copy it before they change anything.

    Its stdout lies beside it. Of several pytest workers, one makes it and the others wait.
    """
    session = factory.getbasetemp()
    folder = (session.parent if "PYTEST_XDIST_WORKER" in os.environ else session) / "undisturbed" / "run"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.parent / "lock"):
        if not (folder.parent / "stdout").exists():
            code, out, err = run(folder)
            assert code == 0, out + err
            assert err == ""
            (folder.parent / "stdout").write_text(out)
    return folder


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def manifests(folder: Path) -> dict[str, tuple[int, str]]:
    """Every complete stage's manifest: when it was written, and what it says."""
    files = sorted(folder.glob("*/manifest.json"))
    return {file.parent.name: (file.stat().st_mtime_ns, file.read_text()) for file in files}


def copied(folder: Path, to: Path, before: str | None = None) -> Path:
    """A copy of a run, times included; `before`: as it was when that stage had not begun."""
    shutil.copytree(folder, to, copy_function=shutil.copy2)
    if before is not None:
        for later in STAGES[STAGES.index(before) :]:
            shutil.rmtree(to / later)
        for file in to.glob("*.*"):
            file.unlink()
    return to


def whole_checkpoints(stage: Path) -> list[int]:
    """The steps of the checkpoints that are marked complete."""
    return sorted(int(file.parent.name[11:]) for file in stage.glob("checkpoint-*/complete"))


def fresh(path: Path, since: int = 0) -> bool:
    """It is there, and was changed after `since` (of time.time_ns)."""
    try:
        return path.stat().st_ctime_ns > since
    except FileNotFoundError:
        return False


def being_saved(stage: Path, since: int = 0) -> bool:
    """A checkpoint was half-written after `since`: in a folder that waits for its name, or not marked complete."""
    half = [folder for folder in stage.glob("checkpoint-*") if not (folder / "complete").exists()]
    return any(fresh(folder, since) for folder in [*stage.glob(".checkpoint-*.writing"), *half])


def untimed(value: Any) -> Any:
    """Without what differs from run to run: seconds, and tokens per second."""
    if isinstance(value, dict):
        kept = {name: inner for name, inner in value.items() if "second" not in name}
        return {name: untimed(inner) for name, inner in kept.items()}
    return [untimed(inner) for inner in value] if isinstance(value, list) else value


def differences(folder: Path, other: Path) -> Iterator[str]:
    """In what two finished runs differ: weights, data and samples to the byte, every number but times; and what a
    finished stage does not leave behind."""
    ours, theirs = read(folder / "summary.json"), read(other / "summary.json")
    for part in ("evaluation", "stages"):
        if untimed(ours[part]) != untimed(theirs[part]):
            yield f"summary.json: {part}"
    for stage in STAGES:
        for path in sorted((other / stage).iterdir()):
            mine = folder / stage / path.name
            if path.suffix == ".safetensors" or (path.suffix == ".jsonl" and path.name != "metrics.jsonl"):
                if not mine.is_file() or mine.read_bytes() != path.read_bytes():
                    yield f"{stage}/{path.name}"
            elif path.name == "metrics.jsonl" and untimed(lines(mine)) != untimed(lines(path)):
                yield f"{stage}/metrics.jsonl"
        outputs = [untimed(read(run / stage / "manifest.json")["outputs"]) for run in (folder, other)]
        if outputs[0] != outputs[1]:
            yield f"{stage}/manifest.json: outputs"
        names = [{path.name for path in (run / stage).iterdir()} for run in (folder, other)]
        if names[0] != names[1]:
            yield f"{stage}: {sorted(names[0] ^ names[1])} in one of them only"
