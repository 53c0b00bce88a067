"""Rows of different lengths without padding: joined into one long row, and separated only inside attention.

Everything but attention treats each token by itself, so a padded batch computes padding tokens that nobody reads.
transformers supports this form (positions that restart at 0): flash attention computes it row by row, and so does
`rlhf.cpu.attention.short_rows`; SDPA masks it with a mask [N, N].

Where attention takes rows apart itself (`short_rows`), tokens with which neighbouring rows begin, such as a prompt with
several responses, can stand in the long row once (`common`): all but attention then computes them once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.utils import is_flash_attn_2_available

from rlhf.models.adapters import backbone, base_model

Made = TypeVar("Made")

Packing = Literal["auto", "on", "off"]
BY_ROWS = "rlhf_short_rows"  # the attention of `rlhf.cpu.attention`
FLASH = "flash_attention_2"
MOST_TOKENS = 2048  # in one long row but for flash attention: SDPA, and a family with its own mask, make it [N, N]
GRAIN = 32  # the long row's length is a multiple: kernels are compiled and kept per length (14 MB, SmolLM2-135M)
HALF_GRAIN = 32  # a row's keys in half precision are a multiple: softmax of 92 takes a CPU 3 times as long as of 96


class Move(torch.autograd.Function):
    """The rows of x [n, D] in another order: row i of the result is row `source[i]`, source [m].

    target [n]: the index in the result of each row of x. The other rows of the result (padding) get no gradient, so
    nothing may use them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(target)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].index_select(0, ctx.saved_tensors[0]), None, None


class Gather(torch.autograd.Function):
    """The rows `index` [m] of x [n, D], each at most once; the gradient of the others is 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        return grad.new_zeros(ctx.rows, grad.shape[1]).index_copy_(0, ctx.saved_tensors[0], grad), None


class Share(torch.autograd.Function):
    """As `Move`, where rows of x may be in the result several times: their gradients are added up.

    more, again [k]: the indices in the result of all but one of each row's places, and the rows of x that stand there.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, target: Tensor, more: Tensor, again: Tensor) -> Tensor:
        ctx.save_for_backward(target, more, again)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        target, more, again = ctx.saved_tensors
        grad = grads[0].index_select(0, target)
        return grad.index_add_(0, again, grads[0].index_select(0, more)), None, None, None, None


