"""Weights laid out for products of few rows, as every step of decoding makes them: on CPUs, about half the time.

As they lie, row after row, oneDNN rearranges them within each product, and in float32 MKL is asked instead. Measured
on two cores, 16 rows: weights [1536, 576] in bfloat16 120 us instead of 194, a head [49152, 576] 3.3 ms instead of
6.6; [1536, 576] in float32 195 us instead of 408. With 128 rows a quarter is gained, with 256 often nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlhf.cpu.lora import FusedLinear, computed_in

FEW = 128  # rows; the copies would not pay beyond


@contextmanager
def laid_out(model: nn.Module, rows: int) -> Iterator[list[Any]]:
    """Inside, linear layers on a CPU multiply by copies of their weights; `lora.merged`'s copies are replaced by them.

    Only for running `model` without gradients, in the precision that it is in here, best with about so many rows; of
    more than FEW, nothing is done. Results differ by no more than rounding; nothing of `model` is changed for good.
    The layers are handed out.
    """
    replaced: list[Any] = []
    try:
        for layer in _linear_layers(model) if 0 < rows <= FEW else []:
            product = _product(layer, rows)
            if product is not None:
                layer.forward = product
                replaced.append(layer)
                if isinstance(layer, FusedLinear):
                    layer.merged_weight = None
        yield replaced
    finally:
        for layer in replaced:
            del layer.forward


def _linear_layers(model: nn.Module) -> list[Any]:
    """Merged LoRA layers, and linear ones that are nothing else and in no merged one; not those whose forward somebody
    else has replaced."""
    merged = [part for part in model.modules() if isinstance(part, FusedLinear) and part.merged_weight is not None]
    inside = {id(part) for layer in merged for part in layer.modules()}
    plain = [part for part in model.modules() if type(part) is nn.Linear and id(part) not in inside]
    return [layer for layer in (*merged, *plain) if "forward" not in vars(layer)]


@torch.no_grad()
def _product(layer: Any, rows: int) -> Callable[..., Tensor] | None:
    """x -> ``x W^T + bias`` with W laid out; None where there is no way."""
    fused = isinstance(layer, FusedLinear)
    weight, bias = (layer.merged_weight, layer.get_base_layer().bias) if fused else (layer.weight, layer.bias)
    onednn: Any = torch.ops.mkldnn
    if type(weight) not in (Tensor, nn.Parameter) or weight.device.type != "cpu":
        return None
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return None
    dtype = computed_in(weight)
    if dtype != torch.float32 and not (dtype == torch.bfloat16 and onednn._is_mkldnn_bf16_supported()):
        return None
    laid = onednn._reorder_linear_weight(weight.detach().to(dtype), rows)
    bias = None if bias is None else bias.detach().to(dtype)

    def product(x: Float[Tensor, "... i"], gated: Float[Tensor, "... i"] | None = None) -> Float[Tensor, "... o"]:
        fed = x if gated is None else nn.functional.silu(x) * gated  # see FusedLinear.forward
        return onednn._linear_pointwise(fed.to(dtype), laid, bias, "none", [], "")

    return product
