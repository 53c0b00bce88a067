"""Loading, saving and copying the four models; the scalar head and its normaliser."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from peft import PeftModel
from reference.tiny_chain import NORMALIZER, chain, save_base
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rlhf.errors import InputError
from rlhf.models import loading as models
from rlhf.models.adapters import backbone, lora_config
from rlhf.models.scalar import ScoreNormalizer, last_token_scores, load_scalar_model, new_scalar_model
from rlhf.padding import position_ids

ROWS = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16]]


def rectangle(rows, side: str, pad: int):
    width = max(map(len, rows))
    fill = [[pad] * (width - len(r)) for r in rows]
    ids = [f + r if side == "left" else r + f for r, f in zip(rows, fill, strict=True)]
    mask = [
        [0] * len(f) + [1] * len(r) if side == "left" else [1] * len(r) + [0] * len(f)
        for r, f in zip(rows, fill, strict=True)
    ]
    return torch.tensor(ids), torch.tensor(mask)


def test_normaliser_by_hand_and_on_disk(tmp_path):
    normalizer = ScoreNormalizer(mean=2.0, std=4.0, count=7)
    assert normalizer(torch.tensor([2.0, 6.0, 0.0])).tolist() == [0.0, 1.0, -0.5]
    normalizer.save(tmp_path)
    assert ScoreNormalizer.load(tmp_path) == normalizer
    assert ScoreNormalizer.load(tmp_path / "nothing") == ScoreNormalizer(0.0, 1.0, 0)
    for wrong in ({"std": 0.0}, {"std": math.nan}, {"mean": math.inf}):
        with pytest.raises(InputError, match="finite, std positive"):
            ScoreNormalizer(**wrong)


def test_head_is_drawn_as_stiennon_et_al(tiny_model):
    scalar = new_scalar_model(tiny_model, seed=3)
    again = new_scalar_model(tiny_model, seed=3)
    other = new_scalar_model(tiny_model, seed=4)
    assert torch.equal(scalar.score.weight, again.score.weight)
    assert not torch.equal(scalar.score.weight, other.score.weight)
    many = torch.cat([new_scalar_model(tiny_model, seed=s).score.weight.flatten() for s in range(20)]).detach()
    np.testing.assert_allclose([many.mean(), many.std()], [0.0, 1 / math.sqrt(33)], atol=0.03)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(backbone(scalar)(ids).last_hidden_state, backbone(tiny_model)(ids).last_hidden_state)
    assert backbone(scalar) is not backbone(tiny_model)


@pytest.mark.parametrize("pad", [3, 8, 16])
def test_scores_are_read_at_the_last_real_token_whatever_the_padding(tiny_model, pad):
    """8 and 16 are last tokens of rows: pad may equal eos."""
    scalar = new_scalar_model(tiny_model, seed=0).eval()
    with torch.no_grad():
        expected = [scalar.score(backbone(scalar)(torch.tensor([row])).last_hidden_state[0, -1]).item() for row in ROWS]
        for side in ("left", "right"):
            scores = last_token_scores(scalar, *rectangle(ROWS, side, pad))
            np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)


def test_position_ids_count_real_tokens():
    assert position_ids(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])).tolist() == [[0, 0, 0, 1], [0, 1, 2, 2]]


@pytest.mark.parametrize("lora", [False, True])
def test_a_reward_model_survives_its_folder(tmp_path, tiny_model, tiny_tokenizer, lora):
    policy, folder = chain(tmp_path, tiny_model, tiny_tokenizer, lora)
    scalar, normalizer = load_scalar_model(folder)
    assert normalizer == NORMALIZER
    assert isinstance(scalar, PeftModel) == lora
    assert not scalar.training
    # Independent: the backbone's hidden state under the head that lies on the disk.
    from safetensors.torch import load_file

    file = folder / ("adapter_model.safetensors" if lora else "model.safetensors")
    head = next(tensor for name, tensor in load_file(file).items() if name.endswith("score.weight"))
    with torch.no_grad():
        scores = last_token_scores(scalar, *rectangle(ROWS, "right", 3))
        hidden = backbone(scalar)(torch.tensor([ROWS[0]])).last_hidden_state[0, -1]
    np.testing.assert_allclose(scores[0], (head[0] @ hidden), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match=r"no reward model|not a reward model"):
        load_scalar_model(policy)


def test_load_policy_continues_an_adapter_and_checks_its_rank(tmp_path, tiny_model, tiny_tokenizer):
    sft, _ = chain(tmp_path, tiny_model, tiny_tokenizer, lora=True)
    policy = models.load_policy(str(sft))
    assert {name.split(".")[-2] for name, p in policy.named_parameters() if p.requires_grad} == {"default"}
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(sft)).eval()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(policy.eval()(ids).logits, plain(ids).logits)
    with pytest.raises(InputError, match="lora_rank=8, but the model is already an adapter of rank 4"):
        models.load_policy(str(sft), lora=lora_config(8, 16.0))
    assert lora_config(0, 16.0) is None


def test_dropout_is_off_in_train_mode(tmp_path, tiny_model, tiny_tokenizer):
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    )
    llama = LlamaForCausalLM(LlamaConfig(**{**tiny_model.config.to_dict(), "attention_dropout": 0.5}))
    adapter = models.load_policy(chain(tmp_path, tiny_model, tiny_tokenizer, lora=True)[0])
    ids = torch.tensor([[5, 6, 7, 8]])
    for model in (gpt2, llama, adapter):
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)
        models.disable_dropout(model)
        assert model.training
        assert torch.equal(model(ids).logits, model(ids).logits)


def test_a_clone_shares_nothing_even_where_a_trainer_replaced_forward(tiny_model):
    ids = torch.tensor([[5, 6, 7]])
    before = tiny_model(ids).logits.detach().clone()
    original = tiny_model.forward
    tiny_model.forward = lambda *args, **kwargs: original(*args, **kwargs)
    twin = models.clone(tiny_model)
    with torch.no_grad():
        for parameter in tiny_model.parameters():
            parameter.zero_()
    assert torch.equal(twin(ids).logits, before)


def test_a_clone_keeps_every_tensors_own_precision(tiny_model):
    """Rotary frequencies are float32 beside weights in bfloat16: rounded, they would turn a copy's positions."""
    for parameter in tiny_model.parameters():
        parameter.data = parameter.data.bfloat16()
    tiny_model.lm_head.weight = tiny_model.get_input_embeddings().weight
    tiny_model.config.tie_word_embeddings = True
    twin = models.clone(tiny_model)
    for one, other in ((tiny_model.named_parameters(), twin.named_parameters()),
                       (tiny_model.named_buffers(), twin.named_buffers())):  # fmt: skip
        theirs = dict(other)
        for name, tensor in one:
            assert tensor.dtype == theirs[name].dtype, name
            assert torch.equal(tensor, theirs[name]), name
            assert tensor.data_ptr() != theirs[name].data_ptr(), name
    assert twin.model.rotary_emb.inv_freq.dtype == torch.float32
    assert twin.lm_head.weight is twin.get_input_embeddings().weight


def test_folders_that_hold_no_model(tmp_path, tiny_model, tiny_tokenizer):
    with pytest.raises(InputError, match="no such model folder"):
        models.load_policy(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no config\.json and no adapter_config\.json"):
        models.load_policy(tmp_path / "empty")
    base = save_base(tmp_path, tiny_model, copy.deepcopy(tiny_tokenizer))
    for file in base.glob("*token*"):
        file.unlink()
    (base / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(InputError, match="model folder without a tokenizer"):
        models.load_tokenizer(base)
    with pytest.raises(InputError, match="PeftModel object"):
        new_scalar_model(models.load_policy(base, lora=lora_config(2, 4.0)), seed=0)


@pytest.mark.parametrize(
    ("own", "count", "expected"), [(None, 4, "cuda"), ("2", 4, "cuda:2"), ("3", 1, "cuda:0"), ("1", 0, "cpu")]
)
def test_each_process_of_a_machine_takes_a_device_of_its_own(monkeypatch, own, count, expected):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if own is not None:
        monkeypatch.setenv("LOCAL_RANK", own)
    assert str(models.default_device()) == expected
