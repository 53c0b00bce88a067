"""One measurement, one process: its peak memory is then its own, and trl's version is its own too.

The benchmark writes a job as JSON, starts a worker script on it, and reads the result that the worker leaves. This
file is both ends: `run_job` for the benchmark, `serve` and the memory readings for a worker. It imports nothing
heavy, so that the benchmark itself stays out of the way of what it measures.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf import InputError

ROOT = Path(__file__).resolve().parent.parent.parent
Job = dict[str, Any]
Result = dict[str, Any]


def run_job(
    script: str, job: Job, folder: Path, *, threads: int | None = None, site: Path | None = None, **env: str
) -> Result:
    """Run `recipes/benchmarks/<script>` on a job in a process of its own; what it reports.

    folder: the job's own: holds job.json, log.txt and result.json. site: put before every installed package.
    Raises InputError with the end of the log where the worker fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    (folder / "job.json").write_text(json.dumps(job | {"folder": str(folder)}, indent=1) + "\n")
    paths = [str(path) for path in (site, ROOT) if path] + [os.environ.get("PYTHONPATH", "")]
    settings = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    settings |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1"}
    if threads is not None:
        settings |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    command = [sys.executable, str(ROOT / "recipes/benchmarks" / script), str(folder / "job.json")]
    with (folder / "log.txt").open("w") as log:
        code = subprocess.run(
            command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | settings | env, check=False
        ).returncode
    if code or not result.is_file():
        lines = (folder / "log.txt").read_text(errors="replace").strip().splitlines() or ["it printed nothing"]
        raise InputError(f"{script} ended with code {code}: {lines[-1][:300]} (see {folder / 'log.txt'})")
    return json.loads(result.read_text())


def serve(work: Callable[[Job], Result]) -> None:
    """A worker's main: read the job named on the command line, do it, write its result."""
    job = json.loads(Path(sys.argv[1]).read_text())
    result = work(job)
    Path(job["folder"], "result.json").write_text(json.dumps(result, indent=1) + "\n")


def resident_bytes() -> int:
    """Memory of this process right now."""
    return _status("VmRSS") or peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The most memory that this process has had.

    Linux's VmHWM: getrusage, which is asked elsewhere, counts what the parent held when it started this process too.
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
    """Peak memory, for a result: of the process, and on a GPU of its allocator."""
    import torch

    peaks = {"peak_bytes": peak_resident_bytes()}
    if torch.cuda.is_available():
        peaks["peak_cuda_bytes"] = torch.cuda.max_memory_allocated()
    return peaks
