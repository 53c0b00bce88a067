"""Supervised fine-tuning on demonstrations.

    rlhf sft --model HuggingFaceTB/SmolLM2-135M-Instruct \\
        --train_data demos.jsonl --output_dir runs/my/sft
    rlhf sft --config toy.yaml    # its `sft:` section, the run's inputs
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf import config as configs
from rlhf.rows.records import read_demonstrations
from rlhf.run import console
from rlhf.run.checkpoint import full_disk_explained
from rlhf.sft.config import SFTConfig
from rlhf_recipes.stage import SECTIONS, check_kept, check_model, from_siblings, next_command, open_stage

console.quiet()


@dataclass(frozen=True, kw_only=True)
class SFTRecipe(SFTConfig):
    """Supervised fine-tuning of a model on demonstrations."""

    MOST_USED = (
        "model", "train_data", "eval_data", "output_dir", "epochs", "learning_rate", "batch_size", "microbatch_size",
        "max_length", "lora_rank",
    )  # fmt: skip

    "Model and data"

    model: str | None = None
    """Folder or hub id to start from; default: the run's `base`."""
    train_data: str | None = None
    """Demonstrations: .jsonl(.gz), folder or hub id; default: the run's data/demonstrations.jsonl,
    else the best responses of its rankings/train.jsonl."""
    eval_data: str | None = None
    """Held-out demonstrations, for eval_loss."""
    max_rows: int | None = None
    """Use only the first so many demonstrations."""

    "Run"

    keep_checkpoint: bool = False
    """Keep the last checkpoint once the stage is complete, to train it longer later; needs save_steps."""
    overwrite: bool = False
    """Replace another run's output in output_dir."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kept(self)


def sft(config: SFTRecipe) -> dict[str, Any]:
    """The stage: train, save, leave a manifest; its numbers."""
    config, sources = inputs(config)
    stage = open_stage("sft", config, sources)
    if stage.complete:
        return stage.outputs
    from rlhf.run.callbacks import attach
    from rlhf.sft.trainer import SFTTrainer

    rows = read_demonstrations(config.train_data, on_bad_row=config.on_bad_row)[: config.max_rows]
    trainer = SFTTrainer(str(config.model), args=config, train_dataset=rows, eval_dataset=config.eval_data)
    attach(trainer, "sft", ("loss", "token_accuracy", "learning_rate"), stage.folder)
    stage.begin()
    trainer.train(resume_from_checkpoint=True)
    outputs = {"loss": mean_loss(trainer.state.log_history), "demonstrations": len(trainer.train_dataset)}
    if config.eval_data:
        outputs |= trainer.evaluate()
    with full_disk_explained(stage.folder):
        trainer.save_model(str(stage.folder))
    return stage.finish(outputs, trainer.processing_class, str(config.model))


def inputs(config: SFTRecipe) -> tuple[SFTRecipe, dict[str, Any]]:
    """The config, with what it takes from the run's other stages; the models and data that the stage reads."""
    demonstrations = "data/demonstrations.jsonl"
    if not (Path(config.output_dir).parent / demonstrations).exists():
        demonstrations = "rankings/train.jsonl"
    config = from_siblings(config, model="base", train_data=demonstrations)
    check_model(str(config.model), ("base", "sft", "ppo"))
    return config, {"model": config.model, "train_data": config.train_data, "eval_data": config.eval_data}


def mean_loss(log: Sequence[Mapping[str, float]]) -> float:
    """The mean training loss over the logged steps, before and after a resume (Trainer's own knows those after it)."""
    total, before = 0.0, 0.0
    for line in log:
        if "loss" in line:
            total += line["loss"] * (line["step"] - before)
            before = line["step"]
    return total / before if before else float("nan")


def main(argv: list[str]) -> None:
    config = configs.load(SFTRecipe, argv, section="sft", known_sections=SECTIONS, description=__doc__ or "")
    sft(config)
    if "--config" in argv:
        next_command("rankings", argv, config.output_dir)
    else:
        next_command("reward_model", argv, config.output_dir, train_data="rankings/pairs.jsonl")


if __name__ == "__main__":
    configs.run(main)
