"""The log-probabilities of labelled tokens, a chunk of the vocabulary's logits at a time.

trl's trainer calls the model itself, so that the hooks of DDP and FSDP run. `forward_of` makes a forward that answers
such a call with `Labelled`: [B, T, V] never exists, and no position without a label is multiplied by the head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.errors import InputError
from rlhf.models import packing
from rlhf.models.adapters import backbone
from rlhf.models.forward import tokens_per_chunk
from rlhf.models.heads import head_weight, logits_function
from rlhf.models.logprobs import token_statistics
from rlhf.models.long_row import Gather
from rlhf.padding import IGNORED


class Labelled(NamedTuple):
    """What the loss and the metrics read of a forward, under trl's names, for the n labelled tokens of B rows."""

    log_probs: Float[Tensor, "n"]
    entropy: Float[Tensor, "n"]
    is_top1: Bool[Tensor, "n"]
    label_mask: Bool[Tensor, "B L"]
    """True at these n tokens; L is T - 1, since nothing predicts a row's first token."""


def labelled(
    model: Any,
    input_ids: Int[Tensor, "B T"],
    attention_mask: Int[Tensor, "B T"],
    labels: Int[Tensor, "B T"],
    packs: bool = False,
) -> Labelled:
    """Compute the labelled tokens' numbers. packs: the rows as one long row, if it is not too long (`packing`).

    Without any label (rows that only fill an epoch's last batch) there is one number, 0, whose gradient is 0."""
    mask, real = labels[:, 1:] != IGNORED, attention_mask.bool()
    shared = packing.common(model, input_ids, real) if packs else None
    if packs and packing.fits(model, real, shared):
        states = packing.padded_hidden(model, input_ids, real, shared)
    else:
        states = backbone(model)(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state  # rows are padded on the right, where the family's own positions are right
    rows, places = mask.nonzero(as_tuple=True)
    if len(rows) == 0:
        rows, places = labels.new_zeros(1), labels.new_zeros(1)
    before, targets = rows * states.shape[1] + places, labels[:, 1:][rows, places].clamp(min=0)
    chosen, weight = Gather.apply(states.flatten(0, 1), before), head_weight(model)
    chunk = tokens_per_chunk(weight)
    numbers = token_statistics(chosen[None], weight, targets[None], 1.0, chunk, logits_function(model))
    logprobs, entropy, likeliest = (number[0] for number in numbers)
    found = mask[rows, places]  # False for the one that stands for none
    return Labelled(torch.where(found, logprobs, 0.0), torch.where(found, entropy, 0.0), likeliest & found, mask)


def by_position(outputs: Any) -> Float[Tensor, "B L"]:
    """Return the log-probabilities of `Labelled`, or of trl's outputs, at their positions; 0 elsewhere."""
    values: Tensor = outputs.log_probs
    return values if values.dim() == 2 else values.new_zeros(outputs.label_mask.shape).masked_scatter(
        outputs.label_mask, values
    )  # fmt: skip


def forward_of(model: Any, packs: Callable[[], bool]) -> Callable[..., Any]:
    """Make a forward for a model without adapters: `Labelled` where labels are given, else its own.

    packs: asked at every call whether to compute the rows as one long row."""

    def forward(
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **given: Any,
    ) -> Any:
        given.pop("fused_lm_head", None)  # trl's word for this
        if input_ids is None or attention_mask is None or labels is None:
            return type(model).forward(
                model, input_ids=input_ids, attention_mask=attention_mask, labels=labels, **given
            )
        return labelled(model, input_ids, attention_mask, labels, packs())

    return forward


@torch.no_grad()
def agrees(model: Any) -> bool:
    """Return whether `labelled` gives the log-probabilities of the model's own logits.

    It does not for a family that changes its logits in a way that `rlhf.models.heads.logits_function` does not know.
    Call it in the run's precision (autocast)."""
    rows, training = model.get_input_embeddings().weight.shape[0], model.training
    exact = model.dtype == torch.float32 and not torch.is_autocast_enabled(model.device.type)
    ids = torch.tensor([[number % rows for number in (7, 2, 5, 1)]], device=model.device)
    model.eval()
    try:
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, :-1].float()
        ours = labelled(model, ids, torch.ones_like(ids), ids).log_probs
    except (AttributeError, InputError):  # no single head, or no linear one
        return False
    finally:
        model.train(training)
    own = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[0, :, 0]
    return float((ours - own).abs().max()) <= (1e-3 if exact else 0.5)
