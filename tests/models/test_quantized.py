"""LoRA over a base in 4 bits (QLoRA, Dettmers et al. 2023) on the CPU: against the same numbers held in float32."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from reference import forked, quantized_worker
from reference.prepared import prepared_models
from reference.tiny_chain import shake
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from reward_models import RewardConfig, RewardModel, RewardTrainer
from rlhf.errors import InputError
from rlhf.models.adapters import lora_config
from rlhf.models.loading import held_in_4_bits, is_quantized, load_policy
from rlhf.padding import make_batch
from rlhf.ppo.trainer import PPOConfig, PPOTrainer
from rlhf.sampling.decode import TransformersEngine
from rlhf.sft.trainer import SFTConfig, SFTTrainer

bnb = pytest.importorskip("bitsandbytes")
ROWS = [{"prompt": f"Count to {word}"} for word in ("one", "two", "three", "four")]


@pytest.fixture
def base(tmp_path, tiny_model, tiny_tokenizer):
    config = copy.deepcopy(tiny_model.config)
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 128, 16  # whole blocks of 64 numbers
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    shake(model, 0, 0.05)
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def in_4_bits(folder) -> Any:
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32, llm_int8_threshold=0.0
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


def in_float32(folder, quantized: Any) -> Any:
    """A plain model with the numbers that the quantized one stands for."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = 0
    for (_, ours), (_, theirs) in zip(plain.named_modules(), quantized.named_modules(), strict=True):
        if isinstance(theirs, bnb.nn.Linear4bit):
            assert isinstance(ours, nn.Linear)
            values = bnb.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
            assert not torch.equal(ours.weight, values)
            ours.weight.data.copy_(values)
            found += 1
    assert found >= 7
    return plain


def gradients(model: Any, sample_first: bool) -> dict[str, torch.Tensor]:
    actor_critic = prepared_models(model, lora=lora_config(2, 4.0))
    shake(actor_critic, 1, 0.1, only="lora_")
    shake(actor_critic.value_head, 3, 0.3)
    if sample_first:
        TransformersEngine(actor_critic.policy, (), 0).generate([[5, 6, 7], [9]], 4, 1.0, torch.Generator())
    outputs = actor_critic(make_batch([[5, 6, 7], [9]], [[20, 21], [22, 23, 24]], 0, "cpu"), 1.0)
    (outputs.logprobs.sum() + outputs.values.square().sum()).backward()
    return {name: p.grad for name, p in actor_critic.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("sample_first", [False, True])
def test_gradients_are_those_of_the_same_numbers_in_float32(base, sample_first):
    """After sampling too: on some CPUs bitsandbytes then takes an operator that hands no gradient down, unless told
    not to."""
    quantized = in_4_bits(base)
    expected = gradients(in_float32(base, quantized), sample_first)
    seen = gradients(quantized, sample_first)
    assert seen.keys() == expected.keys()
    for name, grad in expected.items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(seen[name], grad, rtol=0, atol=2e-5 * float(grad.abs().max()), msg=name)


def test_a_model_that_can_no_longer_learn_is_refused(base):
    quantized = in_4_bits(base)
    layer = next(module for module in quantized.modules() if isinstance(module, bnb.nn.Linear4bit))
    layer.weight.quant_state.packing_format_for_cpu = True  # as bitsandbytes marks it, on CPUs with AVX512-BF16
    with pytest.raises(InputError, match="load it anew"):
        prepared_models(quantized, lora=lora_config(2, 4.0))


@pytest.mark.parametrize("kind", ["adapter", "shared_trunk"])
def test_a_ppo_run(base, tmp_path, tiny_tokenizer, kind):
    """Two updates, preflight's checks included; what is saved is a peft adapter that loads over the plain base."""
    args = PPOConfig(
        output_dir=str(tmp_path / "ppo"), updates=2, rollout_size=4, minibatch_size=2, inner_epochs=1, max_new_tokens=6,
        learning_rate=1e-3, bf16=False, lora_rank=2, value_model=kind,
    )  # fmt: skip

    def score(prompts, completions, completion_ids, **columns):
        return [sum(token < 200 for token in ids) / len(ids) for ids in completion_ids]

    trainer = PPOTrainer(in_4_bits(base), score, args, ROWS, processing_class=tiny_tokenizer)
    metrics = trainer.train()
    assert metrics["step0_ratio_error"] == 0.0
    assert metrics["policy_grad_norm"] > 0
    trainer.save_model(tmp_path / "saved")
    assert prepared_models(tmp_path / "saved").policy.peft_config["default"].r == 2


def test_what_cannot_be_trained_is_refused(base):
    with pytest.raises(InputError, match="quantized model is trained through LoRA alone"):
        prepared_models(in_4_bits(base))
    with pytest.raises(InputError, match="quantized model is trained through LoRA alone"):
        prepared_models(in_4_bits(base), lora=lora_config(2, 4.0), value_kind="separate")


# -- by the setting load_in_4bit ---------------------------------------------------------------------------


def test_the_setting_is_refused_in_one_line_where_it_cannot_be(base, monkeypatch):
    ask = lambda model=base, adapted=True: held_in_4_bits(model, torch.float32, adapted)  # noqa: E731
    with pytest.raises(InputError, match="set lora_rank to train an adapter over them"):
        ask(adapted=False)
    with pytest.raises(InputError, match="the model is loaded already; pass its folder"):
        ask(AutoModelForCausalLM.from_pretrained(base))
    assert ask(in_4_bits(base)) == {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="there is no GPU here"):
        ask()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"bitsandbytes is not installed; pip install 'rlhf-recipes\[qlora\]'"):
        ask()
    for config, trainer in ((SFTConfig, SFTTrainer), (RewardConfig, RewardTrainer)):
        args = config(output_dir=str(base.parent / "run"), load_in_4bit=True)
        with pytest.raises(InputError, match="load_in_4bit"):
            trainer(str(base), args, train_dataset=RANKINGS if trainer is RewardTrainer else DEMONSTRATIONS)
    with pytest.raises(InputError, match="load_in_4bit"):
        PPOTrainer(str(base), lambda completions, **_: [0.0], PPOConfig(load_in_4bit=True), ROWS)


