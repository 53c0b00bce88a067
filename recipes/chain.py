"""The whole pipeline, from data to evaluation.

    rlhf chain --config toy.yaml
    rlhf chain --config toy.yaml --ppo.kl_coef 0.1 --output_dir runs/other

data -> base -> supervised fine-tuning -> rankings -> reward model -> PPO -> evaluation. Run again, it skips complete
stages and goes on where it stopped.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlhf import config as configs
from rlhf.errors import InputError
from rlhf.run import console
from rlhf.run.checkpoint import full_disk_explained, write_json_atomic
from rlhf.run.stages import Manifest
from rlhf.sources import require_there
from rlhf_recipes.evaluate_policy import EvaluationConfig, evaluation
from rlhf_recipes.ppo import PPORecipe, ppo
from rlhf_recipes.rankings import DataConfig, rankings
from rlhf_recipes.report import report
from rlhf_recipes.reward_model import RewardRecipe, reward_model
from rlhf_recipes.sft import SFTRecipe, sft
from rlhf_recipes.stage import is_first, open_stage

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
    data: DataConfig = field(default_factory=DataConfig)
    base: FunctionConfig | None = None
    sft: SFTRecipe = field(default_factory=SFTRecipe)
    reward_model: RewardRecipe = field(default_factory=RewardRecipe)
    ppo: PPORecipe = field(default_factory=PPORecipe)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def chain(config: ChainConfig) -> dict[str, Any]:
    """Run every stage that is not complete; the summary."""
    run = Path(config.output_dir)
    if config.overwrite:
        sections = {
            name: getattr(config, name) for name in ("data", "base", "sft", "reward_model", "ppo", "evaluation")
        }
        config = replace(config, **{name: replace(part, overwrite=True) for name, part in sections.items() if part})
    check(config)
    stages: dict[str, dict[str, Any]] = {}
    if config.data.make:
        stages["data"] = make_data(config.data)
    if config.base:
        stages["base"] = make_base(config.base)
    if config.data.rankings:  # people's rankings come first: without demonstrations of its own, sft learns from them
        stages["rankings"] = rankings(config.data)
    stages["sft"] = sft(config.sft)
    if not config.data.rankings:  # the sft model's own responses are ranked
        stages["rankings"] = rankings(config.data)
    stages["reward_model"] = reward_model(config.reward_model)
    if config.evaluation.judge is None:
        stages["judge"] = reward_model(judge_config(config), name="judge")
    stages["ppo"] = ppo(config.ppo)
    outcome = evaluation(config.evaluation)
    stages["reward_model"] = outcome["reward_model"] | stages["reward_model"]
    seconds = {name: round(Manifest.read(run / name).seconds, 1) for name in (*stages, "evaluation")}
    summary = {"stages": stages, "evaluation": outcome["evaluation"], "seconds": seconds}
    write_json_atomic(run / "summary.json", summary)
    page = report(run) if is_first() else run / "report.html"
    console.final_table(summary)
    if config.ppo.save_rollouts:
        console.stage_line("next", f"rlhf inspect_rollout {run}")
    console.stage_line("report", str(page))
    return summary


def check(config: ChainConfig) -> None:
    """What would fail hours later, refused now."""
    if config.evaluation.judge is None and not config.data.judge_fraction:
        config_error = "evaluation.judge is null, so a second reward model judges: give data.judge_fraction (say 0.5)"
        raise InputError(config_error)
    for name in ("judge", "parts", "refused"):
        spec = getattr(config.evaluation, name)
        if spec and ":" in spec and not Path(spec).exists():
            configs.import_function(spec)
    for spec in (config.data.make, config.data.labeler, *(config.ppo.reward_functions or [])):
        if spec:
            configs.import_function(spec)
    run = Path(config.output_dir).absolute()
    for section in (config.data, config.sft, config.reward_model, config.ppo, config.evaluation):
        given = {name: getattr(section, name, None) for name in (*DATA_FIELDS, *MODEL_FIELDS)}
        for name, place in given.items():
            if place and not Path(place).absolute().is_relative_to(run):  # what is in the run, a stage may yet write
                require_there(place) if name in DATA_FIELDS else require_tokenizer(place)


def require_tokenizer(model: str) -> None:
    """Raise InputError where a model's folder or hub id has no tokenizer that loads."""
    from rlhf.models.loading import load_tokenizer

    load_tokenizer(model)


def make_data(config: DataConfig) -> dict[str, Any]:
    """The data stage: a function of the config writes the files that the other stages read."""
    part = FunctionConfig(
        output_dir=config.output_dir,
        seed=config.seed,
        function=str(config.make),
        options=config.options,
        overwrite=config.overwrite,
    )
    stage = open_stage("data", part, {})
    if stage.complete:
        return stage.outputs
    function = configs.import_function(part.function)
    stage.begin()
    return stage.finish(function(stage.folder, seed=part.seed, **part.options))


def make_base(config: FunctionConfig) -> dict[str, Any]:
    """The base stage: a function of the config makes the model that supervised fine-tuning starts from."""
    data = Path(config.output_dir).parent / "data"
    stage = open_stage("base", config, {"data": data if data.exists() else None})
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
        outputs = function(data, stage.folder, seed=config.seed, log=log, **config.options)
    if bar:
        bar.close()
    return stage.finish({name: value for name, value in outputs.items() if name != "seconds"})


def judge_config(config: ChainConfig) -> RewardRecipe:
    """The second reward model: same settings, another seed, prompts that nothing else saw."""
    run = Path(config.output_dir)
    return replace(
        config.reward_model, output_dir=str(run / "judge"), seed=config.reward_model.seed + 1,
        train_data=str(run / "rankings" / "judge.jsonl"), seeds=None, sizes=None,
    )  # fmt: skip


def main(argv: list[str]) -> None:
    chain(configs.load(ChainConfig, argv, description=__doc__ or ""))


if __name__ == "__main__":
    configs.run(main)
