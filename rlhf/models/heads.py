"""The language head: its weight, the tokens that it and the embeddings hold, and what a family changes after it."""

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

    A frozen head that is sharded by itself is gathered, a collective. Raises InputError for a trained one, and for one
    that is not a linear layer."""
    plain = base_model(model)
    output = plain.get_output_embeddings()
    weight = getattr(output, "weight", None)
    if isinstance(weight, DTensor) and not weight.requires_grad:
        return weight.full_tensor()
    if isinstance(weight, DTensor):
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


def vocabulary_rows(model: nn.Module) -> int:
    """Return the number of tokens that the model can both read and write."""
    weight = getattr(base_model(model).get_output_embeddings(), "weight", None)
    written = weight if isinstance(weight, DTensor) else head_weight(model)  # outside its forward only a part is there
    return min(embedding_rows(model), _rows(written))


def embedding_rows(model: nn.Module) -> int:
    """Return the number of tokens that the model can read."""
    return _rows(base_model(model).get_input_embeddings().weight)


def _rows(weight: Tensor) -> int:
    shape = getattr(weight, "ds_shape", weight.shape)  # of a weight that DeepSpeed's ZeRO-3 leaves empty
    return shape[0]
