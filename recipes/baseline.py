"""DPO, KTO, GRPO or RLOO on a run's files.

    rlhf baseline --method dpo --model runs/my/sft \\
        --train_data rankings.jsonl --output_dir runs/my/dpo
    rlhf baseline --method grpo --config toy_baselines.yaml

trl's own trainers start from the run's SFT model, as PPO does. DPO and KTO learn from its rankings, GRPO and RLOO from
the scores that PPO gets, on the same prompts. `rlhf evaluate_policy` puts all of them in one table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf import config as configs
from rlhf.config import to_dict
from rlhf.errors import InputError
from rlhf.run import console
from rlhf.run.checkpoint import full_disk_explained, write_json_atomic
from rlhf.run.owner import by_main
from rlhf.run.report import write_report
from rlhf.run.stages import POLICIES
from rlhf_recipes.baseline_config import FROM_RANKINGS, METHODS, BaselineConfig
from rlhf_recipes.stage import SCORERS, SECTIONS, check_model, from_siblings, next_command, open_stage, with_columns

if TYPE_CHECKING:
    from rlhf_recipes.stage import Stage

console.quiet()


def baseline(config: BaselineConfig) -> dict[str, Any]:
    """The stage: train, save, leave a manifest; its numbers."""
    config, sources = inputs(config)
    stage = open_stage(config.method, config, sources)
    if not stage.complete:
        train(config, stage)
    by_main(lambda: tell(config, stage))
    return stage.outputs


def train(config: BaselineConfig, stage: Stage) -> None:
    """Train, save, and finish the stage."""
    from rlhf_recipes.baseline_trainers import build, save

    watched = build(config, stage)
    stage.begin()
    trainer = watched.train()
    with full_disk_explained(stage.folder):
        save(trainer, stage.folder)
    calls = 0 if config.method in FROM_RANKINGS else config.own.updates * config.own.rollout_size
    outputs = {**numbers(trainer.state.log_history), "score_calls": calls}
    stage.finish(outputs, trainer.processing_class, str(config.model))


def tell(config: BaselineConfig, stage: Stage) -> None:
    """Write baseline.json and the report, which hold what a complete stage's manifest says, unless they are there: a
    run may have been killed between the two."""
    report, manifest = stage.folder / "report.html", stage.folder / "manifest.json"
    if not report.is_file() or report.stat().st_mtime_ns < manifest.stat().st_mtime_ns:
        write_json_atomic(stage.folder / "baseline.json", summary(config, stage))
        write_report(stage.folder)


def inputs(config: BaselineConfig) -> tuple[BaselineConfig, dict[str, Any]]:
    """The config, with what it takes from the run's other stages and without the other methods' settings; the models
    and data that the stage reads."""
    config = with_columns(config, "train_data")
    config = replace(config, **dict.fromkeys(set(METHODS) - {config.method}))
    if config.method in FROM_RANKINGS:
        if config.reward_functions:
            raise InputError(f"{config.method} learns from rankings: leave out reward_functions")
        config = from_siblings(replace(config, reward_model=None), model="sft", train_data="rankings/train.jsonl")
    else:
        optional = "?" if config.reward_functions else ""
        places = {"reward_model": f"{optional}reward_model", "train_data": "rankings/prompts.jsonl"}
        config = from_siblings(config, model="sft", **places)
    check_model(str(config.model), POLICIES)
    if config.reward_model:
        check_model(config.reward_model, SCORERS)
    return config, {name: getattr(config, name) for name in ("model", "train_data", "reward_model")}


LOGGED = {
    "loss": "loss", "reward": "score", "kl": "kl_nats_per_token", "completions/mean_length": "response_tokens",
    "completions/clipped_ratio": "cut_off", "rewards/accuracies": "accuracy", "rewards/margins": "margin",
}  # fmt: skip
"""What the manifest holds of trl's last logged line, by trl's name and ours."""


def numbers(log: list[dict[str, float]]) -> dict[str, float]:
    """Return the last logged value of what matters."""
    return {ours: line[trl] for trl, ours in LOGGED.items() for line in log if trl in line}


def summary(config: BaselineConfig, stage: Stage) -> Mapping[str, Any]:
    """Return the stage's numbers in the form that every command writes."""
    values = {**stage.outputs, "seconds": stage.seconds}
    metrics = {name: {"value": value, "low": None, "high": None, "n": None} for name, value in values.items()}
    return {"method": config.method, "config": to_dict(config), "metrics": metrics}


def main(argv: list[str]) -> None:
    config = configs.load(BaselineConfig, argv, section="baseline", known_sections=SECTIONS, description=__doc__ or "")
    if not any(word.partition("=")[0] == "--output_dir" for word in argv):
        config = replace(config, output_dir=str(Path(config.output_dir).parent / config.method))
    baseline(config)
    also = ("--policies", Path(config.output_dir).name) if "--config" not in argv else ()
    next_command("evaluate_policy", argv, config.output_dir, "comparison", also=also, policy="ppo")


if __name__ == "__main__":
    configs.run(main)
