"""Log-probabilities with a gradient written by hand: against float64 autograd, and against the generic way."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf.models.logprobs import token_logprobs

ROWS, TOKENS, HIDDEN, VOCABULARY = 3, 5, 6, 11


def numbers(scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, the head's weight, targets, and what the log-probabilities are weighed with."""
    draw = torch.Generator().manual_seed(0)
    return (
        torch.randn(ROWS, TOKENS, HIDDEN, generator=draw) * scale,
        torch.randn(VOCABULARY, HIDDEN, generator=draw),
        torch.randint(VOCABULARY, (ROWS, TOKENS), generator=draw),
        torch.randn(ROWS, TOKENS, generator=draw),
    )


def run(way: Any, dtype: torch.dtype = torch.float32, trained: tuple[bool, bool] = (True, True), scale: float = 1.0):
    """Log-probabilities, entropy, and the gradients of hidden states and weight where they are `trained`."""
    hidden, weight, targets, up = numbers(scale)
    hidden, weight = (t.to(dtype).requires_grad_(g) for t, g in zip((hidden, weight), trained, strict=True))
    logprobs, entropy = way(hidden, weight, targets)
    if any(trained):
        (logprobs * up).sum().backward()
    return logprobs.detach(), entropy.detach(), hidden.grad, weight.grad


def by_hand(temperature: float, chunk: int):
    return lambda h, w, y: token_logprobs(h, w, y, temperature, chunk)


def generic(temperature: float, chunk: int):
    return lambda h, w, y: token_logprobs(h, w, y, temperature, chunk, lambda logits: logits)


def in_float64(temperature: float):
    """The definition; hidden states and weight are rounded as given, everything after is float64's autograd."""

    def way(hidden, weight, targets):
        distribution = (hidden.double() @ weight.double().T / temperature).log_softmax(-1)
        entropy = -(distribution.exp() * distribution).sum(-1)
        return distribution.gather(-1, targets[..., None]).squeeze(-1), entropy

    return way


def same(mine, theirs, tolerance: float = 1e-5) -> None:
    for name, one, other in zip(("logprobs", "entropy", "hidden", "weight"), mine, theirs, strict=True):
        assert (one is None) == (other is None), name
        if one is not None:
            scale = max(1.0, float(other.abs().max()))
            np.testing.assert_allclose(one.double(), other.double(), rtol=0, atol=tolerance * scale, err_msg=name)


@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("chunk", [1, 4, 15, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.5])
def test_values_and_gradients(temperature, chunk, trained):
    seen = run(by_hand(temperature, chunk), trained=trained)
    same(seen, run(in_float64(temperature), trained=trained))
    same(seen, run(generic(temperature, chunk), trained=trained))
    assert tuple(grad is not None for grad in seen[2:]) == trained


@pytest.mark.parametrize("chunk", [1, 4, 1000])
@pytest.mark.parametrize("trained", [(True, True), (True, False)])
def test_bfloat16(chunk, trained):
    """Logits and slopes are rounded to bfloat16's three digits; what comes out is float32, gradients are bfloat16."""
    seen = run(by_hand(0.7, chunk), torch.bfloat16, trained)
    truth = run(in_float64(0.7), torch.bfloat16, trained)
    assert [None if t is None else t.dtype for t in seen] == [torch.float32] * 2 + [
        torch.bfloat16 if t else None for t in trained
    ]
    same(seen, truth, 0.02)
    same(seen, run(generic(0.7, chunk), torch.bfloat16, trained), 0.02)
    error = lambda result: float((result[2].double() - truth[2]).square().mean())  # noqa: E731
    assert error(seen) <= (1.1 if trained[1] else 1.5) * error(run(generic(0.7, chunk), torch.bfloat16, trained))


def test_under_autocast_float32_weights_get_float32_gradients():
    with torch.autocast("cpu", torch.bfloat16):
        seen = run(by_hand(0.7, 4))
    assert [t.dtype for t in seen] == [torch.float32] * 4
    same(seen, run(in_float64(0.7)), 0.03)
    assert not torch.allclose(seen[0], run(by_hand(0.7, 4))[0], atol=1e-6), "the product should be in bfloat16"


