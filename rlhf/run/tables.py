"""A run's numbers as tables and lines of text, from the content of `summary.json`.

The report, the console and the reward model's card show them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rlhf.run.page import Table

Json = Mapping[str, Any]
"""An object of summary.json or samples.jsonl."""


def headline(summary: Json) -> Table:
    """Make the table of the policies' evaluations, a row per policy, without columns that no policy has."""
    columns: list[tuple[str, Callable[[Json], str]]] = [
        ("score", lambda entry: number(entry.get("score"))),
        ("gold score", lambda entry: number(entry.get("gold_score"))),
        ("win rate vs SFT", lambda entry: with_interval(entry, "win_rate_vs_sft", "win_rate_ci")),
        ("vs best-of-n", lambda entry: with_interval(entry, "win_rate_vs_best_of_n")),
        ("KL nats", lambda entry: number(entry.get("kl_nats"))),
        ("tokens", lambda entry: number(entry.get("response_tokens"))),
        ("EOS rate", lambda entry: percent(entry.get("eos_rate"))),
        ("seconds", lambda entry: number(entry.get("train_seconds"))),
        ("score calls", lambda entry: number(entry.get("score_calls"))),
    ]
    table = [[label(name, entry), *(show(entry) for _, show in columns)] for name, entry in policies(summary).items()]
    return _without_empty(["policy", *(name for name, _ in columns)], table)


def notes(summary: Json) -> list[str]:
    """Write lines about the judge and its accuracy, the reward model's accuracy, and the time taken."""
    lines = []
    judge = _evaluation(summary).get("judge")
    if judge:
        kind = {"gold": "gold score", "reward_model": "reward model that PPO never saw", "model": "language model"}
        text = f"Judge: {kind.get(judge.get('kind'), judge.get('kind') or '')}"
        text += f" ({judge['name']})" if judge.get("name") else ""
        if judge.get("accuracy") is not None:
            text += f", right on {with_interval(judge, 'accuracy')} of held-out pairs"
        lines.append(text + ". Ties count half.")
    entry = policies(summary).get("ppo", {})
    if judged := entry.get("judged"):
        controlled, abstained = judged["length_controlled_win_rate"], judged["abstentions"]
        text = f"At equal length it would prefer PPO on {_metric(controlled)} of prompts"
        lines.append(f"{text}; it abstains from {percent(abstained['value'])}.")
    if corrected := entry.get("corrected"):
        text = (
            f"Corrected by people's comparisons of {corrected['labelled']:,} prompts: {_metric(corrected['corrected'])}"
        )
        lines.append(f"{text}; the labels alone {_metric(corrected['labels'])}.")
    model = summary.get("stages", {}).get("reward_model", {})
    if model.get("accuracy") is not None:
        pairs = f" of {model['n']:,} held-out pairs" if model.get("n") else " of held-out pairs"
        text = f"Reward model: right on {with_interval(model, 'accuracy')}{pairs}"
        if model.get("length_baseline") is not None:
            rule = model.get("length_rule", "longer")
            text += f"; always taking the {rule} response: {with_interval(model, 'length_baseline')}"
        if model.get("gold_accuracy") is not None:
            text += f"; against the gold score's sign: {with_interval(model, 'gold_accuracy')}"
        lines.append(f"{text}.")
    seconds = summary.get("seconds", {})
    if seconds:
        parts = [f"{stage} {duration(value)}" for stage, value in seconds.items()]
        lines.append(f"Time: {duration(sum(seconds.values()))} ({', '.join(parts)}).")
    return lines


def stage_results(summary: Json) -> Table:
    """Make the table of all numbers in the summary's stages, a row per stage."""
    rows = []
    for stage, result in summary.get("stages", {}).items():
        shown = [
            f"{words(name)} {with_interval(result, name)}"
            for name, value in result.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        ]
        if shown:
            rows.append([words(stage), " · ".join(shown)])
    return ["stage", "results"], rows


