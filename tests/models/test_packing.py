"""rlhf/models/packing.py: rows in one long row, against the padded batch, each row alone, and plain loops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from reference.families import FAMILIES, VARIANTS, new_model
from reference.prepared import prepared_models
from reference.tiny_chain import shake
from torch import nn

from rlhf import chat, cpu
from rlhf.cpu.attention import MOST_TOKENS, use_short_rows
from rlhf.models import packing
from rlhf.models.adapters import backbone, lora_config
from rlhf.models.long_row import Rows
from rlhf.models.packing import can_pack, packed_hidden
from rlhf.padding import Batch, make_batch
from rlhf.ppo import actor_critic as actor_critics
from rlhf.ppo.build import build_actor_critic, enable_gradient_checkpointing
from rlhf.ppo.plan import split_by_tokens
from rlhf.ppo.trainer import PPOConfig, PPOTrainer

PROMPTS = [[5, 6, 7], [9], [20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30], [30, 31], list(range(100, 125))]
RESPONSES = [[30, 31], [32, 33, 34, 35], [36], [40, 41, 42, 43, 44, 45, 46, 47], [50, 51, 52]]
MASK = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 0], [0, 0, 1, 1]], dtype=torch.bool)  # padding on either side
PADDED = {  # families that are not packed, and why
    "gemma2": "a soft cap: not our attention",
    "gptj": "an attention of its own",
    "falcon": "an attention of its own",
    "falcon_alibi": "an attention of its own",
    "bloom": "an attention of its own",
    "lfm2": "a convolution sees other tokens",
    "stablelm": "its layers hand nothing on to attention",
}


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def widths(monkeypatch) -> list[tuple[int, ...]]:
    """Record the shape of the ids in every forward of a packed batch, after the trials of `can_pack`."""
    seen: list[tuple[int, ...]] = []
    plain = actor_critics.packing.packed_hidden

    def spy(model, input_ids, mask, shared=None):
        if mask.shape == (2, 4):
            return plain(model, input_ids, mask, shared)
        handle = backbone(model).register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )
        try:
            return plain(model, input_ids, mask, shared)
        finally:
            handle.remove()

    monkeypatch.setattr(actor_critics.packing, "packed_hidden", spy)
    return seen


# -- rows, and back ----------------------------------------------------------------------------------------


def test_rows_are_set_apart_and_put_back():
    rows, x = Rows.of(MASK), numbers(1, 2, 6, 5).requires_grad_()
    apart = rows.unpack(x)
    assert apart.shape == (3, 2, 3, 5)
    places = {(0, 0): 0, (0, 1): 1, (0, 2): 2, (1, 0): 3, (2, 0): 4, (2, 1): 5}  # (row, step): token
    for (row, step), token in places.items():
        assert torch.equal(apart[row, :, step], x[0, :, token])
    up = numbers(3, 2, 3, 5, seed=1)
    apart.backward(up)
    assert all(torch.equal(x.grad[0, :, token], up[row, :, step]) for (row, step), token in places.items())

    y = numbers(3, 2, 3, 5, seed=2).requires_grad_()
    together = rows.pack([y])
    assert together.shape == (1, 6, 2, 5)
    assert all(torch.equal(together[0, token], y[row, :, step]) for (row, step), token in places.items())
    up = numbers(1, 6, 2, 5, seed=3)
    together.backward(up)
    expected = torch.zeros_like(y)
    for (row, step), token in places.items():
        expected[row, :, step] = up[0, token]
    assert torch.equal(y.grad, expected), "padding gets no gradient: its query would pass it on to real keys"


@pytest.mark.parametrize("heads", [1, 2])
def test_a_rows_part_of_the_mask(heads):
    rows, whole = Rows.of(MASK), numbers(1, heads, 6, 6) > 0
    seen = rows.mask(whole)
    starts, lengths = [0, 3, 4], [3, 1, 2]
    assert seen.shape == (3, heads, 3, 3)
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        here = slice(start, start + length)
        assert torch.equal(seen[row, :, :length, :length], whole[0, :, here, here])
        assert not seen[row, :, :, length:].any(), "nobody looks at padding"
    floats = rows.mask(torch.where(whole, 0.5, -9.0))
    assert (floats[1, :, :, 1:] == torch.finfo(torch.float32).min).all()
    assert torch.equal(floats[0], torch.where(whole[0, :, :3, :3], 0.5, -9.0))
    assert rows.mask(None) is None


def test_a_mask_given_as_a_function_comes_row_by_row():
    """A function gives the same mask as the [N, N] tensor split by rows; a split mask stays as it is, on more positions
    too."""
    rows, wide = Rows.of(MASK), Rows.of(MASK, grain=4)
    row_of = torch.tensor([[0, 0, 0, 1, 2, 2]])

    def function(batch, head, query, key):
        return (row_of[batch, query] == row_of[batch, key]) & (key <= query) & (query - key < 2)

    count = torch.arange(6)
    whole = function(torch.zeros(1, 1, 1, 1, dtype=torch.long), 0, count[:, None], count[None, :])
    apart = rows.mask_of(function)
    assert torch.equal(apart, rows.mask(whole))
    assert rows.mask(apart) is apart
    assert apart[0, 0].tolist() == [[True, False, False], [True, True, False], [False, True, True]]
    assert wide.mask_of(function).shape == (3, 1, 4, 4)
    assert torch.equal(wide.mask_of(function)[..., :3, :3], apart)
    assert not wide.mask_of(function)[..., 3].any()


def test_the_mask_of_one_row_with_places_to_spare():
    rows, whole = Rows.of(torch.ones(1, 3, dtype=torch.bool), grain=4), torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    seen = rows.mask(whole)
    assert seen.shape == (1, 1, 4, 4)
    assert torch.equal(seen[..., :3, :3], whole)
    assert not seen[..., 3].any()
    assert rows.mask(seen) is seen


def test_what_every_layer_needs_is_made_once():
    rows, made = Rows.of(MASK), []

    def make(*of):
        made.append(of)
        return torch.zeros(2)

    mask = torch.ones(3)
    first = rows.once(make, mask, 4)
    assert rows.once(make, mask, 4) is first
    assert rows.once(make, mask, 5) is not first
    assert rows.once(make, mask.clone(), 4) is not first
    assert len(made) == 3


# -- models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FAMILIES, *VARIANTS])
def test_which_families_are_packed_and_that_they_compute_the_same(name, widths):
    """Against the padded batch, whose agreement with each row alone is tested in models/test_families.py."""
    model = prepared_models(new_model(name))
    assert model.packs == (name not in PADDED)
    shake(model.value_head, 3, 0.3)
    batch = make_batch(PROMPTS, RESPONSES, 3, "cpu")
    packed = model(batch, 0.8, ("policy", "reference", "value"))
    assert widths == ([] if name in PADDED else [(1, 64)] * 3)  # 60 tokens, and 4 that nobody reads
    model.packs = False
    padded = model(batch, 0.8, ("policy", "reference", "value"))
    for field, seen, expected in zip(packed._fields, packed, padded, strict=True):
        np.testing.assert_allclose(seen.detach(), expected.detach(), atol=2e-5, err_msg=field)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["separate", "adapter", "shared_trunk"])
def test_gradients_are_those_of_the_padded_batch(kind, checkpointing):
    lora = None if kind == "separate" else lora_config(2, 4.0)
    grads: list[dict[str, torch.Tensor]] = []
    for packs in (True, False):
        model = prepared_models(new_model("mistral"), value_kind=kind, lora=lora)
        assert model.packs
        model.packs = packs
        shake(model, 5, 0.1, only="lora_")
        shake(model.value_head, 3, 0.3)
        if checkpointing:
            enable_gradient_checkpointing(model)
        out = model(make_batch(PROMPTS, RESPONSES, 3, "cpu"), 0.8)
        weights = numbers(*out.logprobs.shape)
        (out.logprobs * weights + out.values * weights.flip(1)).sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    packed, padded = grads
    assert packed.keys() == padded.keys()
    assert len(packed) > 10
    for name, expected in padded.items():
        np.testing.assert_allclose(packed[name], expected, atol=1e-5 * max(1.0, float(expected.abs().max())))


def test_rows_that_are_too_long_for_our_attention(widths):
    """Such rows go to torch's kernel, still row by row."""
    model = prepared_models(new_model("mistral"))
    prompts = [list(range(1, MOST_TOKENS + 9)), [5, 6, 7]]
    batch = make_batch(prompts, [[8, 9], [10, 11, 12]], 3, "cpu")
    packed = model(batch, 1.0).logprobs
    assert len(widths) == 2
    model.packs = False
    np.testing.assert_allclose(packed.detach(), model(batch, 1.0).logprobs.detach(), atol=2e-5)


