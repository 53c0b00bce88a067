"""Log-probabilities of given tokens from hidden states, computed one chunk of logits at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LogitsFn = Callable[[Tensor], Tensor]


def token_logprobs(
    hidden: Float[Tensor, "B T H"],
    weight: Float[Tensor, "V H"],
    targets: Int[Tensor, "B T"],
    temperature: float,
    chunk: int,
    logits_fn: LogitsFn | None = None,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Compute each target token's log-probability and the entropy of its distribution, both in nats.

    The formula is ``log_softmax(logits_fn(hidden @ weight.T) / temperature)`` in float32, computed `chunk` tokens at a
    time, so that no more than ``chunk x V`` logits exist at once; backward computes each chunk again. The result is
    exact. The entropy is a metric and carries no gradient. logits_fn: the model family's changes to its logits after
    the head (bias, scaling, soft cap).
    """
    return token_statistics(hidden, weight, targets, temperature, chunk, logits_fn)[:2]


def token_statistics(
    hidden: Float[Tensor, "B T H"],
    weight: Float[Tensor, "V H"],
    targets: Int[Tensor, "B T"],
    temperature: float,
    chunk: int,
    logits_fn: LogitsFn | None = None,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Compute `token_logprobs`, and whether each target is a token that the model finds most likely."""
    flat, labels = hidden.flatten(0, 1), targets.flatten()
    device = flat.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else flat.dtype
    flat, weight = flat.to(dtype), weight.to(dtype)
    with torch.autocast(device, enabled=False):
        if logits_fn is None:
            columns = _HeadLogprobs.apply(flat, weight, labels, temperature, chunk)
        else:
            pieces = [(flat[i : i + chunk], labels[i : i + chunk]) for i in range(0, len(labels), chunk)]
            compute = partial(checkpoint, _chunk_logprobs, use_reentrant=False) if len(pieces) > 1 else _chunk_logprobs
            parts = [compute(h, weight, y, temperature, logits_fn) for h, y in pieces]
            columns = tuple(torch.cat(part) for part in zip(*parts, strict=True))
    logprobs, entropy, likeliest = (column.view(targets.shape) for column in columns)
    return logprobs, entropy, likeliest


class _HeadLogprobs(torch.autograd.Function):
    """`_chunk_logprobs` of each chunk with a gradient written by hand: few passes over each block of logits, in place.

    Each log-probability depends only on its own row of `hidden`: ``d logprob / d hidden = (weight[target] - softmax
    @ weight) / temperature``. Forward computes this while it has the probabilities, so backward only multiplies by it.
    If the head is trained too, backward computes the logits again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = _rows_at_once(weight)
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] and not ctx.needs_input_grad[1] else None
        columns: list[tuple[Tensor, ...]] = []
        for start in range(0, len(hidden), chunk):
            products = hidden[start : start + chunk] @ weight.T
            for first in range(0, len(products), rows):
                block = products[first : first + rows]
                y = targets[start + first : start + first + len(block), None]
                logits = _scaled(block, temperature)
                top = logits.amax(-1, keepdim=True)
                chosen = logits.gather(-1, y) - top
                shifted = logits.sub_(top).clamp_(min=-1e30)  # at a logit of -inf p = 0, and 0 * -inf must count as 0
                powers = shifted.exp()
                total = powers.sum(-1, keepdim=True)
                mean = torch.linalg.vecdot(powers, shifted)[:, None] / total
                columns.append((chosen - total.log(), total.log() - mean, chosen >= 0, top + total.log()))
                if slopes is not None:
                    block.copy_(powers.div_(total).mul_(-1.0).scatter_add_(-1, y, torch.ones_like(total)))
            if slopes is not None:
                torch.mm(products, weight, out=slopes[start : start + chunk])
        logprobs, entropy, likeliest, normaliser = (torch.cat(part).squeeze(-1) for part in zip(*columns, strict=True))
        ctx.temperature, ctx.chunk, ctx.quick = temperature, chunk, slopes is not None
        if slopes is not None:
            ctx.save_for_backward(slopes)
        else:
            ctx.save_for_backward(hidden, weight, targets, normaliser)
        ctx.mark_non_differentiable(entropy, likeliest)
        return logprobs, entropy, likeliest

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scaled = grads[0] / ctx.temperature
        if ctx.quick:
            (slopes,) = ctx.saved_tensors
            return (slopes * scaled[:, None]).to(slopes.dtype), None, None, None, None
        hidden, weight, targets, normaliser = ctx.saved_tensors
        rows = _rows_at_once(weight)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, len(hidden), ctx.chunk):
            h = hidden[start : start + ctx.chunk]
            slopes = h @ weight.T  # the logits, which the loop replaces by the loss's gradient
            for first in range(0, len(h), rows):
                own = slice(start + first, start + min(first + rows, len(h)))
                y, g = targets[own, None], scaled[own, None]
                logits = slopes[first : first + rows]
                slope = _scaled(logits, ctx.temperature).sub_(normaliser[own, None]).exp_().mul_(-g)
                logits.copy_(slope.scatter_add_(-1, y, g))
            torch.mm(slopes, weight, out=grad_hidden[start : start + ctx.chunk])
            if h.dtype == torch.float32:
                grad_weight.addmm_(slopes.T, h)
            else:
                grad_weight += slopes.T @ h
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def _rows_at_once(weight: Tensor) -> int:
    """Return the number of rows of logits that fit a CPU's cache; on a GPU, no limit."""
    return max(1, 2**19 // weight.shape[0]) if weight.device.type == "cpu" else 2**31


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """Convert logits to float32 and divide by the temperature; in place if they are float32 already."""
    return logits.float() if temperature == 1.0 else logits.float().div_(temperature)


def _chunk_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, logits_fn: LogitsFn
) -> tuple[Tensor, Tensor, Tensor]:
    logits = logits_fn(hidden @ weight.T).float() / temperature
    normaliser = torch.logsumexp(logits, dim=-1)
    chosen = logits.gather(-1, targets[:, None]).squeeze(-1)
    with torch.no_grad():
        logp = logits - normaliser[:, None]
        entropy = -(logp.exp() * logp).nan_to_num(0.0).sum(-1)  # at a logit of -inf p = 0, and 0 * -inf counts as 0
        likeliest = chosen >= logits.amax(-1)
    return chosen - normaliser, entropy, likeliest
