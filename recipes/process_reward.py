"""A process or outcome reward model from labelled steps.

    rlhf process_reward --model runs/my/sft --train_data steps.jsonl \\
        --output_dir runs/my/process_reward
    rlhf process_reward --config toy_steps.yaml    # its section
    rlhf process_reward --config toy_steps.yaml --kind outcome \\
        --output_dir runs/toy_steps/outcome

Rows are solutions in steps with a label each; PRM800K, Math-Shepherd and trl's
stepwise rows are read as they are. Problems are never in two splits. Writes
process_reward.json and a report card, process_report.html.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from reward_models.config import ProcessConfig
from reward_models.steps import read_steps
from rlhf import config as configs
from rlhf.rows.records import StepLabels
from rlhf.run import console
from rlhf.run.checkpoint import write_json_atomic
from rlhf.run.owner import by_main
from rlhf.run.precision import compute_dtype
from rlhf.run.stages import POLICIES
from rlhf_recipes.splits import Splits, read_splits
from rlhf_recipes.stage import (
    SECTIONS,
    Stage,
    check_kept,
    check_model,
    from_siblings,
    next_command,
    open_stage,
    train_and_save,
)

if TYPE_CHECKING:
    from reward_models.process_trainer import ProcessTrainer

console.quiet()


@dataclass(frozen=True, kw_only=True)
class ProcessRecipe(ProcessConfig):
    """Training a process or outcome reward model on labelled steps, and its accuracy on held-out problems."""

    MOST_USED = (
        "model", "train_data", "eval_data", "output_dir", "kind", "head", "epochs", "learning_rate",
        "solutions_per_batch", "microbatch_size", "max_length", "lora_rank",
    )  # fmt: skip

    "Model and data"

    model: str | None = None
    """Model whose trunk carries the head: an SFT model, or an encoder; default: the run's `sft`."""
    train_data: str | None = None
    """Solutions with labelled steps; default: the run's data/steps.jsonl."""
    eval_data: str | None = None
    """Held-out solutions; default: the run's data/steps_held_out.jsonl, else a tenth of train_data's problems."""
    selection_data: str | None = None
    """Solutions by whose loss keep_best chooses; null: a tenth of the training problems is set aside for it."""
    solution: Literal["min", "product", "last"] = "min"
    """How a solution's score is made of its steps' probabilities, in the card."""

    "Run"

    keep_checkpoint: bool = False
    """Keep the last checkpoint once the stage is complete, to train it longer later; needs save_steps."""
    overwrite: bool = False
    """Replace another run's output in output_dir."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kept(self)


def process_reward(config: ProcessRecipe, name: str = "process_reward") -> dict[str, Any]:
    """The stage: train, save, measure on held-out problems."""
    config, sources = inputs(config)
    stage = open_stage(name, config, sources)
    if stage.complete:
        return stage.outputs
    data = read_splits(config, read_steps, config.keep_best)
    trainer = build(config, data)  # finds what is wrong with the input, before anything is written
    stage.begin()
    train_and_save(trainer, stage, name, "step_accuracy")
    outputs = by_main(lambda: measure(config, data, stage))
    outputs |= {"training_solutions": len(trainer.train_dataset)}
    if trainer.best is not None:
        outputs |= {"best_step": trainer.best.step, "best_eval_loss": trainer.best.eval_loss}
    stage.finish(outputs, trainer.processing_class, str(config.model))
    return outputs


def inputs(config: ProcessRecipe) -> tuple[ProcessRecipe, dict[str, Any]]:
    """The config, with what it takes from the run's other stages; the model and data that the stage reads."""
    places = {"model": "sft", "train_data": "data/steps.jsonl"}
    places |= {} if config.train_data else {"eval_data": "?data/steps_held_out.jsonl"}
    config = from_siblings(config, **places)
    check_model(str(config.model), POLICIES)
    names = ("model", "train_data", "eval_data", "selection_data")
    return config, {source: getattr(config, source) for source in names}


def build(config: ProcessRecipe, data: Splits[StepLabels]) -> ProcessTrainer:
    from reward_models.process_trainer import ProcessTrainer

    watched = data.selection or (data.held_out if config.eval_steps else None)
    return ProcessTrainer(str(config.model), args=config, train_dataset=data.train, eval_dataset=watched)


def measure(config: ProcessRecipe, data: Splits[StepLabels], stage: Stage) -> dict[str, Any]:
    """Write process_reward.json and the card; return the main numbers."""
    from reward_models.card.process import metrics_of, process_report
    from reward_models.card.process_page import save_process_report
    from reward_models.process import ProcessModel

    model = ProcessModel.load(stage.folder, dtype=compute_dtype(config.bf16), solution=config.solution)
    report = process_report(model, data.held_out, data.train, config.seed)
    metrics = metrics_of(report)
    write_json_atomic(stage.folder / "process_reward.json", {"metrics": metrics, "report": report})
    about = {"process_model": stage.folder.name, "model": str(config.model), "kind": config.kind, "head": config.head}
    save_process_report(report, stage.folder, about | {"held out": _named(config.eval_data, data.held_out)})
    shown = {name: metric["value"] for name, metric in metrics.items()}
    return shown | {f"{name}_ci": [metric["low"], metric["high"]] for name, metric in metrics.items()}


def _named(source: str | None, records: Sequence[StepLabels]) -> str:
    return f"{len(records):,} solutions of {Path(source).name if source else 'a tenth of the problems'}"


def main(argv: list[str]) -> None:
    config = configs.load(
        ProcessRecipe, argv, section="process_reward", known_sections=SECTIONS, description=__doc__ or ""
    )
    process_reward(config)
    also = () if "--config" in argv else ("--process_model", config.output_dir, "--step_score_coef", "1")
    next_command("ppo", argv, config.output_dir, also=also, train_data="rankings/prompts.jsonl")


if __name__ == "__main__":
    configs.run(main)