def test_what_is_left_padded(widths, monkeypatch):
    model = prepared_models(new_model("llama"))
    model(make_batch([[5, 6], [7, 8]], [[1, 2], [3, 4]], 3, "cpu"), 1.0, ("policy",))
    assert widths == [], "no padding, nothing to gain"
    batch = make_batch(PROMPTS, RESPONSES, 3, "cpu")
    monkeypatch.setattr(packing, "MOST_TOKENS", 60)
    model(batch, 1.0, ("policy",))
    assert widths == [(1, 64)]
    monkeypatch.setattr(packing, "MOST_TOKENS", 59)
    model(batch, 1.0, ("policy",))
    assert len(widths) == 1, "the mask of a long row grows with its square"


@pytest.mark.parametrize(("lengths", "width"), [((40, 24), 64), ((40, 25), 96), ((9, 4), 13)])
def test_long_rows_have_few_lengths(lengths, width, widths):
    """A multiple of 32 tokens, where the longest row has enough of them to fill it up."""
    model = prepared_models(new_model("llama"))
    batch = make_batch([[first] * (n - 1) for first, n in zip((5, 7), lengths, strict=True)], [[6]] * 2, 3, "cpu")
    model(batch, 1.0, ("policy",))
    assert widths == [(1, width)]


def test_not_on_a_gpu():
    """On a GPU torch's kernel attends, and a mask of the whole batch would cost memory."""
    model = build_actor_critic(new_model("llama")).to("meta")
    classes = [type(module) for module in model.modules()]
    cpu.prepare(model)
    assert not model.packs
    assert [type(module) for module in model.modules()] == classes
    assert model.policy.config._attn_implementation == "sdpa"
    assert model.most_tokens(10_000) == 10_000


