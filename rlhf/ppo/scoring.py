"""Scores of responses by a trainer's reward functions, under its settings for time limits and failures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rlhf import chat, scores
from rlhf.ppo.protocol import Trainer
from rlhf.records import Prompt
from rlhf.run import distributed


def raw_scores(
    trainer: Trainer, prompts: list[Prompt], texts: list[str], ids: list[list[int]], prefix: str = ""
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weighted scores [N] and each function's own; NaN marks a failure when on_score_failure="drop".

    prefix: put before the names that reward functions log; with one, their columns of samples are left out.
    """
    args, loop = trainer.args, trainer.loop
    failures: list[str] | None = None if args.on_score_failure == "error" else []
    raw, by_function = scores.score_responses(
        trainer.reward_funcs,
        trainer.reward_weights,
        prompts,
        texts,
        ids,
        columns=scores.columns_of(trainer.eval_prompts if prefix else trainer.prompts),
        answers=answers_of(trainer, prompts, texts),
        processing_class=trainer.processing_class,
        timeout_seconds=args.score_timeout_seconds,
        failures=failures,
        trainer_state=loop.state,
        log_metric=lambda name, value: loop.log_metric(prefix + name, value),
        log_extra=(lambda name, values: None) if prefix else loop.log_extra,
    )
    if failures is not None:
        scores.require_some(distributed.total(trainer.accelerator, (~raw.isnan()).sum()), failures)
    return raw, by_function


def answers_of(trainer: Trainer, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[dict[str, Any]]:
    """Parse responses' raw texts into messages: the answer, and the thinking before it."""
    tokenizer = trainer.processing_class
    return [chat.parse_response(tokenizer, text, p.columns) for p, text in zip(prompts, texts, strict=True)]
