"""Run every study, and write the results page: `make studies`.

    python recipes/studies/all_studies.py
    python recipes/studies/all_studies.py --workers 1 --seeds '[0]'

A worker runs all studies of a seed, one after the other, and with them the chain that they share. A study that fails is
named at the end; the others go on. Run again, it does what is missing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from rlhf import config as configs
from rlhf.errors import RunStopped
from rlhf.run import console

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class AllConfig:
    """Running every study."""

    output_dir: str = "runs/studies"
    """Folder of all studies."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds to run."""
    skip: list[str] = field(default_factory=lambda: ["sentiment"])
    """Studies left out: that of real text takes as long as all others together."""
    workers: int = 2
    """Seeds at a time, each on one thread."""


def studies() -> list[Path]:
    """Return the scripts of all studies: those with a YAML of their name."""
    return sorted(file for file in HERE.glob("*.py") if file.with_suffix(".yaml").is_file())


def of_seed(config: AllConfig, seed: int) -> list[str]:
    """Run all studies of a seed; the names of those that failed."""
    failed = []
    for script in (script for script in studies() if script.stem not in config.skip):
        flags = ["--seeds", f"[{seed}]", "--output_dir", config.output_dir]
        done = subprocess.run([sys.executable, str(script), *flags], env=os.environ | {"OMP_NUM_THREADS": "1"})
        failed += [f"{script.stem} (seed {seed})"] if done.returncode else []
    return failed


def main(argv: list[str]) -> None:
    config = configs.load(AllConfig, argv, description=__doc__ or "")
    with ThreadPoolExecutor(config.workers) as pool:
        failed = [name for names in pool.map(lambda seed: of_seed(config, seed), config.seeds) for name in names]
    subprocess.run([sys.executable, str(HERE / "write_results.py"), config.output_dir], check=True)
    if failed:
        raise RunStopped(f"{', '.join(failed)}: failed, see above; run it again to go on")
    console.stage_line("studies", "all complete; recipes/guides/results.md is written")


if __name__ == "__main__":
    configs.run(main)
