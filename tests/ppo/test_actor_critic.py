"""Policy, reference and value model: step-0 facts, gradients of shared and separate backbones, what is saved."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from reference.batches import PROMPTS, RESPONSES, batch_of, left_padded
from reference.prepared import prepared_models
from reference.tiny_chain import NORMALIZER, chain, save_adapter, save_base, save_reward_model, shake
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from reward_models import RewardModel
from rlhf import chat
from rlhf.errors import InputError
from rlhf.models.adapters import lora_config
from rlhf.models.forward import response_logprobs
from rlhf.models.loading import load_policy
from rlhf.models.scalar import ScoreNormalizer, last_token_scores, load_scalar_model, new_scalar_model
from rlhf.padding import Batch, make_batch
from rlhf.ppo.build import enable_gradient_checkpointing


@pytest.fixture(params=["full", "lora"])
def folders(request, tmp_path, tiny_model, tiny_tokenizer):
    return chain(tmp_path, tiny_model, tiny_tokenizer, request.param == "lora")


@pytest.fixture
def lora_folders(tmp_path, tiny_model, tiny_tokenizer):
    return chain(tmp_path, tiny_model, tiny_tokenizer, lora=True)


def gradients(actor_critic, batch: Batch, roles=("policy", "value"), joint: bool = True) -> dict[str, torch.Tensor]:
    """Of a loss that weighs every output differently."""
    actor_critic.zero_grad()
    weights = torch.linspace(-1, 2, batch.mask.numel()).view(batch.mask.shape)
    losses = []
    for group in [roles] if joint else [(role,) for role in roles]:
        outputs = actor_critic(batch, 0.7, group)
        if "policy" in group:
            losses.append((outputs.logprobs * weights).sum())
        if "value" in group:
            losses.append((outputs.values.square() * weights).sum())
        if not joint:
            losses.pop().backward()
    if joint:
        sum(losses).backward()
    return {name: p.grad.clone() for name, p in actor_critic.named_parameters() if p.grad is not None}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert one.keys() == other.keys()
    assert one
    for name, tensor in one.items():
        scale = max(1.0, float(other[name].abs().max()))
        np.testing.assert_allclose(tensor, other[name], rtol=0, atol=tolerance * scale, err_msg=name)


# -- step 0 ------------------------------------------------------------------------------------------------


def test_the_reference_starts_as_the_policy_to_the_last_bit(folders):
    actor_critic = prepared_models(folders[0], value_model=folders[1])
    outputs = actor_critic(batch_of(), 0.7, ("policy", "reference", "value"))
    assert torch.equal(outputs.logprobs, outputs.reference_logprobs)
    with torch.no_grad():
        again = actor_critic(batch_of(), 0.7, ("value", "reference", "policy"))
    for name in ("logprobs", "reference_logprobs", "entropy", "values"):
        assert torch.equal(getattr(again, name), getattr(outputs, name))
        assert (getattr(outputs, name)[~batch_of().mask] == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_the_saved_models_own(folders, temperature):
    """Independent: each row alone through the folder as plain transformers and peft load it."""
    actor_critic = prepared_models(folders[0])
    outputs = actor_critic(batch_of(), temperature, ("policy", "reference"))
    plain = AutoModelForCausalLM.from_pretrained(folders[0]).eval()  # transformers loads the adapter, too
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        with torch.no_grad():
            logits = plain(torch.tensor([prompt + response])).logits[0].double() / temperature
        distribution = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        expected = distribution[range(len(response)), response]
        np.testing.assert_allclose(outputs.logprobs[i, : len(response)].detach(), expected, atol=1e-5)
        entropy = -(distribution.exp() * distribution).sum(-1)
        np.testing.assert_allclose(outputs.entropy[i, : len(response)], entropy, atol=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_neither_the_side_of_padding_nor_what_stands_on_it_matters(folders, packed):
    actor_critic = prepared_models(folders[0], value_model=folders[1])
    assert actor_critic.packs
    actor_critic.packs = packed
    batches = [batch_of(), left_padded(batch_of()), batch_of(pad=30), batch_of(pad=35)]
    wide = make_batch([*PROMPTS, [7] * 20], [*RESPONSES, [8] * 9], 3, "cpu")
    outputs = [actor_critic(b, 1.0, ("policy", "reference", "value")) for b in [*batches, wide]]
    for name in ("logprobs", "reference_logprobs", "entropy", "values"):
        expected = getattr(outputs[0], name).detach()
        for other in outputs[1:]:
            np.testing.assert_allclose(getattr(other, name).detach()[:3, :4], expected, atol=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_neither_does_it_with_learned_positions(packed):
    """Rotary positions forgive a shift; GPT-2's learned ones don't."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    shake(model, 0, 0.2)
    actor_critic = prepared_models(model)
    assert actor_critic.packs
    actor_critic.packs = packed
    one, other = (actor_critic(b, 1.0, ("policy",)).logprobs.detach() for b in (batch_of(), left_padded(batch_of())))
    np.testing.assert_allclose(one, other, atol=1e-5)
    alone = actor_critic(batch_of(PROMPTS[2:], RESPONSES[2:]), 1.0, ("policy",)).logprobs.detach()
    np.testing.assert_allclose(other[2:, :1], alone, atol=1e-5)


