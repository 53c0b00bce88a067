"""The whole pipeline, from data to evaluation.

    rlhf chain --config toy.yaml
    rlhf chain --config toy.yaml --ppo.kl_coef 0.1 --output_dir runs/other

data -> base -> supervised fine-tuning -> rankings -> reward model -> PPO -> evaluation, and where their sections stand
in the YAML, red teaming, evals, judge cards, contamination and a system card. Run again, it skips complete stages and
goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rlhf import config as configs
from rlhf.errors import InputError, unknown
from rlhf.rows.mixed import paths_of
from rlhf.rows.sources import require_there
from rlhf.run import console
from rlhf.run.changes import Change
from rlhf.run.checkpoint import full_disk_explained, write_json_atomic
from rlhf.run.owner import by_main
from rlhf.run.stages import Manifest, refused, stage_changes, stage_state
from rlhf.urls import is_url
from rlhf_recipes import ending
from rlhf_recipes import evaluate_policy as evaluation_stage
from rlhf_recipes import ppo as ppo_stage
from rlhf_recipes import process_reward as process_stage
from rlhf_recipes import rankings as rankings_stage
from rlhf_recipes import red_team as red_team_stage
from rlhf_recipes import reward_model as reward_stage
from rlhf_recipes import sft as sft_stage
from rlhf_recipes.ending import ContaminationStageConfig, JudgeStageConfig
from rlhf_recipes.evaluate_policy import EvaluationConfig, evaluation
from rlhf_recipes.ppo import PPORecipe, ppo
from rlhf_recipes.process_reward import ProcessRecipe, process_reward
from rlhf_recipes.rankings import DataConfig, rankings
from rlhf_recipes.red_team import RedTeamConfig, red_team
from rlhf_recipes.report import report
from rlhf_recipes.reward_model import RewardRecipe, reward_model
from rlhf_recipes.run_evals import RunEvalsConfig
from rlhf_recipes.sft import SFTRecipe, sft
from rlhf_recipes.stage import NONE, SECTIONS, Step, inputs_of, open_stage, with_columns
from rlhf_recipes.system_card import SystemCardConfig

console.quiet()

DATA_FIELDS = ("rankings", "prompts", "train_data", "eval_data", "seen_data", "selection_data", "normalizer_data")
MODEL_FIELDS = ("model", "policy", "baseline", "reward_model")


@dataclass(frozen=True, kw_only=True)
class FunctionConfig:
    """A stage that is a function of the config's: making data, or the base model (the toy world pretrains its own)."""

    output_dir: str = "runs/base"
    """Where it writes."""
    seed: int = 0
    """Decides everything random in it."""
    function: str = ""
    """As file.py:name; called with its folders, the seed and the options, returns its numbers."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments."""
    overwrite: bool = False
    """Replace another run's output in output_dir."""


@dataclass(frozen=True, kw_only=True)
class ChainConfig:
    """Every stage's settings, each in its section."""

    MOST_USED = (
        "output_dir", "seed", "overwrite", "data.rankings", "sft.model", "sft.train_data", "sft.lora_rank",
        "ppo.updates", "ppo.kl_coef", "evaluation.judge",
    )  # fmt: skip

    output_dir: str = "runs/chain"
    """The run's folder; each stage has one in it."""
    seed: int = 0
    """For every stage that names no seed of its own."""
    overwrite: bool = False
    """Replace another run's stages in output_dir."""
    overwrite_from: str | None = None
    """Replace them from this stage on (such as ppo); a change of an earlier one is refused."""
    data: DataConfig = field(default_factory=DataConfig)
    base: FunctionConfig | None = None
    sft: SFTRecipe = field(default_factory=SFTRecipe)
    reward_model: RewardRecipe = field(default_factory=RewardRecipe)
    process_reward: ProcessRecipe | None = None
    ppo: PPORecipe = field(default_factory=PPORecipe)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    red_team: RedTeamConfig | None = None
    run_evals: RunEvalsConfig | None = None
    judge_card: JudgeStageConfig | None = None
    contamination: ContaminationStageConfig | None = None
    system_card: SystemCardConfig | None = None


def chain(config: ChainConfig) -> dict[str, Any]:
    """Run every stage that is not complete; the summary."""
    run, steps = Path(config.output_dir), steps_of(config)
    check(config)
    by_main(lambda: require_same(run, steps))
    stages = {step.name: step.run(step.config) for step in steps}
    outcome = stages.pop("evaluation")
    stages["reward_model"] = outcome["reward_model"] | stages["reward_model"]
    seconds = {step.name: round(Manifest.read(run / step.name).seconds, 1) for step in steps}
    if config.system_card:
        stages["system_card"] = ending.card(run, config.system_card)
    summary = {"stages": stages, "evaluation": outcome["evaluation"], "seconds": seconds}
    by_main(lambda: write_json_atomic(run / "summary.json", summary))
    page = by_main(lambda: report(run, summary))
    console.final_table(summary)
    if config.ppo.save_rollouts:
        console.stage_line("next", f"rlhf inspect_rollout {run}")
    console.stage_line("report", str(page))
    return summary