RANKINGS = [{"prompt": f"Count to {i}", "responses": ["one", "two, three"], "ranks": [1, 2]} for i in range(4)]
DEMONSTRATIONS = [{"prompt": f"Count to {i}", "completion": "one, two"} for i in range(4)]


@pytest.fixture
def on_cpu(monkeypatch):
    """Let the setting load on a CPU, where bitsandbytes computes slowly, and rightly."""

    for module in quantized_worker.HOLDERS:
        monkeypatch.setattr(f"{module}.held_in_4_bits", quantized_worker.on_cpu)


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.slow
def test_the_supervised_trainers_train_an_adapter_over_4_bits(base, tmp_path, on_cpu):
    """What is saved loads over the plain base; an adapter that is continued starts as it was saved, unrounded."""
    common = {"microbatch_size": 2, "epochs": 1, "bf16": False, "load_in_4bit": True, "learning_rate": 1e-3}
    args = SFTConfig(output_dir=str(tmp_path / "sft"), lora_rank=2, batch_size=2, **common)
    sft = SFTTrainer(str(base), args, DEMONSTRATIONS)
    before = trained(sft.model)
    sft.train()
    assert is_quantized(sft.model)
    assert sum(not torch.equal(value, before[name]) for name, value in trained(sft.model).items()) > 7
    assert {value.dtype for value in before.values()} == {torch.float32}
    sft.save_model(str(tmp_path / "sft"))
    plain = load_policy(tmp_path / "sft")
    assert not is_quantized(plain)
    saved = {name: value for name, value in trained(plain).items() if "lora_" in name}
    args = RewardConfig(output_dir=str(tmp_path / "rm"), prompts_per_batch=2, **common)
    rm = RewardTrainer(str(tmp_path / "sft"), args, train_dataset=RANKINGS)
    start = trained(rm.model)
    assert is_quantized(rm.model)
    mine = {name.removeprefix("base_model.model."): value for name, value in start.items() if "lora_" in name}
    theirs = {name.removeprefix("base_model.model."): value for name, value in saved.items()}
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    rm.train()
    head = next(name for name in start if "score" in name)
    assert not torch.equal(trained(rm.model)[head], start[head])
    rm.save_model(str(tmp_path / "rm"))
    assert len(RewardModel.load(tmp_path / "rm")(["Count"], ["one"])) == 1


def test_ppo_holds_its_base_in_4_bits(base, tmp_path, on_cpu, tiny_tokenizer):
    args = PPOConfig(
        output_dir=str(tmp_path / "ppo"), updates=1, rollout_size=4, minibatch_size=2, inner_epochs=1, max_new_tokens=6,
        bf16=False, lora_rank=2, load_in_4bit=True, rollouts_ahead=1,
    )  # fmt: skip
    trainer = PPOTrainer(str(base), lambda completions, **_: [float(len(c)) for c in completions], args, ROWS,
                         processing_class=tiny_tokenizer)  # fmt: skip
    assert is_quantized(trainer.actor_critic.policy)
    assert trainer.actor_critic.reference is None
    assert trainer.train()["policy_grad_norm"] > 0


@pytest.mark.slow
def test_two_processes_train_the_adapter_that_one_does_and_resume_exactly(base, tmp_path, on_cpu):
    """By DDP, SFT and PPO of its adapter. The weights move much further than the two may be apart."""
    command = [quantized_worker.__file__, base, tmp_path / "two", tmp_path / "two.pt"]
    done = forked.shared().together(command)
    assert done.returncode == 0, done.stderr[-3000:]
    two, one = torch.load(tmp_path / "two.pt"), quantized_worker.run(str(base), tmp_path / "one")
    assert two["processes"] == 2
    assert all(result[stage]["quantized"] for result in (two, one) for stage in ("sft", "ppo"))
    saved = {
        (run, name): load_file(tmp_path / run / "sft" / name / "adapter_model.safetensors")
        for run in ("one", "two")
        for name in ("whole", "resumed")
    }
    mine, alone = two["ppo"], one["ppo"]
    start = {name.replace(".default", ""): tensor for name, tensor in one["sft"]["start"].items()}
    for whole, resumed, expected, before in (
        (saved["two", "whole"], saved["two", "resumed"], saved["one", "whole"], start),
        (mine["whole"], mine["resumed"], alone["whole"], alone["start"]),
    ):
        assert whole.keys() == resumed.keys() == expected.keys()
        for name, tensor in expected.items():
            np.testing.assert_allclose(whole[name], tensor, rtol=0, atol=1e-5, err_msg=name)
            assert torch.equal(resumed[name], whole[name]), name
        lora = [name for name in expected if "lora_" in name]
        assert max(float((expected[name] - before[name]).abs().max()) for name in lora) > 1e-3
