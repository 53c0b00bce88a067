"""`ProcessTrainer`: train a process or outcome reward model on solutions whose steps are labelled.

The trunk, adapters, checkpoints and checks are `RewardTrainer`'s; the data, the loss and what is read are its own. Each
labelled step of an optimizer step weighs the same (Uesato et al. 2022, 2211.14275; Lightman et al. 2023, 2305.20050).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from datasets import Dataset, Features, List, Value
from jaxtyping import Float, Int
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from reward_models import losses
from reward_models.config import ProcessConfig
from reward_models.encoding import compact, logger, scale_weights, tell_too_long, weight_of
from reward_models.process import About, probabilities, read_solution, step_logits
from reward_models.steps import conversation_of, outcome, read_steps
from reward_models.trainer import RewardTrainer
from rlhf import chat
from rlhf.errors import InputError
from rlhf.models import encoders
from rlhf.models.positions import Positions
from rlhf.padding import pad
from rlhf.rows.records import BadRows, OnBadRow, StepLabels
from rlhf.rows.sources import Source

TOGETHER = 16
"""Sequences that an encoder reads in one forward."""


class EncodedSolution(TypedDict):
    """A labelled solution as its model reads it: see `reward_models.process.Reading`."""

    sequences: Sequence[Sequence[int]]
    ends: Sequence[Sequence[int]]
    labels: Sequence[int]
    """1, 0 or -1 for each of `ends`, one sequence after the other."""
    weight: float
    """Weight in the loss, 1 on average: the row's column `weight` times its labeler's weight."""
    row: int
    """Index of the solution in the data."""


class SolutionBatch(TypedDict):
    """Several solutions' sequences as one flat batch, padded on the right, and the positions that are read in it."""

    input_ids: Int[Tensor, "s T"]
    attention_mask: Int[Tensor, "s T"]
    sequences: Int[Tensor, " n"]
    """Row of `input_ids` of each label."""
    ends: Int[Tensor, " n"]
    targets: Int[Tensor, " n"]
    """The labels, under a name by which transformers counts nothing."""
    prompts: Int[Tensor, " n"]
    """Index, within the batch, of each label's solution."""
    weights: Float[Tensor, " n"]
    row: Int[Tensor, " solutions"]
    """Indices of the solutions in the data."""


def encode_solutions(
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[StepLabels],
    about: About,
    encoder: bool,
    max_length: int,
    name: str,
    labeler_weights: Mapping[str, float] | None = None,
    on_bad_row: OnBadRow = "refuse",
    positions: Positions | None = None,
) -> Dataset:
    """Encode labelled solutions, one row each, with the columns of `EncodedSolution`; steps without a label are read
    over.

    Leaves out, and counts in the log, solutions without a label (for an outcome model: of unknown outcome) and those of
    more than `max_length` tokens. on_bad_row: what becomes of those that the chat template refuses. Raises InputError
    when nothing remains, or a solution that remains is longer than `positions`.
    """
    rows: list[EncodedSolution] = []
    unknown, too_long, joined = 0, dict[int, int](), 0
    refused = BadRows(name, on_bad_row)
    for number, record in enumerate(records):
        labels = [outcome(record)] if about.kind == "outcome" else list(record.labels)
        if all(label is None for label in labels):
            unknown += 1
            continue
        try:
            read = read_solution(tokenizer, about, encoder, conversation_of(record, about.separator), record.columns)
        except InputError as error:
            refused.add(record.where, error)
            continue
        if about.kind == "process" and sum(map(len, read.ends)) != len(labels):
            seen = f"{len(labels)} steps, of which {sum(map(len, read.ends))} are not blank"
            refused.add(record.where, InputError(f"steps: {seen}; leave out steps that hold the separator alone"))
            continue
        joined += sum(about.separator in step.strip() for step in record.steps)
        row = _labelled(read.sequences, read.ends, labels)
        longest = max(map(len, row["sequences"]))
        if longest > max_length:
            too_long[number] = longest
            continue
        if positions is not None:
            what, remedy = f"{name}: solution {number + 1} has", f"max_length={positions.limit} leaves such out"
            positions.check(longest, what, remedy)
        row["weight"], row["row"] = weight_of(record, labeler_weights, f"{name}: solution {number + 1}"), number
        rows.append(row)
    refused.tell(len(rows) + unknown + len(too_long))
    tell_too_long(records, too_long, max_length, name, "solutions", len(rows))
    if unknown:
        logger.warning("%s: left out %d of %d solutions without a label to learn", name, unknown, len(records))
    if joined:
        logger.warning("%s: %d steps hold the separator %r, which became a space", name, joined, about.separator)
    if not rows:
        raise InputError(f"{name}: none of {len(records)} solutions has a label; nothing can be learnt")
    scale_weights(rows, name)
    features = {"sequences": List(List(Value("int32"))), "ends": List(List(Value("int32"))), "row": Value("int64")}
    features |= {"labels": List(Value("int8")), "weight": Value("float32")}
    return Dataset.from_list(cast(Any, rows), features=Features(features))


