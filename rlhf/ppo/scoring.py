"""Scores of responses by a trainer's reward functions, in training and on the evaluation prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf import chat, scores
from rlhf.models import memory
from rlhf.padding import make_batch
from rlhf.ppo.protocol import Trainer
from rlhf.rows.records import Prompt
from rlhf.run import distributed
from rlhf.run.owner import wait_for_all

FORWARD_ROWS = 16  # evaluation's responses in one forward


def raw_scores(
    trainer: Trainer, prompts: list[Prompt], texts: list[str], ids: list[list[int]], prefix: str = ""
) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
    """Return the weighted scores [N], each function's own, and the step scores [N, T] times `step_score_coef` (None
    where that is 0, or with a prefix); NaN marks a failure when on_score_failure="drop".

    prefix: put before the names that reward functions log; with one, their columns of samples are left out.
    A process without responses calls no reward function.
    """
    args, loop = trainer.args, trainer.loop
    failures: list[str] | None = None if args.on_score_failure == "error" else []
    raw, by_function = torch.zeros(0), dict[str, Tensor]()
    wanted = args.step_score_coef > 0 and not prefix
    steps = torch.zeros(len(ids), max(map(len, ids), default=0)) if wanted else None
    if texts:
        raw, by_function = scores.score_responses(
            trainer.reward_funcs,
            trainer.reward_weights,
            prompts,
            texts,
            ids,
            columns=scores.columns_of(trainer.eval_prompts if prefix else trainer.prompts),
            answers=answers_of(trainer, prompts, texts),
            processing_class=trainer.processing_class,
            stop_ids=trainer.stop_ids,
            timeout_seconds=args.score_timeout_seconds,
            failures=failures,
            step_scores=steps,
            trainer_state=loop.state,
            log_metric=lambda name, value: loop.log_metric(prefix + name, value),
            log_extra=(lambda name, values: None) if prefix else loop.log_extra,
        )
    memory.release_freed_memory()  # what sampling and scoring took: the update needs it in other sizes
    wait_for_all()  # one process's function may take longer than NCCL waits
    if failures is not None:
        scores.require_some(distributed.total(trainer.accelerator, (~raw.isnan()).sum()), failures)
    return raw, by_function, None if steps is None else args.step_score_coef * steps


def answers_of(trainer: Trainer, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[dict[str, Any]]:
    """Parse responses' raw texts into messages: the answer, and the thinking before it."""
    tokenizer = trainer.processing_class
    return [chat.parse_response(tokenizer, text, p.columns) for p, text in zip(prompts, texts, strict=True)]


@torch.no_grad()
def evaluate(trainer: Trainer) -> dict[str, float]:
    """Return mean score, KL, length and stop rate on the evaluation prompts, sampled with the same seeds every time.

    The processes share the prompts, each of which is scored once. All must run as many forwards, so a process without
    a prompt samples the first one, which does not count.
    """
    accelerator, device, ids = trainer.accelerator, trainer.accelerator.device, trainer.eval_prompt_ids
    own = list(range(accelerator.process_index, len(ids), accelerator.num_processes))
    rows = own or [0]
    sampled = trainer.generate([ids[i] for i in rows], trainer.draws.evaluation(rows, device))
    kl, forwards = 0.0, -(-len(ids) // (accelerator.num_processes * FORWARD_ROWS))
    for part in (slice(start, None, forwards) for start in range(forwards)):
        batch = make_batch([ids[i] for i in rows[part]], sampled.ids[part], trainer.pad_id, device)
        outputs = trainer.module(batch, trainer.args.temperature, ("policy", "reference"))
        kl += float((outputs.logprobs - outputs.reference_logprobs).double().sum())
    responses, stopped = sampled.ids[: len(own)], sampled.stopped[: len(own)]
    texts = [chat.decode_response(trainer.processing_class, response, trainer.stop_ids) for response in responses]
    raw, *_ = raw_scores(trainer, [trainer.eval_prompts[i] for i in own], texts, responses, prefix="eval_")
    scored = raw[~raw.isnan()].double()
    sums = {
        "eval_kl_nats": kl if own else 0.0,
        "eval_response_tokens": sum(map(len, responses)),
        "eval_eos_rate": sum(stopped),
    }
    return {
        "eval_score": distributed.total(accelerator, scored.sum()) / distributed.total(accelerator, scored.numel()),
        **{name: distributed.total(accelerator, share) / len(ids) for name, share in sums.items()},
    }
