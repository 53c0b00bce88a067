"""Preflight checks of supervised fine-tuning, on a few of the run's demonstrations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn

from rlhf.models import packing
from rlhf.models.heads import vocabulary_rows
from rlhf.padding import IGNORED
from rlhf.preflight import text as on_text
from rlhf.preflight.base import check_base
from rlhf.preflight.measure import (
    PROMPT_TOKENS,
    Finding,
    drift,
    float32,
    gap,
    is_exact,
    lengthened,
    limits,
    max_positions,
    spread,
)
from rlhf.preflight.measure import check_gradients as gradients_of
from rlhf.preflight.run import Checked, conclude, run_checks, untouched
from rlhf.rows.records import Demonstration
from rlhf.sft.config import SFTConfig
from rlhf.sft.data import EncodedDemonstration


class CheckedTrainer(Checked, Protocol):
    """The parts of an `SFTTrainer` that the checks read."""

    config: SFTConfig
    first_demonstrations: list[Demonstration]
    given_object: bool
    """Whether the model was passed as an object, not as a folder or hub id."""


def check_padding(trainer: CheckedTrainer) -> Finding:
    """Check that a demonstration's loss doesn't change beside a much longer one."""
    rows = _rows(trainer)
    short, model = rows[0], trainer.model
    ids = lengthened(rows[-1]["input_ids"], len(short["input_ids"]), max_positions(model))
    longer: EncodedDemonstration = {"input_ids": ids, "labels": ids}
    with torch.no_grad():
        alone, beside = _logprobs(trainer, [short]), _logprobs(trainer, [short, longer])
    width = alone.shape[1]
    moved = gap(beside[:1, :width], alone)
    return Finding(
        "padding",
        f"beside a row of {len(ids)} tokens, log-probabilities of one of {len(short['input_ids'])} move by "
        f"{moved[0]:.3g} nats; its loss is {float(-alone.sum()):.4g} nats",
        not limits(is_exact(trainer.accelerator, model)).refuse(moved) and bool(alone.isfinite().all()),
        "rows of a batch are not independent: the model reads padding or its neighbours",
        "use an attention implementation that honours the attention mask (attn_implementation='sdpa')",
    )


def check_gradients(trainer: CheckedTrainer) -> Finding:
    return gradients_of(trainer.model, -_logprobs(trainer, _rows(trainer)[:2]).sum())


@torch.no_grad()
def check_precision(trainer: CheckedTrainer) -> Finding:
    """Measure how far this run's precision moves log-probabilities from float32's."""
    if is_exact(trainer.accelerator, trainer.model):
        return Finding("precision", "the run computes in float32", True)
    whole = float32(trainer.model)
    if whole is None:
        return Finding("precision", "not measured: the model is sharded, or too large for a float32 copy", True)
    rows = _rows(trainer)[:2]
    ours = _logprobs(trainer, rows)
    truth = _logprobs(trainer, rows, whole.eval())
    return drift(gap(ours, truth, ours != 0))


def _rows(trainer: CheckedTrainer) -> list[EncodedDemonstration]:
    data = trainer.train_dataset
    rows = [data[i] for i in range(min(64, len(data)))]
    return [rows[i] for i in spread([len(row["input_ids"]) for row in rows], PROMPT_TOKENS)]


def _logprobs(trainer: CheckedTrainer, rows: list[EncodedDemonstration], whole: nn.Module | None = None) -> Tensor:
    """Return log-probabilities [B, T - 1] of the labels, 0 where there is no loss; in float32 under `whole`."""
    model = trainer.model if whole is None else whole
    batch = {name: tensor.to(trainer.model.device) for name, tensor in trainer.data_collator(rows).items()}
    precision = trainer.accelerator.autocast() if whole is None else packing.decoding(whole)
    with precision:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    labels = batch["labels"][:, 1:]
    chosen = logits[:, :-1].float().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    return torch.where(labels != IGNORED, chosen, 0.0)


def check_sft(trainer: CheckedTrainer) -> list[Finding]:
    """Check a run before its first step; return the findings, or raise InputError with every failure.

    Does nothing where `config.preflight` is off, or in a run that resumes from a checkpoint.
    """
    wanted = trainer.config.preflight and not trainer.state.global_step
    return conclude(trainer.accelerator, sft_findings(trainer)) if wanted else []


def sft_findings(trainer: CheckedTrainer) -> Iterator[list[Finding]]:
    """Yield the findings on texts, then those on the model, measured on a few demonstrations."""
    model, tokenizer, first = trainer.model, trainer.processing_class, trainer.first_demonstrations
    most = trainer.config.max_length
    in_memory = trainer.given_object and isinstance(model, PeftModel)
    yield run_checks(
        ("vocabulary", lambda: on_text.check_vocabulary(tokenizer, vocabulary_rows(model))),
        ("template", lambda: on_text.check_template(tokenizer, [d.messages for d in first])),
        ("injection", lambda: on_text.check_injection(tokenizer)),
        ("trained tokens", lambda: on_text.check_trained(tokenizer, trainer.train_dataset, first, most)),
        ("stop token", lambda: on_text.check_generation_stop(tokenizer, model.generation_config)),
    )
    with untouched(model):
        model.eval()
        findings = run_checks(
            ("padding", lambda: check_padding(trainer)),
            ("gradients", lambda: check_gradients(trainer)),
            ("precision", lambda: check_precision(trainer)),
            *([("base", lambda: check_base(trainer.accelerator, model))] if in_memory else []),
        )
    yield findings
