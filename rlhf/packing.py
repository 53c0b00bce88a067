"""Rows of different lengths without padding: one behind the other as one long row, apart only inside attention.

Everything but attention treats each token by itself, so a padded batch pays there for tokens that nobody reads.
transformers knows the form (positions that start again at 0) and masks it; `rlhf.cpu.attention.short_rows` attends row
by row.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.models.adapters import backbone

Made = TypeVar("Made")

MOST_TOKENS = 2048  # in one long row: where a family makes its own mask, that is [N, N]
GRAIN = 32  # tokens: its length is a multiple, for kernels are compiled for each length, and kept (14 MB, SmolLM2-135M)
HALF_GRAIN = 32  # keys of a row in half precision: the softmax of 92 takes a CPU three times as long as that of 96


class Move(torch.autograd.Function):
    """Rows of x [n, D] in another order, `there` [m]; `back` [n] says where in it each row went.

    What comes to places that `back` does not name (padding) must be used by nobody: it hands no gradient back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].index_select(0, ctx.saved_tensors[0]), None, None


class Gather(torch.autograd.Function):
    """Some rows of x [n, D], `these` [m], each once; the others' gradient is 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, these: Tensor) -> Tensor:
        ctx.save_for_backward(these)
        ctx.rows = x.shape[0]
        return x.index_select(0, these)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        return grad.new_zeros(ctx.rows, grad.shape[1]).index_copy_(0, ctx.saved_tensors[0], grad), None


@dataclass(frozen=True)
class Rows:
    """Where the N tokens of one long row stand if each of its B rows is padded to the longest, T, or beyond."""

    places: Int[Tensor, "B T"]  # the token at each place; on padding, the row's last one
    real: Bool[Tensor, "B T"]
    back: Int[Tensor, "N"]  # the place of each token, b * T + t
    _made: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, mask: Bool[Tensor, "B L"], grain: int = 1) -> Rows:
        """The rows of a padded batch, wherever its padding is; T is the next multiple of `grain`."""
        lengths = mask.sum(-1)
        longest = int(lengths.max())
        steps = torch.arange(longest + -longest % grain, device=mask.device)
        real = steps < lengths[:, None]
        places = (lengths.cumsum(0) - lengths)[:, None] + torch.minimum(steps, lengths[:, None] - 1)
        return cls(places, real, real.flatten().nonzero().squeeze(-1))

    def once(self, make: Callable[..., Made], *of: Any) -> Made:
        """``make(*of)``, which every layer asks for, made for the first; tensors are known by identity."""
        if torch.compiler.is_compiling():
            return make(*of)
        key = (make.__qualname__, *(id(part) if isinstance(part, Tensor) else part for part in of))
        if key not in self._made:
            self._made[key] = make(*of), of  # kept too: a freed tensor's identity would be another's
        return self._made[key][0]

    def unpack(self, x: Float[Tensor, "1 H N D"]) -> Float[Tensor, "B H T D"]:
        """Each row by itself, contiguous."""
        heads, (rows, steps) = x.shape[1], self.places.shape
        there, back = self.once(self._there, heads), self.once(self._at, heads)
        return Move.apply(x[0].transpose(0, 1).reshape(-1, x.shape[-1]), there, back).view(
            rows, heads, steps, x.shape[-1]
        )

    def pack(self, x: Float[Tensor, "B H T D"]) -> Float[Tensor, "1 N H D"]:
        """`unpack` undone; the order of dimensions is that of an attention function's result."""
        at = self.once(self._at, x.shape[1])
        return Gather.apply(x.reshape(-1, x.shape[-1]), at).view(1, -1, x.shape[1], x.shape[-1])

    def mask_of(self, function: Callable[..., Tensor]) -> Bool[Tensor, "B 1 T T"]:
        """A mask that transformers gives as a function of (row, head, query, key), and would make [N, N]."""
        first = self.places.new_zeros(1, 1, 1, 1)
        seen = function(first, first, self.places[:, None, :, None], self.places[:, None, None, :])
        return seen & self.real[:, None, None, :]

    def mask(self, whole: Tensor | None) -> Tensor | None:
        """Each row's part of the long row's mask [1, X, N, N]: [B, X, T, T], False (or the least number) on padding."""
        rows, steps = self.places.shape
        if whole is None or (whole.shape[0], whole.shape[-1]) == (rows, steps):  # already apart
            return whole
        count = whole.shape[-1]
        index = self.places[:, :, None] * count + self.places[:, None, :]
        own = whole[0].flatten(1).index_select(1, index.flatten()).view(-1, rows, steps, steps).transpose(0, 1)
        least = False if own.dtype == torch.bool else torch.finfo(own.dtype).min
        return own.masked_fill(~self.real[:, None, None, :], least)

    def _there(self, heads: int) -> Int[Tensor, "BHT"]:
        """The token and head at each place of [B, heads, T], in [N, heads]."""
        head = torch.arange(heads, device=self.places.device)
        return (self.places[:, None, :] * heads + head[:, None]).flatten()

    def _at(self, heads: int) -> Int[Tensor, "NH"]:
        """The place of each token's each head in [B, heads, T]."""
        steps = self.places.shape[1]
        first = self.back // steps * (heads * steps) + self.back % steps
        return (first[:, None] + torch.arange(heads, device=first.device) * steps).flatten()


