"""What neighbouring rows begin with, once in the long row: against plain loops, numbers against each row alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from reference.families import new_model

from rlhf import cpu
from rlhf.cpu import attention
from rlhf.models import packing
from rlhf.models.adapters import backbone
from rlhf.models.forward import hidden_logprobs, response_hidden
from rlhf.models.head_outputs import head_outputs, packs_rows
from rlhf.models.long_row import Rows
from rlhf.models.scalar import new_scalar_model, score_head
from rlhf.padding import IGNORED, make_batch, pad
from rlhf.sft.forward import labelled

ROWS = [[5, 6, 7, 8], [5, 6, 9], [5, 6, 9, 10, 11], [20], [20]]
SHARED = torch.tensor([0, 2, 3, 0, 1])
TOKENS = [[0, 1, 2, 3], [0, 1, 4], [0, 1, 4, 5, 6], [7], [7]]
"""Where each token stands in the long row: 5 6 7 8, 9, 10 11, 20."""
HEADS, WIDTH = 2, 3


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return pad(ROWS, fill=0)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def long_scorer(family: str) -> Any:
    return new_scalar_model(new_model(family), seed=0).eval()


def texts(seed: int) -> list[list[int]]:
    """Prompts of 9, 4 and 14 tokens with four responses each, of which two are the same, and one without another."""
    draw = torch.Generator().manual_seed(seed)
    prompts, ends = [
        [torch.randint(5, 90, (n,), generator=draw).tolist() for n in sizes] for sizes in ((9, 4, 14), (1, 5, 3))
    ]
    rows = [prompt + end for prompt in prompts for end in (*ends, ends[2])]
    return [*rows, torch.randint(5, 90, (6,), generator=draw).tolist()]


def test_what_rows_have_in_common_with_the_one_before(monkeypatch):
    ids, mask = batch()
    assert packing.common(long_scorer("llama"), ids, mask) is None, "torch's kernel takes no rows apart"
    monkeypatch.setattr(packing, "attention_of", lambda model: packing.BY_ROWS)
    assert torch.equal(packing.common(None, ids, mask), SHARED)
    assert packing.common(None, ids[::2], mask[::2]) is not None
    assert packing.common(None, ids[[0, 3]], mask[[0, 3]]) is None
    many, all_real = torch.arange(32).view(2, 16), torch.ones(2, 16, dtype=torch.bool)
    many[1, 0] = 0
    assert packing.common(None, many, all_real) is None, "one token of 32"
    many[1, 1] = 1
    assert packing.common(None, many, all_real).tolist() == [0, 2]
    filled = torch.where(mask, ids, 7)  # what stands on padding says nothing
    assert torch.equal(packing.common(None, filled, mask), SHARED)


def test_rows_are_set_apart_and_put_back():
    _, mask = batch()
    rows = Rows.of(mask, shared=SHARED)
    places = {(row, step): token for row, own in enumerate(TOKENS) for step, token in enumerate(own)}
    x = numbers(1, HEADS, 8, WIDTH).requires_grad_()
    apart = rows.unpack(x)
    assert all(torch.equal(apart[row, :, step], x[0, :, token]) for (row, step), token in places.items())
    up = torch.where(rows.real[:, None, :, None], numbers(*apart.shape, seed=1), 0.0)
    apart.backward(up)
    expected = torch.zeros_like(x)
    for (row, step), token in places.items():
        expected[0, :, token] += up[row, :, step]
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=1e-6)
    again = x.grad.clone()
    x.grad = None
    rows.unpack(x).backward(up)
    assert torch.equal(x.grad, again)


def test_only_tokens_that_stand_nowhere_before_ask():
    """Of rows that share half or more with the one before: 9 of the second, 10 and 11 of the third, nothing of the
    last; the first and the fourth whole."""
    _, mask = batch()
    rows = Rows.of(mask, shared=SHARED)
    whole, rest = rows.parts
    assert (whole.rows.tolist(), whole.whole, rest.rows.tolist(), rest.whole) == ([0, 3], True, [1, 2], False)
    assert (whole.steps.tolist(), rest.steps.tolist()) == ([[0, 1, 2, 3, 3], [0, 0, 0, 0, 0]], [[2, 2], [3, 4]])
    x = numbers(1, HEADS, 8, WIDTH).requires_grad_()
    taken = [rows.queries(x, part) for part in rows.parts]
    for own, part in zip(taken, rows.parts, strict=True):
        assert torch.equal(own, torch.stack([x[0, :, tokens] for tokens in part.tokens]))
    together = rows.pack(taken)
    assert torch.equal(together, x.transpose(1, 2)), "every token once, in its place"
    up = numbers(*together.shape, seed=2)
    together.backward(up)
    assert torch.equal(x.grad, up.transpose(1, 2)), "padding gives no gradient"

    many = numbers(5, 1, 5, 5, seed=3)
    assert torch.equal(whole.mask_of(many), many[[0, 3]])
    expected = torch.stack([many[1, :, [2, 2]], many[2, :, [3, 4]]])
    assert torch.equal(rest.mask_of(many), expected)
    assert torch.equal(rest.of(many), many[[1, 2]])
    assert rows.mask(None)[2, 0].tolist() == [[key <= query for key in range(5)] for query in range(5)]


def test_rows_that_share_less_than_half_are_whole():
    mask = torch.ones(2, 5, dtype=torch.bool)
    (part,) = Rows.of(mask, shared=torch.tensor([0, 2])).parts
    assert part.whole
    assert part.used.tolist() == [0, 1, 2, 3, 4, 7, 8, 9]
    assert len(Rows.of(mask, shared=torch.tensor([0, 3])).parts) == 2


def test_a_mask_is_asked_by_places_in_a_row():
    """A window of two: in the long row 9 stands four places behind 6, which it follows."""
    _, mask = batch()
    seen = Rows.of(mask, shared=SHARED).mask_of(lambda batch, head, query, key: (key <= query) & (query - key < 2))
    assert seen[2, 0].tolist() == [[abs(q - k - 0.5) == 0.5 for k in range(5)] for q in range(5)]
    assert seen[1, 0, 2].tolist() == [False, True, True, False, False]
    assert seen[3, 0, 0].tolist() == [True, False, False, False, False]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "cohere2", "glm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_and_gradients_are_those_of_each_row_alone(family, dtype):
    """Sliding windows shorter than the rows (gemma3_text), learned positions (gpt2), other rotations."""
    model = long_scorer(family)
    twin = copy.deepcopy(model)
    rows = texts(3)
    ids, mask = pad(rows, fill=0)
    widths: list[int] = []
    backbone(model).register_forward_pre_hook(
        lambda module, args, kwargs: widths.append((args[0] if args else kwargs["input_ids"]).shape[1]),
        with_kwargs=True,
    )
    half = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    with cpu.for_training(model), half:
        assert packs_rows(model, "auto", dtype)
        widths.clear()
        found = head_outputs(model, model, ids, mask.long(), True)
    own = 27 + 6 + 3 * (1 + 5 + 3)
    assert widths == [own + -own % packing.GRAIN], "every prompt once, and nothing of the response that is there twice"
    with half:
        alone = [score_head(twin)(backbone(twin)(input_ids=torch.tensor([row])).last_hidden_state)[0] for row in rows]
    expected = torch.cat(alone)
    limit = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(found[mask].float(), expected.float(), rtol=0, atol=limit)
    assert not found[~mask].any()
    if dtype == torch.float32:
        weights = numbers(*expected.shape, seed=4)
        (found[mask] * weights).sum().backward()
        (expected * weights).sum().backward()
        pairs = [(mine.grad, theirs.grad) for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True)]
        most = max(float(theirs.abs().max()) for _, theirs in pairs if theirs is not None)
        for mine, theirs in pairs:
            if theirs is not None:
                torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5 * most)


def test_a_mask_that_only_hides_later_tokens_is_told_from_others():
    _, mask = batch()
    rows = Rows.of(mask, shared=SHARED)
    causal = rows.mask_of(lambda batch, head, query, key: key <= query)
    assert rows.only_causal(causal)
    window = rows.mask_of(lambda batch, head, query, key: (key <= query) & (query - key < 4))
    assert not rows.only_causal(window)
    assert not rows.only_causal(torch.where(causal, 0.0, -9.0))
    assert not rows.only_causal(None)


FEW = (1, torch.bool)
"""The second row's only token of its own asks for all that it may see."""


