"""Run another checkout's `ours_worker.py` on a job file, after replacing what the job names in that checkout's modules.

Started by the benchmark, with the other checkout before this one on the path; nothing of this one is imported.
"""

from __future__ import annotations

import importlib
import json
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    worker = Path(job["checkout"], "recipes/benchmarks/ours_worker.py")
    sys.path[0] = str(worker.parent)  # in the place of this file's folder
    for path, value in job["replaced"].items():
        module, _, name = path.rpartition(".")
        owner = importlib.import_module(module)
        getattr(owner, name)  # raises where it would replace nothing
        setattr(owner, name, value)
    runpy.run_path(str(worker), run_name="__main__")
