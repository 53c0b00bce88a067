"""A reward model from pairs or K ranked responses.

    rlhf reward_model --model runs/my/sft --train_data pairs.jsonl \\
        --output_dir runs/my/reward_model
    rlhf reward_model --config toy.yaml    # its `reward_model:` section
    rlhf reward_model --config toy.yaml --seeds '[0,1,2]' --sizes '[500,1000]'
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

from reward_models.config import RewardConfig
from rlhf import config as configs
from rlhf.errors import InputError
from rlhf.rows.jsonl import read_object
from rlhf.rows.mixed import Sources
from rlhf.rows.records import Ranking, read_rankings, split_key
from rlhf.run import console
from rlhf.run.checkpoint import full_disk_explained, write_json_atomic
from rlhf.run.owner import by_main, wait_for_all
from rlhf.run.precision import compute_dtype
from rlhf.run.stages import BEST, POLICIES, drop_checkpoints
from rlhf_recipes.splits import Splits, read_splits
from rlhf_recipes.stage import (
    SECTIONS,
    Stage,
    check_kept,
    check_model,
    from_siblings,
    next_command,
    open_stage,
    with_columns,
)

if TYPE_CHECKING:
    from reward_models import RewardTrainer
    from rlhf.models.scalar import ScoreNormalizer

console.quiet()


@dataclass(frozen=True, kw_only=True)
class RewardRecipe(RewardConfig):
    """Training a reward model on rankings, and its accuracy on held-out prompts."""

    MOST_USED = (
        "model", "train_data", "eval_data", "output_dir", "epochs", "learning_rate", "prompts_per_batch",
        "microbatch_size", "max_length", "lora_rank",
    )  # fmt: skip

    "Model and data"

    model: str | None = None
    """SFT model whose trunk carries the score head, or an encoder; default: the run's `sft`."""
    train_data: Sources | None = None
    """Rankings or preference pairs; default: the run's rankings/train.jsonl."""
    eval_data: Sources | None = None
    """Held-out rankings; default: the run's rankings/held_out.jsonl, else a tenth of train_data's prompts."""
    selection_data: Sources | None = None
    """Rankings by whose loss keep_best and seeds choose; null: a tenth of the training prompts is set aside for it."""
    normalizer_data: Sources | None = None
    """Demonstrations whose responses get mean score 0 and spread 1; null: the training responses."""
    columns: dict[str, str] | None = None
    """Our names of columns and what the files named here call them, as {prompt: question}; null: the same."""

    "Run"

    seeds: list[int] | None = None
    """Train once per seed and save the model with the lowest loss on selection_data; null: once, with `seed`."""
    keep_seeds: bool = False
    """Keep every seed's model, in seed-<seed>/ of output_dir: the members of an ensemble (`rlhf ensemble`)."""
    sizes: list[int] | None = None
    """Also train on so many training prompts, each set within the next, and write the accuracies to sizes.json."""
    keep_checkpoint: bool = False
    """Keep the last checkpoint once the stage is complete, to train it longer later; needs save_steps."""
    overwrite: bool = False
    """Replace another run's output in output_dir."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kept(self)
        for name in ("seeds", "sizes"):
            values = getattr(self, name)
            if values is not None and (not values or min(values) < (name == "sizes") or len(set(values)) < len(values)):
                raise InputError(f"{name}={values}: write different whole numbers, such as {EXAMPLES[name]}, or null")
        if self.keep_seeds and not self.seeds:
            raise InputError("keep_seeds needs seeds, such as [0, 1, 2]")


EXAMPLES = {"seeds": "[0, 1, 2]", "sizes": "[500, 1000, 2000]"}


def reward_model(config: RewardRecipe, name: str = "reward_model") -> dict[str, Any]:
    """The stage: train (once per seed), fit the normaliser, measure held-out accuracy, save."""
    config, sources = inputs(config)
    stage = open_stage(name, config, sources)
    if stage.complete:
        by_main(lambda: clean(stage, config.keep_seeds))  # where it was killed right after the manifest
        return stage.outputs
    data = read_data(config)
    from reward_models import RewardModel
    from reward_models.card.report import report_after_training
    from rlhf.models.loading import load_tokenizer

    trainer = build(config, data.train, data)  # finds what is wrong with the input, before anything is written
    stage.begin()
    outputs: dict[str, Any] = {}
    if config.sizes:
        outputs["sizes"] = accuracy_curve(config, data, stage, name)
    outputs |= best_of_seeds(config, data, stage, name) if config.seeds else train_once(trainer, stage, name)
    wait_for_all()  # the main process has saved the model

    def measure() -> tuple[dict[str, Any], ScoreNormalizer]:
        scorer = RewardModel.load(stage.folder, dtype=compute_dtype(config.bf16))
        card = report_after_training(scorer, data.held_out, data.train, stage.folder, config.seed)
        return card, scorer.normalizer

    measured, normalizer = by_main(measure)  # the other processes score their shares
    outputs = measured | outputs
    outputs |= {"score_mean": normalizer.mean, "score_std": normalizer.std}
    if config.sizes:
        last = {"prompts": _prompts(data.train), "rankings": len(data.train)}
        outputs["sizes"].append(last | {key: outputs[key] for key in ("accuracy", "accuracy_ci", "n")})
        by_main(lambda: write_json_atomic(stage.folder / "sizes.json", outputs["sizes"]))
    stage.finish(outputs, load_tokenizer(stage.folder), str(config.model))
    by_main(lambda: clean(stage, config.keep_seeds))
    return outputs


def inputs(config: RewardRecipe) -> tuple[RewardRecipe, dict[str, Any]]:
    """The config, with what it takes from the run's other stages; the models and data that the stage reads."""
    data = ("train_data", "eval_data", "selection_data", "normalizer_data")
    config = with_columns(config, *data)
    config = from_siblings(config, model="sft", train_data="rankings/train.jsonl", eval_data="?rankings/held_out.jsonl")
    check_model(str(config.model), POLICIES)
    return config, {source: getattr(config, source) for source in ("model", *data)}


