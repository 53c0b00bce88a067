"""A policy against a baseline on held-out prompts.

    rlhf evaluate_policy --policy runs/my/ppo --baseline runs/my/sft \\
        --judge runs/my/judge --eval_data held_out_prompts.jsonl \\
        --output_dir runs/my/comparison
    rlhf evaluate_policy --config toy.yaml    # its `evaluation:` section

Measures scores, win rate, KL, length and stops, and writes samples side by side. The judge is a function
(file.py:name) or a reward model that the policy was not trained on; with --template, a language model that compares or
grades. --human: people's comparisons of to_label.jsonl's rows correct the win rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf import chat
from rlhf import config as configs
from rlhf.errors import InputError
from rlhf.rows.mixed import Sources
from rlhf.rows.records import HELD_OUT, Prompt, check_disjoint, read_prompts, write_jsonl
from rlhf.run import console
from rlhf.run.checkpoint import write_json_atomic
from rlhf.run.owner import by_main
from rlhf.run.precision import compute_dtype
from rlhf.run.settings import require_needed
from rlhf.run.stages import POLICIES
from rlhf_recipes import judging, sampled
from rlhf_recipes.stage import SCORERS, SECTIONS, check_model, from_siblings, next_command, open_stage, with_columns

if TYPE_CHECKING:
    pass

console.quiet()

GREEDY = "temperature 0: each policy's most likely answer; no KL, and no best-of-n (all n would be the same)"
UNSCORED = "no reward model: no score, and no best-of-n (a judge that picked it would judge its own pick)"


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Comparing a policy, and best-of-n of its baseline, with the baseline."""

    MOST_USED = (
        "policy", "baseline", "judge", "eval_data", "reward_model", "output_dir", "max_prompts", "best_of",
        "max_new_tokens", "temperature",
    )  # fmt: skip

    output_dir: str = "runs/evaluation"
    """Where summary and samples go."""
    seed: int = 0
    """Decides every sample and bootstrap."""
    policy: str | None = None
    """The trained policy; default: the run's `ppo`."""
    baseline: str | None = None
    """What it is compared with; default: the run's `sft`."""
    policies: list[str] | None = None
    """Further policies in the same table: folders, or names of the run's stages, such as dpo,kto,grpo,rloo."""
    reward_model: str | None = None
    """The reward model it was trained on: gives the scores and picks best-of-n; default: the run's. Without one there
    is neither."""
    judge: str | None = None
    """Who decides win rates: a gold score as file.py:name, or an unseen reward model; with a template, a language
    model's folder, hub id or http address. Default: the run's `judge`."""
    template: str | None = None
    """What a language model as judge is asked: pairwise, pairwise_forced, helpful (a rubric), or a YAML file."""
    served_as: str | None = None
    """The judge's name at a server that serves several."""
    least_probability: float = 0.1
    """Probability that a template's letters must have together; below it a comparison is an abstention."""
    human: str | None = None
    """People's comparisons of these very samples (pairs or rankings): they correct the win rate."""
    parts: str | None = None
    """Function(prompts, completions, **columns) -> one dict of gold parts per response, as file.py:name."""
    refused: str | None = None
    """Function(prompts, completions, **columns) -> one 0 or 1 per response, as file.py:name."""
    eval_data: Sources | None = None
    """Held-out prompts; default: the run's data/eval_prompts.jsonl, else rankings/eval_prompts.jsonl."""
    rankings: Sources | None = None
    """Held-out rankings on which reward model and judge are measured; default: the run's rankings/held_out.jsonl."""
    seen_data: Sources | None = None
    """Prompts that the policy was trained on; a prompt in both is an error. Default: the run's."""
    columns: dict[str, str] | None = None
    """Our names of columns and what the files named here call them, as {prompt: question}; null: the same."""
    max_prompts: int = 400
    """Evaluate on the first so many."""
    best_of: int = 4
    """n of best-of-n, which the reward model picks; 0 leaves it out."""
    max_prompt_tokens: int = 512
    """Longer prompts are left out, counted and named in the log."""
    max_new_tokens: int = 128
    """Longest response."""
    temperature: float = 1.0
    """Of every sample; 0: each policy's most likely answer, without KL and without best-of-n."""
    generation_batch_size: int = 256
    """Responses sampled at once."""
    tokens_per_microbatch: int = 16384
    """Memory only."""
    bf16: bool | None = None
    """Run every model in bfloat16; null: where the hardware is fast at it."""
    samples: int = 40
    """Prompts whose responses are written side by side to samples.jsonl."""
    overwrite: bool = False
    """Replace another run's output in output_dir."""

    def __post_init__(self) -> None:
        for name in (
            "max_prompts", "max_prompt_tokens", "max_new_tokens", "generation_batch_size", "tokens_per_microbatch",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("best_of", "samples", "temperature", "least_probability"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name}={getattr(self, name)} must be 0 or more")
        require_needed(self, "template", "served_as", "least_probability")


def evaluation(config: EvaluationConfig) -> dict[str, Any]:
    """The stage: sample, score, judge, compare; `summary["evaluation"]` and the reward model's report card.

    Of several processes the first works, and shares out what policies and reward models compute."""
    return by_main(lambda: evaluate_alone(config))


def evaluate_alone(config: EvaluationConfig) -> dict[str, Any]:
    config, sources = inputs(config)
    stage = open_stage("evaluation", config, sources)
    if stage.complete:
        return stage.outputs
    from rlhf import evaluate
    from rlhf.models.positions import check_responses
    from rlhf.ppo.inputs import same_tokenizer
    from rlhf.scores import check_columns

    dtype = compute_dtype(config.bf16)
    prompts = _prompts(config)
    baseline_lm, tokenizer = sampled.load(str(config.baseline), dtype)
    policy_lm, policy_tokenizer = sampled.load(str(config.policy), dtype)
    for spec in filter(None, (config.parts, config.refused)):
        configs.import_function(spec)
    for lm, its in ((baseline_lm, tokenizer), (policy_lm, policy_tokenizer)):
        encoded = [chat.encode_prompt(its, prompt.messages, prompt.columns) for prompt in prompts]
        check_responses(lm, encoded, config.max_new_tokens)
    judged = judging.load(config)
    check_columns([judged.score] if judged.score else [], prompts, str(config.eval_data))
    stage.begin()
    greedy = config.temperature == 0
    if greedy:
        console.stage_line("evaluation", GREEDY)
    scorer = judging.reward_model(config.reward_model, config) if config.reward_model else None
    if scorer is None:
        console.stage_line("evaluation", UNSCORED)
    n = 0 if greedy or scorer is None else config.best_of
    bar = console.StageBar("evaluation", 3 if n else 2)
    ours = sampled.sample(config, prompts, baseline_lm, tokenizer, seed=config.seed)
    bar.update(1)
    theirs = sampled.sample(config, prompts, policy_lm, policy_tokenizer, seed=config.seed + 1)
    if same_tokenizer(tokenizer, policy_tokenizer) and not greedy:
        theirs = replace(theirs, kl_nats=sampled.sequence_kl(policy_lm, baseline_lm, theirs, tokenizer, config))
    bar.update(2)
    others = sampled.further(config, prompts, baseline_lm, tokenizer)
    many = sampled.sample(config, prompts, baseline_lm, tokenizer, seed=config.seed + 2, n=n) if n else None
    labels = judging.people(config.human, theirs, ours) if config.human else None
    ours, theirs, many = (judging.scored(config, s, scorer, judged) for s in (ours, theirs, many))
    bar.update(bar.total)
    bar.close()
    assert ours is not None
    assert theirs is not None
    others = {name: judging.scored(config, other, scorer, judged) or other for name, other in others.items()}
    result = judging.compare(ours, theirs, many, judged, labels, config.seed, others)
    sampled.add_costs(result, config)
    if greedy:
        result["note"] = GREEDY
    rows = evaluate.side_by_side({"sft": ours, "ppo": theirs, **others}, config.samples)
    write_jsonl(stage.folder / "samples.jsonl", rows)
    write_jsonl(stage.folder / "to_label.jsonl", judging.to_label(theirs, ours, config.seed))
    write_json_atomic(stage.folder / "evaluation.json", {**result, "metrics": judging.metrics_of(result)})
    outputs = {"evaluation": result, "reward_model": judged.scorer_card}
    stage.finish(outputs)
    return outputs


def inputs(config: EvaluationConfig) -> tuple[EvaluationConfig, dict[str, Any]]:
    """The config, with what it takes from the run's other stages; the models and data that the stage reads."""
    run, config = Path(config.output_dir).parent, with_columns(config, "eval_data", "rankings", "seen_data")
    own_prompts = (
        "data/eval_prompts.jsonl" if (run / "data/eval_prompts.jsonl").exists() else "rankings/eval_prompts.jsonl"
    )
    config = from_siblings(
        config, policy="ppo", baseline="sft", judge="judge", eval_data=own_prompts, reward_model="?reward_model",
        rankings="?rankings/held_out.jsonl", seen_data="?rankings/prompts.jsonl",
    )  # fmt: skip
    config = replace(config, policies=sampled.named(config, run))
    for model in (config.policy, config.baseline):
        check_model(str(model), POLICIES)
    for model in filter(None, (config.reward_model, None if config.template else config.judge)):
        check_model(model, SCORERS)
    names = (
        "policy", "policies", "baseline", "reward_model", "judge", "template", "human", "eval_data", "rankings",
        "seen_data",
    )  # fmt: skip
    return config, {name: getattr(config, name) for name in names}


def _prompts(config: EvaluationConfig) -> list[Prompt]:
    from rlhf.models import loading as models
    from rlhf.ppo.inputs import prompts_of

    prompts = read_prompts(config.eval_data, HELD_OUT)
    if config.seen_data:
        check_disjoint(read_prompts(config.seen_data), prompts, ("seen_data", "eval_data"))
    tokenizer = models.load_tokenizer(str(config.baseline))
    fitting = prompts_of("eval_data", prompts, tokenizer, config)[0]
    if len(fitting) > config.max_prompts:
        console.stage_line("evaluation", f"the first {config.max_prompts:,} of {len(fitting):,} prompts (max_prompts)")
    return fitting[: config.max_prompts]


def main(argv: list[str]) -> None:
    config = configs.load(
        EvaluationConfig, argv, section="evaluation", known_sections=SECTIONS, description=__doc__ or ""
    )
    outputs = evaluation(config)
    console.final_table({"stages": {"reward_model": outputs["reward_model"]}, "evaluation": outputs["evaluation"]})
    if "--config" in argv:  # skips what is complete
        next_command("chain", argv, config.output_dir, ".")


if __name__ == "__main__":
    configs.run(main)
