"""LoRA layers in few passes: against the formula in NumPy, and against an unfused copy, which is peft's own forward."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from reference.prepared import prepared_models
from reference.tiny_chain import chain, shake
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from reward_models import RewardModel
from rlhf.cpu import lora
from rlhf.models.adapters import lora_config, share_base
from rlhf.padding import make_batch
from rlhf.ppo.build import enable_gradient_checkpointing

PROMPTS, RESPONSES = [[5, 6, 7], [9], [20, 21, 22, 23, 24]], [[30, 31], [32, 33, 34, 35], [36]]
IDS = torch.tensor([[5, 6, 7, 30, 31], [9, 32, 33, 34, 35]])


class Net(nn.Module):
    """Two layers of different widths; the first one's input and output are looked at."""

    def __init__(self, bias: bool = True, width: int = 24):
        super().__init__()
        self.first = nn.Linear(16, width, bias=bias)
        self.second = nn.Linear(width, 5, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).tanh())


def net(bias: bool = True, adapters: tuple[str, ...] = ("default",), **config: Any) -> Any:
    """Over `Net`, adapters that are not zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = {"r": 4, "lora_alpha": 6, "target_modules": ["first", "second"]} | config
        model: Any = get_peft_model(Net(bias), LoraConfig(**settings))
        for name in adapters[1:]:
            model.add_adapter(name, LoraConfig(**settings))
    shake(model, 1, 0.3, only="lora_")
    return model


def both(model: Any) -> tuple[Any, Any]:
    """The model as peft runs it, and the same one fused."""
    fused = copy.deepcopy(model)
    lora.fuse(fused)
    return model, fused


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def results(model: Any, x: torch.Tensor, bf16: bool = False) -> dict[str, torch.Tensor]:
    """Output, and the gradients of the input and of whatever is trained, for a loss that weighs every output apart."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = model(x)
    (out.float() * inputs(*out.shape)).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"output": out.detach(), "input": x.grad} | grads


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        scale = float(other[name].abs().max())
        assert scale > 0, name
        np.testing.assert_allclose(tensor, other[name], rtol=0, atol=tolerance * scale, err_msg=name)


