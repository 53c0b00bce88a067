"""rlhf/models/head_outputs.py: a scalar head at every position, packed and padded, against the trunk and its head."""

from __future__ import annotations

import copy

import pytest
import torch
from reference.families import new_model

from rlhf import cpu
from rlhf.models.adapters import backbone
from rlhf.models.head_outputs import hands_rows_on, head_outputs, packs_rows
from rlhf.models.scalar import new_scalar_model, score_head

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [20, 21, 22, 0, 0, 0], [30, 0, 0, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("packs", [False, True])
def test_numbers_and_gradients_are_the_heads_on_each_row_alone(family, packs):
    model = new_scalar_model(new_model(family), seed=0).eval()
    twin = copy.deepcopy(model)
    assert hands_rows_on(model)
    found = head_outputs(model, model, IDS, MASK, packs)
    assert found.shape == (3, 6, 1)
    expected = torch.cat(
        [
            score_head(twin)(backbone(twin)(input_ids=ids[None, : int(mask.sum())]).last_hidden_state)[0]
            for ids, mask in zip(IDS, MASK, strict=True)
        ]
    )
    torch.testing.assert_close(found[MASK.bool()], expected, rtol=0, atol=1e-5)
    found[MASK.bool()].sum().backward()
    expected.sum().backward()
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        if theirs.grad is not None:
            scale = float(theirs.grad.abs().max())
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-5 * scale + 1e-8, msg=name)


@pytest.mark.parametrize(("family", "packed"), [("llama", True), ("gpt2", True), ("falcon", False)])
def test_which_families_are_packed(family, packed):
    """And what is chosen computes the same, whatever a family's classifier does with its arguments."""
    model = new_scalar_model(new_model(family), seed=0)
    with cpu.for_training(model):
        assert packs_rows(model, "auto", torch.float32) == packed
        assert not packs_rows(model, "off", torch.float32)
    assert not packs_rows(model, "auto", torch.float32), "plain SDPA has a mask for the whole row"


def test_a_classifier_that_keeps_what_its_trunk_needs_is_not_packed():
    model = new_scalar_model(new_model("llama"), seed=0)
    with cpu.for_training(model):
        assert packs_rows(model, "auto", torch.float32)
        plain = model.forward
        model.forward = lambda packed_rows=None, **given: plain(**given)
        assert not packs_rows(model, "auto", torch.float32)
