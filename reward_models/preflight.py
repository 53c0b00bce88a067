"""Preflight checks of a reward model before training, on a few of the run's rankings."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Protocol, cast

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from reward_models.config import RewardConfig
from reward_models.encoding import EncodedRanking, RankingBatch
from rlhf.models.scalar import last_token_scores, load_scalar_model, score_head
from rlhf.preflight import text as on_text
from rlhf.preflight.measure import (
    COPIED,
    SAVED,
    SHARDED,
    Finding,
    check_gradients,
    embedding_rows,
    gap,
    is_exact,
    lengthened,
    limits,
    max_positions,
    range_of,
    same_after_reload,
)
from rlhf.preflight.run import Checked, conclude, run_checks, untouched


class CheckedTrainer(Checked, Protocol):
    """The parts of a `RewardTrainer` that the checks read."""

    config: RewardConfig

    def scores(self, model: nn.Module, inputs: RankingBatch) -> Tensor: ...

    def loss(self, scores: Tensor, inputs: RankingBatch) -> Tensor: ...


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


@torch.no_grad()
def check_scores(trainer: CheckedTrainer) -> Finding:
    """Check that scores are finite and that training and scoring give the same ones: both read the last real
    position."""
    batch = _batch(trainer, _rows(trainer))
    trained, scored = _train_scores(trainer, batch), _plain_scores(trainer, batch)
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
    """Check that the scores of a ranking's responses don't change beside a much longer ranking."""
    rows = _rows(trainer)
    alone = _train_scores(trainer, _batch(trainer, rows[:1]))
    lengths = max(len(rows[0]["chosen_ids"]), len(rows[0]["rejected_ids"]))
    longer = lengthened(list(rows[-1]["chosen_ids"]), lengths, max_positions(trainer.model))
    other: EncodedRanking = {**rows[-1], "chosen_ids": longer, "rejected_ids": longer}
    beside = _train_scores(trainer, _batch(trainer, [rows[0], other]))
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
    model = trainer.model
    written = sum(p.numel() for p in model.parameters() if p.requires_grad or not hasattr(model, "peft_config"))
    if written > SAVED or sum(p.numel() for p in model.parameters()) > COPIED:
        return Finding(
            "reload", f"not measured: {written / 1e6:.0f} M parameters are too many to write for a check", True
        )
    if not trainer.accelerator.is_main_process:
        return Finding("reload", "measured by the main process", True)
    batch = _batch(trainer, _rows(trainer)[:2])
    torch.seed()  # weights missing in the folder are drawn anew at load: give them other values than before
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
        fresh = load_scalar_model(folder, model.dtype)[0].to(model.device)
        return same_after_reload(_plain_scores(trainer, batch), _plain_scores(trainer, batch, fresh), "it")


def _exact(trainer: CheckedTrainer) -> bool:
    return is_exact(trainer.accelerator, trainer.model)


def _rows(trainer: CheckedTrainer) -> list[EncodedRanking]:
    """Return three rankings, shortest first: the last is the longest of at most 128 tokens, or of the three
    shortest."""
    data = trainer.train_dataset
    rows = sorted((data[i] for i in range(min(64, len(data)))), key=lambda row: len(row["chosen_ids"]))
    fitting = [row for row in rows if len(row["chosen_ids"]) <= 128]
    fitting = fitting if len(fitting) > 2 else rows[:3]
    return [fitting[0], fitting[len(fitting) // 2], fitting[-1]]


def _batch(trainer: CheckedTrainer, rows: list[EncodedRanking]) -> RankingBatch:
    batch = {name: tensor.to(trainer.model.device) for name, tensor in trainer.data_collator(rows).items()}
    return cast(RankingBatch, batch)


def _train_scores(trainer: CheckedTrainer, batch: RankingBatch) -> Tensor:
    with trainer.accelerator.autocast():
        return trainer.scores(trainer.model, batch)


def _plain_scores(
    trainer: CheckedTrainer, batch: RankingBatch, model: PreTrainedModel | PeftModel | None = None
) -> Tensor:
    with trainer.accelerator.autocast():
        return last_token_scores(model or trainer.model, batch["input_ids"], batch["attention_mask"])


def check_reward_model(trainer: CheckedTrainer) -> list[Finding]:
    """Check a run before its first step; return the findings, or raise InputError with every failure.

    Does nothing where `config.preflight` is off, or in a run that resumes from a checkpoint.
    """
    wanted = trainer.config.preflight and not trainer.state.global_step
    return conclude(trainer.accelerator, reward_model_findings(trainer)) if wanted else []


def reward_model_findings(trainer: CheckedTrainer) -> Iterator[list[Finding]]:
    """Yield the findings on texts, then those on the model, measured on a few rankings."""
    model, tokenizer = trainer.model, trainer.processing_class
    yield run_checks(
        ("vocabulary", lambda: on_text.check_vocabulary(tokenizer, embedding_rows(model))),
        ("injection", lambda: on_text.check_injection(tokenizer)),
        ("pairs", lambda: check_pairs(trainer.train_dataset)),
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
