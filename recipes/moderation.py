"""A moderation model: training one, judging with one.

    rlhf moderation --model sentence-transformers/all-MiniLM-L6-v2 \\
        --train_data labelled.jsonl --eval_data held_out.jsonl \\
        --output_dir runs/my/moderation
    rlhf moderation --model runs/my/moderation --eval_data texts.jsonl \\
        --output_dir runs/my/judged    # no train_data: it judges
    rlhf moderation --model http://127.0.0.1:8001 --guard llama_guard \\
        --eval_data held_out.jsonl --output_dir runs/my/guarded

The model gives each text a probability per category. Rows are a text and 0 or 1 per category; a missing one is unknown.
A part of the training texts is set aside, on which each category is calibrated and its threshold chosen. Writes
moderation.json and a card, moderation_report.html; judging also judged.jsonl and the two halves of the data, kept.jsonl
and flagged.jsonl.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from reward_models.labelled_texts import LabelledText, apart_from, categories_of, labels_of, read_labelled
from rlhf import config as configs
from rlhf.errors import InputError
from rlhf.rows.records import HELD_OUT, split_by_prompt
from rlhf.run import console
from rlhf.run.owner import by_main
from rlhf.run.precision import compute_dtype
from rlhf.run.stages import POLICIES
from rlhf_recipes.moderated import judge, named, write_card
from rlhf_recipes.moderation_config import ModerationRecipe
from rlhf_recipes.stage import SECTIONS, Stage, check_model, open_stage, train_and_save

if TYPE_CHECKING:
    from reward_models.moderation import ModerationModel
    from reward_models.moderation_trainer import ModerationTrainer

console.quiet()


@dataclass(frozen=True)
class Data:
    """What is trained on, measured on, calibrated on, and what (if anything) is chosen by: no text is in two."""

    train: list[LabelledText]
    held_out: list[LabelledText]
    calibration: list[LabelledText]
    selection: list[LabelledText] | None
    weights: np.ndarray
    """Of the texts of `train`, then of `calibration`: how much each counts."""


def moderation(config: ModerationRecipe, name: str = "moderation") -> dict[str, Any]:
    """The stage: train, save, calibrate, measure on held-out texts."""
    if config.trains == "head" and config.learning_rate is not None:
        raise InputError(
            f"learning_rate={config.learning_rate:g}: with trains=head no step is taken; set trains to all"
        )
    check_model(config.model, POLICIES)
    names = ("model", "train_data", "eval_data", "calibration_data")
    stage = open_stage(name, config, {source: getattr(config, source) for source in names})
    if stage.complete:
        return stage.outputs
    data = read_data(config)
    for line in one_sided(data.train, config.categories or categories_of(data.train)):
        by_main(lambda told=line: console.stage_line("warning", told))  # type: ignore[misc]
    trainer = build(config, data)  # finds what is wrong with the input, before anything is written
    stage.begin()
    train_and_save(trainer, stage, name, "label_accuracy")
    outputs = by_main(lambda: measure(config, data, stage))
    outputs |= {"training_texts": len(trainer.train_dataset)}
    if trainer.best is not None:
        outputs |= {"best_step": trainer.best.step, "best_eval_loss": trainer.best.eval_loss}
    stage.finish(outputs, trainer.processing_class, config.model)
    return outputs


def read_data(config: ModerationRecipe) -> Data:
    """Labelled texts, split by text where no file is named. A text that is held out is trained on nowhere."""
    train = read_labelled(cast(Any, config.train_data), "train", config.categories, config.on_bad_row)
    selection: list[LabelledText] | None = None
    names = config.categories
    if config.eval_data:
        held_out = read_labelled(config.eval_data, HELD_OUT, names or categories_of(train), config.on_bad_row)
        train = apart_from(train, held_out, "train_data")
    else:
        train, held_out = _split(train, 0.2, config.seed)
    if config.calibration_data:
        calibration = read_labelled(
            cast(Any, config.calibration_data), HELD_OUT, names or categories_of(train), config.on_bad_row
        )
        calibration = apart_from(calibration, held_out, "calibration_data")
        train = apart_from(train, calibration, "train_data")
    else:
        train, calibration = _split(train, config.calibration_share, config.seed + 1)
    if config.keep_best:
        train, selection = _split(train, 0.1, config.seed + 2)
    from reward_models.encoding import weight_of

    weighed = cast(Any, [*train, *calibration])
    weights = [weight_of(record, config.labeler_weights, record.where or "train_data") for record in weighed]
    return Data(train, held_out, calibration, selection, np.array(weights))


def one_sided(records: Sequence[LabelledText], categories: Sequence[str]) -> list[str]:
    """Name the categories of which nothing can be learned, since all known labels of the training texts agree."""
    found: dict[str, list[str]] = {"all have it": [], "none has it": []}
    for name in categories:
        labels = {record.labels[name] for record in records if name in record.labels}
        if len(labels) == 1:
            found["all have it" if labels.pop() else "none has it"].append(name)
    told = "nothing is learned of {}: of the training texts whose label is known, {}"
    return [told.format(", ".join(names), which) for which, names in found.items() if names]


def _split(records: list[LabelledText], share: float, seed: int) -> tuple[list[LabelledText], list[LabelledText]]:
    rest, held = split_by_prompt(records, share, seed)  # type: ignore[type-var]  # it reads `prompt` alone
    return rest, held


def build(config: ModerationRecipe, data: Data) -> ModerationTrainer:
    from reward_models.moderation_trainer import ModerationTrainer

    watched = data.selection or (data.held_out if config.eval_steps else None)
    return ModerationTrainer(config.model, args=config, train_dataset=data.train, eval_dataset=watched)


def measure(config: ModerationRecipe, data: Data, stage: Stage) -> dict[str, Any]:
    """Calibrate, choose thresholds, write moderation.json and the card; return the main numbers."""
    from reward_models.card.moderation import JudgedTexts
    from reward_models.moderation import ModerationModel
    from reward_models.words import fit_words

    model = ModerationModel.load(stage.folder, dtype=compute_dtype(config.bf16))
    model = calibrated(model, data.calibration, config.false_positive_rate, data.weights[len(data.train) :])
    model.about.save(stage.folder)
    trained_on = [*data.train, *data.calibration]  # the bag of words needs no calibration: it may have all
    texts = [record.text for record in trained_on]
    bag = fit_words(texts, labels_of(trained_on, model.categories), model.categories, config.seed, data.weights)
    said = model.probabilities([record.text for record in data.held_out])
    words = bag.logits([record.text for record in data.held_out])
    about = {"moderation_model": stage.folder.name, "trunk": config.model, "held out": named(config, data.held_out)}
    judged = JudgedTexts(data.held_out, model.about.categories, labels_of(data.held_out, model.categories), said, words)
    return write_card(judged, config.false_positive_rate, config.seed, stage.folder, about)


def calibrated(
    model: ModerationModel, records: Sequence[LabelledText], wanted: float, weights: np.ndarray | None = None
) -> ModerationModel:
    """Fit each category's scale and shift to held-out texts, and choose its threshold there. weights: of the texts, of
    which those that weigh 0 count nothing; null: all weigh the same."""
    from reward_models.thresholds import calibrate, threshold_for

    weights = np.ones(len(records)) if weights is None else weights
    weights = weights * np.count_nonzero(weights) / (weights.sum() or 1.0)  # 1 on average, as in training
    labels, logits = labels_of(records, model.categories), model.logits([record.text for record in records])
    categories = []
    for n, category in enumerate(model.about.categories):
        known = (labels[:, n] >= 0) & (weights > 0)  # NaN is not
        fitted = calibrate(logits[known, n], labels[known, n], weights[known])
        chosen = threshold_for(fitted(logits[known, n]), labels[known, n], wanted, weights[known])
        counted = {"flagged": chosen.flagged, "negatives": chosen.negatives}
        categories.append(replace(category, scale=fitted.scale, shift=fitted.shift, threshold=chosen.value, **counted))
    return model.with_categories(categories, wanted)


def main(argv: list[str]) -> None:
    config = configs.load(
        ModerationRecipe, argv, section="moderation", known_sections=SECTIONS, description=__doc__ or ""
    )
    if config.train_data is not None:
        moderation(config)
    else:
        judge(config)


if __name__ == "__main__":
    configs.run(main)