def _labelled(
    sequences: Sequence[list[int]], ends: Sequence[list[int]], labels: Sequence[int | None]
) -> EncodedSolution:
    """Keep the positions that have a label, and of each sequence what stands before the last of them."""
    known, kept_ids, kept_ends, kept = iter(labels), [], [], []
    for ids, places in zip(sequences, ends, strict=True):
        own = [(place, label) for place in places if (label := next(known)) is not None]
        if own:
            kept_ids.append(compact(ids[: own[-1][0] + 1]))
            kept_ends.append([place for place, _ in own])
            kept += [label for _, label in own]
    return {"sequences": kept_ids, "ends": kept_ends, "labels": kept, "weight": 1.0, "row": 0}


@dataclass(frozen=True)
class SolutionCollator:
    """Collates encoded solutions into a batch."""

    pad_id: int

    def __call__(self, rows: Sequence[EncodedSolution]) -> SolutionBatch:
        pairs = [zip(row["sequences"], row["ends"], strict=True) for row in rows]
        parts = [(number, ids, ends) for number, own in enumerate(pairs) for ids, ends in own]
        input_ids, mask = pad([ids for _, ids, _ in parts], self.pad_id)
        sizes = torch.tensor([len(ends) for _, _, ends in parts])
        prompts = torch.tensor([n for n, _, _ in parts]).repeat_interleave(sizes)
        return {
            "input_ids": input_ids,
            "attention_mask": mask.long(),
            "sequences": torch.arange(len(parts)).repeat_interleave(sizes),
            "ends": torch.tensor([end for _, _, ends in parts for end in ends]),
            "targets": torch.tensor([label for row in rows for label in row["labels"]]),
            "prompts": prompts,
            "weights": torch.tensor([float(row["weight"]) for row in rows])[prompts],
            "row": torch.tensor([row["row"] for row in rows]),
        }


