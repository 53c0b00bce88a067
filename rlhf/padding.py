"""Rows of token ids as padded tensors: masks, positions, and prompts with their responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

IGNORED = -100  # the label of tokens without loss, in transformers


def position_ids(attention_mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Count 0, 1, 2 ... over real tokens, so that left and right padding give a model the same positions."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def pad(
    rows: Sequence[Sequence[int]],
    fill: int,
    device: torch.device | str = "cpu",
    side: Literal["left", "right"] = "right",
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Pad rows of integers to the longest one; the mask [B, T] comes from their lengths, never from the fill value."""
    width = max(len(row) for row in rows)
    padded = torch.full((len(rows), width), fill, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        real = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        padded[i, real] = torch.tensor(row, dtype=torch.long)
        mask[i, real] = True
    return padded.to(device), mask.to(device)


@dataclass(frozen=True)
class Batch:
    """A micro-batch for the models: each row is a prompt and its response, right-padded.

    input_ids, attention_mask [B, L]: prompt + response; prompt_tokens [B]: the prompts' lengths; targets, mask [B, T]:
    the response alone.
    """

    input_ids: Int[Tensor, "B L"]
    attention_mask: Bool[Tensor, "B L"]
    prompt_tokens: Int[Tensor, "B"]
    targets: Int[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]

    def positions(self) -> Int[Tensor, "B T"]:
        """Return the index in input_ids of the state before each response token."""
        steps = torch.arange(self.targets.shape[1], device=self.targets.device)
        return (self.prompt_tokens[:, None] - 1 + steps).clamp(max=self.input_ids.shape[1] - 1)


def make_batch(
    prompt_ids: Sequence[list[int]], response_ids: Sequence[list[int]], pad_id: int, device: torch.device | str
) -> Batch:
    """Put prompts with their responses into one padded batch."""
    input_ids, attention = pad([p + r for p, r in zip(prompt_ids, response_ids, strict=True)], pad_id, device)
    targets, mask = pad(response_ids, pad_id, device)
    lengths = torch.tensor([len(p) for p in prompt_ids], device=device)
    return Batch(input_ids, attention, lengths, targets, mask)