def test_values_start_as_the_reward_models_normalised_scores(folders, tiny_tokenizer):
    """A value behind a whole response is what the reward model says of it; one more token makes it readable."""
    judge = RewardModel.load(folders[1])
    for source in (folders[1], judge):
        actor_critic = prepared_models(folders[0], value_model=source)
        for text in ("Paris.", "one, two, three"):
            messages = [{"role": "user", "content": "What is the capital of France?"}]
            prompt = chat.encode_prompt(judge.tokenizer, messages)
            response = chat.encode_response(judge.tokenizer, text)
            values = actor_critic(batch_of([prompt], [[*response, 5]]), 1.0, ("value",)).values
            score = judge.score([[*messages, {"role": "assistant", "content": text}]])
            np.testing.assert_allclose(values[0, -1].detach(), score[0], atol=1e-5)
            assert abs(score[0]) > 0.01


def test_the_head_divides_by_the_normalisers_spread_and_shifts(folders):
    scalar, normalizer = load_scalar_model(folders[1])
    assert normalizer == NORMALIZER
    actor_critic = prepared_models(folders[0], value_model=folders[1])
    plain = scalar.get_base_model() if isinstance(scalar, PeftModel) else scalar
    hidden = torch.randn(4, 32)
    with torch.no_grad():
        np.testing.assert_allclose(
            actor_critic.value_head(hidden), (plain.score(hidden) - NORMALIZER.mean) / NORMALIZER.std, atol=1e-6
        )


def test_without_a_reward_model_values_start_at_zero(folders):
    actor_critic = prepared_models(folders[0])
    assert (actor_critic(batch_of(), 1.0, ("value",)).values == 0).all()
    assert gradients(actor_critic, batch_of())["value_head.weight"].shape == (1, 32)


def test_values_are_not_rounded_to_bfloat16_with_their_head(folders):
    """FSDP2 holds the head in bfloat16 with the rest. Independent: the same product in float64."""
    models = prepared_models(folders[0])
    hidden = torch.randn(2, 3, 32).bfloat16()
    batch = batch_of([[5], [6]], [[7, 8, 9], [9, 8, 7]])
    with torch.no_grad():
        models.value_head.weight.normal_()
        models.value_head.bias.fill_(5.0)
        models.value_head.bfloat16()
        values = models._values(hidden, batch)
        expected = hidden.double() @ models.value_head.weight.double()[0] + 5.0
    assert values.dtype == torch.float32
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)


# -- gradients ---------------------------------------------------------------------------------------------


def test_policy_and_value_parameters_share_nothing_and_are_all_that_is_trained(folders):
    actor_critic = prepared_models(folders[0], value_model=folders[1])
    policy, value = ({id(p) for p in ps} for ps in (actor_critic.policy_parameters(), actor_critic.value_parameters()))
    assert policy
    assert value
    assert not policy & value
    assert policy | value == {id(p) for p in actor_critic.parameters() if p.requires_grad}
    grads = gradients(actor_critic, batch_of())
    assert len(grads) == len(policy | value), "a trained parameter without a gradient would block DDP"
    lora = isinstance(actor_critic.policy, PeftModel)
    assert any(".default." in name for name in grads) == lora
    assert not any(".reference." in name for name in grads)


def test_one_joint_backward_equals_one_per_role(folders):
    actor_critic = prepared_models(folders[0], value_model=folders[1])
    batch = batch_of()
    same(gradients(actor_critic, batch), gradients(actor_critic, batch, joint=False), 1e-6)
    same(gradients(actor_critic, batch, ("value", "policy")), gradients(actor_critic, batch), 1e-6)


def test_gradient_checkpointing_changes_no_gradient(folders):
    plain = prepared_models(folders[0], value_model=folders[1])
    checkpointed = prepared_models(folders[0], value_model=folders[1])
    enable_gradient_checkpointing(checkpointed)
    assert any(getattr(m, "gradient_checkpointing", False) for m in checkpointed.modules())
    same(gradients(checkpointed, batch_of()), gradients(plain, batch_of()), 1e-6)


