"""A batch of prompts and responses as trainers make it, and the same one padded in front."""

from __future__ import annotations

import torch

from rlhf.padding import Batch, make_batch

PROMPTS, RESPONSES = [[5, 6, 7], [9], [20, 21, 22, 23, 24]], [[30, 31], [32, 33, 34, 35], [36]]


def batch_of(prompts=PROMPTS, responses=RESPONSES, pad: int = 3) -> Batch:
    return make_batch(prompts, responses, pad, "cpu")


def left_padded(batch: Batch) -> Batch:
    """The same rows with their padding in front."""
    shifts = (~batch.attention_mask).sum(-1)
    rolled = [torch.roll(row, int(s)) for row, s in zip(batch.input_ids, shifts, strict=True)]
    mask = [torch.roll(row, int(s)) for row, s in zip(batch.attention_mask, shifts, strict=True)]
    return Batch(torch.stack(rolled), torch.stack(mask), batch.prompt_tokens + shifts, batch.targets, batch.mask)
