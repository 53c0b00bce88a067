"""A model's forward pass on prompts with responses: hidden states and log-probabilities of the response tokens."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf.models import packing
from rlhf.models.adapters import backbone
from rlhf.models.heads import head_weight, logits_function
from rlhf.models.logprobs import token_logprobs
from rlhf.models.long_row import Rows
from rlhf.padding import Batch, position_ids

LOGITS_PER_CHUNK = {"cpu": 2**22, "cuda": 2**26}  # 16 and 256 MiB in float32


def tokens_per_chunk(weight: Float[Tensor, "V H"]) -> int:
    """Return how many tokens' logits may exist at once."""
    return max(1, LOGITS_PER_CHUNK.get(weight.device.type, 2**26) // weight.shape[0])


def response_hidden(model: Any, batch: Batch, packed: bool = False) -> Float[Tensor, "B T H"]:
    """Compute the hidden state before each response token; packed: without computing the padding (`packing`)."""
    shared = packing.common(model, batch.input_ids, batch.attention_mask) if packed else None
    if packed and packing.fits(model, batch.attention_mask, shared):
        states = packing.packed_hidden(model, batch.input_ids, batch.attention_mask, shared)
        steps = position_ids(batch.attention_mask).gather(1, batch.positions())
        tokens = Rows.of(batch.attention_mask, shared=shared).tokens.gather(1, steps)
        return states.index_select(0, tokens.flatten()).view(*tokens.shape, -1)
    mask = batch.attention_mask.long()
    hidden = backbone(model)(
        input_ids=batch.input_ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False
    ).last_hidden_state
    indices = batch.positions()
    return hidden.gather(1, indices[..., None].expand(-1, -1, hidden.shape[-1]))


def response_logprobs(
    model: Any, batch: Batch, temperature: float
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Compute the log-probabilities of the response tokens under a causal model, and the entropies, both in nats.

    `temperature` divides the logits; both are 0 on padding."""
    return hidden_logprobs(model, response_hidden(model, batch), batch, temperature)


def hidden_logprobs(
    model: Any, hidden: Float[Tensor, "B T H"], batch: Batch, temperature: float
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Compute `response_logprobs` from the hidden states of `response_hidden`."""
    weight = head_weight(model)
    chunk = tokens_per_chunk(weight)
    logprobs, entropy = token_logprobs(hidden, weight, batch.targets, temperature, chunk, logits_function(model))
    return torch.where(batch.mask, logprobs, 0.0), torch.where(batch.mask, entropy, 0.0)
