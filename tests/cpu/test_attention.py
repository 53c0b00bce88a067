"""Attention of short rows: against a slow loop in NumPy, transformers' own function, and the model families."""

from __future__ import annotations

import copy
import itertools
import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from reference.families import FAMILIES, VARIANTS, new_model
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlhf.cpu import attention
from rlhf.cpu.attention import MOST_TOKENS, short_rows, use_short_rows
from rlhf.models.adapters import lora_config
from rlhf.models.loading import load_policy

BATCH, TOKENS, WIDTH = 3, 7, 4
LENGTHS = (7, 4, 1)  # real tokens of each row; the rest is padding in front


def states(heads: int, groups: int, tokens: int = TOKENS, keys: int = TOKENS, out: int = WIDTH) -> list[Tensor]:
    generator = torch.Generator().manual_seed(heads * 10 + groups)
    shapes = [(heads, tokens, WIDTH), (groups, keys, WIDTH), (groups, keys, out)]
    return [torch.randn(BATCH, *shape, generator=generator) * 1.5 for shape in shapes]


def module(heads: int, groups: int, **more: Any) -> Any:
    return SimpleNamespace(num_key_value_groups=heads // groups, is_causal=True, **more)


def left_padded(tokens: int, keys: int) -> Tensor:
    """[B, 1, T, S], True where a query may look: at real tokens up to its own. A padded query sees nothing."""
    place = torch.arange(keys)
    causal = place[None, :] <= torch.arange(keys - tokens, keys)[:, None]
    real = place[None, :] >= keys - torch.tensor(LENGTHS)[:, None]
    return causal[None, None] & real[:, None, None, :]


def as_float(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else torch.where(mask, 0.0, torch.finfo(torch.float32).min)


def slowly(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> np.ndarray:
    """Softmax attention as it is written in the books, in float64, a query at a time; [B, T, H, E].

    `mask`: True, or the number that is added. Where a query may see nothing: NaN.
    """
    q, k, v = (t.double().numpy() for t in (query, key, value))
    per_group = q.shape[1] // k.shape[1]
    out = np.full((q.shape[0], q.shape[2], q.shape[1], v.shape[-1]), np.nan)
    for b, h, t in np.ndindex(*q.shape[:3]):
        add = np.zeros(k.shape[2])
        if mask is not None:
            row = mask[b, min(h, mask.shape[1] - 1), t].numpy()
            add = np.where(row, 0.0, -np.inf) if row.dtype == bool else np.where(row < -1e30, -np.inf, row)
        if np.isinf(add).all():
            continue
        exponents = np.exp(k[b, h // per_group] @ q[b, h, t] * scale + add)
        out[b, t, h] = exponents @ v[b, h // per_group] / exponents.sum()
    return out


@pytest.fixture
def handed_on(monkeypatch) -> list[tuple[int, ...]]:
    """The calls that went to torch's kernel."""
    seen: list[tuple[int, ...]] = []

    def spy(module, query, key, *args, **kwargs):
        seen.append((query.shape[2], key.shape[2]))
        return sdpa_attention_forward(module, query, key, *args, **kwargs)

    monkeypatch.setattr(attention, "sdpa_attention_forward", spy)
    return seen


# -- the function ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("kind", ["none", "bool", "float", "a number per head", "longer mask"])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (6, 1)])
def test_output_and_gradients_as_in_the_books_and_as_torch_has_them(handed_on, heads, groups, kind, scaling):
    mask = left_padded(TOKENS, TOKENS)
    if kind == "none":
        mask, seen_by_all = None, torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril().expand(BATCH, 1, -1, -1)
    elif kind == "float":
        mask = as_float(mask)
    elif kind == "a number per head":  # as ALiBi has it
        slopes = torch.linspace(-1, 1, heads)[None, :, None, None] * torch.arange(TOKENS)
        mask = as_float(mask) + slopes
    longer = torch.nn.functional.pad(mask, (0, 3), value=True) if kind == "longer mask" else mask  # a static cache's
    parts = [part.requires_grad_() for part in states(heads, groups)]
    seen, nothing = short_rows(module(heads, groups), *parts, longer, scaling=scaling)
    assert nothing is None
    assert not handed_on
    assert seen.shape == (BATCH, TOKENS, heads, WIDTH)
    assert seen.is_contiguous()
    expected = slowly(
        *(p.detach() for p in parts),
        seen_by_all if mask is None else mask,
        1 / math.sqrt(WIDTH) if scaling is None else scaling,
    )
    sees = ~np.isnan(expected)
    assert sees.mean() == (1.0 if kind == "none" else sum(LENGTHS) / (BATCH * TOKENS))
    np.testing.assert_allclose(seen.detach()[sees], expected[sees], atol=1e-5)
    assert seen.isfinite().all(), "a padded query's output is used by nobody, but NaN would spread"

    up = torch.randn(seen.shape, generator=torch.Generator().manual_seed(1)) * torch.tensor(sees)
    mine = torch.autograd.grad(seen, parts, up)
    theirs = torch.autograd.grad(
        sdpa_attention_forward(module(heads, groups), *parts, mask, scaling=scaling)[0], parts, up
    )
    for one, other in zip(mine, theirs, strict=True):
        assert one.isfinite().all()
        np.testing.assert_allclose(one, other, atol=1e-5 * float(other.abs().max()))
    if kind != "none":  # keys and values on padding get nothing
        assert mine[1][2, :, :-1].abs().max() == mine[2][2, :, :-1].abs().max() == 0


def test_gradients_of_a_padded_query_are_numbers():
    """Where somebody does use its output; in bfloat16 the least float32 of a mask would be -inf."""
    masks = (left_padded(TOKENS, TOKENS), as_float(left_padded(TOKENS, TOKENS)))
    for mask, dtype in itertools.product(masks, (torch.float32, torch.bfloat16)):
        parts = [part.to(dtype).requires_grad_() for part in states(4, 2)]
        out, _ = short_rows(module(4, 2), *parts, mask)
        assert out.isfinite().all()
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.square().sum(), parts))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2)])
def test_a_decoding_step(handed_on, heads, groups, masked):
    """One query at the end of nine keys sees all of them, but padding; without a mask nothing is cut off."""
    query, key, value = states(heads, groups, 1, 9, out=5)
    mask = left_padded(1, 9) if masked else None
    seen, _ = short_rows(module(heads, groups), query, key, value, mask)
    np.testing.assert_allclose(seen, slowly(query, key, value, mask, 1 / math.sqrt(WIDTH)), atol=1e-5)
    assert not handed_on


def test_without_a_mask_causality_is_the_callers_word_then_the_modules():
    parts, scale = states(4, 4), 1 / math.sqrt(WIDTH)
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril().expand(BATCH, 1, -1, -1)
    both_ways = module(4, 4)
    both_ways.is_causal = False
    for one, said, mask in (
        (module(4, 4), None, causal), (module(4, 4), False, None), (both_ways, None, None), (both_ways, True, causal),
        (object(), None, causal),
    ):  # fmt: skip
        seen, _ = short_rows(one, *parts, None, is_causal=said)
        np.testing.assert_allclose(seen, slowly(*parts, mask, scale), atol=1e-5)


def test_bfloat16_stays_bfloat16():
    parts = [part.bfloat16() for part in states(6, 2)]
    seen, _ = short_rows(module(6, 2), *parts, left_padded(TOKENS, TOKENS))
    assert seen.dtype == torch.bfloat16
    expected = slowly(*(part.float() for part in parts), left_padded(TOKENS, TOKENS), 1 / math.sqrt(WIDTH))
    sees = ~np.isnan(expected)
    np.testing.assert_allclose(seen.float()[sees], expected[sees], atol=0.03)
    assert seen.isfinite().all()


# -- what torch's kernel gets ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "keys", "given"),
    [
        (1, MOST_TOKENS + 1, {}),
        (MOST_TOKENS + 1, MOST_TOKENS + 1, {}),
        (3, 7, {}),  # a chunk after a cache: torch's causal mask would be another
        (7, 7, {"dropout": 0.1}),
        (7, 7, {"softcap": 30.0}),
        (7, 7, {"s_aux": torch.zeros(4)}),
        (7, 7, {"position_bias": torch.zeros(1, 4, 7, 7)}),
        (7, 7, {"cache": object()}),
    ],
)
def test_whatever_is_unusual_is_handed_on_as_it_came(monkeypatch, tokens, keys, given):
    calls, result = [], torch.randn(2, tokens, 4, WIDTH)
    monkeypatch.setattr(
        attention, "sdpa_attention_forward", lambda *args, **kwargs: (calls.append((args, kwargs)) or result, None)
    )
    one, parts = module(4, 2), states(4, 2, tokens, keys)
    found, weights = short_rows(one, *parts, None, scaling=0.3, is_causal=True, extra=1, **given)
    assert weights is None
    assert torch.equal(found, result)
    ((args, kwargs),) = calls
    assert args == (one, *parts, None, given.get("dropout", 0.0), 0.3)
    assert kwargs == {"is_causal": True, "extra": 1} | {k: v for k, v in given.items() if k != "dropout"}