@dataclass(frozen=True)
class Rows:
    """The map between one long row of N tokens and its B rows, each padded to T tokens (the longest, or a bit more)."""

    tokens: Int[Tensor, "B T"]  # the index in the long row of each token; on padding, of the row's last token
    real: Bool[Tensor, "B T"]  # False on padding
    padded: Int[Tensor, "N"]  # the index b * T + t in the padded rows of each token of the long row
    repeated: Int[Tensor, "R"] | None = None  # the same of its further places, where rows share tokens
    _cached: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, mask: Bool[Tensor, "B L"], grain: int = 1, shared: Int[Tensor, "B"] | None = None) -> Rows:
        """Return the map for a batch with padding on either side; T is rounded up to a multiple of `grain`. shared:
        how many tokens each row has in common with the row before it, from the first on (`common`)."""
        lengths = mask.sum(-1)
        longest = int(lengths.max())
        steps = torch.arange(longest + -longest % grain, device=mask.device)
        real = steps < lengths[:, None]
        last = torch.minimum(steps, lengths[:, None] - 1)
        if shared is None:
            tokens = (lengths.cumsum(0) - lengths)[:, None] + last
            return cls(tokens, real, real.flatten().nonzero().squeeze(-1))
        own = steps >= shared[:, None]
        number = torch.arange(len(mask), device=mask.device)[:, None]
        owner = torch.where(own, number, -1).cummax(0).values  # the row in which a token stood first
        start = (lengths - shared).cumsum(0) - lengths
        tokens = (start[owner] + steps).gather(1, last)
        first, again = ((real & kind).flatten().nonzero().squeeze(-1) for kind in (own, ~own))
        return cls(tokens, real, first, again)

    def once(self, make: Callable[..., Made], *of: Any) -> Made:
        """Return ``make(*of)``, computed in the first layer and cached for the rest; tensors are keyed by identity."""
        if torch.compiler.is_compiling():
            return make(*of)
        key = (make.__qualname__, *(id(part) if isinstance(part, Tensor) else part for part in of))
        if key not in self._cached:
            self._cached[key] = make(*of), of  # `of` too: the id of a freed tensor may be given to another one
        return self._cached[key][0]

    def unpack(self, x: Float[Tensor, "1 H N D"]) -> Float[Tensor, "B H T D"]:
        """Split the long row into its padded rows, contiguous."""
        heads, (rows, steps) = x.shape[1], self.tokens.shape
        flat = x[0].transpose(0, 1).reshape(-1, x.shape[-1])
        source, target = self.once(self._sources, heads), self.once(self._targets, heads, self.padded)
        if self.repeated is None:
            apart = Move.apply(flat, source, target)
        else:
            more = self.once(self._targets, heads, self.repeated)
            apart = Share.apply(flat, source, target, more, self.once(source.index_select, 0, more))
        return apart.view(rows, heads, steps, x.shape[-1])

    def pack(self, x: Float[Tensor, "B H T D"]) -> Float[Tensor, "1 N H D"]:
        """Join the padded rows into the long row again; the dimensions are ordered as in attention's result."""
        index = self.once(self._targets, x.shape[1], self.padded)
        return Gather.apply(x.reshape(-1, x.shape[-1]), index).view(1, -1, x.shape[1], x.shape[-1])

    def mask_of(self, function: Callable[..., Tensor]) -> Bool[Tensor, "B 1 T T"]:
        """Evaluate transformers' mask function of (row, head, query, key) for each row alone instead of as [N, N]."""
        first = self.tokens.new_zeros(1, 1, 1, 1)
        places = self.tokens
        if self.repeated is not None:  # the long row's order says nothing of distances; `as_one_row` asks for one row
            places = torch.arange(places.shape[1], device=places.device).expand_as(places)
        seen = function(first, first, places[:, None, :, None], places[:, None, None, :])
        return seen & self.real[:, None, None, :]

    def mask(self, whole: Tensor | None) -> Tensor | None:
        """Cut each row's part [B, X, T, T] out of the long row's mask [1, X, N, N]; False or the minimum on padding."""
        rows, steps = self.tokens.shape
        if whole is None or (whole.shape[0], whole.shape[-1]) == (rows, steps):  # already separated by row
            return whole
        count = whole.shape[-1]
        index = self.tokens[:, :, None] * count + self.tokens[:, None, :]
        own = whole[0].flatten(1).index_select(1, index.flatten()).view(-1, rows, steps, steps).transpose(0, 1)
        least = False if own.dtype == torch.bool else torch.finfo(own.dtype).min
        return own.masked_fill(~self.real[:, None, None, :], least)

    def _sources(self, heads: int) -> Int[Tensor, "BHT"]:
        """Return, for each entry of [B, heads, T], its index in the flattened [N, heads]."""
        head = torch.arange(heads, device=self.tokens.device)
        return (self.tokens[:, None, :] * heads + head[:, None]).flatten()

    def _targets(self, heads: int, places: Int[Tensor, "N"]) -> Int[Tensor, "NH"]:
        """Return, for each entry of [N, heads], its index in the flattened [B, heads, T]. places: b * T + t."""
        steps = self.tokens.shape[1]
        first = places // steps * (heads * steps) + places % steps
        return (first[:, None] + torch.arange(heads, device=first.device) * steps).flatten()


PACKED: ContextVar[Rows | None] = ContextVar("packed", default=None)
"""The rows of the current forward, for the mask function, to which transformers does not pass `packed_rows`."""


def common(model: Any, input_ids: Int[Tensor, "B L"], mask: Bool[Tensor, "B L"]) -> Int[Tensor, "B"] | None:
    """Count the tokens with which each row, padded on the right, begins as the row before it does. None where no row
    does, or the model's attention doesn't take rows apart itself."""
    if attention_of(model) != BY_ROWS:
        return None
    alike = (input_ids[1:] == input_ids[:-1]) & mask[1:] & mask[:-1]
    shared = torch.nn.functional.pad(alike.long().cumprod(-1).sum(-1), (1, 0))
    return shared if bool(shared.any()) else None


def packed_hidden(model: Any, input_ids: Int[Tensor, "B L"], mask: Bool[Tensor, "B L"]) -> Float[Tensor, "N H"]:
    """Compute the hidden states of the batch's N real tokens, row after row."""
    with as_one_row(model, input_ids, mask) as given:
        output = backbone(model)(**given)
    return output.last_hidden_state[0, : int(mask.sum())]


