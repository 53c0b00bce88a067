"""rlhf/cpu/norms.py: the short RMSNorm against the family's own forward, and its gradients against float64."""

from __future__ import annotations

import copy

import pytest
import torch
from reference.prepared import prepared_models
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from rlhf.cpu import norms


def layer(kind=LlamaRMSNorm, width: int = 24, dtype: torch.dtype = torch.float32) -> nn.Module:
    made = kind(width, eps=0.01)  # large enough to be seen in float32
    nn.init.uniform_(made.weight, 0.5, 1.5, generator=torch.Generator().manual_seed(1))
    return made.to(dtype)


def fused(plain: nn.Module) -> nn.Module:
    holder = nn.ModuleList([copy.deepcopy(plain)])
    norms.fuse(holder)
    return holder[0]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_the_same_numbers_as_the_familys_own(kind, dtype, x_dtype):
    plain = layer(kind, dtype=dtype)
    short = fused(plain)
    assert type(short) is not type(plain)
    assert isinstance(short, kind)
    x = numbers(2, 3, 24).to(x_dtype)
    ours, theirs = short(x), plain(x)
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("trained", [False, True])
def test_gradients_against_autograd_in_float64(trained):
    plain = layer()
    short = fused(plain).requires_grad_(trained)
    x, upstream = numbers(2, 3, 24).requires_grad_(), numbers(2, 3, 24, seed=2)
    short(x).backward(upstream)
    wide = x.detach().double().requires_grad_()
    weight = plain.weight.detach().double().requires_grad_()
    (weight * wide / (wide.square().mean(-1, keepdim=True) + 0.01).sqrt()).backward(upstream.double())
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=0, atol=2e-6)
    if trained:
        torch.testing.assert_close(short.weight.grad.double(), weight.grad, rtol=0, atol=2e-6)
    else:
        assert short.weight.grad is None


def test_gradients_in_bfloat16_are_no_further_off_than_the_plain_ones():
    plain = layer(width=256, dtype=torch.bfloat16)
    short = fused(plain)
    x, upstream = numbers(40, 256).bfloat16(), numbers(40, 256, seed=2).bfloat16()
    wide = x.double().requires_grad_()
    weight = plain.weight.detach().double().requires_grad_()
    (weight * wide / (wide.square().mean(-1, keepdim=True) + 0.01).sqrt()).backward(upstream.double())
    errors = {}
    for name, module in (("plain", plain), ("short", short)):
        own = x.clone().requires_grad_()
        module(own).backward(upstream)
        errors[name] = [(own.grad - wide.grad).square().mean(), (module.weight.grad - weight.grad).square().mean()]
    assert errors["short"][0] <= 1.05 * errors["plain"][0]
    assert errors["short"][1] <= 1.05 * errors["plain"][1]


def test_only_the_input_and_a_number_per_row_are_kept():
    x = numbers(8, 24).requires_grad_()
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    short = fused(layer())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        short(x)
    assert kept.pop(x.data_ptr()) == x.numel()
    assert kept.pop(short.weight.data_ptr()) == 24
    assert list(kept.values()) == [8]


def test_another_formula_is_left_alone():
    gemma = Gemma2RMSNorm(24)  # multiplies by 1 + weight
    assert type(fused(gemma)) is Gemma2RMSNorm

    class OtherRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return 2.0 * super().forward(hidden_states)

    class PartRMSNorm(LlamaRMSNorm):
        def __init__(self, width: int, eps: float):
            super().__init__(width, eps)
            self.shift = nn.Parameter(torch.zeros(width))

    assert type(fused(layer(OtherRMSNorm))) is OtherRMSNorm
    assert type(fused(layer(PartRMSNorm))) is PartRMSNorm
    assert type(fused(nn.RMSNorm(24))) is nn.RMSNorm


def test_ppo_uses_it_in_every_model_and_saves_the_same_weights(tiny_model, tmp_path):
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    actor_critic = prepared_models(tiny_model)
    for model in (actor_critic.policy, actor_critic.reference, actor_critic.value):
        layers = [module for module in model.modules() if isinstance(module, LlamaRMSNorm)]
        assert layers
        assert all(type(module).forward is norms._forward for module in layers)
    actor_critic.save_policy(tmp_path)
    reloaded = type(tiny_model).from_pretrained(tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in reloaded.state_dict().items())