@pytest.fixture
def products(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes that went the short way."""
    seen: list[tuple[int, ...]] = []
    plain = lora.LoraProduct.apply

    def apply(x, *rest):
        seen.append(tuple(x.shape))
        return plain(x, *rest)

    monkeypatch.setattr(lora.LoraProduct, "apply", apply)
    return seen


# -- one layer ---------------------------------------------------------------------------------------------


def truth(layer: Any, x: torch.Tensor, scaling: float) -> dict[str, np.ndarray]:
    """By the formula, in float64: ``y = x W^T + b + s x A^T B^T``, and its gradients for an upstream G."""
    w, a, b = (
        t.weight.detach().double().numpy() for t in (layer.base_layer, layer.lora_A.default, layer.lora_B.default)
    )
    rows = x.double().reshape(-1, x.shape[-1]).numpy()
    bias = 0.0 if layer.base_layer.bias is None else layer.base_layer.bias.detach().double().numpy()
    out = rows @ w.T + bias + scaling * rows @ a.T @ b.T
    up = inputs(*x.shape[:-1], w.shape[0]).double().numpy().reshape(out.shape)
    return {
        "output": out.reshape(*x.shape[:-1], -1),
        "input": (up @ w + scaling * up @ b @ a).reshape(x.shape),
        "lora_A.default.weight": scaling * (up @ b).T @ rows,
        "lora_B.default.weight": scaling * up.T @ (rows @ a.T),
    }


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(16,), (7, 16), (2, 3, 16), (2, 1, 3, 16)])
def test_a_layer_by_the_formula_and_as_peft_computes_it(products, shape, bias, rslora):
    plain, fused = both(net(bias, use_rslora=rslora).base_model.model.first)
    x, scaling = inputs(*shape), 6 / (math.sqrt(4) if rslora else 4)
    seen = results(fused, x)
    assert products == [(math.prod(shape[:-1]), 16)]
    for name, expected in truth(plain, x, scaling).items():
        np.testing.assert_allclose(seen[name], expected, rtol=0, atol=1e-5 * np.abs(expected).max(), err_msg=name)
    same(seen, results(plain, x))
    assert len(products) == 1, "the unfused layer should be peft's"


@pytest.mark.parametrize("bias", [False, True])
def test_bfloat16_is_no_farther_from_the_truth_than_peft(bias):
    """Root mean squares over many rows; a bfloat16 number is exact to 2^-8 of itself."""
    plain, fused = both(net(bias).base_model.model.first)
    x = inputs(64, 33, 16)
    ours, theirs = results(fused, x, bf16=True), results(plain, x, bf16=True)
    assert {name: t.dtype for name, t in ours.items()} == {name: t.dtype for name, t in theirs.items()}
    assert ours["output"].dtype == torch.bfloat16
    for name, expected in truth(plain, x, 1.5).items():
        size = math.sqrt(np.square(expected).mean())
        mine, others = (
            math.sqrt(np.square(seen[name].double().numpy() - expected).mean()) / size for seen in (ours, theirs)
        )
        assert mine < 2**-7, name
        assert mine < 1.05 * others, name


def test_bfloat16_weights_without_autocast(products):
    plain, fused = both(net().base_model.model.first)
    exact = results(plain, inputs(50, 16))
    plain, fused = both(copy.deepcopy(plain).bfloat16())
    seen = results(fused, inputs(50, 16).bfloat16())
    assert len(products) == 1
    assert seen["output"].dtype == torch.bfloat16
    same({name: tensor.float() for name, tensor in seen.items()}, exact, 0.02)


def test_no_rows_at_all(products):
    """An expert that got no token."""
    plain, fused = both(net())
    out = fused(inputs(0, 16))
    out.sum().backward()
    assert out.shape == plain(inputs(0, 16)).shape == (0, 5)
    assert all((p.grad == 0).all() for name, p in fused.named_parameters() if "lora_" in name)
    assert products == [(0, 16), (0, 24)]


def test_an_input_that_needs_no_gradient_and_an_adapter_that_is_frozen():
    plain, fused = both(net())
    for model in (plain, fused):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("second.lora_B" in name)
    same(results(fused, inputs(3, 16)), results(plain, inputs(3, 16)))


# -- what goes peft's way ----------------------------------------------------------------------------------


def dropout() -> Any:
    return net(lora_dropout=0.5).train()


def trained(kind: str) -> Any:
    model = net()
    for name, parameter in model.named_parameters():
        if f"base_layer.{kind}" in name:
            parameter.requires_grad_(True)
    return model


def two_active() -> Any:
    model = net(adapters=("default", "other"))
    model.base_model.set_adapter(["default", "other"])
    return model


def disabled() -> Any:
    model = net()
    model.base_model.disable_adapter_layers()
    return model


def merged_by_peft() -> Any:
    model = net()
    model.merge_adapter()
    return model


UNUSUAL = {
    "dropout": dropout,
    "dora": lambda: net(use_dora=True),
    "two active adapters": two_active,
    "disabled": disabled,
    "merged by peft": merged_by_peft,
    "trained base weight": lambda: trained("weight"),
    "trained base bias": lambda: trained("bias"),
    "lora_bias": lambda: net(lora_bias=True),
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_whatever_is_unusual_goes_pefts_way(products, kind):
    """Bit for bit, the gradients too: of a trained base weight or bias as well."""
    plain, fused = both(UNUSUAL[kind]())
    assert isinstance(fused.base_model.model.first, lora.FusedLinear)
    torch.manual_seed(7)  # what dropout draws
    expected = results(plain, inputs(3, 16))
    torch.manual_seed(7)
    seen = results(fused, inputs(3, 16))
    assert seen.keys() == expected.keys()
    assert any("base_layer" in name for name in seen) == ("base" in kind)
    assert all(torch.equal(seen[name], tensor) for name, tensor in expected.items())
    assert not products


def test_rows_with_adapters_of_their_own_go_pefts_way(products):
    plain, fused = both(net(adapters=("default", "other")).eval())
    names = ["default", "other", "__base__"]
    first, x = (lambda model: model.base_model.model.first), inputs(3, 16)
    assert torch.equal(first(fused)(x, adapter_names=names), first(plain)(x, adapter_names=names))
    assert not products


def test_an_adapter_that_a_layer_does_not_have_leaves_its_base(products):
    model = net()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["second"]))
    shake(model, 5, 0.3, only="other")
    plain, fused = both(model)
    for one in (plain, fused):
        one.set_adapter("other")
    same(results(fused, inputs(3, 16)), results(plain, inputs(3, 16)))
    assert len(products) == 1


def test_layers_over_anything_else_than_a_linear_layer_stay_as_they_are():
    """GPT-2's Conv1D has its weight the other way round; peft has a class for it, and one for embeddings."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32))
        model = get_peft_model(gpt2, LoraConfig(r=2, target_modules=["c_attn", "wte"], fan_in_fan_out=True))
    shake(model, 1, 0.3, only="lora_")
    plain, fused = both(model.eval())
    assert not any(isinstance(module, lora.FusedLinear) for module in fused.modules())
    assert torch.equal(fused(IDS).logits, plain(IDS).logits)


def test_trained_token_embeddings_beside_the_adapter(tiny_model):
    config = lora_config(4, 8.0, target_modules=["q_proj", "down_proj"], trainable_tokens=[30, 33])
    model = get_peft_model(tiny_model, config)
    shake(model, 1, 0.2, only="lora_")
    shake(model, 2, 0.5, only="trainable_tokens")
    plain, fused = both(model.train())
    seen = []
    for one in (plain, fused):
        one(IDS, labels=IDS).loss.backward()
        seen.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None})
    same(seen[1], seen[0])
    assert any("trainable_tokens" in name for name in seen[0])


