"""lm-eval in this process: its numbers are its own `hf` run's, adapters included. Skips where it is not installed."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from reference.tiny_chain import save_adapter, save_base

from rlhf import cli
from rlhf.errors import InputError
from rlhf.evals.lm_harness import require, tasks_of
from rlhf.intervals import proportion

TASK = """
task: local_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 2.0}}
"""


def test_results_become_our_form():
    """What `simple_evaluate` returns, by hand: three of four right; a perplexity; a metric of a filter."""
    row = {"filter": "none", "metrics": ["acc"], "doc_hash": "abc", "target": 1, "arguments": [["Q", " yes"]]}
    samples = [{**row, "doc_id": n, "acc": float(n > 0), "filtered_resps": [(-1.0, False)]} for n in range(4)]
    found = {
        "results": {"t": {"alias": "t", "acc,none": 0.75, "acc_stderr,none": 0.25, "ppl,none": 9.0,
                          "ppl_stderr,none": "N/A", "em,strict": 0.5, "em_stderr,strict": 0.1}},
        "samples": {"t": samples}, "configs": {"t": {"dataset_path": "owner/name"}}, "versions": {"t": 2.0},
        "n-samples": {"t": {"original": 4, "effective": 4}},
    }  # fmt: skip
    (task,) = tasks_of(found)
    right = proportion(3, 4)
    assert task.metrics["t/acc"] == {"value": 0.75, "low": right.low, "high": right.high, "n": 4}
    assert task.metrics["t/ppl"] == {"value": 9.0, "low": None, "high": None, "n": 4}
    assert task.metrics["t/em,strict"] == pytest.approx({"value": 0.5, "low": 0.304, "high": 0.696, "n": 4})
    assert (task.metric, task.dataset, task.version) == ("acc", "owner/name", "2.0")
    assert task.rows[1]["key"] == "1 abc"
    assert task.rows[1]["trials"][0]["numbers"] == {"acc": 1.0}


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_without_it_one_line_says_what_to_install():
    with pytest.raises(InputError, match=r"lm_eval: is not installed; pip install 'rlhf-recipes\[lm_eval\]'"):
        require()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_numbers_are_lm_evals_own(tmp_path: Path, tiny_model, tiny_tokenizer, lora):
    """A local JSON task, offline: `run_evals --lm_eval` against lm-eval's own call with model="hf"."""
    lm_eval = pytest.importorskip("lm_eval")
    base = save_base(tmp_path, tiny_model, tiny_tokenizer)
    model = save_adapter(tmp_path, base, tiny_tokenizer) if lora else base
    rows = [
        {"question": f"What is {n} + 1? ", "choices": [str(n + 1), str(n + 2), "the lazy fox"], "answer": n % 3}
        for n in range(12)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "local_choice.yaml").write_text(TASK.format(data=data))
    flags = ["--model", model, "--lm_eval", "local_choice", "--lm_eval_path", tasks, "--bf16", "false",
             "--output_dir", tmp_path / "runs/evals", "--generation_batch_size", "4"]  # fmt: skip
    cli.command(["run_evals", *map(str, flags)])
    ours = json.loads((tmp_path / "runs/evals/run_evals.json").read_text())
    arguments = f"pretrained={base},tokenizer={model},dtype=float32" + (f",peft={model}" if lora else "")
    manager = __import__("lm_eval.tasks", fromlist=["TaskManager"]).TaskManager(include_path=str(tasks))
    theirs = lm_eval.simple_evaluate(
        model="hf", model_args=arguments, tasks=["local_choice"], task_manager=manager, batch_size=4, device="cpu"
    )
    for metric in ("acc", "acc_norm"):
        value = theirs["results"]["local_choice"][f"{metric},none"]
        assert abs(ours["metrics"][f"local_choice/{metric}"]["value"] - value) < 1e-6
    items = [json.loads(line) for line in (tmp_path / "runs/evals/items.jsonl").read_text().splitlines()]
    logged = theirs["samples"]["local_choice"]
    assert len(items) == len(logged) == 12
    for item, row in zip(items, logged, strict=True):
        assert item["trials"][0]["answers"]["answer"] == "\n".join(map(str, row["filtered_resps"]))
