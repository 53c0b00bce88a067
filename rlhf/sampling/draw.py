"""Drawing a token from next-token probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from rlhf import cpu


def row_numbers(seeds: Sequence[int], count: int, device: torch.device) -> Float[Tensor, "B count"]:
    """Return `count` uniform numbers from [0, 1) for each row, which depend on the row's seed alone."""
    numbers = torch.empty(len(seeds), count, dtype=torch.float64)
    for row, seed in zip(numbers, seeds, strict=True):
        row.uniform_(generator=torch.Generator().manual_seed(seed))
    return numbers.to(device, torch.float32 if device.type == "mps" else torch.float64)  # MPS has no float64


def sample(logits: Float[Tensor, "B V"], temperature: float, numbers: Float[Tensor, "B"]) -> Int[Tensor, "B"]:
    """Sample one token per row from ``softmax(logits / temperature)``, by the row's number from [0, 1); temperature 0
    takes the most likely one."""
    if temperature == 0:
        return logits.argmax(-1)
    scaled = logits if temperature == 1 else logits.float() / temperature
    return draw(scaled.softmax(-1, dtype=torch.float32), numbers)  # softmax casts itself, without an extra pass


def drawn_logprobs(logits: Float[Tensor, "B V"], temperature: float, tokens: Int[Tensor, "B"]) -> Float[Tensor, "B"]:
    """Return the log-probabilities, in nats, with which `sample` has drawn these tokens; 0 at temperature 0."""
    if temperature == 0:
        return torch.zeros_like(logits[:, 0], dtype=torch.float32)
    scaled = logits.float() / temperature
    return scaled.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


def draw(probabilities: Float[Tensor, "B V"], numbers: Float[Tensor, "B"]) -> Int[Tensor, "B"]:
    """Draw one index per row according to its probabilities: the first whose cumulative probability exceeds the row's
    number. A `TorchFunctionMode` sees the call, as of multinomial."""
    if has_torch_function((probabilities,)):
        return handle_torch_function(draw, (probabilities,), probabilities, numbers)
    if probabilities.device.type == "cpu":
        return cpu.draw(probabilities, numbers)
    ends = probabilities.to(numbers.dtype).cumsum(-1)
    return torch.searchsorted(ends, numbers[:, None] * ends[:, -1:], right=True).clamp_(max=ends.shape[1] - 1)[:, 0]