def steps_of(config: ChainConfig) -> list[Step]:
    """The chain's stages in their order, each told whether it may replace another run's."""
    ranked = Step("rankings", config.data, rankings, rankings_stage.inputs)
    steps = [Step("data", data_config(config.data), make_data, no_inputs)] if config.data.make else []
    steps += [Step("base", config.base, make_base, base_inputs)] if config.base else []
    steps += [ranked] if config.data.rankings else []  # first: without demonstrations of its own, sft learns from them
    steps += [Step("sft", config.sft, sft, sft_stage.inputs)]
    steps += [] if config.data.rankings else [ranked]  # the sft model's own responses are ranked
    steps += [Step("reward_model", config.reward_model, reward_model, reward_stage.inputs)]
    if config.evaluation.judge is None:
        judge = partial(reward_model, name="judge")
        steps += [Step("judge", judge_config(config), judge, reward_stage.inputs)]
    if config.process_reward:
        steps += [Step("process_reward", config.process_reward, process_reward, process_stage.inputs)]
    steps += [Step("ppo", config.ppo, ppo, ppo_stage.inputs)]
    steps += [Step("evaluation", config.evaluation, evaluation, evaluation_stage.inputs)]
    steps += [Step("red_team", config.red_team, red_team, red_team_stage.inputs)] if config.red_team else []
    run = Path(config.output_dir)
    steps += ending.evals_steps(run, config.run_evals) if config.run_evals else []
    steps += ending.judge_steps(run, config.judge_card) if config.judge_card else []
    if config.contamination:
        steps += ending.contamination_steps(config.contamination, training_data(config))
    names = [step.name for step in steps]
    if config.overwrite_from is not None and config.overwrite_from not in names:
        unknown(config.overwrite_from, names, "--overwrite_from", "stage")
    first = names.index(config.overwrite_from) if config.overwrite_from else (0 if config.overwrite else len(steps))
    return [*steps[:first], *(replace(step, config=replace(step.config, overwrite=True)) for step in steps[first:])]


def training_data(config: ChainConfig) -> list[str]:
    """Return the training data that the config itself names, beside what the run makes."""
    sections = (config.sft, config.reward_model, config.process_reward, config.ppo)
    sources = [*(getattr(section, "train_data", None) for section in sections), config.ppo.pretraining_data]
    return [path for source in sources for path in paths_of(source)]


def require_same(run: Path, steps: Sequence[Step]) -> None:
    """Raise InputError, before anything is trained, where stages of the folder belong to another run: one line that
    names every change of every stage."""
    found: dict[str, list[Change]] = {}
    longer: str | None = None
    for step in steps:
        folder = run / step.name
        try:
            filled, sources = step.inputs(step.config)
            inputs = inputs_of(filled, sources)
        except InputError:  # what an earlier stage is yet to write
            continue
        if step.config.overwrite or not (folder / "inputs.json").exists():
            continue
        found[step.name] = stage_changes(folder, inputs)
        if longer and not found[step.name]:
            found[step.name] = [Change(longer, "shorter", "trained longer")]
        extended = (folder / "manifest.json").exists() and not found[step.name]
        if extended and stage_state(folder, inputs) == "interrupted":
            longer = step.name
    found = {name: changes for name, changes in found.items() if changes}
    if not found:
        return
    first = next(iter(found))
    advice = f"pass --overwrite_from {first} to replace it and what follows (earlier stages are kept)"
    if len(found) == 1:
        raise InputError(refused(run / first, found[first], advice))
    named = "; ".join(f"{name}: {', '.join(map(str, changes))}" for name, changes in found.items())
    raise InputError(f"output_dir {run} belongs to another run: {named}; {advice}, or choose another --output_dir")


