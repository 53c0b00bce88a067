"""One long row of several rows' tokens, and each row by itself: the map between them, which only attention needs.

Padding is in neither; tokens that rows share stand in the long row once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Made = TypeVar("Made")


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
    """The rows `source` [m] of x [n, D]. Of the result, only the rows `used` [k] are used (None: all), and they are
    different rows of x; the gradient of the others is 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, used: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(source, used)
        ctx.rows = x.shape[0]
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (source, used), grad = ctx.saved_tensors, grads[0]
        if used is not None:
            source, grad = source.index_select(0, used), grad.index_select(0, used)
        return grad.new_zeros(ctx.rows, grad.shape[1]).index_copy_(0, source, grad), None, None


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


@dataclass(frozen=True, eq=False)
class Part:
    """Some of the rows, and the queries for which attention is computed together, each over its row's keys."""

    rows: Int[Tensor, "b"]
    steps: Int[Tensor, "b S"]  # each query's place in its row; on padding that of the row's last token
    tokens: Int[Tensor, "b S"]  # its index in the long row
    used: Int[Tensor, "n"]  # the indices i * S + s of the queries that are used: those where their token stands first
    whole: bool  # all queries of these rows

    def of(self, x: Tensor) -> Tensor:
        """Return these rows of a tensor of all rows."""
        return x if len(self.rows) == len(x) else x.index_select(0, self.rows)

    def mask_of(self, mask: Tensor | None) -> Tensor | None:
        """Return these queries' part [b, X, S, T] of a mask [B, X, T, T]."""
        if mask is None or self.whole:
            return None if mask is None else self.of(mask)
        index = self.steps[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[-1])
        return self.of(mask).gather(2, index)


@dataclass(frozen=True)
class Rows:
    """The map between one long row of N tokens and its B rows, each padded to T tokens (the longest, or a bit more)."""

    tokens: Int[Tensor, "B T"]  # the index in the long row of each token; on padding, of the row's last token
    real: Bool[Tensor, "B T"]  # False on padding
    padded: Int[Tensor, "N"]  # the index b * T + t in the padded rows of each token of the long row
    parts: tuple[Part, ...]  # of one or two kinds of rows; a row that is all in the one before it is in none
    repeated: Int[Tensor, "R"] | None = None  # as `padded`, of the tokens' further places, where rows share some
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
            every = torch.arange(len(mask), device=mask.device)
            used = real.flatten().nonzero().squeeze(-1)
            return cls(tokens, real, used, (Part(every, last, tokens, used, True),))
        own = steps >= shared[:, None]
        number = torch.arange(len(mask), device=mask.device)[:, None]
        owner = torch.where(own, number, -1).cummax(0).values  # the row in which a token stood first
        start = (lengths - shared).cumsum(0) - lengths
        tokens = (start[owner] + steps).gather(1, last)
        first, again = ((real & kind).flatten().nonzero().squeeze(-1) for kind in (own, ~own))
        return cls(tokens, real, first, _parts(tokens, lengths, shared), again)

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
        heads, flat = x.shape[1], self._flat(x)
        source, target = self.once(_sources, self.tokens, heads), self.once(_targets, self.tokens, self.padded, heads)
        if self.repeated is None:
            apart = Move.apply(flat, source, target)
        else:
            more = self.once(_targets, self.tokens, self.repeated, heads)
            apart = Share.apply(flat, source, target, more, self.once(source.index_select, 0, more))
        return apart.view(len(self.tokens), heads, -1, x.shape[-1])

    def queries(self, x: Float[Tensor, "1 H N D"], part: Part) -> Float[Tensor, "b H S D"]:
        """Take a part's queries out of the long row, contiguous."""
        if self.repeated is None:
            return self.unpack(x)
        heads = x.shape[1]
        source, used = self.once(_sources, part.tokens, heads), self.once(_targets, part.tokens, part.used, heads)
        return Gather.apply(self._flat(x), source, used).view(len(part.rows), heads, -1, x.shape[-1])

    def pack(self, found: Sequence[Float[Tensor, "b H S D"]]) -> Float[Tensor, "1 N H D"]:
        """Join what was computed for each part into the long row; the dimensions are ordered as in attention's
        result."""
        heads, width = found[0].shape[1], found[0].shape[-1]
        flat = [x.reshape(-1, width) for x in found]
        index = self.once(self._places, heads)
        return Gather.apply(flat[0] if len(flat) == 1 else torch.cat(flat), index).view(1, -1, heads, width)

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
        if whole is None and self.repeated is not None:  # a part's queries don't begin with the first key
            return self.mask_of(lambda batch, head, query, key: key <= query)
        if whole is None or (whole.shape[0], whole.shape[-1]) == (rows, steps):  # already separated by row
            return whole
        count = whole.shape[-1]
        index = self.tokens[:, :, None] * count + self.tokens[:, None, :]
        own = whole[0].flatten(1).index_select(1, index.flatten()).view(-1, rows, steps, steps).transpose(0, 1)
        least = False if own.dtype == torch.bool else torch.finfo(own.dtype).min
        return own.masked_fill(~self.real[:, None, None, :], least)

    def only_causal(self, mask: Tensor | None) -> bool:
        """Return whether a mask [B, 1, T, T] of `mask` hides later tokens alone: rows end in their padding, so no real
        token sees it without a mask either."""
        if mask is None or mask.dtype != torch.bool or mask.shape[1] != 1:
            return False
        causal = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril()
        return bool(torch.equal(mask, causal & self.real[:, None, None, :]))

    def _flat(self, x: Float[Tensor, "1 H N D"]) -> Float[Tensor, "NH D"]:
        return x[0].transpose(0, 1).reshape(-1, x.shape[-1])

    def _places(self, heads: int) -> Int[Tensor, "NH"]:
        """Return where each entry of the flattened [N, heads] is among those of all parts, [b, heads, S] each."""
        places, before = self.tokens.new_empty(len(self.padded), heads), 0
        for part in self.parts:
            tokens = part.tokens.flatten()[part.used]
            places[tokens] = before + _targets(part.tokens, part.used, heads).view(-1, heads)
            before += part.tokens.numel() * heads
        return places.flatten()


