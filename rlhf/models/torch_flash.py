"""Flash attention of packed rows by torch's own kernel, which needs no further package: `torch.nn.attention.varlen`.

Only a long row that `packing.as_one_row` made goes to the kernel. Every other call (padded rows, decoding with a cache,
float32) is computed by SDPA under SDPA's own mask, so that a model may keep this attention wherever it is called.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from importlib import import_module
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

VARLEN = "rlhf_varlen"  # with "flash" in it transformers would look for a package, and for a kernel on the hub
WIDEST = 256  # numbers in a head; the kernel takes multiples of 8 up to this
NEEDED = ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k", "scale", "window_size")
UNKNOWN = ("softcap", "s_aux", "sinks", "position_bias", "indices", "block_indices", "cache")
"""What a family may ask for and the kernel doesn't compute."""

IN_ONE_ROW: ContextVar[bool] = ContextVar("in_one_row", default=False)
"""Whether the current forward is of a long row, for the mask function, to which transformers passes no `cu_seq_lens`.
"""
LATER: ContextVar[torch.device | None] = ContextVar("later", default=None)
"""The GPU that a model, asked on the CPU, is about to move to."""


def varlen(
    module: torch.nn.Module,
    query: Float[Tensor, "B H T D"],
    key: Float[Tensor, "B K S D"],
    value: Float[Tensor, "B K S E"],
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Int[Tensor, "R"] | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "B T H E"], None]:
    """Compute softmax attention of a long row's R - 1 rows, each for itself; the signature is that of transformers.

    In half precision on a GPU by the kernel; else, and with dropout, which the kernel has not, row by row by SDPA."""
    if cu_seq_lens_q is None:
        if IN_ONE_ROW.get():
            raise NotImplementedError("this family does not hand on to attention where the rows end")
        given = (module, query, key, value, attention_mask, dropout, scaling)
        return sdpa_attention_forward(*given, is_causal=is_causal, sliding_window=sliding_window, **kwargs)
    asked = [name for name in UNKNOWN if kwargs.get(name) is not None]
    if asked or attention_mask is not None or len(query) != 1 or max_length_q is None:
        raise NotImplementedError(f"rows in one long row, with {', '.join(asked) or 'a mask, or several at once'}")
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    window = None if sliding_window is None or sliding_window >= max_length_q else sliding_window
    dtype = _precision(query, value)
    if not dropout and takes(query, dtype, max(query.shape[-1], value.shape[-1])):
        return _by_kernel(query, key, value, dtype, scaling, causal, window, cu_seq_lens_q, max_length_q), None
    return _by_rows(module, query, key, value, dropout, scaling, causal, window, cu_seq_lens_q), None


def _by_kernel(
    query: Float[Tensor, "1 H N D"],
    key: Float[Tensor, "1 K N D"],
    value: Float[Tensor, "1 K N E"],
    dtype: torch.dtype,
    scaling: float | None,
    causal: bool,
    window: int | None,
    ends: Int[Tensor, "R"],
    longest: int,
) -> Float[Tensor, "1 N H E"]:
    """Compute a long row by torch's kernel; heads are filled up with zeros to a width that it takes."""
    from torch.nn.attention import varlen as torchs  # not in every torch; `kernel` would break torch.compile's graph

    width = _filled(max(query.shape[-1], value.shape[-1]))
    rows = [
        torch.nn.functional.pad(x[0].transpose(0, 1).to(dtype), (0, width - x.shape[-1])) for x in (query, key, value)
    ]
    behind = -1 if window is None else window - 1  # keys before a query's own, as flash attention counts them
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = _attend(torchs.varlen_attn, rows, ends, longest, scale, (behind, 0 if causal else behind))
    return out[None, ..., : value.shape[-1]]


def _attend(
    attend: Any,
    rows: list[Tensor],
    ends: Int[Tensor, "R"],
    longest: int,
    scale: float,
    window: tuple[int, int],
) -> Float[Tensor, "N H D"]:
    """Call `varlen_attn` with queries [N, H, D], keys and values [N, K, D]; keys that several heads share are copied
    where it does not take them so."""
    query, key, value = rows
    groups, more = query.shape[1] // key.shape[1], {}
    if groups > 1 and _takes_groups(attend):
        more = {"enable_gqa": True}
    elif groups > 1:
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    out: Tensor = attend(query, key, value, ends, ends, longest, longest, scale=scale, window_size=window, **more)
    return out


@torch.compiler.assume_constant_result
def _takes_groups(attend: Callable[..., Tensor]) -> bool:
    """Return whether a `varlen_attn` takes fewer heads of keys than of queries; torch 2.11's does not."""
    return "enable_gqa" in inspect.signature(attend).parameters


