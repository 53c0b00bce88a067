"""RMSNorm layers that keep little for backward: their input in its own precision, and one number per row.

transformers computes ``weight * (x * rsqrt(mean(x^2) + eps))`` step by step in float32, and autograd keeps two float32
tensors of x's size per layer. `fuse` gives the layers another forward and backward; their weights do not change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


class RMSNormProduct(torch.autograd.Function):
    """The product ``weight * (x * rsqrt(mean(x^2) + eps))``, x [*B, H]; the outer bracket is computed in float32 and
    rounded to the precision of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse)
        return weight * (wide * inverse).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        grad, wide = grads[0], x.float()
        grad_weight = None
        if ctx.needs_input_grad[1]:
            normed = (wide * inverse).to(x.dtype)
            grad_weight = (grad * normed).flatten(0, -2).sum(0, dtype=torch.float32).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        slope = (grad * weight).float()
        along = torch.linalg.vecdot(slope, wide)[..., None]
        grad_x = slope.mul_(inverse).addcmul_(wide, along * inverse.pow(3), value=-1.0 / x.shape[-1])
        return grad_x.to(x.dtype), grad_weight, None


def _forward(self: Any, hidden_states: Float[Tensor, "*B H"]) -> Float[Tensor, "*B H"]:
    return RMSNormProduct.apply(hidden_states, self.weight, self.variance_epsilon)


def fuse(model: nn.Module) -> None:
    """Give every RMSNorm that computes the same as Llama's the short forward; others (Gemma's) stay unchanged."""
    shorten(model, _as_llamas, _forward)


def shorten(model: nn.Module, alike: Callable[[Any], bool], forward: Callable[..., Tensor]) -> None:
    """Replace the modules' forward by `forward`, for every class whose first module is `alike`."""
    known: dict[type, type | None] = {}
    for module in model.modules():
        kind = type(module)
        if kind not in known:
            known[kind] = (
                type(kind.__name__, (kind,), {"forward": forward, "shortens": kind}) if alike(module) else None
            )
        short = known[kind]
        if short is not None:
            module.__class__ = short


def lengthen(model: nn.Module) -> None:
    """Give modules that `shorten` changed their own class and forward back."""
    for module in model.modules():
        kind = vars(type(module)).get("shortens")
        if kind is not None:
            module.__class__ = kind


@torch.no_grad()
def _as_llamas(module: Any) -> bool:
    """Return whether a module computes the same as Llama's RMSNorm: it has the same names and gives equal outputs."""
    if not type(module).__name__.endswith("RMSNorm"):
        return False
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    known = isinstance(eps, float) and isinstance(weight, nn.Parameter)
    if not known or len(list(module.parameters())) != 1 or weight is None or weight.dim() != 1:
        return False
    if type(module).forward is _forward or weight.device.type == "meta":
        return False
    x = torch.linspace(-3.0, 2.0, 2 * len(weight), device=weight.device).view(2, -1).to(weight.dtype)
    return torch.equal(module(x), _forward(module, x))
