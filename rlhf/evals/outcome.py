"""What a run of evals has come to, and its files: run_evals.json, items.jsonl, the page, .eval_results/."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlhf.evals.compare import ITEMS, Compared, Earlier, chance, compare
from rlhf.evals.hub_results import write_results
from rlhf.evals.lm_harness import HarnessTask
from rlhf.evals.measure import Metric, metrics_of
from rlhf.evals.modelgraded import ModelBasedClassify
from rlhf.evals.page import write_page
from rlhf.evals.run import Result
from rlhf.rows.records import write_jsonl
from rlhf.run.checkpoint import write_json_atomic


@dataclass
class Outcome:
    """The metrics, what is known of each eval, the reasons of those that could not be run, and every item."""

    metrics: dict[str, Metric] = field(default_factory=dict)
    evals: dict[str, dict[str, Any]] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, result: Result, how: str, ks: Sequence[int]) -> None:
        """Add an eval that was run; how: how it was asked, for the reader of its numbers. ks: of pass@k."""
        one = result.eval
        self.metrics |= metrics_of(result, ks)
        first = next(iter(result.items[0].trials[0].verdict.numbers))
        scored = isinstance(one.grader, ModelBasedClassify) and first == "score"
        self.evals[one.name] = {
            "class": one.grader.name,
            "items": len(result.items),
            "metric": None if first.startswith("choice_") else first,  # nothing says which choice is good
            "bounds": list(one.grader.bounds) if scored else [0.0, 1.0],  # type: ignore[union-attr]
            "how": how,
            "where": one.where,
            "dataset": one.dataset,
        }
        self.rows += [item.row(one.name) for item in result.items]

    def add_task(self, task: HarnessTask, how: str) -> None:
        """Add a task of lm-eval."""
        numbers = [n for row in task.rows for trial in row["trials"] for n in trial["numbers"].values()]
        self.metrics |= task.metrics
        self.evals[task.name] = {
            "class": "lm_eval",
            "items": len(task.rows),
            "metric": task.metric,
            "bounds": [0.0, 1.0] if all(0 <= n <= 1 for n in numbers) else None,
            "how": f"lm-eval, version {task.version or '?'} of the task, {how}",
            "where": task.name,
            "dataset": task.dataset,
        }
        self.rows += task.rows

    def write(self, folder: Path, about: Mapping[str, Any], earlier: Earlier | None = None) -> list[Compared]:
        """Write all files into ``folder`` and return the comparison with another run.

        about: the model and settings, for the head of run_evals.json."""
        compared = compare(self.evals, self.rows, earlier) if earlier else []
        metrics = self.metrics | {f"{one.name}/{one.metric}_difference": one.difference for one in compared}
        content: dict[str, Any] = {"metrics": metrics, **about, "evals": self.evals, "not_run": self.not_run}
        if earlier is not None:
            rows = [asdict(one) | {"verdict": one.sentence} for one in compared]
            content["comparison"] = {
                "with": earlier.file,
                "model": earlier.model,
                "evals": rows,
                "note": chance(compared),
            }
        write_jsonl(folder / ITEMS, self.rows)
        write_results(folder, content, datetime.now(UTC).isoformat(timespec="seconds"))
        write_page(folder, content, self.rows, compared, earlier)
        write_json_atomic(folder / "run_evals.json", content)
        return compared