@pytest.mark.parametrize("keys", [MOST_TOKENS, MOST_TOKENS + 1])
def test_the_last_short_row_and_the_first_long_one(handed_on, keys):
    query, key, value = states(2, 1, keys, keys)
    seen, _ = short_rows(module(2, 1), query, key, value, None)
    assert handed_on == [(keys, keys)] * (keys > MOST_TOKENS)
    last = slowly(query[:, :, -1:], key, value, None, 1 / math.sqrt(WIDTH))
    np.testing.assert_allclose(seen[:, -1:], last, atol=1e-5)


def test_arguments_that_say_nothing_are_not_unusual(handed_on):
    short_rows(module(4, 2), *states(4, 2), None, softcap=None, s_aux=None, position_bias=None, sliding_window=4)
    assert not handed_on


def test_what_is_added_to_the_scores_is_made_once_for_a_mask_and_goes_with_it(monkeypatch):
    made, plain = [], attention._bias

    def spy(mask, dtype, shape):
        made.append((dtype, shape))
        return plain(mask, dtype, shape)

    monkeypatch.setattr(attention, "_bias", spy)
    before, mask = len(attention._BIASES), left_padded(TOKENS, TOKENS)
    outputs = [short_rows(module(4, 2), *states(4, 2), mask)[0] for _ in range(3)]
    assert len(made) == 1
    assert torch.equal(outputs[0], outputs[2])
    short_rows(module(4, 2), *(state.bfloat16() for state in states(4, 2)), mask)
    short_rows(module(2, 1), *states(2, 1), mask)
    assert len(made) == 3, "of another precision, or for other heads, it is another one"
    other = mask.clone()
    other[0, 0, -1, :3] = False
    changed = short_rows(module(4, 2), *states(4, 2), other)[0]
    assert not torch.equal(changed, outputs[0])
    del mask, other
    assert len(attention._BIASES) == before