def test_adapters_on_one_backbone_have_the_gradients_of_separate_models(lora_folders):
    """Independent: each adapter alone on a backbone of its own, as peft loads it."""
    batch = batch_of()
    shared = gradients(prepared_models(lora_folders[0], value_model=lora_folders[1]), batch)
    weights = torch.linspace(-1, 2, batch.mask.numel()).view(batch.mask.shape)

    policy = load_policy(lora_folders[0])
    (response_logprobs(policy.eval(), batch, 0.7)[0] * weights).sum().backward()
    scalar, normalizer = load_scalar_model(lora_folders[1])
    for name, parameter in scalar.named_parameters():
        parameter.requires_grad_("lora_" in name)
    hidden = (
        scalar.get_base_model().model(batch.input_ids, attention_mask=batch.attention_mask.long()).last_hidden_state
    )
    values = normalizer(scalar.get_base_model().score(hidden).squeeze(-1)).gather(1, batch.positions())
    (torch.where(batch.mask, values, 0.0).square() * weights).sum().backward()

    alone = {f"policy.{name}": p.grad for name, p in policy.named_parameters() if p.grad is not None}
    alone |= {
        f"policy.{name}".replace(".default.", ".value."): p.grad
        for name, p in scalar.named_parameters()
        if p.grad is not None
    }
    same({name: grad for name, grad in shared.items() if not name.startswith("value_head")}, alone)


