"""Who judges an evaluation: a gold score, a reward model, or a language model with a template; and people's labels,
which correct it. `config` is an EvaluationConfig of `evaluate_policy`, which imports this file."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf import config as configs
from rlhf.calls import call
from rlhf.errors import InputError
from rlhf.rows.records import HELD_OUT, Prompt, prompt_key, read_rankings, split_key
from rlhf.run import console
from rlhf.run.precision import compute_dtype
from rlhf.run.stages import Manifest

METRIC = ("value", "low", "high", "n")

if TYPE_CHECKING:
    import numpy as np

    from rlhf.evals.judge import Judge
    from rlhf.evaluate import JudgeCard, PolicySamples
    from rlhf.scores import RewardFunction


@dataclass
class Judged:
    """The judge of an evaluation.

    score: a function that scores responses, or None where `pairs` compares two. scorer_card: the report card of the
    reward model that the policy was trained on, where gold judges it."""

    card: JudgeCard
    scorer_card: dict[str, Any]
    score: RewardFunction | None = None
    pairs: Judge | None = None

    def won(self, first: PolicySamples, second: PolicySamples) -> tuple[np.ndarray, dict[str, Any]]:
        """Return [P] what the judge says of two policies' (first) responses: 1, 0, between, or NaN for an abstention;
        and what `rlhf.evals.judge.compared` says of these verdicts, where `pairs` gave them."""
        import numpy as np

        from rlhf.evals.judge import Pair, compared
        from rlhf.evaluate import win_shares

        if self.pairs is None:
            return win_shares(first, second, self.card.kind), {}
        rows = zip(first.prompts, first.responses[:: first.n], second.responses[:: second.n], strict=True)
        pairs = [Pair(prompt.messages, one, other, prompt.columns) for prompt, one, other in rows]
        verdicts = self.pairs.compare(pairs)
        metrics = compared(pairs, verdicts)
        return np.array([np.nan if v.win is None else v.win for v in verdicts], dtype=np.float64), metrics


def load(config: Any) -> Judged:
    """Load the judge and measure it on held-out rankings, as far as that is free of charge: a language model has
    `rlhf judge_card` for it."""
    from reward_models.card.report import report_card
    from reward_models.judges import is_function, load_judge
    from rlhf.evaluate import JudgeCard

    spec = str(config.judge)
    if config.template is not None:
        dtype, tokens = compute_dtype(config.bf16), config.tokens_per_microbatch
        pairs = load_judge(
            spec, config.template, served_as=config.served_as, dtype=dtype, tokens_per_microbatch=tokens,
            least=config.least_probability,
        )  # fmt: skip
        return Judged(JudgeCard("model", f"{spec}, {config.template}"), {}, pairs=pairs)
    is_gold = is_function(spec)
    judge = configs.import_function(spec) if is_gold else reward_model(spec, config)
    kind = "gold" if is_gold else "reward_model"
    measured = {} if is_gold else _measured(spec)
    held_out = read_rankings(config.rankings, HELD_OUT) if config.rankings and not measured else []
    scorer_card: dict[str, Any] = {}
    if held_out and config.reward_model and is_gold:
        scorer = reward_model(config.reward_model, config)
        scorer_card = report_card(scorer, held_out, seed=config.seed, gold=judge)
    card = report_card(judge, held_out, seed=config.seed) if held_out else measured
    if not card:
        return Judged(JudgeCard(kind, spec), scorer_card, judge)
    low, high = card["accuracy_ci"]
    return Judged(JudgeCard(kind, spec, card["accuracy"], (low, high)), scorer_card, judge)


def reward_model(folder: str, config: Any) -> RewardFunction:
    """Load a reward model that scores in this evaluation."""
    from reward_models.ensemble import load_scorer

    dtype = compute_dtype(config.bf16)
    return load_scorer(folder, dtype=dtype, tokens_per_microbatch=config.tokens_per_microbatch)


def _measured(folder: str) -> dict[str, Any]:
    """The accuracy that a reward model's own stage measured on held-out rankings, if it did."""
    if not (Path(folder) / "manifest.json").is_file():
        return {}
    outputs = Manifest.read(folder).outputs
    return outputs if "accuracy_ci" in outputs else {}


