"""What the value model stands on: a model of its own, an adapter on the policy's backbone, or the policy's trunk."""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from reference.batches import PROMPTS, RESPONSES, batch_of
from reference.ppo_runs import is_value, make, prepared, watch_steps, weights
from reference.prepared import prepared_models
from reference.tiny_chain import NORMALIZER, chain, shake
from transformers import AutoModelForCausalLM

from reward_models import ProcessModel, RewardModel
from reward_models.process import About
from rlhf import chat
from rlhf.errors import InputError
from rlhf.models.adapters import backbone, lora_config
from rlhf.models.scalar import last_token_scores, load_scalar_model, new_scalar_model
from rlhf.ppo.trainer import PPOConfig

BOTH = pytest.mark.parametrize("folders", ["full", "lora"], indirect=True)


@pytest.fixture
def folders(request, tmp_path, tiny_model, tiny_tokenizer):
    return chain(tmp_path, tiny_model, tiny_tokenizer, request.param == "lora")


def shared(folders) -> Any:
    """A shared trunk whose head is no longer zero."""
    models = prepared_models(folders[0], value_kind="shared_trunk")
    shake(models.value_head, 3, 0.3)
    return models


# -- a shared trunk ----------------------------------------------------------------------------------------


@BOTH
def test_a_shared_trunk_starts_at_zero_beside_a_reward_model(tmp_path, folders):
    """Whose head is not the value model's start here: hidden states of the policy are not the reward model's."""
    trainer = make(tmp_path, folders[0], RewardModel.load(folders[1]), value_kind="shared_trunk")
    models = trainer.actor_critic
    assert trainer.collect(trainer.next_prompts()).values.abs().max() == 0
    assert models.value is None
    assert [name for name, p in models.named_parameters() if p.requires_grad and is_value(name)] == [
        "value_head.weight", "value_head.bias",
    ]  # fmt: skip
    if isinstance(models.policy, PeftModel):
        assert sorted(models.policy.peft_config) == ["default", "reference"]


@BOTH
def test_one_forward_gives_both_and_each_alone_gives_the_same(folders):
    models, calls = shared(folders), []
    backbone(models.policy).register_forward_hook(lambda *_: calls.append(getattr(models.policy, "active_adapter", "")))
    own = "default" if isinstance(models.policy, PeftModel) else ""
    joint = models(batch_of(), 0.7, ("policy", "value"))
    assert calls == [own]
    turned = models(batch_of(), 0.7, ("value", "policy"))
    assert calls == [own] * 2
    alone = models(batch_of(), 0.7, ("value",)), models(batch_of(), 0.7, ("policy",))
    assert calls == [own] * 4
    assert torch.equal(turned.values, joint.values)
    assert torch.equal(alone[0].values, joint.values)
    assert torch.equal(alone[1].logprobs, joint.logprobs)
    assert alone[0].logprobs.numel() == alone[1].values.numel() == 0
    assert (joint.values[~batch_of().mask] == 0).all()
    assert joint.values.std() > 0.1


@BOTH
def test_values_are_the_head_on_the_policys_own_hidden_states(folders):
    """Independent: each row alone through the folder as plain transformers and peft load it."""
    models = shared(folders)
    values = models(batch_of(), 1.0, ("value",)).values.detach()
    plain = AutoModelForCausalLM.from_pretrained(folders[0]).eval()
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        with torch.no_grad():
            hidden = plain(torch.tensor([prompt + response]), output_hidden_states=True).hidden_states[-1][0]
        before = hidden[len(prompt) - 1 : -1].double().numpy()
        expected = before @ models.value_head.weight[0].detach().numpy() + float(models.value_head.bias.detach())
        np.testing.assert_allclose(values[i, : len(response)], expected, atol=1e-5)


