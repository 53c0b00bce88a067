"""LoRA layers in few passes over memory, and merged while the policy samples. The weights stay peft's own.

peft computes ``x W^T + (x A^T) B^T * scaling`` as written: under autocast it casts the input to float32 and back for
every adapted layer, and adds in passes of their own. `fuse` gives the layers a forward and a backward that accumulate
in the matrix products. What a layer holds, and what peft saves of it, does not change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn


class LoraProduct(torch.autograd.Function):
    """``x W^T + bias + scaling * (x A^T) B^T`` over a frozen W and bias.

    x [N, in], W [out, in], bias [out], A [r, in], B [out, r], all in one precision; [N, out]. gated [N, in]: for x
    stands ``silu(x) * gated``, which is not kept for backward but computed again.
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
        return out.addmm_(low, b.T.contiguous(), alpha=scaling)  # as it lies, its product takes twice as long on a CPU

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low, gated = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_low = (grad @ b).mul_(ctx.scaling)
        grad_b = (low.T @ grad).mul_(ctx.scaling).T if ctx.needs_input_grad[4] else None  # quicker than grad.T @ low
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
    """peft's LoRA layer over a frozen linear layer, with one active adapter and without dropout, in few passes.

    Anything else (several adapters at once, dropout, a variant such as DoRA, a trained base) goes peft's way.
    """

    merged_weight: Tensor | None = None

    def forward(
        self, x: Float[Tensor, "... i"], *args: Any, gated: Float[Tensor, "... i"] | None = None, **kwargs: Any
    ) -> Float[Tensor, "... o"]:
        """gated: the layer's input is ``silu(x) * gated``."""
        base: Any = self.get_base_layer()
        name = self._fusable(args, kwargs) if self.merged_weight is None else None
        if name is None and gated is not None:
            x = nn.functional.silu(x) * gated
        if self.merged_weight is not None:
            return nn.functional.linear(x.to(self.merged_weight.dtype), self.merged_weight, base.bias)
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
        """The one active adapter, where the short way computes what peft would."""
        named = _IN_THIS_THREAD.get()
        names = [name for name in self.active_adapters if name in self.lora_A] if named is None else [named]
        if args or kwargs or self.disable_adapters or self.merged or len(names) != 1:
            return None
        return names[0] if self._short(names[0]) else None

    def _short(self, name: str) -> bool:
        """Does the short way compute what peft would, with this adapter?"""
        if name not in self.lora_A:
            return False
        dropout = self.lora_dropout[name]
        frozen = not any(p.requires_grad for p in self.get_base_layer().parameters())  # peft can train its bias alone
        plain = name not in self.lora_variant and self.lora_B[name].bias is None and frozen
        return plain and (isinstance(dropout, nn.Identity) or getattr(dropout, "p", 1.0) == 0.0)

    def has_all(self, adapters: Sequence[str]) -> bool:
        """Could each of them be the one active adapter, and the short way taken?"""
        return not self.disable_adapters and not self.merged and all(self._short(name) for name in adapters)

    def merge_for_sampling(self) -> None:
        """Keep ``W + scaling * B A`` beside the weights, where that is what the layer computes; see `merged`."""
        base: Any = self.get_base_layer()
        name = self._fusable((), {})
        if name is not None:
            dtype = computed_in(base.weight)
            with torch.autocast(base.weight.device.type, enabled=False):  # else B A is rounded, and their sum again
                a, b = (t[name].weight.detach().float() for t in (self.lora_A, self.lora_B))  # type: ignore[operator]
                whole = torch.addmm(base.weight.float(), b, a, alpha=self.scaling[name])
            self.merged_weight = whole.to(dtype)


