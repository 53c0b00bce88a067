"""Gated MLPs (SwiGLU) that keep their two products for backward, and neither the activation nor what it gates.

``down(silu(gate(x)) * up(x))`` leaves four tensors of the MLP's width with autograd, most of what a layer keeps.
`fuse` gives such modules a forward that leaves two where `down` is a LoRA layer, else three, and computes what is
missing again.
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
    """``silu(gate) * up``, to the bits of that expression; gate, up [*B, I]."""

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
    """Give every MLP that computes what Llama's does the short forward; others (GeGLU, experts) stay as they are."""
    shorten(model, _as_llamas, _forward)


@torch.no_grad()
def _as_llamas(module: Any) -> bool:
    """By its parts and, since they prove nothing, by what it computes of some numbers."""
    if {name for name, _ in module.named_children()} != PARTS or type(module).forward is _forward:
        return False
    weight = getattr(module.gate_proj, "weight", None)
    if not isinstance(module.act_fn, SiLUActivation | nn.SiLU) or weight is None or weight.device.type == "meta":
        return False
    if not weight.is_floating_point():
        return False
    x = torch.linspace(-3.0, 2.0, 2 * weight.shape[1], device=weight.device).view(2, -1).to(weight.dtype)
    return torch.equal(module(x), _forward(module, x))
