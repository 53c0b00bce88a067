"""What only a GPU can show: the same numbers as a CPU's, training in float32 and bfloat16, sampling, also beside an
update, a resumed run, bases in 4 bits.

`make test` leaves them out; `recipes/benchmarks/gpu.sh` runs them, or `pytest -m gpu`.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from reference.ppo_runs import make, prepared, token_logprobs
from reference.tiny_chain import chain, save_base, shake
from transformers import AutoModelForCausalLM

from reward_models import RewardConfig, RewardModel, RewardTrainer
from rlhf import SFTConfig, SFTTrainer
from rlhf.models import packing, torch_flash
from rlhf.models.loading import is_quantized, load_policy
from rlhf.padding import make_batch
from rlhf.ppo import math as ppo_math
from rlhf.ppo.build import build_actor_critic
from rlhf.ppo.trainer import PPOConfig, PPOTrainer
from rlhf.sampling.decode import TransformersEngine

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")]

PROMPTS = [[5, 6, 7], [9], list(range(20, 45)), [30, 31]]
RESPONSES = [[30, 31], [32, 33, 34, 35], [36], [40, 41, 42, 43, 44, 45, 46, 47]]
CLOSE = 1e-4  # float32 on both sides, other kernels


@pytest.fixture(params=["full", "adapter", "shared_trunk"])
def models(request, tmp_path, tiny_model, tiny_tokenizer):
    """The same three models on the CPU and on the card."""
    policy, _ = chain(tmp_path, tiny_model, tiny_tokenizer, lora=request.param != "full")
    kind = "shared_trunk" if request.param == "shared_trunk" else None
    return [build_actor_critic(policy, value_kind=kind, seed=3).to(device) for device in ("cpu", "cuda")]


def test_outputs_and_gradients_are_a_cpus(models):
    found = []
    for actor_critic in models:
        device = next(actor_critic.parameters()).device
        batch = make_batch(PROMPTS, RESPONSES, 0, device)
        outputs = actor_critic(batch, 0.7, ("policy", "value", "reference"))
        old, ones = outputs.logprobs.detach() - 0.05, torch.ones_like(outputs.logprobs)
        policy, _ = ppo_math.policy_loss(outputs.logprobs, old, ones, batch.mask, 0.2)
        value, _ = ppo_math.value_loss(outputs.values, outputs.values.detach() + 0.1, ones, batch.mask, 0.2)
        (policy + value).backward()
        gradients = {name: p.grad.cpu() for name, p in actor_critic.named_parameters() if p.grad is not None}
        found.append(({name: value.detach().cpu() for name, value in outputs._asdict().items()}, gradients))
    (on_cpu, cpu_gradients), (on_cuda, cuda_gradients) = found
    for name, expected in on_cpu.items():
        torch.testing.assert_close(on_cuda[name], expected, atol=CLOSE, rtol=CLOSE, msg=name)
    assert cuda_gradients.keys() == cpu_gradients.keys()
    for name, expected in cpu_gradients.items():
        torch.testing.assert_close(cuda_gradients[name], expected, atol=CLOSE, rtol=1e-3, msg=name)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_ppo_trains_behind_its_own_checks(tmp_path, tiny_model, tiny_tokenizer, lora, bf16):
    """Preflight included: the sampled log-probabilities are those that are trained, the first ratio is 1."""
    policy, reward = chain(tmp_path, tiny_model, tiny_tokenizer, lora=lora)
    args = PPOConfig(
        output_dir=str(tmp_path / "ppo"), updates=2, rollout_size=8, minibatch_size=4, inner_epochs=2,
        max_new_tokens=12, learning_rate=1e-3, tokens_per_microbatch=256, bf16=bf16,
    )  # fmt: skip
    rows = [{"prompt": f"Count to {word}"} for word in ("two", "three", "four", "five", "six", "seven")]
    trainer = PPOTrainer(str(policy), RewardModel.load(reward), args, rows, value_model=str(reward))
    assert trainer.device.type == "cuda"
    trainer.train()
    logged = [json.loads(line) for line in Path(args.output_dir, "metrics.jsonl").read_text().splitlines()]
    assert len(logged) == 2
    if not bf16:
        assert abs(logged[0]["kl_nats"]) < 1e-5


def test_a_resumed_run_ends_with_the_same_weights(tmp_path, tiny_model, tiny_tokenizer):
    policy, reward = chain(tmp_path, tiny_model, tiny_tokenizer, lora=True)
    rows, states = [{"prompt": f"Count to {word}"} for word in ("two", "three", "four", "five")], []

    def trainer(name: str, updates: int) -> PPOTrainer:
        args = PPOConfig(
            output_dir=str(tmp_path / name), updates=updates, rollout_size=8, minibatch_size=4, inner_epochs=1,
            max_new_tokens=8, learning_rate=1e-3, bf16=False, save_steps=1, lr_schedule="constant", preflight=False,
        )  # fmt: skip
        return PPOTrainer(str(policy), RewardModel.load(reward), args, rows, value_model=str(reward))

    whole = trainer("whole", 3)
    whole.train()
    (tmp_path / "broken").mkdir()
    for checkpoint in sorted((tmp_path / "whole").glob("checkpoint-*")):
        if checkpoint.name == "checkpoint-2":
            checkpoint.rename(tmp_path / "broken" / checkpoint.name)
    again = trainer("broken", 3)
    again.train(resume_from_checkpoint=str(tmp_path / "broken/checkpoint-2"))
    states = [one.actor_critic.trained_state() for one in (whole, again)]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


@pytest.mark.parametrize("lora", [False, True])
def test_sft_and_reward_model_learn_there(tmp_path, tiny_model, tiny_tokenizer, lora):
    """In bfloat16, their own checks first; the loss falls, and a saved reward model scores as it did."""
    chain(tmp_path, tiny_model, tiny_tokenizer, lora=False)
    rows = [{"prompt": f"Count to {n}", "completion": "one two three four"} for n in range(24)]
    shared = {"lora_rank": 4 if lora else 0, "learning_rate": 5e-3, "bf16": True, "save_steps": 0}
    args = SFTConfig(output_dir=str(tmp_path / "s"), epochs=3, batch_size=8, logging_steps=1, **shared)
    sft = SFTTrainer(str(tmp_path / "base"), args, rows)
    sft.train()
    losses = [row["loss"] for row in sft.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    ranked = [
        {"prompt": f"Say {n}", "responses": ["yes " * k for k in (1, 2, 3, 4)], "ranks": [4, 3, 2, 1]}
        for n in range(24)
    ]
    args = RewardConfig(
        output_dir=str(tmp_path / "r"), epochs=3, prompts_per_batch=8, microbatch_size=4, logging_steps=1, **shared
    )
    trainer = RewardTrainer(str(tmp_path / "base"), args, train_dataset=ranked)
    trainer.train()
    trainer.save_model()
    accuracies = [row["accuracy"] for row in trainer.state.log_history if "accuracy" in row]
    assert accuracies[-1] >= accuracies[0]
    talk = [{"role": "user", "content": "Say 3"}, {"role": "assistant", "content": "yes yes"}]
    scored = RewardModel.load(tmp_path / "r").score([talk])
    assert scored.isfinite().all()
    on_cpu = RewardModel.load(tmp_path / "r", device="cpu").score([talk])
    torch.testing.assert_close(scored, on_cpu, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("lora", [False, True])
def test_what_is_sampled_beside_an_update_comes_from_the_weights_before_it(tmp_path, tiny_model, tiny_tokenizer, lora):
    """On a stream of its own, while the trained weights change in place: each rollout's tokens and log-probabilities
    are those of the weights as they were when the update before began."""
    policy, _ = chain(tmp_path, tiny_model, tiny_tokenizer, lora=lora)
    settings = {"learning_rate": 5e-3, "lr_schedule": "constant", "rollouts_ahead": 1, "preflight": False}
    trainer = make(tmp_path, policy, updates=4, max_new_tokens=24, inner_epochs=4, **settings)
    rollout, taken = prepared(trainer), load_policy(policy).eval().to(trainer.device)
    for update in range(1, 4):
        trainer.update(rollout)
        now = copy.deepcopy(trainer.actor_critic.policy).eval()
        rollout = prepared(trainer)
        assert rollout.staleness == 1
        draws = trainer.draws.sampling(update, 12, trainer.device)
        alone = TransformersEngine(taken, trainer.stop_ids, trainer.pad_id).generate(rollout.prompt_ids, 24, 1.0, draws)
        assert rollout.response_ids == alone.ids
        apart = 0.0
        for row, expected in enumerate(token_logprobs(taken, rollout)):
            told, trained = rollout.engine_logprobs[row, : len(expected)], rollout.logprobs[row, : len(expected)]
            torch.testing.assert_close(told, expected, atol=CLOSE, rtol=0)
            apart = max(apart, float((trained - expected).abs().max()))
        assert apart > 0.01  # what the update has changed shows
        taken = now


def test_rollouts_one_ahead_in_bfloat16(tmp_path, tiny_model, tiny_tokenizer):
    policy, reward = chain(tmp_path, tiny_model, tiny_tokenizer, lora=True)
    settings = {"updates": 4, "learning_rate": 1e-3, "bf16": True, "rollouts_ahead": 1}
    make(tmp_path, policy, RewardModel.load(reward), value_model=str(reward), **settings).train()
    logged = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["rollout_staleness_updates"] for row in logged] == [0, 1, 1, 1]
    assert all(abs(row["engine_kl_nats"]) < 0.1 for row in logged)


def test_rows_are_packed_without_flash_attn(tmp_path, tiny_model, tiny_tokenizer, monkeypatch):
    """By torch's own flash attention, which `packing: auto` chooses then; every trainer, in bfloat16."""
    if torch_flash.kernel() is None or torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs torch 2.11 and compute capability 8.0")
    monkeypatch.setattr(packing, "is_flash_attn_2_available", lambda: False)
    seen, forward = [], packing.as_one_row

    def watched(model, *given):
        seen.append(packing.attention_of(model))
        return forward(model, *given)

    policy, _ = chain(tmp_path, tiny_model, tiny_tokenizer, lora=False)
    base, shared = str(tmp_path / "base"), {"epochs": 1, "bf16": True, "save_steps": 0}
    rows = [{"prompt": f"Count to {n}", "completion": "one two three four " * (1 + n % 3)} for n in range(8)]
    sft = SFTTrainer(base, SFTConfig(output_dir=str(tmp_path / "s"), batch_size=8, microbatch_size=8, **shared), rows)
    ranked = [{"prompt": f"Say {n}", "responses": ["yes", "yes " * 9], "ranks": [1, 2]} for n in range(8)]
    args = RewardConfig(output_dir=str(tmp_path / "r"), prompts_per_batch=8, microbatch_size=8, **shared)
    reward_model = RewardTrainer(base, args, train_dataset=ranked)
    ppo = make(tmp_path, policy, updates=1, bf16=True, preflight=False)
    assert ppo.actor_critic.packs
    for trainer in (sft, reward_model, ppo):
        seen.clear()
        with monkeypatch.context() as patch:
            patch.setattr(packing, "as_one_row", watched)
            trainer.train()
        assert len(seen) >= 3, "more than the trials of whether a model packs"
        assert set(seen) == {packing.VARLEN}


