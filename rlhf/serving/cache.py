"""Rows that join and leave a key-value cache between two steps of decoding.

Rows are left-padded to a common number of columns. A row that joins a wider batch gets columns of zeros on its left,
which the attention mask hides; once the widest row has left, columns that nobody uses are cut off.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from rlhf.errors import InputError

STATES = ("conv_states", "recurrent_states")


def check(cache: Cache) -> None:
    """Raise InputError for a cache with layers that rows cannot join."""
    for layer in cache.layers:
        own = type(layer)
        attends = own in (DynamicLayer, DynamicSlidingWindowLayer) or (
            isinstance(layer, LinearAttentionLayer) and not hasattr(layer, "max_cache_len")
        )
        if not attends and own is not DummyLayer:
            raise InputError(
                f"{own.__name__}: rows cannot join a cache of this kind while it is in use; serve the model with vLLM "
                "and name that server: --upstream http://host:port"
            )


def join(cache: Any, other: Any, columns: int) -> None:
    """Add the rows of `other` below those of `cache`, both left-padded to `columns`."""
    for own, new in zip(cache.layers, other.layers, strict=True):
        if isinstance(own, LinearAttentionLayer):
            for name in STATES:
                held, added = getattr(own, name), getattr(new, name)
                for state, tensor in held.items():
                    if tensor is not None:
                        held[state] = torch.cat([tensor, added[state]])
    for own, new in zip(_with_keys(cache), _with_keys(other), strict=True):
        sliding = isinstance(own, DynamicSlidingWindowLayer)
        width = min(columns, own.sliding_window - 1) if sliding else columns
        for name in ("keys", "values"):
            parts = [getattr(layer, name) for layer in (own, new)]
            setattr(own, name, torch.cat([pad(part, (0, 0, width - part.shape[-2], 0)) for part in parts]))
        if sliding:
            own.cumulative_length = columns


def keep(cache: Any, rows: Int[Tensor, "B"], cut: int) -> None:
    """Keep these rows alone, without the first `cut` columns; a row may be named several times."""
    cache.reorder_cache(rows)  # every layer has this method, recurrent and convolutional ones too
    for layer in _with_keys(cache) if cut else ():
        drop, width = cut, layer.keys.shape[-2]
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length -= cut
            drop = width - min(layer.cumulative_length, width)
        layer.keys, layer.values = layer.keys[..., drop:, :], layer.values[..., drop:, :]


def _with_keys(cache: Any) -> list[Any]:
    return [layer for layer in cache.layers if isinstance(layer, DynamicLayer) and layer.is_initialized]