def test_training_moves_policy_and_value_and_leaves_reference_and_base(folders):
    actor_critic = prepared_models(folders[0], value_model=folders[1])
    before = actor_critic(batch_of(), 1.0, ("policy", "reference", "value"))
    state = copy.deepcopy(actor_critic.state_dict())
    optimizer = torch.optim.SGD([p for p in actor_critic.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        gradients(actor_critic, batch_of())
        optimizer.step()
    after = actor_critic(batch_of(), 1.0, ("policy", "reference", "value"))
    assert torch.equal(before.reference_logprobs, after.reference_logprobs)
    assert not torch.equal(before.logprobs, after.logprobs)
    assert not torch.equal(before.values, after.values)
    trained = {name for name, p in actor_critic.named_parameters() if p.requires_grad}
    for name, tensor in actor_critic.state_dict(keep_vars=True).items():
        if name not in trained:
            assert torch.equal(tensor, state[name]), name


def test_trained_state_comes_back_bit_for_bit(folders):
    actor_critic = prepared_models(folders[0], value_model=folders[1])
    shake(actor_critic.policy, 5, only="default" if isinstance(actor_critic.policy, PeftModel) else "")
    state = copy.deepcopy(actor_critic.trained_state())
    other = prepared_models(folders[0], value_model=folders[1])
    other.load_trained_state(state)
    one, two = (a(batch_of(), 1.0, ("policy", "reference", "value")) for a in (actor_critic, other))
    for mine, theirs in zip(one, two, strict=True):
        assert torch.equal(mine, theirs)
    state.popitem()
    with pytest.raises(InputError, match="trained tensors differ"):
        other.load_trained_state(state)


# -- what is saved -----------------------------------------------------------------------------------------


def test_the_saved_policy_is_the_trained_one_for_plain_transformers_and_peft(tmp_path, folders):
    actor_critic = prepared_models(folders[0], value_model=folders[1])
    lora = isinstance(actor_critic.policy, PeftModel)
    shake(actor_critic.policy, 5, only="default" if lora else "")
    shake(actor_critic, 6, only="value")
    expected = actor_critic(batch_of(), 1.0, ("policy",)).logprobs.detach()
    actor_critic.save_policy(tmp_path / "ppo")
    if lora:
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        loaded = PeftModel.from_pretrained(base, str(tmp_path / "ppo")).eval()
        assert list(loaded.peft_config) == ["default"]
        assert sorted(p.name for p in (tmp_path / "ppo").iterdir() if p.is_dir()) == []
    else:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ppo").eval()
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        with torch.no_grad():
            logits = loaded(torch.tensor([prompt + response])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        np.testing.assert_allclose(logits[range(len(response)), response], expected[i, : len(response)], atol=1e-5)


# -- mixed and odd cases -----------------------------------------------------------------------------------


def test_a_reference_of_its_own_may_be_an_adapter(tmp_path, lora_folders):
    """Full or LoRA policy against any saved policy: its log-probs are those of that policy alone."""
    expected = prepared_models(lora_folders[0])(batch_of(), 1.0, ("policy",)).logprobs.detach()
    for policy in (tmp_path / "base", lora_folders[0]):
        actor_critic = prepared_models(policy, ref_model=lora_folders[0])
        outputs = actor_critic(batch_of(), 1.0, ("policy", "reference"))
        np.testing.assert_allclose(outputs.reference_logprobs.detach(), expected, atol=1e-6)
        assert not any(p.requires_grad for p in actor_critic.reference.parameters())
    model = load_policy(tmp_path / "base")
    with pytest.raises(InputError, match="ref_model is the policy itself"):
        prepared_models(model, ref_model=model)


def test_a_fresh_adapter_starts_as_its_base(tmp_path, tiny_model, tiny_tokenizer):
    base = save_base(tmp_path, tiny_model, tiny_tokenizer)
    actor_critic = prepared_models(base, lora=lora_config(4, 8.0))
    outputs = actor_critic(batch_of(), 1.0, ("policy", "reference"))
    assert torch.equal(outputs.logprobs, outputs.reference_logprobs)
    full = prepared_models(base)(batch_of(), 1.0, ("policy",))
    np.testing.assert_allclose(outputs.logprobs.detach(), full.logprobs.detach(), atol=1e-6)


def test_a_full_reward_model_beside_a_lora_policy_is_a_model_of_its_own(tmp_path, tiny_model, tiny_tokenizer):
    base = save_base(tmp_path, tiny_model, tiny_tokenizer)
    sft = save_adapter(tmp_path, base, tiny_tokenizer)
    reward = save_reward_model(tmp_path, base, tiny_tokenizer)
    actor_critic = prepared_models(sft, value_model=reward)
    assert actor_critic.value is not None
    grads = gradients(actor_critic, batch_of())
    assert len(grads) == len(actor_critic.policy_parameters()) + len(actor_critic.value_parameters())
    assert not any(name.startswith("value.score") for name in grads)


def test_tied_embeddings_and_trained_chat_tokens(tmp_path, tiny_model, tiny_tokenizer):
    """Ids whose embeddings an adapter trains change a tied head, too."""
    config = copy.deepcopy(tiny_model.config)
    config.tie_word_embeddings = True
    base = save_base(tmp_path, LlamaForCausalLM(config), tiny_tokenizer)
    policy = get_peft_model(
        load_policy(base), lora_config(4, 8.0, target_modules=["q_proj"], trainable_tokens=[30, 33])
    )
    shake(policy, 1, only="trainable_tokens")
    shake(policy, 1, only="lora_")
    policy.save_pretrained(str(tmp_path / "sft"))
    tiny_tokenizer.save_pretrained(tmp_path / "sft")
    actor_critic = prepared_models(tmp_path / "sft")
    outputs = actor_critic(batch_of(), 1.0, ("policy", "reference"))
    assert torch.equal(outputs.logprobs, outputs.reference_logprobs)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "sft")).eval()
    logits = plain(torch.tensor([PROMPTS[1] + RESPONSES[1]])).logits[0].log_softmax(-1)[:-1]
    np.testing.assert_allclose(outputs.logprobs[1].detach(), logits[range(4), RESPONSES[1]].detach(), atol=1e-5)
    shake(actor_critic.policy, 7, only="trainable_tokens_delta.default")
    moved = actor_critic(batch_of(), 1.0, ("policy", "reference"))
    assert torch.equal(moved.reference_logprobs, outputs.reference_logprobs)
    assert not torch.equal(moved.logprobs, outputs.logprobs)
    grads = gradients(actor_critic, batch_of())
    assert any("trainable_tokens_delta.default" in name for name in grads)
    assert any("trainable_tokens_delta.value" in name for name in grads)
    values = {id(p) for p in actor_critic.value_parameters()}
    assert all(id(p) in values for name, p in actor_critic.named_parameters() if name.endswith("delta.value"))


def test_a_lora_reward_model_starts_a_whole_value_model_beside_a_whole_policy(tiny_model, tmp_path):
    from types import SimpleNamespace

    tiny_model.save_pretrained(tmp_path)
    lora = lora_config(2, 4, task_type="SEQ_CLS")
    scalar = new_scalar_model(str(tmp_path), seed=3, lora=lora)
    with torch.no_grad():
        for name, weight in scalar.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    normalizer = ScoreNormalizer(mean=0.4, std=2.0, count=1)
    both = prepared_models(str(tmp_path), value_model=SimpleNamespace(model=scalar, normalizer=normalizer))
    batch = make_batch([[5, 6, 7]], [[8, 9]], 0, "cpu")
    values = both(batch, 1.0, ("value",)).values[0]
    for t, ids in enumerate(([5, 6, 7], [5, 6, 7, 8])):
        row = torch.tensor([ids])
        expected = (last_token_scores(scalar, row, torch.ones_like(row)) - 0.4) / 2.0
        torch.testing.assert_close(values[t : t + 1], expected, atol=1e-5, rtol=1e-5)
    assert all(p.requires_grad for p in both.value.model.parameters())