def own_attention(model: Any) -> Any:
    use_short_rows(model)
    return model


def test_a_model_in_which_other_tokens_show_is_not_packed():
    assert can_pack(own_attention(new_model("llama")))

    class Leak(nn.Module):
        def __init__(self, inner: nn.Module, share: float):
            super().__init__()
            self.inner, self.share = inner, share

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) + self.share * x.roll(1, dims=1)

    leaking = own_attention(new_model("llama"))
    mlp = leaking.model.layers[0].mlp
    leaking.model.layers[0].mlp = Leak(mlp, 1e-5)  # less than any tolerance
    assert not can_pack(leaking)
    leaking.model.layers[0].mlp = Leak(mlp, 0.0)
    assert can_pack(leaking)


def test_a_model_that_has_positions_of_its_own_is_not_packed():
    model = own_attention(new_model("opt"))
    plain = model.model.decoder.embed_positions.forward
    model.model.decoder.embed_positions.forward = lambda mask, past=0, position_ids=None: plain(
        mask, past, position_ids=torch.arange(mask.shape[1])[None]
    )
    assert not can_pack(model)
    assert model.training is False
    model.train()
    can_pack(model)
    assert model.training is True


def test_the_mode_is_put_back_where_the_model_takes_no_packed_rows():
    model = own_attention(new_model("llama")).train()
    plain = model.model.forward
    model.model.forward = lambda input_ids, position_ids=None, use_cache=None: plain(input_ids=input_ids)
    assert not can_pack(model)
    assert model.training


def test_hidden_states_are_in_the_order_of_the_rows():
    model = own_attention(new_model("llama"))
    ids = torch.tensor([[5, 6, 7, 3], [3, 8, 3, 3], [3, 3, 9, 10]])
    seen = packed_hidden(model, ids, MASK)
    alone = [model.model(input_ids=torch.tensor([row])).last_hidden_state[0] for row in ([5, 6, 7], [8], [9, 10])]
    np.testing.assert_allclose(seen.detach(), torch.cat(alone).detach(), atol=1e-5)


