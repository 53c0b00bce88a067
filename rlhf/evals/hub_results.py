"""Scores in the hub's present form: .eval_results/<eval>.yaml, a huggingface_hub.EvalResultEntry per metric."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.run.page import write

FOLDER = ".eval_results"
NO_DATASET = "not a data set of the hub"
"""Begins the notes of a result whose eval names no data set there; the hub links it to nothing."""


def write_results(folder: Path, content: Mapping[str, Any], date: str) -> list[Path]:
    """Write an eval's metrics into a file each, below ``folder``; return the files.

    content: what run_evals.json holds. An eval names its data set ("owner/name", "owner/name:task") in its YAML; one
    that doesn't is written under its own name, and the entry's notes say that the hub knows no such data set. date: of
    the run, ISO 8601.
    """
    import yaml
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    files = []
    for name, about in content["evals"].items():
        dataset, _, task = str(about.get("dataset") or name).partition(":")
        entries = []
        for full, metric in content["metrics"].items():
            measure = full.removeprefix(f"{name}/")
            if measure == full or measure.startswith("choice_") or measure.endswith("_difference"):
                continue
            notes = f"{measure}, {metric['n']} items, {about['how']}"
            if metric["low"] is not None:
                notes += f", 95% interval [{metric['low']:.4f}, {metric['high']:.4f}]"
            notes = notes if about.get("dataset") else f"{NO_DATASET}: {notes}"
            entry = {"dataset_id": dataset, "task_id": task or measure, "value": metric["value"]}
            entries.append(EvalResultEntry(**entry, date=date, notes=notes))
        if entries:
            (folder / FOLDER).mkdir(parents=True, exist_ok=True)
            text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)
            plain = re.sub(r"[^\w.-]", "_", name)
            files.append(write(folder / FOLDER / f"{plain}.yaml", text))
    return files
