"""The language head: its weight, and the changes that a family makes to the logits after it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlhf.errors import InputError
from rlhf.models.adapters import base_model


def head_weight(model: nn.Module) -> Tensor:
    """Return the language head's weight [V, H]; if trained token embeddings are tied to it, the merged weight.

    Raises InputError if the head is sharded by itself or is not a linear layer."""
    plain = base_model(model)
    output = plain.get_output_embeddings()
    if isinstance(getattr(output, "weight", None), DTensor):
        raise InputError(
            "the language head is sharded as a unit of its own; in accelerate's configuration, set "
            "fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP and leave fsdp_transformer_layer_cls_to_wrap out"
        )
    if isinstance(output, ModulesToSaveWrapper):  # an adapter's own copy of the head
        active = output.active_adapters
        output = output.modules_to_save[active[0]] if active else output.original_module
    if isinstance(output, nn.Linear):
        return output.weight
    layer = getattr(output, "token_adapter", output)
    if hasattr(layer, "get_merged_weights"):
        return layer.get_merged_weights(layer.active_adapters)
    raise InputError(f"{type(plain).__name__}: language head {type(output).__name__} is not a linear layer")


def logits_function(model: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Return a function that applies the family's changes to the logits: bias, scaling, soft cap; None if none."""
    plain = base_model(model)
    config = plain.config
    bias = getattr(plain.get_output_embeddings(), "bias", None)
    scale = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    cap = getattr(config, "final_logit_softcapping", None)
    if bias is None and not scale and not divisor and not cap:
        return None

    def after_head(logits: Tensor) -> Tensor:
        logits = logits if bias is None else logits + bias
        logits = logits * scale if scale else logits
        logits = logits / divisor if divisor else logits
        return torch.tanh(logits / cap) * cap if cap else logits

    return after_head
