"""What a report comes to, in one sentence: better, worse, or too few to tell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.run.tables import Json, label, number, percent, policies, with_interval

JUDGES = {"gold": "the gold score", "reward_model": "a reward model that PPO never saw", "model": "a language model"}


def of_run(summary: Json, rows: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Write the sentence about a run: PPO against SFT, or else what its last trained stage came to.

    rows: each stage's logged lines, in the order of the stages.
    """
    entries = policies(summary)
    entry = entries.get("ppo") or {}
    if entry.get("win_rate_vs_sft") is not None:
        return _compared(summary, entry, entries.get("best_of_n") or {})
    for stage, lines in reversed(list(rows.items())):
        if sentence := _of_stage(lines, summary.get("stages", {}).get(stage, {})):
            return sentence
    for outputs in reversed(list(summary.get("stages", {}).values())):
        if "accuracy" in outputs:
            return _of_reward_model(outputs)
    return "Nothing has been trained or evaluated here yet."


def _compared(summary: Json, entry: Json, best: Json) -> str:
    judge = summary["evaluation"].get("judge") or {}
    who = JUDGES.get(str(judge.get("kind")), "the judge")
    prompts, share = entry.get("prompts"), float(entry["win_rate_vs_sft"])
    low, high = entry.get("win_rate_ci") or (share, share)
    of = f" of {prompts:,} held-out prompts" if prompts else " of the held-out prompts"
    fact = f"{who} prefers it on {with_interval(entry, 'win_rate_vs_sft', 'win_rate_ci')}{of}"
    if entry.get("kl_nats") is not None:
        fact += f", at {number(entry['kl_nats'])} nats of KL"
    if best.get("win_rate_vs_sft") is not None:
        fact += f" ({label('best_of_n', best)}: {percent(best['win_rate_vs_sft'])})"
    if low > 0.5:
        sentence = f"PPO is better than SFT: {fact}"
    elif high < 0.5:
        sentence = f"PPO is worse than SFT: {fact}"
    else:
        from rlhf.intervals import needed  # with NumPy, which a report does not need otherwise

        more = needed(prompts, share, 0.5, (low, high)) if prompts else None
        tell = f"about {more:,} prompts would tell" if more else "more prompts would hardly tell"
        sentence = f"No clear difference between PPO and SFT: {fact}; {tell}"
    accuracy = judge.get("accuracy_ci")
    doubt = "; but this judge is no better than a coin on held-out pairs" if accuracy and accuracy[0] <= 0.5 else ""
    return f"{sentence}{doubt}."


def _of_stage(rows: Sequence[Mapping[str, float]], outputs: Mapping[str, Any]) -> str:
    if "accuracy" in outputs:
        return _of_reward_model(outputs)
    kl, score, loss = (_ends(rows, name) for name in ("kl_nats", "score", "loss"))
    if kl and score:
        rose = f"PPO's score on its training prompts went from {number(score[0])} to {number(score[1])}"
        return f"{rose} in {int(rows[-1]['step']):,} updates, at {number(kl[1])} nats of KL; nothing has judged it yet."
    if not loss:
        return ""
    held_out = _ends(rows, "eval_loss")
    text = f"The training loss went from {number(loss[0])} to {number(loss[1])} nats in {int(rows[-1]['step']):,} steps"
    return f"{text}; on held-out data it ends at {number(held_out[1])}." if held_out else f"{text}."


def _of_reward_model(outputs: Mapping[str, Any]) -> str:
    pairs = f" of {outputs['n']:,} held-out pairs" if outputs.get("n") else " of the held-out pairs"
    text = f"The reward model is right on {with_interval(outputs, 'accuracy')}{pairs}"
    low = (outputs.get("accuracy_ci") or [outputs["accuracy"]])[0]
    if low <= 0.5:
        return f"{text}: not clearly better than a coin."
    if outputs.get("length_baseline") is None:
        return f"{text}."
    rule = f"always taking the {outputs.get('length_rule', 'longer')} response ({percent(outputs['length_baseline'])})"
    return f"{text}, {'better than' if low > outputs['length_baseline'] else 'not clearly better than'} {rule}."


def _ends(rows: Sequence[Mapping[str, float]], name: str) -> tuple[float, float] | None:
    """Return a metric's first and last value, each the mean of a tenth of its lines; None without any."""
    values = [row[name] for row in rows if math.isfinite(row.get(name, math.nan))]
    tenth = max(1, len(values) // 10)
    return (sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth) if values else None