@pytest.mark.parametrize(
    ("family", "calls"), [("llama", {(303, None), FEW}), ("gemma3_text", {(303, None), (303, torch.bool), FEW})]
)
def test_rows_longer_than_our_attention_takes(family, calls, monkeypatch):
    """They go on to torch's kernel, which computes the same: without a mask where it would only hide later tokens."""
    model, draw = long_scorer(family), torch.Generator().manual_seed(0)
    seen: list[tuple[int, torch.dtype | None]] = []
    plain = attention.sdpa_attention_forward

    def spy(module, query, key, value, mask, *rest, **more):
        seen.append((query.shape[2], None if mask is None else mask.dtype))
        return plain(module, query, key, value, mask, *rest, **more)

    prompt = torch.randint(5, 90, (300,), generator=draw).tolist()
    ids, mask = pad([[*prompt, 7, 8, 9], [*prompt, 11]], fill=0)
    with torch.no_grad():
        expected = head_outputs(model, model, ids, mask.long(), False)
        with cpu.for_training(model):
            monkeypatch.setattr(attention, "sdpa_attention_forward", spy)
            found = head_outputs(model, model, ids, mask.long(), True)
    assert set(seen) == calls
    torch.testing.assert_close(found[mask], expected[mask], rtol=0, atol=1e-5)


