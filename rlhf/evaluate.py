"""Evaluate policies: win rates with intervals, best-of-n, score against KL.

Responses of several policies to the same prompts (``PolicySamples``) are judged by functions of trl's reward signature
and compared. Nothing here runs a model: the caller passes an engine (prompts in, responses out) and log-probs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from rlhf.chat import decode_response, encode_prompt, parse_response
from rlhf.intervals import (
    Estimate,
    best_of_n,
    best_of_n_kl,
    bootstrap_interval,
    clustered_accuracy,
    score_length_correlation,
    win_rate,
    wins,
)
from rlhf.rows.records import Prompt, split_key
from rlhf.sampling.engine import Engine
from rlhf.scores import RewardFunction, score_responses

__all__ = [
    "JudgeCard",
    "PolicySamples",
    "bootstrap_interval",
    "choose_best",
    "clustered_accuracy",
    "compare",
    "judge_samples",
    "sample_policy",
    "samples_of",
    "side_by_side",
    "summarize",
    "win_rate",
]

Entry = dict[str, Any]
"""Numbers and texts by name, as a JSON object."""

# --------------------------------------------------------------------------------------------------- samples


@dataclass(frozen=True)
class PolicySamples:
    """One policy's responses, ``n`` to each prompt, with the responses to a prompt next to each other.

    Every tuple below ``prompts`` has ``len(prompts) * n`` entries, or is None where it was not measured.
    """

    prompts: tuple[Prompt, ...]
    responses: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    stopped: tuple[bool, ...]
    n: int = 1
    kl_nats: tuple[float, ...] | None = None
    scores: tuple[float, ...] | None = None
    gold_scores: tuple[float, ...] | None = None
    judge_scores: tuple[float, ...] | None = None
    gold_parts: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    refused: tuple[bool, ...] | None = None
    thoughts: tuple[str, ...] | None = None
    """The thinking before each response, which `responses` leave out."""
    raw: tuple[str, ...] | None = None
    """The responses as they were written, thinking and all."""

    @property
    def answers(self) -> list[Entry]:
        """The responses as messages."""
        thoughts = self.thoughts or ("",) * len(self.responses)
        return [
            {"role": "assistant", "content": text} | ({"reasoning_content": thought} if thought else {})
            for text, thought in zip(self.responses, thoughts, strict=True)
        ]

    @property
    def response_tokens(self) -> tuple[int, ...]:
        return tuple(len(ids) for ids in self.ids)

    @property
    def repeated_prompts(self) -> list[Prompt]:
        """One prompt per response."""
        return [prompt for prompt in self.prompts for _ in range(self.n)]

    def by_prompt(self, values: Sequence[float]) -> np.ndarray:
        """Reshape ``[P * n]`` values to ``[P, n]``."""
        return np.asarray(values, dtype=np.float64).reshape(len(self.prompts), self.n)


def sample_policy(
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    engine: Engine,
    *,
    max_new_tokens: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    n: int = 1,
) -> PolicySamples:
    """Sample ``n`` responses to every prompt from an engine."""
    prompt_ids = [encode_prompt(tokenizer, prompt.messages, prompt.columns) for prompt in prompts for _ in range(n)]
    answers = engine.generate(prompt_ids, max_new_tokens, temperature, generator)
    if not len(answers.ids) == len(answers.stopped) == len(prompt_ids):
        raise ValueError(f"the engine returned {len(answers.ids)} responses to {len(prompts)} prompts, n={n}")
    stops = getattr(engine, "stop_ids", None) or None
    raw = [decode_response(tokenizer, ids, stops) for ids in answers.ids]
    return samples_of(prompts, tokenizer, raw, answers.ids, answers.stopped, n)


def samples_of(
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    raw: Sequence[str],
    ids: Sequence[Sequence[int]],
    stopped: Sequence[bool],
    n: int,
) -> PolicySamples:
    """Make the record of ``n`` responses to every prompt from their texts as they were written, and their ids."""
    rows = [prompt.columns for prompt in prompts for _ in range(n)]
    messages = [parse_response(tokenizer, text, row) for text, row in zip(raw, rows, strict=True)]
    return PolicySamples(
        prompts=tuple(prompts),
        responses=tuple(message["content"] for message in messages),
        ids=tuple(tuple(row) for row in ids),
        stopped=tuple(bool(stop) for stop in stopped),
        n=n,
        thoughts=tuple(message.get("reasoning_content", "") for message in messages),
        raw=tuple(raw),
    )


def judge_samples(samples: PolicySamples, judge: RewardFunction) -> tuple[float, ...]:
    """Score every response by a function of trl's signature, called as PPO calls its reward functions.

    Raises InputError when it returns the wrong number of scores, or None, NaN or infinity: with scores missing,
    policies would be compared on different prompts.
    """
    ids = [list(row) for row in samples.ids]
    texts = samples.raw or samples.responses
    scores, _ = score_responses([judge], [1.0], samples.repeated_prompts, texts, ids, answers=samples.answers)
    return tuple(scores.tolist())


def choose_best(samples: PolicySamples) -> PolicySamples:
    """Choose the best of n by ``scores``: return the record with one response per prompt and its measurements."""
    if samples.scores is None:
        raise ValueError("choose_best needs samples with scores; score them first")
    rows = np.arange(len(samples.prompts)) * samples.n + best_of_n(samples.by_prompt(samples.scores))

    def chosen(values: Any) -> Any:
        return None if values is None else tuple(values[row] for row in rows)

    names = ["responses", "ids", "stopped", "kl_nats", "scores", "gold_scores", "judge_scores", "refused"]
    names += ["thoughts", "raw"]
    columns = {name: chosen(getattr(samples, name)) for name in names}
    parts = {name: chosen(values) for name, values in samples.gold_parts.items()}
    return replace(samples, n=1, gold_parts=parts, **columns)


# ---------------------------------------------------------------------------------------------- comparison


@dataclass(frozen=True)
class JudgeCard:
    """The judge that decides the win rates, and its accuracy on held-out pairs."""

    kind: Literal["gold", "reward_model", "model"]
    name: str
    accuracy: float | None = None
    accuracy_ci: tuple[float, float] | None = None

    def as_dict(self) -> Entry:
        interval = None if self.accuracy_ci is None else list(self.accuracy_ci)
        return {"kind": self.kind, "name": self.name, "accuracy": self.accuracy, "accuracy_ci": interval}


def _average(values: Sequence[float] | None, rows: Sequence[int] | None = None) -> float | None:
    if values is None:
        return None
    return float(np.mean(values if rows is None else [values[row] for row in rows]))


def _verdicts(samples: PolicySamples, kind: str) -> np.ndarray:
    scores = samples.gold_scores if kind == "gold" else samples.judge_scores
    if scores is None:
        needed = "gold_scores" if kind == "gold" else "judge_scores"
        raise ValueError(f"judge kind={kind!r} needs {needed} on every policy")
    return samples.by_prompt(scores)


def win_shares(first: PolicySamples, second: PolicySamples, kind: str) -> np.ndarray:
    """Return per prompt how often the first policy's response beats the second's, by the scores of such a judge."""
    return wins(_verdicts(first, kind), _verdicts(second, kind))


def _interval(prompts: Sequence[Prompt], values: np.ndarray, seed: int) -> Estimate:
    """Compute the mean over prompts of values [P] or [P, n], NaN left out, and its interval over what splits go by:
    prompts, or their `split_group`s."""
    there = ~np.isnan(values).reshape(len(prompts), -1).any(axis=1)
    keys = [split_key(prompt) for prompt, known in zip(prompts, there, strict=True) if known]
    return bootstrap_interval(values[there], seed, keys=keys)


def _families(samples: PolicySamples, won: np.ndarray | None, seed: int) -> dict[str, Entry]:
    """Compute means by family; ``n`` counts prompts. Empty when the prompts have no ``family`` column."""
    members: dict[str, list[int]] = {}
    for index, prompt in enumerate(samples.prompts):
        if prompt.columns.get("family") is not None:
            members.setdefault(str(prompt.columns["family"]), []).append(index)
    table: dict[str, Entry] = {}
    for family, indices in sorted(members.items()):
        rows = [index * samples.n + k for index in indices for k in range(samples.n)]
        rate = None
        if won is not None and not np.isnan(won[indices]).all():
            rate = _interval([samples.prompts[index] for index in indices], won[indices], seed)
        table[family] = {
            "n": len(indices),
            "score": _average(samples.scores, rows),
            "gold_score": _average(samples.gold_scores, rows),
            "win_rate_vs_sft": None if rate is None else rate.value,
            "refusal_rate": _average(samples.refused, rows),
        }
        if rate is not None:
            table[family]["win_rate_ci"] = rate.interval
    return table


def summarize(samples: PolicySamples, won: np.ndarray | None = None, seed: int = 0) -> Entry:
    """Make one policy's entry in ``summary["evaluation"]``, without win rates; intervals are as `compare`'s."""
    entry: Entry = {
        "prompts": len(samples.prompts),
        "score": _average(samples.scores),
        "gold_score": _average(samples.gold_scores),
        "kl_nats": _average(samples.kl_nats),
        "response_tokens": _average(samples.response_tokens),
        "eos_rate": _average(samples.stopped),
    }
    if samples.judge_scores is not None:
        entry["judge_score"] = _average(samples.judge_scores)
    for name, values in (("gold_score", samples.gold_scores), ("judge_score", samples.judge_scores)):
        if values is not None:
            entry[f"{name}_ci"] = _interval(samples.prompts, samples.by_prompt(values), seed).interval
    if samples.scores is not None:
        entry["score_length_correlation"] = score_length_correlation(samples.scores, samples.response_tokens)
    if samples.refused is not None:
        entry["refusal_rate"] = _average(samples.refused)
    if samples.gold_parts:
        entry["gold_parts"] = {part: _average(values) for part, values in samples.gold_parts.items()}
    families = _families(samples, won, seed)
    if families:
        entry["families"] = families
    return entry


def compare(
    sft: PolicySamples,
    policies: Mapping[str, PolicySamples],
    judge: JudgeCard,
    *,
    candidates: PolicySamples | None = None,
    seed: int = 0,
    won: Callable[[PolicySamples, PolicySamples], np.ndarray] | None = None,
) -> Entry:
    """Make ``summary["evaluation"]``: each policy's means, and how often it beats SFT on the same prompts.

    ``policies`` maps names to samples (``{"ppo": ...}``). ``candidates`` are n > 1 fresh SFT samples per prompt with
    scores: the entry ``best_of_n`` is about those with the highest scores, its ``kl_nats`` is the analytic bound, and
    every policy is compared with it too. Win rates use the gold scores (judge kind "gold") or ``judge_scores``, those
    of a reward model that PPO never saw; ties count half; intervals are over prompts, or their `split_group`s. ``won``
    decides instead, where a judge compares responses: per prompt 1 where the first policy's is better, 0 the second's,
    NaN for an abstention, which is left out.
    """
    entrants, best = dict(policies), None
    beats = won or (lambda first, second: win_shares(first, second, judge.kind))
    if candidates is not None:
        best = choose_best(candidates)
        entrants["best_of_n"] = best
    result: Entry = {"sft": {**summarize(sft, seed=seed), "kl_nats": 0.0}}
    for name, samples in entrants.items():
        if [prompt.messages for prompt in samples.prompts] != [prompt.messages for prompt in sft.prompts]:
            raise ValueError(f"{name} and sft answered different prompts; sample both on the same list")
        ours = beats(samples, sft)
        rate = _interval(sft.prompts, ours, seed)
        entry = {**summarize(samples, ours, seed), "win_rate_vs_sft": rate.value, "win_rate_ci": rate.interval}
        if best is not None and samples is not best:
            rate = _interval(sft.prompts, beats(samples, best), seed)
            entry |= {"win_rate_vs_best_of_n": rate.value, "win_rate_vs_best_of_n_ci": rate.interval}
        if candidates is not None and samples is best:
            entry |= {"n": candidates.n, "kl_nats": best_of_n_kl(candidates.n)}
        result[name] = entry
    result["judge"] = judge.as_dict()
    return result


def side_by_side(policies: Mapping[str, PolicySamples], limit: int | None = None) -> list[Entry]:
    """Make the rows of ``evaluation/samples.jsonl``: the prompt, and each policy's (first) response and score."""
    first = next(iter(policies.values()))
    rows = []
    for index, prompt in enumerate(first.prompts[:limit]):
        turns = [f"{turn['role']}: {turn['content']}" for turn in prompt.messages]
        lone = len(turns) == 1
        row: Entry = {"prompt": prompt.messages[0]["content"] if lone else "\n".join(turns)}
        row |= {name: samples.responses[index * samples.n] for name, samples in policies.items()}
        for measure in ("score", "gold_score", "judge_score"):
            for name, samples in policies.items():
                values = getattr(samples, f"{measure}s")
                if values is not None:
                    row[f"{measure}_{name}"] = values[index * samples.n]
        if prompt.columns.get("family") is not None:
            row["family"] = prompt.columns["family"]
        rows.append(row)
    return rows
