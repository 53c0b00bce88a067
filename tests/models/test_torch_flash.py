"""rlhf/models/torch_flash.py: packed rows by torch's own flash attention, with `reference.flash.varlen_attn` in its
place, against padded rows by SDPA."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from reference import flash
from reference.families import FAMILIES, HEAD, VARIANTS, new_model
from torch import nn
from torch.nn.attention import varlen as torchs
from transformers import AutoModelForCausalLM, LlamaConfig

from rlhf.models import packing, torch_flash
from rlhf.models.adapters import backbone
from rlhf.models.head_outputs import packs_rows
from rlhf.models.scalar import new_scalar_model
from rlhf.ppo import build
from rlhf.ppo.config import PPOConfig

CUDA = torch.device("cuda")
LENGTHS = (9, 4, 17, 1)  # a sliding window of 6 is shorter than two of them
PADDED = {  # families that are not packed, and why
    "gemma2": "a soft cap",
    "gptj": "an attention of its own",
    "falcon": "an attention of its own",
    "falcon_alibi": "an attention of its own",
    "bloom": "an attention of its own",
    "lfm2": "a convolution sees other tokens",
    "stablelm": "its layers hand nothing on to attention",
}


@pytest.fixture
def kernel(monkeypatch) -> list[dict[str, Any]]:
    """Put the stand-in in the kernel's place, here and in float32; return what it is called with."""
    calls: list[dict[str, Any]] = []

    @functools.wraps(flash.varlen_attn)
    def attend(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(kwargs | {"queries": args[0].shape, "dtype": args[0].dtype})
        return flash.varlen_attn(*args, **kwargs)

    monkeypatch.setattr(torchs, "varlen_attn", attend)
    monkeypatch.setattr(torch_flash, "takes", lambda query, dtype, width: True)
    return calls


@pytest.fixture
def gpu(monkeypatch) -> None:
    """A GPU that is not here, on which torch's kernel works."""
    monkeypatch.setattr(torch_flash, "works", lambda device, dtype, width=64: width <= torch_flash.WIDEST)


def states_and_gradients(model: Any, packs: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).to(model.device)
    ids = torch.randint(5, 100, mask.shape, generator=torch.Generator().manual_seed(0)).to(model.device)
    model.zero_grad()
    if packs:
        states = packing.padded_hidden(model, ids, mask)
    else:
        states = backbone(model)(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
    real = states[mask].float()
    (real * torch.randn(real.shape, generator=torch.Generator().manual_seed(4)).to(model.device)).sum().backward()
    return real.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_alike(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    assert float((found[0] - expected[0]).abs().max()) <= tolerance * float(expected[0].abs().max())
    assert found[1].keys() == expected[1].keys()
    largest = max(
        float(grad.abs().max()) for grad in expected[1].values()
    )  # of a bias of keys it is 0 but for rounding
    for name, grad in expected[1].items():
        allowed = tolerance * (float(grad.abs().max()) + 0.1 * largest)
        assert float((found[1][name] - grad).abs().max()) <= allowed, name


@pytest.mark.parametrize("name", [*FAMILIES, *VARIANTS])
def test_packed_rows_are_the_padded_ones(name, kernel):
    model = new_model(name)
    expected = states_and_gradients(model, packs=False)
    packing.set_attention(model, packing.VARLEN)
    assert packing.choose(model, "auto") == (name not in PADDED)
    if name in PADDED:
        return
    kernel.clear()
    assert_alike(states_and_gradients(model, packs=True), expected)
    heads = model.config.num_attention_heads
    assert {call["queries"][:2] for call in kernel} == {(32, heads)}
    windows = {"mistral": [(5, 0)] * 2, "gemma3_text": [(5, 0), (-1, 0)]}.get(name, [(-1, 0)] * 2)
    assert [call["window_size"] for call in kernel] == windows
    kernel.clear()
    assert_alike(states_and_gradients(model, packs=False), expected, 0.0)
    assert kernel == []


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "gpt2"])
def test_row_by_row_where_the_kernel_is_not(name):
    """So is a model computed that is still on the CPU."""
    model = new_model(name)
    expected = states_and_gradients(model, packs=False)
    packing.set_attention(model, packing.VARLEN)
    assert packing.choose(model, "auto")
    assert_alike(states_and_gradients(model, packs=True), expected)


def test_heads_of_any_width_and_a_scale_of_their_own(kernel):
    config = LlamaConfig(**HEAD | {"head_dim": 10, "pad_token_id": 3})
    model = AutoModelForCausalLM.from_config(config).eval()
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.7
    expected = states_and_gradients(model, packs=False)
    packing.set_attention(model, packing.VARLEN)
    assert_alike(states_and_gradients(model, packs=True), expected)
    assert {(call["queries"][2], call["scale"], call["enable_gqa"]) for call in kernel} == {(16, 0.7, True)}


def test_a_torch_whose_kernel_takes_no_groups(kernel, monkeypatch):
    """Torch 2.11's: keys and values are copied for each head."""
    older = torchs.varlen_attn

    def attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        return older(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)

    model = new_model("llama")
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    expected = states_and_gradients(model, packs=False)
    packing.set_attention(model, packing.VARLEN)
    monkeypatch.setattr(torchs, "varlen_attn", attend)
    assert torch_flash.kernel.__wrapped__() is attend
    assert_alike(states_and_gradients(model, packs=True), expected)
    assert len(kernel) == 2
    given = attend, torch.device("cpu"), torch.bfloat16, 16
    assert [torch_flash._alike(*given, window) for window in (None, 4)] == [True, True]


def heads(tokens: int = 6, width: int = 8, own: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, tokens, size, generator=generator) for size in (width, width, own)]