@pytest.fixture
def base(tmp_path, tiny_model, tiny_tokenizer) -> Path:
    """A model whose layers hold whole blocks of 64 numbers."""
    pytest.importorskip("bitsandbytes", reason="no bitsandbytes: pip install 'rlhf-recipes[qlora]'")
    config = copy.deepcopy(tiny_model.config)
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 128, 16
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    shake(model, 0, 0.05)
    return save_base(tmp_path, model, tiny_tokenizer)


QLORA = {"lora_rank": 4, "load_in_4bit": True, "bf16": True, "save_steps": 0}


def check_adapter(trained, folder: Path, start: dict[str, torch.Tensor]) -> None:
    """The base is in 4 bits, the adapter in float32 and moved; the folder's adapter is the same."""
    assert is_quantized(trained)
    found = {name: p.detach().cpu() for name, p in trained.named_parameters() if "lora_" in name and p.requires_grad}
    assert {p.dtype for p in found.values()} == {torch.float32}
    assert all(p.isfinite().all() for p in found.values())
    assert sum(not torch.equal(p, start[name]) for name, p in found.items()) >= len(found) / 2
    assert (folder / "adapter_config.json").is_file()


def adapter_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters() if "lora_" in name}


def test_sft_over_a_base_in_4_bits(tmp_path, base):
    rows = [{"prompt": f"Count to {n}", "completion": "one two three four"} for n in range(24)]
    args = SFTConfig(
        output_dir=str(tmp_path / "s"), epochs=3, batch_size=8, logging_steps=1, learning_rate=5e-3, **QLORA
    )
    sft = SFTTrainer(str(base), args, rows)
    start = adapter_of(sft.model)
    sft.train()
    losses = [row["loss"] for row in sft.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    sft.save_model(str(tmp_path / "s"))
    check_adapter(sft.model, tmp_path / "s", start)
    plain = load_policy(tmp_path / "s")  # over the base in float32
    assert not is_quantized(plain)
    saved = {name: p for name, p in adapter_of(plain).items() if p.abs().sum()}
    mine = {name: p for name, p in adapter_of(sft.model).items() if p.abs().sum()}
    assert saved.keys() == mine.keys()
    assert all(torch.equal(saved[name], mine[name]) for name in saved)


def test_a_reward_model_over_a_base_in_4_bits(tmp_path, base):
    rows = [
        {"prompt": f"Say {n}", "responses": ["yes " * k for k in (1, 2, 3, 4)], "ranks": [4, 3, 2, 1]}
        for n in range(24)
    ]
    args = RewardConfig(
        output_dir=str(tmp_path / "r"), epochs=3, prompts_per_batch=8, microbatch_size=4, logging_steps=1,
        learning_rate=5e-3, **QLORA,
    )  # fmt: skip
    trainer = RewardTrainer(str(base), args, train_dataset=rows)
    start = adapter_of(trainer.model)
    trainer.train()
    accuracies = [row["accuracy"] for row in trainer.state.log_history if "accuracy" in row]
    assert accuracies[-1] >= accuracies[0]
    trainer.save_model(str(tmp_path / "r"))
    check_adapter(trainer.model, tmp_path / "r", start)
    assert RewardModel.load(tmp_path / "r")(["Say 3"], ["yes yes"])[0] == pytest.approx(0, abs=100)


@pytest.mark.parametrize("ahead", [0, 1])
def test_ppo_over_a_base_in_4_bits(tmp_path, base, ahead):
    settings = {"updates": 3, "learning_rate": 1e-3, "rollouts_ahead": ahead, **QLORA}
    trainer = make(tmp_path, str(base), **settings)
    start = adapter_of(trainer.actor_critic.policy)
    assert trainer.train()["policy_grad_norm"] > 0
    trainer.save_model(tmp_path / "saved")
    check_adapter(trainer.actor_critic.policy, tmp_path / "saved", start)
