"""Attentions for tests without a GPU: one that refuses float32 as flash-attn does, and one in the place of torch's
`varlen_attn`."""

from __future__ import annotations

import itertools
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


def varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Compute what torch documents, a row at a time, and hold the caller to what the kernel takes; any precision."""
    (tokens, heads, width), groups = query.shape, key.shape[1]
    assert key.shape == value.shape == (tokens, groups, width)
    assert query.dtype == key.dtype == value.dtype
    assert width % 8 == 0
    assert width <= 256
    assert all(x.stride(-1) == 1 for x in (query, key, value))
    assert all(x.dtype == torch.int32 and x.is_contiguous() for x in (cu_seq_q, cu_seq_k))
    assert cu_seq_q.tolist() == cu_seq_k.tolist()
    ends = cu_seq_q.tolist()
    assert (ends[0], ends[-1]) == (0, tokens)
    assert type(max_q) is type(max_k) is int
    assert max_q == max_k == max(b - a for a, b in itertools.pairwise(ends))
    assert heads % groups == 0 if enable_gqa else heads == groups
    left, right = window_size
    out = []
    for start, end in itertools.pairwise(ends):
        count, own = range(end - start), slice(start, end)
        seen = [[(left < 0 or k >= q - left) and (right < 0 or k <= q + right) for k in count] for q in count]
        hidden = ~torch.tensor(seen, dtype=torch.bool).reshape(end - start, end - start)
        keys, values = (x[own].repeat_interleave(heads // groups, 1).transpose(0, 1) for x in (key, value))
        scores = query[own].transpose(0, 1) @ keys.mT * (width**-0.5 if scale is None else scale)
        out.append((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values).transpose(0, 1))
    return torch.cat(out)


def use(model: Any) -> None:
    """Let a model compute it, as `packing.use_flash` does with flash-attn on a GPU."""
    AttentionInterface.register(NAME, _attention)
    packing.set_attention(model, NAME)
    assert packing.attention_of(model) == NAME
