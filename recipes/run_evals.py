"""Evals on a policy: a registry's, your own, lm-eval's.

    rlhf run_evals --model runs/my/ppo --eval_data arithmetic,pii \\
        --output_dir runs/my/run_evals
    rlhf run_evals --model http://127.0.0.1:8000 --registry evals/registry \\
        --evals 'logic*,test-match' --output_dir runs/my/registry
    rlhf run_evals --model runs/my/ppo --lm_eval ifeval,gsm8k \\
        --output_dir runs/my/lm_eval

Writes run_evals.json (every metric with a 95% interval), items.jsonl, a page with every item, and .eval_results/ for
the hub. With --compare it pairs the items of two runs. Answers are kept in answers.sqlite beside output_dir, so an
interrupted run asks nothing twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf import config as configs
from rlhf.errors import InputError
from rlhf.run import console
from rlhf.run.owner import by_main
from rlhf.run.precision import compute_dtype
from rlhf.run.stages import POLICIES
from rlhf.urls import is_url
from rlhf_recipes.stage import SECTIONS, as_outputs, check_model, from_siblings, open_stage

if TYPE_CHECKING:
    from rlhf.evals.asking import Asker
    from rlhf.evals.cache import Answers
    from rlhf.evals.compare import Compared
    from rlhf.evals.grading import Eval
    from rlhf.evals.measure import Metric
    from rlhf.evals.outcome import Outcome

console.quiet()


@dataclass(frozen=True, kw_only=True)
class RunEvalsConfig:
    """Evals on a policy."""

    MOST_USED = (
        "model", "eval_data", "registry", "evals", "lm_eval", "judge", "compare", "output_dir", "max_items",
        "samples_per_item", "temperature", "max_new_tokens",
    )  # fmt: skip

    output_dir: str = "runs/my/run_evals"
    """Where results, items and the page go."""
    seed: int = 0
    """Decides every sample."""
    model: str | None = None
    """The policy: a folder, an adapter's folder, a hub id, or a server's address (OpenAI's HTTP); default: the run's
    `ppo`."""
    eval_data: list[str] | None = None
    """Files of prompt and ideal (JSONL), YAML files that describe one, or sets of ours: arithmetic, toy, pii ..."""
    eval_class: Literal["Match", "Includes", "FuzzyMatch", "JsonMatch", "Excludes"] | None = None
    """How the answers to a JSONL without a YAML are judged; null: Match."""
    ignore_case: bool = False
    """Of Includes, for a JSONL without a YAML."""
    few_shot: str | None = None
    """Rows of prompt and ideal that come before each prompt of a JSONL without a YAML."""
    num_few_shot: int = 0
    """So many of them."""
    registry: str | None = None
    """A registry of OpenAI Evals: the folder that holds evals/, data/ and modelgraded/."""
    evals: list[str] | None = None
    """Names in the registry, * for anything; null: all of them."""
    lm_eval: list[str] | None = None
    """Tasks of lm-eval, which run in this process (pip install 'rlhf-recipes[lm_eval]')."""
    lm_eval_path: str | None = None
    """A folder of further task files for lm-eval."""
    lm_eval_chat: bool = False
    """Render lm-eval's prompts with the chat template; lm-eval's own default does not."""
    judge: str | None = None
    """Who reads the answers of model-graded evals: a model's folder or a server's address."""
    judge_tokens: int = 512
    """Longest reply of the judge, where an eval sets none."""
    scoring: Literal["sampled", "likelihood"] = "sampled"
    """Judge sampled answers, or let the policy choose among the column `choices` by log-probability."""
    samples_per_item: int = 1
    """Answers to each item."""
    pass_at: list[int] | None = None
    """The k of pass@k; null: 1 and samples_per_item, where that is more than 1."""
    temperature: float = 0.0
    """Of every sample, where an eval sets none; 0: the most likely answer."""
    max_new_tokens: int = 256
    """Longest answer, where an eval sets none."""
    max_items: int | None = None
    """Only the first so many items of each eval; null: all."""
    compare: str | None = None
    """The run_evals.json of another run, whose items are paired with these."""
    answers: str | None = None
    """The file that keeps answers; null: answers.sqlite beside output_dir."""
    generation_batch_size: int = 64
    """Answers sampled at once; an interrupted run loses at most so many."""
    requests_at_once: int = 8
    """Questions to a server side by side."""
    tokens_per_microbatch: int = 16384
    """Memory only."""
    bf16: bool | None = None
    """Run models in bfloat16; null: where the hardware is fast at it."""
    overwrite: bool = False
    """Replace another run's output in output_dir; its answers stay."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "judge_tokens", "samples_per_item", "generation_batch_size", "requests_at_once",
                     "tokens_per_microbatch"):  # fmt: skip
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1")
        if self.max_items is not None and self.max_items < 1:
            raise InputError(f"max_items={self.max_items} must be at least 1, or null for all")
        if not 0 <= self.temperature < math.inf or self.num_few_shot < 0:
            raise InputError(f"temperature={self.temperature} and num_few_shot={self.num_few_shot} must be 0 or more")
        if self.samples_per_item > 1 and self.temperature == 0:
            seen = f"samples_per_item={self.samples_per_item} and temperature=0"
            raise InputError(f"{seen}: all answers to an item would be the same; set temperature to 0.7, say")
        if wrong := [k for k in self.pass_at or () if not 1 <= k <= self.samples_per_item]:
            raise InputError(f"pass_at={wrong[0]} must be from 1 to samples_per_item={self.samples_per_item}")
        if self.scoring == "likelihood" and self.samples_per_item > 1:
            raise InputError("scoring=likelihood samples nothing; leave samples_per_item at 1")
        if not (self.eval_data or self.registry or self.lm_eval):
            raise InputError("nothing to run; name --eval_data, --registry or --lm_eval")
        if self.evals and not self.registry:
            raise InputError("--evals names entries of a registry; give --registry its folder")

    @property
    def ks(self) -> list[int]:
        """The k of pass@k."""
        return self.pass_at or ([1, self.samples_per_item] if self.samples_per_item > 1 else [])

    @property
    def answers_file(self) -> Path:
        """Where answers are kept."""
        return Path(self.answers) if self.answers else Path(self.output_dir).parent / "answers.sqlite"


