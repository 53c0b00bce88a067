"""LoRA layers with few passes over memory.

peft computes ``x W^T + (x A^T) B^T * scaling`` as written: under autocast it casts the input to float32 and back for
every adapted layer, and each addition is a pass of its own. `fuse` gives the layers a forward and a backward that
accumulate in the matrix products. A layer's parameters, and the files that peft saves, do not change.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn


class LoraProduct(torch.autograd.Function):
    """The product ``x W^T + bias + scaling * (x A^T) B^T``, [N, out], with frozen W and bias.

    x [N, in], W [out, in], bias [out], A [r, in], B [out, r], all in one precision. gated [N, in]: if present, the
    input is ``silu(x) * gated`` instead of x, and is recomputed in backward instead of kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        gated: Tensor | None,
    ) -> Tensor:
        fed = x if gated is None else nn.functional.silu(x).mul_(gated)
        low = fed @ a.T
        out = nn.functional.linear(fed, weight, bias)
        ctx.save_for_backward(x, weight, a, b, low, gated)
        ctx.scaling = scaling
        return out.addmm_(low, b.T.contiguous(), alpha=scaling)  # not contiguous, it takes twice as long on a CPU

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low, gated = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_low = (grad @ b).mul_(ctx.scaling)
        grad_b = (low.T @ grad).mul_(ctx.scaling).T if ctx.needs_input_grad[4] else None  # faster than grad.T @ low
        active = None if gated is None else nn.functional.silu(x)
        fed = x if active is None else active * gated
        grad_a = grad_low.T @ fed if ctx.needs_input_grad[3] else None
        grad_x, grad_gated = None, None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[6]:
            grad_x = (grad @ weight).addmm_(grad_low, a)
            if active is not None:
                grad_gated = active.mul_(grad_x)
                grad_x = torch.ops.aten.silu_backward(grad_x * gated, x)
        return grad_x, None, None, grad_a, grad_b, None, grad_gated


class FusedLinear(LoraLinear):
    """peft's LoRA layer with few passes over memory, for a frozen base, one active adapter and no dropout.

    All other cases (several adapters at once, dropout, a variant such as DoRA, a trained base) use peft's forward.
    """

    def forward(
        self, x: Float[Tensor, "... i"], *args: Any, gated: Float[Tensor, "... i"] | None = None, **kwargs: Any
    ) -> Float[Tensor, "... o"]:
        """Compute the layer's output; gated: the input is ``silu(x) * gated`` instead of x."""
        base: Any = self.get_base_layer()
        name = self._fusable(args, kwargs)
        if name is None and gated is not None:
            x = nn.functional.silu(x) * gated
        if name is None:
            return super().forward(x, *args, **kwargs)
        dtype = computed_in(x)
        rows, gate = (None if t is None else t.reshape(-1, t.shape[-1]).to(dtype) for t in (x, gated))
        weight, a, b = (t.to(dtype) for t in (base.weight, self.lora_A[name].weight, self.lora_B[name].weight))
        bias = None if base.bias is None else base.bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            out = LoraProduct.apply(rows, weight, bias, a, b, self.scaling[name], gate)
        return out.view(*x.shape[:-1], out.shape[-1])

    def _fusable(self, args: Any, kwargs: Any) -> str | None:
        """Return the active adapter's name if the short forward computes the same as peft's, else None."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if args or kwargs or self.disable_adapters or self.merged or len(names) != 1:
            return None
        name = names[0]
        dropout = self.lora_dropout[name]
        frozen = not any(p.requires_grad for p in self.get_base_layer().parameters())  # peft can train its bias alone
        plain = name not in self.lora_variant and self.lora_B[name].bias is None and frozen
        whole = isinstance(dropout, nn.Identity) or getattr(dropout, "p", 1.0) == 0.0
        return name if plain and whole else None


def computed_in(x: Tensor) -> torch.dtype:
    """Return the precision of matrix products with x: autocast's, else that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def fuse(model: nn.Module) -> None:
    """Give every LoRA layer over a plain linear layer the short forward; others stay unchanged."""
    for module in model.modules():
        if type(module) is LoraLinear and type(module.get_base_layer()) is nn.Linear:
            module.__class__ = FusedLinear


def separate(model: nn.Module) -> None:
    """Give the layers that `fuse` changed peft's own class back."""
    for module in model.modules():
        if type(module) is FusedLinear:
            module.__class__ = LoraLinear  # type: ignore[assignment]