# -- models ------------------------------------------------------------------------------------------------

OWN = {"gemma2", "bloom", "gptj", "falcon", "falcon_alibi"}  # they compute their attention themselves
CASES = {
    "padding in front": ([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 10]),
    "padding behind": ([[1] * 10, [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]]),
    "no padding": ([[1] * 10, [1] * 10]),
}
IDS = torch.tensor([[11, 7, 9, 20, 21, 22, 23, 24, 25, 26], [30, 31, 5, 6, 7, 40, 41, 42, 43, 44]])


def run(model: Any, rows: list[list[int]]) -> dict[str, Tensor]:
    """Logits at real tokens, and every weight's gradient, of a loss that weighs them all differently."""
    model.zero_grad()
    mask = torch.tensor(rows)
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    arguments = {"position_ids": position} if model.config.model_type not in ("bloom",) else {}
    logits = model(input_ids=IDS, attention_mask=mask, use_cache=False, **arguments).logits[mask.bool()]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * weights).mean().backward()
    return {"logits": logits.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def decoded(model: Any) -> Tensor:
    """The last tokens one by one, after a cache of the first ones with padding in front."""
    mask = torch.tensor(CASES["padding in front"])
    cache, out = DynamicCache(config=model.config), []
    with torch.no_grad():
        for start, stop in ((0, 7), (7, 8), (8, 9), (9, 10)):
            logits = model(IDS[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache).logits
            out.append(logits[:, -1])
    return torch.stack(out)


@pytest.mark.parametrize("name", [*FAMILIES, *VARIANTS])
def test_a_family_says_the_same_and_learns_the_same(monkeypatch, name):
    """Sliding windows that are shorter than the rows, grouped queries, learned and rotary positions, ALiBi."""
    plain = new_model(name)
    model, chosen = copy.deepcopy(plain), plain.config._attn_implementation
    use_short_rows(model)
    short = model.config._attn_implementation == attention.BY_ROWS
    assert short == (name not in OWN)
    assert chosen == "sdpa" or not short
    assert plain.config._attn_implementation == chosen, "a copy's choice is not the original's"
    if not short:
        assert model.config._attn_implementation == chosen
        return
    kernel, calls = attention.sdpa_attention_forward, []
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *a, **k: calls.append(1) or kernel(*a, **k))
    for case, rows in CASES.items():
        seen, expected = run(model, rows), run(plain, rows)
        assert seen.keys() == expected.keys()
        assert float(expected["logits"].std()) > 0.1
        for key, tensor in expected.items():
            allowed = 1e-5 * max(1e-3, float(tensor.abs().max()))
            np.testing.assert_allclose(seen[key], tensor, rtol=0, atol=allowed, err_msg=f"{case}: {key}")
    if name != "lfm2":  # its cache is made by itself
        np.testing.assert_allclose(decoded(model), decoded(plain), atol=2e-5)
    assert not calls


def test_the_families_layers_really_take_the_short_way(monkeypatch):
    model, calls = new_model("mistral"), []
    monkeypatch.setattr(
        attention, "short_rows", lambda m, q, k, *a, **kw: calls.append(k.shape) or short_rows(m, q, k, *a, **kw)
    )
    use_short_rows(model)
    run(model, CASES["no padding"])
    assert calls == [(2, 2, 10, 8)] * 2  # keys are not repeated for grouped queries


def test_under_an_adapter_and_for_nobody():
    model: Any = load_policy(new_model("llama"), lora=lora_config(2, 4.0))
    use_short_rows(model)
    assert model.get_base_model().config._attn_implementation == attention.BY_ROWS
    use_short_rows(None)
    eager = AutoModelForCausalLM.from_config(new_model("llama").config, attn_implementation="eager")
    use_short_rows(eager)
    assert eager.config._attn_implementation == "eager", "what the user chose stays"


def test_on_a_gpu_torchs_kernel_stays(monkeypatch):
    """For a model that is there already, and for one that is moved there later, as the trainer does."""
    model = new_model("llama").to("meta")
    use_short_rows(model)
    assert model.config._attn_implementation == "sdpa"
    calls, result = [], torch.zeros(2, 7, 4, WIDTH, device="meta")
    monkeypatch.setattr(
        attention, "sdpa_attention_forward", lambda *args, **kwargs: (calls.append(args) or result, None)
    )
    assert short_rows(module(4, 2), *(part.to("meta") for part in states(4, 2)), None)[0].shape == result.shape
    assert len(calls) == 1


def test_what_is_saved_does_not_know(tmp_path):
    """The folder is one that any program with transformers reads."""
    for name in ("llama", "gemma3_text"):
        model = new_model(name)
        use_short_rows(model)
        model.save_pretrained(tmp_path / name)
        for file in (tmp_path / name).glob("*.json"):
            assert attention.BY_ROWS not in file.read_text()
            assert "attn_implementation" not in json.dumps(json.loads(file.read_text()))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        assert loaded.config._attn_implementation == "sdpa"
        seen, expected = loaded(IDS).logits.detach(), model(IDS).logits.detach()
        np.testing.assert_allclose(seen, expected, atol=1e-5 * float(expected.abs().max()))