def run_evals(config: RunEvalsConfig, name: str = "run_evals") -> dict[str, Any]:
    """The stage: read the evals, ask, judge, measure, compare, write.

    Of several processes the first works, and shares out the sampling from a model's folder."""
    return by_main(lambda: run_alone(config, name))


def inputs(config: RunEvalsConfig) -> tuple[RunEvalsConfig, dict[str, Any]]:
    """The config, with what it takes from the run's stages; the models and evals that are read."""
    config = from_siblings(config, model="ppo")
    return config, _sources(config, read_evals(config, {}))


def _sources(config: RunEvalsConfig, evals: Sequence[Eval]) -> dict[str, Any]:
    named = {name: getattr(config, name) for name in ("model", "judge", "compare", "lm_eval_path")}
    return named | {f"eval {one.name}": one.fingerprint for one in evals}


def run_alone(config: RunEvalsConfig, name: str) -> dict[str, Any]:
    from rlhf.evals import lm_harness
    from rlhf.evals.compare import read_earlier
    from rlhf.evals.outcome import Outcome

    config = from_siblings(config, model="ppo")
    model = str(config.model)
    for named in filter(None, (model, config.judge)):
        check_model(named, POLICIES)
    if config.lm_eval:
        lm_harness.require()
        if is_url(model):
            raise InputError(f"--lm_eval: loads the model itself, and {model} is a server; name its folder")
    outcome = Outcome()
    evals = read_evals(config, outcome.not_run)
    earlier = read_earlier(config.compare) if config.compare else None
    stage = open_stage(name, config, _sources(config, evals))
    if stage.complete:
        return stage.outputs
    for unread, reason in outcome.not_run.items():
        console.stage_line("not run", f"{unread}: {reason}")
    if evals:
        _ask(config, evals, outcome)
    if config.lm_eval:
        _lm_eval(config, outcome)
    if not outcome.evals:
        raise InputError(f"none of {len(outcome.not_run)} evals could be run; the first: {_first(outcome.not_run)}")
    stage.begin()  # only now: what was asked is kept elsewhere, and a mistake leaves nothing here to trip over
    about = {"model": model, "seed": config.seed, "scoring": config.scoring, "samples": config.samples_per_item}
    compared = outcome.write(stage.folder, about, earlier)
    _print(outcome.metrics, compared)
    outputs = {"evals": len(outcome.evals), "items": len(outcome.rows), "not_run": len(outcome.not_run)}
    differences = {f"{one.name}/{one.metric}_difference": one.difference for one in compared}
    return stage.finish(outputs | as_outputs(outcome.metrics | differences))


def read_evals(config: RunEvalsConfig, not_run: dict[str, str]) -> list[Eval]:
    """Read the evals that the config names; the registry's that cannot be run are noted in `not_run`.

    Raises InputError for a mistake in one of the user's own files."""
    from rlhf.evals.own import read_own
    from rlhf.evals.registry import Registry, Unread

    own = (config.eval_class, config.few_shot, config.num_few_shot, config.ignore_case)
    evals = [read_own(source, *own) for source in config.eval_data or ()]
    if config.registry:
        registry = Registry(config.registry)
        for one in map(registry.load, registry.find(config.evals or ["*"])):
            if isinstance(one, Unread):
                not_run[one.name] = one.reason
            else:
                evals.append(one)
        not_run |= {unread.name: unread.reason for unread in registry.unread}
    names = [one.name for one in evals]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"two evals are called {twice}; run them into two folders")
    if not evals and not config.lm_eval:
        raise InputError(f"none of {len(not_run)} evals can be run; the first: {_first(not_run)}")
    return [replace(one, samples=one.samples[: config.max_items]) for one in evals]


