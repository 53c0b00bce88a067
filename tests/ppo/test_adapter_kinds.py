"""Every kind of adapter that is allowed, from its folder through reward model and PPO and back.

Independent: the folders as plain peft and transformers load them. Step 0 is the loaded policy, the values are the
reward model's normalised scores, and what is saved is what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from reference.batches import PROMPTS, RESPONSES, batch_of
from reference.ppo_runs import make
from reference.tiny_chain import NORMALIZER, TARGETS, save_reward_model, shake
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM

from reward_models import RewardModel
from rlhf import chat
from rlhf.errors import InputError
from rlhf.models.adapters import adapter_of
from rlhf.models.loading import load_policy
from rlhf.models.scalar import new_scalar_model
from rlhf.ppo.build import build_actor_critic

# peft's advice to whoever adapts tied embeddings, which is one of the kinds
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")

# settings of the SFT adapter; "tie": the base ties its embeddings; "grow": tokens that the base has no rows for
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "random": {"init_lora_weights": False},
    "all linear": {"target_modules": "all-linear"},
    "expression": {"target_modules": r".*layers\.1\..*(q_proj|up_proj)"},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.0\..*v_proj": 3}},
    "one layer": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "saved head and embeddings": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "saved norm": {"modules_to_save": ["norm"]},
    "embeddings": {"target_modules": [*TARGETS, "embed_tokens"]},
    "tied embeddings": {"target_modules": [*TARGETS, "embed_tokens"], "tie": True},
    "tokens": {"trainable_token_indices": {"embed_tokens": [5, 9], "lm_head": [5, 9]}},
    "tokens as a list": {"trainable_token_indices": [5, 9]},
    "tied tokens": {"trainable_token_indices": {"embed_tokens": [5, 9]}, "tie": True},
    "new tokens": {"trainable_token_indices": {"embed_tokens": "new", "lm_head": "new"}, "grow": 2},
    "new tied tokens": {"trainable_token_indices": {"embed_tokens": "new"}, "tie": True, "grow": 2},
    "tokens and a saved head": {"trainable_token_indices": {"embed_tokens": [5, 9]}, "modules_to_save": ["lm_head"]},
}


@pytest.fixture
def sft(request, tmp_path, tiny_model, tiny_tokenizer) -> Path:
    """An SFT adapter's folder as peft alone writes it."""
    kind = dict(KINDS[request.param])
    tiny_model.config.tie_word_embeddings = kind.pop("tie", False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(tiny_model.config)
    shake(model, 0, 0.05)
    chat.prepare_tokenizer(tiny_tokenizer)
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    if added := kind.pop("grow", 0):
        names = [f"<|new {n}|>" for n in range(added)]
        tiny_tokenizer.add_tokens(names)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(len(tiny_tokenizer))
        ids = tiny_tokenizer.convert_tokens_to_ids(names)
        kind["trainable_token_indices"] = dict.fromkeys(kind["trainable_token_indices"], ids)
    else:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lora = LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | kind))
    adapted = get_peft_model(model, lora)
    for part in ("lora_", "trainable_tokens_delta", "modules_to_save"):
        shake(adapted, 1, only=part)
    adapted.save_pretrained(tmp_path / "sft")
    tiny_tokenizer.save_pretrained(tmp_path / "sft")
    return tmp_path / "sft"


BRIEFLY = {"plain", "all linear", "saved head and embeddings", "tied embeddings", "tokens", "new tied tokens"}
EACH = pytest.mark.parametrize(
    "sft",
    [pytest.param(kind, marks=() if kind in BRIEFLY else pytest.mark.long) for kind in KINDS],
    indirect=True,
)


def plain(folder: Path) -> Any:
    """A policy's folder as transformers and peft load it, with the rows that its tokenizer needs."""
    base = AutoModelForCausalLM.from_pretrained(folder.parent / "base")
    rows = len(chat_tokenizer(folder))
    if rows > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(rows)
    return PeftModel.from_pretrained(base, str(folder)).eval()