# -- whole models ------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path, tiny_model, tiny_tokenizer):
    return chain(tmp_path, tiny_model, tiny_tokenizer, lora=True)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_that_take_turns(folders, monkeypatch, checkpointing, bf16):
    """Policy, reference and value adapter in one graph, and each recomputed under the one that was active."""
    batch = make_batch(PROMPTS, RESPONSES, 3, "cpu")
    weights = torch.linspace(-1, 2, batch.mask.numel()).view(batch.mask.shape)
    seen = []
    for fuse in (lora.fuse, lambda model: None):
        monkeypatch.setattr(lora, "fuse", fuse)
        models = prepared_models(folders[0], value_model=folders[1])
        shake(models, 4, 0.2, only="lora_")
        if checkpointing:
            enable_gradient_checkpointing(models)
        assert any(isinstance(m, lora.FusedLinear) for m in models.modules()) == (not seen)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            outputs = models(batch, 0.7, ("policy", "reference", "value"))
        (outputs.logprobs * weights + outputs.values.square() * weights).sum().backward()
        grads = {name: p.grad for name, p in models.named_parameters() if p.grad is not None}
        seen.append({name: getattr(outputs, name).detach() for name in outputs._fields} | grads)
    assert {name.split(".")[-2] for name in grads} == {"default", "value", "value_head"}
    same(*seen, tolerance=0.06 if bf16 else 1e-5)


def adapted(model: Any) -> Any:
    policy = get_peft_model(model, lora_config(4, 8.0))
    shake(policy, 1, 0.2, only="lora_")
    return policy.eval()


def test_what_is_saved_is_what_peft_saves(tmp_path, tiny_model):
    tiny_model.save_pretrained(tmp_path / "base")
    plain, fused = both(adapted(tiny_model))
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(fused.state_dict()[name], tensor) for name, tensor in plain.state_dict().items())
    for name, model in (("plain", plain), ("fused", fused)):
        model.save_pretrained(str(tmp_path / name))
    ours, theirs = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("fused", "plain"))
    assert ours == theirs
    ours, theirs = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("fused", "plain"))
    assert sorted(ours.pop("target_modules")) == sorted(theirs.pop("target_modules"))  # a set, in any order
    assert ours == theirs
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "fused")).eval()
    assert not any(isinstance(module, lora.FusedLinear) for module in loaded.modules())
    assert torch.equal(loaded(IDS).logits, plain(IDS).logits)
    merged = copy.deepcopy(fused).merge_and_unload()
    assert not any(isinstance(module, LoraLinear) for module in merged.modules())
    np.testing.assert_allclose(merged(IDS).logits.detach(), plain(IDS).logits.detach(), atol=1e-5)


# -- one base for the reward model too -----------------------------------------------------------------------


def pointers(model: Any, base: bool) -> dict[str, int]:
    return {name: p.data_ptr() for name, p in model.named_parameters() if ("lora_" not in name) == base}


def test_a_reward_model_over_the_same_base_reads_the_policys_weights(tmp_path, tiny_model, tiny_tokenizer):
    policy_folder, reward_folder = chain(tmp_path, tiny_model, tiny_tokenizer, lora=True)
    policy = prepared_models(policy_folder).policy
    reward = RewardModel.load(reward_folder, device="cpu")
    messages = [[{"role": "user", "content": "Count"}, {"role": "assistant", "content": "one two three"}]]
    before = reward.score(messages)
    trunk = [name for name in pointers(reward.model, base=True) if "score" not in name]
    assert share_base(policy, reward.model) == len(trunk) > 10
    mine, theirs = pointers(policy, base=True), pointers(reward.model, base=True)
    assert {theirs[name] for name in trunk} <= set(mine.values())
    assert not set(pointers(policy, base=False).values()) & set(pointers(reward.model, base=False).values())
    assert torch.equal(reward.score(messages), before)


def test_weights_that_differ_anywhere_stay_apart(tmp_path, tiny_model, tiny_tokenizer):
    policy_folder, reward_folder = chain(tmp_path, tiny_model, tiny_tokenizer, lora=True)
    policy = prepared_models(policy_folder).policy
    reward = RewardModel.load(reward_folder, device="cpu").model
    name, weight = next((n, p) for n, p in reward.named_parameters() if n.endswith("q_proj.base_layer.weight"))
    with torch.no_grad():
        weight[0, 0] += 1e-6
    before, shared = weight.clone(), share_base(policy, reward)
    assert shared == len([n for n in pointers(reward, base=True) if "score" not in n]) - 1
    assert torch.equal(dict(reward.named_parameters())[name], before)
    assert share_base(policy, tiny_model) == share_base(tiny_model, reward) == 0
    assert share_base(policy, None) == 0