def check(config: ChainConfig) -> None:
    """What would fail hours later, refused now."""
    if config.evaluation.judge is None and not config.data.judge_fraction:
        config_error = "evaluation.judge is null, so a second reward model judges: give data.judge_fraction (say 0.5)"
        raise InputError(config_error)
    for step in steps_of(config):
        place = Path(config.output_dir) / ("data" if step.name == "rankings" else step.name)
        if Path(step.config.output_dir) != place:
            where = f"{place.name}.output_dir={step.config.output_dir}"
            raise InputError(f"{where}: the other stages look in {place}; leave it out, or run that stage by itself")
    for name in ("judge", "parts", "refused"):
        spec = getattr(config.evaluation, name)
        if name == "judge" and config.evaluation.template:
            continue  # a language model: a folder, a hub id or an address
        if spec and ":" in spec and not Path(spec).exists():
            configs.import_function(spec)
    for spec in (config.data.make, config.data.labeler, *(config.ppo.reward_functions or [])):
        if spec and not is_url(spec):
            configs.import_function(spec)
    from rlhf.safety.policy import read_rubric

    if config.ppo.rubric:
        read_rubric(config.ppo.rubric)
    process = config.ppo.process_model or config.process_reward
    scored = config.ppo.reward_functions or config.ppo.grader or process not in (None, NONE)
    if config.ppo.reward_model == NONE and not scored:
        raise InputError("ppo.reward_model=none: nothing else scores; name ppo.reward_functions, or leave it out")
    run = Path(config.output_dir).absolute()
    ending.check(run, config.run_evals, config.judge_card, config.contamination)
    if config.red_team:
        red_team_stage.check(config.red_team)
        if not config.data.make:  # which may write the run's data/red_team.jsonl
            red_team_stage.with_data(config.red_team)
        for place in filter(None, (*(config.red_team.data or ()), config.red_team.human)):
            if not Path(place).absolute().is_relative_to(run):
                require_there(place)
    sections = (config.data, config.sft, config.reward_model, config.process_reward, config.ppo, config.evaluation)
    for section in sections:
        given = {name: getattr(section, name, None) for name in (*DATA_FIELDS, *MODEL_FIELDS)}
        for name, place in ((name, place) for name, source in given.items() for place in paths_of(source)):
            own = Path(place).absolute().is_relative_to(run)  # a stage may yet write it
            if not own and (name, place) != ("reward_model", NONE):
                require_there(place) if name in DATA_FIELDS else require_tokenizer(place)


def require_tokenizer(model: str) -> None:
    """Raise InputError where a model's folder or hub id has no tokenizer that loads."""
    from rlhf.models.loading import load_tokenizer

    load_tokenizer(model)


def make_data(config: FunctionConfig) -> dict[str, Any]:
    """The data stage: a function of the config writes the files that the other stages read."""
    stage = open_stage("data", config, {})
    if stage.complete:
        return stage.outputs
    function = configs.import_function(config.function)
    stage.begin()
    return stage.finish(by_main(lambda: function(stage.folder, seed=config.seed, **config.options)))


def data_config(config: DataConfig) -> FunctionConfig:
    """The settings of the data stage, out of its section, which it shares with the rankings."""
    return FunctionConfig(
        output_dir=config.output_dir,
        seed=config.seed,
        function=str(config.make),
        options=config.options,
        overwrite=config.overwrite,
    )


def no_inputs(config: FunctionConfig) -> tuple[FunctionConfig, dict[str, Any]]:
    """The data stage reads no model and no data."""
    return config, {}


def base_inputs(config: FunctionConfig) -> tuple[FunctionConfig, dict[str, Any]]:
    """The base stage reads the run's data, if there is any."""
    data = Path(config.output_dir).parent / "data"
    return config, {"data": data if data.exists() else None}


def make_base(config: FunctionConfig) -> dict[str, Any]:
    """The base stage: a function of the config makes the model that supervised fine-tuning starts from."""
    data = Path(config.output_dir).parent / "data"
    stage = open_stage("base", *base_inputs(config))
    if stage.complete:
        return stage.outputs
    bar: console.StageBar | None = None

    def log(numbers: dict[str, float]) -> None:
        nonlocal bar
        bar = bar or console.StageBar("base", int(numbers["steps"]))
        bar.show({"loss": numbers["loss"]})
        bar.update(int(numbers["step"]))

    function = configs.import_function(config.function)
    stage.begin()
    with full_disk_explained(stage.folder):
        outputs = by_main(lambda: function(data, stage.folder, seed=config.seed, log=log, **config.options))
    if bar:
        bar.close()
    return stage.finish({name: value for name, value in outputs.items() if name != "seconds"})


def judge_config(config: ChainConfig) -> RewardRecipe:
    """The second reward model: same settings, another seed, prompts that nothing else saw."""
    run, settings = (
        Path(config.output_dir),
        with_columns(config.reward_model, "eval_data", "selection_data", "normalizer_data"),
    )
    return replace(
        settings, columns=None, output_dir=str(run / "judge"), seed=config.reward_model.seed + 1,
        train_data=str(run / "rankings" / "judge.jsonl"), seeds=None, keep_seeds=False, sizes=None,
    )  # fmt: skip


def main(argv: list[str]) -> None:
    chain(configs.load(ChainConfig, argv, known_sections=SECTIONS, description=__doc__ or ""))


if __name__ == "__main__":
    configs.run(main)
