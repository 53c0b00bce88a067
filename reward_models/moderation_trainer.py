"""`ModerationTrainer`: train a trunk with a logit per category on texts whose labels may be unknown.

The trunk, adapters, checkpoints and checks are `RewardTrainer`'s; the data, the loss and what is read are its own. Each
known label of an optimizer step weighs the same, and an unknown one nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict, cast

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from jaxtyping import Float, Int
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import TrainOutput

from reward_models import losses
from reward_models.config import ModerationConfig
from reward_models.encoding import compact, scale_weights, weight_of
from reward_models.head_fit import fit_head
from reward_models.labelled_texts import LabelledText, categories_of, labels_of, read_labelled
from reward_models.moderation import (
    WORDS_FILE,
    About,
    Category,
    highest,
    plain_logits,
    read_at_the_mean,
    read_states,
    window_logits,
    windows_of,
)
from reward_models.preflight import check_reward_model
from reward_models.scoring import CATEGORIES_FILE
from reward_models.trainer import RewardTrainer
from reward_models.words import drawn_texts, fit_words
from rlhf import chat
from rlhf.errors import InputError
from rlhf.models import encoders
from rlhf.models.adapters import base_model
from rlhf.models.scalar import is_scalar, score_head
from rlhf.padding import pad
from rlhf.rows.sources import Source
from rlhf.run.trl_arguments import LEARNING_RATE

TOKENS = 4096
"""Padded tokens per forward where the head is fitted: a memory setting."""
TOGETHER = 4
"""Windows that an encoder reads in one forward: those of like length, since texts are of very uneven length."""


class EncodedText(TypedDict):
    """A labelled text as its model reads it."""

    windows: Sequence[Sequence[int]]
    targets: Sequence[int]
    """1, 0 or -1 (unknown) for each category."""
    weight: float
    """Weight in the loss, 1 on average: the row's column `weight` times its labeler's weight."""
    row: int
    """Index of the text in the data."""


class TextBatch(TypedDict):
    """Several texts' windows as one flat batch, padded on the right."""

    input_ids: Int[Tensor, "s T"]
    attention_mask: Int[Tensor, "s T"]
    window_of: Int[Tensor, " s"]
    """Index, within the batch, of each window's text."""
    targets: Int[Tensor, "n K"]
    prompts: Int[Tensor, " n"]
    """0, 1, 2 ...: each text is a row by itself."""
    weights: Float[Tensor, " n"]
    row: Int[Tensor, " n"]
    """Indices of the texts in the data."""


def encode_texts(
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[LabelledText],
    categories: Sequence[str],
    encoder: bool,
    max_length: int,
    name: str,
    labeler_weights: Mapping[str, float] | None = None,
) -> Dataset:
    """Encode labelled texts, one row each, with the columns of `EncodedText`. Raises InputError for an unknown
    labeler."""
    rows: list[EncodedText] = [
        {
            "windows": [compact(ids) for ids in windows_of(tokenizer, record.text, max_length, encoder)],
            "targets": [int(record.labels.get(category, -1)) for category in categories],
            "weight": weight_of(cast(Any, record), labeler_weights, f"{name}: text {number + 1}"),
            "row": number,
        }
        for number, record in enumerate(records)
    ]
    scale_weights(rows, name)
    features = {"windows": List(List(Value("int32"))), "targets": List(Value("int8"))}
    features |= {"weight": Value("float32"), "row": Value("int64")}
    return Dataset.from_list(cast(Any, rows), features=Features(features))


@dataclass(frozen=True)
class TextCollator:
    """Collates encoded texts into a batch."""

    pad_id: int

    def __call__(self, rows: Sequence[EncodedText]) -> TextBatch:
        input_ids, mask = pad([ids for row in rows for ids in row["windows"]], self.pad_id)
        sizes = torch.tensor([len(row["windows"]) for row in rows])
        return {
            "input_ids": input_ids,
            "attention_mask": mask.long(),
            "window_of": torch.arange(len(rows)).repeat_interleave(sizes),
            "targets": torch.tensor([list(row["targets"]) for row in rows]),
            "prompts": torch.arange(len(rows)),
            "weights": torch.tensor([float(row["weight"]) for row in rows]),
            "row": torch.tensor([row["row"] for row in rows]),
        }


def _offsets_of(model: Any, config: ModerationConfig) -> Tensor:
    """Return what the folder that a model object was loaded from adds to its head's numbers; 0 where it says nothing.
    Raises InputError where that folder's categories are others, or stand in another order."""
    if not model.name_or_path or not Path(model.name_or_path, CATEGORIES_FILE).is_file():
        return torch.zeros(config.labels)
    held = About.read(model.name_or_path)
    if held.names != config.categories:
        seen = f"the data's are {', '.join(config.categories or ())}, the model's {', '.join(held.names)}"
        raise InputError(f"categories: {seen}; name the model's, in their order, or pass its folder for a new head")
    return held.offsets


