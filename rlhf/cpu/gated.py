"""Gated MLPs (SwiGLU) that keep only their two products for backward and recompute the rest.

For ``down(silu(gate(x)) * up(x))`` autograd keeps four tensors of the MLP's width, most of a layer's activations.
`fuse` gives such modules a forward that keeps two of them if `down` is a LoRA layer, else three, and recomputes the
others in backward.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from rlhf.cpu.lora import FusedLinear
from rlhf.cpu.norms import shorten

PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}  # as Llama names them, and the families after it


class GatedProduct(torch.autograd.Function):
    """The product ``silu(gate) * up``, equal to that expression to the last bit; gate, up [*B, I]."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grads[0] * up, gate), nn.functional.silu(gate).mul_(grads[0])


def _forward(self: Any, x: Float[Tensor, "*B H"]) -> Float[Tensor, "*B H"]:
    gate, up = self.gate_proj(x), self.up_proj(x)
    if isinstance(self.down_proj, FusedLinear):
        return self.down_proj(gate, gated=up)
    return self.down_proj(GatedProduct.apply(gate, up))


def fuse(model: nn.Module) -> None:
    """Give every MLP that computes the same as Llama's the short forward; others (GeGLU, experts) stay unchanged."""
    shorten(model, _as_llamas, _forward)


@torch.no_grad()
def _as_llamas(module: Any) -> bool:
    """Return whether a module computes the same as Llama's MLP: it has the same parts and gives equal outputs."""
    if {name for name, _ in module.named_children()} != PARTS or type(module).forward is _forward:
        return False
    weight = getattr(module.gate_proj, "weight", None)
    if not isinstance(module.act_fn, SiLUActivation | nn.SiLU) or weight is None or weight.device.type == "meta":
        return False
    if not weight.is_floating_point():
        return False
    x = torch.linspace(-3.0, 2.0, 2 * weight.shape[1], device=weight.device).view(2, -1).to(weight.dtype)
    return torch.equal(module(x), _forward(module, x))
