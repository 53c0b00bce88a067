"""Every metric: its name, unit, meaning, healthy range, and what to do when it leaves that range.

The ranges are those of runs that went well (Stiennon et al. 2020; Ouyang et al. 2022; 2403.17031). Inspect a run that
leaves them before you trust it.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.rows.jsonl import read_rows, to_line


@dataclass(frozen=True)
class Metric:
    """One number that a run logs. A bound of None means that the range is open on that side."""

    name: str
    unit: str
    meaning: str
    healthy_low: float | None = None
    healthy_high: float | None = None
    advice: str = ""
    patience: int = 3
    """Consecutive logged lines outside the range that raise an alarm: a single one may be noise."""


_PPO = (
    Metric("score", "score", "mean score of the responses, as the reward model or function gives it"),
    Metric(
        "score_std", "score", "spread of the scores over the rollout", 1e-6, None,
        "all responses score the same, so there is nothing to learn: the score function is constant, or the policy "
        "has collapsed to one response; read samples.jsonl",
    ),
    Metric(
        "ensemble_std", "score", "mean over responses of the standard deviation of an ensemble's members", None, 1.0,
        "the members disagree by as much as responses differ: the policy writes text that they never saw; raise "
        "kl_coef, stop earlier, take rule=min or mean_minus_std, or collect rankings of such responses",
    ),
    Metric(
        "kl_nats", "nats per response", "mean over responses of the summed log(policy / reference)",
        -0.5, 50.0,
        "below 0: sampling and scoring use different distributions (temperature, top-k, templates); above: the policy "
        "writes text that the reward model cannot judge, raise kl_coef or stop earlier",
    ),
    Metric("objective", "score", "score (after normalisation and the missing-stop rule) minus kl_coef * kl_nats"),
    Metric("step_score", "score", "mean over responses of the summed step scores, times step_score_coef"),
    Metric(
        "entropy_nats", "nats per token", "mean entropy of the next-token distribution", 0.05, None,
        "the policy has almost stopped exploring: raise kl_coef, lower learning_rate or inner_epochs",
    ),
    Metric(
        "clip_fraction", "share of tokens", "tokens whose ratio was clipped in the policy loss", None, 0.2,
        "updates are too large: lower learning_rate or inner_epochs, or raise minibatch_size",
    ),
    Metric(
        "value_clip_fraction", "share of tokens", "tokens where the clipped value error was the larger one",
        None, 0.5,
        "clip_value holds the value model back: raise it, or warm the value model up (value_warmup_updates)",
    ),
    Metric(
        "approx_kl_nats", "nats per token", "mean k3 estimate of KL(policy before || after) within an update",
        None, 0.05, "updates are too large: lower learning_rate or inner_epochs",
    ),
    Metric(
        "explained_variance", "share", "1 - var(returns - values) / var(returns)", 0.0, None,
        "the value model predicts worse than a constant: raise value_learning_rate, warm the value model up "
        "(value_warmup_updates), and start it from the reward model",
    ),
    Metric("policy_loss", "advantage", "clipped surrogate loss, mean over tokens"),
    Metric("value_loss", "score squared", "clipped squared error of the values, halved, mean over tokens"),
    Metric(
        "policy_grad_norm", "norm", "gradient norm of the policy before clipping", None, 100.0,
        "gradients explode: lower learning_rate, look for huge advantages or a broken score",
    ),
    Metric(
        "value_grad_norm", "norm", "gradient norm of the value model before clipping", None, 1000.0,
        "gradients explode: normalise the scores (a reward model stores its mean and spread) or lower "
        "value_learning_rate",
    ),
    Metric("kl_coef", "score per nat", "weight of the KL penalty in the reward"),
    Metric(
        "response_tokens", "tokens", "mean length of a response, its stop token included", 2.0, None,
        "responses are almost empty: read samples.jsonl, and check that the stop token is the right one",
    ),
    Metric(
        "eos_rate", "share of responses", "responses that stopped by themselves", 0.9, None,
        "many responses are cut: raise max_new_tokens, or use missing_eos=replace",
    ),
    Metric(
        "ratio_max", "ratio", "largest ratio of new to old probability of a token in an update", None, 10.0,
        "single tokens move very far: lower learning_rate; in bf16, check that old and new log-probs are computed in "
        "the same way",
    ),
    Metric(
        "step0_ratio_error", "ratio", "largest |ratio - 1| at an update's first optimizer step", None, 0.1,
        "old and new log-probs disagree before anything changed: dropout, temperature, templates or precision "
        "differ",
    ),
    Metric(
        "score_length_correlation", "correlation", "Pearson correlation of score and response length",
        -0.7, 0.7,
        "score follows length closely: the reward model may reward length; compare win rates at equal length",
    ),
    Metric(
        "importance_weight", "ratio", "mean of the weights min(trainer / engine, importance_cap), which correct for an "
        "engine whose probabilities differ slightly from the trainer's",
        0.9, 1.1, "the engine samples from another distribution (its weights, temperature or stop ids): see "
        "engine_kl_nats",
    ),
    Metric(
        "importance_capped", "share of tokens", "tokens whose weight was cut at importance_cap", None, 0.05,
        "engine and trainer disagree on many tokens: see engine_kl_nats",
    ),
    Metric(
        "engine_kl_nats", "nats per token", "mean k3 estimate of KL(engine || trainer) on the same tokens; with "
        "rollouts_ahead the engine's weights are an update older", None, 0.05,
        "the engine does not sample from the policy: check that its weights are current, that its precision and "
        "temperature are the trainer's, and that it reports log-probabilities at that temperature; with rollouts_ahead "
        "an update moves too far: lower learning_rate or inner_epochs",
    ),
    Metric(
        "rollout_staleness_updates", "updates", "with rollouts_ahead: updates between the weights that sampled the "
        "rollout and the weights that it trains", None, 1.0,
        "rollouts are older than rollouts_ahead says, and engine_kl_nats says by how much: stop the run and report it",
    ),
    Metric(
        "dropped_responses", "responses", "left out of the update because scoring them failed "
        "(on_score_failure=drop)", None, 0.0,
        "scoring fails again and again, and a response that makes it fail is never penalised: read the warnings in the "
        "log, repair the reward function",
    ),
    Metric("pretraining_loss", "nats per token", "loss on the pretraining data that is mixed in (PPO-ptx)"),
    Metric("eval_pretraining_loss", "nats per token", "the same on held-out documents"),
    Metric(
        "alignment_tax_nats", "nats per token", "eval_pretraining_loss less the reference's (the policy before PPO)",
        None, 0.2, "PPO makes the policy forget: raise pretraining_coef or kl_coef, or stop earlier",
    ),
    Metric("optimizer_steps", "steps", "optimizer steps of the update; fewer where stop_approx_kl_nats ended it"),
    Metric("step_seconds", "seconds", "wall-clock time of an update"),
    Metric(
        "generate_seconds", "seconds",
        "part of step_seconds: sampling the responses; with rollouts_ahead, waiting for them",
    ),
    Metric("score_seconds", "seconds", "part of step_seconds: reward models and functions"),
    Metric("logprobs_seconds", "seconds", "part of step_seconds: old and reference log-probabilities and values"),
    Metric("update_seconds", "seconds", "part of step_seconds: advantages and all optimizer steps"),
    Metric("tokens_per_second", "tokens per second", "response tokens collected and trained on per second"),
    Metric("eval_score", "score", "mean score on the evaluation prompts"),
    Metric("eval_kl_nats", "nats per response", "mean KL to the reference on the evaluation prompts"),
    Metric("eval_response_tokens", "tokens", "mean response length on the evaluation prompts"),
    Metric("eval_eos_rate", "share of responses", "evaluation responses that stopped by themselves"),
)  # fmt: skip

_SUPERVISED = (
    Metric("loss", "nats", "training loss: per token (fine-tuning), per pair (reward model)"),
    Metric("eval_loss", "nats", "the same loss on held-out data"),
    Metric("token_accuracy", "share of tokens", "trained tokens that the model's greedy choice gets right"),
    Metric("eval_token_accuracy", "share of tokens", "the same on held-out demonstrations"),
    Metric(
        "grad_norm", "norm", "gradient norm before clipping", None, 100.0,
        "gradients explode: lower learning_rate, or look for broken rows in the data",
    ),
    Metric("learning_rate", "per step", "learning rate of the policy, or of the model in training"),
    Metric("accuracy", "share of pairs", "training pairs whose better response scores higher"),
    Metric(
        "eval_accuracy", "share of pairs", "held-out pairs whose better response scores higher, ties half",
        0.55, 0.95,
        "low: close to chance, so PPO would climb noise (use more pairs, cleaner labels or another trunk); very high: "
        "check that no pairs leak between the splits and that length alone does not separate them",
    ),
    Metric("margin", "score", "mean score difference of better and worse response"),
    Metric("eval_margin", "score", "the same on held-out pairs"),
    Metric("step_accuracy", "share of steps", "labelled steps (process reward model) that the model gets right"),
    Metric("eval_step_accuracy", "share of steps", "the same on held-out solutions"),
    Metric("epoch", "epochs", "passes over the training data so far"),
    Metric("num_tokens", "tokens", "tokens trained on so far"),
)  # fmt: skip

_ALL = (*_PPO, *_SUPERVISED)
METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}

_RENAMED = {
    "mean_token_accuracy": "token_accuracy",
    "eval_mean_token_accuracy": "eval_token_accuracy",
    "entropy": "entropy_nats",
    "eval_entropy": "eval_entropy_nats",
}
_LEFT_OUT = ("total_flos", "_runtime", "_samples_per_second", "_steps_per_second", "eval_num_tokens")


def check(name: str, value: float) -> str | None:
    """Return what to do about a value outside its metric's healthy range; None when it is inside."""
    if not math.isfinite(value):
        return f"{name} is {value}: training has diverged; lower the learning rate and look for broken data"
    metric = METRICS.get(name)
    if metric is None:
        return None
    if metric.healthy_low is not None and value < metric.healthy_low:
        return f"{name}={value:.3g} is below {metric.healthy_low:g}: {metric.advice}"
    if metric.healthy_high is not None and value > metric.healthy_high:
        return f"{name}={value:.3g} is above {metric.healthy_high:g}: {metric.advice}"
    return None


