"""Rows of different lengths without padding: joined into one long row, and separated only inside attention.

Everything but attention treats each token by itself, so a padded batch computes padding tokens that nobody reads.
transformers supports this form (positions that restart at 0): flash attention computes it row by row, and so does
`rlhf.cpu.attention.short_rows`; SDPA masks it with a mask [N, N]. Flash attention is the flash-attn package's, or
torch's own (`torch_flash`).

Where attention takes rows apart itself (`short_rows`), tokens with which neighbouring rows begin, such as a prompt with
several responses, can stand in the long row once (`common`): they are then computed once, in attention where they are
half of a row or more (`Rows.parts`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.utils import is_flash_attn_2_available

from rlhf.models import torch_flash
from rlhf.models.adapters import backbone, base_model
from rlhf.models.long_row import PACKED, Rows
from rlhf.padding import pad

Packing = Literal["auto", "on", "off"]
BY_ROWS = "rlhf_short_rows"  # the attention of `rlhf.cpu.attention`
FLASH = "flash_attention_2"  # of the flash-attn package
VARLEN = torch_flash.VARLEN
MOST_TOKENS = 2048  # in one long row but for flash attention: SDPA, and a family with its own mask, make it [N, N]
GRAIN = 32  # the long row's length is a multiple: kernels are compiled and kept per length (14 MB, SmolLM2-135M)
FEW = 16  # less than one token in so many that need not be computed again is not worth the index
HALF_GRAIN = 32  # a row's keys in half precision are a multiple: softmax of 92 takes a CPU 3 times as long as of 96


def common(model: Any, input_ids: Int[Tensor, "B L"], mask: Bool[Tensor, "B L"]) -> Int[Tensor, "B"] | None:
    """Count the tokens with which each row, padded on the right, begins as the row before it does. None where these are
    few of all, or the model's attention doesn't take rows apart itself."""
    if attention_of(model) != BY_ROWS:
        return None
    alike = (input_ids[1:] == input_ids[:-1]) & mask[1:] & mask[:-1]
    shared = torch.nn.functional.pad(alike.long().cumprod(-1).sum(-1), (1, 0))
    return shared if int(shared.sum()) * FEW >= int(mask.sum()) else None


def packed_hidden(
    model: Any, input_ids: Int[Tensor, "B L"], mask: Bool[Tensor, "B L"], shared: Int[Tensor, "B"] | None = None
) -> Float[Tensor, "N H"]:
    """Compute the hidden states of the batch's N real tokens, row after row. shared: as in `as_one_row`; N counts such
    tokens once."""
    with as_one_row(model, input_ids, mask, shared) as given:
        output = backbone(model)(**given)
    return output.last_hidden_state[0, : int(mask.sum()) - (0 if shared is None else int(shared.sum()))]


def padded_hidden(
    model: Any, input_ids: Int[Tensor, "B L"], mask: Bool[Tensor, "B L"], shared: Int[Tensor, "B"] | None = None
) -> Float[Tensor, "B L H"]:
    """Compute `packed_hidden`, and put the states where their tokens stand in the batch; 0 on padding."""
    return apart(packed_hidden(model, input_ids, mask, shared), mask, shared)


def apart(
    states: Float[Tensor, "N H"], mask: Bool[Tensor, "B L"], shared: Int[Tensor, "B"] | None = None
) -> Float[Tensor, "B L H"]:
    """Put the states of a long row where their tokens stand in the batch; 0 on padding. shared: as in `as_one_row`."""
    if shared is None:
        own = states[: int(mask.sum())]
    else:
        rows = Rows.of(mask, shared=shared)
        own = states.index_select(0, rows.tokens[rows.real])
    return states.new_zeros(*mask.shape, states.shape[-1]).index_put((mask,), own)


@contextmanager
def as_one_row(
    model: Any, input_ids: Int[Tensor, "B L"], mask: Bool[Tensor, "B L"], shared: Int[Tensor, "B"] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield a forward's arguments that hold the batch's real tokens as one long row; call the model inside the context.

    The long row may end in a few tokens more, whose states are to be thrown away. shared: as `common` counts them, for
    a model whose attention is `short_rows`; such tokens stand in the long row once."""
    more = -int(mask.sum() - (0 if shared is None else shared.sum())) % GRAIN
    if 0 < more <= mask.shape[1]:
        mask = torch.cat([mask, torch.arange(mask.shape[1], device=mask.device)[None] < more])
        input_ids = torch.cat([input_ids, input_ids[:1]])
        shared = None if shared is None else torch.nn.functional.pad(shared, (0, 1))
    place = mask.long().cumsum(-1) - 1
    own = mask if shared is None else mask & (place >= shared[:, None])
    ids = input_ids[own][None]
    given = {"input_ids": ids, "position_ids": place[own][None], "use_cache": False}
    if shared is not None:  # else transformers would find rows by their positions, and no token its row's beginning
        given["attention_mask"] = torch.ones_like(ids)
    if is_flash(model):  # it would find the rows by their positions, in every layer anew
        lengths = mask.sum(-1)
        ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        longest = int(lengths.max())
        given |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
        with torch_flash.in_one_row():
            yield given
        return
    rows = Rows.of(mask, HALF_GRAIN if is_half(model) else 1, shared)
    token = PACKED.set(rows)
    try:
        yield given | {"packed_rows": rows}
    finally:
        PACKED.reset(token)


def attention_of(model: Any) -> str:
    """Return transformers' name of the attention that a model computes."""
    return str(getattr(base_model(model).config, "_attn_implementation", None) or "")


def is_flash(model: Any) -> bool:
    """Return whether a model computes flash attention: the package's, or torch's own."""
    return "flash" in attention_of(model) or attention_of(model) == VARLEN