def _by_rows(
    module: torch.nn.Module,
    query: Float[Tensor, "1 H N D"],
    key: Float[Tensor, "1 K N D"],
    value: Float[Tensor, "1 K N E"],
    dropout: float,
    scaling: float | None,
    causal: bool,
    window: int | None,
    ends: Int[Tensor, "R"],
) -> Float[Tensor, "1 N H E"]:
    """Compute a long row's rows one after another by SDPA."""
    found = []
    for start, end in pairwise(ends.tolist()):
        mask = None
        if window is not None:
            steps = torch.arange(end - start, device=query.device)
            behind = steps[:, None] - steps
            mask = (behind < window) & (behind >= 0 if causal else behind > -window)
        own = slice(start, end)
        row = query[:, :, own], key[:, :, own], value[:, :, own]
        found.append(sdpa_attention_forward(module, *row, mask, dropout, scaling, is_causal=causal)[0])
    return torch.cat(found, 1)


def _precision(query: Tensor, value: Tensor) -> torch.dtype:
    """Return the precision to compute in: autocast's, for which norms and rotations may have left queries in float32,
    or the lower one of the two."""
    if torch.is_autocast_enabled(query.device.type):
        return torch.get_autocast_dtype(query.device.type)
    return min((query.dtype, value.dtype), key=lambda dtype: dtype.itemsize)


def _filled(width: int) -> int:
    return width + -width % 8


def _mask(**given: Any) -> Tensor | None:
    """Return the mask that SDPA needs; none for a long row, which attention takes apart by where its rows end."""
    if not IN_ONE_ROW.get():
        return sdpa_mask(**given)
    if given.get("use_vmap") or getattr(given.get("config"), "attention_chunk_size", None):
        raise NotImplementedError("a mask that is neither causal nor a sliding window")
    return None


# -- where the kernel is -------------------------------------------------------------------------------------


def takes(query: Tensor, dtype: torch.dtype, width: int) -> bool:
    """Return whether the kernel computes these queries here; raise NotImplementedError where it should and cannot."""
    device = LATER.get() or query.device
    if device.type != "cuda" or dtype.itemsize != 2:
        return False
    if not torch.compiler.is_compiling() and not works(device, dtype, _filled(width)):  # asked before it is compiled
        raise NotImplementedError(f"heads of {width} by {device}'s flash attention")
    return query.device.type == "cuda"


@lru_cache
def kernel() -> Callable[..., Tensor] | None:
    """Return torch's `varlen_attn`; None where this torch has none, or one that takes other arguments (before 2.11)."""
    try:
        varlen_attn: Any = import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError):
        return None
    return varlen_attn if set(NEEDED) <= inspect.signature(varlen_attn).parameters.keys() else None


@lru_cache
def works(device: torch.device, dtype: torch.dtype, width: int = 64) -> bool:
    """Return whether a GPU's kernel computes what plain products do, for heads of this width: tried once, forward and
    backward, with grouped queries, with a sliding window and without."""
    attend = kernel()
    if attend is None or device.type != "cuda" or width > WIDEST or not torch.cuda.is_available():
        return False
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        with torch.enable_grad(), torch.autocast("cuda", enabled=False):
            return all(_alike(attend, device, dtype, width, window) for window in (None, 4))
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        return False


def _alike(
    attend: Callable[..., Tensor], device: torch.device, dtype: torch.dtype, width: int, window: int | None
) -> bool:
    """Return whether the kernel's numbers and gradients are, to rounding, those of float32 products, for three rows."""
    generator, lengths = torch.Generator().manual_seed(0), (5, 1, 33)
    numbers = [torch.randn(sum(lengths), heads, width, generator=generator) for heads in (4, 2, 2, 4)]
    ends = torch.tensor([0, 5, 6, 39], dtype=torch.int32, device=device)
    rounded = [x.to(device, dtype) for x in numbers]
    given = [x.clone().requires_grad_() for x in rounded[:3]]
    expected = [x.float().requires_grad_() for x in rounded[:3]]
    behind = -1 if window is None else window - 1
    out = _attend(attend, given, ends, 33, width**-0.5, (behind, 0))
    row = torch.arange(len(lengths), device=device).repeat_interleave(torch.tensor(lengths, device=device))
    step = torch.arange(len(row), device=device)
    apart = step[:, None] - step
    seen = (row[:, None] == row) & (apart >= 0) & (apart < (window or len(row)))
    query, key, value = expected
    key, value = (x.repeat_interleave(2, 1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * width**-0.5
    plain = torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)
    found = [out, *torch.autograd.grad(out, given, rounded[3])]
    truth = [plain, *torch.autograd.grad(plain, expected, rounded[3].float())]
    gaps = [float(((x.float() - y).abs().max() / y.abs().max()).detach()) for x, y in zip(found, truth, strict=True)]
    return max(gaps) <= 0.05


def register() -> None:
    """Let transformers know this attention by its name, `VARLEN`."""
    AttentionInterface.register(VARLEN, varlen)
    AttentionMaskInterface.register(VARLEN, _mask)


@contextmanager
def in_one_row() -> Iterator[None]:
    """Let the mask function know inside the context that a forward is of a long row."""
    token = IN_ONE_ROW.set(True)
    try:
        yield
    finally:
        IN_ONE_ROW.reset(token)


@contextmanager
def before_moving(device: torch.device) -> Iterator[None]:
    """Compute on the CPU, inside the context, what a GPU's kernel will compute; NotImplementedError where it won't."""
    token = LATER.set(device)
    try:
        yield
    finally:
        LATER.reset(token)
