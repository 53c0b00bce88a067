"""The best of N responses to each prompt.

    rlhf best_of_n --model runs/my/sft --data prompts.jsonl --n 16 \\
        --scorers runs/my/reward_model --judge runs/my/judge \\
        --output_dir runs/my/best_of_n
    rlhf best_of_n --model runs/my/sft --data prompts.jsonl --n 64 \\
        --scorers runs/my/reward_model --judge runs/my/judge \\
        --output_dir runs/my/best_of_n    # draws only the 48 that are new
    rlhf sft --model runs/my/sft --train_data runs/my/best_of_n/chosen.jsonl \\
        --output_dir runs/my/sft_best    # rejection sampling fine-tuning

Samples a policy, re-ranks its responses by any scorers, and writes curves over n = 1 .. N and the chosen responses as
demonstrations. Scorers are reward models, ensembles, functions, servers, a grader with a rubric; with --answer, answers
are taken from the responses and a vote decides, too. The responses stay in samples.jsonl: another n, scorer or judge
samples nothing again.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf import config as configs
from rlhf.errors import InputError, unknown
from rlhf.rows.records import Prompt, read_prompts, write_jsonl
from rlhf.run import console
from rlhf.run.checkpoint import write_json_atomic
from rlhf.run.functions import import_function
from rlhf.run.owner import by_main
from rlhf.run.precision import compute_dtype
from rlhf.run.stages import POLICIES
from rlhf.urls import is_url
from rlhf_recipes import best_of_n_results as results
from rlhf_recipes.stage import SCORERS, SECTIONS, Stage, check_model, next_command, open_stage, reopen

if TYPE_CHECKING:
    from rlhf.evaluate import PolicySamples

console.quiet()

LATER = (
    "n", "data", "scorers", "scorer", "grader", "rubric", "judge", "answer", "answer_column", "choose", "min_scores",
    "max_prompts", "max_prompt_tokens", "tokens_per_microbatch", "generation_batch_size", "code",
)  # fmt: skip
"""Settings and inputs that may change in an existing output_dir: they decide which responses are drawn and what is done
with them, and not what is in them."""


@dataclass(frozen=True, kw_only=True)
class BestOfNConfig:
    """Best-of-n of a policy by several scorers."""

    MOST_USED = (
        "model", "data", "n", "scorers", "judge", "answer", "choose", "output_dir", "max_new_tokens", "temperature",
    )  # fmt: skip

    "Responses"

    model: str
    """The policy: a folder (full weights or adapter) or hub id."""
    data: str
    """Prompts."""
    n: int = 16
    """Responses per prompt. With more than before in the same output_dir, only the new ones are drawn."""
    temperature: float = 1.0
    """Divides every logit."""
    max_new_tokens: int = 128
    """Longest response."""
    max_prompts: int | None = None
    """Use only the first so many prompts."""
    max_prompt_tokens: int = 512
    """Longer prompts are left out, counted and named in the log."""

    "Scorers and judge"

    scorers: list[str] | None = None
    """Each the folder of a reward model, an ensemble or a process model, a function as file.py:name, or a scoring
    server's address."""
    grader: str | None = None
    """Causal language model that grades responses by a rubric, one more scorer: a folder or hub id."""
    rubric: str | None = None
    """The grader's multiple-choice question: a YAML file with instructions, and choices with their scores."""
    answer: str | None = None
    """Regular expression of the answer in a response (its last match; of the first group, if it has one), such as
    "#### (.+)": majority and, with each scorer, weighted majority."""
    judge: str | None = None
    """What the curves measure: a function as file.py:name, or a reward model that is no scorer; null: each scorer's own
    score, which best-of-n raises whether or not the responses get better."""
    answer_column: str | None = None
    """Column of the data with the right answer: the curves measure the share of responses that give it. In place of
    judge; needs answer, or takes a response's last number."""

    "What is kept as demonstrations"

    choose: str | None = None
    """Scorer, majority or weighted_<scorer>, whose choice is written to chosen.jsonl; null: the first scorer."""
    min_scores: dict[str, float] | None = None
    """Least score by scorer, {name: score}, of a response to be chosen; a prompt without such a response is left
    out."""

    "Run"

    output_dir: str = "runs/best_of_n"
    """Where samples, numbers, page and demonstrations go."""
    seed: int = 0
    """Decides every sample, votes over subsets, and bootstraps."""
    generation_batch_size: int = 256
    """Responses sampled at once; memory only."""
    tokens_per_microbatch: int = 16384
    """Of the scorers; memory only."""
    bf16: bool | None = None
    """Run every model in bfloat16; null: where the hardware is fast at it."""
    overwrite: bool = False
    """Replace another run's output in output_dir, samples and all."""

    def __post_init__(self) -> None:
        for name in ("n", "max_new_tokens", "max_prompt_tokens", "generation_batch_size", "tokens_per_microbatch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 < self.temperature < math.inf:
            raise InputError(f"temperature={self.temperature} must be positive: at 0 all responses are the same")
        if (self.grader is None) != (self.rubric is None):
            raise InputError("grader and rubric belong together: a grader model answers a rubric")
        if self.judge and self.answer_column:
            raise InputError("judge and answer_column both say what the curves measure; give one of them")
        if not (self.scorers or self.grader or self.answer or self.answer_column):
            raise InputError("scorers is missing: name what re-ranks, or give --answer for a majority")
        try:
            re.compile(self.answer or "")
        except re.error as error:
            raise InputError(f"answer={self.answer!r} is no regular expression: {error}") from None

    @property
    def pattern(self) -> re.Pattern[str]:
        """The answer's expression; without one, of a number."""
        return re.compile(self.answer or r"-?\$?\d[\d,]*(?:\.\d+)?")


def best_of_n(config: BestOfNConfig) -> dict[str, Any]:
    """The stage: sample what is missing, score, measure, choose, write.

    Of several processes the first works, and shares out what policy and reward models compute."""
    return by_main(lambda: run(config))


def run(config: BestOfNConfig) -> dict[str, Any]:
    check_model(config.model, POLICIES)
    listed = [*(config.scorers or []), *([config.judge] if config.judge else [])]
    folders = [spec for spec in listed if Path(spec).is_dir()]
    for folder in folders:
        check_model(folder, (*SCORERS, "process_reward"))
    sources = {"model": config.model, "data": config.data, "grader": config.grader, "rubric": config.rubric}
    sources |= {f"scorer.{folder}": folder for folder in folders}
    reopened = reopen("best_of_n", config, sources, LATER)
    stage = open_stage("best_of_n", config, sources, reopened)
    if stage.complete:
        return stage.outputs
    from rlhf.evaluate import judge_samples
    from rlhf.models.loading import load_tokenizer
    from rlhf.scores import check_columns

    tokenizer = load_tokenizer(config.model)
    prompts, ids = prompts_of(config, tokenizer)
    functions = scorers(config)
    results.check_choice(config, list(functions), prompts)
    judge = scorer(config.judge, config) if config.judge else None
    check_columns([*functions.values(), *([judge] if judge else [])], prompts, str(config.data))
    samples = sampled(config, stage, tokenizer, prompts, ids)
    scores = {name: samples.by_prompt(judge_samples(samples, function)) for name, function in functions.items()}
    quality = None if judge is None else samples.by_prompt(judge_samples(samples, judge))
    answers = results.answers_of(config, samples)
    numbers = results.measure(config, samples, scores, quality, answers)
    rows = results.demonstrations(config, samples, scores, answers, stage.inputs["model"])
    write_jsonl(stage.folder / "chosen.jsonl", rows)
    if len(rows) < len(prompts):
        why = "no response of theirs stopped, has a text and reaches min_scores"
        console.stage_line("best_of_n", f"{len(prompts) - len(rows)} of {len(prompts)} prompts left out: {why}")
    counts = {"prompts": len(prompts), "n": config.n, "chosen": len(rows)}
    write_json_atomic(stage.folder / "best_of_n.json", numbers | counts)
    results.write_page(stage.folder, numbers, rows)
    return stage.finish(counts | {name: metric["value"] for name, metric in numbers["metrics"].items()})


# ---------------------------------------------------------------- prompts, scorers, samples


def prompts_of(config: BestOfNConfig, tokenizer: Any) -> tuple[list[Prompt], list[list[int]]]:
    """The prompts and their tokens; a prompt that comes twice counts once."""
    from rlhf.ppo import inputs
    from rlhf.sampling.kept import key_of

    args: Any = config  # it reads max_prompt_tokens alone
    prompts, ids = inputs.prompts_of("data", read_prompts(config.data)[: config.max_prompts], tokenizer, args)
    first = {key_of(row): place for place, row in reversed(list(enumerate(ids)))}
    places = sorted(first.values())
    if len(places) < len(ids):
        console.stage_line("best_of_n", f"{len(ids) - len(places)} of {len(ids)} prompts come twice and count once")
    return [prompts[place] for place in places], [ids[place] for place in places]


def scorers(config: BestOfNConfig) -> dict[str, Any]:
    """Every scorer by its name; where a name repeats, later ones are numbered."""
    from reward_models.grader import RubricGrader
    from rlhf.scores import column_names

    functions = [scorer(spec, config) for spec in config.scorers or []]
    if config.grader is not None:
        functions.append(RubricGrader.load(config.grader, str(config.rubric), dtype=compute_dtype(config.bf16)))
    names = [name.removeprefix("score/") for name in column_names(functions)]
    for given in config.min_scores or {}:
        if given not in names:
            unknown(given, names, "min_scores", "scorer")
    return dict(zip(names, functions, strict=True))


def scorer(spec: str, config: BestOfNConfig) -> Any:
    """What a spec names: a server, a function, or a folder's reward model, ensemble or process model."""
    if is_url(spec):
        from reward_models import RewardClient

        return in_parts(RewardClient(spec, timeout=600.0), 256)
    if ":" in spec and not Path(spec).exists():
        return import_function(spec)
    from reward_models.ensemble import load_scorer
    from reward_models.process import ProcessModel
    from reward_models.scoring import PROCESS_FILE

    if Path(spec, PROCESS_FILE).is_file():
        tokens = config.tokens_per_microbatch
        return ProcessModel.load(spec, dtype=compute_dtype(config.bf16), tokens_per_microbatch=tokens)
    return load_scorer(spec, dtype=compute_dtype(config.bf16), tokens_per_microbatch=config.tokens_per_microbatch)


def in_parts(client: Any, rows: int) -> Any:
    """Ask a server for so many scores at a time: it takes a limited number in one request."""

    def score(prompts: list[Any], completions: list[Any], **columns: object) -> list[float]:
        starts = range(0, len(prompts), rows)
        return [x for i in starts for x in client(prompts[i : i + rows], completions[i : i + rows])]

    score.__name__ = client.__name__
    return score


def sampled(
    config: BestOfNConfig, stage: Stage, tokenizer: Any, prompts: list[Prompt], ids: list[list[int]]
) -> PolicySamples:
    """The first n responses to every prompt, of which those that are not on disk yet are drawn."""
    from rlhf.evaluate import samples_of
    from rlhf.sampling.kept import KeptSamples

    stage.begin()
    kept = KeptSamples(stage.folder / "samples.jsonl", config.seed)
    if missing := len(kept.missing(ids, config.n)):
        console.stage_line("best_of_n", f"{missing:,} of {len(ids) * config.n:,} responses to draw")
        draw(config, kept, tokenizer, ids, missing)
    rows = kept.of(ids, config.n)
    texts, tokens, stopped = zip(*((row.text, row.ids, row.stopped) for row in rows), strict=True)
    return samples_of(prompts, tokenizer, texts, tokens, stopped, config.n)


def draw(config: BestOfNConfig, kept: Any, tokenizer: Any, ids: list[list[int]], missing: int) -> None:
    from rlhf import chat, policies
    from rlhf.sampling.engine import model_stop_ids

    model = policies.load(config.model, compute_dtype(config.bf16))
    stops = model_stop_ids(model, tokenizer)
    engine = policies.SharedEngine(model, stops, chat.pad_id(tokenizer), config.generation_batch_size)
    bar = console.StageBar("best_of_n", missing)
    kept.draw(
        engine, ids, config.n, lambda row: chat.decode_response(tokenizer, row, stops),
        max_new_tokens=config.max_new_tokens, temperature=config.temperature,
        rows_at_once=engine.rows_at_once, device=model.device, done=bar.update,
    )  # fmt: skip
    bar.close()


def main(argv: list[str]) -> None:
    config = configs.load(BestOfNConfig, argv, section="best_of_n", known_sections=SECTIONS, description=__doc__ or "")
    if not best_of_n(config)["chosen"]:
        return  # nothing to train on
    chosen = ("--train_data", f"{config.output_dir}/chosen.jsonl")
    next_command("sft", argv, config.output_dir, "sft_best", also=("--model", config.model, *chosen))


if __name__ == "__main__":
    configs.run(main)