def test_a_batch_that_is_too_long_but_for_what_it_shares_fits(monkeypatch):
    monkeypatch.setattr(packing, "MOST_TOKENS", 8)
    model = long_scorer("llama")
    _, mask = batch()
    assert packing.fits(model, mask, SHARED)
    assert not packing.fits(model, mask)
    assert packing.fits(model, torch.ones(2, 4, dtype=torch.bool), torch.tensor([0, 3])), "no padding, but shared"
    assert not packing.fits(model, torch.ones(2, 4, dtype=torch.bool))


def lm_rows() -> list[list[int]]:
    """Rows that begin with the same nine tokens, a template's; the last two are the same ones."""
    draw = torch.Generator().manual_seed(1)
    begun = [torch.randint(5, 90, (n,), generator=draw).tolist() for n in (9, 3, 6, 4)]
    template, *ends = begun
    return [template + end for end in (*ends, ends[2])]


def read_tokens(model: Any) -> list[int]:
    """Record how many tokens the model's trunk reads in each forward."""
    read: list[int] = []
    backbone(model).register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    return read


def same_gradients(model: Any, twin: Any) -> None:
    most = max(float(theirs.grad.abs().max()) for theirs in twin.parameters())
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-5 * most)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_supervised_rows_read_what_they_begin_with_once(family):
    model = new_model(family).eval()
    twin, rows = copy.deepcopy(model), lm_rows()
    ids, mask = pad(rows, fill=0)
    labels = torch.where(mask & (torch.arange(ids.shape[1]) >= 10), ids, IGNORED)
    read = read_tokens(model)
    with cpu.for_training(model):
        found = labelled(model, ids, mask.long(), labels, packs=True)
        assert read == [9 + 3 + 6 + 4 + 10], "the last row is the one before it; ten more fill the long row"
        weights = numbers(len(found.log_probs), seed=2)
        (found.log_probs * weights).sum().backward()
    alone = []
    for row in rows:
        logits = twin(input_ids=torch.tensor([row]), use_cache=False).logits[0].log_softmax(-1)
        alone.append(logits[9:-1].gather(-1, torch.tensor(row[10:])[:, None])[:, 0])
    expected = torch.cat(alone)
    torch.testing.assert_close(found.log_probs, expected, rtol=0, atol=1e-5)
    (expected * weights).sum().backward()
    same_gradients(model, twin)


def test_responses_read_what_their_prompts_begin_with_once():
    model = new_model("llama").eval()
    twin, rows = copy.deepcopy(model), lm_rows()
    cuts = (10, 9, 11, 5)  # the first response token of each row; the last one lies in what all rows begin with
    prompts, responses = zip(*((row[:cut], row[cut:]) for row, cut in zip(rows, cuts, strict=True)), strict=True)
    batch = make_batch(prompts, responses, 0, "cpu")
    read = read_tokens(model)
    with cpu.for_training(model):
        hidden = response_hidden(model, batch, packed=True)
        assert read == [32]
        found = hidden_logprobs(model, hidden, batch, 0.7)
        weights = numbers(*batch.mask.shape, seed=3) * batch.mask
        (found[0] * weights).sum().backward()
    expected = [torch.zeros(batch.mask.shape) for _ in found]
    for number, (row, cut) in enumerate(zip(rows, cuts, strict=True)):
        logits = twin(input_ids=torch.tensor([row]), use_cache=False).logits[0].div(0.7).log_softmax(-1)[cut - 1 : -1]
        expected[0][number, : len(logits)] = logits.gather(-1, torch.tensor(row[cut:])[:, None])[:, 0]
        expected[1][number, : len(logits)] = -(logits.exp() * logits).sum(-1)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs.detach(), rtol=0, atol=1e-5)
    (expected[0] * weights).sum().backward()
    same_gradients(model, twin)