def clean(stage: Stage, keep_seeds: bool) -> None:
    """Delete the folders of seeds and sizes, which a complete stage needs no more: its manifest has their numbers."""
    for folder in [*([] if keep_seeds else stage.folder.glob("seed-*")), *stage.folder.glob("size-*")]:
        shutil.rmtree(folder)


def read_data(config: RewardRecipe) -> Splits[Ranking]:
    """Rankings, split by prompt where no file is named. All seeds are chosen by the same prompts of the selection."""
    data = read_splits(config, read_rankings, config.keep_best or bool(config.seeds))
    from reward_models.encoding import sample

    data = replace(data, selection=data.selection and sample(data.selection, config))
    if config.sizes and max(config.sizes) >= _prompts(data.train):
        raise InputError(
            f"sizes: {max(config.sizes)} is not below the {_prompts(data.train)} training prompts; leave it out"
        )
    return data


def build(config: RewardRecipe, train: Sequence[Ranking], data: Splits[Ranking]) -> RewardTrainer:
    from reward_models import RewardTrainer
    from rlhf.run import strategy

    watched = data.selection or (data.held_out if config.eval_steps else None)
    trainer = RewardTrainer(
        str(config.model),
        args=config,
        train_dataset=list(train),
        eval_dataset=watched,
        normalizer_dataset=config.normalizer_data,
    )
    if (config.seeds or config.sizes) and strategy.spreads(trainer.accelerator):
        raise InputError("seeds, sizes: not where FSDP2 or DeepSpeed cuts the model; leave them out, or train by DDP")
    return trainer


def trained(config: RewardRecipe, train: Sequence[Ranking], data: Splits[Ranking], name: str) -> RewardTrainer:
    """A trainer that has trained into config.output_dir, from where an earlier attempt stopped."""
    trainer = build(config, train, data)
    run(trainer, name)
    return trainer


def run(trainer: RewardTrainer, name: str) -> None:
    from rlhf.run.callbacks import attach

    attach(trainer, name, ("loss", "accuracy", "learning_rate"), trainer.config.output_dir)
    trainer.train(resume_from_checkpoint=True)


def train_once(trainer: RewardTrainer, stage: Stage, name: str) -> dict[str, Any]:
    run(trainer, name)
    with full_disk_explained(stage.folder):
        trainer.save_model(str(stage.folder))
    return _about(trainer)


