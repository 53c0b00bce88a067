"""Run every study, and write the results page: `make studies`.

    python recipes/studies/all_studies.py
    python recipes/studies/all_studies.py --studies '[accuracy, ladder]' --seeds '[0]' --workers 1

One study after the other, all seeds of it side by side as far as there are workers; of two studies that share a chain,
only one works on a seed at a time. A study that fails is named at the end; the others go on. Run again, it does what is
missing.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Condition

import yaml

from rlhf import config as configs
from rlhf.errors import InputError, RunStopped
from rlhf.run import console

HERE = Path(__file__).resolve().parent
LONG = ("sentiment", "baselines_toy", "vllm_toy", "student_steps", "hh", "qa_feedback")
"""Studies that run only where they are asked for: those of real text take as long as all others together, that of
baselines has trials to run before, and that of vLLM needs it installed."""


def studies() -> list[Path]:
    """Return the scripts of all studies: those with a YAML of their name."""
    return sorted(file for file in HERE.glob("*.py") if file.with_suffix(".yaml").is_file())


def in_order() -> list[str]:
    """Return the names of the studies that run unless others are named, in the order of their numbers."""
    found = [importlib.import_module(f"rlhf_recipes.studies.{script.stem}").STUDY for script in studies()]
    return [study.name for study in sorted(found, key=lambda study: study.number) if study.name not in LONG]


@dataclass(frozen=True, kw_only=True)
class AllConfig:
    """Running every study."""

    output_dir: str = "runs/studies"
    """Folder of all studies."""
    seeds: list[int] | None = None
    """Seeds to run; null: those of each study's YAML."""
    studies: list[str] = field(default_factory=in_order)
    """Studies to run, in this order."""
    workers: int = 2
    """Studies at a time, each on one thread."""

    def __post_init__(self) -> None:
        for name in self.studies:
            if name not in (known := [script.stem for script in studies()]):
                raise InputError(f"studies: {name!r} is none of {', '.join(known)}")


class Queue:
    """The (study, seed) that are left to run; workers take the first whose chain no other worker has."""

    def __init__(self, names: list[str], seeds: list[int] | None) -> None:
        own = {name: yaml.safe_load((HERE / f"{name}.yaml").read_text(encoding="utf-8")) for name in names}
        self.left = [(name, seed) for name in names for seed in seeds or own[name]["seeds"]]
        self.chains = {name: settings["chain"] for name, settings in own.items()}
        self.busy: set[tuple[str, int]] = set()
        self.changed = Condition()

    def take(self) -> tuple[str, int] | None:
        """Wait for one whose chain is free, and take it; None where none is left."""
        with self.changed:
            while self.left:
                for name, seed in self.left:
                    if (self.chains[name], seed) not in self.busy:
                        self.busy.add((self.chains[name], seed))
                        self.left.remove((name, seed))
                        return name, seed
                self.changed.wait()
            return None

    def give_back(self, name: str, seed: int) -> None:
        """Free the chain that it used."""
        with self.changed:
            self.busy.remove((self.chains[name], seed))
            self.changed.notify_all()


def run(config: AllConfig, name: str, seeds: list[int]) -> bool:
    """Run a study on one thread; False where it failed."""
    flags = ["--seeds", str(seeds), "--output_dir", config.output_dir]
    command = [sys.executable, str(HERE / f"{name}.py"), *flags]
    return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode == 0


def work(config: AllConfig, queue: Queue) -> list[str]:
    """Run studies until none is left; the names of those that failed."""
    failed = []
    while taken := queue.take():
        name, seed = taken
        try:
            failed += [] if run(config, name, [seed]) else [f"{name} (seed {seed})"]
        finally:
            queue.give_back(name, seed)
    return failed


def main(argv: list[str]) -> None:
    config = configs.load(AllConfig, argv, description=__doc__ or "")
    queue = Queue(config.studies, config.seeds)
    asked = list(queue.left)
    with ThreadPoolExecutor(config.workers) as pool:
        failed = [name for names in pool.map(lambda _: work(config, queue), range(config.workers)) for name in names]
    for name in config.studies:  # the table once more: two seeds that end together each see but one
        if not any(one.startswith(f"{name} ") for one in failed):
            run(config, name, [seed for one, seed in asked if one == name])
    subprocess.run([sys.executable, str(HERE / "write_results.py"), config.output_dir], check=True)
    if failed:
        raise RunStopped(f"{', '.join(failed)}: failed, see above; run it again to go on")
    console.stage_line("studies", "all complete; recipes/guides/results.md and results_by_study.md are written")


if __name__ == "__main__":
    configs.run(main)
