"""An attention that refuses float32 as flash-attn does, for tests without a GPU."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.flash_attention import get_target_dtype
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlhf.models import packing

NAME = "half_precision_only"  # with "flash" in it transformers would look for that package


def _attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    wanted = get_target_dtype(query, module)  # transformers' own rule: under autocast its precision
    dtype = wanted if query.dtype == torch.float32 and wanted else query.dtype
    if dtype == torch.float32:
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    return sdpa_attention_forward(module, *(x.to(dtype) for x in (query, key, value)), None, **kwargs)


def use(model: Any) -> None:
    """Let a model compute it, as `packing.use_flash` does with flash-attn on a GPU."""
    AttentionInterface.register(NAME, _attention)
    packing.set_attention(model, NAME)
    assert packing.attention_of(model) == NAME
