"""Attention of short rows on CPUs as plain matrix products, several times faster there than torch's fused kernel.

Measured with 2 x 9 heads of 64, rows of 94 tokens, bfloat16, forward and backward: a quarter of the time. From a few
hundred tokens on the fused kernel is faster and needs no [B, heads, T, S] tensor, so `short_rows` passes such rows on
to it.
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

from rlhf.models.long_row import PACKED, Part, Rows
from rlhf.models.packing import BY_ROWS, attention_of, set_attention

MOST_TOKENS = 256  # keys of a row; longer rows go to torch's kernel


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
    """Compute softmax attention, [B, T, H, E]; heads that share a key head form one matrix product without key copies.

    The signature is that of transformers. packed_rows: the rows that a packed row consists of. Unusual calls (long
    rows, dropout, a soft cap, sinks, a position bias, another device) go to `sdpa_attention_forward`.
    """
    if packed_rows is None:
        out = _attention(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
        return out.transpose(1, 2).contiguous(), None
    key, value = packed_rows.unpack(key), packed_rows.unpack(value)
    mask, found = packed_rows.once(packed_rows.mask, attention_mask), []
    for part in packed_rows.parts:
        own, causal = packed_rows.once(Part.mask_of, part, mask), is_causal
        if key.shape[2] > MOST_TOKENS and part.whole and packed_rows.once(packed_rows.only_causal, mask):
            own, causal = None, True  # torch's kernel leaves out the upper half
        given = packed_rows.queries(query, part), part.of(key), part.of(value)
        found.append(_attention(module, *given, own, dropout, scaling, causal, **kwargs))
    return packed_rows.pack(found), None


def _attention(
    module: torch.nn.Module,
    query: Float[Tensor, "B H T D"],
    key: Float[Tensor, "B K S D"],
    value: Float[Tensor, "B K S E"],
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    **kwargs: Any,
) -> Float[Tensor, "B H T E"]:
    """Compute rows that stand apart: by `_products`, or in unusual calls by torch's kernel."""
    _, heads, tokens, width = query.shape
    groups, keys = key.shape[1], key.shape[2]
    causal = (is_causal if is_causal is not None else getattr(module, "is_causal", True)) and mask is None
    unusual = dropout or any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias", "cache"))
    unusual = unusual or query.device.type != "cpu"  # a model may have been moved to a GPU after `use_short_rows`
    if keys > MOST_TOKENS or unusual or heads % groups or (causal and 1 < tokens != keys):
        given = (module, query, key, value, mask, dropout, scaling)
        return sdpa_attention_forward(*given, is_causal=is_causal, **kwargs)[0].transpose(1, 2)
    if causal and tokens > 1:
        mask = torch.ones(tokens, keys, dtype=torch.bool, device=query.device).tril()
    bias = _bias_once(mask, query.dtype, (query.shape[0], heads, tokens, keys))
    return _products(query, key, value, bias, width**-0.5 if scaling is None else scaling)


def _products(
    query: Float[Tensor, "B H T D"],
    key: Float[Tensor, "B K S D"],
    value: Float[Tensor, "B K S E"],
    bias: Float[Tensor, "B H T S"],
    scale: float,
) -> Float[Tensor, "B H T E"]:
    batch, heads, tokens, width = query.shape
    groups, keys = key.shape[1], key.shape[2]
    packed = query.reshape(batch * groups, -1, width)  # a group's heads stacked as rows
    # scale and mask are part of the product, which saves passes over memory in forward and backward
    weights = torch.baddbmm(bias.view(batch * groups, -1, keys), packed, key.flatten(0, 1).mT, alpha=scale)
    return (weights.softmax(-1) @ value.flatten(0, 1)).view(batch, heads, tokens, -1)


_BIASES = WeakTensorKeyDictionary()  # by mask, then by precision and shape; all layers of a forward share one mask


def _bias_once(mask: Tensor | None, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> Tensor:
    """Return `_bias`, computed once per mask and cached; masks are never changed in place."""
    if mask is None or torch.compiler.is_compiling():
        return _bias(mask, dtype, shape)
    cached = _BIASES.setdefault(mask, {})
    if (dtype, shape) not in cached:
        cached[dtype, shape] = _bias(mask, dtype, shape)
    return cached[dtype, shape]


def _bias(mask: Tensor | None, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> Tensor:
    """Return the bias added to the attention scores, [B, H, T, S]: a mask's numbers, or a very negative one for False.

    It is never -inf, which float32's minimum in a mask becomes in bfloat16: a row that sees no key would be all NaN."""
    least = 0.5 * torch.finfo(dtype).min
    if mask is None:
        return torch.zeros((), dtype=dtype).expand(shape).contiguous()
    mask = mask[..., : shape[-1]]
    if mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, least)
    return mask.to(dtype).clamp(min=least).expand(shape).contiguous()


def _mask(**given: Any) -> Tensor | None:
    """Return the mask that transformers would make; for packed rows, each row's own part of it."""
    rows = PACKED.get()
    if rows is None or given.get("use_vmap"):  # with vmap the mask function takes single numbers, not tensors
        return sdpa_mask(**given)
    return rows.mask_of(given["mask_function"])


def use_short_rows(model: Any) -> None:
    """Let a model on a CPU use `short_rows` where it would use torch's fused kernel."""
    if model is None or model.device.type != "cpu" or attention_of(model) != "sdpa":
        return
    AttentionInterface.register(BY_ROWS, short_rows)
    AttentionMaskInterface.register(BY_ROWS, _mask)
    set_attention(model, BY_ROWS)


def use_sdpa(model: Any) -> None:
    """Let a model that uses `short_rows` use torch's fused kernel again."""
    if uses_short_rows(model):
        set_attention(model, "sdpa")


def uses_short_rows(model: Any) -> bool:
    """Return whether a model is on a CPU and computes attention by `short_rows`."""
    return model.device.type == "cpu" and attention_of(model) == BY_ROWS
