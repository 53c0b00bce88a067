"""Attention on CPUs: short rows as plain matrix products, several times faster there than torch's fused kernel.

Measured with 2 x 9 heads of 64, rows of 94 tokens, bfloat16, forward and backward: a quarter of the time. From a few
hundred tokens on, the fused kernel wins, and needs no [B, heads, T, S] tensor: `short_rows` hands such rows to it.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from rlhf.models.adapters import base_model
from rlhf.packing import PACKED, Rows

NAME = "rlhf_short_rows"
MOST_TOKENS = 256  # keys of a row; above, torch's kernel


def short_rows(
    module: torch.nn.Module,
    query: Float[Tensor, "B H T D"],
    key: Float[Tensor, "B K S D"],
    value: Float[Tensor, "B K S E"],
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    packed_rows: Rows | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Softmax attention, [B, T, H, E]; the heads that share a key head are one matrix product, keys are not repeated.

    The signature is transformers', and `packed_rows` says what the one row of a batch is made of. Whatever is unusual
    (long rows, dropout, a soft cap, sinks, a position bias), or on another device, goes to `sdpa_attention_forward`.
    """
    if packed_rows is not None:
        query, key, value = (packed_rows.unpack(part) for part in (query, key, value))
        attention_mask = packed_rows.once(packed_rows.mask, attention_mask)
    _, heads, tokens, width = query.shape
    groups, keys = key.shape[1], key.shape[2]
    causal = (is_causal if is_causal is not None else getattr(module, "is_causal", True)) and attention_mask is None
    unusual = dropout or any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias", "cache"))
    unusual = unusual or query.device.type != "cpu"  # models are loaded on the CPU, and moved to a GPU afterwards
    if keys > MOST_TOKENS or unusual or heads % groups or (causal and 1 < tokens != keys):
        result = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
        if packed_rows is None:
            return result
        out = result[0].transpose(1, 2)
    else:
        if causal and tokens > 1:
            attention_mask = torch.ones(tokens, keys, dtype=torch.bool, device=query.device).tril()
        shape, dtype = (query.shape[0], heads, tokens, keys), query.dtype
        bias = _bias_once(attention_mask, dtype, shape)
        out = _products(query, key, value, bias, width**-0.5 if scaling is None else scaling)
    return (out.transpose(1, 2).contiguous() if packed_rows is None else packed_rows.pack(out)), None


def _products(
    query: Float[Tensor, "B H T D"],
    key: Float[Tensor, "B K S D"],
    value: Float[Tensor, "B K S E"],
    bias: Float[Tensor, "B H T S"],
    scale: float,
) -> Float[Tensor, "B H T E"]:
    batch, heads, tokens, width = query.shape
    groups, keys = key.shape[1], key.shape[2]
    packed = query.reshape(batch * groups, -1, width)  # the heads of a group one below the other
    # scale and mask within the product: no passes of their own, forward or backward
    weights = torch.baddbmm(bias.view(batch * groups, -1, keys), packed, key.flatten(0, 1).mT, alpha=scale)
    return (weights.softmax(-1) @ value.flatten(0, 1)).view(batch, heads, tokens, -1)


_BIASES = WeakTensorKeyDictionary()  # by mask, then by precision and shape: all layers of a forward share their mask


def _bias_once(mask: Tensor | None, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> Tensor:
    """`_bias`, made for the first layer that asks; masks are not changed in place."""
    if mask is None or torch.compiler.is_compiling():
        return _bias(mask, dtype, shape)
    made = _BIASES.setdefault(mask, {})
    if (dtype, shape) not in made:
        made[dtype, shape] = _bias(mask, dtype, shape)
    return made[dtype, shape]


def _bias(mask: Tensor | None, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> Tensor:
    """What is added to the scores: a mask's own numbers, or a very small one where it says False; [B, H, T, S].

    Never -inf, which the least float32 of a mask becomes in bfloat16: a row that sees nothing would be all NaN."""
    least = 0.5 * torch.finfo(dtype).min
    if mask is None:
        return torch.zeros((), dtype=dtype).expand(shape).contiguous()
    mask = mask[..., : shape[-1]]
    if mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, least)
    return mask.to(dtype).clamp(min=least).expand(shape).contiguous()


def _mask(**given: Any) -> Tensor | None:
    """transformers' mask; of packed rows, each row's own part."""
    rows = PACKED.get()
    if rows is None or given.get("use_vmap"):  # then the function takes single numbers, not tensors of them
        return sdpa_mask(**given)
    return rows.mask_of(given["mask_function"])


def use_short_rows(model: Any) -> None:
    """Where a model on a CPU would use torch's fused kernel, let it use `short_rows`."""
    model = base_model(model)
    if model is None or model.device.type != "cpu" or getattr(model.config, "_attn_implementation", None) != "sdpa":
        return
    AttentionInterface.register(NAME, short_rows)
    AttentionMaskInterface.register(NAME, _mask)
    model.set_attn_implementation(NAME)
    if not uses_short_rows(model):
        return  # a family with attention of its own (Falcon), of which transformers warns
    for module in model.modules():  # inner modules may have a config of their own (`disable_dropout`)
        config: Any = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) == "sdpa":
            config._attn_implementation = NAME


def uses_short_rows(model: Any) -> bool:
    """On a CPU, does the model attend through `short_rows`?"""
    plain = base_model(model)
    return plain.device.type == "cpu" and getattr(plain.config, "_attn_implementation", None) == NAME