def chat_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def expected(model: Any) -> list[np.ndarray]:
    """The log-probabilities of the responses by the model's own logits, one row at a time."""
    rows = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        logits = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        rows.append(logits[range(len(response)), response].numpy())
    return rows


def agree(logprobs: torch.Tensor, rows: list[np.ndarray], tolerance: float) -> None:
    for row, mine in zip(rows, logprobs.detach(), strict=True):
        np.testing.assert_allclose(mine[: len(row)], row, rtol=0, atol=tolerance)


@pytest.mark.slow
@EACH
def test_the_chain_starts_and_ends_with_the_folders_own_numbers(tmp_path, sft, tiny_tokenizer):
    reward = save_reward_model(tmp_path, sft, tiny_tokenizer)
    scalar = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    if len(tiny_tokenizer) > scalar.get_input_embeddings().weight.shape[0]:
        scalar.resize_token_embeddings(len(tiny_tokenizer))
    scalar = PeftModel.from_pretrained(scalar, str(reward)).eval()
    trainer = make(tmp_path, sft, RewardModel.load(reward), learning_rate=1e-2)
    models = trainer.actor_critic
    assert sorted(models.policy.peft_config) == ["default", "reference", "value"]
    start = models(batch_of(), 1.0, ("policy", "reference", "value"))
    agree(start.logprobs, expected(plain(sft)), 1e-6)
    assert torch.equal(start.logprobs, start.reference_logprobs)
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        for t in range(len(response)):
            ids = torch.tensor([prompt + response[:t]])
            with torch.no_grad():
                raw = float(scalar(ids).logits)
            value = float(start.values[i, t].detach())
            assert value == pytest.approx((raw - NORMALIZER.mean) / NORMALIZER.std, abs=1e-5)
    trainer.train()
    trainer.save_model(tmp_path / "ppo")
    end = models(batch_of(), 1.0, ("policy", "reference"))
    agree(end.logprobs, expected(plain(tmp_path / "ppo")), 1e-5)
    agree(end.reference_logprobs, expected(plain(sft)), 1e-6)
    assert float((end.logprobs - start.logprobs).detach().abs().max()) > 1e-3
    again = load_policy(tmp_path / "ppo").eval()
    for mine, theirs in zip(expected(again), expected(plain(tmp_path / "ppo")), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-6)


@EACH
@torch.no_grad()
def test_a_reward_model_takes_over_all_that_the_adapter_trained(tmp_path, sft, tiny_tokenizer):
    """Independent: the hidden states of the SFT model as plain peft loads it."""
    scalar = new_scalar_model(sft, seed=0).eval()
    ids = torch.tensor([[5, 6, 9, 7, len(tiny_tokenizer) - 1]])
    hidden = plain(sft)(ids, output_hidden_states=True).hidden_states[-1]
    mine = scalar.get_base_model().model(ids).last_hidden_state
    np.testing.assert_allclose(mine, hidden, atol=1e-6)


@pytest.mark.parametrize("sft", ["tokens", "saved head and embeddings"], indirect=True)
@pytest.mark.parametrize("start", ["policy", "reward model"])
def test_every_trained_tensor_gets_a_gradient(tmp_path, sft, tiny_tokenizer, start):
    """What DDP waits for at every step: the value model never runs the language head."""
    given = save_reward_model(tmp_path, sft, tiny_tokenizer) if start == "reward model" else None
    models = build_actor_critic(sft, value_model=given, value_kind="adapter")
    for step in range(2):  # the second after the adapters have been switched
        models.zero_grad()
        outputs = models(batch_of(), 1.0, ("policy", "value"))
        (outputs.logprobs.sum() + outputs.values.sum()).backward()
        named = [(name, p) for name, p in models.named_parameters() if p.requires_grad]
        assert len(named) > 4
        assert [name for name, p in named if p.grad is None] == [], step
    assert any(adapter_of(name) == "default" and "lm_head" in name for name, _ in named)