class ModerationTrainer(RewardTrainer):
    """Trains a moderation model: a logit per category, on labels of which some are unknown.

    ::

        trainer = ModerationTrainer("my_encoder", args=ModerationConfig(output_dir="moderation"), train_dataset=rows)
        trainer.train()
        trainer.save_model()

    model, processing_class, peft_config: as of `RewardTrainer`. train_dataset, eval_dataset: any source that
    `reward_models.labelled_texts.read_labelled` reads. The head is fitted to the trunk's states first. `evaluate()`
    gives `eval_loss` and `eval_label_accuracy`, means over all known labels. `save_model` writes categories.json beside
    the model: a folder for `ModerationModel.load`, whose probabilities are not calibrated yet.
    """

    CONFIG = ModerationConfig
    ENCODED = "targets"
    SHOWN = ("loss", "label_accuracy", "eval_label_accuracy")
    config: ModerationConfig

    def __init__(
        self,
        model: str | Path | PreTrainedModel | PeftModel,
        args: ModerationConfig | None = None,
        *,
        train_dataset: Source,
        eval_dataset: Source | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: LoraConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        config = args if args is not None else ModerationConfig()
        train = read_labelled(train_dataset, "train", config.categories, config.on_bad_row)
        there = categories_of(train)
        if lacking := [name for name in config.categories or () if name not in there]:
            known = ", ".join(sorted({name for record in train for name in record.columns})) or "none"
            raise InputError(f"categories: no text has a label of {', '.join(lacking)}; other columns: {known}")
        config = replace(config, categories=list(config.categories or there))
        if config.trains == "head":  # no step is taken: there is no default rate to tell
            config = replace(config, learning_rate=config.learning_rate or LEARNING_RATE)
        continued = config.trains == "all" and isinstance(model, nn.Module) and is_scalar(model, config.labels)
        self._records, self._fits_head = train, not continued
        self.offsets = _offsets_of(model, config) if continued else torch.zeros(config.labels)
        super().__init__(
            model, config, train_dataset=cast(Any, train), eval_dataset=eval_dataset,
            processing_class=processing_class, peft_config=peft_config, callbacks=callbacks,
        )  # fmt: skip
        read_at_the_mean(cast(Any, self.model))

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Fit the head to the trunk's states; with `trains: all`, train all weights from there on, or resume. A model
        object's head of as many categories is fitted with `trains: head` alone, and else goes on as it is."""
        if self.config.trains == "all":
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        self.fit_head()
        check_reward_model(cast(Any, self))
        return TrainOutput(0, float("nan"), {})

    def begin(self, checkpoint: Path | None) -> None:
        """Fit the head, or take from a checkpoint the offsets that belong to the weights of its own."""
        if checkpoint is not None:
            self.offsets = About.read(checkpoint).offsets
        elif self._fits_head:
            self.fit_head()
        super().begin(checkpoint)

    @torch.no_grad()
    def fit_head(self) -> None:
        """Fit the head to the training texts that `drawn_texts` draws, in closed form."""
        model, data = cast(Any, self.model).eval(), cast(Dataset, self.train_dataset)
        rows = drawn_texts(np.array(data["weight"]), self.config.seed)
        drawn = data.select(rows.tolist())
        windows = [ids for row in drawn["windows"] for ids in row]
        texts = np.repeat(np.arange(len(rows)), [len(row) for row in drawn["windows"]])
        targets = np.array(drawn["targets"], dtype=np.float64)
        with self.accelerator.autocast():
            states = read_states(model, windows, chat.pad_id(self._tokenizer), TOKENS)
        labels = np.where(targets < 0, np.nan, targets)
        weights = np.array(drawn["weight"])
        fitted = fit_head(states.double().numpy(), texts, labels, weights / weights.mean(), self.config.seed)
        plain = base_model(model)
        head: Any = encoders.last_linear(plain) if self._of_encoder else score_head(plain)
        head.weight.copy_(torch.from_numpy(fitted.weight))
        bias = torch.from_numpy(fitted.bias).float()
        if getattr(head, "bias", None) is not None:
            head.bias.copy_(bias)
        else:
            self.offsets = bias

    @property
    def about(self) -> About:
        """Return what a saved model's folder says of it."""
        offsets = zip(self.config.categories or (), self.offsets.tolist(), strict=True)
        categories = tuple(Category(name=name, offset=offset) for name, offset in offsets)
        return About(categories=categories, max_length=self._max_length, reads=self.config.reads)

    def read(self, source: Source, split: str) -> list[LabelledText]:
        """Read labelled texts."""
        return read_labelled(source, split, self.config.categories, self.config.on_bad_row)

    def encoded(self, records: list[LabelledText], name: str) -> Dataset:
        """Encode labelled texts as rows for the collator."""
        settings = (self._of_encoder, self._max_length, name, self.config.labeler_weights)
        return encode_texts(self._tokenizer, records, self.config.categories or (), *settings)

    def collator(self) -> TextCollator:
        """Return what makes a batch of encoded texts."""
        return TextCollator(chat.pad_id(self._tokenizer))

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:  # type: ignore[override]
        """Return the dataset as it is; trl's method would look for rankings in it."""
        return dataset

    def count(self, batch: Any, real: int) -> int:
        """Take texts behind the first `real`, which repeat others, out of the loss; return the known labels of the
        rest."""
        own = batch["prompts"] < real
        batch["targets"] = torch.where(own[:, None], batch["targets"], -1)
        return int((batch["targets"] >= 0).sum())

    def scores(self, model: nn.Module, inputs: Any) -> Float[Tensor, "n K"]:
        """Return the logits of a batch's texts, in float32. The model is called through accelerate's wrapper (DDP,
        FSDP, autocast)."""
        mask = inputs["attention_mask"]
        if self._of_encoder:
            logits = self._encoder_logits(model, inputs["input_ids"], mask)
        else:
            last = mask.sum(-1) - 1  # padded on the right
            logits = self.head_outputs(model, inputs)[torch.arange(len(last), device=last.device), last].float()
        return highest(logits + self.offsets.to(logits.device), inputs["window_of"], len(inputs["row"]))

    def _encoder_logits(
        self, model: nn.Module, input_ids: Int[Tensor, "s T"], mask: Int[Tensor, "s T"]
    ) -> Float[Tensor, "s K"]:
        """Return an encoder's logits of every window, those of like length read together."""
        plain = cast(Any, self.model)
        if self.accelerator.num_processes > 1:  # DDP wants one forward per backward
            return window_logits(model, plain, input_ids, mask)
        lengths = mask.sum(-1)
        order = lengths.argsort()
        parts = []
        for rows in order.split(TOGETHER):
            width = int(lengths[rows].max())
            parts.append(window_logits(model, plain, input_ids[rows, :width], mask[rows, :width]))
        return torch.cat(parts)[order.argsort()]

    def plain_scores(self, model: Any, inputs: Any) -> Tensor:
        """Return the same logits as `ModerationModel` computes them."""
        logits = plain_logits(model, inputs["input_ids"], inputs["attention_mask"])
        return highest(logits + self.offsets.to(logits.device), inputs["window_of"], len(inputs["row"]))

    def loss(self, scores: Float[Tensor, "n K"], inputs: Any, count: Tensor | float | None = None) -> Float[Tensor, ""]:
        """Compute the loss of a batch's known labels, divided by `count` labels; without it their sum. Override it for
        a loss of your own."""
        divisor = 1.0 if count is None else count
        return losses.category_loss(scores, inputs["targets"], divisor, inputs["weights"], self.config.label_smoothing)

    def sums(self, scores: Float[Tensor, "n K"], inputs: Any) -> Tensor:
        """Return the number of labels that the model gets right at a probability of 0.5, and of all known labels."""
        known = (inputs["targets"] >= 0) & (inputs["weights"] > 0)[:, None]
        right = ((scores > 0) == (inputs["targets"] > 0)) & known
        return torch.stack([right.sum(), known.sum()]).float()

    def means(self, totals: Sequence[float]) -> dict[str, float]:
        """Return the metrics that `sums` over several batches come to."""
        return {"label_accuracy": totals[0] / max(1.0, totals[1])}

    def evaluated(self, loss: float, totals: Sequence[float], rows: int) -> dict[str, float]:
        """Return the metrics of an evaluation. loss: the sum over all known labels."""
        return {"loss": loss / max(1.0, totals[1]), **self.means(totals), "texts": rows}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write model (or adapter), tokenizer, categories.json and, where it is read, the bag of words: a folder for
        `ModerationModel.load`. A checkpoint has no bag of words."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            folder = Path(output_dir or self.config.output_dir)
            self.about.save(folder)
            if self.config.reads == "trunk_and_words" and not _internal_call:
                names = self.config.categories or ()
                texts, labels = [record.text for record in self._records], labels_of(self._records, names)
                weights = np.array(cast(Dataset, self.train_dataset)["weight"])
                fit_words(texts, labels, names, self.config.seed, weights).save(folder / WORDS_FILE)
