"""Weights laid out for decoding: the products of `torch.nn.functional.linear`, and nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rlhf.cpu import lora
from rlhf.cpu.few_rows import FEW, laid_out
from rlhf.ppo import rollout
from rlhf.sampling.decode import TransformersEngine
from tests.cpu.test_gated import WIDTH, adapted, fused, layer
from tests.cpu.test_lora import adapted as adapted_model
from tests.cpu.test_lora import both, inputs, linears, net, shake

DTYPES = [torch.float32, torch.bfloat16]


def linear(dtype: torch.dtype = torch.float32, bias: bool = False) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Linear(48, 80, bias=bias).to(dtype)


def numbers(*shape: int) -> torch.Tensor:
    return torch.linspace(-2.0, 1.5, torch.Size(shape).numel()).sin().view(shape)


@pytest.mark.parametrize("shape", [(48,), (1, 48), (16, 1, 48), (3, 5, 48), (0, 48)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_are_those_of_linear(dtype, bias, shape):
    one = linear(dtype, bias)
    x = numbers(*shape).to(dtype)
    expected = one(x).detach()
    with torch.no_grad(), laid_out(one, 16) as layers:
        assert layers == [one]
        seen = one(x)
    assert seen.dtype == dtype
    assert seen.shape == expected.shape
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.02)


def test_rows_that_do_not_lie_one_behind_the_other():
    one, x = linear(), numbers(4, 3, 48)
    expected = one(x.transpose(0, 1)).detach()
    with torch.no_grad(), laid_out(one, 4):
        torch.testing.assert_close(one(x.transpose(0, 1)), expected, rtol=0, atol=1e-5)


def test_autocast_decides_the_precision():
    one, x = linear(), numbers(7, 48)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = one(x)
        with laid_out(one, 7):
            seen = one(x)
    assert seen.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(seen, expected, rtol=0, atol=0.02)


def test_lora_layers_multiply_by_what_was_merged_and_keep_no_second_copy():
    plain, short = both(net())
    x = inputs(3, 16)
    expected = plain(x).detach()
    with torch.no_grad(), lora.merged(short) as merged, laid_out(short, 3) as layers:
        assert set(layers) == set(linears(short)) == set(merged)  # nothing inside them
        assert all(one.merged_weight is None for one in merged)
        torch.testing.assert_close(short(x), expected, rtol=0, atol=1e-5)
        shake(short, 9, 0.5, only="lora_")  # of what is trained nothing is read any more
        torch.testing.assert_close(short(x), expected, rtol=0, atol=1e-5)


def test_layers_that_are_not_merged_go_their_own_way_over_a_laid_out_base():
    plain, short = both(net(adapters=("default", "other")))
    for model in (plain, short):
        model.base_model.set_adapter(["default", "other"])
    with torch.no_grad(), lora.merged(short), laid_out(short, 3) as layers:
        assert not set(layers) & set(linears(short))
        torch.testing.assert_close(short(inputs(3, 16)), plain(inputs(3, 16)), rtol=0, atol=1e-5)


def test_the_last_layer_of_a_gated_mlp_takes_both_its_products():
    short = fused(adapted(layer()))
    x = numbers(4, WIDTH)
    expected = short(x).detach()
    with torch.no_grad(), lora.merged(short), laid_out(short, 4) as layers:
        assert short.down_proj in layers
        torch.testing.assert_close(short(x), expected, rtol=0, atol=2e-5)


def test_a_tied_head_and_its_embedding(tiny_model: Any):
    tiny_model.lm_head.weight = tiny_model.get_input_embeddings().weight
    ids = torch.tensor([[5, 9, 200, 7]])
    with torch.no_grad():
        expected = tiny_model(ids).logits
    with torch.no_grad(), laid_out(tiny_model, 1) as layers:
        assert tiny_model.lm_head in layers
        torch.testing.assert_close(tiny_model(ids).logits, expected, rtol=0, atol=1e-5)


def test_everything_is_as_before_afterwards_and_after_a_failure():
    one, x = linear(), numbers(2, 48)
    expected, before = one(x).detach(), one.weight.detach().clone()
    with pytest.raises(MemoryError), laid_out(one, 2):
        raise MemoryError
    assert "forward" not in vars(one)
    assert torch.equal(one.weight, before)
    assert one.weight.requires_grad
    assert torch.equal(one(x), expected)
    one(x).sum().backward()
    assert one.weight.grad is not None


def test_a_failure_while_laying_out(monkeypatch):
    pair = nn.Sequential(linear(), nn.Linear(80, 8))
    expected = pair(numbers(2, 48)).detach()
    reorder, calls = torch.ops.mkldnn._reorder_linear_weight, []

    def once(*given: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return reorder(*given)

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", once)
    with pytest.raises(MemoryError), laid_out(pair, 2):
        pass
    assert len(calls) == 2
    assert torch.equal(pair(numbers(2, 48)), expected)


def test_weights_that_were_trained_since_are_laid_out_anew():
    one, x = linear(), numbers(3, 48)
    for step in (1.0, 2.0):
        with torch.no_grad():
            one.weight.add_(step)
            expected = one(x)
            with laid_out(one, 3):
                torch.testing.assert_close(one(x), expected, rtol=1e-5, atol=1e-4)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("kind", ["a class of its own", "a forward of its own", "another device", "half precision"])
def test_what_is_left_alone(kind):
    one: Any = linear()
    if kind == "a class of its own":
        one.__class__ = Doubled
    elif kind == "a forward of its own":  # as accelerate's hooks put one there
        one.forward = lambda x: 3 * nn.functional.linear(x, one.weight)
    elif kind == "another device":
        one = one.to("meta")
    else:
        one = one.half()
    before = vars(one).get("forward")
    with laid_out(one, 4) as layers:
        assert layers == []
        assert vars(one).get("forward") is before
    assert vars(one).get("forward") is before


def test_no_rows_and_many_rows_are_multiplied_as_before():
    one = linear()
    with laid_out(one, 0) as none, laid_out(one, FEW + 1) as many, laid_out(one, FEW) as few:
        assert none == []
        assert many == []
        assert few == [one]


def test_no_prompts_no_responses(tiny_model: Any):
    assert TransformersEngine(tiny_model, (2,), 3).generate([], 6, 1.0, torch.Generator()).ids == []


def test_without_onednn(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with laid_out(linear(), 4) as layers:
        assert layers == []


@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "lora"])
def test_sampling_decodes_with_them(monkeypatch, tiny_model: Any, with_lora):
    model: Any = tiny_model
    if with_lora:
        model = both(adapted_model(tiny_model))[1]
    seen = []

    def watched(policy, rows):
        seen.append(rows)
        return laid_out(policy, rows)

    prompts = [[5, 6, 7], [8, 9], [30, 31, 32, 33], [40]]
    responses = []
    for lay in (watched, lambda policy, rows: laid_out(nn.Identity(), rows)):
        monkeypatch.setattr(rollout.few_rows, "laid_out", lay)
        engine = TransformersEngine(model, (2,), 3, rows_per_batch=3)
        responses.append(engine.generate(prompts, 6, 1.0, torch.Generator().manual_seed(5)).ids)
    assert seen == [3]
    assert responses[0] == responses[1]
    assert not any("forward" in vars(part) for part in model.modules() if isinstance(part, nn.Linear))
