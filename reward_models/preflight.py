"""Preflight checks of a reward or process model before training, on a few of the run's rankings or solutions."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from datasets import Dataset
from torch import Tensor, nn

from reward_models.config import RewardConfig
from rlhf.models.heads import embedding_rows
from rlhf.models.loading import is_quantized
from rlhf.models.scalar import load_scalar_model, score_head
from rlhf.preflight import text as on_text
from rlhf.preflight.measure import (
    COPIED,
    SAVED,
    SHARDED,
    Finding,
    check_gradients,
    gap,
    is_exact,
    lengthened,
    limits,
    max_positions,
    range_of,
    same_after_reload,
)
from rlhf.preflight.run import Checked, conclude, run_checks, untouched
from rlhf.run import distributed


class CheckedTrainer(Checked, Protocol):
    """The parts of a `RewardTrainer` or `ProcessTrainer` that the checks read."""

    config: RewardConfig

    def scores(self, model: nn.Module, inputs: Any) -> Tensor: ...

    def plain_scores(self, model: Any, inputs: Any) -> Tensor: ...

    def loss(self, scores: Tensor, inputs: Any) -> Tensor: ...


def check_pairs(data: Dataset) -> Finding:
    """Check that chosen and rejected differ as token sequences."""
    rows = [data[i] for i in range(min(512, len(data)))]
    same = sum(row["chosen_ids"] == row["rejected_ids"] for row in rows)
    return Finding(
        "pairs",
        f"{same} of the first {len(rows)} rankings have the same tokens chosen and rejected",
        same < len(rows),
        "there is nothing to tell apart: both columns hold the same text, or the tokenizer drops the difference",
        "check the columns chosen and rejected",
    )


def check_labels(data: Dataset) -> Finding:
    """Check that some labels say wrong, and others not."""
    labels = [label for i in range(min(512, len(data))) for label in data[i]["labels"]]
    wrong = sum(label < 0 for label in labels)
    return Finding(
        "labels",
        f"{wrong} of the {len(labels)} labels of the first {min(512, len(data))} solutions say wrong",
        0 < wrong < len(labels),
        "there is nothing to tell apart: every label says the same",
        "check the labels: 1 is right, 0 neutral, -1 wrong, null unknown",
    )


def check_categories(data: Dataset) -> Finding:
    """Check that a category has texts with it and texts without it."""
    rows = [data[i]["targets"] for i in range(min(512, len(data)))]
    columns = [{label for label in column if label >= 0} for column in zip(*rows, strict=True)]
    told = sum(column == {0, 1} for column in columns)
    return Finding(
        "categories",
        f"{told} of {len(columns)} categories have both labels among the first {len(rows)} texts",
        told > 0,
        "there is nothing to tell apart: every known label of a category says the same",
        "check the labels: 1 has the category, 0 has it not, a missing one is unknown",
    )


@torch.no_grad()
def check_scores(trainer: CheckedTrainer) -> Finding:
    """Check that scores are finite and that training and scoring give the same ones: both read the same positions.

    Scoring needs a whole model. For a sharded one `check_saved` compares both."""
    batch = _batch(trainer, _rows(trainer))
    trained = _train_scores(trainer, batch)
    scored = trained if distributed.is_sharded(trainer.model) else _plain_scores(trainer, batch)
    apart = gap(trained, scored)
    return Finding(
        "scores",
        f"{len(scored)} scores {range_of(scored)}, {apart[0]:.3g} between training's path and scoring's",
        bool(trained.isfinite().all()) and not limits(_exact(trainer)).refuse(apart),
        "scores are not finite, or training reads them at another position than RewardModel",
        "read scores at the last real token, by attention mask and not by searching a pad id",
    )


@torch.no_grad()
def check_score_padding(trainer: CheckedTrainer) -> Finding:
    """Check that the scores of a row don't change beside a much longer one."""
    rows = _rows(trainer)
    alone = _train_scores(trainer, _batch(trainer, rows[:1]))
    lengths = max(map(len, _sequences(rows[0])))
    longer = lengthened(list(_sequences(rows[-1])[0]), lengths, max_positions(trainer.model))
    beside = _train_scores(trainer, _batch(trainer, [rows[0], _with(rows[-1], longer)]))
    apart = gap(beside[: len(alone)], alone)
    return Finding(
        "padding",
        f"beside a response of {len(longer)} tokens, scores of one of {lengths} move by {apart[0]:.3g}",
        not limits(_exact(trainer)).refuse(apart),
        "rows of a batch are not independent, or the score is read on padding",
        "read scores at the last real token, and use an attention that honours the attention mask",
    )


def check_score_gradients(trainer: CheckedTrainer) -> Finding:
    """Check that every trainable tensor gets a gradient and that the scalar head's (it must be trainable) is not 0."""
    head = score_head(trainer.model)
    if not any(p.requires_grad for p in head.parameters()):
        return Finding(
            "gradients",
            "the scalar head is frozen",
            False,
            "an adapter trains and saves the head only where its config names it",
            "peft_config needs task_type='SEQ_CLS' or modules_to_save=['score']",
        )
    if trainer.accelerator.distributed_type in SHARDED:
        return Finding("gradients", "not measured: weights are sharded", True)
    batch = _batch(trainer, _rows(trainer)[:2])
    name = next(name for name, module in trainer.model.named_modules() if module is head)
    return check_gradients(trainer.model, trainer.loss(_train_scores(trainer, batch), batch), (f"{name}.",))