def scored(
    config: Any, samples: PolicySamples | None, scorer: RewardFunction | None, judged: Judged
) -> PolicySamples | None:
    """Return samples with their scores, the judge's, gold's parts and refusals, as far as they are there."""
    if samples is None:
        return None
    from rlhf import evaluate

    changes: dict[str, Any] = {}
    if judged.score is not None:
        name = "gold_scores" if judged.card.kind == "gold" else "judge_scores"
        changes[name] = evaluate.judge_samples(samples, judged.score)
    if scorer is not None:
        changes["scores"] = evaluate.judge_samples(samples, scorer)
    if config.parts:
        rows = _call(config.parts, samples)
        changes["gold_parts"] = {name: tuple(row[name] for row in rows) for name in rows[0]}
    if config.refused:
        changes["refused"] = tuple(bool(value) for value in _call(config.refused, samples))
    return replace(samples, **changes)


def _call(spec: str, samples: PolicySamples) -> Any:
    prompts = samples.repeated_prompts
    names = sorted({name for prompt in prompts for name in prompt.columns})
    arguments = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
    arguments["prompts"] = [prompt.messages for prompt in prompts]
    arguments["completions"] = [[answer] for answer in samples.answers]
    return call(configs.import_function(spec), arguments)


def compare(
    baseline: PolicySamples,
    policy: PolicySamples,
    candidates: PolicySamples | None,
    judged: Judged,
    labels: dict[int, float] | None,
    seed: int,
    others: Mapping[str, PolicySamples],
) -> dict[str, Any]:
    """Compare the policy and the others with their baseline, as `rlhf.evaluate.compare` does; for the policy, add what
    the verdicts of a judge of pairs come to (`judged`), and where there are labels, the corrected win rate
    (`corrected`)."""
    from rlhf import evaluate

    of_policy: tuple[np.ndarray, dict[str, Any]] | None = None

    def won(first: PolicySamples, second: PolicySamples) -> np.ndarray:
        nonlocal of_policy
        found = judged.won(first, second)
        if first is policy and second is baseline:
            of_policy = found
        return found[0]

    result = evaluate.compare(
        baseline, {"ppo": policy, **others}, judged.card, candidates=candidates, seed=seed, won=won
    )
    assert of_policy is not None
    if of_policy[1]:
        result["ppo"]["judged"] = of_policy[1]
        for name in ("length_controlled_win_rate", "abstentions"):
            metric = of_policy[1][name]
            numbers = f"{100 * metric['value']:.1f}% [{100 * metric['low']:.1f}, {100 * metric['high']:.1f}]"
            console.stage_line("judge", f"{name.replace('_', ' ')} {numbers}, {metric['n']:,} prompts")
    if labels is not None:
        equal = [number for number, (ours, theirs) in enumerate(both_responses(policy, baseline)) if ours == theirs]
        result["ppo"]["corrected"] = correct(of_policy[0], labels, equal, policy.prompts)
    return result


MEASURES = (
    "score", "gold_score", "judge_score", "win_rate_vs_sft", "win_rate_vs_best_of_n", "kl_nats", "response_tokens",
    "eos_rate", "refusal_rate",
)  # fmt: skip


def metrics_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return a comparison's numbers in the form that every command writes, as <policy>/<measure>; n counts prompts, and
    is None where a judge that compares may have abstained from some."""
    found = {}
    for policy, entry in result.items():
        if not isinstance(entry, Mapping) or policy == "judge":
            continue
        for name in MEASURES:
            if entry.get(name) is not None:
                ends = entry.get("win_rate_ci" if name == "win_rate_vs_sft" else f"{name}_ci", (None, None))
                unknown = result["judge"]["kind"] == "model" and name.startswith("win_rate")
                found[f"{policy}/{name}"] = (entry[name], *ends, None if unknown else entry["prompts"])
        for kind in ("judged", "corrected"):
            for name, metric in entry.get(kind, {}).items():
                if isinstance(metric, Mapping):
                    found[f"{policy}/{kind}/{name}"] = tuple(metric[part] for part in METRIC)
    judge = result["judge"]
    if judge["accuracy"] is not None:
        found["judge/accuracy"] = (judge["accuracy"], *(judge["accuracy_ci"] or (None, None)), None)
    return {name: dict(zip(METRIC, values, strict=True)) for name, values in found.items()}


# ------------------------------------------------------------------------------------------------ people's labels


def both_responses(policy: PolicySamples, baseline: PolicySamples) -> list[tuple[str, str]]:
    """Return each prompt's two responses that people may compare: the policy's, and the baseline's."""
    return list(zip(policy.responses, baseline.responses, strict=True))