def attend(module: Any, given: list[torch.Tensor], mask: Any = None, **kwargs: Any) -> torch.Tensor:
    ends = torch.tensor([0, 2, 6], dtype=torch.int32)
    return torch_flash.varlen(module, *given, mask, cu_seq_lens_q=ends, max_length_q=4, **kwargs)[0]


@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 2), (False, None), (False, 2)])
def test_both_ways_agree_on_values_of_another_width_and_on_later_tokens(kernel, monkeypatch, causal, window):
    given, module = heads(own=5), nn.Module()
    found = attend(module, given, is_causal=causal, sliding_window=window)
    assert len(kernel) == 1
    monkeypatch.setattr(torch_flash, "takes", lambda *given: False)
    plain = attend(module, given, is_causal=causal, sliding_window=window)
    assert len(kernel) == 1
    assert found.shape == plain.shape == (1, 6, 2, 5)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-6)
    query, key, value = (x[0, :, 2:] for x in given)  # the second row
    apart = torch.arange(4)[:, None] - torch.arange(4)
    seen = apart.abs() < (window or 4)
    seen &= apart >= 0 if causal else True
    scores = (query @ key.mT / 8**0.5).masked_fill(~seen, -torch.inf)
    torch.testing.assert_close(found[0, 2:], (scores.softmax(-1) @ value).transpose(0, 1), rtol=0, atol=1e-6)


def test_what_it_does_not_compute_is_refused_or_left_to_sdpa(kernel):
    module, given = nn.Module(), heads()
    chosen = {"indices": torch.zeros(1, 6, 2), "block_indices": torch.zeros(1, 6, 2)}  # of keys: sparse attention
    sinks = {"s_aux": torch.zeros(2), "sinks": torch.zeros(2)}
    for name, asked in ({"softcap": 3.0, "position_bias": torch.zeros(1, 2, 6, 6)} | sinks | chosen).items():
        with pytest.raises(NotImplementedError, match=name):
            attend(module, given, **{name: asked})
    with pytest.raises(NotImplementedError, match="a mask"):
        attend(module, given, torch.ones(1, 1, 6, 6, dtype=torch.bool))
    with pytest.raises(NotImplementedError, match="several at once"):
        attend(module, [x.expand(2, -1, -1, -1) for x in given])
    with torch_flash.in_one_row(), pytest.raises(NotImplementedError, match="where the rows end"):
        torch_flash.varlen(module, *given, None)
    assert kernel == []
    torch.manual_seed(0)
    found = attend(module, given, dropout=0.5)
    assert kernel == [], "the kernel drops nothing"
    assert (found == 0).all(-1).any(), "a first token sees itself alone, half the time"