@torch.no_grad()
def check_saved(trainer: CheckedTrainer) -> Finding:
    """Check that the model, saved to a temporary folder and loaded again, gives the same scores."""
    model, sharded = trainer.model, distributed.is_sharded(trainer.model)
    if is_quantized(model):
        return Finding("reload", "not measured: the saved adapter is loaded over the base in 16 or 32 bits", True)
    if trainer.accelerator.distributed_type in SHARDED:
        return Finding("reload", "not measured: weights are sharded", True)
    if sharded and not _exact(trainer):
        return Finding("reload", "not measured: the model is sharded, in bfloat16", True)
    written = sum(p.numel() for p in model.parameters() if p.requires_grad or not hasattr(model, "peft_config"))
    if written > SAVED or sum(p.numel() for p in model.parameters()) > COPIED:
        return Finding(
            "reload", f"not measured: {written / 1e6:.0f} M parameters are too many to write for a check", True
        )
    batch = _batch(trainer, _rows(trainer)[:2])
    before = _train_scores(trainer, batch) if sharded else _plain_scores(trainer, batch)
    state = trainer.accelerator.get_state_dict(model) if sharded else None  # gathered from all processes
    if not trainer.accelerator.is_main_process:
        return Finding("reload", "measured by the main process", True)
    torch.seed()  # weights missing in the folder are drawn anew at load: give them other values than before
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, state_dict=state)
        trainer.processing_class.save_pretrained(folder)
        fresh = load_scalar_model(folder, model.dtype, trainer.config.labels)[0].to(model.device)
        return same_after_reload(before, _plain_scores(trainer, batch, fresh), "it")


def _exact(trainer: CheckedTrainer) -> bool:
    return is_exact(trainer.accelerator, trainer.model)


def _rows(trainer: CheckedTrainer) -> list[dict[str, Any]]:
    """Return three rows, shortest first: the last is the longest of at most 128 tokens, or of the three shortest."""
    data = trainer.train_dataset
    rows = sorted((data[i] for i in range(min(64, len(data)))), key=lambda row: len(_sequences(row)[0]))
    fitting = [row for row in rows if len(_sequences(row)[0]) <= 128]
    fitting = fitting if len(fitting) > 2 else rows[:3]
    return [fitting[0], fitting[len(fitting) // 2], fitting[-1]]


def _sequences(row: dict[str, Any]) -> list[Any]:
    """Return the token sequences of an encoded solution or text, or of a ranking's first two responses."""
    if "windows" in row:
        return row["windows"]
    return row["sequences"] if "sequences" in row else [row["chosen_ids"], row["rejected_ids"]]


def _with(row: dict[str, Any], ids: list[int]) -> dict[str, Any]:
    """Return the row with other tokens."""
    if "windows" in row:
        return {**row, "windows": [ids]}
    if "sequences" in row:
        return {**row, "sequences": [ids], "ends": [[len(ids) - 1]], "labels": row["labels"][:1]}
    return {**row, "chosen_ids": ids, "rejected_ids": ids}


def _batch(trainer: CheckedTrainer, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {name: tensor.to(trainer.model.device) for name, tensor in trainer.data_collator(rows).items()}


def _train_scores(trainer: CheckedTrainer, batch: dict[str, Tensor]) -> Tensor:
    with trainer.accelerator.autocast():
        return trainer.scores(trainer.model, batch)


def _plain_scores(trainer: CheckedTrainer, batch: dict[str, Tensor], model: Any = None) -> Tensor:
    with trainer.accelerator.autocast():
        return trainer.plain_scores(model or trainer.model, batch)


def check_reward_model(trainer: CheckedTrainer) -> list[Finding]:
    """Check a run before its first step; return the findings, or raise InputError with every failure.

    Does nothing where `config.preflight` is off, or in a run that resumes from a checkpoint.
    """
    wanted = trainer.config.preflight and not trainer.state.global_step
    return conclude(trainer.accelerator, reward_model_findings(trainer)) if wanted else []


def reward_model_findings(trainer: CheckedTrainer) -> Iterator[list[Finding]]:
    """Yield the findings on texts, then those on the model, measured on a few rankings."""
    model, tokenizer, data = trainer.model, trainer.processing_class, trainer.train_dataset
    apart = check_categories if "targets" in data[0] else check_labels if "labels" in data[0] else check_pairs
    yield run_checks(
        ("vocabulary", lambda: on_text.check_vocabulary(tokenizer, embedding_rows(model))),
        ("injection", lambda: on_text.check_injection(tokenizer)),
        (apart.__name__.removeprefix("check_"), lambda: apart(data)),
    )
    with untouched(model):
        model.eval()
        findings = run_checks(
            ("scores", lambda: check_scores(trainer)),
            ("padding", lambda: check_score_padding(trainer)),
            ("gradients", lambda: check_score_gradients(trainer)),
            ("reload", lambda: check_saved(trainer)),
        )
    yield findings