def padded_hidden(model: Any, input_ids: Int[Tensor, "B L"], mask: Bool[Tensor, "B L"]) -> Float[Tensor, "B L H"]:
    """Compute `packed_hidden`, and put the states where their tokens stand in the batch; 0 on padding."""
    return apart(packed_hidden(model, input_ids, mask), mask)


def apart(
    states: Float[Tensor, "N H"], mask: Bool[Tensor, "B L"], shared: Int[Tensor, "B"] | None = None
) -> Float[Tensor, "B L H"]:
    """Put the states of a long row where their tokens stand in the batch; 0 on padding. shared: as in `as_one_row`."""
    rows = Rows.of(mask, shared=shared)
    own = states[: int(mask.sum())] if shared is None else states.index_select(0, rows.tokens[rows.real])
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
        yield given | {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
        return
    half = torch.is_autocast_enabled(mask.device.type) or model.dtype.itemsize == 2
    rows = Rows.of(mask, HALF_GRAIN if half else 1, shared)
    token = PACKED.set(rows)
    try:
        yield given | {"packed_rows": rows}
    finally:
        PACKED.reset(token)


def attention_of(model: Any) -> str:
    """Return transformers' name of the attention that a model computes."""
    return str(getattr(base_model(model).config, "_attn_implementation", None) or "")


def is_flash(model: Any) -> bool:
    """Return whether a model computes flash attention."""
    return "flash" in attention_of(model)


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


def prepare(model: Any, setting: Packing, dtype: torch.dtype) -> bool:
    """Let a model compute flash attention where it can (`use_flash`); return whether to compute its batches as long
    rows (`choose`). dtype: the precision of the run's matrix products."""
    if setting == "off":
        return False
    use_flash(model, dtype)
    with torch.autocast(model.device.type, dtype, enabled=dtype.itemsize == 2):
        return choose(model, setting)


def use_flash(model: Any, dtype: torch.dtype) -> None:
    """Let a model on a GPU compute flash attention instead of SDPA, if flash-attn is installed, the family has it and
    the run computes in half precision."""
    half_on_gpu = model.device.type == "cuda" and dtype.itemsize == 2
    if half_on_gpu and attention_of(model) == "sdpa" and is_flash_attn_2_available():
        with suppress(ImportError, ValueError):
            set_attention(model, FLASH)


def set_attention(model: Any, name: str) -> None:
    """Let a model compute another attention, by transformers' name of it. A family with its own (Falcon) keeps that,
    and transformers logs a warning."""
    plain, before = base_model(model), attention_of(model)
    plain.set_attn_implementation(name)
    for module in plain.modules():  # `disable_dropout` may have given inner modules their own config
        config: Any = getattr(module, "config", None)
        if attention_of(model) == name and getattr(config, "_attn_implementation", None) == before:
            config._attn_implementation = name


@contextmanager
def decoding(model: Any) -> Iterator[None]:
    """Let a model compute SDPA inside the context where it computes flash attention, which would take the padding out
    of a batch at every token and layer."""
    before = attention_of(model)
    if not is_flash(model):
        yield
        return
    set_attention(model, "sdpa")
    try:
        yield
    finally:
        set_attention(model, before)


@torch.no_grad()
def can_pack(model: Any) -> bool:
    """Return whether a row computes the same in one long row as alone, to the last bit for any row before it.

    False if another part than attention sees other tokens (a convolution, a recurrent state), or if a family computes
    its own positions.
    """
    vocabulary, device = backbone(model).get_input_embeddings().weight.shape[0], model.device
    first, other, second = ([n % vocabulary for n in ids] for ids in ([7, 2, 5, 1], [3, 9, 4, 8], [1, 6, 4]))
    training = model.training
    model.eval()
    try:
        mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]], dtype=torch.bool, device=device)
        packed = [
            packed_hidden(model, torch.tensor([row, [*second, 0]], device=device), mask) for row in (first, other)
        ]
        alone = [
            backbone(model)(input_ids=torch.tensor([row], device=device), use_cache=False).last_hidden_state[0]
            for row in (first, second)
        ]
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    finally:
        model.train(training)
    expected = torch.cat(alone).float()
    error = float((packed[0].float() - expected).abs().max() / expected.abs().max())
    limit = 1e-4 if packed[0].dtype == torch.float32 else 0.05  # in half precision the shape alone makes a difference
    return error <= limit and torch.equal(packed[0][len(first) :], packed[1][len(first) :])
