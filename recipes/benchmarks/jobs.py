"""Give every measurement a process of its own, with its own peak memory and its own version of trl.

The benchmark writes a job as JSON, starts a worker script on it, and reads the result that the worker leaves. This
file serves both ends: `Worker` and `run_job` for the benchmark, `serve`, turns and memory readings for a worker. It
imports nothing heavy, so that the benchmark itself does not disturb what it measures.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf.errors import InputError

BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent.parent  # of a clone, or the folder of installed packages
Job = dict[str, Any]
Result = dict[str, Any]
TURNS = "RLHF_BENCHMARK_TURNS"  # the ends of two pipes, for a worker that takes turns


class Worker:
    """Run a script of this folder on a job, in a process of its own.

    folder: the job's own: holds job.json, log.txt and result.json. site: put before every installed package. python: an
    interpreter other than this one. in_turns: it stops after every update until `update` lets it go on, so that a
    machine's slow minutes fall on all of them.
    """

    def __init__(
        self,
        script: str,
        job: Job,
        folder: Path,
        *,
        threads: int | None = None,
        site: Path | None = None,
        python: str | None = None,
        in_turns: bool = False,
        **env: str,
    ):
        self.script, self.folder, self.python = script, folder, python or sys.executable
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.json").unlink(missing_ok=True)
        (folder / "job.json").write_text(json.dumps(job | {"folder": str(folder)}, indent=1) + "\n")
        paths = [str(path) for path in (site, ROOT) if path] + [os.environ.get("PYTHONPATH", "")]
        settings = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        settings |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1"}
        if threads is not None:
            settings |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        self.env, self.in_turns = {**os.environ, **settings, **env}, in_turns
        self.process: subprocess.Popen[bytes] | None = None
        self.waits = False  # for permission to go on

    def start(self) -> None:
        """Start the process, which begins with its first update. `update` and `result` start it where nobody did."""
        self.done, told = os.pipe()
        heard, self.go = os.pipe()
        turns = {TURNS: f"{told},{heard}"} if self.in_turns else {}
        command = [self.python, str(BENCHMARKS / self.script), str(self.folder / "job.json")]
        with (self.folder / "log.txt").open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=self.env | turns, pass_fds=(told, heard)
            )
        os.close(told)
        os.close(heard)

    def update(self) -> None:
        """Let the worker compute one update (the first includes its start), and wait until the update or the worker
        ends."""
        if self.process is None:
            self.start()
        elif self.waits:
            with suppress(BrokenPipeError):  # it has ended: `result` says why
                os.write(self.go, b".")
        os.read(self.done, 1)
        self.waits = True

    def result(self) -> Result:
        """Wait for the end, and return the report. Raises InputError with the end of the log where the worker fails."""
        if self.process is None:
            self.start()
        assert self.process is not None
        os.close(self.go)
        code = self.process.wait()
        os.close(self.done)
        log, result = self.folder / "log.txt", self.folder / "result.json"
        if code or not result.is_file():
            lines = log.read_text(errors="replace").strip().splitlines() or ["it printed nothing"]
            raise InputError(f"{self.script} ended with code {code}: {lines[-1][:300]} (see {log})")
        return json.loads(result.read_text())


def run_job(script: str, job: Job, folder: Path, **settings: Any) -> Result:
    """Run a `Worker` from start to end, and return its report."""
    return Worker(script, job, folder, **settings).result()


def wait_for_turn() -> None:
    """Report an update as done and, where turns are taken, wait for permission to go on. Called in a worker."""
    ends = os.environ.get(TURNS)
    if ends:
        told, heard = map(int, ends.split(","))
        os.write(told, b".")
        os.read(heard, 1)


def serve(work: Callable[[Job], Result]) -> None:
    """Read the job named on the command line, do it, and write its result: a worker's main function."""
    job = json.loads(Path(sys.argv[1]).read_text())
    result = work(job)
    Path(job["folder"], "result.json").write_text(json.dumps(result, indent=1) + "\n")


def resident_bytes() -> int:
    """Return this process's memory now."""
    return _status("VmRSS") or peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Return the most memory that this process has had.

    On Linux this is VmHWM, since getrusage, used elsewhere, also counts what the parent held when it started this one.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(field: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


def memory() -> dict[str, int]:
    """Return peak memory for a result: the process's, and on a GPU its allocator's."""
    import torch

    peaks = {"peak_bytes": peak_resident_bytes()}
    if torch.cuda.is_available():
        peaks["peak_cuda_bytes"] = torch.cuda.max_memory_allocated()
    return peaks
