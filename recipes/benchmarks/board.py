"""Keep what a benchmark has measured on disk after every run, so that an interrupted one loses nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from cases import Case
from jobs import Job, Result, Worker, run_job

from rlhf.errors import InputError


@dataclass
class Board:
    """Hold results, tables and failures, and write them to `folder`."""

    folder: Path
    results: dict[str, Any] = field(default_factory=dict)
    tables: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def attempt(self, name: str, run: Callable[[], Any]) -> Any:
        """Return what a run gives; where it fails, print one line and return None."""
        print(f"{name} ...", flush=True)
        try:
            return run()
        except InputError as error:
            self.failures.append(f"{name}: {error}")
            print(f"{name}: left out: {error}", flush=True)
            return None

    def keep(self, part: str, result: Any) -> None:
        self.results[part] = result
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.tables:
            (self.folder / "tables.md").unlink(missing_ok=True)  # of an earlier benchmark, made with other settings
        (self.folder / "results.json").write_text(json.dumps(self.results, indent=1) + "\n")

    def show(self, title: str, text: str) -> None:
        if text:
            print(f"\n### {title}\n\n{text}\n", flush=True)
            self.tables.append(f"### {title}\n\n{text}\n")
            (self.folder / "tables.md").write_text("\n".join(self.tables))

    def made(self, name: str, case: Case, model: str | None) -> Job | None:
        """Return a job on this case, without settings; write the model and tokenizer that the case does not bring."""
        job = {"case": case.as_job(), "model": model}
        folder = self.folder / name / "made"
        made = self.attempt(f"{name}: model", partial(run_job, "synthetic.py", job, folder))
        return None if made is None else job | made

    def in_turns(self, title: str, workers: Mapping[str, Worker], updates: int) -> dict[str, Result]:
        """Let the workers compute one update each in turn, `updates` times; return the reports of those that did not
        fail."""
        print(f"{title}: {', '.join(workers)}: {updates} updates ...", flush=True)
        for _ in range(updates):
            for worker in workers.values():
                worker.update()
        results = {run: self.attempt(f"{title}: {run}", worker.result) for run, worker in workers.items()}
        return {run: result for run, result in results.items() if result is not None}