@BOTH
@pytest.mark.parametrize("coef", [0.0, 0.1, 2.5])
def test_the_value_losss_share_of_the_trunks_gradient(tmp_path, folders, coef):
    """Independent: two backward passes, the value loss's times the coefficient."""
    settings = {"inner_epochs": 2, "minibatch_size": 12, "max_grad_norm": 1e9, "value_kind": "shared_trunk"}
    trainer = make(tmp_path, folders[0], value_loss_coef=coef, **settings)
    shake(trainer.actor_critic.value_head, 3, 0.3)
    rollout, seen = prepared(trainer), watch_steps(trainer)
    trainer.update(rollout)
    models, parts = shared(folders), []
    tokens = sum(map(len, rollout.response_ids))
    for part in ("policy", "value"):
        models.zero_grad()
        outputs = models(rollout.batch(range(12), 3, "cpu"), 1.0, (part,))
        if part == "policy":
            (-(rollout.advantages * outputs.logprobs).sum() / tokens).backward()
        else:
            (0.5 * (outputs.values - rollout.returns).square().sum() / tokens).backward()
        parts.append({name: p.grad.clone() for name, p in models.named_parameters() if p.grad is not None})
    trunk = [name for name in parts[0] if name in parts[1] and float(parts[1][name].abs().max()) > 1e-6]
    assert len(trunk) > 4, "the value loss should reach the trunk"
    for name, gradient in seen[0].items():
        expected = parts[0].get(name, 0.0) + coef * parts[1].get(name, torch.zeros(()))
        allowed = 2e-5 * max(float(parts[i][name].abs().max()) for i in (0, 1) if name in parts[i])
        np.testing.assert_allclose(gradient, expected.expand(gradient.shape), rtol=0, atol=allowed, err_msg=name)


def test_elsewhere_the_coefficient_has_nothing_to_weigh(tmp_path, tiny_model, tiny_tokenizer):
    folder, seen = chain(tmp_path, tiny_model, tiny_tokenizer, lora=False), []
    for coef in (0.1, 5.0):
        trainer = make(tmp_path, folder[0], value_loss_coef=coef, value_kind="separate")
        seen.append(watch_steps(trainer))
        trainer.update(prepared(trainer))
    assert all(torch.equal(seen[0][0][name], seen[1][0][name]) for name in seen[0][0])


@BOTH
def test_warming_up_moves_the_head_alone(tmp_path, folders):
    """And kl_coef stays: the KL that it would follow is that of a policy that cannot move."""
    settings = {"value_warmup_updates": 1, "weight_decay": 0.1, "kl_target_nats": 5.0, "kl_horizon": 100}
    trainer = make(tmp_path, folders[0], value_kind="shared_trunk", **settings)
    start = weights(trainer)
    trainer.update(prepared(trainer))
    warm = weights(trainer)
    assert trainer.kl_coef == trainer.args.kl_coef
    assert [name for name in start if not torch.equal(start[name], warm[name])] == [
        "value_head.weight",
        "value_head.bias",
    ]
    trainer.update(prepared(trainer))
    assert not any(torch.equal(warm[name], tensor) for name, tensor in weights(trainer).items())
    assert trainer.kl_coef < trainer.args.kl_coef


@pytest.mark.slow
@BOTH
def test_it_learns_values(tmp_path, folders):
    trainer = make(
        tmp_path, folders[0], updates=12, value_kind="shared_trunk", value_loss_coef=1.0, learning_rate=5e-3,
        value_learning_rate=5e-2, missing_eos="off", clip_value=float("inf"), lr_schedule="constant",
        value_warmup_updates=12,
    )  # fmt: skip
    losses = [trainer.update(prepared(trainer))["value_loss"] for _ in range(12)]
    assert np.mean(losses[-3:]) < 0.5 * losses[0]