@pytest.mark.slow
@pytest.mark.parametrize("sft", ["tokens", "tied tokens", "new tokens", "new tied tokens"], indirect=True)
def test_a_reward_model_without_the_policys_trained_tokens(tmp_path, sft, tiny_tokenizer):
    """Its adapter over the base knows the tokens as the base does, or in embeddings of its own."""
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    if len(tiny_tokenizer) > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(len(tiny_tokenizer))
    scalar = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS"))
    shake(scalar, 4, only="lora_")
    scalar.config.pad_token_id = chat.pad_id(tiny_tokenizer)
    scalar.save_pretrained(tmp_path / "reward_model")
    tiny_tokenizer.save_pretrained(tmp_path / "reward_model")
    trainer = make(tmp_path, sft, RewardModel.load(tmp_path / "reward_model"))
    models = trainer.actor_critic
    start = models(batch_of(), 1.0, ("policy", "reference", "value"))
    agree(start.logprobs, expected(plain(sft)), 1e-6)
    new = len(tiny_tokenizer) - 1
    other = models(batch_of([[5, new, 7]], [[9, new]]), 1.0, ("value",))
    for values, ids in (
        (start.values[0, :1], [5, 6, 7]),
        (other.values[0], [5, new, 7]),
        (other.values[0, 1:], [5, new, 7, 9]),
    ):
        with torch.no_grad():
            raw = float(scalar.eval()(torch.tensor([ids])).logits)
        assert float(values[0].detach()) == pytest.approx(raw, abs=1e-5)
    trainer.train()
    trainer.save_model(tmp_path / "ppo")
    agree(models(batch_of(), 1.0, ("policy",)).logprobs, expected(plain(tmp_path / "ppo")), 1e-5)


@pytest.mark.parametrize("sft", ["plain"], indirect=True)
def test_a_reward_model_with_trained_tokens_over_a_policy_without(tmp_path, sft, tiny_tokenizer):
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS", trainable_token_indices=[5])
    scalar = get_peft_model(base, lora)
    scalar.save_pretrained(tmp_path / "reward_model")
    tiny_tokenizer.save_pretrained(tmp_path / "reward_model")
    with pytest.raises(
        InputError, match=r"trains embeddings of chat tokens and the policy's does not; set value_model"
    ):
        make(tmp_path, sft, RewardModel.load(tmp_path / "reward_model"))
    make(tmp_path, sft, RewardModel.load(tmp_path / "reward_model"), value_kind="separate")


def test_a_separate_value_model_keeps_small_updates_of_a_base_in_bfloat16(tmp_path, tiny_model, tiny_tokenizer):
    from reference.tiny_chain import chain

    sft, _ = chain(tmp_path, tiny_model, tiny_tokenizer, lora=True)
    models = build_actor_critic(sft, value_kind="separate", dtype=torch.bfloat16)
    name = "layers.0.self_attn.q_proj"
    layer = models.policy.get_base_model().get_submodule(f"model.{name}")
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    whole = layer.base_layer.weight.float() + layer.scaling["default"] * b @ a
    merged = models.value.get_submodule(f"model.{name}").weight
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged.detach(), whole.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("sft", ["plain"], indirect=True)
def test_a_small_update_is_sampled_in_bfloat16_as_it_is_trained(tmp_path, sft):
    """Added to weights of 8 bits, an update of a thousandth of them is rounded away: the responses would come from
    another policy than the one that is trained, and differ from it by 1.2e-3 nats a token here."""
    trainer = make(tmp_path / "run", sft, bf16=True, max_new_tokens=12)
    layers = [one for one in trainer.actor_critic.policy.modules() if hasattr(one, "lora_B")]
    assert layers
    for layer in layers:
        weight = layer.get_base_layer().weight
        assert weight.dtype == torch.bfloat16
        update = layer.get_delta_weight("default")
        layer.lora_B["default"].weight.data *= 1e-3 * weight.float().norm() / update.norm()
    trainer.engine.reports_logprobs = True
    rollout = trainer.collect(trainer.next_prompts())
    apart = (rollout.engine_logprobs - rollout.logprobs)[rollout.mask].abs().mean()
    assert apart < 3e-4
