"""Measure how far two ways to compute the same number differ, and judge whether the difference is a mistake.

A difference is rounding or a mistake. The `Limits` in float32 are far above rounding and far below the effect of any
mistake. The rounding of bfloat16 moves single log-probabilities by tenths of a nat: there the drift is reported, and
only an absurd one is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlhf.models.adapters import base_model
from rlhf.run import distributed

ROWS, RESPONSE_TOKENS, PROMPT_TOKENS = 4, 12, 96


ROUNDING = 1e-5  # nats; what an order of operations may change in float32


COPIED = 500_000_000  # parameters; no larger model is copied for a check


SHARDED = ("DEEPSPEED", "MEGATRON_LM")
"""Kinds of sharding whose gradients the checks don't look at."""


@dataclass(frozen=True)
class Limits:
    """The largest and the mean difference that two computations of the same numbers may have."""

    worst: float
    mean: float

    def refuse(self, gap: tuple[float, float]) -> bool:
        return not (gap[0] <= self.worst and gap[1] <= self.mean)  # a nan is refused


def limits(exact: bool) -> Limits:
    return Limits(1e-3, 1e-3) if exact else Limits(1.0, 0.15)


def gap(one: Tensor, other: Tensor, mask: Tensor | None = None) -> tuple[float, float]:
    """Return the largest and the mean absolute difference, over `mask`."""
    apart = (one.double() - other.double()).abs()
    apart = apart if mask is None else apart[mask]
    return float(apart.max()), float(apart.mean())


def is_exact(accelerator: Accelerator, model: nn.Module) -> bool:
    """Return whether this run computes in float32."""
    return accelerator.mixed_precision == "no" and all(
        p.dtype == torch.float32 for p in model.parameters() if p.is_floating_point()
    )


def spread(lengths: list[int], most: int) -> list[int]:
    """Return ROWS indices from the shortest row to the longest of at most `most` tokens (with too few such rows, of the
    shortest ones)."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    fitting = [i for i in order if lengths[i] <= most]
    fitting = fitting if len(fitting) >= ROWS else order[:ROWS]
    last = max(1, min(ROWS, len(fitting)) - 1)
    return [fitting[i * (len(fitting) - 1) // last] for i in range(min(ROWS, len(fitting)))]


def lengthened(ids: list[int], length: int, most: int) -> list[int]:
    """Repeat `ids` to three times `length`, but at most to 96 tokens more than `length`, and to `most`."""
    wanted = max(len(ids), min(3 * length, length + 96))
    return (ids * (wanted // len(ids) + 1))[: max(1, min(wanted, most))]


def max_positions(model: nn.Module) -> int:
    return getattr(base_model(model).config.get_text_config(), "max_position_embeddings", None) or 10**9


def check_gradients(model: nn.Module, loss: Tensor, must_move: tuple[str, ...] = ()) -> Finding:
    """Check that every trainable tensor is in the loss, that no gradient is NaN, and that not all of them are 0.

    A tensor whose name contains a part in `must_move` must have a gradient other than 0. Leaves no `.grad`, so the
    optimizer and DDP are not affected."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named or not loss.requires_grad:
        wrong = "nothing is trainable" if not named else "the loss depends on nothing trainable"
        missing, broken = [wrong], []
    else:
        finite, moving = {}, {}
        for name, gradient in _gradients(model, loss, named):
            if gradient is not None:
                finite[name], moving[name] = bool(gradient.isfinite().all()), bool(gradient.any())
        missing = [f"{name} gets none" for name, _ in named if name not in finite]
        broken = [f"{name} is not finite" for name, is_finite in finite.items() if not is_finite]
        still = [name for name, moves in moving.items() if not moves]
        if len(still) == len(named) - len(missing):
            broken += ["all are 0"]
        broken += [f"{name} is 0" for name in still if any(part in name for part in must_move)]
    wrongs = missing + broken
    return Finding(
        "gradients",
        f"{len(wrongs)} of {len(named)}: {', '.join(wrongs[:2])}" if wrongs else f"all {len(named)} trainable tensors",
        not wrongs,
        "a trainable weight that the loss doesn't reach never trains (a detached module, a wrong adapter)",
        "freeze it with requires_grad_(False) if it is not meant to train, else repair the model's forward",
    )


def _gradients(
    model: nn.Module, loss: Tensor, named: list[tuple[str, nn.Parameter]]
) -> Iterator[tuple[str, Tensor | None]]:
    """Yield each parameter's gradient. Of a model that FSDP2 shards only a backward reaches the parameters, and each
    gradient is gathered in its turn."""
    if not distributed.is_sharded(model):
        found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
        yield from zip([name for name, _ in named], found, strict=True)
        return
    loss.backward()
    distributed.reshard(model)  # the sharded parameters hold the gradients
    own = dict(model.named_parameters())
    for name, _ in named:
        gradient = own[name].grad
        yield name, None if gradient is None else distributed.whole_tensor(gradient)
    model.zero_grad()


def float32(model: nn.Module) -> nn.Module | None:
    """Return the model itself if its weights are float32, else a float32 copy; None if there can be none: it would be
    too large, or this process has parts of the weights only."""
    if any(isinstance(p, DTensor) for p in model.parameters()):
        return None
    if all(p.dtype == torch.float32 for p in model.parameters()):
        return model
    return copy.deepcopy(model).float() if sum(p.numel() for p in model.parameters()) <= COPIED else None


def drift(apart: tuple[float, float]) -> Finding:
    return Finding(
        "precision",
        f"bfloat16 moves log-probabilities by {apart[1]:.3g} nats on average, {apart[0]:.3g} at most",
        not limits(False).refuse((apart[0] / 4, apart[1])),
        "this is too much for rounding: a part of the model can't work in bfloat16",
        "set bf16: false",
        note=True,
    )


SAVED = 50_000_000  # parameters; no larger model is written to a temporary folder for a check


def same_after_reload(before: Tensor, after: Tensor, folder: str) -> Finding:
    apart = gap(after, before)[0]
    return Finding(
        "reload",
        f"{len(before)} scores differ by {apart:.3g} after loading {folder} again",
        apart <= 1e-5 * max(1.0, float(before.abs().max())),
        "its folder lacks the trained head, or the model was changed after loading",
        "save it with RewardTrainer.save_model (an adapter needs modules_to_save=['score'])",
    )


def range_of(scores: Tensor) -> str:
    return f"{float(scores.min()):.3g} to {float(scores.max()):.3g}"


@dataclass(frozen=True)
class Finding:
    """The result of one check. A failure has a cause and a remedy; a note is logged though it is not a failure."""

    check: str
    measured: str
    ok: bool
    cause: str = ""
    remedy: str = ""
    note: bool = False

    def __str__(self) -> str:
        return "; ".join(filter(None, (f"{self.check}: {self.measured}", self.cause, self.remedy)))