def is_half(model: Any) -> bool:
    """Return whether a model computes in half precision here and now."""
    return torch.is_autocast_enabled(model.device.type) or model.dtype.itemsize == 2


def most_tokens(model: Any) -> int:
    """Return how many tokens one long row may have."""
    return 2**62 if is_flash(model) else MOST_TOKENS


def fits(model: Any, mask: Bool[Tensor, "B L"], shared: Int[Tensor, "B"] | None = None) -> bool:
    """Return whether a batch is worth being packed, and short enough."""
    tokens = int(mask.sum()) - (0 if shared is None else int(shared.sum()))
    return tokens < mask.numel() and tokens <= most_tokens(model)


def choose(model: Any, setting: Packing) -> bool:
    """Return whether to compute a model's batches as long rows.

    auto: where attention takes such a row apart; on: by SDPA with a mask, too; off: never. Always only where the model
    computes the same (`can_pack`)."""
    if setting == "off" or (setting == "auto" and not (is_flash(model) or attention_of(model) == BY_ROWS)):
        return False
    return can_pack(model)


def prepare(model: Any, setting: Packing, dtype: torch.dtype, device: torch.device | None = None) -> bool:
    """Let a model compute flash attention where it can (`use_flash`); return whether to compute its batches as long
    rows (`choose`). dtype: the precision of the run's matrix products; device: where the model will be; None: where it
    is."""
    if setting == "off":
        return False
    use_flash(model, dtype, device)
    with asked(model, dtype, device):
        packs = choose(model, setting)
    if not packs:
        leave_varlen(model)
    return packs


def leave_varlen(model: Any) -> None:
    """Let a model whose rows will be padded compute SDPA itself, not by way of torch's flash attention, which takes
    long rows alone: some families compute another mask for an attention that they don't know by its name."""
    if attention_of(model) == VARLEN:
        set_attention(model, "sdpa")


def use_flash(model: Any, dtype: torch.dtype, device: torch.device | None = None) -> None:
    """Let a model on a GPU compute flash attention instead of SDPA, if the run computes in half precision: that of
    flash-attn, if it is installed and the family has it, else torch's own. device: as in `prepare`."""
    device = device or model.device
    if device.type != "cuda" or dtype.itemsize != 2 or attention_of(model) != "sdpa":
        return
    if is_flash_attn_2_available():
        with suppress(ImportError, ValueError):
            set_attention(model, FLASH)
    if attention_of(model) == "sdpa" and torch_flash.works(device, dtype):
        set_attention(model, VARLEN)


@contextmanager
def asked(model: Any, dtype: torch.dtype, device: torch.device | None = None) -> Iterator[None]:
    """Let a model compute in the run's precision inside the context and, where it is still on the CPU, what it will
    compute on its GPU: flash attention, row by row. The arguments are those of `prepare`."""
    with torch.autocast(model.device.type, dtype, enabled=dtype.itemsize == 2), attention_kept(model):
        if device is None or device.type == model.device.type or not is_flash(model):
            yield
        elif attention_of(model) == VARLEN:
            with torch_flash.before_moving(device):
                yield
        else:
            set_attention(model, VARLEN)
            yield


def set_attention(model: Any, name: str) -> None:
    """Let a model compute another attention, by transformers' name of it. A family with its own (Falcon) keeps that,
    and transformers logs a warning."""
    plain, before = base_model(model), attention_of(model)
    if name == VARLEN:
        torch_flash.register()
    plain.set_attn_implementation(name)
    for module in plain.modules():  # `disable_dropout` may have given inner modules their own config
        config: Any = getattr(module, "config", None)
        if attention_of(model) == name and getattr(config, "_attn_implementation", None) == before:
            config._attn_implementation = name


@contextmanager
def attention_kept(model: Any) -> Iterator[None]:
    """Put a model's attention back after the context: flash attention refuses a float32 model outside autocast."""
    before = attention_of(model)
    try:
        yield
    finally:
        if attention_of(model) != before:
            set_attention(model, before)


@contextmanager
def decoding(model: Any) -> Iterator[None]:
    """Let a model compute SDPA inside the context where it computes flash attention, which refuses float32, and would
    take the padding out of a batch at every token and layer."""
    with attention_kept(model):
        if is_flash(model):
            set_attention(model, "sdpa")
        yield


@torch.no_grad()
def can_pack(model: Any) -> bool:
    """Return whether a row computes the same in one long row as alone, to the last bit for any row before it, and where
    it begins as that one does.

    False if another part than attention sees other tokens (a convolution, a recurrent state), or if a family computes
    its own positions.
    """
    vocabulary = backbone(model).get_input_embeddings().weight.shape[0]
    first, other, second, alike = (
        [n % vocabulary for n in ids] for ids in ([7, 2, 5, 1], [3, 9, 4, 8], [1, 6, 4], [7, 2, 6])
    )

    def together(*rows: list[int]) -> Tensor:
        ids, mask = pad(rows, 0, model.device)
        return padded_hidden(model, ids, mask, common(model, ids, mask))[mask]

    training = model.training
    model.eval()
    try:
        packed, moved, begun = together(first, second), together(other, second), together(first, alike)
        alone = [
            backbone(model)(input_ids=torch.tensor([row], device=model.device), use_cache=False).last_hidden_state[0]
            for row in (first, second, first, alike)
        ]
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    finally:
        model.train(training)
    expected = torch.cat(alone).float()
    error = float((torch.cat([packed, begun]).float() - expected).abs().max() / expected.abs().max())
    limit = 0.05 if is_half(model) else 1e-4  # in half precision the shape alone makes a difference
    return error <= limit and torch.equal(packed[len(first) :], moved[len(first) :])
