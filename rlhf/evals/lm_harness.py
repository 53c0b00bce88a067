"""EleutherAI's lm-eval in this process: its tasks, its prompts and its numbers, in the form of our own evals.

An extra (`pip install 'rlhf-recipes[lm_eval]'`); it is imported where it is called. The model is loaded by lm-eval's
own class `HFLM`, an adapter over its base as `--model_args pretrained=BASE,peft=FOLDER` says it, so that the numbers
are those of `lm_eval --model hf`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rlhf.errors import InputError, reason
from rlhf.evals.measure import Metric, as_metric
from rlhf.intervals import clustered_mean


@dataclass(frozen=True)
class HarnessTask:
    """A task's metrics, named <task>/<metric>; its items as rows of items.jsonl; its data set on the hub."""

    name: str
    metrics: dict[str, Metric]
    rows: list[dict[str, Any]]
    dataset: str | None = None
    version: str = ""

    @property
    def metric(self) -> str | None:
        """Return the metric by which two runs are compared: the first of the task's."""
        return next((name.removeprefix(f"{self.name}/") for name in self.metrics), None)


def require() -> None:
    """Raise InputError where lm-eval is not installed."""
    if find_spec("lm_eval") is None:
        raise InputError("lm_eval: is not installed; pip install 'rlhf-recipes[lm_eval]'")


def run_tasks(
    tasks: Sequence[str],
    model: str,
    *,
    dtype: str = "float32",
    batch_size: int = 8,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat_template: bool = False,
    include_path: str | None = None,
) -> list[HarnessTask]:
    """Run lm-eval's tasks on a model's folder, an adapter's, or a hub id.

    dtype: float32 or bfloat16. limit: the first so many documents of each task. num_fewshot: where the task leaves it
    open. chat_template: render the prompts as a conversation (lm-eval's own default does not). include_path: a folder
    of task files beside lm-eval's own. Raises InputError, also for what a task cannot load without a network.
    """
    require()
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        manager = TaskManager(include_path=include_path)
        known = set(manager.all_tasks)
    except Exception as error:  # a folder that is not there, a task file that is no YAML
        raise InputError(f"lm_eval_path={include_path}: {reason(error)}") from None
    missing = [task for task in tasks if task not in known and not Path(task).is_file()]
    if missing:
        raise InputError(f"lm_eval: no task {missing[0]}; `lm_eval ls tasks` names them, lm_eval_path adds a folder")
    try:
        harness = HFLM(**model_arguments(model), dtype=dtype, device=_device(), batch_size=batch_size)
        found = lm_eval.simple_evaluate(
            model=harness, tasks=list(tasks), num_fewshot=num_fewshot, limit=limit, log_samples=True,
            apply_chat_template=chat_template, task_manager=manager,
        )  # fmt: skip
    except Exception as error:  # of data sets, templates, metrics: any library may raise anything
        raise InputError(f"lm_eval: {', '.join(tasks)}: {type(error).__name__}: {reason(error)}") from error
    return list(tasks_of(found))


def model_arguments(model: str) -> dict[str, Any]:
    """Return HFLM's arguments for a model; an adapter's folder brings its own tokenizer."""
    from rlhf.models.adapters import is_adapter
    from rlhf.models.pretrained import base_of, check_folder

    check_folder(model)
    if is_adapter(model):
        return {"pretrained": base_of(model), "peft": model, "tokenizer": model}
    return {"pretrained": model}


def tasks_of(found: Mapping[str, Any]) -> Iterator[HarnessTask]:
    """Turn what `simple_evaluate` returns into our form.

    The value is lm-eval's own. The interval is over documents where the value is the mean of numbers from 0 to 1 that
    each document has (`rlhf.intervals`), else the value -+ 1.96 of lm-eval's standard errors, else there is none.
    """
    samples, configs = found.get("samples", {}), found.get("configs", {})
    counts, versions = found.get("n-samples", {}), found.get("versions", {})
    for task, results in found["results"].items():
        own = samples.get(task, [])
        metrics: dict[str, Metric] = {}
        for full, value in results.items():
            metric, _, kind = full.partition(",")
            if not kind or metric.endswith("_stderr") or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            name = metric if kind == "none" else f"{metric},{kind}"
            values = [row.get(metric) for row in own if row.get("filter") == kind]
            n = len(values) or int((counts.get(task) or {}).get("effective", 0))
            metrics[f"{task}/{name}"] = _metric(float(value), values, results.get(f"{metric}_stderr,{kind}"), n)
        config = configs.get(task) or {}
        dataset = config.get("dataset_path")
        hub = isinstance(dataset, str) and "/" in dataset and not Path(dataset).exists()
        yield HarnessTask(
            task, metrics, [_row(task, row) for row in own], dataset if hub else None, str(versions.get(task, ""))
        )


def _metric(value: float, values: Sequence[Any], error: object, n: int) -> Metric:
    numbers = [float(v) for v in values if isinstance(v, bool | int | float) and 0 <= v <= 1]
    if numbers and len(numbers) == len(values) and abs(sum(numbers) / len(numbers) - value) < 1e-9:
        return as_metric(clustered_mean(numbers, range(len(numbers))), n) | {"value": value}
    if isinstance(error, int | float):
        return {"value": value, "low": value - 1.96 * error, "high": value + 1.96 * error, "n": n}
    return {"value": value, "low": None, "high": None, "n": n}


def _row(task: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a logged sample into a row of items.jsonl; its key is lm-eval's number and hash of the document."""
    arguments = row.get("arguments") or [["", ""]]
    answers = row.get("filtered_resps") or []
    suffix = "" if row.get("filter") in (None, "none") else f",{row['filter']}"
    numbers = {
        f"{name}{suffix}": float(row[name])
        for name in row.get("metrics", ())
        if isinstance(row.get(name), bool | int | float)
    }
    prompt = arguments[0][0] if isinstance(arguments[0], list | tuple) else str(arguments[0])
    return {
        "eval": task,
        "key": f"{row['doc_id']} {str(row.get('doc_hash', ''))[:12]}{suffix}",
        "where": f"document {row['doc_id']}",
        "prompt": [{"role": "user", "content": str(prompt)}],
        "ideal": [str(row.get("target"))],
        "trials": [{"answers": {"answer": "\n".join(map(str, answers))}, "numbers": numbers, "picked": None}],
    }


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