def computed_in(x: Tensor) -> torch.dtype:
    """The precision of products with x: autocast's, else its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def fuse(model: nn.Module) -> None:
    """Give every LoRA layer over a plain linear layer the short forward; others stay as they are."""
    for module in model.modules():
        if type(module) is LoraLinear and type(module.get_base_layer()) is nn.Linear:
            module.__class__ = FusedLinear


@contextmanager
def merged(model: nn.Module) -> Iterator[list[FusedLinear]]:
    """Inside, every fused layer is one matrix product with ``W + scaling * B A``: decoding is bound by such products.

    A copy is made, rounded to the precision that is computed in; W, A and B themselves are never touched, so nothing
    has to be undone. Only for running `model` without gradients, with its active adapter. The layers are handed out.
    """
    layers = [module for module in model.modules() if isinstance(module, FusedLinear)]
    try:
        with torch.no_grad():
            for layer in layers:
                layer.merge_for_sampling()
        yield layers
    finally:
        for layer in layers:
            layer.merged_weight = None


_IN_THIS_THREAD: ContextVar[str | None] = ContextVar("adapter", default=None)
"""The adapter that fused layers compute with, in the place of their own active one; see `active_adapter`."""


@contextmanager
def active_adapter(model: PeftModel, name: str, trained: Sequence[str], own_thread: bool = False) -> Iterator[None]:
    """Inside, `model` computes with this adapter; `use_adapter`, undone afterwards.

    own_thread: only for the calling thread, so that others can use other adapters meanwhile (`by_thread`)."""
    if own_thread:
        token = _IN_THIS_THREAD.set(name)
        try:
            yield
        finally:
            _IN_THIS_THREAD.reset(token)
        return
    before: Any = model.active_adapter
    use_adapter(model, name, trained)
    try:
        yield
    finally:
        use_adapter(model, before, trained)


def adapter_in_use(model: PeftModel) -> str:
    """The adapter that `model` computes with in the calling thread."""
    active: Any = model.active_adapter
    return _IN_THIS_THREAD.get() or active


def by_thread(model: PeftModel) -> bool:
    """Can each thread have an adapter of its own? Where all that adapts `model` are fused layers, which all have every
    adapter."""
    adapted = _Adapted.of(model)
    fused = all(isinstance(layer, FusedLinear) and layer.has_all(adapted.adapters) for layer in adapted.layers)
    return adapted.only_layers and fused


def use_adapter(model: PeftModel, name: str, trained: Sequence[str]) -> None:
    """Switch the active adapter and keep every trained one trainable.

    `set_adapter` alone freezes the others, and a graph built before the switch would then get no gradients. Where all
    adapters are layers (no trained tokens, no saved modules), what it and `set_requires_grad` come to is done directly:
    they walk through all modules, 17 ms for 210 layers, twice for every forward.
    """
    if model.active_adapter == name:
        return
    adapted = _ADAPTED.get(model)
    if adapted is None or adapted.adapters != list(model.peft_config):
        adapted = _ADAPTED[model] = _Adapted.of(model)
    if not adapted.only_layers:
        model.set_adapter(name, inference_mode=name not in trained)
        model.set_requires_grad(list(trained), True)
        return
    for layer in adapted.layers:
        layer._active_adapter = [name]
    for parameter, adapter in adapted.parameters:
        parameter.requires_grad_(adapter in trained)
    tuner: Any = model.base_model
    model.active_adapter = tuner.active_adapter = name


@dataclass
class _Adapted:
    """What of a model belongs to adapters, found once."""

    adapters: list[str]
    layers: list[Any]
    parameters: list[tuple[nn.Parameter, str]]  # with the adapter's name
    only_layers: bool

    @classmethod
    def of(cls, model: PeftModel) -> _Adapted:
        parts = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
        layers: list[Any] = [part for part in parts if isinstance(part, BaseTunerLayer)]
        only_layers = len(layers) == len(parts) and not any(layer.frozen_peft_weight_names for layer in layers)
        names = list(model.peft_config)
        held = [
            (getattr(layer, kind), name) for layer in layers for kind in layer.adapter_layer_names for name in names
        ]
        parameters = [
            (p, name)
            for kind, name in held
            if name in kind
            for p in ([kind[name]] if isinstance(kind[name], nn.Parameter) else kind[name].parameters())
        ]
        return cls(names, layers, parameters, only_layers)


_ADAPTED: WeakKeyDictionary[PeftModel, _Adapted] = WeakKeyDictionary()


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
