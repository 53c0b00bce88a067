"""What PPO reports of its evaluation prompts during a run."""

from __future__ import annotations

from typing import Any

import torch

from rlhf import chat
from rlhf.padding import make_batch


@torch.no_grad()
def evaluate(trainer: Any) -> dict[str, float]:
    """Score, KL, length and stops on the evaluation prompts, sampled with the same seed every time."""
    prompts, ids = trainer.eval_prompts, trainer.eval_prompt_ids
    generator = torch.Generator(trainer.device).manual_seed(trainer.args.seed)
    responses = trainer._generate(ids, generator)
    texts = [chat.decode_response(trainer.processing_class, r) for r in responses.ids]
    score, _ = trainer._raw_scores(
        prompts, texts, responses.ids,
        lambda name, value: trainer.loop.log_metric(f"eval_{name}", value),
        lambda name, values: None,
    )  # fmt: skip
    kl = 0.0
    for start in range(0, len(ids), 16):
        rows = slice(start, start + 16)
        batch = make_batch(ids[rows], responses.ids[rows], trainer.pad_id, trainer.device)
        out = trainer.module(batch, trainer.args.temperature, ("policy", "reference"))
        kl += float((out.logprobs - out.reference_logprobs).sum())
    return {
        "eval_score": float(score.nanmean()),
        "eval_kl_nats": kl / len(ids),
        "eval_response_tokens": sum(map(len, responses.ids)) / len(ids),
        "eval_eos_rate": sum(responses.stopped) / len(ids),
    }