# -- what is saved -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folders", "kind"),
    [("full", "shared_trunk"), ("lora", "shared_trunk"), ("lora", "separate")],
    indirect=["folders"],
)
def test_the_saved_policy_loads_in_plain_transformers_and_peft(tmp_path, folders, kind):
    trainer = make(tmp_path, folders[0], RewardModel.load(folders[1]), value_kind=kind, learning_rate=1e-2)
    trainer.train()
    trainer.save_model(tmp_path / "ppo")
    models = trainer.actor_critic
    expected = models(batch_of(), 1.0, ("policy",)).logprobs.detach()
    if isinstance(models.policy, PeftModel):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        loaded: Any = PeftModel.from_pretrained(base, str(tmp_path / "ppo")).eval()
        assert list(loaded.peft_config) == ["default"]
    else:
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ppo", output_loading_info=True)
        assert not info["unexpected_keys"]
        assert not info["missing_keys"]
    moved = 0.0
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        with torch.no_grad():
            logprobs = loaded(torch.tensor([prompt + response])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        np.testing.assert_allclose(logprobs[range(len(response)), response], expected[i, : len(response)], atol=1e-5)
    with torch.no_grad():
        moved = float((models(batch_of(), 1.0, ("reference",)).reference_logprobs - expected).abs().max())
    assert moved > 1e-3


# -- a model of its own beside an adapter ------------------------------------------------------------------


@pytest.mark.parametrize("folders", ["lora"], indirect=True)
def test_a_model_of_its_own_under_lora_starts_with_normalised_scores(tmp_path, folders):
    """Independent: the reward model as it is loaded for scoring, one growing prefix of a response at a time."""
    trainer = make(tmp_path, folders[0], RewardModel.load(folders[1]), value_kind="separate")
    models = trainer.actor_critic
    scalar, normalizer = load_scalar_model(folders[1])
    assert normalizer == NORMALIZER
    values = models(batch_of(), 1.0, ("value",)).values.detach()
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        for t in range(len(response)):
            ids = torch.tensor([prompt + response[:t]])
            with torch.no_grad():
                raw = float(last_token_scores(scalar, ids, torch.ones_like(ids)))
            assert float(values[i, t]) == pytest.approx((raw - NORMALIZER.mean) / NORMALIZER.std, abs=1e-5)
    assert values.std() > 0.01
    assert not isinstance(models.value, PeftModel), "its adapter is merged: all of its weights are trained"
    assert sorted(models.policy.peft_config) == ["default", "reference"]
    trained = {name for name, p in models.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"policy", "value", "value_head"}
    assert all("lora_" in name for name in trained if name.startswith("policy."))
    base = {name: p.detach().clone() for name, p in models.policy.named_parameters() if "lora_" not in name}
    start = weights(trainer)
    trainer.update(prepared(trainer))
    assert not any(torch.equal(start[name], tensor) for name, tensor in weights(trainer).items())
    assert all(torch.equal(p, base[name]) for name, p in models.policy.named_parameters() if name in base)


@pytest.mark.parametrize("folders", ["lora"], indirect=True)
def test_without_a_reward_model_it_is_the_policy_merged_under_a_zero_head(folders):
    models = prepared_models(folders[0], value_kind="separate")
    assert not any("lora_" in name for name, _ in models.value.named_parameters())
    shake(models.value_head, 3, 0.3)
    seen, expected = (m(batch_of(), 1.0, ("value",)).values.detach() for m in (models, shared(folders)))
    np.testing.assert_allclose(seen, expected, atol=1e-5)
    assert expected.std() > 0.1


@pytest.mark.parametrize("folders", ["full"], indirect=True)
@pytest.mark.parametrize("given", ["folder", "object"])
def test_beside_a_full_reward_model_it_is_one_of_its_own_and_not_rounded(tmp_path, folders, caplog, given):
    """Policy and scoring in bfloat16: what is trained in full starts as it lies in the folder."""
    source: Any = str(folders[1]) if given == "folder" else RewardModel.load(folders[1], dtype=torch.bfloat16)
    with caplog.at_level(logging.INFO, "rlhf"):
        models = prepared_models(folders[0], value_model=source, lora=lora_config(2, 4.0), dtype=torch.bfloat16)
    told = [line for line in caplog.messages if line.startswith("value model: a model of its own, trained in full")]
    assert len(told) == 1
    scalar, normalizer = load_scalar_model(folders[1])
    assert any(not torch.equal(p, p.bfloat16().float()) for p in scalar.model.parameters())
    for name, parameter in models.value.model.named_parameters():
        assert torch.equal(parameter, scalar.model.get_parameter(name)), name
    assert torch.equal(models.value_head.weight, scalar.score.weight / normalizer.std)
    with pytest.raises(InputError) as error:
        prepared_models(folders[0], value_model=source, lora=lora_config(2, 4.0), value_kind="adapter")
    one_line(error, "value_model=adapter needs a LoRA reward model", "set separate", "lora_rank")


def test_beside_an_adapter_over_another_base_it_is_one_of_its_own(tmp_path, tiny_model, tiny_tokenizer, caplog):
    policy, _ = chain(tmp_path, tiny_model, tiny_tokenizer, lora=True)
    (tmp_path / "other").mkdir()
    shake(tiny_model, 7)
    _, reward = chain(tmp_path / "other", tiny_model, tiny_tokenizer, lora=True)
    with caplog.at_level(logging.INFO, "rlhf"):
        for source in (str(reward), RewardModel.load(reward, dtype=torch.bfloat16)):
            models = prepared_models(policy, value_model=source, dtype=torch.bfloat16)
            plain = load_scalar_model(reward)[0].merge_and_unload()
            for name, parameter in models.value.model.named_parameters():
                assert torch.equal(parameter, plain.model.get_parameter(name)), name
    assert len([line for line in caplog.messages if "trained in full: the reward model is no adapter" in line]) == 2
    with pytest.raises(InputError) as error:
        prepared_models(policy, value_model=str(reward), value_kind="adapter")
    one_line(error, "value_model=adapter needs a LoRA reward model over the policy's own base", "set separate")


@pytest.mark.parametrize("kind", ["separate", "shared_trunk"])
def test_a_policy_of_more_embeddings_than_its_reward_models_tokenizer_has(tmp_path, tiny_model, tiny_tokenizer, kind):
    """As Qwen's larger models have, of one tokenizer; a random one samples such tokens."""
    chat.prepare_tokenizer(tiny_tokenizer)
    scalar, narrow, rows = new_scalar_model(tiny_model, seed=0), copy.deepcopy(tiny_model), len(tiny_tokenizer)
    tiny_model.resize_token_embeddings(rows + 100)
    functions = [RewardModel(scalar, tiny_tokenizer), ProcessModel(scalar, tiny_tokenizer, About())]
    trainer = make(tmp_path, tiny_model, functions, tokenizer=tiny_tokenizer, value_kind=kind)
    for _ in range(2):
        rollout = prepared(trainer)
        assert max(map(max, rollout.response_ids)) >= rows
        trainer.update(rollout)
    if kind == "separate":
        assert torch.equal(make(tmp_path, tiny_model, functions, tokenizer=tiny_tokenizer).actor_critic.value.model
                           .embed_tokens.weight[:rows], scalar.model.embed_tokens.weight)  # fmt: skip
    with pytest.raises(InputError) as error:
        make(tmp_path, tiny_model, functions, tokenizer=tiny_tokenizer, ref_model=narrow)
    one_line(error, f"ref_model: it has embeddings for {rows} tokens, and the policy writes {rows + 100}; leave it out")


# -- what cannot be ----------------------------------------------------------------------------------------


def one_line(error: Any, *words: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    assert all(word in text for word in words), text


@BOTH
def test_combinations_that_cannot_be(tmp_path, folders):
    with pytest.raises(InputError) as error:
        make(tmp_path, folders[0], value_kind="shared_trunk", value_model=str(folders[1]))
    one_line(error, "value_model=shared_trunk", "zero head", "leave out the value model")
    if not isinstance(prepared_models(folders[0]).policy, PeftModel):
        with pytest.raises(InputError) as error:
            make(tmp_path, folders[0], value_kind="adapter")
        one_line(error, "value_model=adapter needs a LoRA policy", "lora_rank", "separate or shared_trunk")
        assert prepared_models(folders[0], value_kind="adapter", lora=lora_config(2, 4.0)).value is None


def test_a_name_that_is_none():
    with pytest.raises(InputError) as error:
        PPOConfig(value_model="shared")  # type: ignore[arg-type]
    one_line(error, "value_model='shared' must be one of separate, adapter, shared_trunk or None")
    with pytest.raises(InputError) as error:
        PPOConfig(value_loss_coef=-0.1)
    one_line(error, "value_loss_coef=-0.1 must be 0 or more")