class Watch:
    """A monitor that advises on metrics when they leave their healthy range. Pass it every logged line in turn."""

    def __init__(self) -> None:
        self._outside: dict[str, int] = {}

    def see(self, row: Mapping[str, float]) -> list[str]:
        """Return advice on every metric whose `patience` of consecutive lines out of its range is reached now."""
        found = []
        for name, value in row.items():
            advice = check(name, value)
            if advice is None:
                self._outside[name] = 0
                continue
            self._outside[name] = self._outside.get(name, 0) + 1
            if self._outside[name] == (METRICS[name].patience if name in METRICS and math.isfinite(value) else 1):
                found.append(advice)
        return found


def left_healthy_range(rows: Sequence[Mapping[str, float]], tail: int = 5) -> list[str]:
    """Return advice on every metric whose mean over the last ``tail`` lines that have it is out of range."""
    values: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step":
                values.setdefault(name, []).append(value)
    found = []
    for name, series in values.items():
        last = series[-tail:]
        advice = check(name, sum(last) / len(last))
        if advice:
            found.append(advice)
    return found


def from_logs(logs: Mapping[str, Any]) -> dict[str, float]:
    """Convert a log line of transformers' and trl's trainers to our names, without timings and the closing line."""
    numbers: dict[str, float] = {}
    if "train_runtime" in logs:  # the closing line: means over the whole run
        return numbers
    for name, value in logs.items():
        if isinstance(value, int | float) and not any(name.endswith(end) for end in _LEFT_OUT):
            numbers[_RENAMED.get(name, name)] = value
    return numbers


