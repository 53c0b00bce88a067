"""rlhf/cpu/gated.py: the short gated MLP against the family's own, its gradients against float64, and what it keeps."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from reference.families import new_model
from reference.prepared import prepared_models
from reference.tiny_chain import shake
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from rlhf.cpu import gated, lora
from rlhf.models.adapters import lora_config

WIDTH, INNER = 12, 20


def layer(kind: Any = LlamaMLP, act: str = "silu", dtype: torch.dtype = torch.float32) -> Any:
    config = SimpleNamespace(
        hidden_size=WIDTH, intermediate_size=INNER, mlp_bias=False, hidden_act=act, hidden_activation=act
    )
    made = kind(config)
    shake(made, 1, 0.5)
    return made.to(dtype)


def adapted(plain: Any, *names: str) -> Any:
    """With LoRA layers, far from zero; in a holder, as peft's tree goes."""
    made = get_peft_model(
        nn.ModuleDict({"mlp": copy.deepcopy(plain)}),
        LoraConfig(r=3, lora_alpha=6, target_modules=list(names or ("gate_proj", "up_proj", "down_proj"))),
    )
    shake(made, 2, 0.3, only="lora_")
    mlp: Any = made.base_model.model["mlp"]
    return mlp


def fused(plain: Any) -> Any:
    holder = nn.ModuleList([copy.deepcopy(plain)])
    lora.fuse(holder)
    gated.fuse(holder)
    return holder[0]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", [LlamaMLP, Qwen2MLP])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_as_the_familys_own(kind, dtype):
    plain = layer(kind, dtype=dtype)
    short = fused(plain)
    assert type(short) is not type(plain)
    assert isinstance(short, kind)
    x = numbers(2, 3, WIDTH).to(dtype)
    assert torch.equal(short(x), plain(x))
    grads = [
        torch.autograd.grad(module(x.requires_grad_()).sum(), [x, *module.parameters()]) for module in (short, plain)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


@pytest.mark.parametrize("with_lora", [False, True])
def test_gradients_against_autograd_in_float64(with_lora):
    plain = adapted(layer()) if with_lora else layer()
    short = fused(plain)
    x, up = numbers(2, 3, WIDTH).requires_grad_(), numbers(2, 3, WIDTH, seed=2)
    out = short(x)
    out.backward(up)
    wide, far = copy.deepcopy(plain).double(), x.detach().double().requires_grad_()
    expected = wide(far)
    expected.backward(up.double())
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=3e-5)
    torch.testing.assert_close(x.grad.double(), far.grad, rtol=0, atol=3e-5)
    assert len(trained(short)) == (6 if with_lora else 3)
    for name, parameter in trained(wide).items():
        seen = trained(short)[name].grad.double()
        torch.testing.assert_close(seen, parameter.grad, rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("names", [("up_proj", "down_proj"), ("gate_proj", "down_proj"), ("down_proj",), ("up_proj",)])
def test_gradients_where_only_some_layers_are_adapted_and_the_input_has_none(names):
    """As in a first layer under frozen embeddings."""
    plain = adapted(layer(), *names)
    short, x, up = fused(plain), numbers(3, WIDTH), numbers(3, WIDTH, seed=2)
    short(x).backward(up)
    wide = copy.deepcopy(plain).double()
    wide(x.double()).backward(up.double())
    assert len(trained(wide)) == 2 * len(names)
    for name, parameter in trained(wide).items():
        torch.testing.assert_close(trained(short)[name].grad.double(), parameter.grad, rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize(("with_lora", "expected"), [(False, 3), (True, 2)])
def test_how_many_tensors_of_the_mlps_width_are_kept(with_lora, expected):
    plain = adapted(layer()) if with_lora else layer()
    x = numbers(5, WIDTH).requires_grad_()
    counts = []
    for module in (fused(plain), plain):
        kept: dict[int, torch.Tensor] = {}  # held, so that no address is used twice

        def pack(tensor: torch.Tensor, kept: Any = kept) -> torch.Tensor:
            if tensor.shape == (5, INNER):
                kept[tensor.data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            module(x)
        counts.append(len(kept))
    assert counts[0] == expected
    assert counts[1] >= 4


def test_another_formula_is_left_alone():
    assert type(fused(layer(act="gelu"))) is LlamaMLP
    assert type(fused(layer(GemmaMLP, "gelu_pytorch_tanh"))) is GemmaMLP

    class Doubled(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2.0 * super().forward(x)

    class Normed(LlamaMLP):
        def __init__(self, config: Any):
            super().__init__(config)
            self.norm = nn.LayerNorm(config.intermediate_size)

    assert type(fused(layer(Doubled))) is Doubled
    assert type(fused(layer(Normed))) is Normed


def test_with_adapters_off():
    plain = adapted(layer())
    short, x = fused(plain), numbers(4, WIDTH)
    for module in (plain, short):
        for part in (module.gate_proj, module.up_proj, module.down_proj):
            part.enable_adapters(False)
    torch.testing.assert_close(short(x), plain(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["separate", "adapter", "shared_trunk"])
def test_ppo_uses_it_in_every_model_and_saves_the_same_weights(kind, tmp_path):
    model = new_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lora_settings = None if kind == "separate" else lora_config(2, 4.0)
    actor_critic = prepared_models(model, value_kind=kind, lora=lora_settings)
    mlps = [module for module in actor_critic.modules() if isinstance(module, LlamaMLP)]
    assert len(mlps) == (6 if kind == "separate" else 2)
    assert all(type(module).forward is gated._forward for module in mlps)
    if kind == "separate":
        actor_critic.save_policy(tmp_path)
        saved = type(model).from_pretrained(tmp_path).state_dict()
        assert all(torch.equal(tensor, before[name]) for name, tensor in saved.items())