# -- the plan ----------------------------------------------------------------------------------------------


def test_padding_that_is_not_there_is_not_counted():
    lengths = [1, 1, 1, 9]
    assert split_by_tokens(range(4), lengths, 12) == [[0, 1, 2], [3]]
    assert split_by_tokens(range(4), lengths, 12, padded=False) == [[0, 1, 2, 3]]
    parts = split_by_tokens(range(4), lengths, 11, padded=False)
    assert sorted(row for part in parts for row in part) == [0, 1, 2, 3]
    assert all(sum(lengths[row] for row in part) <= 11 for part in parts)
    assert len(parts) == 2
    assert split_by_tokens(range(4), lengths, 2, padded=False)[-1] == [3], "a row that is too long alone"


def trainer(folder: Any, tokens: int, model: Any) -> PPOTrainer:
    args = PPOConfig(
        output_dir=str(folder), updates=1, rollout_size=8, minibatch_size=8, inner_epochs=1, max_new_tokens=6,
        tokens_per_microbatch=tokens, bf16=False, preflight=False,
    )  # fmt: skip
    rows = [{"prompt": "go " * (n + 1)} for n in range(8)]
    return PPOTrainer(model, lambda completions, **_: [float(len(c)) for c in completions], args, rows)


def test_a_trainers_micro_batches_hold_so_many_real_tokens(tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    chat.prepare_tokenizer(tiny_tokenizer)
    tiny_model.resize_token_embeddings(len(tiny_tokenizer))
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    made = trainer(tmp_path / "run", 90, tmp_path / "model")
    assert made.actor_critic.packs
    lengths = [10, 20, 30, 40, 50, 10, 10, 10]
    (plan,) = made.plan(lengths, 0)
    assert all(sum(lengths[row] for row in part) <= 90 for part in plan)
    assert any(len(part) * max(lengths[row] for row in part) > 90 for part in plan)
    made.args = replace(made.args, tokens_per_microbatch=10_000)
    monkeypatch.setattr(packing, "MOST_TOKENS", 100)
    (plan,) = made.plan(lengths, 0)
    assert len(plan) > 1, "beyond that a batch would be padded, and its padding was not counted"
    made.actor_critic.packs = False
    (plan,) = made.plan([30] * 8, 0)
    assert len(plan) == 1


def test_batches_keep_their_layout(widths):
    """Rows with padding on the left come out at the same positions."""
    model = prepared_models(new_model("llama"))
    batch = make_batch(PROMPTS, RESPONSES, 3, "cpu")
    shifts = (~batch.attention_mask).sum(-1)
    ids = torch.stack([torch.roll(row, int(s)) for row, s in zip(batch.input_ids, shifts, strict=True)])
    mask = torch.stack([torch.roll(row, int(s)) for row, s in zip(batch.attention_mask, shifts, strict=True)])
    left = Batch(ids, mask, batch.prompt_tokens + shifts, batch.targets, batch.mask)
    np.testing.assert_allclose(
        model(left, 1.0, ("policy",)).logprobs.detach(), model(batch, 1.0, ("policy",)).logprobs.detach(), atol=1e-5
    )
    assert widths == [(1, 64)] * 2


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, 9), (torch.bfloat16, 32)])
def test_in_half_precision_rows_have_places_for_a_multiple_of_32_keys(dtype, expected, monkeypatch):
    """The longest row has 9 tokens; the contents of the other positions change nothing."""
    model, seen, plain = new_model("mistral").to(dtype), [], Rows.of

    def spy(mask, grain=1, shared=None):
        rows = plain(mask, grain, shared)
        seen.append(rows.tokens.shape[1])
        return rows

    monkeypatch.setattr(Rows, "of", spy)
    use_short_rows(model)
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    ids = torch.randint(5, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        packed = packed_hidden(model, ids, mask)
        alone = torch.cat([model.model(input_ids=ids[i : i + 1, :n]).last_hidden_state[0] for i, n in ((0, 9), (1, 4))])
    assert seen == [expected]
    np.testing.assert_allclose(packed.float(), alone.float(), atol=1e-5 if dtype == torch.float32 else 0.1)


# -- transformers' own attention -----------------------------------------------------------------------------


def packed_and_padded(model: Any, device: str) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Return hidden states of real tokens and gradients, packed and padded."""
    lengths = torch.tensor([[9], [4], [17], [1]])
    mask = (torch.arange(17) < lengths).to(device)
    ids = torch.randint(5, 100, (4, 17), generator=torch.Generator().manual_seed(0)).to(device)
    found = []
    for packs in (True, False):
        model.zero_grad()
        if packs:
            states = packing.padded_hidden(model, ids, mask)
        else:
            states = backbone(model)(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
        real = states[mask].float()
        (real * numbers(*real.shape, seed=4).to(device)).sum().backward()
        found.append((real.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    return found


def assert_alike(found: list[tuple[torch.Tensor, dict[str, torch.Tensor]]], tolerance: float) -> None:
    (packed, grads), (padded, expected) = found
    assert float((packed - padded).abs().max()) <= tolerance * float(padded.abs().max())
    assert grads.keys() == expected.keys()
    for name, grad in expected.items():
        assert float((grads[name] - grad).abs().max()) <= tolerance * float(grad.abs().max()) + 1e-6, name


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_neox", "stablelm"])
def test_by_transformers_own_mask(name):
    """SDPA masks a long row by its positions, sliding windows too."""
    model = new_model(name).eval()
    assert packing.attention_of(model) == "sdpa"
    assert [packing.choose(model, setting) for setting in ("auto", "on", "off")] == [False, True, False]
    assert_alike(packed_and_padded(model, "cpu"), 1e-5)


def test_what_packing_chooses():
    model = own_attention(new_model("llama"))
    assert [packing.choose(model, setting) for setting in ("auto", "on", "off")] == [True, True, False]
    assert packing.most_tokens(model) == packing.MOST_TOKENS
    model.set_attn_implementation = lambda name: setattr(model.config, "_attn_implementation", name)  # it needs no GPU
    packing.set_attention(model, packing.FLASH)
    assert packing.is_flash(model)
    assert packing.most_tokens(model) > 10**9
    with packing.decoding(model):
        assert packing.attention_of(model) == "sdpa"
    assert packing.attention_of(model) == "flash_attention_2"


def test_under_autocast_a_model_in_float32_may_differ_by_what_half_precision_does():
    """Another number of tokens is another kernel there, which need not round alike."""

    class Rounds(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1e-3 * x.shape[1]

    model = own_attention(new_model("llama"))
    model.model.layers[0].mlp = Rounds()
    with torch.autocast("cpu", torch.bfloat16):
        assert can_pack(model)
    assert not can_pack(model)


def test_flash_attention_gets_the_rows_ends(monkeypatch):
    """transformers would find them by the positions, in every layer anew; SDPA, which masks, needs the same result."""
    model = new_model("llama")
    mask = torch.tensor([[True, True, True], [True, False, False]])
    monkeypatch.setattr(packing, "is_flash", lambda model: True)
    with packing.as_one_row(model, torch.tensor([[5, 6, 7], [8, 0, 0]]), mask) as given:
        assert given["input_ids"].tolist() == [[5, 6, 7, 8]]
        assert given["position_ids"].tolist() == [[0, 1, 2, 0]]
        assert given["cu_seq_lens_q"].tolist() == given["cu_seq_lens_k"].tolist() == [0, 3, 4]
        assert given["cu_seq_lens_q"].dtype == torch.int32
        assert given["max_length_q"] == given["max_length_k"] == 3
        assert "packed_rows" not in given


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_packed_rows_on_a_gpu(attention):
    model = new_model("llama").cuda().eval()
    dtype = torch.float32 if attention == "sdpa" else torch.bfloat16
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn")
    chosen = packing.prepare(model, "on", dtype)
    assert packing.attention_of(model) == attention
    with torch.autocast("cuda", dtype, enabled=dtype == torch.bfloat16):
        assert chosen
        assert_alike(packed_and_padded(model, "cuda"), 1e-4 if dtype == torch.float32 else 0.05)