def test_a_mask_that_is_no_window_is_refused(kernel):
    with torch_flash.in_one_row(), pytest.raises(NotImplementedError, match="neither causal"):
        torch_flash._mask(config=SimpleNamespace(attention_chunk_size=8), use_vmap=False)
    with torch_flash.in_one_row(), pytest.raises(NotImplementedError, match="neither causal"):
        torch_flash._mask(config=SimpleNamespace(), use_vmap=True)
    model = new_model("llama4_text")
    assert packing.attention_of(model) == "sdpa"
    packing.set_attention(model, packing.VARLEN)
    assert not packing.choose(model, "on")


@torch.no_grad()
def test_a_model_that_has_it_decodes_and_takes_padding_as_before(kernel):
    model = new_model("mistral")
    ids, mask = torch.randint(5, 100, (2, 9)), torch.tensor([[0] * 5 + [1] * 4, [1] * 9])
    outputs = []
    for attention in ("sdpa", packing.VARLEN):
        packing.set_attention(model, attention)
        drawn = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
        outputs.append((drawn, model(ids, attention_mask=mask).logits, model(ids).logits))
    assert all(torch.equal(x, y) for x, y in zip(*outputs, strict=True))
    assert kernel == []


def test_gradient_checkpointing(kernel):
    """The layers are computed again where nothing says any more that a long row is computed."""
    model = new_model("mistral", dropout=0.0).train()
    expected = states_and_gradients(model, packs=False)
    packing.set_attention(model, packing.VARLEN)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_alike(states_and_gradients(model, packs=True), expected)
    assert len(kernel) == 4, "two layers, twice"


def test_under_autocast_it_computes_in_half_precision(kernel):
    """Qwen3's norms of queries and keys leave these in float32."""
    model = new_model("qwen3")
    packing.set_attention(model, packing.VARLEN)
    with torch.autocast("cpu", torch.bfloat16):
        states_and_gradients(model, packs=True)
    assert {call["dtype"] for call in kernel} == {torch.bfloat16}