def gold_parts(summary: Json) -> Table:
    """Make the table of the mean of each part of the gold score, a column per policy."""
    shown = {name: entry for name, entry in policies(summary).items() if entry.get("gold_parts")}
    parts = list(dict.fromkeys(part for entry in shown.values() for part in entry["gold_parts"]))
    columns = [entry["gold_parts"] for entry in shown.values()]
    rows = [[words(part), *(number(column.get(part)) for column in columns)] for part in parts]
    return ["part of the gold score", *(label(name, entry) for name, entry in shown.items())], rows


def families(summary: Json) -> Table:
    """Make the table that compares SFT and PPO, a row per family of prompts, the largest gains and losses first."""
    entries = policies(summary)
    before, after = (entries.get(name, {}).get("families", {}) for name in ("sft", "ppo"))
    gold = any(entry.get("gold_score") is not None for entry in after.values())
    measure, word = ("gold_score", "gold") if gold else ("score", "score")
    headers = ["family", "prompts", f"{word} SFT", f"{word} PPO", "win rate", "refusals SFT", "refusals PPO"]
    rows = []

    def change(family: str) -> float:
        one, other = before.get(family, {}).get(measure), after[family].get(measure)
        return 0.0 if one is None or other is None else other - one

    for family in sorted(after, key=lambda family: -abs(change(family))):
        entry = after[family]
        old = before.get(family, {})
        scores = [number(old.get(measure)), number(entry.get(measure))]
        refusals = [percent(old.get("refusal_rate")), percent(entry.get("refusal_rate"))]
        won = percent(entry.get("win_rate_vs_sft"))
        rows.append([family, number(entry.get("n")), *scores, won, *refusals])
    return _without_empty(headers, rows)


def number(value: float | None) -> str:
    """Write a number in few digits; "" for None."""
    if value is None:
        return ""
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2g}" if 0 < abs(value) < 0.01 else f"{value:.2f}"


def percent(value: float | None) -> str:
    """Write a share as a percentage; "" for None."""
    return "" if value is None else f"{100 * value:.1f}%"


def with_interval(entry: Json, name: str, interval: str | None = None) -> str:
    """Write a value, with its interval where there is one; shares as percentages."""
    value, bounds = entry.get(name), entry.get(interval or f"{name}_ci")
    if value is None:
        return ""
    shares = ("win_rate", "eos_rate", "refusal_rate", "accuracy", "baseline")
    show = percent if any(word in name for word in shares) else number
    low, high = (show(bound).removesuffix("%") for bound in bounds) if bounds else ("", "")
    return f"{show(value)} [{low}, {high}]" if bounds else show(value)


def _metric(metric: Json) -> str:
    """Write a metric that is a share, with its interval."""
    return with_interval({"win_rate": metric["value"], "win_rate_ci": [metric["low"], metric["high"]]}, "win_rate")


def _without_empty(headers: list[str], rows: list[list[str]]) -> Table:
    used = [column for column in range(len(headers)) if column == 0 or any(row[column] for row in rows)]
    return [headers[column] for column in used], [[row[column] for column in used] for row in rows]


def _evaluation(summary: Json) -> Json:
    return dict(summary.get("evaluation") or {})


def policies(summary: Json) -> dict[str, Json]:
    """Return the evaluation's entry of every policy, by name."""
    entries = _evaluation(summary)
    return {name: entry for name, entry in entries.items() if name != "judge" and isinstance(entry, Mapping)}


def label(name: str, entry: Json) -> str:
    """Return the name under which a policy is shown."""
    if name == "best_of_n":
        return f"best of {entry['n']}" if entry.get("n") else "best of n"
    return name.upper() if name in ("sft", "ppo", "dpo", "kto", "grpo", "rloo") else name


def words(name: str) -> str:
    """Return a field's name as words."""
    return name.replace("_", " ")


def duration(seconds: float) -> str:
    """Write a time in seconds or minutes."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