PACKED: ContextVar[Rows | None] = ContextVar("packed", default=None)
"""The rows of the forward in hand, for the mask, which transformers asks for without `packed_rows`."""


def packed_hidden(model: Any, input_ids: Int[Tensor, "B L"], mask: Bool[Tensor, "B L"]) -> Float[Tensor, "N H"]:
    """Hidden states of the batch's real tokens, row after row."""
    count = int(mask.sum())
    more = -count % GRAIN
    if 0 < more <= mask.shape[1]:  # a row of them, of which nothing is read
        mask = torch.cat([mask, torch.arange(mask.shape[1], device=mask.device)[None] < more])
        input_ids = torch.cat([input_ids, input_ids[:1]])
    positions = (mask.long().cumsum(-1) - 1)[mask]
    half = torch.is_autocast_enabled(mask.device.type) or model.dtype.itemsize == 2
    rows = Rows.of(mask, HALF_GRAIN if half else 1)
    token = PACKED.set(rows)
    try:
        output = backbone(model)(
            input_ids=input_ids[mask][None], position_ids=positions[None], use_cache=False, packed_rows=rows
        )
    finally:
        PACKED.reset(token)
    return output.last_hidden_state[0, :count]


@torch.no_grad()
def can_pack(model: Any) -> bool:
    """Whether a row computes the same in one long row as alone, and, to the last bit, whatever stands before it.

    Not where something else than attention sees other tokens (a convolution, a recurrent state), or a family has
    positions of its own.
    """
    vocabulary, device = backbone(model).get_input_embeddings().weight.shape[0], model.device
    first, other, second = ([n % vocabulary for n in ids] for ids in ([7, 2, 5, 1], [3, 9, 4, 8], [1, 6, 4]))
    training = model.training
    model.eval()
    try:
        mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]], dtype=torch.bool, device=device)
        seen = [packed_hidden(model, torch.tensor([row, [*second, 0]], device=device), mask) for row in (first, other)]
        alone = [
            backbone(model)(input_ids=torch.tensor([row], device=device), use_cache=False).last_hidden_state[0]
            for row in (first, second)
        ]
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    finally:
        model.train(training)
    expected = torch.cat(alone).float()
    apart = float((seen[0].float() - expected).abs().max() / expected.abs().max())
    limit = 1e-4 if seen[0].dtype == torch.float32 else 0.05  # in half precision, shapes alone make a difference
    return apart <= limit and torch.equal(seen[0][len(first) :], seen[1][len(first) :])
