"""Supervised fine-tuning on demonstrations.

    rlhf sft --model HuggingFaceTB/SmolLM2-135M-Instruct \\
        --train_data demos.jsonl --output_dir runs/my/sft
    rlhf sft --config toy.yaml    # its `sft:` section, the run's inputs
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf import config as configs
from rlhf.errors import InputError
from rlhf.rows.mixed import Sources
from rlhf.rows.records import HELD_OUT, Demonstration, Prompt, prompt_key, read_demonstrations, split_by_prompt
from rlhf.run import console
from rlhf.run.checkpoint import full_disk_explained
from rlhf.run.precision import compute_dtype
from rlhf.run.stages import POLICIES
from rlhf.sft.config import SFTConfig
from rlhf_recipes.stage import (
    SCORERS,
    SECTIONS,
    check_kept,
    check_model,
    from_siblings,
    next_command,
    open_stage,
    with_columns,
)

if TYPE_CHECKING:
    from rlhf.scores import RewardFunction
    from rlhf.sft.trainer import SFTTrainer
    from rlhf_recipes.best_by import BestByScore

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
    train_data: Sources | None = None
    """Demonstrations: .jsonl(.gz), folder or hub id, or a list of them with weights; default: the run's
    data/demonstrations.jsonl, else the best responses of its rankings/train.jsonl."""
    eval_data: Sources | None = None
    """Held-out demonstrations, for eval_loss; with best_by, by default a tenth of the prompts."""
    best_by: str | None = None
    """Reward model or ensemble that chooses the weights: of all evaluations (after every epoch or eval_steps, and after
    the last step) those with the highest mean score, as in InstructGPT; null: the last ones."""
    best_by_prompts: int = 64
    """Held-out prompts whose sampled responses best_by scores."""
    best_by_tokens: int = 128
    """Longest response that best_by scores."""
    columns: dict[str, str] | None = None
    """Our names of columns and what the files named here call them, as {prompt: question}; null: the same."""
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
        for name in ("best_by_prompts", "best_by_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1")


def sft(config: SFTRecipe) -> dict[str, Any]:
    """The stage: train, save, leave a manifest; its numbers."""
    config, sources = inputs(config)
    stage = open_stage("sft", config, sources)
    if stage.complete:
        return stage.outputs
    from rlhf.run.callbacks import attach
    from rlhf.sft.trainer import SFTTrainer

    rows = read_demonstrations(config.train_data, on_bad_row=config.on_bad_row)[: config.max_rows]
    held_out = read_demonstrations(config.eval_data, HELD_OUT, config.on_bad_row) if config.eval_data else None
    if config.best_by and held_out is None:
        rows, held_out = split_by_prompt(rows, 0.1, config.seed)
    scorer = load_scorer(config) if config.best_by else None
    trainer = SFTTrainer(str(config.model), args=config, train_dataset=rows, eval_dataset=held_out)
    attach(trainer, "sft", ("loss", "token_accuracy", "learning_rate"), stage.folder)
    chooser = best_by(trainer, config, held_out, scorer) if scorer and held_out else None
    stage.begin()
    trainer.train(resume_from_checkpoint=True)
    outputs = {"loss": mean_loss(trainer.state.log_history), "demonstrations": len(trainer.train_dataset)}
    if chooser:
        outputs |= chooser.take_best()
    if held_out:
        outputs |= trainer.evaluate()
    with full_disk_explained(stage.folder):
        trainer.save_model(str(stage.folder))
    stage.finish(outputs, trainer.processing_class, str(config.model))
    return outputs


def load_scorer(config: SFTRecipe) -> RewardFunction:
    from reward_models import ensemble

    return ensemble.load_scorer(str(config.best_by), dtype=compute_dtype(config.bf16))


def best_by(
    trainer: SFTTrainer, config: SFTRecipe, held_out: list[Demonstration], scorer: RewardFunction
) -> BestByScore:
    """A callback of the trainer that keeps the weights whose responses the scorer likes best."""
    from rlhf.run import strategy
    from rlhf_recipes.best_by import BestByScore

    if strategy.spreads(trainer.accelerator):
        raise InputError("best_by: not where FSDP2 or DeepSpeed cuts the model; leave it out, or train by DDP")
    prompts = list({prompt_key(row.prompt): Prompt(row.prompt, row.columns) for row in held_out}.values())
    chooser = BestByScore(trainer, scorer, prompts[: config.best_by_prompts], config.best_by_tokens, config.seed)
    trainer.add_callback(chooser)
    return chooser


def inputs(config: SFTRecipe) -> tuple[SFTRecipe, dict[str, Any]]:
    """The config, with what it takes from the run's other stages; the models and data that the stage reads."""
    config = with_columns(config, "train_data", "eval_data")
    demonstrations = "data/demonstrations.jsonl"
    if not (Path(config.output_dir).parent / demonstrations).exists():
        demonstrations = "rankings/train.jsonl"
    config = from_siblings(config, model="base", train_data=demonstrations)
    check_model(str(config.model), POLICIES)
    if config.best_by:
        check_model(config.best_by, SCORERS)
    return config, {name: getattr(config, name) for name in ("model", "train_data", "eval_data", "best_by")}


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