@pytest.mark.slow
def test_it_is_compiled_in_one_piece(monkeypatch):
    def attend(query: torch.Tensor, *given: Any, **settings: Any) -> torch.Tensor:
        return query * 2

    def attention(*heads: torch.Tensor, longest: int) -> torch.Tensor:
        given = {"cu_seq_lens_q": ends, "max_length_q": longest, "sliding_window": 3}
        return torch_flash.varlen(module, *heads, None, **given)[0]

    monkeypatch.setattr(torchs, "varlen_attn", attend)
    monkeypatch.setattr(torch_flash, "takes", lambda query, dtype, width: True)
    module, ends = nn.Module(), torch.tensor([0, 2, 6], dtype=torch.int32)
    given = heads()
    compiled = torch.compile(attention, backend="eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(*given, longest=4), given[0].transpose(1, 2) * 2)


# -- which attention a model is given ------------------------------------------------------------------------


def test_it_is_chosen_where_the_package_is_missing(gpu, monkeypatch):
    chosen = {}
    for package in (False, True):
        monkeypatch.setattr(packing, "is_flash_attn_2_available", lambda package=package: package)
        for dtype in (torch.bfloat16, torch.float32):
            model = without_the_package(new_model("llama"))
            packing.use_flash(model, dtype, CUDA)
            chosen[package, dtype] = packing.attention_of(model)
    half, whole = torch.bfloat16, torch.float32
    assert chosen == {
        (False, half): packing.VARLEN, (True, half): packing.FLASH, (False, whole): "sdpa", (True, whole): "sdpa",
    }  # fmt: skip
    monkeypatch.setattr(torch_flash, "works", lambda *given: False)
    monkeypatch.setattr(packing, "is_flash_attn_2_available", lambda: False)
    model = new_model("llama")
    packing.use_flash(model, half, CUDA)
    packing.use_flash(model, half)  # where it is: on the CPU
    assert packing.attention_of(model) == "sdpa"


def test_it_is_flash_attention_with_rows_of_any_number(gpu):
    model = new_model("llama")
    packing.set_attention(model, packing.VARLEN)
    assert packing.is_flash(model)
    assert packing.most_tokens(model) > 10**9
    with packing.decoding(model):
        assert packing.attention_of(model) == "sdpa"
    assert packing.attention_of(model) == packing.VARLEN


def without_the_package(model: Any) -> Any:
    """A model that can be given the package's attention, which does not run here."""
    plain = model.set_attn_implementation

    def given(name: str) -> None:
        if name == packing.FLASH:
            model.config._attn_implementation = name
        else:
            plain(name)

    model.set_attn_implementation = given
    return model


@pytest.mark.parametrize("package", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_still_on_the_cpu_is_asked_for_its_gpu(gpu, monkeypatch, dtype, package):
    """Under FSDP2 SFT's and the reward model's are."""
    monkeypatch.setattr(packing, "is_flash_attn_2_available", lambda: package)
    expected = "sdpa" if dtype == torch.float32 else packing.FLASH if package else packing.VARLEN
    model = without_the_package(new_model("llama"))
    assert packing.prepare(model, "auto", dtype, CUDA) == (dtype == torch.bfloat16)
    assert packing.attention_of(model) == expected
    scalar = without_the_package(new_scalar_model(new_model("llama"), seed=0))
    assert packs_rows(scalar, "auto", dtype, CUDA) == (dtype == torch.bfloat16)
    assert packing.attention_of(scalar) == expected
    assert not packing.prepare(new_model("llama"), "auto", dtype), "here it stays"
    assert not packing.prepare(new_model("llama"), "off", dtype, CUDA)


@pytest.mark.parametrize("package", [False, True])
def test_a_model_still_on_the_cpu_that_cannot_be_packed(gpu, monkeypatch, package):
    monkeypatch.setattr(packing, "is_flash_attn_2_available", lambda: package)
    for name in ("stablelm", "lfm2"):
        model = without_the_package(new_model(name))
        assert not packing.prepare(model, "auto", torch.bfloat16, CUDA), name
        assert packing.attention_of(model) == (packing.FLASH if package else "sdpa"), "padded, as without it"
    monkeypatch.setattr(torch_flash, "works", lambda device, dtype, width=64: width == 64)
    model = without_the_package(new_model("llama"))
    assert packing.prepare(model, "auto", torch.bfloat16, CUDA) == package, "heads of 8, for torch's kernel"


def test_ppos_models_keep_sdpa_where_one_of_them_cannot_be_packed(gpu, monkeypatch, tiny_model):
    monkeypatch.setattr(packing, "is_flash_attn_2_available", lambda: False)
    models, args = build.build_actor_critic(tiny_model), PPOConfig()
    for able in (True, False):
        monkeypatch.setattr(packing, "can_pack", lambda model, able=able: able or model is not models.value)
        build.prepare(models, args, torch.bfloat16, CUDA)
        expected = [packing.VARLEN if able else "sdpa"] * 3
        assert models.packs == able
        assert [packing.attention_of(part) for part in models.parts()] == expected
        monkeypatch.setattr(packing, "use_flash", lambda model, *given: packing.set_attention(model, packing.VARLEN))
        with build.flash(models, args):
            assert [packing.attention_of(part) for part in models.parts()] == expected
        assert {packing.attention_of(part) for part in models.parts()} == {"sdpa"}
    monkeypatch.setattr("rlhf.models.head_outputs.hands_rows_on", lambda model: False)
    scalar = new_scalar_model(new_model("llama"), seed=0)
    monkeypatch.setattr(packing, "can_pack", lambda model: True)
    assert not packs_rows(scalar, "auto", torch.bfloat16, CUDA)
    assert packing.attention_of(scalar) == "sdpa"


# -- is the kernel there, and does it work -------------------------------------------------------------------


def test_the_trial_sees_what_is_wrong():
    def ignores_windows(*args: Any, **kwargs: Any) -> torch.Tensor:
        return flash.varlen_attn(*args, **kwargs | {"window_size": (-1, 0)})

    def sees_later(*args: Any, **kwargs: Any) -> torch.Tensor:
        return flash.varlen_attn(*args, **kwargs | {"window_size": (-1, -1)})

    def one_row(*args: Any, **kwargs: Any) -> torch.Tensor:
        ends = torch.tensor([0, 39], dtype=torch.int32)
        return flash.varlen_attn(*args[:3], ends, ends, 39, 39, **kwargs)

    def no_gradient(*args: Any, **kwargs: Any) -> torch.Tensor:
        return flash.varlen_attn(*args[:2], args[2].detach() + 0 * args[2], *args[3:], **kwargs)

    def passes(attend: Any) -> list[bool]:
        given = attend, torch.device("cpu"), torch.bfloat16, 16
        return [torch_flash._alike(*given, window) for window in (None, 4)]

    assert passes(flash.varlen_attn) == [True, True]
    assert passes(ignores_windows) == [True, False]
    for wrong in (sees_later, one_row, no_gradient):
        assert passes(wrong) == [False, False]


def test_where_the_kernel_works(monkeypatch):
    tried = []
    monkeypatch.setattr(torch_flash, "_alike", lambda *given: tried.append(given) or len(tried) < 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch_flash, "kernel", lambda: flash.varlen_attn)
    asked = torch_flash.works.__wrapped__
    assert asked(CUDA, torch.bfloat16)
    assert [given[-1] for given in tried] == [None, 4]
    assert not asked(CUDA, torch.bfloat16), "its second answer is wrong"
    tried.clear()
    assert not asked(CUDA, torch.bfloat16, 264)
    assert not asked(torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not asked(CUDA, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch_flash, "kernel", lambda: None)
    assert not asked(CUDA, torch.bfloat16)
    assert tried == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not asked(CUDA, torch.bfloat16)

    def broken(*given: Any) -> bool:
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch_flash, "kernel", lambda: flash.varlen_attn)
    monkeypatch.setattr(torch_flash, "_alike", broken)
    assert not asked(CUDA, torch.bfloat16)


def test_a_torch_without_it(monkeypatch):
    find = torch_flash.kernel.__wrapped__
    monkeypatch.setattr(torchs, "varlen_attn", flash.varlen_attn)
    assert find() is flash.varlen_attn
    older = lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False: query  # noqa: E731
    monkeypatch.setattr(torchs, "varlen_attn", older)  # torch 2.10's
    assert find() is None
    monkeypatch.delattr(torchs, "varlen_attn")
    assert find() is None


def test_a_heads_width_that_a_gpu_refuses(gpu):
    query = torch.empty(1, 2, 3, 4, device="meta")
    fake = SimpleNamespace(device=CUDA)
    assert not torch_flash.takes(query, torch.bfloat16, 64)
    assert torch_flash.takes(fake, torch.bfloat16, 256)
    assert not torch_flash.takes(fake, torch.float32, 256)
    with pytest.raises(NotImplementedError, match="heads of 257 by cuda's flash attention"):
        torch_flash.takes(fake, torch.bfloat16, 257)
    with torch_flash.before_moving(CUDA), pytest.raises(NotImplementedError, match="heads of 300"):
        torch_flash.takes(torch.empty(1), torch.bfloat16, 300)
    with torch_flash.before_moving(CUDA):
        assert not torch_flash.takes(torch.empty(1), torch.bfloat16, 64), "computed here, and asked for there"


# -- on a GPU ------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
@pytest.mark.skipif(torch_flash.kernel() is None, reason="torch has no varlen_attn before 2.11")
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gpt2"])
def test_the_kernel_itself(name, monkeypatch):
    """In bfloat16, packed against padded by SDPA: numbers and gradients; `auto` chooses it without flash-attn."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("flash attention needs compute capability 8.0")
    calls, attend = [], torchs.varlen_attn
    monkeypatch.setattr(packing, "is_flash_attn_2_available", lambda: False)
    assert torch_flash.works(CUDA, torch.bfloat16)
    model = new_model(name).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        expected = states_and_gradients(model, packs=False)
    assert packing.prepare(model, "auto", torch.bfloat16)
    assert packing.attention_of(model) == packing.VARLEN
    monkeypatch.setattr(torchs, "varlen_attn", lambda *args, **kwargs: calls.append(0) or attend(*args, **kwargs))
    with torch.autocast("cuda", torch.bfloat16):
        assert_alike(states_and_gradients(model, packs=True), expected, 0.05)
        assert len(calls) == 2, "one a layer"
        assert_alike(states_and_gradients(model, packs=False), expected, 0.05)
    assert len(calls) == 2