# ---------------------------------------------------------------- metrics.jsonl


def append_metrics(path: str | Path, step: int, numbers: Mapping[str, float]) -> None:
    """Add a line ``{"step": ., "<metric>": .}``; NaN and infinity become null."""
    row = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
    with Path(path).open("ab") as file:
        file.write(to_line({"step": step, **row}))


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Read the lines of a metrics.jsonl; null becomes NaN, and a last line that a killed run cut is dropped."""
    return [{name: math.nan if value is None else value for name, value in row.items()} for _, row in read_rows(path)]


def truncate(path: str | Path, step: int) -> None:
    """Drop the lines of metrics.jsonl after ``step``, where a run resumes; at step 0 it becomes empty."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [row for row in read_metrics(path) if row["step"] <= step] if step and path.exists() else []
    writing = path.with_name(f".{path.name}.writing")
    writing.unlink(missing_ok=True)
    writing.touch(exist_ok=False)  # never through a link that somebody left there
    for row in kept:
        append_metrics(writing, int(row.pop("step")), row)
    os.replace(writing, path)


# ---------------------------------------------------------------- the PPO guide's table

TABLE = ("<!-- metrics: python -m rlhf.metrics recipes/guides/ppo.md -->", "<!-- end of metrics -->")


def table() -> str:
    """Make a Markdown table with a row per metric: name, unit, meaning, healthy range, what to do outside it."""
    rows = ["| metric | unit | meaning | healthy | otherwise |", "|---|---|---|---|---|"]
    for metric in _ALL:
        low, high = metric.healthy_low, metric.healthy_high
        ends = [f"{word} {bound:g}" for word, bound in (("from", low), ("up to", high)) if bound is not None]
        cells = (f"`{metric.name}`", metric.unit, metric.meaning, " ".join(ends), metric.advice)
        rows.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    return "\n".join(rows)


def main(file: str) -> None:
    """Rewrite the table between the two marks in a Markdown file."""
    path = Path(file)
    text = path.read_text(encoding="utf-8")
    before, after = text.split(TABLE[0])[0], text.split(TABLE[1])[1]
    path.write_text(f"{before}{TABLE[0]}\n{table()}\n{TABLE[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