def best_of_seeds(config: RewardRecipe, data: Splits[Ranking], stage: Stage, name: str) -> dict[str, Any]:
    """One model per seed; the one with the lowest loss on the selection data becomes the stage's."""

    def train(own: RewardRecipe) -> dict[str, Any]:
        trainer = trained(own, data.train, data, f"{name} seed {own.seed}")
        with full_disk_explained(own.output_dir):
            trainer.save_model(own.output_dir)
        measured = trainer.evaluate(data.selection)
        card = _card(trainer, data, config.seed)
        return {"eval_loss": measured["eval_loss"], "accuracy": card["accuracy"], **_about(trainer)}

    found = {
        seed: _once(replace(config, seed=seed), stage.folder / f"seed-{seed}", train) for seed in config.seeds or []
    }
    seed = min(found, key=lambda number: found[number]["eval_loss"])
    left = shutil.ignore_patterns("checkpoint-*", BEST, RESULT)
    chosen = stage.folder / f"seed-{seed}"
    by_main(lambda: str(shutil.copytree(chosen, stage.folder, ignore=left, dirs_exist_ok=True)))
    spread = {}
    for key in ("eval_loss", "accuracy"):
        values = [result[key] for result in found.values()]
        spread |= {
            f"{key}_mean": fmean(values),
            f"{key}_std": pstdev(values),
            f"{key}_range": [min(values), max(values)],
        }
    kept = {key: value for key, value in found[seed].items() if key != "accuracy"}
    return {"seed": seed, **kept, "seeds": {str(s): result for s, result in found.items()}, "seeds_spread": spread}


def accuracy_curve(config: RewardRecipe, data: Splits[Ranking], stage: Stage, name: str) -> list[dict[str, Any]]:
    """Held-out accuracy of models trained on fewer prompts, always measured on the same held-out ones."""
    keys = {split_key(ranking) for ranking in data.train}
    order = sorted(keys, key=lambda key: hashlib.sha256(f"{config.seed}:size:{key}".encode()).digest())
    points = []
    for size in sorted(config.sizes or []):
        within = set(order[:size])
        part = [ranking for ranking in data.train if split_key(ranking) in within]

        def train(own: RewardRecipe, part: list[Ranking] = part, size: int = size) -> dict[str, Any]:
            card = _card(trained(own, part, data, f"{name} {size}"), data, config.seed)
            return {key: card[key] for key in ("accuracy", "accuracy_ci", "n")}

        result = _once(config, stage.folder / f"size-{size}", train)
        points.append({"prompts": size, "rankings": len(part), **result})
    return points


RESULT = "result.json"


def _once(config: RewardRecipe, folder: Path, train: Callable[[RewardRecipe], dict[str, Any]]) -> dict[str, Any]:
    """What `train` says of one of several runs, in a folder of its own; a run that is done is not done again."""
    if not by_main((folder / RESULT).is_file):
        result = train(replace(config, output_dir=str(folder)))
        by_main(lambda: write_json_atomic(folder / RESULT, result))
        by_main(lambda: drop_checkpoints(folder))
        return result
    return read_object(folder / RESULT)


def _about(trainer: RewardTrainer) -> dict[str, Any]:
    best = {} if trainer.best is None else {"best_step": trainer.best.step, "best_eval_loss": trainer.best.eval_loss}
    return {"training_prompts": len(trainer.train_dataset), **best}


def _card(trainer: RewardTrainer, data: Splits[Ranking], seed: int) -> dict[str, Any]:
    from reward_models import RewardModel
    from reward_models.card.report import report_card

    scorer = RewardModel(trainer.model, trainer.processing_class, trainer.normalizer)
    return by_main(lambda: report_card(scorer, data.held_out, seed=seed))


def _prompts(rankings: Sequence[Ranking]) -> int:
    return len({split_key(ranking) for ranking in rankings})


def main(argv: list[str]) -> None:
    config = configs.load(
        RewardRecipe, argv, section="reward_model", known_sections=SECTIONS, description=__doc__ or ""
    )
    reward_model(config)
    next_command("ppo", argv, config.output_dir, train_data="rankings/prompts.jsonl")


if __name__ == "__main__":
    configs.run(main)
