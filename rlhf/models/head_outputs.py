"""A scalar head at every position of a batch, for training: the model is called as a whole, so that hooks run."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rlhf.models import packing
from rlhf.models.encoders import is_encoder
from rlhf.models.scalar import score_head
from rlhf.padding import position_ids


def head_outputs(
    call: Any, model: nn.Module, input_ids: Int[Tensor, "n T"], attention_mask: Int[Tensor, "n T"], packs: bool
) -> Float[Tensor, "n T labels"]:
    """Return a decoder's head at every real position, by a hook: the model's own pooling would search for a pad id.

    call: the model, or accelerate's wrapper of it (DDP, FSDP), which is called. packs: the rows as one long row, if it
    is not too long, and what neighbouring rows begin with once (`packing`)."""
    mask, caught = attention_mask.bool(), list[Tensor]()
    hook = score_head(model).register_forward_hook(lambda head, args, out: caught.append(out))
    try:
        shared = packing.common(model, input_ids, mask) if packs else None
        if packs and packing.fits(model, mask, shared):
            with packing.as_one_row(model, input_ids, mask, shared) as given:
                call(**given)
            return packing.apart(caught[0][0], mask, shared)
        positions = position_ids(attention_mask)
        call(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False)
    finally:
        hook.remove()
    return caught[0]


def packs_rows(model: Any, setting: packing.Packing, dtype: torch.dtype, device: torch.device | None = None) -> bool:
    """Choose as `packing.prepare` does, for a model with a scalar head that is called as a whole; never an encoder."""
    if is_encoder(model.config) or not packing.prepare(model, setting, dtype, device):
        return False
    with packing.asked(model, dtype, device):
        packs = hands_rows_on(model)
    if not packs:
        packing.leave_varlen(model)
    return packs


@torch.no_grad()
def hands_rows_on(model: Any) -> bool:
    """Return whether the model as a whole computes the same for packed rows, of which two begin alike: some families'
    classifiers keep from their trunk what it needs for them."""
    vocabulary, training = model.get_input_embeddings().weight.shape[0], model.training
    ids = torch.tensor([[7, 2, 5, 1], [7, 2, 6, 0], [1, 6, 4, 0]], device=model.device) % vocabulary
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0]], device=model.device)
    model.eval()
    try:
        packed, padded = (head_outputs(model, model, ids, mask, packs)[mask.bool()] for packs in (True, False))
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False
    finally:
        model.train(training)
    limit = 1e-4 if packed.dtype == torch.float32 else 0.05
    return float((packed - padded).abs().max()) <= limit * max(1.0, float(padded.abs().max()))