def _first(reasons: Mapping[str, str]) -> str:
    return next((f"{name}: {reason}" for name, reason in reasons.items()), "there is none")


def _ask(config: RunEvalsConfig, evals: Sequence[Eval], outcome: Outcome) -> None:
    """Run our own evals and the registry's, one after the other; note what each came to, or why it could not be run."""
    from rlhf.evals.asking import Sampler
    from rlhf.evals.cache import Answers
    from rlhf.evals.run import run_by_likelihood, run_eval

    sampler = Sampler(config.max_new_tokens, config.temperature)
    bar = console.StageBar("run_evals", config.samples_per_item * sum(len(one.samples) for one in evals))
    done = 0
    with ExitStack() as stack:
        stack.callback(bar.close)
        answers = stack.enter_context(Answers(config.answers_file))
        policy = _asker(config, str(config.model), answers, lambda asked: bar.update(min(bar.done + asked, bar.total)))
        judge = None
        if config.judge and any(one.needs_judge for one in evals):
            judge = policy if config.judge == config.model else _asker(config, config.judge, answers)
        for one in evals:
            try:
                if config.scoring == "likelihood":
                    result = run_by_likelihood(one, policy)
                else:
                    result = run_eval(
                        one, policy, sampler, seed=config.seed, samples=config.samples_per_item, judge=judge,
                        judge_tokens=config.judge_tokens,
                    )  # fmt: skip
            except InputError as error:
                outcome.not_run[one.name] = str(error)
                console.stage_line("not run", f"{one.name}: {error}")
            else:
                outcome.add(result, _how(config, one), config.ks)
            done += config.samples_per_item * len(one.samples)
            bar.update(done)
    console.stage_line("run_evals", f"{policy.asked:,} answers asked for, {policy.known:,} known before")


def _asker(
    config: RunEvalsConfig, model: str, answers: Answers, progress: Callable[[int], None] | None = None
) -> Asker:
    from rlhf.evals.asking import Asker
    from rlhf.evals.targets import open_target

    rows, tokens = config.generation_batch_size, config.tokens_per_microbatch
    target = open_target(model, config.bf16, rows, tokens, config.requests_at_once)
    return Asker(target, answers, rows, progress)


def _how(config: RunEvalsConfig, one: Eval) -> str:
    """Say how an eval was asked."""
    if config.scoring == "likelihood":
        return "by log-probability of the choices"
    temperature = config.temperature if one.temperature is None else one.temperature
    many = f"{config.samples_per_item} answers per item, " if config.samples_per_item > 1 else ""
    judged = f", judged by {config.judge}" if one.needs_judge else ""
    limit = config.max_new_tokens if one.max_new_tokens is None else one.max_new_tokens
    return f"{many}temperature {temperature:g}, at most {limit} tokens{judged}"


def _lm_eval(config: RunEvalsConfig, outcome: Outcome) -> None:
    from rlhf.evals import lm_harness

    dtype = str(compute_dtype(config.bf16)).removeprefix("torch.")
    for name in config.lm_eval or ():
        try:
            tasks = lm_harness.run_tasks(
                [name], str(config.model), dtype=dtype, batch_size=config.generation_batch_size,
                limit=config.max_items, num_fewshot=config.num_few_shot or None, chat_template=config.lm_eval_chat,
                include_path=config.lm_eval_path,
            )  # fmt: skip
        except InputError as error:
            outcome.not_run[name] = str(error)
            console.stage_line("not run", f"{name}: {error}")
            continue
        shown = "with the chat template" if config.lm_eval_chat else "without a chat template"
        for task in tasks:
            outcome.add_task(task, f"{shown}, {dtype}")


def _print(metrics: Mapping[str, Metric], compared: Sequence[Compared]) -> None:
    from rlhf.evals.compare import chance
    from rlhf.run.tables import number

    for name, metric in metrics.items():
        ends = "" if metric["low"] is None else f" [{number(metric['low'])}, {number(metric['high'])}]"
        console.stage_line("result", f"{name}  {number(metric['value'])}{ends}  n {metric['n']:,}")
    for one in compared:
        console.stage_line("compared", f"{one.name}: {one.sentence}; {len(one.gained)} gained, {len(one.lost)} lost")
    if said := chance(compared):
        console.stage_line("compared", said)


def main(argv: list[str]) -> None:
    config = configs.load(RunEvalsConfig, argv, section="run_evals", known_sections=SECTIONS, description=__doc__ or "")
    run_evals(config)


if __name__ == "__main__":
    configs.run(main)