def _parts(tokens: Int[Tensor, "B T"], lengths: Int[Tensor, "B"], shared: Int[Tensor, "B"]) -> tuple[Part, ...]:
    """Divide rows: those that share half of their tokens or more with the row before, with the queries of the others
    alone, and whole rows."""
    follows, found = 2 * shared >= lengths, []
    for whole, chosen in ((True, ~follows), (False, follows & (shared < lengths))):
        rows = chosen.nonzero().squeeze(-1)
        if not len(rows):
            continue
        length, begun = lengths[rows, None], shared[rows, None]
        start = 0 if whole else begun
        width = tokens.shape[1] if whole else int((length - begun).max())
        steps = start + torch.arange(width, device=tokens.device).expand(len(rows), -1)
        used = ((steps >= begun) & (steps < length)).flatten().nonzero().squeeze(-1)
        steps = torch.minimum(steps, length - 1)
        found.append(Part(rows, steps, tokens[rows].gather(1, steps), used, whole))
    return tuple(found)


def _sources(tokens: Int[Tensor, "b S"], heads: int) -> Int[Tensor, "bHS"]:
    """Return, for each entry of [b, heads, S], its index in the flattened [N, heads]."""
    head = torch.arange(heads, device=tokens.device)
    return (tokens[:, None, :] * heads + head[:, None]).flatten()


def _targets(tokens: Int[Tensor, "b S"], places: Int[Tensor, "n"], heads: int) -> Int[Tensor, "nH"]:
    """Return the index of each head of these places, i * S + s, in the flattened [b, heads, S]."""
    steps = tokens.shape[1]
    first = places // steps * (heads * steps) + places % steps
    return (first[:, None] + torch.arange(heads, device=first.device) * steps).flatten()


PACKED: ContextVar[Rows | None] = ContextVar("packed", default=None)
"""The rows of the current forward, for the mask function, to which transformers does not pass `packed_rows`."""
