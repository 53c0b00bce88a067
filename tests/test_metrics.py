"""Metrics: each is defined once, is checked against its healthy range, and a resumed run's file is complete."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf.errors import InputError
from rlhf.metrics import _ALL, METRICS, check, from_logs, left_healthy_range, main, read_metrics
from rlhf.run.callbacks import JsonlCallback

NAMES = {
    "score", "score_std", "kl_nats", "objective", "entropy_nats", "clip_fraction", "value_clip_fraction",
    "approx_kl_nats", "explained_variance", "policy_loss", "value_loss", "policy_grad_norm", "value_grad_norm",
    "kl_coef", "response_tokens", "eos_rate", "learning_rate", "ratio_max", "step_seconds", "tokens_per_second",
    "score_length_correlation", "loss", "eval_loss", "token_accuracy", "accuracy", "margin", "eval_accuracy",
}  # fmt: skip


def test_every_metric_is_described_once() -> None:
    names = [metric.name for metric in _ALL]
    assert len(names) == len(set(names))
    assert set(METRICS) >= NAMES
    for metric in _ALL:
        assert metric.unit
        assert metric.meaning
        bounded = metric.healthy_low is not None or metric.healthy_high is not None
        assert bounded == bool(metric.advice), metric.name


@pytest.mark.parametrize(
    ("word", "suffix"), [("nats", "_nats"), ("seconds", "_seconds"), ("tokens per second", "_per_second")]
)
def test_names_carry_their_unit(word: str, suffix: str) -> None:
    for metric in _ALL:
        if metric.unit.split(" per ")[0] == word and "loss" not in metric.name:
            assert metric.name.endswith(suffix), metric.name
    kl = [metric for metric in _ALL if "kl" in metric.name and metric.name != "kl_coef"]
    assert all(metric.name.endswith("_nats") for metric in kl)


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("kl_nats", 3.0, None),
        ("kl_nats", -2.0, "below -0.5"),
        ("kl_nats", 90.0, "above 50"),
        ("clip_fraction", 0.2, None),
        ("clip_fraction", 0.21, "lower learning_rate"),
        ("eos_rate", 0.5, "max_new_tokens"),
        ("score", -1e9, None),
        ("my_own", 1e9, None),
        ("my_own", math.nan, "diverged"),
        ("loss", math.inf, "diverged"),
    ],
)
def test_leaving_the_healthy_range_gives_advice(name: str, value: float, part: str | None) -> None:
    advice = check(name, value)
    assert advice is None if part is None else advice is not None and part in advice and name in advice


def test_advice_looks_at_the_end_of_the_run() -> None:
    rows = [
        {"step": step, "clip_fraction": 0.9 if step < 3 else 0.1, "eos_rate": 0.95 - 0.1 * step} for step in range(9)
    ]
    assert [line.split("=")[0] for line in left_healthy_range(rows)] == ["eos_rate"]


def test_library_logs_take_our_names_and_lose_their_timings() -> None:
    logs = {
        "loss": 1.0,
        "mean_token_accuracy": 0.5,
        "eval_runtime": 3.0,
        "total_flos": 1.0,
        "note": "text",
        "entropy": 2,
    }
    assert from_logs({"train_runtime": 3.0, "train_loss": 1.0}) == {}
    assert from_logs(logs) == {"loss": 1.0, "token_accuracy": 0.5, "entropy_nats": 2}


def state(step: int) -> SimpleNamespace:
    return SimpleNamespace(global_step=step, is_world_process_zero=True)


def test_a_resumed_run_continues_its_own_lines(tmp_path: Path) -> None:
    path = tmp_path / "sft" / "metrics.jsonl"
    first = JsonlCallback(path)
    first.on_train_begin(None, state(0), None)
    for step in (1, 2, 3, 4):
        first.on_log(None, state(step), None, logs={"loss": step / 10, "eval_runtime": 1.0})
    with path.open("a") as file:
        file.write('{"step": 5, "lo')  # killed here, the last checkpoint was at 2
    second = JsonlCallback(path)
    second.on_train_begin(None, state(2), None)
    for step in (3, 4):
        second.on_log(None, state(step), None, logs={"loss": step})
    second.on_log(None, state(4), None, logs={"train_runtime": 1.0})
    expected = [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.2}, {"step": 3, "loss": 3}, {"step": 4, "loss": 4}]
    assert [json.loads(line) for line in path.read_text().splitlines()] == expected
    JsonlCallback(path).on_train_begin(None, state(0), None)
    assert read_metrics(path) == []


def test_numbers_that_are_none_stay_valid_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    JsonlCallback(path).on_log(None, state(1), None, logs={"loss": math.nan, "eval_loss": math.inf})
    assert json.loads(path.read_text()) == {"step": 1, "loss": None, "eval_loss": None}
    assert math.isnan(read_metrics(path)[0]["loss"])


def test_broken_lines_are_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n[2]\n{"step": 3}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl:2"):
        read_metrics(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_metrics(tmp_path / "none.jsonl")


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    other = SimpleNamespace(global_step=0, is_world_process_zero=False)
    callback = JsonlCallback(path)
    callback.on_train_begin(None, other, None)
    callback.on_log(None, other, None, logs={"loss": 1.0})
    assert not path.exists()


def test_the_guides_table_is_the_one_that_the_metrics_make(tmp_path: Path) -> None:
    guide = Path(__file__).resolve().parent.parent / "recipes" / "guides" / "ppo.md"
    again, text = tmp_path / "ppo.md", guide.read_text(encoding="utf-8")
    again.write_text(text, encoding="utf-8")
    main(str(again))
    assert again.read_text(encoding="utf-8") == text, "run: python -m rlhf.metrics recipes/guides/ppo.md"
    assert text.count("| `kl_nats` | nats per response |") == 1
