"""Drawing a token by one random number per row, without sums over the whole vocabulary."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 256  # tokens whose probabilities are summed before a draw


def draw(probabilities: Float[Tensor, "B V"], numbers: Float[Tensor, "B"]) -> Int[Tensor, "B"]:
    """Draw one index per row according to the row's probabilities, by the row's number from [0, 1).

    On a CPU, the sums over the whole vocabulary take longer than the language head. Here the number selects a block of
    tokens by the blocks' sums, and its remainder selects the token in the block. Raises RuntimeError if a probability
    is NaN or infinite.
    """
    rows, vocabulary = probabilities.shape
    short = -vocabulary % BLOCK
    whole = torch.nn.functional.pad(probabilities, (0, short)) if short else probabilities
    blocks = whole.view(rows, -1, BLOCK)
    sums = blocks.sum(-1).double()
    ends = sums.cumsum(-1)
    if not bool(ends[:, -1].isfinite().all()):
        raise RuntimeError("sampling: a probability is not a number")
    level = numbers[:, None] * ends[:, -1:]
    block = torch.searchsorted(ends, level, right=True).clamp_(max=blocks.shape[1] - 1)
    width = sums.gather(-1, block)
    share = (level - (ends.gather(-1, block) - width)) / width  # the remainder, as a share (below 1) of the block's sum
    inside = blocks[torch.arange(rows), block[:, 0]].double().cumsum(-1)
    offset = torch.searchsorted(inside, share.clamp_(0.0, 1.0 - 2.0**-52) * inside[:, -1:], right=True)
    return (block * BLOCK + offset).clamp_(max=vocabulary - 1).squeeze(-1)