def to_label(policy: PolicySamples, baseline: PolicySamples, seed: int) -> list[dict[str, Any]]:
    """Return the rows that people may compare, in random order, since whoever stops early has labelled the first; the
    two responses of each are in random order too, and equal ones are left out."""
    draw, rows = random.Random(seed), []
    for prompt, two in zip(policy.prompts, both_responses(policy, baseline), strict=True):
        pair = list(two)
        draw.shuffle(pair)
        if pair[0] != pair[1]:
            rows.append({"prompt": prompt.messages, "responses": pair})
    draw.shuffle(rows)
    return rows


def people(human: str, policy: PolicySamples, baseline: PolicySamples) -> dict[int, float]:
    """Return what people say of the prompts whose two responses they compared: prompt's number -> 1 where the policy's
    is better, 0 the baseline's, 0.5 a tie; of several people the mean.

    Raises InputError where too few of the labels are of these responses."""
    from rlhf.evals.correction import FEWEST

    labels: dict[tuple[str, str, str], list[float]] = {}
    for ranking in read_rankings(human, HELD_OUT):
        key = prompt_key(ranking.prompt)
        for i, j in combinations(range(len(ranking.responses)), 2):
            first, second = ranking.responses[i], ranking.responses[j]
            said = 0.5 if ranking.ranks[i] == ranking.ranks[j] else float(ranking.ranks[i] < ranking.ranks[j])
            labels.setdefault((key, first, second), []).append(said)
            labels.setdefault((key, second, first), []).append(1.0 - said)
    found = {}
    for number, (ours, theirs) in enumerate(both_responses(policy, baseline)):
        prompt = policy.prompts[number]
        said_here = labels.get((prompt_key(prompt.messages), ours, theirs))
        if said_here and ours != theirs:
            found[number] = sum(said_here) / len(said_here)
    groups = len({split_key(policy.prompts[number]) for number in found})
    if groups < FEWEST:
        of = "" if groups == len(found) else f", of prompts of {groups} groups (split_group)"
        raise InputError(
            f"human={human}: {len(found)} of its labels compare these two policies' responses{of}; a correction needs "
            f"{FEWEST}. Label rows of an evaluation's to_label.jsonl, and run it again with the same seed and settings"
        )
    return found


def correct(
    won: np.ndarray, labels: dict[int, float], equal: Sequence[int], prompts: Sequence[Prompt]
) -> dict[str, Any]:
    """Correct a win rate by people's labels and print both; returns what `evaluation.json` keeps of it.

    equal: prompts whose two responses are the same. Nobody is asked about them: they are ties. Intervals are over what
    splits go by: prompts, or their `split_group`s."""
    from rlhf.evals.correction import corrected

    groups = dict(enumerate(map(split_key, prompts)))
    found = corrected(dict(enumerate(won.tolist())), labels, certain=dict.fromkeys(equal, 0.5), groups=groups)
    for name, estimate, n in (
        ("judge alone", found.raw, found.judged),
        ("people alone", found.labels, found.labelled),
        ("corrected", found.corrected, found.labelled),
    ):
        numbers = f"{100 * estimate.value:.1f}% [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"
        console.stage_line("win rate", f"{name:<14} {numbers}, {n:,} prompts")
    console.stage_line("", f"weight of the judge {found.weight:.2f}; a label tells as much as {found.worth:.1f} alone")
    return found.as_dict()