class ProcessTrainer(RewardTrainer):
    """Trains a process reward model (a probability per step) or an outcome reward model (one per solution).

    ::

        trainer = ProcessTrainer("my_sft_model", args=ProcessConfig(output_dir="prm"), train_dataset="steps.jsonl")
        trainer.train()
        trainer.save_model()

    model, processing_class, peft_config: as of `RewardTrainer`. train_dataset, eval_dataset: any source that
    `reward_models.steps.read_steps` reads. `evaluate()` gives `eval_loss` and `eval_step_accuracy`, means over all
    labelled steps. `save_model` writes process.json beside the model: a folder for `ProcessModel.load`.
    """

    CONFIG = ProcessConfig
    ENCODED = "ends"
    SHOWN = ("loss", "step_accuracy", "eval_step_accuracy")
    config: ProcessConfig

    def __init__(
        self,
        model: str | Path | PreTrainedModel | PeftModel,
        args: ProcessConfig | None = None,
        *,
        train_dataset: Source,
        eval_dataset: Source | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: LoraConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        super().__init__(
            model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, processing_class=processing_class,
            peft_config=peft_config, callbacks=callbacks,
        )  # fmt: skip

    @property
    def about(self) -> About:
        """Return what a saved model's folder says of it."""
        config, template = self.config, chat.template_hash(self._tokenizer)
        return About(kind=config.kind, head=config.head, separator=config.separator, template_hash=template)

    def read(self, source: Source, split: str) -> list[StepLabels]:
        """Read labelled solutions."""
        return read_steps(source, split, self.config.on_bad_row)

    def encoded(self, records: list[StepLabels], name: str) -> Dataset:
        """Encode labelled solutions as rows for the collator."""
        settings = (self.config.labeler_weights, self.config.on_bad_row, self._positions)
        return encode_solutions(
            self._tokenizer, records, self.about, self._of_encoder, self._max_length, name, *settings
        )

    def collator(self) -> SolutionCollator:
        """Return what makes a batch of encoded solutions."""
        return SolutionCollator(chat.pad_id(self._tokenizer))

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:  # type: ignore[override]
        """Return the dataset as it is; trl's method would look for rankings in it."""
        return dataset

    def count(self, batch: Any, real: int) -> int:
        """Take solutions behind the first `real`, which repeat others, out of the loss; return the steps of the
        rest."""
        own = batch["prompts"] < real
        batch["weights"] = torch.where(own, batch["weights"], 0.0)
        return int(own.sum())

    def scores(self, model: nn.Module, inputs: Any) -> Float[Tensor, "n ..."]:
        """Return the head's numbers at the ends of the labelled steps, [n] or [n, 3] in float32. The model is called
        through accelerate's wrapper (DDP, FSDP, autocast)."""
        sequences, ends = inputs["sequences"], inputs["ends"]
        if self._of_encoder:
            return self._encoder_scores(model, inputs["input_ids"], inputs["attention_mask"])[sequences]
        return self.head_outputs(model, inputs)[sequences, ends].squeeze(-1).float()

    def _encoder_scores(
        self, model: nn.Module, input_ids: Int[Tensor, "s T"], mask: Int[Tensor, "s T"]
    ) -> Float[Tensor, "s ..."]:
        """Return an encoder's numbers for every sequence, those of like length read together: a batch holds the first
        steps of solutions beside whole ones, so nearly half of it is padding."""
        if self.accelerator.num_processes > 1:  # DDP wants one forward per backward
            return encoders.encoder_scores(model, input_ids, mask)
        lengths = mask.sum(-1)
        order = lengths.argsort()
        parts = []
        for rows in order.split(TOGETHER):
            width = int(lengths[rows].max())
            parts.append(encoders.encoder_scores(model, input_ids[rows, :width], mask[rows, :width]))
        return torch.cat(parts)[order.argsort()]

    def plain_scores(self, model: Any, inputs: Any) -> Tensor:
        """Return the same numbers as `ProcessModel` computes them."""
        names = ("input_ids", "attention_mask", "sequences", "ends")
        return step_logits(model, *(inputs[name] for name in names))

    def loss(
        self, scores: Float[Tensor, "n ..."], inputs: Any, count: Tensor | float | None = None
    ) -> Float[Tensor, ""]:
        """Compute the loss of a batch's steps, divided by `count` steps; without it their sum. Override it for a loss
        of your own."""
        formula = losses.step_class_loss if self.config.labels == 3 else losses.step_loss
        divisor = 1.0 if count is None else count
        return formula(scores, inputs["targets"], divisor, inputs["weights"], self.config.label_smoothing)

    def sums(self, scores: Float[Tensor, "n ..."], inputs: Any) -> Tensor:
        """Return the number of steps that the model gets right, and of all steps; a neutral step counts as right."""
        right = ((probabilities(scores) >= 0.5) == (inputs["targets"] >= 0)) & (inputs["weights"] > 0)
        return torch.stack([right.sum(), (inputs["weights"] > 0).sum()]).float()

    def means(self, totals: Sequence[float]) -> dict[str, float]:
        """Return the metrics that `sums` over several batches come to."""
        return {"step_accuracy": totals[0] / max(1.0, totals[1])}

    def evaluated(self, loss: float, totals: Sequence[float], rows: int) -> dict[str, float]:
        """Return the metrics of an evaluation. loss: the sum over all steps."""
        steps = max(1.0, totals[1])
        return {"loss": loss / steps, **self.means(totals), "solutions": rows}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write model (or adapter), tokenizer and process.json: a folder for `ProcessModel.load`."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            self.about.save(output_dir or self.config.output_dir)