def test_a_weights_gradient_is_summed_in_float32():
    """512 equal shares, a chunk each: added up in bfloat16 the sum would stand still at 256 of them."""
    hidden = torch.ones(1, 512, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    token_logprobs(hidden, weight, torch.zeros(1, 512, dtype=torch.long), 1.0, 1)[0].sum().backward()
    assert weight.grad.flatten().tolist() == [256.0, -256.0]  # 512 * (1 - 1/2), and 512 * -1/2


def test_central_differences():
    """Along random directions, in both arguments at once; float32 leaves about three digits of a difference."""
    hidden, weight, targets, up = numbers()
    generator = torch.Generator().manual_seed(5)
    loss = lambda h, w: (token_logprobs(h, w, targets, 0.9, 4)[0].double() * up).sum()  # noqa: E731
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss(*leaves).backward()
    for _ in range(5):
        along = [torch.randn(t.shape, generator=generator) for t in (hidden, weight)]
        step = 1e-2
        moved = [loss(hidden + sign * step * along[0], weight + sign * step * along[1]) for sign in (1, -1)]
        slope = float((moved[0] - moved[1]) / (2 * step))
        ours = sum(float((leaf.grad * d).sum()) for leaf, d in zip(leaves, along, strict=True))
        assert ours == pytest.approx(slope, rel=2e-3, abs=2e-2)


def test_the_entropy_carries_no_gradient():
    hidden, weight, targets, _ = numbers()
    logprobs, entropy = token_logprobs(hidden.requires_grad_(), weight, targets, 1.0, 4)
    assert logprobs.requires_grad
    assert not entropy.requires_grad
    with torch.no_grad():
        assert not token_logprobs(hidden, weight, targets, 1.0, 4)[0].requires_grad


def test_what_is_given_is_not_written_to():
    """Passes over the logits are in place."""
    hidden, weight, targets, up = numbers()
    kept = hidden.clone(), weight.clone(), targets.clone()
    logprobs, _ = token_logprobs(hidden.requires_grad_(), weight.requires_grad_(), targets, 0.7, 4)
    first = torch.autograd.grad(logprobs, (hidden, weight), up, retain_graph=True)
    again = torch.autograd.grad(logprobs, (hidden, weight), up)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert all(torch.equal(one.detach(), two) for one, two in zip((hidden, weight, targets), kept, strict=True))


# -- logits that are extreme -------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_huge_logits(temperature):
    """Up to 5e4: float32 holds differences of such numbers to 0.004; probabilities that matter are 0 or 1."""
    seen = run(by_hand(temperature, 4), scale=1e4)
    truth = run(in_float64(temperature), scale=1e4)
    assert float(truth[0].abs().max()) > 1e4
    assert all(bool(t.isfinite().all()) for t in seen)
    for one, other in zip(seen[:3], truth[:3], strict=True):
        np.testing.assert_allclose(one.double(), other, rtol=1e-5, atol=1e-2)
    np.testing.assert_allclose(seen[3].double(), truth[3], rtol=1e-5, atol=1e-2 * 1e4)


def test_logits_of_minus_infinity():
    """A token that the head excludes: probability 0, which is no NaN in the entropy or a gradient."""
    weight = torch.ones(4, 3)
    weight[2] = -math.inf
    hidden = torch.ones(1, 2, 3, requires_grad=True)
    logprobs, entropy = token_logprobs(hidden, weight, torch.tensor([[0, 3]]), 1.0, 1)
    np.testing.assert_allclose(logprobs.detach(), [[-math.log(3)] * 2], atol=1e-6)
    np.testing.assert_allclose(entropy, [[math.log(3)] * 2], atol=1e-6)
    weight[2] = -1e30  # the same, and a weight that a gradient can be multiplied with
    token_logprobs(hidden, weight, torch.tensor([[0, 3]]), 1.0, 1)[0].sum().backward()
    assert hidden.grad.abs().max() < 1e-6  # the three others' rows are equal


def test_a_token_of_probability_zero_pulls_no_nan():
    logits = torch.tensor([[0.0, -2e4, 3.0]])
    hidden = torch.ones(1, 1, 1, requires_grad=True)
    logprobs, entropy = token_logprobs(hidden, logits.T, torch.tensor([[1]]), 1.0, 8)
    logprobs.sum().backward()
    shares = logits.double().softmax(-1)
    assert logprobs.item() == pytest.approx(-2e4 - 3 - math.log1p(math.exp(-3)), rel=1e-6)
    assert float(entropy) == pytest.approx(float(-(shares * shares.log()).nan_to_num().sum()), rel=1e-5)
    assert float(hidden.grad) == pytest.approx(float(-2e4 - (shares * logits).sum()), rel=1e-6)


# -- memory ------------------------------------------------------------------------------------------------


class Sizes(TorchDispatchMode):
    """The matrix products, and the sizes of what every operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.products = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = out if isinstance(out, tuple | list) else [out]
        self.largest = max([self.largest, *(t.numel() for t in made if isinstance(t, Tensor))])
        self.products += "mm" in str(function)
        return out


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_more_than_a_chunk_of_logits_exists(dtype, trained):
    vocabulary, tokens, width, chunk = 500, 64, 4, 8
    hidden = torch.randn(1, tokens, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=dtype, requires_grad=trained)
    targets = torch.zeros(1, tokens, dtype=torch.long)
    saved: list[int] = []
    with (
        Sizes() as sizes,
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t),
    ):
        logprobs, _ = token_logprobs(hidden, weight, targets, 0.9, chunk)
        assert sizes.products == tokens / chunk * (1 if trained else 2)  # with a frozen head, the slopes at once
        logprobs.sum().backward()
    assert sizes.products == tokens / chunk * (4 if trained else 2)  # forward; again, to the hidden states and weight
    assert sizes.largest == chunk * vocabulary
    assert max(saved) <= vocabulary * width, "the graph holds its inputs and a number per token"
