"""LoRA layers in few passes over memory, and merged while the policy samples. The weights stay peft's own.

peft computes ``x W^T + (x A^T) B^T * scaling`` as written: under autocast it casts the input to float32 and back for
every adapted layer, and adds in passes of their own. `fuse` gives the layers a forward and a backward that accumulate
in the matrix products. What a layer holds, and what peft saves of it, does not change.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn


class LoraProduct(torch.autograd.Function):
    """``x W^T + bias + scaling * (x A^T) B^T`` over a frozen W and bias.

    x [N, in], W [out, in], bias [out], A [r, in], B [out, r], all in one precision; [N, out].
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        low = x @ a.T
        out = nn.functional.linear(x, weight, bias)
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scaling = scaling
        return out.addmm_(low, b.T.contiguous(), alpha=scaling)  # as it lies, its product takes twice as long on a CPU

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_low = (grad @ b).mul_(ctx.scaling)
        grad_x = (grad @ weight).addmm_(grad_low, a) if ctx.needs_input_grad[0] else None
        grad_a = grad_low.T @ x if ctx.needs_input_grad[3] else None
        grad_b = (low.T @ grad).mul_(ctx.scaling).T if ctx.needs_input_grad[4] else None  # quicker than grad.T @ low
        return grad_x, None, None, grad_a, grad_b, None


class FusedLinear(LoraLinear):
    """peft's LoRA layer over a frozen linear layer, with one active adapter and without dropout, in few passes.

    Anything else (several adapters at once, dropout, a variant such as DoRA, a trained base) goes peft's way.
    """

    merged_weight: Tensor | None = None

    def forward(self, x: Float[Tensor, "... i"], *args: Any, **kwargs: Any) -> Float[Tensor, "... o"]:
        base: Any = self.get_base_layer()
        if self.merged_weight is not None:
            return nn.functional.linear(x.to(self.merged_weight.dtype), self.merged_weight, base.bias)
        name = self._fusable(args, kwargs)
        if name is None:
            return super().forward(x, *args, **kwargs)
        dtype = _computed_in(x)
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        weight, a, b = (t.to(dtype) for t in (base.weight, self.lora_A[name].weight, self.lora_B[name].weight))
        bias = None if base.bias is None else base.bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            out = LoraProduct.apply(rows, weight, bias, a, b, self.scaling[name])
        return out.view(*x.shape[:-1], out.shape[-1])

    def _fusable(self, args: Any, kwargs: Any) -> str | None:
        """The one active adapter, where the short way computes what peft would."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if args or kwargs or self.disable_adapters or self.merged or len(names) != 1:
            return None
        name, dropout = names[0], self.lora_dropout[names[0]]
        frozen = not any(p.requires_grad for p in self.get_base_layer().parameters())  # peft can train its bias alone
        plain = name not in self.lora_variant and self.lora_B[name].bias is None and frozen
        return name if plain and (isinstance(dropout, nn.Identity) or getattr(dropout, "p", 1.0) == 0.0) else None

    def merge_for_sampling(self) -> None:
        """Keep ``W + scaling * B A`` beside the weights, where that is what the layer computes; see `merged`."""
        base: Any = self.get_base_layer()
        name = self._fusable((), {})
        if name is not None:
            dtype = _computed_in(base.weight)
            with torch.autocast(base.weight.device.type, enabled=False):  # else B A is rounded, and their sum again
                whole = base.weight.float() + self.get_delta_weight(name).float()
            self.merged_weight = whole.to(dtype)


def _computed_in(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def fuse(model: nn.Module) -> None:
    """Give every LoRA layer over a plain linear layer the short forward; others stay as they are."""
    for module in model.modules():
        if type(module) is LoraLinear and type(module.get_base_layer()) is nn.Linear:
            module.__class__ = FusedLinear


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Inside, every fused layer is one matrix product with ``W + scaling * B A``: decoding is bound by such products.

    A copy is made, rounded to the precision that is computed in; W, A and B themselves are never touched, so nothing
    has to be undone. Only for running `model` without gradients, with its active adapter.
    """
    layers = [module for module in model.modules() if isinstance(module, FusedLinear)]
    try:
        with torch.no_grad():
            for layer in layers:
                layer.merge_for_sampling()
        yield
    finally:
        for layer in layers:
            layer.merged_weight = None


def share_base(policy: nn.Module, other: Any) -> int:
    """Let another adapter over the same base (a reward model) read the policy's frozen weights: one copy in memory.

    Weights are shared where name, shape, precision, device and every value agree; both sides have them frozen. The
    number of tensors that are.
    """
    if not (isinstance(policy, PeftModel) and isinstance(other, PeftModel)):
        return 0
    ours = {_base_name(name): p for name, p in policy.named_parameters() if not p.requires_grad and _is_base(name)}
    shared = 0
    for name, theirs in other.named_parameters():
        mine = ours.get(_base_name(name))
        if mine is None or theirs.requires_grad or not _is_base(name):
            continue
        if (mine.shape, mine.dtype, mine.device) == (theirs.shape, theirs.dtype, theirs.device) and mine.equal(theirs):
            theirs.data = mine.data
            shared += 1
    return shared


def _is_base(name: str) -> bool:
    return not any(part in name for part in ("lora_", "modules_to_save", "original_module", "trainable_tokens"))


def _base_name(name: str) -> str:
    return name.replace("base_layer.", "").replace("token_adapter.", "")
