"""Drawing a token from next-token probabilities."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from rlhf import cpu


def sample(logits: Float[Tensor, "B V"], temperature: float, generator: torch.Generator) -> Int[Tensor, "B"]:
    """Sample one token per row from ``softmax(logits / temperature)``; temperature 0 takes the most likely one."""
    if temperature == 0:
        return logits.argmax(-1)
    scaled = logits if temperature == 1 else logits.float() / temperature
    return draw(scaled.softmax(-1, dtype=torch.float32), generator)  # softmax casts itself, without an extra pass


def draw(probabilities: Float[Tensor, "B V"], generator: torch.Generator) -> Int[Tensor, "B"]:
    """Draw one index per row according to its probabilities. A `TorchFunctionMode` sees the call, as of multinomial."""
    if has_torch_function((probabilities,)):
        return handle_torch_function(draw, (probabilities,), probabilities, generator)
    if probabilities.device.type == "cpu":
        return cpu.draw(probabilities, generator)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)
